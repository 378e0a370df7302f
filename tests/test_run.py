"""A run on disk is whole or absent, and every byte of it is checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, CorruptError, DivergedError, UsageError
from ensembler.run import Run, latest, load_tensors, new_path, save_tensors
from ensembler.storage import artefact
from tests._runs import make_run

ROOT = Path(__file__).parents[1]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".partial")]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", "resnet20")


def test_a_run_comes_back_as_it_was_saved(run, tmp_path):
    one = Run.load(run)
    one.save(tmp_path / "again")
    other = Run.load(tmp_path / "again")
    assert one.manifest == other.manifest
    for name in ("vertices", "buffers"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(one.coefficients, other.coefficients)
    assert leftovers(tmp_path) == []


def test_a_flipped_byte_in_any_file_is_found_and_named(run):
    for file in sorted(run.iterdir()):
        content = file.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1} if content else ():
            changed = bytearray(content)
            changed[position] ^= 1
            file.write_bytes(changed)
            with pytest.raises(CorruptError, match=r"manifest\." if file.stem == "manifest" else file.name):
                Ensemble.load(run)
        file.write_bytes(content)
    Ensemble.load(run)


def test_a_missing_or_truncated_file_is_found_and_named(run):
    for name in ("vertices.safetensors", "members.safetensors", "history.jsonl", "manifest.sha256"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        with pytest.raises(CorruptError, match=f"{name} is missing"):
            Run.load(run)
        (run / name).write_bytes(content[: len(content) // 2] or b"x")
        with pytest.raises(CorruptError):
            Run.load(run)
        (run / name).write_bytes(content)


def reseal(run: Path, **changes) -> None:
    manifest = json.loads((run / "manifest.json").read_text()) | changes
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "manifest.sha256").write_text(f"{artefact.sha256(run / 'manifest.json')}  manifest.json\n")


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(ArtefactError, match="there is no such folder"):
        Run.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"has no manifest\.json"):
        Run.load(tmp_path / "empty")
    reseal(run, format=99)
    with pytest.raises(ArtefactError, match="run format 99"):
        Run.load(run)
    reseal(run, format=1, kind="bundle")
    with pytest.raises(ArtefactError, match="is a bundle, not a run"):
        Run.load(run)
    reseal(run, kind="run", members="many")
    with pytest.raises(ArtefactError, match="not a run that this version"):
        Run.load(run)


def test_nothing_is_overwritten(run):
    with pytest.raises(UsageError, match="already exists"):
        Run.load(run).save(run)


CRAMPED = """
import resource, sys
from pathlib import Path
from ensembler.errors import ArtefactError
from ensembler.run import Run
run = Run.load(Path(sys.argv[1]))
for largest in (50_000, 1_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        run.save(Path(sys.argv[2]))
    except ArtefactError as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing(run, tmp_path):
    """No file may grow beyond so many bytes: the tensors fail first, or the small files do."""
    command = [sys.executable, "-c", CRAMPED, run, tmp_path / "new"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "cannot write" in line
        assert "make room, or choose another place" in line
    assert not (tmp_path / "new").exists()
    assert leftovers(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    loaded = Run.load(run)
    next(iter(loaded.vertices.values())).view(-1)[3] = float("nan")
    with pytest.raises(DivergedError, match="is not finite"):
        loaded.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_latest_names_the_newest(run, tmp_path):
    assert latest(tmp_path) == run
    Run.load(run).save(tmp_path / "newer")
    assert latest(tmp_path) == tmp_path / "newer"
    with pytest.raises(ArtefactError, match="train one first"):
        latest(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "newer")
    with pytest.raises(ArtefactError, match="train one first"):
        latest(tmp_path)


def test_new_paths_are_free(tmp_path):
    taken = new_path(tmp_path, "simplex")
    taken.mkdir()
    assert new_path(tmp_path, "simplex") != taken


def test_two_writers_of_one_path_make_one_whole_run(run, tmp_path):
    loaded, outcomes = Run.load(run), []

    def save():
        try:
            outcomes.append(Run.load(run).save(tmp_path / "both"))
        except (UsageError, ArtefactError) as error:
            outcomes.append(error)

    threads = [threading.Thread(target=save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [isinstance(outcome, Path) for outcome in outcomes].count(True) == 1
    assert torch.equal(Run.load(tmp_path / "both").coefficients, loaded.coefficients)
    assert leftovers(tmp_path) == []


SAVER = """
import sys
from pathlib import Path
from ensembler.run import Run
from tests._kills import killed_everywhere
run = Run.load(Path(sys.argv[1]))
print(killed_everywhere(lambda folder: run.save(folder / "runs" / "new"), Path(sys.argv[2])))
"""


def test_a_kill_while_saving_leaves_a_whole_run_or_none(run, tmp_path):
    command = [sys.executable, "-c", SAVER, run, tmp_path / "killed"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kills = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    saved = [folder / "runs" / "new" for folder in (tmp_path / "killed").iterdir()]
    assert len(saved) == kills + 2 > 12
    for path in saved:
        if path.exists():
            assert torch.equal(Run.load(path).coefficients, Run.load(run).coefficients)
        else:
            Run.load(run).save(path)  # nothing of the killed one is in the way
            assert latest(path.parent) == path


# --- runs from elsewhere, whose hashes are all true ---


def with_true_hashes(run: Path) -> Path:
    names = json.loads((run / "manifest.json").read_text())["files"]
    reseal(run, files={name: artefact.sha256(run / name) for name in names})
    return run


def changed(name, change):
    def harm(run: Path) -> None:
        tensors = load_tensors(run / f"{name}.safetensors")
        change(tensors)
        save_tensors(tensors, run / f"{name}.safetensors")

    return harm


def each(tensors, prefix, change):
    tensors.update({key: change(tensor) for key, tensor in tensors.items() if key.startswith(prefix)})


HARMED = {
    "fewer coefficients": changed("members", lambda t: each(t, "coefficients", lambda c: c[:1])),
    "coefficients of more vertices": changed("members", lambda t: each(t, "coefficients", lambda c: torch.ones(3, 5))),
    "coefficients of one axis": changed("members", lambda t: each(t, "coefficients", lambda c: c[0])),
    "coefficients of another type": changed("members", lambda t: each(t, "coefficients", torch.Tensor.double)),
    "buffers of fewer members": changed("members", lambda t: each(t, "buffer", lambda b: b[:1])),
    "a buffer of no axis": changed("members", lambda t: each(t, "buffer", lambda b: b.flatten()[0])),
    "fewer vertices": changed("vertices", lambda t: each(t, "", lambda v: v[:2])),
    "a vertex of no axis": changed("vertices", lambda t: each(t, "", lambda v: v.flatten()[0])),
    "history nested": lambda run: (run / "history.jsonl").write_text("[" * 100_000),
    "history of numbers": lambda run: (run / "history.jsonl").write_text("3\n"),
}


@pytest.mark.parametrize("name", HARMED)
def test_what_does_not_go_together_is_one_sentence(name, run):
    HARMED[name](run)
    with pytest.raises(ArtefactError, match="is not a run that this version can read"):
        Run.load(with_true_hashes(run))


def test_a_file_whose_hash_is_not_in_the_manifest_is_not_read(run):
    reseal(run, files={"members.safetensors": artefact.sha256(run / "members.safetensors")})
    with pytest.raises(ArtefactError, match=r"names no history\.jsonl"):
        Run.load(run)


def test_a_part_whose_hash_is_not_in_the_manifest_is_not_read(run):
    (run / "parts").mkdir()
    (run / "parts" / "0").symlink_to("..", target_is_directory=True)
    reseal(run, parts=10**15)
    with pytest.raises(ArtefactError, match=r"names no parts/0/manifest\.json"):
        Run.load(run)


@pytest.mark.parametrize(
    "fields",
    [{"shape": [32]}, {"shape": [10**6, 10**6, 3]}, {"shape": [-4, -4, 3]}, {"mean": [0.5]}, {"std": [0.0, 0.1, 0.1]}],
)
def test_a_record_of_no_images_is_refused(run, fields):
    content = json.loads((run / "manifest.json").read_text())
    reseal(run, dataset=content["dataset"] | fields)
    with pytest.raises(ArtefactError, match=r"\(dataset: Value error, "):
        Run.load(run)


def test_simplexes_of_vertices_that_are_not_there(run):
    reseal(run, sampling={"simplexes": [[0, 1, 3]], "concentration": 1.0})
    with pytest.raises(ArtefactError, match="vertices beyond its 3"):
        Run.load(run)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_manifest_that_is_no_file_is_not_opened(run, put):
    (run / "manifest.json").unlink()
    put(run / "manifest.json")
    with pytest.raises(ArtefactError, match=r"manifest\.json is (not a regular file|a link)"):
        Run.load(run)
