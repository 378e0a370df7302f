"""The recipes: every value is an option's, the published ones are what the sources say, and who wins over whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers import FGE, SWAG, Curve, CyclicalSGMCMC, Settings, Simplex, Snapshots, Subspace
from ensembler.trainers.method import methods
from ensembler.trainers.methods.csgmcmc import langevin
from ensembler.trainers.recipes import find
from ensembler.trainers.schedules import constant, piecewise
from tests._training import call, call_with_method


@pytest.mark.parametrize("method", methods())
def test_a_recipe_holds_valid_options_of_its_method(method):
    assert method.published
    assert method.fast
    for options in (*(recipe.options for recipe in method.published), method.fast):
        assert options.keys() <= method.model_fields.keys() | Settings.model_fields.keys()
        assert method.typed({"first": "a", "second": "b", "modes": ["a"], **options})
        assert Settings.typed(options)
    assert len({(recipe.architecture, recipe.datasets) for recipe in method.published}) == len(method.published)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            (FGE, "vgg16", "cifar100"),
            {
                "epochs": 200,
                "lr": 0.05,
                "schedule": "piecewise",
                "high": 1e-2,
                "low": 5e-4,
                "cycle": 2,
                "weight_decay": 5e-4,
                "start": 0.8,
            },
        ),
        (
            (FGE, "preresnet164", "cifar10"),
            {"epochs": 150, "lr": 0.1, "high": 5e-2, "low": 5e-4, "cycle": 4, "weight_decay": 3e-4},
        ),
        ((FGE, "wrn28x10", "cifar10"), {"epochs": 200, "high": 5e-2, "cycle": 4, "weight_decay": 5e-4}),
        (
            (Curve, "vgg16", "cifar10"),
            {"epochs": 600, "lr": 0.015, "schedule": "piecewise", "weight_decay": 5e-4, "bends": 1},
        ),
        ((Curve, "preresnet164", "cifar10"), {"epochs": 200, "lr": 0.03, "weight_decay": 3e-4}),
        ((SWAG, "vgg16", "cifar100"), {"epochs": 160, "start": 1.0, "swa_epochs": 140, "swa_lr": 0.01, "lr": 0.05}),
        ((SWAG, "preresnet164", "cifar100"), {"swa_lr": 0.05, "lr": 0.1, "weight_decay": 3e-4}),
        ((SWAG, "preresnet164", "cifar10"), {"swa_lr": 0.01, "members": 30}),
        ((SWAG, "vgg16bn", "cifar10"), {"swa_lr": 0.01, "members": 100}),
        (
            (CyclicalSGMCMC, "vgg16bn", "cifar10"),
            {"lr": 0.5, "cycle": 50, "samples_per_cycle": 3, "batch_size": 64, "momentum": 0.0, "weight_decay": 5e-4},
        ),
        ((CyclicalSGMCMC, "preresnet164", "cifar100"), {"lr": 0.5, "weight_decay": 3e-4, "members": 12}),
        ((Snapshots, "wrn28x10", "cifar10"), {"lr": 0.2, "cycle": 40, "batch_size": 64, "momentum": 0.0}),
        (
            (Simplex, "vgg16", "cifar10"),
            {"epochs": 300, "lr": 0.05, "schedule": "cosine", "vertex_epochs": 10, "batch_size": 128},
        ),
        ((Simplex, "vgg16", "cifar100"), {"vertex_epochs": 20, "samples_per_step": 5, "vertex_lr": 0.05}),
        ((Subspace, "preresnet20", "cifar10"), {"beta": 1.0, "lr": 0.1, "weight_decay": 1e-4}),
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
    for recipe in FGE.published:
        if recipe.options["start"] < 1:
            options = recipe.options
            end = options["start"] * options["epochs"] + options["cycle"] * (options["members"] - 0.5)
            assert options["epochs"] - options["cycle"] < end <= options["epochs"]


def test_the_noise_of_cyclical_sgld_is_the_published_one():
    """Theirs enters the loss as ``sum(w * n) / batches``, n of variance 2 / lr: so does ours, at T = N / batches^2."""
    N, lr = 45_000, 0.01
    options = find("paper", CyclicalSGMCMC, "wrn28x10", "cifar10")
    batches = -(-N // options["batch_size"])
    own = langevin(constant(lr), 0, options["temperature"], options["momentum"], N)(1)
    assert own == pytest.approx((2 / lr) ** 0.5 / batches, rel=1e-3)
    assert options["exploration"] * options["cycle"] == pytest.approx(50 - 3)  # noise in the last 3 epochs


def test_what_was_not_published_is_refused_with_what_was():
    with pytest.raises(UsageError, match="no recipe of train-simplex was published for cnn on digits: use vgg16"):
        find("paper", Simplex, "cnn", "digits")
    with pytest.raises(UsageError, match="resnet20 on cifar100"):
        find("paper", Subspace, "resnet20", "cifar100")
    result = call("train-fge", "--recipe", "paper")
    assert result.exit_code == 1
    assert "preresnet164 on cifar10 or cifar100 (Garipov et al. 2018" in result.stderr
    assert call("train-fge", "--recipe", "slow").exit_code == 2


TOY = """
from ensembler.trainers import Method

class Toy(Method):
    \"\"\"A method that nobody has published a recipe of.\"\"\"

    command = "train-toy"

    def train(self, trainer):
        raise AssertionError("it is refused before anything is trained")
"""


def test_a_method_without_a_recipe_says_so_in_one_sentence(tmp_path):
    found = call_with_method(TOY, tmp_path, *(["train-toy", "--recipe", recipe] for recipe in ("fast", "paper")))
    for (code, _, errors), kind in zip(found, ("fast", "published"), strict=True):
        message = f"error: train-toy has no {kind} recipe: leave out --recipe, and give its options\n"
        assert (code, errors) == (1, message)


def test_the_command_line_wins_over_a_file_and_a_file_over_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ["--arch", "tests._small:network", "--image-size", 8, "--device", "cpu", "--quiet"]
    Path("a.toml").write_text("recipe = 'fast'\nepochs = 1\nvertices = 4\n")
    arguments = ["train-simplex", "--config", "a.toml", "--vertices", 2, *shared, "--out", "run"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    manifest = Run.load("run").manifest
    assert (manifest.options["vertices"], manifest.options["vertex_epochs"]) == (2, 3)  # typed, recipe
    assert manifest.settings["epochs"] == 1  # file
    assert manifest.options["vertex_lr"] == 0.1
    # The network and the images are those of the run to begin from.
    result = call("train-fge", "--recipe", "paper", "--init", "run")
    assert "was published for tests._small:network on digits" in result.stderr
