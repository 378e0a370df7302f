"""Signed bundles: whoever has no key can write no bundle that is accepted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import ArtefactError, UsageError
from ensembler.serve import Runtime, export_run
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.storage import artefact, signing, urls
from ensembler.storage.artefact import SEAL
from tests._runs import make_bundle
from tests._service import in_process
from tests.test_bundles import dataset, run, traced  # noqa: F401  fixtures
from tests.test_tampered import assert_one_sentence, reseal, setting

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo


def pair(folder: Path, name: str, key: Any = None, password: bytes | None = None) -> tuple[Path, Path]:
    key = key or ed25519.Ed25519PrivateKey.generate()
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return pair(tmp_path, "key")


@pytest.fixture
def signed(keys: tuple[Path, Path], tmp_path: Path) -> Path:
    bundle = shutil.copytree(make_bundle(tmp_path / "plain"), tmp_path / "signed")
    seal = (bundle / SEAL).read_bytes()
    (bundle / SEAL).write_bytes(seal + signing.sign(seal, signing.private_key(keys[0])))
    return bundle


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)


def test_an_export_is_signed_and_verified(run: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    made = call("export", run, "--out", tmp_path / "bundle", "--no-data", "--sign", keys[0])
    assert made.exit_code == 0, made.output
    found = call("verify", tmp_path / "bundle", "--key", keys[1])
    assert found.exit_code == 0 and "signed" in found.stdout
    assert call("verify", tmp_path / "bundle").exit_code == 0, "whoever does not ask needs no key"
    with pytest.raises(UsageError, match="no private key in PEM"):
        export_run(run, tmp_path / "other", use_data=False, key=keys[1])
    assert not (tmp_path / "other").exists()


def test_what_is_not_signed_with_the_key_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    read_bundle(signed, keys[1])
    other = pair(tmp_path, "other")
    assert_one_sentence(call("verify", signed, "--key", other[1]))
    missing = call("verify", signed, "--key", tmp_path / "missing.pub").stderr
    assert "-pubout" in missing and "genpkey" not in missing  # a new pair would not do
    assert_one_sentence(call("serve", signed, "--require-signature", other[1]))
    with pytest.raises(ArtefactError, match="is not signed: export it with --sign"):
        Runtime.load(tmp_path / "plain", key=keys[1])
    line, signature = (signed / SEAL).read_bytes().splitlines(keepends=True)
    for rest in (
        signature[:-2] + b"\n",
        signature + signature,
        b"# ed25519 " + b"A" * 86 + b"==\n",
        b"# rsa x\n",
        b"\n",
    ):
        (signed / SEAL).write_bytes(line + rest)
        with pytest.raises(ArtefactError, match="not signed"):
            read_bundle(signed, keys[1])


def test_a_signature_is_of_one_manifest(signed: Path, keys: tuple[Path, Path]) -> None:
    signature = (signed / SEAL).read_bytes().splitlines(keepends=True)[1]
    setting(dataset="another")(signed)
    (signed / SEAL).write_bytes((signed / SEAL).read_bytes() + signature)
    with pytest.raises(ArtefactError, match="is not signed with this key"):
        read_bundle(signed, keys[1])
    reseal(signed)
    with pytest.raises(ArtefactError, match="is not signed:"):
        read_bundle(signed, keys[1])


def test_the_service_starts_only_with_a_signed_bundle(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {"ENSEMBLER_REQUIRE_SIGNATURE": str(keys[1])}
    with in_process(signed, **environment) as client:
        assert client.get("/readyz").status_code == 200
        assert "require_signature" not in client.get("/metadata").json()["settings"]
    with pytest.raises(ArtefactError, match="is not signed"), in_process(tmp_path / "plain", **environment):
        pass
    assert Settings.read({"ENSEMBLER_BUNDLE": "x"} | environment).require_signature == keys[1]


def test_a_signature_goes_where_the_bundle_goes(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/store/mine"
    urls.push(signed, url)
    for found in (urls.pull(url), urls.local(url)):
        read_bundle(found, keys[1])
    assert artefact.read(urls.local(url), "bundle", (1,))["kind"] == "bundle"


def test_keys_that_are_none_are_told(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    protected, _ = pair(tmp_path, "protected", password=b"secret")
    (tmp_path / "nothing.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    for load, path, words in (
        (signing.private_key, private, "of another kind than Ed25519"),
        (signing.public_key, public, "of another kind than Ed25519"),
        (signing.private_key, protected, "has a password"),
        (signing.private_key, tmp_path / "nothing.pem", "no private key in PEM: make one with openssl genpkey"),
        (signing.public_key, keys[0], "no public key in PEM: make it of the private one with openssl pkey"),
        (signing.private_key, tmp_path / "missing.pem", "cannot read the key"),
        (signing.public_key, tmp_path, "cannot read the key"),
    ):
        with pytest.raises(UsageError, match=words):
            load(path)
