"""The command ``study``.

Annotations are evaluated here, not postponed: Typer reads them.
"""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from ensembler.options import chosen, parameters, with_parameters
from ensembler.study.file import DECIDED, Grid
from ensembler.study.options import StudyOptions
from ensembler.trainers.launch import Data
from ensembler.trainers.settings import Settings

__all__ = ["app"]

app = typer.Typer()


def _study(context: typer.Context, file: Path | None, **given: Any) -> None:
    """Train, evaluate and compare methods at equal budgets, and recommend one; resumes where it was interrupted."""
    from ensembler.study.conduct import conduct

    typed = {name: given[name] for name in chosen(context) & given.keys()}
    conduct(file, typed, StudyOptions.typed(given))


_File = Annotated[Path | None, typer.Argument(metavar="FILE.toml", help="A study, with its methods and options.")]
_context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_file = inspect.Parameter("file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_File)
_every = [
    _context,
    _file,
    *parameters(Grid, "Study"),
    *parameters(StudyOptions, "Run"),
    *parameters(Data, "Images"),
    *(option for option in parameters(Settings, "Training") if option.name not in DECIDED),
]
app.command("study")(with_parameters(_study, _every))
