"""What pyproject.toml asks for: floors that were tried, the lean list of serving, and all libraries imported."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
OTHERS = {"pydantic-core", "timm"}  # comes with pydantic, in its exact version; --arch timm:NAME says how to install it


def requirements(*groups: list[str]) -> list[Requirement]:
    """What the groups ask for, but for the extras of this package itself."""
    found = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in found if requirement.name != "ensembler"]


def test_every_dependency_has_the_floor_that_make_test_lowest_installs():
    everything = requirements(PROJECT["build-system"]["requires"], PROJECT["project"]["dependencies"], *EXTRAS.values())
    floors: dict[str, set[str]] = {}
    for requirement in everything:
        lowest = {part.version for part in requirement.specifier if part.operator == ">="}
        assert len(lowest) == 1, f"{requirement} has no floor"
        floors.setdefault(canonicalize_name(requirement.name), set()).update(lowest)
    lines = [line for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): {version} for name, version in (line.split("==") for line in lines)}
    assert pinned == floors


def test_the_pythons_claimed_begin_with_the_one_required():
    claimed = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if ":: Python :: 3." in line]
    assert claimed == sorted(claimed, key=lambda version: int(version.split(".")[1]))
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{claimed[0].replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == claimed[0]


def imported(folder: Path) -> dict[str, Path]:
    """Every top-level module that the files of a folder import, anywhere in them, and one of those files."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0]: path for name in names}
    return found


@pytest.mark.parametrize("folder", ["ensembler", "trainers", "eval", "serve"])
def test_every_library_that_is_imported_is_asked_for(folder):
    users = [extra for extra in EXTRAS if extra not in ("dev", "docs")]
    asked = requirements(PROJECT["project"]["dependencies"], *(EXTRAS[extra] for extra in users))
    names = {canonicalize_name(requirement.name) for requirement in asked} | OTHERS
    owners = metadata.packages_distributions()
    for module, path in imported(ROOT / folder).items():
        if module in {"ensembler", *sys.stdlib_module_names}:
            continue
        assert {canonicalize_name(owner) for owner in owners.get(module, [module])} & names, f"{path} imports {module}"


def test_the_installed_package_says_what_serving_needs():
    """``ensembler bento`` reads the lean list there."""
    installed = [Requirement(text) for text in metadata.requires("ensembler") or ()]
    lean = [each for each in installed if each.marker and each.marker.evaluate({"extra": "serve"})]
    here = [each for each in requirements(EXTRAS["serve"]) if each.marker is None or each.marker.evaluate()]
    assert {each.name for each in lean} == {each.name for each in here}
    assert any(each.name == "ensembler" and each.extras == {"serve"} for each in installed if each.marker is None)
