"""Where a study's runs and report go, and what does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ensembler.options import Options, option

__all__ = ["StudyOptions"]


class StudyOptions(Options):
    """Where a study's runs and report go, and what does the work."""

    out: Path | None = option(None, help="Folder of its runs and report. (default: study-NAME, of the file or dataset)")
    runs: list[Path] | None = option(
        None, help="Folder whose runs are taken where they are what the study needs. Repeatable. (default: runs/)"
    )
    dry_run: bool = option(False, flag="--dry-run", help="Print the plan and an estimate of its time; train nothing.")
    engine: Literal["local", "ray"] = option("local", help="What trains independent runs: this process, or Ray.")
    address: str | None = option(
        None, help="Address of a Ray cluster. (default: $RAY_ADDRESS, or a new Ray on this machine)"
    )
    parallel_members: int = option(1, ge=1, metavar="M", help="M independent runs at once on one GPU.")
    checkpoint_every: float = option(60.0, ge=0, help="Seconds between two checkpoints of a run.")
    cache: Path | None = option(None, help="Folder of kept predictions. (default: a cache folder)")
    quiet: bool = option(False, flag="--quiet", help="Print only the final result.")
