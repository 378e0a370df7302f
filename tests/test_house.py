"""The house's own rules: arrows point down, imports are light, the wheel holds every room, benchmarks run."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"trainers": ROOT / "trainers", "eval": ROOT / "eval", "serve": ROOT / "serve"}


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it; ``from a import b`` counts as ``a.b`` too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == "ensembler"}


def test_arrows_point_down_only():
    for room, folder in ROOMS.items():
        for path in folder.rglob("*.py"):
            for name in imported(path):
                parts = name.split(".")
                assert len(parts) < 2 or parts[1] not in ROOMS.keys() - {room}, f"{path} imports {name}"
                assert name != "ensembler.cli", f"{path} imports the command line"
    for path in (ROOT / "ensembler").rglob("*.py"):
        for name in imported(path):
            assert not name.startswith(tuple(f"ensembler.{room}" for room in ROOMS)), f"{path} imports {name}"


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import ensembler",
        "import ensembler.serve.runtime.runtime",
        "import ensembler.uncertainty, ensembler.artefact, ensembler.trainers, ensembler.eval, ensembler.serve",
        "import sys; sys.argv = ['ensembler', '--help']\n"
        "from ensembler.cli import main\n"
        "import io, contextlib\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()",
    ],
)
def test_light_imports(code):
    assert not loaded(code) & {"torch", "torchvision", "bentoml", "netcal", "matplotlib", "sklearn"}


@pytest.mark.parametrize("package", ["ensembler", "ensembler.trainers", "ensembler.eval", "ensembler.serve"])
def test_public_names_exist(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) - {"__version__"} <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_every_module_says_what_is_public():
    for folder in (ROOT / "ensembler", *ROOMS.values()):
        for path in folder.rglob("*.py"):
            assert "__all__" in path.read_text(), f"{path} has no __all__"


def test_the_wheel_holds_every_room(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("ensembler", *ROOMS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in {"": ROOT / "ensembler", **ROOMS}.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert "/".join(filter(None, ("ensembler", name, path.relative_to(folder).as_posix()))) in held
    assert not [name for name in held if not name.startswith(("ensembler/", "ensembler-"))]
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = "import ensembler.eval.shift.readers, ensembler.trainers.methods.fge, ensembler.serve.export.bundle"
    for folder in (tmp_path, ROOT):
        environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)
