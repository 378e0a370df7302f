"""An option is one field: its range, its flag, its help, and its place in every run, whatever the method."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ensembler.errors import UsageError
from ensembler.options import option
from ensembler.run import Run
from ensembler.trainers import (
    FGE,
    SWAG,
    Complex,
    Curve,
    CyclicalSGMCMC,
    DeepEnsemble,
    MCDropout,
    Method,
    Settings,
    Simplex,
    Snapshots,
    Subspace,
)
from ensembler.trainers.launch import Launch
from ensembler.trainers.method import methods
from tests._small import SETTINGS
from tests._training import call, call_with_method, make, saved

# --- every option of a run is in its manifest ---

SMALL: dict[type[Method], dict[str, Any]] = {
    DeepEnsemble: {"members": 1},
    FGE: {"members": 1, "cycle": 1},
    Snapshots: {"members": 2},
    SWAG: {"members": 2, "start": 0.5, "collect_every": 0.5},
    CyclicalSGMCMC: {"members": 2, "samples_per_cycle": 1},
    MCDropout: {"members": 2},
    Simplex: {"vertices": 2},
    Subspace: {"vertices": 2},
    Curve: {"points": 3},
    Complex: {"points": 3},
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ends")
    return [saved(make(DeepEnsemble(members=1), seed=seed), folder / str(seed)) for seed in (0, 1)]


@pytest.mark.parametrize("kind", methods())
def test_every_resolved_option_is_in_the_manifest(kind, ends, tmp_path):
    joined = {"first": ends[0], "second": ends[1], "modes": ends}
    given = SMALL.get(kind, {}) | {name: value for name, value in joined.items() if name in kind.model_fields}
    own = {"architecture": "tests._small:dropout"} if kind is MCDropout else {}
    manifest = Run.load(make(kind(**given), **own).save(tmp_path / "run")).manifest
    assert manifest.options.keys() == kind.model_fields.keys()
    assert manifest.settings.keys() == Settings.model_fields.keys()
    # What they hold makes the same run again, and nothing that the data or other options decide is left open.
    settings = Settings(**manifest.settings)
    assert kind(**manifest.options).resolved(settings) == kind(**manifest.options)
    assert manifest.options | given == manifest.options
    assert manifest.settings | SETTINGS | own == manifest.settings
    open_ones = {name for name, value in (manifest.options | manifest.settings).items() if value is None}
    assert open_ones <= {"init", "weights", "threads", "workers", "parameter_groups"}
    assert make(kind(**manifest.options), **own).manifest.fingerprint == manifest.fingerprint


def test_what_is_only_computed_otherwise_is_the_same_run():
    """Threads and workers change no fingerprint; a seed, and any option of the method's, does."""
    runs = [
        make(DeepEnsemble(members=members), **settings).manifest.fingerprint
        for members, settings in ((1, {}), (1, {"threads": 1, "workers": 0}), (1, {"seed": 1}), (2, {}))
    ]
    assert runs[0] == runs[1]
    assert len(set(runs)) == 3


# --- one more option is one more field ---


MINE = """
from ensembler.trainers import Simplex
from ensembler.options import option

class Mine(Simplex):
    \"\"\"A simplex of mine.\"\"\"

    command = "train-mine"

    extra: float = option(0.5, ge=0, lt=1, help="Something that a simplex has not.")
    style: str | None = option(None, flag="--how", help="How it is done.")
"""


def lines_of(printed: str) -> list[str]:
    """Without colours and with single spaces."""
    return [" ".join(line.split()) for line in re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()]


def test_a_field_is_an_option_of_the_command_its_help_its_file_and_the_manifest(images, tmp_path):
    """A method of one file, whose two fields are all that is said of them."""
    (tmp_path / "mine.toml").write_text("[train-mine]\nextra = 0.25\nhow = 'so'\n")
    small = ["--vertices", 2, "--arch", "tests._small:network", "--epochs", 1, "--device", "cpu", "--quiet", *images]
    shown, refused, *made = call_with_method(
        MINE,
        tmp_path,
        ["train-mine", "--help"],
        ["train-mine", "--extra", 1, *images],
        ["train-mine", "--config", "mine.toml", "--out", "run", *small],
        ["train-mine", "--config", "run", "--how", "else", "--out", "again", *images],  # a run to make again
    )
    help_lines = lines_of(shown[1])
    assert any("A simplex of mine." in line for line in help_lines)
    for flag, text in (
        ("--extra", "Something that a simplex has not. [default: 0.5]"),
        ("--how", "How it is done."),
        ("--vertices", "[default: 4]"),
    ):
        assert any(flag in line and text in line for line in help_lines), flag
    assert (refused[0], refused[2]) == (1, "error: --extra must be below 1, not 1.0\n")
    for (code, _, errors), name, style in zip(made, ("run", "again"), ("so", "else"), strict=True):
        assert code == 0, errors
        options = Run.load(tmp_path / name).manifest.options
        assert (options["extra"], options["style"], options["vertices"]) == (0.25, style, 2)


class Mine(Simplex):
    command = "train-mine"
    extra: float = option(0.5, ge=0, help="Something.")


def test_a_field_of_a_record_in_python():
    assert make(Mine(vertices=2, extra=0.25)).manifest.options["extra"] == 0.25
    with pytest.raises(UsageError, match=r"^extra must be at least 0, not -1$"):
        Mine(extra=-1)
    with pytest.raises(UsageError, match=r"^Simplex has no option extra: it has vertices, members"):
        Simplex(extra=0.5)


def test_every_field_is_an_option_of_its_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for kind in methods():
        given = call(kind.command, "--help")
        assert given.exit_code == 0
        shared = (Settings.flags() | Launch.flags()).values()
        own = [flag for name, flag in kind.flags().items() if not kind.model_fields[name].json_schema_extra["argument"]]
        text = " ".join(lines_of(given.output))
        left_out = {"--init", "--weights"} if kind.marked("path") else set()
        for flag in {*own, *shared} - left_out:
            assert flag.partition("/")[0] in text, f"{kind.command} {flag}"
        assert not left_out & set(text.split())


# --- ranges ---


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Simplex, {"vertices": 1}, "vertices must be at least 2, not 1"),
        (Simplex, {"members": 0}, "members must be at least 1, not 0"),
        (Simplex, {"vertex_epochs": 0}, "vertex_epochs must be positive, not 0"),
        (Simplex, {"vertex_lr": 0.0}, "vertex_lr must be positive, not 0.0"),
        (Simplex, {"regularisation": -1.0}, "regularisation must be at least 0, not -1.0"),
        (Simplex, {"regularisation": float("nan")}, "regularisation must be finite, not nan"),
        (Simplex, {"regularisation": "much"}, "regularisation must be a number or auto, not 'much'"),
        (Simplex, {"regulariser": "size"}, "regulariser must be volume or function, not 'size'"),
        (Simplex, {"tolerance": 0}, "tolerance must be positive, not 0"),
        (Simplex, {"concentration": 0.0}, "concentration must be positive, not 0.0"),
        (Simplex, {"samples_per_step": 0}, "samples_per_step must be at least 1, not 0"),
        (Subspace, {"vertices": 1}, "vertices must be at least 2, not 1"),
        (Subspace, {"beta": -1.0}, "beta must be at least 0, not -1.0"),
        (Complex, {"modes": ["a", "b"], "connectors": 0}, "connectors must be at least 1, not 0"),
        (Complex, {"modes": ["a", "b"], "regularisation": -1.0}, "regularisation must be at least 0, not -1.0"),
        (Complex, {}, "modes is required"),
        (FGE, {"start": 1.5}, "start must be at most 1, not 1.5"),
        (Settings, {"epochs": 0}, "epochs must be positive, not 0"),
        (Settings, {"epochs": float("nan")}, "epochs must be finite, not nan"),
        (Settings, {"epochs": float("inf")}, "epochs must be finite, not inf"),
        (Settings, {"lr": -1}, "lr must be positive, not -1"),
        (Settings, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (Settings, {"momentum": -0.1}, "momentum must be at least 0, not -0.1"),
        (Settings, {"momentum": 1.0}, "momentum must be below 1, not 1.0"),
        (Settings, {"weight_decay": -1e-9}, "weight_decay must be at least 0, not -1e-09"),
        (Settings, {"clip": -1}, "clip must be at least 0, not -1"),
        (Settings, {"warmup": -1}, "warmup must be at least 0, not -1"),
        (Settings, {"accumulate": 0}, "accumulate must be at least 1, not 0"),
        (Settings, {"early_stopping": -1}, "early_stopping must be at least 0, not -1"),
        (Settings, {"workers": -1}, "workers must be at least 0, not -1"),
        (Settings, {"threads": 0}, "threads must be at least 1, not 0"),
        (Settings, {"precision": "float8"}, "precision must be float32 or tf32 or bfloat16 or float16, not 'float8'"),
        (Settings, {"rate": 0.1}, "Settings has no option rate: it has architecture, init"),
    ],
)
def test_values_out_of_range_are_refused_as_soon_as_they_are_given(kind, given, message):
    with pytest.raises(UsageError) as caught:
        kind(**given)
    assert str(caught.value).startswith(message)
    if kind in (Simplex, Settings) and "no option" not in message:
        flag = kind.flags()[next(iter(given))]
        with pytest.raises(UsageError, match=rf"^{flag} must be "):
            kind.typed(given)


def test_what_the_data_or_the_machine_do_not_have_is_refused():
    with pytest.raises(
        UsageError, match="unknown augmentation 'x': use one of crop-flip, crop, resized-crop-flip, none"
    ):
        make(DeepEnsemble(), augmentation="x")
    with pytest.raises(UsageError, match="cannot compute on the device 'tpu9'"):
        make(DeepEnsemble(), device="tpu9")


def test_a_record_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Simplex().vertices = 3
