"""``--config``: options from a file, and a run made again from its manifest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.run import Run
from ensembler.storage.artefact import sha256
from ensembler.trainers import Settings
from ensembler.trainers.method import methods

SMALL = ["--arch", "tests._small:network", "--image-size", 8, "--epochs", 1, "--device", "cpu", "--quiet"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return Run.load(Path(result.stdout.splitlines()[-1].removeprefix("run: "))).manifest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TOML = """
device = "cpu"
quiet = true
image-size = 8
epochs = 1
out = "made"

[train-simplex]
vertices = 2
arch = "tests._small:network"
vertex-lr = 0.02
weight_decay = 1e-3  # a parameter's name does as well
regularisation = 0.5
corners = false
members = 3

[eval]
runs = ["made", "other"]
examples = 20
"""
YAML = """
device: cpu
quiet: true
image-size: 8
epochs: 1
out: made
train_simplex:
  vertices: 2
  arch: tests._small:network
  vertex-lr: 2e-2
  weight_decay: 0.001
  regularisation: .5
  corners: false
  members: 3
"""


@pytest.mark.parametrize(("name", "text"), [("all.toml", TOML), ("all.yaml", YAML), ("all.yml", YAML)])
def test_a_file_gives_defaults_and_the_command_line_wins(name, text):
    Path(name).write_text(text)
    made = train("train-simplex", "--config", name, "--members", 4, "--corners")
    options, settings = made.options, made.settings
    assert (options["vertices"], options["vertex_lr"], options["regularisation"]) == (2, 0.02, 0.5)
    assert (settings["weight_decay"], settings["epochs"]) == (0.001, 1)
    assert options["members"] == 4  # typed
    assert options["corners"] is True
    assert settings["momentum"] == 0.9  # neither typed nor in the file


def test_one_file_serves_several_commands_and_holds_arguments():
    Path("all.toml").write_text(TOML)
    train("train-simplex", "--config", "all.toml")
    shutil.copytree("made", "other")
    result = call("eval", "--config", "all.toml", "--out", "report")  # it has no option epochs, and a table of its own
    assert result.exit_code == 0, result.output
    report = json.loads(Path("report/report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["made", "other"]
    Path("show.json").write_text('{"show": {"run": "made"}}')
    assert call("show", "--config", "show.json").stdout.startswith("made")


def test_a_command_of_a_group_takes_its_own_table():
    text = "seed = 3\nquiet = true\n[data-corrupt]\ndataset = 'digits'\nimage-size = 4\ncorruptions = 'contrast'\n"
    Path("all.toml").write_text(text)
    for arguments, seed in ((["--out", "made"], 3), (["--out", "typed", "--seed", 4], 4)):
        result = call("data", "corrupt", "--config", "all.toml", *arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(Path(arguments[1], "generated.json").read_text())["seed"] == seed
    Path("all.toml").write_text(text + "fog = 1")
    result = call("data", "corrupt", "--config", "all.toml", "--out", "other")
    assert "data-corrupt has no option 'fog'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    Path("all.toml").write_text("[corrupt]\nseed = 3")
    assert "there is no command 'corrupt'" in call("data", "corrupt", "--config", "all.toml", "--out", "x").stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "vertexes = 3", "a.toml: no command has an option 'vertexes': did you mean vertex-epochs"),
        ("a.toml", "[train-simplex]\nvertex-l = 1", "train-simplex has no option 'vertex-l': did you mean vertex-lr"),
        (
            "a.toml",
            "[train-simplex]\nport = 1",
            "train-simplex has no option 'port': there are accumulate, address, arch, augmentation, ",
        ),
        ("a.toml", "[train-simplx]\nx = 1", "there is no command 'train-simplx': did you mean train-simplex"),
        ("a.toml", "config = 'b.toml'", "no command has an option 'config'"),
        ("a.toml", "vertices = 2.5", "a.toml: vertices = 2.5: "),
        ("a.toml", "vertices = true", "a.toml: vertices = True: it must be text or a number"),
        ("a.toml", "vertices = [3]", "a.toml: vertices = [3]: it must be text or a number"),
        ("a.toml", "corners = 'no'", "a.toml: corners = 'no': it must be true or false"),
        ("a.toml", "recipe = 'slow'", "a.toml: recipe = 'slow': "),
        ("a.toml", "vertices = ", "a.toml is not TOML: "),
        ("a.yaml", "a: [1", "a.yaml is not YAML: "),
        ("a.yaml", "- 1", "a.yaml must hold options by name, not a list"),
        ("a.yaml", "3: 4", "no command has an option 3"),
        ("a.yaml", "!!python/object/apply:os.system [echo]", "a.yaml is not YAML: "),
        ("a.json", "{", "a.json is not JSON: "),
        ("a.ini", "", "--config takes a .toml, .json, .yaml, .yml file or a run's folder, not a.ini"),
        ("a.json", '{"kind": "bundle", "method": "fge"}', "a.json is not the manifest of a run"),
        ("a.json", '{"kind": "run"}', "a.json is not the manifest of a run"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_on_one_line(name, text, message):
    Path(name).write_text(text)
    result = call("train-simplex", "--config", name)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        (
            "train-curve",
            "second = 'b'",
            "first is missing: write it in the file of --config, or see ensembler train-curve --help",
        ),
        ("train-complex", "modes = []", "modes is missing: write it in the file of --config, or see ensembler train-c"),
        ("train-curve", "first = ''\nsecond = 'b'", "a.toml: first = '': it takes a path or a URL, and it is empty"),
        ("train-curve", "FIRST = 'a'\nsecond = 'b'", "a.toml: no command has an option 'FIRST': did you mean first"),
    ],
)
def test_an_argument_of_a_file_is_called_as_it_is_written_there(command, text, said):
    """Typed, it is FIRST, as --help has it."""
    Path("a.toml").write_text(text)
    result = call(command, "--config", "a.toml")
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith(f"error: {said}")
    assert len(result.stderr.splitlines()) == 1
    assert call("train-curve").stderr == "error: FIRST is missing: see ensembler train-curve --help\n"


def test_a_file_that_is_not_there_or_not_text():
    assert "nowhere.toml does not exist" in call("eval", "--config", "nowhere.toml").stderr
    Path("binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml is not TOML" in call("eval", "--config", "binary.toml").stderr
    Path("folder").mkdir()
    assert f"folder{os.sep}manifest.json does not exist" in call("eval", "--config", "folder").stderr


def made_again(command, folder):
    """A run of the command, and that which ``--config`` makes of it: the same bytes, options and fingerprint."""
    name, *arguments = command
    first = train(name, *SMALL, *arguments, "--out", f"{folder}/first")
    again = train(name, "--config", f"{folder}/first", "--quiet", "--out", f"{folder}/again")
    for field in ("command", "method", "options", "settings", "seed", "fingerprint"):
        assert getattr(again, field) == getattr(first, field)
    assert again.options.keys() >= METHODS[name].model_fields.keys()  # every one, always
    assert again.settings.keys() == Settings.model_fields.keys()
    for file in ("vertices.safetensors", "members.safetensors"):
        assert sha256(Path(folder, "again", file)) == sha256(Path(folder, "first", file))
    return first


METHODS = {method.command: method for method in methods()}
COMMANDS = [
    ["train-deep-ensemble", "--members", 1, "--clip", 0, "--seed", 3],
    ["train-deep-ensemble", "--members", 2, "--augmentation", "none"],
    ["train-fge", "--members", 2, "--cycle", 0.5, "--collapse", "centroid"],
    ["train-snapshots", "--members", 2, "--batch-size", 50],
    ["train-swag", "--members", 3, "--start", 0.5, "--collect-every", 0.25, "--swags", 2],
    ["train-csgmcmc", "--members", 4, "--samples-per-cycle", 2],
    ["train-mc-dropout", "--members", 2, "--arch", "tests._small:dropout"],
    ["train-simplex", "--vertices", 2, "--members", 3, "--no-corners", "--regularisation", "auto"],
    ["train-simplex", "--vertices", 2, "--simplexes", 2, "--recipe", "fast", "--vertex-epochs", 0.5],
    ["train-subspace", "--vertices", 2, "--beta", 0.5],
]
JOINING = [
    ["train-simplex", "--init", "runs/latest", "--vertices", 2],
    ["train-fge", "--init", "runs/latest", "--members", 2, "--cycle", 0.5],
    ["train-snapshots", "--init", "runs/latest", "--members", 2],
    ["train-curve", "END", "runs/latest", "--points", 3, "--examples", 20],
    ["train-complex", "END", "runs/latest", "--points", 3, "--examples", 20],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command)))
def test_a_run_makes_the_same_run_again(command):
    made_again(command, "same")
    other = train(command[0], "--config", "same/first/manifest.json", "--seed", 7, "--quiet", "--out", "other")
    assert other.seed == 7
    assert sha256(Path("other/vertices.safetensors")) != sha256(Path("same/first/vertices.safetensors"))


def test_every_method_is_among_those_that_are_made_again():
    assert {command for command, *_ in COMMANDS + JOINING} == METHODS.keys()


def test_a_run_remembers_what_it_began_from():
    for seed, name in ((0, "END"), (1, "runs/start")):
        train("train-deep-ensemble", "--members", 1, "--seed", seed, *SMALL, "--out", name)
    start = str(Path("runs/start").resolve())
    for command in JOINING:
        made = made_again(command, command[0])
        held = made.settings | made.options
        assert start in (held["init"], held.get("second"), *held.get("modes", ()))
    train("train-deep-ensemble", "--members", 1, "--seed", 2, *SMALL, "--out", "runs/other")  # is runs/latest now
    again = train("train-simplex", "--config", "train-simplex/first", "--quiet", "--out", "later")
    assert again.settings["init"] == start
    assert sha256(Path("later/vertices.safetensors")) == sha256(Path("train-simplex/first/vertices.safetensors"))


def test_images_in_files_of_which_some_are_left_out_are_so_again(images):
    (Path("images") / "top" / "3.png").write_bytes(b"no image")
    files = [*images, "--from-files", "--corrupt", "skip", "--workers", 0]
    made = made_again(["train-deep-ensemble", "--members", 1, *files], "skipped")
    assert made.dataset.lazy
    assert made.dataset.skipped == ["top/3.png"]


def test_a_setting_that_is_not_its_default_is_made_again():
    """Each that a CPU takes, at once: forgetting one would make another run."""
    changes = {
        **{"--lr": 0.05, "--schedule": "piecewise", "--momentum": 0.5, "--weight-decay": 1e-3, "--clip": 0.5},
        **{"--augmentation": "crop-flip", "--precision": "bfloat16", "--batch-size": 40, "--seed": 5, "--threads": 1},
        **{"--warmup": 0.2, "--accumulate": 2, "--early-stopping": 2, "--label-smoothing": 0.1},
        **{"--class-weights": "balanced", "--mixup": 0.2, "--cutmix": 1},
    }
    made = made_again(["train-deep-ensemble", "--members", 1, *sum(changes.items(), ())], "changed")
    default = {name: field.default for name, field in Settings.model_fields.items()}
    unchanged = {name for name, value in made.settings.items() if value == default[name]}
    assert unchanged == {
        *("init", "weights", "optimiser", "parameter_groups", "loss"),
        *("sync_batchnorm", "compile", "eager", "measure", "workers"),
    }


def test_another_commands_run_is_refused():
    train("train-fge", "--members", 2, "--cycle", 0.5, *SMALL, "--out", "fge")
    for command in ("train-simplex", "eval"):
        result = call(command, "--config", "fge")
        assert result.exit_code == 1
        assert f"manifest.json is a run of fge, made by train-fge, not by {command}" in result.stderr


def test_the_run_of_a_method_that_has_no_command_is_refused():
    train("train-fge", "--members", 2, "--cycle", 0.5, *SMALL, "--out", "fge")
    manifest = json.loads(Path("fge/manifest.json").read_text()) | {"command": None}
    Path("fge.json").write_text(json.dumps(manifest))
    assert (
        "fge.json is a run of fge, made by no command, not by train-fge"
        in call("train-fge", "--config", "fge.json").stderr
    )
