"""Files of a later version's format are refused in one sentence, and stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ensembler import calibration
from ensembler.errors import ArtefactError
from ensembler.run import Run
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.storage import artefact
from ensembler.trainers import DeepEnsemble, Settings
from tests import _interrupt
from tests._evaluate import fit
from tests._runs import make_bundle, make_run
from tests._small import SETTINGS


def make_later(folder: Path) -> None:
    """Give what lies below a folder the format 99, and the seals that belong to it."""
    for file in folder.rglob(artefact.MANIFEST):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
        file.with_suffix(".sha256").write_text(f"{artefact.sha256(file)}  {artefact.MANIFEST}\n")


@pytest.mark.parametrize(
    ("kind", "make", "read"), [("run", make_run, Run.load), ("bundle", make_bundle, read_bundle)], ids=["run", "bundle"]
)
def test_a_later_format_is_refused_in_one_sentence(kind, make, read, tmp_path):
    path = make(tmp_path / kind)
    assert read(path)
    make_later(path)
    with pytest.raises(ArtefactError, match=f"{kind} has {kind} format 99; this version of .* reads .*: update it$"):
        read(path)


@pytest.mark.parametrize(("name", "calls"), [("save_state", 3), ("save", 1)], ids=["a part's state", "a job's result"])
def test_what_a_later_version_has_reached_is_refused_and_kept(name, calls, tmp_path):
    """Deleted, as what is damaged is, it would cost the work; the later version can still resume it."""
    method, settings, path = DeepEnsemble(members=2), Settings(**SETTINGS), tmp_path / "x"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt.after(patch, calls, name)
        _interrupt.make(path, method, settings)
    folder = path.with_name("x.unfinished")
    kept = sorted(file.relative_to(folder) for file in folder.rglob("*.pt"))
    make_later(folder)
    with pytest.raises(ArtefactError, match=r"has checkpoint format 99; this version of ensembler reads 1: update it$"):
        _interrupt.make(path, method, settings)
    assert kept
    assert sorted(file.relative_to(folder) for file in folder.rglob("*.pt")) == kept


def test_a_later_calibration_is_refused_in_one_sentence(tmp_path):
    run, rng = make_run(tmp_path / "run"), np.random.default_rng(0)
    origin = {"dataset": "none", "validation_sha256": "1" * 64, "run_sha256": artefact.sha256(run / artefact.MANIFEST)}
    found = fit(rng.dirichlet(np.ones(5), 60), rng.integers(5, size=60), **origin)
    calibration.save(found, run)
    assert calibration.load(run) == found
    calibration.save(found.model_copy(update={"format": 99}), run)
    with pytest.raises(ArtefactError, match=r"has calibration format 99; .* reads 1: update it$"):
        calibration.load(run)
