"""Mixup and CutMix: by hand, a function of seed, part and epoch, and the loss of a mixed step."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ensembler.errors import UsageError
from ensembler.seeds import derive
from ensembler.trainers import DeepEnsemble, train
from ensembler.trainers.batches import Batch, Batches
from ensembler.trainers.mixing import Mixing
from ensembler.trainers.plan import Plan
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights
from tests import _training
from tests._small import dataset, network
from tests._training import Given, make, same
from tests.test_task import rows, settings

CPU = torch.device("cpu")


def batches(mixing, step=0, count=8, seed=0, size=8):
    data = dataset(train=20)
    given = Batches(data.train, size, "none", data.mean, data.std, (seed, "x"), CPU, mixing=mixing)
    with closing(given.begin(step)) as stream:
        return list(islice(stream, count))


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0), Mixing(0.4, 1.0)], ids=str)
def test_a_mixed_batch_is_the_plain_one_and_its_partners_by_their_share(mixing):
    kinds = set()
    for number, (plain, mixed) in enumerate(zip(batches(None), batches(mixing), strict=True)):
        epoch, n = divmod(number, 3)
        drawn = mixing.draw([8, 8, 4], (8, 8, 3), derive(0, "x", "mixing", epoch))
        partners, share, box = drawn.partners[n], drawn.shares[n], drawn.boxes[n]
        assert sorted(partners.tolist()) == list(range(len(plain.y)))
        assert torch.equal(mixed.y, plain.y) and torch.equal(mixed.other_y, plain.y[partners])
        kinds.add(box is not None)
        if box is None:
            expected = share * plain.x + (1 - share) * plain.x[partners]
        else:
            expected = plain.x.clone()
            expected[:, :, box[0], box[1]] = plain.x[partners][:, :, box[0], box[1]]
            pixels = torch.zeros(8, 8)
            pixels[box] = 1
            assert share.item() == pytest.approx(1 - pixels.mean().item())
        torch.testing.assert_close(mixed.x, expected)
        assert mixed.share == share
    assert kinds == {kind for kind, alpha in ((False, mixing.mixup), (True, mixing.cutmix)) if alpha}


def test_shares_are_of_their_distribution():
    """The mean and the variance of Beta(a, a) are 1/2 and 1 / (8 a + 4); a box has its share but for the edges."""
    for alpha in (0.2, 1.0, 4.0):
        shares = Mixing(mixup=alpha).draw([2] * 4000, (32, 32, 3), 0).shares
        assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
        assert shares.var().item() == pytest.approx(1 / (8 * alpha + 4), rel=0.1)
    cut = Mixing(cutmix=1.0).draw([2] * 4000, (32, 32, 3), 0).shares
    assert 0.5 < cut.mean().item() < 0.75
    assert cut.min().item() >= 0 and cut.max().item() <= 1


def test_a_stream_begun_at_a_step_is_mixed_as_the_whole():
    whole = batches(Mixing(0.4, 1.0), count=9)
    for step in (1, 3, 5):
        for one, other in zip(whole[step:], batches(Mixing(0.4, 1.0), step, 9 - step), strict=True):
            assert torch.equal(one.x, other.x) and torch.equal(one.other_y, other.other_y) and one.share == other.share
    assert not torch.equal(whole[0].x, batches(Mixing(0.4, 1.0), seed=1)[0].x)


def test_a_step_is_that_of_both_losses_by_their_share():
    """One plain step at the rate 1 is minus the gradient; the two points of it get the halves of the batch."""
    torch.manual_seed(0)
    x, y, other_y, share = torch.randn(6, 3, 8, 8), torch.arange(6) % 3, torch.arange(6).flip(0) % 3, torch.tensor(0.3)

    class Mixed(Given):
        def begin(self, step=0):
            yield Batch(x, y, 6, other_y, share)

    weights = FlatWeights(network(3))
    vertices = weights.vector.clone()[None]
    module = network(3)
    torch.nn.utils.vector_to_parameters(vertices[0], module.parameters())
    outputs = module(x)
    (0.3 * cross_entropy(outputs, y) + 0.7 * cross_entropy(outputs, other_y)).backward()
    gradient = torch.nn.utils.parameters_to_vector([parameter.grad for parameter in module.parameters()])
    epochs, expected = [], vertices[0] - gradient

    def note(epoch, best):
        epochs.append(epoch)

    for samples in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_training, "Given", Mixed)
            plan = Plan(constant(1.0), 1, samples=samples)
            own = vertices.clone()
            fitted = _training.fit(weights, own, [(x, y)], plan, _training.plain, on_epoch=note)
        torch.testing.assert_close(fitted.vertices[0], expected)
    assert [epoch.metric for epoch in epochs] == [None, None]


def test_training_is_mixed_and_again_the_same():
    runs = [make(DeepEnsemble(members=1), **own) for own in ({}, {"mixup": 0.4}, {"mixup": 0.4}, {"cutmix": 1.0})]
    assert same(runs[1], runs[2])
    assert not same(runs[0], runs[1]) and not same(runs[0], runs[3])
    assert [run.manifest.cost.example_passes for run in runs] == [60] * 4


def test_cutmix_takes_images_only():
    with pytest.raises(UsageError, match=r"--cutmix takes images, and these examples are .*: use --mixup"):
        train(rows(), DeepEnsemble(members=1), settings(cutmix=1.0))
    mixed, plain = (train(rows(), DeepEnsemble(members=1), settings(mixup=alpha)) for alpha in (1.0, 0.0))
    assert not same(mixed, plain)
    assert all(np.isfinite(line["loss"]) for line in mixed.history)
