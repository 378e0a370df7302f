"""What a command's result leaves of an older one in its folder, and what one that fails leaves: nothing of its own."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ensembler.errors import ArtefactError
from ensembler.eval.outputs import LIST, print_lines, write_files, write_result
from ensembler.eval.prediction_cache import Entry, MembersFile
from ensembler.eval.prediction_files import writing
from ensembler.storage import artefact, urls
from ensembler.storage.artefact import ensure_folder, replace_file, writing_to

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


def _npz(path: Path) -> None:
    with writing(path) as file:
        file.add("probabilities", np.zeros(3))


def _members(path: Path) -> None:
    with MembersFile(Entry(path), (1, 1, 2)) as file:
        file.write(0, np.zeros((1, 1, 2), np.float32))
        replace_file(path, b"full")


def _artefact(path: Path) -> None:
    with artefact.write(path, {"kind": "run", "format": 1}) as folder:
        (folder / "history.jsonl").touch()


def _push(path: Path) -> None:
    _artefact(path.parents[2] / "source")
    with pytest.MonkeyPatch.context() as full:
        full.setattr(os, "fsync", _full)
        urls.push(path.parents[2] / "source", f"file://{path}")


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: replace_file(path, b"report"),
        lambda path: write_files(path, NEW, path.with_name("copy.json")),
        lambda path: write_result(None, str(path), "report", NEW),
        _npz,
        _members,
        _artefact,
    ],
)
def test_what_fails_leaves_no_folder_that_it_made(write, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    write(tmp_path / "own" / "new" / "deep" / "result")  # where there is room
    shutil.rmtree(tmp_path / "own" / "new")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(ArtefactError, match="No space left"):
        write(tmp_path / "own" / "new" / "deep" / "result")
    assert [*tmp_path.rglob("*")] == [tmp_path / "own"]  # a user's own stays, empty or not


def test_a_push_that_sent_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ArtefactError, match="No space left"):
        _push(tmp_path / "shared" / "deep" / "run")
    assert not (tmp_path / "shared").exists()


def test_a_folder_in_which_another_has_written_meanwhile_stays(tmp_path):
    with pytest.raises(ArtefactError), writing_to(tmp_path), ensure_folder(tmp_path / "new" / "deep"):
        (tmp_path / "new" / "theirs").touch()
        raise OSError
    assert [*tmp_path.rglob("*")] == [tmp_path / "new", tmp_path / "new" / "theirs"]


def test_a_file_in_the_place_of_a_folder_is_said_and_stays(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match="Not a directory"), writing_to(tmp_path):  # noqa: SIM117
        with ensure_folder(tmp_path / "file" / "deep"):
            raise AssertionError
    assert (tmp_path / "file").read_text() == "in the way"
