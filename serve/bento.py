"""A bundle as a Bento: everything that a container needs to serve it, without torch.

The Bento contains a short service file, the bundle, this package's own files, and the list of all packages that serving
imports, in the versions installed here. ``bentoml build`` makes it from a temporary folder, in another process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ensembler import __version__
from ensembler.errors import EnsemblerError, UsageError
from ensembler.machine import home
from ensembler.serve.runtime.manifest import BundleManifest, read_bundle
from ensembler.storage import artefact

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["BentoError", "build_bento", "pinned", "serving", "write_sources"]

_SERVICE = '''"""Serves the bundle beside it."""

import os
from pathlib import Path

os.environ.setdefault("ENSEMBLER_BUNDLE", str(Path(__file__).parent / "bundle"))

from bentoml.images import Image

from ensembler.serve.service import PredictiveUncertainty

# No distribution is named, as BentoML would install a compiler with its packages; every wheel needed is a built one.
image = Image(base_image="python:{python}-slim", distro="", python_version="{python}", lock_python_packages=False)
PredictiveUncertainty.image = image.requirements_file("requirements.txt")

__all__ = ["PredictiveUncertainty"]
'''

_TAG = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?(:[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?)?")


class BentoError(EnsemblerError):
    """BentoML could not build a Bento."""


def build_bento(bundle: Path, tag: str | None = None, *, gpu: bool = False) -> str:
    """Build a Bento from a bundle into BentoML's store on this machine.

    Args:
        bundle: its folder.
        tag: ``NAME`` or ``NAME:VERSION``; by default the name of the bundle's run, and the time with the bundle's hash.
        gpu: list the ONNX Runtime for GPUs.

    Returns:
        The Bento's tag, ``NAME:VERSION``.

    Raises:
        ArtefactError: no bundle there, or BentoML's home cannot be written; CorruptError: it has changed.
        UsageError: not a tag, or a package that building or serving needs is not installed.
        BentoError: BentoML refuses; the message gives its reason.
    """
    manifest = read_bundle(bundle)
    if shutil.which("uv") is None and not _installed("uv"):  # BentoML would install it into this environment
        raise UsageError("building a Bento needs uv, which is not installed: run pip install uv")
    tag = tag or re.sub(r"[^a-z0-9]+", "-", manifest.run.name.lower()).strip("-")[:63].strip("-") or "ensemble"
    if not _TAG.fullmatch(tag):
        raise UsageError(
            f"--tag {tag!r} is not a tag: use NAME or NAME:VERSION of lower-case letters, digits, '.', '_' and '-'"
        )
    artefact.check_writable(
        Path(os.environ.get("BENTOML_HOME") or home() / "bentoml"), "set BENTOML_HOME to a folder that can be written"
    )
    with tempfile.TemporaryDirectory(prefix="ensembler-bento-") as scratch:
        folder = Path(scratch) / "bento"
        name, _, version = tag.partition(":")
        if not version:
            version = f"{datetime.now(UTC):%Y%m%d%H%M%S}-{artefact.sha256(bundle / artefact.MANIFEST)[:8]}"
        write_sources(bundle, manifest, folder, name, gpu=gpu)
        environment = os.environ | {"BENTOML_DO_NOT_TRACK": "True"}
        command = [sys.executable, "-m", "bentoml", "build", "--output", "tag", "--version", version]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603  our own arguments
    if done.returncode:
        lines = [line.strip(" |+-") for line in (done.stdout + done.stderr).splitlines()]
        reason = next((line for line in reversed(lines) if line), f"it ended with {done.returncode}")
        if "already exists in the store" in reason:
            raise UsageError(
                f"the Bento {name}:{version} already exists: choose another --tag, or bentoml delete {name}:{version}"
            )
        raise BentoError(f"bentoml build failed: {reason.removeprefix('Error: ')}")
    return f"{name}:{version}"  # BentoML prints cat:one with a picture of a cat


def write_sources(bundle: Path, manifest: BundleManifest, folder: Path, name: str, *, gpu: bool = False) -> None:
    """Write the sources of ``bentoml build``.

    Args:
        bundle: its folder, verified.
        manifest: the bundle's.
        folder: of the sources; must not exist.
        name: of the Bento.
        gpu: see :func:`build_bento`.

    Raises:
        UsageError: a package that serving needs is not installed.
    """
    packages = [line for line in pinned(gpu) if not line.startswith("bentoml==")]  # BentoML adds itself
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    options = {
        "service": "service:PredictiveUncertainty",
        "name": name,
        "description": f"{manifest.method}, {manifest.members} x {manifest.architecture}, {manifest.dataset}",
        "labels": {
            "ensembler": re.sub(r"[^\w.-]", "-", __version__),
            "bundle": artefact.sha256(bundle / artefact.MANIFEST)[:12],
        },
        "include": ["service.py", "requirements.txt", "bundle/**", "ensembler/**", "ensembler-*/**"],
    }
    folder.mkdir(parents=True)
    (folder / "bentofile.yaml").write_text(json.dumps(options, indent=1), encoding="utf-8")  # JSON is YAML
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    (folder / "service.py").write_text(_SERVICE.replace("{python}", python), encoding="utf-8")
    for file in (*manifest.files, artefact.MANIFEST, artefact.SEAL):  # no other file, and no link
        target = folder / "bundle" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with artefact.open_file(bundle, file) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    _copy_package(folder)


def serving() -> list[Requirement]:
    """Return what this package needs to serve a bundle, to verify it, and to ask it: its extra ``serve``.

    Raises:
        UsageError: the installed package does not list it.
    """
    from packaging.requirements import Requirement

    listed = map(Requirement, (metadata.requires("ensembler") if _installed("ensembler") else None) or ())
    extra = [each for each in listed if each.marker and not each.marker.evaluate({"extra": ""})]
    found = [each for each in extra if each.marker and each.marker.evaluate({"extra": "serve"})]
    if not found:
        raise UsageError("ensembler does not list what serving needs: install it again with pip")
    return found


def pinned(gpu: bool = False) -> list[str]:
    """Return what the extra ``serve`` needs, directly or not, as ``name==version`` in the versions installed here.

    ONNX Runtime is the one for CPUs unless ``gpu``, in the version of whichever is installed. The CUDA libraries of the
    other are left to its own extras, as this machine may have them from elsewhere.

    Raises:
        UsageError: one of them is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    runtimes = ("onnxruntime", "onnxruntime-gpu")
    runtime = next((name for name in runtimes if _installed(name)), "onnxruntime")
    left = [Requirement(runtime), *(each for each in serving() if each.name not in runtimes)]
    found: dict[str, str] = {}
    seen: set[str] = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if not _installed(name):
            raise UsageError(f"serving needs {name}, which is not installed: run pip install {name}")
        found[name] = metadata.version(name)
        for text in metadata.requires(name) or ():
            further = Requirement(text)
            marked = further.marker
            extras = requirement.extras or {""}
            if marked is None or any(marked.evaluate({"extra": extra}) for extra in extras):
                left.append(further)
    version = found.pop(runtime)
    found["onnxruntime-gpu[cuda,cudnn]" if gpu else "onnxruntime"] = version
    return sorted(f"{name}=={version}" for name, version in found.items())


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _copy_package(folder: Path) -> None:
    """Copy this package, from wherever it is installed, and metadata that name its version."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("ensembler", "ensembler.trainers", "ensembler.eval", "ensembler.study", "ensembler.serve"):
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(f"{package} is not installed: install ensembler again")
        target = folder.joinpath(*package.split("."))
        shutil.copytree(spec.submodule_search_locations[0], target, ignore=ignored, dirs_exist_ok=True)
    described = folder / f"ensembler-{__version__}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ensembler\nVersion: {__version__}\n")
