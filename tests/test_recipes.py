"""The recipes: every value is an option's, the published ones are what the sources say, and who wins over whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers.recipes import FAST, PAPER, find
from ensembler.trainers.schedules import piecewise

COMMANDS = get_command(app).commands


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_recipe_holds_options_of_its_command():
    for command, options in (*((recipe.command, recipe.options) for recipe in PAPER), *FAST.items()):
        assert options.keys() <= {parameter.name for parameter in COMMANDS[command].params}
    trained = {name for name in COMMANDS if name.startswith("train-")}
    assert set(FAST) == trained == {recipe.command for recipe in PAPER}
    assert len({(recipe.command, recipe.architecture, recipe.datasets) for recipe in PAPER}) == len(PAPER)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            ("train-fge", "vgg16", "cifar100"),
            {
                "epochs": 200,
                "rate": 0.05,
                "schedule": "piecewise",
                "high": 1e-2,
                "low": 5e-4,
                "cycle": 2,
                "weight_decay": 5e-4,
                "start": 0.8,
            },
        ),
        (
            ("train-fge", "preresnet164", "cifar10"),
            {"epochs": 150, "rate": 0.1, "high": 5e-2, "low": 5e-4, "cycle": 4, "weight_decay": 3e-4},
        ),
        (("train-fge", "wrn28x10", "cifar10"), {"epochs": 200, "high": 5e-2, "cycle": 4, "weight_decay": 5e-4}),
        (
            ("train-curve", "vgg16", "cifar10"),
            {"epochs": 600, "rate": 0.015, "schedule": "piecewise", "weight_decay": 5e-4, "bends": 1},
        ),
        (("train-curve", "preresnet164", "cifar10"), {"epochs": 200, "rate": 0.03, "weight_decay": 3e-4}),
        (("train-snapshots", "wrn28x10", "cifar10"), {"rate": 0.2, "cycle": 40, "batch_size": 64, "momentum": 0.0}),
        (
            ("train-simplex", "vgg16", "cifar10"),
            {"epochs": 300, "rate": 0.05, "schedule": "cosine", "vertex_epochs": 10, "batch_size": 128},
        ),
        (("train-simplex", "vgg16", "cifar100"), {"vertex_epochs": 20, "samples_per_step": 5, "vertex_rate": 0.05}),
        (("train-subspace", "preresnet20", "cifar10"), {"beta": 1.0, "rate": 0.1, "weight_decay": 1e-4}),
    ],
)
def test_published_values(asked, expected):
    options = find("paper", *asked)
    assert {name: options[name] for name in expected} == expected
    assert options["clip"] == 0


def test_the_piecewise_schedule_by_hand():
    schedule = piecewise(0.1, 100)
    assert [schedule(i) for i in (1, 50, 90, 100)] == pytest.approx([0.1, 0.1, 0.001, 0.001])
    assert schedule(70) == pytest.approx(0.1 * (1 - 0.5 * 0.99))  # half-way down


def test_one_budget_of_fge_is_one_budget():
    for recipe in PAPER:
        if recipe.command == "train-fge" and recipe.options["start"] < 1:
            options = recipe.options
            end = options["start"] * options["epochs"] + options["cycle"] * (options["members"] - 0.5)
            assert options["epochs"] - options["cycle"] < end <= options["epochs"]


def test_what_was_not_published_is_refused_with_what_was():
    with pytest.raises(UsageError, match="no recipe of train-simplex was published for cnn on digits: use vgg16"):
        find("paper", "train-simplex", "cnn", "digits")
    with pytest.raises(UsageError, match="resnet20 on cifar100"):
        find("paper", "train-subspace", "resnet20", "cifar100")
    result = call("train-fge", "--recipe", "paper")
    assert result.exit_code == 1
    assert "preresnet164 on cifar10 or cifar100 (Garipov et al. 2018" in result.stderr
    assert call("train-fge", "--recipe", "slow").exit_code == 2


def test_the_command_line_wins_over_a_file_and_a_file_over_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ["--arch", "tests._small:network", "--image-size", 8, "--device", "cpu", "--quiet"]
    Path("a.toml").write_text("recipe = 'fast'\nepochs = 1\nvertices = 4\n")
    arguments = ["train-simplex", "--config", "a.toml", "--vertices", 2, *shared, "--out", "run"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    options = Run.load(Path("run")).manifest.options
    assert options["recipe"] == "fast"
    assert (options["vertices"], options["epochs"], options["vertex_epochs"]) == (2, 1, 3)  # typed, file, recipe
    # The network and the images are those of the run to begin from.
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["options"]["vertex_rate"] == 0.1
    result = call("train-fge", "--recipe", "paper", "--init", "run")
    assert "was published for tests._small:network on digits" in result.stderr
