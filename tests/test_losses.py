"""The training loss: by hand, what it must not touch, what is refused, and a run whose own loss is gone."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ensembler import load_dataset
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.naming import import_object, name_of, register
from ensembler.run import Run
from ensembler.trainers import DeepEnsemble, Settings, Simplex
from ensembler.trainers.losses import training_loss
from ensembler.trainers.training import collapse_run
from tests._evaluate import evaluate
from tests._small import dataset
from tests._training import call, make, same
from tests.test_task import Toy

CPU = torch.device("cpu")
ONE = DeepEnsemble(members=1)


def uneven(counts=(12, 6, 2)):
    """The small dataset with so many training examples of each class."""
    data = dataset(train=3 * max(counts))
    kept = torch.cat([torch.where(data.train.labels == c)[0][:count] for c, count in enumerate(counts)])
    return replace(data, train=data.train[kept])


def focal(outputs, targets, gamma=2.0):
    nll = cross_entropy(outputs, targets, reduction="none")
    return (1 - (-nll).exp()) ** gamma * nll


def focal_mean(outputs, targets):
    return focal(outputs, targets).mean()


def losses(data=None, **settings):
    return training_loss(Settings(**settings), data or uneven(), CPU)


def some(count=7, classes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, classes, generator=generator), torch.arange(count) % classes


def test_label_smoothing_and_class_weights_are_as_written():
    outputs, y = some()
    log = outputs.log_softmax(1)
    smoothed = torch.tensor([-(0.7 * row[c] + 0.3 / 3 * row.sum()) for row, c in zip(log, y, strict=True)])
    torch.testing.assert_close(losses(label_smoothing=0.3)(outputs, y), smoothed)
    weights = torch.tensor([20 / (3 * count) for count in (12, 6, 2)])  # as scikit-learn's "balanced"
    plain = -log[torch.arange(7), y]
    torch.testing.assert_close(losses(class_weights="balanced")(outputs, y), weights[y] * plain)
    both = losses(class_weights="balanced", label_smoothing=0.3)(outputs, y)
    torch.testing.assert_close(both, cross_entropy(outputs, y, weights, reduction="none", label_smoothing=0.3))


def test_class_weights_have_a_mean_of_one_over_the_training_examples():
    data = uneven()
    found = losses(data, class_weights=[1, 10, 100])(torch.zeros(20, 3), data.train.labels) / math.log(3)
    assert found.mean() == pytest.approx(1)
    assert found[-1] / found[0] == pytest.approx(100)


def test_class_weights_may_be_written_in_many_ways(tmp_path):
    (tmp_path / "lines.txt").write_text("1\n2.5\n3\n")
    (tmp_path / "list.json").write_text("[1, 2.5, 3.0]")
    numbers = [1.0, 2.5, 3.0]
    given = [numbers, tuple(numbers), np.array(numbers), torch.tensor(numbers), "1.0,2.5,3.0"]
    assert {Settings(class_weights=each).class_weights for each in given} == {"1.0,2.5,3.0"}
    outputs, y = some()
    for each in (tmp_path / "lines.txt", str(tmp_path / "list.json")):
        assert str(tmp_path) not in Settings(class_weights=each).class_weights, "the fingerprint is of the numbers"
        assert torch.equal(losses(class_weights=each)(outputs, y), losses(class_weights=numbers)(outputs, y))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"class_weights": "1,2"}, "--class-weights has 2 numbers, and there are 3 classes: one each"),
        ({"class_weights": "1,x,2"}, "'1,x,2' is neither balanced nor none, nor numbers"),
        ({"class_weights": ["1", [2], 3]}, "is neither balanced nor none, nor numbers"),
        ({"class_weights": "balance"}, "'balance' is neither balanced nor none"),
        ({"class_weights": "absent.txt"}, "'absent.txt' is neither balanced nor none"),
        ({"class_weights": [1, -1, 1]}, "must be finite, none negative"),
        ({"class_weights": [1, math.nan, 1]}, "must be finite, none negative"),
        ({"class_weights": [0, 0, 0]}, "positive for a class with training images"),
        ({"label_smoothing": 1.0}, "label_smoothing must be below 1, not 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0, not -0.1"),
        ({"mixup": -1}, "mixup must be at least 0, not -1"),
        ({"loss": focal, "label_smoothing": 0.1}, "--label-smoothing is part of cross entropy, which --loss"),
        ({"loss": focal, "class_weights": "balanced"}, "--class-weights is part of cross entropy, which --loss"),
        ({"mixup": 1.0, "batch_size": 1}, "--mixup mixes the images of a batch, which has one"),
    ],
)
def test_options_that_cannot_be(settings, sentence):
    with pytest.raises(UsageError) as caught:
        make(ONE, **settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_balanced_weights_need_examples_of_every_class():
    with pytest.raises(UsageError, match="there are none of class 1: give --class-weights a number for each class"):
        losses(uneven((12, 0, 2)), class_weights="balanced")


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"class_weights": "1,2,3"}])
def test_another_task_has_another_loss(option):
    data = replace(dataset(), task=f"{Toy.__module__}:{Toy.__qualname__}")
    with pytest.raises(UsageError, match=r"is part of cross entropy, which is not the loss of the task tests\.test"):
        losses(data, **option)


def test_scores_and_measurements_are_of_the_plain_loss():
    """Smoothing of 0.9 and weights that forget two classes would be seen in each."""
    data = dataset()
    run = make(
        Simplex(vertices=2, vertex_epochs=1, members=2), data, label_smoothing=0.9, class_weights="1,0,0", mixup=1.0
    )
    ensemble = Ensemble(run)
    for split in ("validation", "test"):
        own = getattr(data, split)
        probabilities = torch.as_tensor(ensemble.predict_proba(own.images))
        nll = -probabilities[torch.arange(len(own)), own.labels].log().mean()
        assert run.manifest.metrics[split]["nll"] == pytest.approx(nll.item(), rel=1e-5)
    (simplex,) = run.manifest.metrics["simplexes"]
    vertices = torch.stack([ensemble.predict_members(data.train.images)[0]])
    nll = -vertices[0, torch.arange(len(data.train)), data.train.labels].log().mean()
    measured = simplex["train_loss"]["vertices"]
    assert abs(measured - nll.item()) < 0.2
    assert all("accuracy" not in line for line in run.history), "mixed examples have no one target"
    plain = make(ONE, data, class_weights="1,1,1")
    assert same(plain, make(ONE, data)), "equal weights change nothing"
    assert all("accuracy" in line for line in plain.history)
    assert not same(make(ONE, data, label_smoothing=0.1), plain)


def test_a_loss_of_ones_own_by_example_or_by_mean_trains_alike():
    by_example, by_mean, named = (make(ONE, loss=loss) for loss in (focal, focal_mean, "tests.test_losses:focal"))
    assert same(by_example, named)
    assert by_example.manifest.settings["loss"] == "tests.test_losses:focal"
    assert by_example.manifest.fingerprint == named.manifest.fingerprint != by_mean.manifest.fingerprint
    for name, tensor in by_example.vertices.items():
        torch.testing.assert_close(by_mean.vertices[name], tensor, rtol=0, atol=1e-5)
    assert not same(by_example, make(ONE))


def test_a_module_is_a_loss():
    found = make(ONE, loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    expected = make(ONE, label_smoothing=0.2)
    for name, tensor in expected.vertices.items():
        torch.testing.assert_close(found.vertices[name], tensor, rtol=0, atol=1e-5)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return cross_entropy(self.scale * outputs, targets)


def in_place(outputs, targets):
    outputs -= outputs.mean(1, keepdim=True)
    return cross_entropy(outputs, targets)


def relabelling(outputs, targets):
    found = cross_entropy(outputs, targets)
    targets.zero_()
    return found


def failing(outputs, targets):
    raise KeyError("margin")


FAULTS = {
    "by class": (
        lambda o, y: cross_entropy(o, y, reduction="none")[:, None] * o,
        "returns (4, 3), expected a loss of each example",
    ),
    "a column": (
        lambda o, y: cross_entropy(o, y, reduction="none")[:, None],
        "returns (4, 1), expected a loss of each example",
    ),
    "a number": (lambda o, y: cross_entropy(o, y).item(), "returns a float, expected a tensor: leave out item()"),
    "nothing": (lambda o, y: None, "returns a NoneType, expected a tensor"),
    "whole": (lambda o, y: o.argmax(1) != y, "returns bool, expected float32"),
    "not finite": (lambda o, y: cross_entropy(o, y, reduction="none") / (y - y), "it must be finite"),
    "detached": (lambda o, y: cross_entropy(o.detach(), y), "returns a loss without a gradient: leave out detach()"),
    "of others": (lambda o, y: torch.ones(4, requires_grad=True) * 2, "has no gradient in the outputs"),
    "root of zero": (lambda o, y: (o - o).sum(1).sqrt() + cross_entropy(o, y), "has a gradient that is not finite"),
    "sum": (lambda o, y: cross_entropy(o, y, reduction="sum"), "returns a sum over the examples: return their mean"),
    "raises": (failing, "fails: KeyError: 'margin' (test_losses.py, line"),
    "in place": (in_place, "changes them in place"),
    "relabels": (relabelling, "changes them in place"),
    "its own weights": (Learned(), "has weights of its own (scale), which would not be trained"),
    "class": (nn.CrossEntropyLoss, "is the class CrossEntropyLoss, expected a function"),
    "one argument": (lambda o: o.mean(), "fails: TypeError"),
    "absent": ("tests.test_losses:absent", "cannot import the loss 'tests.test_losses:absent'"),
    "no name": ("focal", "cannot import the loss 'focal'"),
    "not callable": ("tests.test_losses:FAULTS", "is a dict, expected a function"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_that_training_cannot_use_is_one_sentence(fault, monkeypatch):
    monkeypatch.setattr("ensembler.trainers.loop.fit", lambda *_, **__: pytest.fail("trained"))
    loss, sentence = FAULTS[fault]
    with pytest.raises(UsageError) as caught:
        make(ONE, loss=loss)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_whose_own_code_is_gone_is_evaluated_exported_and_answered(tmp_path, monkeypatch):
    """Its loss and its transform; only the statistics of BatchNorm at a new point need the transform."""
    from ensembler.serve import Runtime, export_run

    (tmp_path / "passing.py").write_text(
        "from tests.test_losses import focal as loss\nfrom tests.test_augmentation import noisy as transform\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"loss": "passing:loss", "augmentation": "passing:transform", "architecture": "tests._small:batchnorm"}
    path = make(DeepEnsemble(members=2), **own).save(tmp_path / "run")
    (tmp_path / "passing.py").unlink()
    sys.modules.pop("passing")
    images = dataset().test.images
    expected = Ensemble.load(path).predict_proba(images)
    export_run(path, tmp_path / "bundle", use_data=False)
    found = Runtime.load(tmp_path / "bundle").predict_members(images.numpy()).mean(axis=0)
    assert abs(torch.as_tensor(found) - torch.as_tensor(expected)).max() < 1e-5
    with pytest.raises(UsageError, match="cannot import the augmentation 'passing:transform'"):
        collapse_run(Run.load(path), dataset())
    with pytest.raises(UsageError, match="cannot import the loss 'passing:loss'"):
        make(ONE, loss="passing:loss")
    alone = make(ONE, loss=focal)
    alone.manifest.settings["loss"] = "passing:loss"
    assert len(collapse_run(alone, dataset()).coefficients) == 1


def test_smoothed_mixed_and_augmented_is_trained_evaluated_under_shift_exported_and_answered(tmp_path, monkeypatch):
    from ensembler.serve import Runtime, export_run

    monkeypatch.chdir(tmp_path)
    own = ["--label-smoothing", 0.1, "--mixup", 0.2, "--class-weights", "balanced", "--augmentation", "trivialaugment"]
    given = ["--arch", "tests._small:network", "--image-size", 8, "--epochs", 1, "--members", 2, "--device", "cpu"]
    result = call("train-deep-ensemble", *given, *own, "--out", "run")
    assert result.exit_code == 0, result.output
    assert ", loss " in result.stderr, result.stderr
    assert result.stderr.count("accuracy") == result.stderr.count("held-out"), "of mixed images there is none"
    manifest = Run.load(tmp_path / "run").manifest
    (found,) = evaluate([tmp_path / "run"], "corruptions", examples=6, device="cpu").runs
    assert np.isfinite(found.shifted.nll).all()
    history = [line for line in Run.load(tmp_path / "run").history if line["part"]]
    assert history and all("accuracy" not in line for line in history)
    export_run(tmp_path / "run", tmp_path / "bundle", use_data=False)
    images = load_dataset("digits", image_size=8).test.images
    ensemble = Ensemble.load(tmp_path / "run")
    expected = torch.as_tensor(ensemble.predict_proba(images))
    answers = torch.as_tensor(Runtime.load(tmp_path / "bundle").predict_members(images.numpy())).mean(0)
    assert (answers - expected).abs().max() < 1e-5
    labels = load_dataset("digits", image_size=8).test.labels
    nll = -expected[torch.arange(len(labels)), labels].log().mean().item()
    assert manifest.metrics["test"]["nll"] == pytest.approx(nll, rel=1e-4), "scores are of the plain loss"


def test_what_can_be_imported_has_its_public_name():
    """Not that of the private module in which a library has it today."""
    for value, name in (
        (torch.optim.AdamW, "torch.optim:AdamW"),
        (cross_entropy, "torch.nn.functional:cross_entropy"),
        (nn.Linear, "torch.nn:Linear"),
        (failing, "tests.test_losses:failing"),
    ):
        assert name_of(value) == register(value) == name and import_object(name, "object") is value
    assert Settings(optimiser=torch.optim.RAdam).optimiser == "torch.optim:RAdam"


def test_a_function_that_cannot_be_imported_has_a_name_of_what_it_computes():
    def scaled(by):
        return lambda outputs, targets: by * cross_entropy(outputs, targets)

    two, again, three = (register(scaled(by)) for by in (2.0, 2.0, 3.0))
    assert two == again != three
    assert two.startswith("__main__:") and "#" in two
    assert import_object(three, "loss")(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)) == 3 * math.log(2)
    with pytest.raises(UsageError, match=r"the loss focal#0123 was defined in a notebook or script, .*: pass it from"):
        import_object("__main__:focal#0123", "loss")
    hooks = [nn.CrossEntropyLoss(weight=torch.tensor(weight)) for weight in ([1.0, 2.0], [1.0, 3.0])]
    assert register(hooks[0]) != register(hooks[1])


def test_a_command_takes_them_and_another_is_made_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--arch", "tests._small:network", "--epochs", 0.1, "--members", 1, "--image-size", 8, "--quiet"]
    own = ["--label-smoothing", 0.1, "--class-weights", "balanced", "--mixup", 0.2, "--cutmix", 1]
    for arguments, name in ((given + own, "one"), (["--config", "one", "--quiet"], "two")):
        result = call("train-deep-ensemble", *arguments, "--out", name)
        assert result.exit_code == 0, result.output
    one, two = (Run.load(tmp_path / name) for name in ("one", "two"))
    assert same(one, two) and one.manifest.fingerprint == two.manifest.fingerprint
    written = {key: one.manifest.settings[key] for key in ("label_smoothing", "class_weights", "mixup", "cutmix")}
    assert written == {"label_smoothing": 0.1, "class_weights": "balanced", "mixup": 0.2, "cutmix": 1.0}
    result = call("train-deep-ensemble", *given, "--loss", "tests.test_losses:failing", "--out", "three")
    assert result.exit_code == 1 and "fails: KeyError: 'margin'" in result.stderr
    assert not [path for path in tmp_path.iterdir() if "three" in path.name]
