"""Signatures of bundles: Ed25519, of the line of the seal that has the manifest's SHA-256, and so of every file.

The signature is a second line of the seal, which ``sha256sum --check`` ignores: it goes wherever the bundle goes.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["SIGNED", "check", "private_key", "public_key", "sign"]

SIGNED = re.compile(rb"# ed25519 ([A-Za-z0-9+/]{86}==)\n")
"""The line of a signature."""

_MAKE = "openssl genpkey -algorithm ed25519 -out key.pem"
_MAKE_PUBLIC = "openssl pkey -in key.pem -pubout -out key.pub"


def sign(line: bytes, key: Ed25519PrivateKey) -> bytes:
    """Return the line that follows a seal's first one."""
    return b"# ed25519 " + base64.b64encode(key.sign(line)) + b"\n"


def check(seal: bytes, key: Ed25519PublicKey, where: Path) -> None:
    """Check the signature in a seal.

    Raises:
        ArtefactError: it is not signed, or not with this key.
    """
    from cryptography.exceptions import InvalidSignature

    line, _, rest = seal.partition(b"\n")
    signed = SIGNED.fullmatch(rest)
    if signed is None:
        raise ArtefactError(f"{where} is not signed: export it with --sign, or do not use it")
    try:
        key.verify(base64.b64decode(signed[1]), line + b"\n")
    except InvalidSignature:
        raise ArtefactError(f"{where} is not signed with this key: ask for the right key, or do not use it") from None


def private_key(path: str | Path) -> Ed25519PrivateKey:
    """Read a private key in PEM, without a password.

    Raises:
        UsageError: there is none.
    """
    content = _read(path, f"make one with {_MAKE}")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(content, password=None)
    except TypeError:
        raise UsageError(f"{path} has a password: give a key without one ({_MAKE})") from None
    except Exception:  # of several classes, by what is wrong
        raise UsageError(f"{path} is no private key in PEM: make one with {_MAKE}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is a key of another kind than Ed25519: make one with {_MAKE}")
    return key


def public_key(path: str | Path) -> Ed25519PublicKey:
    """Read a public key in PEM.

    Raises:
        UsageError: there is none.
    """
    content = _read(path, f"give the signer's public key, made with {_MAKE_PUBLIC}")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(content)
    except Exception:  # of several classes, by what is wrong
        raise UsageError(f"{path} is no public key in PEM: make it of the private one with {_MAKE_PUBLIC}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} is a key of another kind than Ed25519: make one with {_MAKE}, then {_MAKE_PUBLIC}")
    return key


def _read(path: str | Path, mend: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(2**20)
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror or error}: {mend}") from error
