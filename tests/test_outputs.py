"""What a command's result leaves of an older one in its folder: nothing of its own, and all that is anybody else's."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from ensembler.errors import ArtefactError
from ensembler.eval.outputs import LIST, print_lines, write_files

OLD = {"report.json": b"{}", "members.png": b"old picture", "table.csv": b"old table"}
NEW = {"report.json": b"[]", "severity.png": b"new picture"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_older_result_leaves_no_picture_and_no_file_of_anybody_is_removed(tmp_path):
    folder = tmp_path / "report"
    write_files(folder, OLD, None)
    (folder / "notes.png").write_bytes(b"mine")  # never listed
    (folder / "table.csv").write_bytes(b"edited")  # listed, and changed since
    write_files(folder, NEW, tmp_path / "copy.json")
    assert names(folder) == {*NEW, LIST, "notes.png", "table.csv"}
    assert (folder / "table.csv").read_bytes() == b"edited"
    assert {name: (folder / name).read_bytes() for name in NEW} == NEW
    assert (tmp_path / "copy.json").read_bytes() == NEW["report.json"]
    assert subprocess.run(["sha256sum", "--check", LIST], cwd=folder, check=False, capture_output=True).returncode == 0


def test_a_list_names_no_file_outside_its_folder_and_no_link_is_followed(tmp_path):
    folder, outside = tmp_path / "report", tmp_path / "outside.png"
    folder.mkdir()
    outside.write_bytes(b"outside")
    (folder / "link.png").symlink_to(outside)
    digest = hashlib.sha256(b"outside").hexdigest()
    named = ["../outside.png", str(outside), "link.png", "missing.png", ""]
    (folder / LIST).write_text("".join(f"{digest}  {name}\n" for name in named) + "no digest\n")
    write_files(folder, NEW, None)
    assert names(folder) == {*NEW, LIST, "link.png"}
    assert outside.read_bytes() == b"outside"


def test_a_result_that_cannot_be_written_leaves_the_older_one_whole(tmp_path):
    folder = tmp_path / "report"
    write_files(folder, OLD, None)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match="cannot write"):
        write_files(folder, NEW, tmp_path / "file" / "copy.json")
    assert {name: (folder / name).read_bytes() for name in OLD} == OLD
    assert names(folder) == {*OLD, LIST}


@pytest.mark.parametrize("terminal", [True, False])
def test_prose_is_wrapped_between_words_on_a_terminal_and_a_path_never(terminal, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    prose = "sets hold the true class in at least 90 % of cases, on average over calibrations"
    path = f"calibration: {'folder/' * 9}calibration.json"
    print_lines(path, prose=prose)
    *wrapped, last = capsys.readouterr().out.splitlines()
    assert last == path
    assert " ".join(line.strip() for line in wrapped) == prose
    assert (len(wrapped) > 1) == terminal and all(len(line) <= 40 for line in wrapped if terminal)
