"""What the kept files of the first formats were made of: ``python -m tests._formats FOLDER``, once, in November 2026.

The files are never made again: what a later version reads of them is what is tested.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from ensembler import artefact, calibration
from ensembler.ensemble import Ensemble
from ensembler.eval.calibrate import fit
from ensembler.trainers import Session, Settings, train_deep_ensemble
from tests._interrupt import BreakingOff
from tests._small import SETTINGS, dataset

RUN = Path(__file__).parent / "data" / "run-format-1"


def session(checkpoints=None) -> Session:
    return Session(dataset(), Settings(**SETTINGS), checkpoints=checkpoints)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run = Path(shutil.copytree(RUN, folder / "run"))
    probs = Ensemble.load(RUN, device="cpu").predict_proba(dataset().test.images).double().numpy()
    origin = {"dataset": "small", "validation_sha256": dataset().test.sha256}
    sha256 = artefact.sha256(RUN / artefact.MANIFEST)
    found = fit(probs, dataset().test.labels.numpy(), alpha=0.3, risk=0.9, run_sha256=sha256, **origin)
    calibration.save(found, run)
    (folder / "calibration-format-1").mkdir()
    shutil.move(run / calibration.FILE, folder / "calibration-format-1")
    shutil.rmtree(run)

    checkpoints = BreakingOff(folder / "unfinished-format-1", every=0.0, options={"train-deep-ensemble": {}})
    checkpoints.left = 5
    try:
        train_deep_ensemble(session(checkpoints), members=1)
    except KeyboardInterrupt:
        (folder / "unfinished-format-1" / ".lock").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
