"""A Bento from a bundle, an environment without torch that serves it, and the files that deploy it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from ensembler import __version__
from ensembler.cli import app
from ensembler.errors import ArtefactError, CorruptError, UsageError
from ensembler.serve import Runtime
from ensembler.serve.bento import build_bento, pinned, write_sources
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.storage import artefact, signing
from tests._service import ROUTE, Server, free_port, make_calibrated, tiny_images
from tests.test_signing import pair

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
HEAVY = {"torch", "torchvision", "scipy", "scikit-learn", "netcal", "matplotlib", "onnx", "onnxscript"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated(tmp_path_factory.mktemp("bento") / "bundle")


@pytest.fixture(scope="module")
def home(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of BentoML's that holds the Bento ``made:one``."""
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        before = list(metadata.distributions())
        assert build_bento(bundle, "made:one") == "made:one"
        names = {one.metadata["Name"] for one in before}
        assert {one.metadata["Name"] for one in metadata.distributions()} == names  # it installs nothing, as uv
        with pytest.raises(UsageError, match="already exists: choose another --tag"):
            build_bento(bundle, "made:one")
    return home


def test_the_bento_holds_what_it_needs_and_nothing_else(home: Path, bundle: Path) -> None:
    bento = home / "bentos" / "made" / "one"
    source = bento / "src"
    held = {path.name for path in source.iterdir()}
    package = f"ensembler-{__version__}.dist-info"
    assert held == {"service.py", "requirements.txt", "bentofile.yaml", "bundle", "ensembler", package}
    assert read_bundle(source / "bundle") == read_bundle(bundle)
    assert not list(source.rglob("__pycache__"))
    for room in ("trainers", "eval", "study", "serve"):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copied = source / "ensembler" / room / path.relative_to(ROOT / room)
                assert copied.read_bytes() == path.read_bytes()
    needed = (bento / "env" / "python" / "requirements.txt").read_text().split()
    assert sorted(needed) == pinned()
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim" in dockerfile
    assert "build-essential" not in dockerfile and "apt-get" not in dockerfile
    labels = yaml.safe_load((bento / "bento.yaml").read_text())["labels"]
    assert labels["bundle"] == artefact.sha256(bundle / "manifest.json")[:12]


def test_only_the_files_of_the_bundle_are_taken_and_the_tag_is_as_it_is(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_more = shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "secret").write_text("not yours")
    (with_more / "link").symlink_to(tmp_path / "secret")
    (with_more / "notes.txt").write_text("not in the manifest")
    write_sources(with_more, read_bundle(with_more), tmp_path / "source", "cat")
    held = {path.name for path in (tmp_path / "source" / "bundle").iterdir()}
    assert held == {*read_bundle(bundle).files, "manifest.json", "manifest.sha256"}
    commands = []
    done = subprocess.CompletedProcess([], 0, stdout="__tag__\N{CAT FACE}one", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    assert build_bento(with_more, "cat:one") == "cat:one"
    assert commands[0][-2:] == ["--version", "one"]
    assert re.fullmatch(r"cat:\d{14}-[0-9a-f]{8}", build_bento(with_more, "cat"))


def test_the_command_runs_from_the_sources_of_a_bento(bundle: Path, tmp_path: Path) -> None:
    """As in the container of ``kubernetes.yaml``, where nothing else of this package is installed."""
    write_sources(bundle, read_bundle(bundle), tmp_path / "source", "name")
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        f"sys.path.insert(0, {str(tmp_path / 'source')!r}); sys.argv = ['ensembler', 'serve', '--help']\n"
        "import ensembler.cli; ensembler.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--require-signature" in done.stdout


def test_nothing_beside_the_list_is_needed_in_the_versions_installed(bundle: Path, tmp_path: Path) -> None:
    private, public = pair(tmp_path, "ours")
    signed = shutil.copytree(bundle, tmp_path / "signed")
    seal = (signed / artefact.SEAL).read_bytes()
    (signed / artefact.SEAL).write_bytes(seal + signing.sign(seal, signing.private_key(private)))
    code = (
        "import ensembler.serve.service, ensembler.cli, ensembler.serve.client, httpx, numpy\n"
        "from PIL import Image\n"
        "from ensembler.serve.runtime.runtime import Runtime\n"
        "from ensembler.serve.runtime.verify import verify_bundle\n"
        f"verify_bundle({str(bundle)!r})\n"
        "from pathlib import Path\n"
        "from ensembler.serve.runtime.manifest import read_bundle\n"
        f"read_bundle(Path({str(signed)!r}), Path({str(public)!r}))\n"
    )
    versions = dict(line.split("==") for line in pinned())
    ours = {"ensembler", "onnxruntime-gpu", *versions}
    owners = metadata.packages_distributions().items()
    hidden = [name for name, owned in owners if not {owner.lower().replace("_", "-") for owner in owned} & ours]
    assert "torch" in hidden
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"  # importing them fails
    subprocess.run([sys.executable, "-c", hide + code], cwd=ROOT, check=True)
    assert not versions.keys() & HEAVY
    assert "onnxruntime" in versions and "onnxruntime-gpu" not in versions
    for name, version in versions.items():
        assert version == metadata.version(name if name != "onnxruntime" or has(name) else "onnxruntime-gpu")
    assert "onnxruntime-gpu[cuda,cudnn]" in dict(line.split("==") for line in pinned(gpu=True))
    assert len(pinned(gpu=True)) == len(versions)


def has(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def test_what_cannot_be_built_is_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tag in ("Digits", "a b", "digits:", "-a", "a:b:c", "x" * 64):
        with pytest.raises(UsageError, match="is not a tag"):
            build_bento(bundle, tag)
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    (damaged / "member-000.onnx").write_bytes(b"")
    with pytest.raises(CorruptError, match="member-000"):
        build_bento(damaged)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        patch.setattr("ensembler.serve.bento._installed", lambda name: name != "uv")
        with pytest.raises(UsageError, match="needs uv, which is not installed: run pip install uv"):
            build_bento(bundle)
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(tmp_path / "file"))
        with pytest.raises(ArtefactError, match="set BENTOML_HOME to a folder that can be written"):
            build_bento(bundle)
    monkeypatch.setattr("ensembler.serve.bento.serving", lambda: [Requirement("no-such-package")])
    with pytest.raises(UsageError, match="needs no-such-package, which is not installed"):
        write_sources(bundle, read_bundle(bundle), tmp_path / "bento", "name")
    result = CliRunner().invoke(app, ["bento", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and result.output.startswith("error: no bundle at")


def assert_serves(server: Server, bundle: Path) -> None:
    try:
        server.wait_until_ready()
        images = tiny_images(2)
        known = Runtime.load(bundle).predict(images)
        answer = server.post(ROUTE, json={"images": images.tolist()}).json()
        assert [one["label"] for one in answer["predictions"]] == known.labels
        found = [one["mutual_information"] for one in answer["predictions"]]
        assert found == pytest.approx(list(known.mutual_information), abs=1e-5)
        file = ROOT / "docs" / "images" / "ui.png"
        kind = {"Content-Type": "image/png"}
        assert server.post(ROUTE, content=file.read_bytes(), headers=kind).status_code == 200
        assert server.get("/ui").status_code == 200
        card = server.get("/metadata").json()
        assert card["bundle"] == artefact.sha256(bundle / "manifest.json")
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop(signal.SIGTERM)


def test_a_bento_serves_from_anywhere(home: Path, bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "made:one"]
    assert_serves(Server(command, tmp_path, free_port(), BENTOML_HOME=str(home)), bundle)


@pytest.fixture(scope="module")
def lean(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds what the Bento asks for, none of it compiled here."""
    folder = tmp_path_factory.mktemp("lean")
    needed = home / "bentos" / "made" / "one" / "env" / "python" / "requirements.txt"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    (probe,) = (line for line in pinned() if line.startswith("schema=="))
    reach = [*pip, "download", "--no-deps", "--no-cache-dir", "--retries", "0", "--timeout", "30", "-d", folder, probe]
    try:
        if subprocess.run(reach, capture_output=True, timeout=120, check=False).returncode:
            pytest.skip("pip reaches no package index from here")
    except subprocess.TimeoutExpired:
        pytest.skip("pip reaches no package index within two minutes")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    install = [*pip, "--python", python, "install", "--no-compile", "--only-binary", ":all:", "-r", needed]
    subprocess.run(install, check=True, capture_output=True, timeout=1800)
    return python


def clean(folder: Path) -> dict[str, str]:
    """An environment in which nothing of this one is found."""
    return {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1", "PATH": f"{folder}{os.pathsep}/usr/bin:/bin"}


def test_an_environment_without_torch_serves_the_bento(lean: Path, home: Path, bundle: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        [lean, "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | clean(lean.parent),
        cwd=tmp_path,
    ).stdout.lower()
    assert not set(listed.split()) & (HEAVY | {"ensembler"})
    command = [str(lean), "-m", "bentoml", "serve", "made:one"]
    server = Server(command, tmp_path, free_port(), BENTOML_HOME=str(home), **clean(lean.parent))
    assert_serves(server, bundle)


def test_an_environment_without_torch_serves_the_installed_package(lean: Path, bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("ensembler", "trainers", "eval", "study", "serve"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(wheel, check=True, capture_output=True)
    install = [*pip, "--python", lean, "install", "--no-deps", next(tmp_path.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True)
    try:
        ensembler = lean.parent / "ensembler"
        environment = os.environ | clean(lean.parent)
        subprocess.run([ensembler, "verify", bundle], env=environment, check=True, capture_output=True)
        server = Server([str(ensembler), "serve", str(bundle)], tmp_path, free_port(), **clean(lean.parent))
        assert_serves(server, bundle)
    finally:
        subprocess.run([*pip, "--python", lean, "uninstall", "-y", "ensembler"], check=True, capture_output=True)


LONGEST = 65  # seconds that a request may live: a body's time, a deadline, and what the service adds


def test_kubernetes_manifest(home: Path) -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == 3000
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe, path in {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}.items():
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert template["spec"]["terminationGracePeriodSeconds"] >= LONGEST + before
    dockerfile = (home / "bentos/made/one/env/docker/Dockerfile").read_text()
    assert f"ARG BENTO_USER_UID={template['spec']['securityContext']['runAsUser']}\n" in dockerfile
    assert {"requests", "limits"} <= container["resources"].keys()
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/tmp" in mounted  # the only folder that the server writes to
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert template["spec"]["securityContext"]["runAsNonRoot"]
    sources = {entry["name"]: entry.get("value") for entry in container["env"]}["PYTHONPATH"]
    assert container["args"][:5] == ["python", "-m", "ensembler", "serve", f"{sources}/bundle"]
    assert_exists(" ".join(container["args"][2:]))
    for held in ("ensembler/__main__.py", "bundle/manifest.json"):
        assert (home / "bentos/made/one/src" / held).exists()
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}


def test_systemd_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "ensembler.service").read_text()
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[0]) >= LONGEST
    (command,) = re.findall(r"^ExecStart=\S+/(ensembler .*)$", text, re.MULTILINE)
    assert_exists(command)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit's words were not verified")
    (tmp_path / "ensembler.service").write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "ensembler.service"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def assert_exists(command: str) -> None:
    """That the command line knows a command and its options."""
    _, name, *arguments = shlex.split(command, comments=True)
    known = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {option for parameter in known.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= options, command


def test_the_docs_name_only_what_exists() -> None:
    known = {f"ENSEMBLER_{name.upper()}" for name in Settings.model_fields}
    rows = re.findall(r"^\| `(ENSEMBLER_[A-Z_0-9]+)` \|", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(f"ENSEMBLER_{name.upper()}" for name in Settings.model_fields)
    for path in (ROOT / "docs" / "deploy.md", *DEPLOY.iterdir()):
        named = set(re.findall(r"ENSEMBLER_[A-Z]+(?:_[A-Z]+)*", path.read_text()))
        assert named <= known, path
    text = (ROOT / "docs" / "deploy.md").read_text()
    listed = {Requirement(quoted) for quoted in re.findall(r'"([a-z-]+[>=][^"]+)"', text)}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    assert listed == {each for each in map(Requirement, extra) if each.marker is None} | {
        Requirement("onnxruntime>=1.22.0")
    }
    commands = re.findall(r"^(?:\S+/)?(ensembler (?!and).+?)(?: &)?$", text, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        assert_exists(command)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
