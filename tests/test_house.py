"""The package's own rules: imports point down and are light, no method is known below trainers/, the wheel is whole."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ensembler.trainers.method import methods

ROOT = Path(__file__).parents[1]
LAYERS = {"trainers": ROOT / "trainers", "eval": ROOT / "eval", "study": ROOT / "study", "serve": ROOT / "serve"}
BELOW = {"study": {"trainers", "eval"}}  # the one layer that needs two others
ENSEMBLE = ROOT / "ensembler" / "ensemble.py"  # its methods evaluate, calibrate and export call the layers' functions


def imported(path: Path, at_once: bool = False) -> set[str]:
    """Every module of ours that a file imports, anywhere in it; ``from a import b`` counts as ``a.b`` too.

    ``at_once``: only what is imported with the file itself, not in a function or for types.
    """
    names, tree = set(), ast.parse(path.read_text())
    top = (node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)))
    for node in top if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == "ensembler"}


def test_imports_point_down_only():
    for layer, folder in LAYERS.items():
        for path in folder.rglob("*.py"):
            for name in imported(path):
                parts = name.split(".")
                above = LAYERS.keys() - {layer} - BELOW.get(layer, set())
                assert len(parts) < 2 or parts[1] not in above, f"{path} imports {name}"
                assert name != "ensembler.cli", f"{path} imports the command line"
    for path in (ROOT / "ensembler").rglob("*.py"):
        upwards = {name for name in imported(path) if name.startswith(tuple(f"ensembler.{layer}" for layer in LAYERS))}
        assert not upwards & imported(path, at_once=path == ENSEMBLE), f"{path} imports {upwards}"


def strings(path: Path) -> list[tuple[ast.Constant, ast.AST]]:
    """Every string in a file's code, docstrings and ``__all__`` left out, with what it stands in."""
    found = []

    def walk(node: ast.AST, parent: ast.AST) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node, parent))
        for child in ast.iter_child_nodes(node):
            walk(child, node)

    tree = ast.parse(path.read_text())
    walk(tree, tree)
    return found


def methods_named(path: Path) -> list[str]:
    """Where a file's code names a method: by its command, or by the name that a report calls it by."""
    known = methods()
    commands = re.compile(rf"(?<![\w-])({'|'.join(method.command for method in known)})(?![\w-])")
    names = {method.command.removeprefix("train-") for method in known} | {"single", "simplexes"}
    names |= {"curve-bezier", "curve-chain"} | {f"{name}-centroid" for name in names}
    # An option of a method may have its name; as what is compared, looked up or listed it is a method.
    choices = ast.Compare | ast.Dict | ast.Set | ast.List | ast.Tuple | ast.MatchValue
    return [
        f"{path}:{node.lineno}: {node.value!r}"
        for node, parent in strings(path)
        if commands.search(node.value) or (isinstance(parent, choices) and node.value in names)
    ]


def test_no_method_is_known_below_trainers():
    """A run says itself what made it, whether its members are independent, and how more can be drawn."""
    for folder in (ROOT / "ensembler", LAYERS["eval"], LAYERS["study"], LAYERS["serve"]):
        assert [place for path in sorted(folder.rglob("*.py")) for place in methods_named(path)] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('made = run.manifest.method == "fge"', 1),
        ('text = f"train it with train-fge {run}"', 1),
        ('several = method in ("simplex", "deep-ensemble")', 2),
        ('titles = {"single": "one network"}', 1),
        ('match method:\n    case "curve-bezier": pass', 1),
        ('kind = run.manifest.options.get("curve")', 0),  # an option, whatever method has it
        ('"""train-fge, as all that has a curve."""\n__all__ = ["curve"]', 0),
    ],
)
def test_a_method_that_code_names_is_found(tmp_path, code, found):
    (tmp_path / "code.py").write_text(code)
    assert len(methods_named(tmp_path / "code.py")) == found


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import ensembler",
        "import ensembler.serve.runtime.runtime",
        "import ensembler.uncertainty, ensembler.storage.artefact, ensembler.trainers, ensembler.eval, ensembler.serve",
        *(
            f"import sys; sys.argv = ['ensembler', {arguments}]\n"
            "from ensembler.cli import main\n"
            "import io, contextlib\n"
            "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit): main()\n"
            "assert '--help' in out.getvalue()"
            for arguments in ("'--help'", "'train-simplex', '--help'")
        ),
        "import contextlib, sys; sys.argv = ['ensembler', 'train-fge', '--lr', '0']\n"
        "from ensembler.cli import main\n"
        "with contextlib.suppress(SystemExit): main()",  # a mistake is answered at once
    ],
)
def test_light_imports(code):
    assert not loaded(code) & {"torch", "torchvision", "bentoml", "netcal", "matplotlib", "sklearn"}


@pytest.mark.parametrize(
    "package", ["ensembler", "ensembler.trainers", "ensembler.eval", "ensembler.serve", "ensembler.study"]
)
def test_public_names_exist(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) - {"__version__"} <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_every_module_says_what_is_public():
    for folder in (ROOT / "ensembler", *LAYERS.values()):
        for path in folder.rglob("*.py"):
            assert "__all__" in path.read_text(), f"{path} has no __all__"


def test_the_wheel_is_whole(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("ensembler", *LAYERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in {"": ROOT / "ensembler", **LAYERS}.items():
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
