"""Every block of README.md and docs/ does what it says: see :mod:`tests._pages` for what a block is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer.main
import yaml
from markdown_it import MarkdownIt

from ensembler.cli import app
from ensembler.trainers import Settings, launch
from tests import _preloaded
from tests._pages import (
    PAGES,
    QUICKSTART,
    ROOT,
    Block,
    blocks,
    check_command,
    check_span,
    commands,
    given,
    parts,
    script,
    shows,
    spans,
)
from tests._ports import free_port

SHELL = ("sh", "bash", "console")
BLOCKS = {page: blocks(page) for page in PAGES}
RUN = [page for page, own in BLOCKS.items() if any(b.mark != "not run" and b.language != "text" for b in own)]
LONG = [page for page, own in BLOCKS.items() if any(b.mark == "long" for b in own)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def each(*languages: str) -> list[Block]:
    return [block for own in BLOCKS.values() for block in own if block.language in languages]


@cache
def command_line() -> Any:
    """The commands, which take a tenth of a second to make."""
    return typer.main.get_command(app)


class Folder:
    """An empty folder in which a page's blocks run one after the other; its services end with it."""

    def __init__(self, path: Path, commands: Path) -> None:
        self.path = path
        self.port = str(free_port())
        self._groups: list[int] = []
        path.mkdir()
        for tools in ("examples", "benchmarks"):
            (path / tools).symlink_to(ROOT / tools)
        ours = {key: value for key, value in os.environ.items() if not key.startswith("ENSEMBLER_")}
        self.environment = ours | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(commands / "cache"),  # what one page has predicted, another need not
            "BENTOML_HOME": str(path.with_name(f"{path.name}-bentoml")),
            "BENTOML_DO_NOT_TRACK": "True",
            "DOCS_PORT": self.port,
        }

    def take(self, source: Path, names: list[str]) -> None:
        """Copy the quickstart's results."""
        for name in names:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, target)

    def run(self, block: Block) -> None:
        if block.title:
            file = self.path / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
        elif block.language in ("sh", "bash"):
            self._call(block, ["bash", "-e", "-o", "pipefail", "-c", self._here(block.code)])
        elif block.language == "python":
            file = self.path / f"block_{block.line}.py"
            file.write_text(self._here(block.code))
            self._call(block, ["python", file.name])
        elif block.language == "console":
            for command, shown in parts(block):
                printed = self._call(block, ["bash", "-e", "-o", "pipefail", "-c", self._here(command)])
                assert shows(self._here(shown), printed), f"{block}: {command} printed\n{printed}\ninstead of\n{shown}"

    def _here(self, text: str) -> str:
        """With the service at this folder's port, and in the background without being told so."""
        for host in ("localhost", "127.0.0.1"):
            text = text.replace(f"{host}:3000", f"127.0.0.1:{self.port}")
        lines = text.splitlines()
        return "\n".join(line.rstrip(" &") if line.startswith("ensembler serve") else line for line in lines)

    def _call(self, block: Block, command: list[str]) -> str:
        output = self.path.with_name(f"{self.path.name}-output")
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.path,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._groups.append(process.pid)
            status = process.wait(timeout=3600)
        printed = output.read_text(errors="replace")
        assert status == 0, f"{block}: {command[-1]} ended with {status}:\n{printed}"
        return printed

    def close(self) -> None:
        """Stop what the blocks left running."""
        for by in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 20
            for group in self._groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, by)
            while self._running() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _running(self) -> bool:
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) in self._groups and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False


@pytest.fixture(scope="session")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with this source tree's ``ensembler``, and with ``python``."""
    if sys.platform == "win32" or not (shutil.which("bash") and shutil.which("curl")):
        pytest.skip("the pages' blocks are for bash, and some ask curl")
    folder = tmp_path_factory.mktemp("bin")
    server = _preloaded.start(folder)
    yield folder
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    assert server.stdout is not None
    server.stdout.close()


def run(page: Path, path: Path, bin_folder: Path, quickstart: Path | None, long: bool) -> None:
    """Run a page's blocks in a new folder. Without ``long``, what long ones make is taken from the quickstart."""
    folder = Folder(path, bin_folder)
    try:
        if quickstart:
            folder.take(quickstart, given(page))
        for block in BLOCKS[page]:
            if block.mark == "long" and not long and quickstart:
                folder.take(quickstart, block.paths)
            elif block.mark != "not run":
                folder.run(block)
    finally:
        folder.close()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, bin_folder: Path) -> Path:
    """The folder in which the quickstart was gone through."""
    path = tmp_path_factory.mktemp("quickstart") / "work"
    run(QUICKSTART, path, bin_folder, None, long=False)
    return path


def test_the_quickstart_makes_what_it_says(quickstart: Path):
    assert json.loads((quickstart / "reports/first/report.json").read_text())["comparison"]
    assert (quickstart / "bundles/simplex/manifest.json").is_file()


@pytest.mark.parametrize("page", [page for page in RUN if page != QUICKSTART], ids=name)
def test_the_blocks_run(page: Path, tmp_path: Path, bin_folder: Path, quickstart: Path):
    run(page, tmp_path / "work", bin_folder, quickstart, long=False)


@pytest.mark.long
@pytest.mark.parametrize("page", LONG, ids=name)
def test_the_blocks_run_in_full(page: Path, tmp_path: Path, bin_folder: Path, quickstart: Path):
    run(page, tmp_path / "work", bin_folder, quickstart, long=True)


def test_every_command_is_one_that_the_command_line_takes():
    checked = 0
    for block in each(*SHELL):
        for arguments in commands(script(block)):
            try:
                check_command(arguments, command_line())
            except Exception as error:
                pytest.fail(f"{block}: ensembler {' '.join(arguments)}: {getattr(error, 'message', error)}")
            checked += 1
    assert checked > 50


def test_every_command_in_the_text_exists():
    for page in PAGES:
        for words in spans(page):
            try:
                check_span(words, command_line())
            except AssertionError as error:
                pytest.fail(f"{name(page)}: `{' '.join(words)}`: {error}")


def test_the_page_names_every_option_that_resuming_takes():
    flags = launch.Data.flags() | Settings.flags() | launch.Launch.flags()
    page = (ROOT / "docs" / "gotchas.md").read_text(encoding="utf-8")
    listed = page.partition("### A resumed run keeps its options")[2].partition(". For a run")[0]
    assert set(re.findall(r"`(--[\w-]+)`", listed)) == {flags[name] for name in launch._WITH_RESUME}


def test_every_row_of_a_table_is_in_a_table_and_has_its_cells():
    """A blank line ends a table, and a bar that is not escaped begins a cell: GitHub shows neither as it was meant."""
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        tokens = MarkdownIt().enable("table").parse("\n".join(lines))
        inside = {line for token in tokens if token.type in ("fence", "table_open") for line in range(*token.map)}
        for token in (token for token in tokens if token.type == "table_open"):
            bars = [len(re.findall(r"(?<!\\)\|", lines[line])) for line in range(*token.map)]
            wrong = next((line for line, count in enumerate(bars) if count != bars[0]), None)
            assert wrong is None, f"{name(page)}:{token.map[0] + wrong + 1}: a row of another number of cells"
        outside = [number + 1 for number, line in enumerate(lines) if line.startswith("|") and number not in inside]
        assert not outside, f"{name(page)}: rows in no table, lines {outside}"


def test_every_block_can_be_parsed():
    for block in each(*SHELL):
        checked = subprocess.run(["bash", "-n", "-c", script(block)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, f"{block}: {checked.stderr}"
    for block in each("python"):
        compile(block.code, str(block), "exec")
    read = {"json": json.loads, "toml": tomllib.loads, "yaml": lambda text: list(yaml.safe_load_all(text))}
    for block in each(*read):
        code = block.code.replace("[...]", "[]").replace(", ...", "")
        try:
            read[block.language](code)
        except ValueError as error:
            pytest.fail(f"{block}: {error}")


def test_what_the_checks_catch(tmp_path: Path):
    """A page with a wrong option, a wrong value, a missing argument: each is found, however it is called."""
    wrong = (
        "nice -n 10 /opt/bin/ensembler train-simplex --vertexes 4",
        "A=1 ensembler export \\\n  --layout lists",
        "for i in 1 2; do ensembler serve; done",
        "true && ensembler trian-fge | tee log",
        "torchrun --nproc-per-node 2 -m ensembler.cli train-fge --members many",
    )
    for text in wrong:
        (arguments,) = commands(text)
        with pytest.raises(Exception, match=r"vertexes|lists|[Mm]issing|trian|whole number"):
            check_command(arguments, command_line())
    assert not list(commands("systemctl start ensembler && cat <<END\nensembler nonsense\nEND\nls ensembler"))
    for arguments in commands('ensembler train-fge --seed "$SEED" --out "runs/$SEED" --config nowhere.toml'):
        check_command(arguments, command_line())

    page = tmp_path / "page.md"
    page.write_text('<!-- not run: no -->\n```sh\na\n```\n<!-- long: runs/a -->\n\n```python title="b.py"\nb\n```\n')
    first, second = blocks(page)
    assert (first.mark, first.why, first.line) == ("not run", "no", 2)
    assert (second.paths, second.title) == (["runs/a"], "b.py")
    for text in ("    indented\n", "```\nno language\n```\n", "<!-- not run -->\n```sh\n```\n"):
        page.write_text(text)
        with pytest.raises(AssertionError):
            blocks(page)

    assert shows("took 12 s, [...]\nrun: x", "before\ntook   1.5 s, more\nand more run: x")
    assert not shows("took 12 s", "took long")
