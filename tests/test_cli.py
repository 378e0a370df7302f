"""The command line as a user meets it: what it prints, what it refuses, what it leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.run import Run

ROOT = Path(__file__).parents[1]
SMALL = ["--arch", "tests._small:network", "--epochs", "2", "--device", "cpu"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_then_eval_the_latest_run(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train-simplex", "--vertices", 3, "--members", 4, *SMALL, *images)
    assert result.exit_code == 0, result.output
    assert "simplex of 4 members on images\n" in result.stdout
    assert "log volume" in result.stdout
    assert "vertex 3: epoch 1 of 1" in result.stderr
    run = Run.load(tmp_path / "runs" / "latest")
    assert run.manifest.options["regularisation"] == 0.01
    assert run.manifest.settings["batch_size"] == 32
    assert run.history[0]["part"] == "solution 1"

    shown = call("show").stdout
    for part in (
        "simplex",
        "bottom (21), middle (22), top (21)",
        "3 vertices, 4 members",
        "vertex 3",
        "log volume",
        "vertices.safetensors",
    ):
        assert part in shown

    result = call("eval", "--shift", "cifar10c", "--json", "out/found.json", "--out", "report", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "generated with CIFAR-10-C's 32 x 32 constants" in " ".join(result.stdout.split())
    found = json.loads(Path("out/found.json").read_text())
    assert found["runs"][0]["name"] == (tmp_path / "runs" / "latest").resolve().name
    files = {path.name for path in Path("report").iterdir()}
    assert files >= {"report.html", "report.md", "report.csv", "report.json", "severity.png", "reliability.png"}
    assert Path("report/report.json").read_text() == Path("out/found.json").read_text()


def test_every_method_trains_and_deep_ensembles_are_compared(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("train-deep-ensemble", "train-fge"):
        result = call(command, "--members", 2, *SMALL, *images, "--out", command)
        assert result.exit_code == 0, result.output
    # The run to start from says which images and which network.
    result = call("train-simplex", "--init", "train-deep-ensemble", "--vertices", 2, "--epochs", 2, "--out", "simplex")
    assert result.exit_code == 0, result.output
    runs = ["train-deep-ensemble", "train-fge", "simplex"]
    result = call("compare", *runs, "--baseline", "train-fge", "--curve", "--out", "compared")
    assert result.exit_code == 0, result.output
    text = Path("compared/report.md").read_text()
    for title in ("1: train-deep-ensemble", "2: train-fge", "3: simplex", "differences from 2: train-fge"):
        assert title in text
    assert Path("compared/members.png").is_file()
    result = call("calibrate", "simplex", "--risk", 0.4)
    assert result.exit_code == 0, result.output
    assert "calibration: simplex/calibration.json" in result.stdout
    assert call("eval", "simplex").exit_code == 0  # the run is still whole
    for arguments in (
        ["train-snapshots", "--members", 2, *SMALL, *images],
        ["train-curve", "simplex", "train-fge", "--points", 5, "--epochs", 2],
        ["train-complex", "simplex", "train-fge", "--points", 5, "--epochs", 2],
        ["train-subspace", "--vertices", 2, *SMALL, *images],
        ["collapse", "train-fge", "--device", "cpu"],
    ):
        result = call(*arguments, "--out", f"made-{arguments[0]}")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == f"run: made-{arguments[0]}"
    assert "fge-centroid of 1 member on" in result.stdout
    result = call("train-fge", "--members", 2, *SMALL, *images, "--collapse", "centroid", "--out", "swa")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == call("collapse", "train-fge", "--out", "x").stdout.splitlines()[0]
    shown = call("show", "made-train-curve").stdout
    path = Run.load(Path("made-train-curve")).manifest.metrics["path"]["curve"]
    assert f"train loss {path['highest_train_loss']:.4f} at t = " in shown
    assert f"test error {100 * path['highest_test_error']:.2f} %, at the ends at most" in " ".join(shown.split())
    assert not set("{}[]") & set(shown)
    lines = [line.strip() for line in shown.splitlines()]
    options = [line.split()[0] for line in lines[lines.index("options") : lines.index("settings")]]
    assert options == ["options", "FIRST", "SECOND", "points"]  # the others are at their defaults
    defaults = shown[shown.index("default options") :]
    assert "curve bezier" in defaults and "points" not in defaults and "epochs 2" not in defaults
    shown = call("show", "made-train-complex").stdout
    assert "barrier, mode 1 to mode 2, complex" in shown
    for part in ("mode 1", "connector 1", "measurements", "forward passes", "GiB at most", "simplex 1"):
        assert part in shown
    result = call(
        *["train-simplex", "--init", "simplex", "--vertices", 2, "--vertex-epochs", 1, "--no-corners"],
        *["--regularisation", "auto", "--regulariser", "function", "--tolerance", 1e9],
    )
    assert result.exit_code == 0, result.output
    assert "lambda: 1, chosen in 3 trials" in result.stdout
    assert "lambda 0.03: held-out NLL" in result.stderr
    assert "simplex of 2 vertices: log volume" in result.stderr


def test_bad_input_gets_one_clear_line(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    for arguments, message in (
        (["train-simplex", "--dataset", "nothing"], "error: unknown dataset 'nothing'"),
        (["train-simplex", "--arch", "nothing", *images], "error: unknown architecture 'nothing'"),
        (["train-simplex", "--vertices", "1", *images], "--vertices must be at least 2, not 1"),
        (
            ["train-simplex", "--regularisation", "much", *images],
            "--regularisation must be a number or auto, not 'much'",
        ),
        (["train-complex", "nowhere", "here"], f"no run at {tmp_path / 'nowhere'}: there is no such folder"),
        (["train-simplex", "--device", "nothing", *images], "cannot compute on the device 'nothing'"),
        (["train-simplex", "--init", "nowhere", *images], f"no run at {tmp_path / 'nowhere'}: there is no such folder"),
        (["train-fge", "--out", "taken", *images], "taken already exists: choose another --out"),
        (["train-fge", "--dataset", "folder:nowhere"], "no folder of images"),
        (["train-fge", "--dataset", "taken"], "unknown dataset 'taken': for the folder, give folder:taken"),
        (["train-fge", "--arch", "nets/mine.py:vit", *images], f"there is no file {tmp_path}/nets/mine.py"),
        (["train-fge", "--dataset", "mine.py"], "unknown dataset 'mine.py': name what the file holds, mine.py:NAME"),
        (["train-fge", "--dataset", "mine:data"], "cannot import the dataset 'mine:data': No module named 'mine'"),
        (["train-deep-ensemble", "--lr", "1e30", "--clip", "0", *SMALL, *images], "the training loss is"),
        (["eval"], "no run in runs: train one first"),
        (["eval", "taken"], "taken is not a run"),
        (["export"], "no run in runs"),
        (["serve", "taken"], "taken is not a bundle"),
        (["data", "corrupt", "nothing", "--out", "made"], "error: unknown dataset 'nothing'"),  # a group's, too
    ):
        result = call(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not Path("runs").exists()
    assert call("train-simplex", "--vertices", "many").exit_code == 2


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train-deep-ensemble", "--members", 1, *SMALL, *images).exit_code == 0
    Path("file").write_text("in the way")
    for arguments in (["train-fge", *SMALL, *images, "--out", "file/run"], ["eval", "--out", "file/report"]):
        result = call(*arguments)
        assert result.exit_code == 1
        assert "cannot write to file" in result.stderr
        assert "epoch" not in result.stderr


def start(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ensembler.cli", *map(str, arguments)]

    def listen() -> None:  # a test runner in the background hands down an ignored SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=listen)  # noqa: PLW1509


def test_no_path_is_made_of_what_a_parser_returns():
    """Typer before 0.29 would, and a URL would lose a slash."""
    kinds = []
    for name in ("show", "compare", "export", "train-simplex", "train-curve"):
        callback = typer.main.get_command(app).commands[name].callback
        for parameter in inspect.signature(callback).parameters.values():
            kind, *infos = get_args(parameter.annotation) or (None,)
            kinds += [str(kind) for info in infos if getattr(info, "parser", None)]
    assert len(kinds) >= 5
    assert not [kind for kind in kinds if "Path" in kind]


def test_help_names_every_command_and_every_command_has_help():
    overview = call("--help").stdout
    for command in ("train-simplex", "train-curve", "collapse", "show", "eval", "data", "export", "serve"):
        assert command in overview
        assert call(command, "--help").exit_code == 0
    overview = call("data", "--help").stdout
    for command in ("download", "corrupt"):
        assert command in overview
        assert "--config" in call("data", command, "--help").stdout
    assert call("--version").stdout.startswith("ensembler ")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_cannot_be_written_is_said(buffered):
    command = [sys.executable, "-m", "ensembler", "--version"]
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    said = "error: cannot write the output: No space left on device: make room, or send it to another place\n"
    assert (done.returncode, done.stderr) == (1, said)
    reading, writing = os.pipe()
    os.close(reading)  # as head does, before everything is written
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
