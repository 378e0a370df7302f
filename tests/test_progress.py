"""What is shown while training goes on: lines, bars, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.progress import Progress as Bars
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import ArtefactError, UsageError
from ensembler.run import Run
from ensembler.trainers.events import EpochEnd, Message, Progress
from ensembler.trainers.plan import Epoch
from ensembler.trainers.progress import progress

SMALL = ["--arch", "tests._small:network", "--image-size", 8, "--device", "cpu"]


def epoch(part, number, epochs, metric="accuracy"):
    return EpochEnd(part, Epoch(number=number, lr=0.1, loss=1.5, metric=0.25, examples=30), epochs, metric)


def report(on_event, *numbers, epochs=4, metric="accuracy"):
    on_event(Message("found [this]"))
    for number in numbers:
        on_event(epoch("vertex 2", number, epochs, metric))


def test_plain_lines_say_the_time_left(capsys, monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("ensembler.trainers.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress() as on_event:
        report(on_event, 1, 3, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "found [this]",
        "vertex 2: epoch 1 of 4, loss 1.500, accuracy 0.250, 0:00:06 left",  # 2 s an epoch
        "vertex 2: epoch 3 of 4, loss 1.500, accuracy 0.250, 0:00:03 left",  # 10 s for three
        "vertex 2: epoch 4 of 4, loss 1.500, accuracy 0.250",
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Bars that every update draws, not only a thread ten times a second."""
    update = Bars.update

    def draw(self, *given, **fields):
        update(self, *given, **fields)
        self.refresh()

    monkeypatch.setattr(Bars, "update", draw)
    monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.mark.usefixtures("drawn")
def test_a_terminal_gets_bars(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with progress() as on_event:
        on_event(Message("kept [back]", result=True))
        for done in (10, 20):
            on_event(Progress("vertex 2", done, 120))
        report(on_event, 1)
        for number in (2, 3):
            on_event(epoch("vertex 2", number, 4))
        report(on_event, 4)
    out, error = capsys.readouterr()
    assert out == "kept [back]\n"
    assert "found [this]" in error
    assert error.index("loading") < error.index("found [this]")  # what comes first may take seconds
    assert "loading" not in error[error.index("found [this]") :]
    assert "2/4, loss 1.500, accuracy 0.250" in error  # beside the bar
    assert re.search(r"[\d,]+ images/s", error)
    assert "vertex 2: 4 epochs, loss 1.500, accuracy 0.250\n" in error


def test_a_long_epoch_has_a_line_a_minute(capsys, monkeypatch):
    clock = iter([0.0, 59.0, 61.0, 61.0, 90.0])
    monkeypatch.setattr("ensembler.trainers.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress() as on_event:
        for done in (1000, 2000, 3000):
            on_event(Progress("vertex 2", done, 4000))
    assert capsys.readouterr().err.splitlines() == ["vertex 2: 2,000 of 4,000 images"]


def test_quiet_shows_nothing(capsys):
    with progress(quiet=True) as on_event:
        report(on_event, 1, 2)
    assert capsys.readouterr() == ("", "")


def test_another_tasks_metric_is_shown_by_its_name(capsys):
    with progress() as on_event:
        report(on_event, 4, metric="absolute_error")
    assert capsys.readouterr().err.splitlines()[1] == "vertex 2: epoch 4 of 4, loss 1.500, absolute_error 0.250"


def test_json_lines_are_there_as_soon_as_they_are_reported(tmp_path):
    log = tmp_path / "new" / "log.jsonl"
    for run in (1, 2):  # a second run adds to the file
        with progress(quiet=True, log=log) as on_event:
            report(on_event, 1, epochs=2)
            assert len(log.read_text().splitlines()) == run
    record = json.loads(log.read_text().splitlines()[0])
    assert record.pop("seconds") >= 0
    assert record == {
        **{"part": "vertex 2", "number": 1, "lr": 0.1, "loss": 1.5, "accuracy": 0.25, "examples": 30, "epochs": 2},
    }


def measured(number, epochs):
    numbers = Epoch(number, 0.1, 1.5, 0.25, 30, held_out_loss=1.75, held_out_metric=0.5)
    return EpochEnd("vertex 2", numbers, epochs, "accuracy")


@pytest.mark.parametrize(
    ("columns", "state"),
    [(80, "loss 1.500, held-out 1.750, 0.500"), (120, "loss 1.500, accuracy 0.250, held-out loss 1.750, accuracy 0.5")],
)
@pytest.mark.usefixtures("drawn")
def test_held_out_numbers_are_beside_the_bar(capsys, monkeypatch, columns, state):
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress() as on_event:
        on_event(measured(1, 4))
        on_event(measured(2, 4))
    assert f"2/4, {state}" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.usefixtures("drawn")
def test_a_long_name_loses_its_beginning_and_no_figure_is_cut(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "seed 0, simplex 2 of 4, vertex 3"
    with progress() as on_event:
        for done in (9_000, 18_000, 27_000):
            on_event(Progress(name, done, 900_000))
        on_event(replace(measured(2, 4), part=name))
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = next(line for line in reversed(re.split(r"[\r\n]+", drawn)) if "2/4" in line)
    assert re.search(
        r"vertex 3 +━*[╸╺]?━* +2/4, loss 1.500, held-out 1.750, 0.500 +[\d,]+( images)?/s +\d:\d\d:\d\d$", last.strip()
    )
    assert len(last.rstrip()) <= columns


def test_held_out_numbers_are_in_the_lines_and_the_log_and_what_is_not_finite_is_left_out(capsys, tmp_path):
    with progress(log=tmp_path / "log") as on_event:
        on_event(measured(4, 4))
        on_event(EpochEnd("vertex 2", replace(measured(4, 4).epoch, held_out_loss=float("inf")), 4, "accuracy"))
    line = "vertex 2: epoch 4 of 4, loss 1.500, accuracy 0.250, held-out loss 1.750, accuracy 0.500"
    assert capsys.readouterr().err.splitlines()[0] == line
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (first["held_out_loss"], first["held_out_accuracy"]) == (1.75, 0.5)
    assert "held_out_loss" not in second


def test_tensorboard_is_closed_whatever_happens(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    with pytest.raises(KeyboardInterrupt), progress(quiet=True, tensorboard=tmp_path) as on_event:
        report(on_event, 3)
        on_event(measured(4, 4))
        raise KeyboardInterrupt
    assert calls == [
        str(tmp_path),
        ("vertex 2/loss", 1.5, 3),
        ("vertex 2/accuracy", 0.25, 3),
        ("vertex 2/lr", 0.1, 3),
        ("vertex 2/loss", 1.5, 4),
        ("vertex 2/accuracy", 0.25, 4),
        ("vertex 2/lr", 0.1, 4),
        ("vertex 2/held_out_loss", 1.75, 4),
        ("vertex 2/held_out_accuracy", 0.5, 4),
        "closed",
    ]


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match=r"cannot write .*log.jsonl: .*: choose another path"):
        progress(log=tmp_path / "file" / "log.jsonl").__enter__()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'ensembler\[tensorboard\]'"):
        progress(tensorboard=tmp_path).__enter__()


def test_a_command_reports_to_all_of_them(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    arguments = ["train-simplex", *SMALL, "--vertices", 2, "--epochs", 2, "--quiet", "--out", "run"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--log", "log.jsonl", "--tensorboard", "events"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "run: run"
    history = Run.load(tmp_path / "run").history
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    drop = ("seconds", "epochs")
    assert [{k: v for k, v in record.items() if k not in drop} for record in log] == [
        {k: v for k, v in record.items() if k not in drop} for record in history
    ]
    assert [record["part"] for record in log] == ["solution 1", "solution 1", "vertex 2"]
    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("solution 1/loss")]
    assert found == [(record["number"], pytest.approx(record["loss"])) for record in log[:2]]


@pytest.mark.parametrize("option", ["log", "tensorboard"])
def test_a_training_that_does_not_begin_leaves_no_log(option, tmp_path):
    if option == "tensorboard":
        pytest.importorskip("tensorboard")
    (tmp_path / "own").touch()
    for place in ("new/deep/log", "own") if option == "log" else ("new/deep/log",):
        with pytest.raises(UsageError), progress(quiet=True, **{option: tmp_path / place}):
            raise UsageError("a mistake in its options")
    assert [*tmp_path.rglob("*")] == [tmp_path / "own"]
