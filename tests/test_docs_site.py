"""The site builds without a warning and asks nobody for anything; the page of the command line is current."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_reference_of_the_command_line_is_current():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / ".ci" / "cli_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == module.reference(), "docs/cli.md is of other commands than these: python .ci/cli_reference.py"
    for said in (  # by hand, from the room's own declarations
        "| `--vertices` | whole number | `4` | K, corners of the simplex. |",
        "| `--corners` / `--no-corners` |  | `--corners` |",
        "| `--mode` | `full`, `exact`, `confidence` | `full` |",
        "| `--port` | whole number from 1 to 65535 | `3000` |",
        "| `--token` | text | `$ENSEMBLER_TOKEN` |",
        "| `RUNS...` | path, several | required | Two or more runs, or files of predictions, of one dataset. |",
        "ensembler predict BUNDLE|URL IMAGES... [OPTIONS]",
    ):
        assert said in page, said
    assert page.count("`--epochs`") == 1  # of all training commands alike


class Fetched(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(given.get("src") or "")
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(given.get("href") or "")


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    package = tmp_path / "ensembler"  # as it is installed: all layers within it
    for source, place in {
        "ensembler": package,
        **{layer: package / layer for layer in ("trainers", "eval", "serve")},
    }.items():
        shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "ENSEMBLER_PACKAGE": str(tmp_path)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr

    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in fetched.addresses if re.match(r"(\w+:)?//", address)], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    shown = (tmp_path / "site" / "api" / "trainers.html").read_text(encoding="utf-8")
    assert 'id="ensembler.trainers.train"' in shown  # a public name, from its package
    assert ":func:" not in shown
    for file in ("alerts.yml", "grafana.json", "deploy/kubernetes.yaml", "images/ui.png"):
        assert (tmp_path / "site" / file).is_file()
