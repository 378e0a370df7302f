"""Detection scores against pairs counted by hand, and images that are what they say."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ensembler.errors import DataError, ShapeError, UsageError
from ensembler.eval import evaluate
from ensembler.eval.metrics.ood import DETECTORS, detector_scores, detectors, ood_scores
from ensembler.eval.shift.ood import NOISES, load_ood, noise_images
from ensembler.uncertainty import mutual_information, predictive_entropy

# --- scores ---------------------------------------------------------------------------------------------------------


def slow_auroc(inside, outside) -> float:
    pairs = [1.0 if o > i else 0.5 if o == i else 0.0 for i in inside for o in outside]
    return sum(pairs) / len(pairs)


def slow_average_precision(positive, negative) -> float:
    """The sum over thresholds, from the highest down, of precision times what recall gains there."""
    total, before = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        true = sum(value >= threshold for value in positive)
        false = sum(value >= threshold for value in negative)
        total += (true / len(positive) - before) * true / (true + false)
        before = true / len(positive)
    return total


def slow_fpr(inside, outside) -> float:
    for threshold in sorted({*inside, *outside}, reverse=True):
        if 100 * sum(value >= threshold for value in outside) >= 95 * len(outside):
            return sum(value >= threshold for value in inside) / len(inside)
    raise AssertionError


def check_against_pairs(inside, outside) -> None:
    found = ood_scores(np.array(inside), np.ones(len(inside), bool), np.array(outside))
    assert found.auroc == pytest.approx(slow_auroc(inside, outside), abs=1e-12)
    assert found.aupr_out == pytest.approx(slow_average_precision(outside, inside), abs=1e-12)
    turned = [-value for value in inside], [-value for value in outside]
    assert found.aupr_in == pytest.approx(slow_average_precision(*turned), abs=1e-12)
    assert found.fpr_at_95 == pytest.approx(slow_fpr(inside, outside), abs=1e-12)
    assert (found.examples_in, found.examples_out) == (len(inside), len(outside))


values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 3, width=32), min_size=1, max_size=40)


@given(values, values)
@settings(max_examples=100, deadline=None)
def test_scores_equal_pairs_counted_by_hand(inside, outside) -> None:
    check_against_pairs(inside, outside)


def test_scores_of_many_examples() -> None:
    rng = np.random.default_rng(0)
    check_against_pairs(rng.normal(0, 1, 120).tolist(), rng.normal(1, 1, 100).tolist())


def test_false_positives_are_images_in_distribution() -> None:
    # 19 of the 20 images out of it lie at 10 or above: there the threshold flags 3 of the 10 in it.
    inside = np.array([0, 1, 2, 3, 4, 5, 6, 11, 12, 13.0])
    outside = np.array([0.5, *range(10, 29)])
    assert ood_scores(inside, inside < 99, outside).fpr_at_95 == 0.3
    # 18 of 20 are not enough: the threshold falls to 0.5.
    outside[1] = 0.75
    assert ood_scores(inside, inside < 99, outside).fpr_at_95 == 0.9


def test_a_perfect_detector_and_a_blind_one() -> None:
    perfect = ood_scores(np.zeros(5), np.arange(5) < 5, np.ones(3))
    assert perfect.model_dump() == {
        "auroc": 1, "aupr_out": 1, "aupr_in": 1, "fpr_at_95": 0, "scod_aurc": pytest.approx((1/6 + 2/7 + 3/8) / 16),
        "examples_in": 5, "examples_out": 3
    }  # fmt: skip
    blind = ood_scores(np.ones(5), np.arange(5) < 5, np.ones(3))
    assert (blind.auroc, blind.aupr_out, blind.aupr_in, blind.fpr_at_95) == (0.5, 3 / 8, 5 / 8, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"at least one, found float64 \(0,\)"),
        ([[0.5]], r"found float64 \(1, 1\)"),
        ([math.nan, 1.0], "with NaN or infinity"),
        ([math.inf], "with NaN or infinity"),
        (["high"], "must be one finite number"),
    ],
)
def test_bad_values_are_refused(bad, message: str) -> None:
    with pytest.raises(ShapeError, match=f"uncertainty_in .*{message}"):
        ood_scores(np.array(bad), np.ones(len(bad), bool), np.ones(2))
    with pytest.raises(ShapeError, match="uncertainty_out"):
        ood_scores(np.ones(2), np.ones(2, bool), np.array(bad))


# --- detectors ------------------------------------------------------------------------------------------------------


def test_detectors_are_the_uncertainty_modules() -> None:
    members = np.random.default_rng(0).dirichlet(np.ones(4), (3, 20)).astype(np.float32)
    mean = members.mean(axis=0, dtype=np.float64)
    found = detectors(mean, mutual_information(members))
    assert tuple(found) == DETECTORS
    np.testing.assert_allclose(found["predictive_entropy"], predictive_entropy(members), rtol=1e-12)
    np.testing.assert_allclose(found["mutual_information"], mutual_information(members), atol=1e-12)
    np.testing.assert_allclose(found["one_minus_max"], [1 - max(row) for row in mean], rtol=1e-12)


def test_one_member_has_no_mutual_information() -> None:
    sure, unsure = np.array([[1.0, 0.0], [0.9, 0.1]]), np.array([[0.5, 0.5]])
    found = detector_scores(detectors(sure, None), np.array([True, False]), detectors(unsure, None))
    assert found["mutual_information"] is None
    assert found["predictive_entropy"].auroc == found["one_minus_max"].auroc == 1


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("members", [2, 3, 7])
def test_members_that_agree_have_exactly_no_mutual_information(members: int, kind: type) -> None:
    """Its rounding error follows the entropy, and would pass for a detector (AUROC 0.63)."""
    inside, outside = (np.random.default_rng(0).dirichlet(np.full(9, a), 200).astype(kind) for a in (0.1, 1.0))
    alike = {"probabilities": np.stack([inside] * members), "ood_probabilities": np.stack([outside] * members)}
    (run,) = evaluate(alike, np.zeros(200, int)).runs
    assert run.clean.mutual_information == 0.0
    assert run.ood["ood"]["mutual_information"].auroc == 0.5
    assert run.ood["ood"]["predictive_entropy"].auroc > 0.9


def test_log_probabilities_have_no_energy() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 30, 4)) * 5
    logs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    labels = np.zeros(30, int)
    for kind in (np.float16, np.float32, np.float64):
        for array, known in ((logs, False), (logits, True)):
            arrays = {"logits": array.astype(kind), "labels": labels, "ood_logits": array[:, ::-1].astype(kind)}
            found = evaluate(arrays).runs[0].ood["ood"]
            assert [found[name] is not None for name in ("energy", "max_logit")] == [known, known]


def test_a_single_probability() -> None:
    assert detectors(np.array([[1.0005, 0.0]]), None)["one_minus_max"] == [0.0]


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISES)
def test_noise_depends_on_its_place_alone(kind: str) -> None:
    images = noise_images(kind, 12, (6, 5), seed=3)
    assert images.dtype == torch.uint8
    assert images.shape == (12, 6, 5, 3)
    assert torch.equal(noise_images(kind, 4, (6, 5), seed=3), images[:4])
    assert not torch.equal(noise_images(kind, 12, (6, 5), seed=4), images)
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_noise_has_the_law_that_it_says() -> None:
    gaussian = noise_images("gaussian", 40, (32, 32)).double() / 255
    # Of N(0.5, 1), Phi(-0.5) = 30.85 % lies below 0, as much above 1.
    assert (gaussian == 0).double().mean().item() == pytest.approx(0.3085 + 0.00069, abs=0.005)
    assert (gaussian == 1).double().mean().item() == pytest.approx(0.3085 + 0.00069, abs=0.005)
    assert gaussian.mean().item() == pytest.approx(0.5, abs=0.005)
    uniform = noise_images("uniform", 40, (32, 32))
    counts = torch.bincount(uniform.flatten().long(), minlength=256).double() * 256 / uniform.numel()
    assert counts.min() > 0.75
    assert counts.max() < 1.25
    constant = noise_images("constant", 200, (4, 4))
    assert torch.equal(constant, constant[:, :1, :1].expand_as(constant))
    assert constant[:, 0, 0].double().mean().item() == pytest.approx(127.5, abs=12)


def test_noise_by_name() -> None:
    found = load_ood("noise:uniform", (8, 8), examples=7, seed=5)
    assert found.source == "generated"
    assert found.title == "uniform noise (generated, seed 5)"
    assert (found.group, found.labels) == ("ood", None)
    assert torch.equal(found.examples.images, noise_images("uniform", 7, (8, 8), seed=5))


def paint(path, colour: int, size=(8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour,) * 3).save(path)


def test_a_plain_folder_of_images(tmp_path) -> None:
    for number in range(6):
        paint(tmp_path / f"{number}.png", 40 * number, size=(8 + number, 12))
    (tmp_path / "notes.txt").write_text("no image")
    found = load_ood(f"folder:{tmp_path}", (6, 10))
    assert found.source == "folder"
    assert found.title == f"images of {tmp_path.name}"
    assert found.examples.images.shape == (6, 6, 10, 3)
    assert found.examples.images[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    some = load_ood(f"folder:{tmp_path}", (6, 10), examples=3, seed=1)
    assert len(some.examples.images) == 3
    assert torch.equal(
        some.examples.images, load_ood(f"folder:{tmp_path}", (6, 10), examples=3, seed=1).examples.images
    )
    assert set(some.examples.images[:, 0, 0, 0].tolist()) < {0, 40, 80, 120, 160, 200}


def test_a_folder_by_class_and_one_that_is_split(tmp_path) -> None:
    paint(tmp_path / "train" / "a" / "0.png", 10)
    paint(tmp_path / "test" / "a" / "0.png", 20)
    paint(tmp_path / "test" / "b" / "0.png", 30)
    assert load_ood(f"folder:{tmp_path}", (8, 8)).examples.images[:, 0, 0, 0].tolist() == [20, 30]
    shutil.rmtree(tmp_path / "train")
    assert load_ood(f"folder:{tmp_path / 'test'}", (8, 8)).examples.images[:, 0, 0, 0].tolist() == [20, 30]


def test_a_named_datasets_test_images() -> None:
    whole = load_ood("digits", (32, 32))
    assert whole.source == "dataset"
    assert whole.title == "digits (scikit-learn, 32 x 32), test images"
    assert whole.examples.images.shape == (360, 32, 32, 3)
    small = load_ood("digits", (16, 20), examples=5)
    assert small.examples.images.shape == (5, 16, 20, 3)
    assert small.examples.images.is_contiguous()
    assert small.examples.images.double().mean().item() == pytest.approx(
        whole.examples.images.double().mean().item(), rel=0.2
    )


def test_bad_images_are_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="unknown noise 'pink': use one of gaussian, uniform, constant"):
        load_ood("noise:pink", (8, 8))
    with pytest.raises(UsageError, match="at least 1 image of at least 1 x 1 pixels"):
        noise_images("uniform", 0, (8, 8))
    with pytest.raises(UsageError, match="at least 1 example"):
        load_ood("digits", (8, 8), examples=0)
    with pytest.raises(UsageError, match="unknown dataset 'nothing'"):
        load_ood("nothing", (8, 8))
    with pytest.raises(DataError, match="no folder of images at"):
        load_ood(f"folder:{tmp_path / 'none'}", (8, 8))
    with pytest.raises(DataError, match="holds no image"):
        load_ood(f"folder:{tmp_path}", (8, 8))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*broken\.png"):
        load_ood(f"folder:{tmp_path}", (8, 8))
    with pytest.raises(DataError, match=r"none of the 1 images in .* can be read: repair or remove them"):
        load_ood(f"folder:{tmp_path}", (8, 8), corrupt="skip")
    paint(tmp_path / "fine.png", 10)
    paint(tmp_path / ".ipynb_checkpoints" / "fine.png", 10)
    found = load_ood(f"folder:{tmp_path}", (8, 8), corrupt="skip")
    assert found.title == f"images of {tmp_path.name} (1 unreadable left out)"
    assert found.examples.images[:, 0, 0, 0].tolist() == [10]
