"""Maps against netcal's own, quantiles and certificates against brute force, files against tampering."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from ensembler.calibration import (
    FILE,
    Abstention,
    Calibration,
    Conformal,
    abstain,
    apply,
    conformal_quantile,
    conformal_scores,
    load,
    prediction_sets,
    read,
    save,
)
from ensembler.calibration_maps import Histogram, Temperature, temper
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, CorruptError, ShapeError, UsageError
from ensembler.eval.calibrate import summary
from ensembler.eval.metrics.classification import nll, scores
from ensembler.eval.metrics.recalibration import METHODS, certify, fit_map
from ensembler.seeds import derive
from ensembler.trainers import DeepEnsemble, Settings, train
from tests._evaluate import calibrate, fit
from tests._small import SETTINGS, dataset

ORIGIN: dict[str, str] = {"run_sha256": "0" * 64, "dataset": "made by hand", "validation_sha256": "1" * 64}


def sample(count: int, classes: int, seed: int = 0, sharpen: float = 1.7) -> tuple[Any, Any]:
    """Predictions that are too sure: labels drawn from p, and p ** 1.7 given out."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.5), count)
    labels = (probs.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1).clip(0, classes - 1)
    return temper(probs, 1 / sharpen), labels


# --- maps -----------------------------------------------------------------------------------------------------------


def netcal_model(method: str) -> Any:
    from netcal.binning import HistogramBinning, IsotonicRegression
    from netcal.scaling import BetaCalibration

    return {"isotonic": IsotonicRegression, "beta": BetaCalibration, "histogram": lambda: HistogramBinning(15)}[
        method
    ]()


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("method", ["isotonic", "beta", "histogram"])
def test_maps_equal_netcal(method, classes):
    probs, labels = sample(400, classes)
    mapping = fit_map(probs, labels, method)
    mapping = type(mapping).model_validate_json(mapping.model_dump_json())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = netcal_model(method)
        model.fit(probs, labels, **({"tensorboard": False} if method == "beta" else {}))
        other, _ = sample(500, classes, seed=1, sharpen=4.0)
        edges = np.linspace(0, 1, 16)
        corners = np.stack([edges, *[(1 - edges) / (classes - 1)] * (classes - 1)], axis=1)
        for new in (probs, other, corners, np.eye(classes)):
            with np.errstate(invalid="ignore"):
                expected = model.transform(new)
            if classes == 2:
                expected = np.stack([1 - expected, expected], axis=1)
            found = mapping(new)
            np.testing.assert_allclose(found.sum(axis=1), 1)
            unclaimed = np.isnan(expected).any(axis=1)  # netcal divides by a sum of 0: the row stays as it was
            np.testing.assert_allclose(found[~unclaimed], expected[~unclaimed], atol=1e-6)
            np.testing.assert_array_equal(found[unclaimed], new[unclaimed])


@pytest.mark.parametrize("members", [3, 5, 15])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_histogram_of_votes_is_read_where_it_was_fitted(members, classes):
    """Shares of members lie on the bins' edges: each must be mapped to its own images' frequency."""
    rng = np.random.default_rng(0)
    votes = rng.multinomial(members, [1 / classes] * classes, 300)
    labels = np.array([rng.choice(classes, p=row / members) for row in votes])
    found = fit_map(votes / members, labels, "histogram")
    places = np.maximum(-(-votes * 15 // members), 1) - 1  # of ((b - 1) / 15, b / 15], in whole numbers
    for c, row in zip(range(classes)[-len(found.y) :], found.y, strict=True):
        for place in range(15):
            own = labels[places[:, c] == place] == c
            assert row[place] == pytest.approx(own.mean() if len(own) else (place + 0.5) / 15)


def test_a_row_that_no_class_claims_stays():
    mapping = Histogram(y=[[0.0, 1.0], [0.0, 0.5], [0.0, 0.5]])
    np.testing.assert_allclose(mapping(np.array([[0.4, 0.3, 0.3], [0.9, 0.1, 0.0]])), [[0.4, 0.3, 0.3], [1, 0, 0]])
    np.testing.assert_allclose(mapping(np.array([[0.5, 0.5, 0.0]])), [[0.5, 0.5, 0.0]])  # left-open


@pytest.mark.parametrize("method", METHODS)
def test_maps_mend_what_is_too_sure(method):
    probs, labels = sample(4000, 4)
    new, new_labels = sample(4000, 4, seed=9)
    mapping = fit_map(probs, labels, method)
    assert nll(mapping(new), new_labels) < nll(new, new_labels) - 0.03
    assert scores(mapping(new), new_labels)["ece"] < 0.5 * scores(new, new_labels)["ece"]


def test_what_a_map_cannot_be_fitted_to_is_refused():
    probs, labels = sample(50, 3)
    for method in ("isotonic", "beta", "histogram"):
        with pytest.raises(UsageError, match=f"{method} needs examples of every class, and of class 1 there is none"):
            fit_map(probs, np.where(labels == 1, 0, labels), method)
        with pytest.raises(UsageError, match="two classes or more, found one: use --method temperature"):
            fit_map(np.ones((4, 1)), np.zeros(4, int), method)
    with pytest.raises(UsageError, match="unknown method 'platt': use one of temperature, isotonic"):
        fit_map(probs, labels, "platt")
    with pytest.raises(ShapeError, match="is no distribution"):
        fit_map(2 * probs, labels, "isotonic")


# --- conformal sets -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1), min_size=0, max_size=40), st.sampled_from(["0.01", "0.05", "0.1", "0.3", "0.5", "0.9"])
)
@settings(max_examples=200, deadline=None)
def test_the_quantile_is_the_smallest_that_holds_enough(found, alpha):
    quantile = conformal_quantile(found, float(alpha))
    enough = (1 - Fraction(alpha)) * (len(found) + 1)
    holding = [s for s in found if sum(other <= s for other in found) >= enough]
    assert quantile == min(holding, default=math.inf)


def test_the_rank_is_exact_where_floats_are_not():
    # 100 * (1 - 0.45) is 55.00000000000001.
    assert conformal_quantile(np.arange(1, 100), 0.45) == 55


def slow_score(row: list[float], c: int, method: str) -> float:
    return 1 - row[c] if method == "lac" else math.fsum(p for p in row if p > row[c])


@st.composite
def rows(draw):
    classes = draw(st.integers(1, 6))
    weights = st.sampled_from([0.0, 1.0, 1.0, 2.0, 1e-9]) | st.floats(0, 1, width=32)
    found = draw(
        st.lists(st.lists(weights, min_size=classes, max_size=classes).filter(lambda r: sum(r) > 1e-6), min_size=1)
    )
    return np.array(found) / np.sum(found, axis=1, keepdims=True)


@given(rows(), st.sampled_from(["lac", "aps"]))
@settings(max_examples=150, deadline=None)
def test_conformal_scores_equal_loops(probs, method):
    expected = [[slow_score(row, c, method) for c in range(len(row))] for row in probs.tolist()]
    np.testing.assert_allclose(conformal_scores(probs, method), expected, atol=1e-12)


def made(**changes: Any) -> Calibration:
    probs, labels = sample(200, 4)
    return fit(probs, labels, **ORIGIN).model_copy(update=changes)


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_sets_hold_what_scores_no_worse_than_the_quantile(method):
    probs, labels = sample(300, 4)
    calibration = fit(probs, labels, conformal=method, alpha=0.2, seed=5, **ORIGIN)
    assert (calibration.fitted, calibration.held_out) == (150, 150)
    new, _ = sample(50, 4, seed=2)
    calibrated = apply(calibration, new)
    for alpha in (None, 0.05, 0.5):
        fitted = sorted(getattr(calibration.conformal, method))
        limit = fitted[math.ceil(Fraction(151) * (1 - Fraction(str(alpha or 0.2)))) - 1]
        found = prediction_sets(calibration, new, alpha)
        for row, chosen in zip(calibrated.tolist(), found, strict=True):
            gaps = [slow_score(row, c, method) - limit for c in range(4)]
            assert all(keep == (gap <= 0) for keep, gap in zip(chosen, gaps, strict=True) if abs(gap) > 1e-12)
        if method == "aps":
            assert found[np.arange(50), calibrated.argmax(axis=1)].all()
    assert (prediction_sets(calibration, new, 0.2, "lac") != prediction_sets(calibration, new, 0.2, "aps")).any()


def test_too_few_examples_give_every_class():
    probs, labels = sample(20, 3)
    calibration = fit(probs, labels, alpha=0.05, **ORIGIN)
    assert prediction_sets(calibration, probs).all()
    assert not prediction_sets(calibration, probs, 0.5).all()
    assert "by holding every class: smaller sets need at least 19 held-out images" in summary(calibration)


def test_the_promised_coverage_holds_on_average():
    """Over calibrations the coverage is at least 1 - alpha, and at most 1 / (n + 1) more (Lei et al. 2018)."""
    covered = {"lac": [], "aps": []}
    new, truth = sample(4000, 5, seed=10**6)
    for seed in range(150):
        probs, labels = sample(120, 5, seed=seed)
        calibration = fit(probs, labels, alpha=0.2, seed=seed, **ORIGIN)
        for method, shares in covered.items():
            sets = prediction_sets(calibration, new, method=method)
            shares.append(sets[np.arange(len(truth)), truth].mean())
    for shares in covered.values():
        error = np.std(shares) / math.sqrt(len(shares)) + 0.4 / math.sqrt(len(new))
        assert 0.8 - 3 * error < np.mean(shares) < 0.8 + 1 / 61 + 3 * error


# --- abstention -----------------------------------------------------------------------------------------------------


def test_fixed_sequence_by_hand():
    # Answers at 0.9, 0.8, ..., 50 each; wrong among them: 0, 0, 3, 40.
    confidence = np.repeat([0.9, 0.8, 0.7, 0.6], 50)
    correct = np.concatenate([np.arange(50) >= wrong for wrong in (0, 0, 3, 40)])
    risk, delta = 0.1, 0.05
    p = [binom.cdf(wrong, answered, risk) for answered, wrong in ((50, 0), (100, 0), (150, 3), (200, 43))]
    assert p[0] <= delta
    assert max(p[:3]) <= delta < p[3]
    assert certify(confidence, correct, np.array([0.9, 0.8, 0.7, 0.6]), risk, delta) == 0.7
    assert certify(confidence, correct, np.array([0.9, 0.8]), risk, delta) == 0.8
    assert certify(confidence, correct, np.array([0.6, 0.9]), risk, delta) is None  # it stops at the first
    assert certify(confidence, correct, np.array([0.95, 0.9]), risk, delta) is None  # of no answers, nothing is known
    assert certify(confidence, correct, np.array([0.9, 0.6, 0.7]), risk, delta) == 0.9


@given(st.integers(1, 80), st.integers(0, 5), st.sampled_from([0.05, 0.2, 0.5]), st.sampled_from([0.01, 0.1]))
@settings(max_examples=100, deadline=None)
def test_one_threshold_is_certified_by_the_exact_tail(answered, wrong, risk, delta):
    wrong = min(wrong, answered)
    tail = math.fsum(math.comb(answered, k) * risk**k * (1 - risk) ** (answered - k) for k in range(wrong + 1))
    correct = np.arange(answered) >= wrong
    found = certify(np.full(answered, 0.7), correct, np.array([0.7]), risk, delta)
    assert (found == 0.7) == (tail <= delta)


def test_the_certified_risk_holds_as_often_as_promised():
    """Confidences are uniform and right as often as they say, so the risk at a threshold t is (1 - t) / 2."""
    risk, delta, rng = 0.15, 0.2, np.random.default_rng(0)
    found = []
    for _ in range(1000):
        confidence = rng.random(500)
        found.append(certify(confidence, rng.random(500) < confidence, np.arange(0.85, 0, -0.02), risk, delta))
    certified = np.array([threshold for threshold in found if threshold is not None])
    assert len(certified) > 800
    broken = ((1 - certified) / 2 > risk).sum() / 1000
    assert 0.02 < broken < delta + 3 * math.sqrt(delta * (1 - delta) / 1000)
    assert 0.7 < certified.mean() < 0.8  # 0.7 is the best there is: the promise is not kept by answering nothing


def test_abstention_answers_from_the_threshold_up():
    probs, labels = sample(3000, 3)
    calibration = fit(probs, labels, risk=0.1, confidence=0.9, **ORIGIN)
    threshold = calibration.abstention.threshold
    new, truth = sample(4000, 3, seed=4)
    held = abstain(calibration, new)
    np.testing.assert_array_equal(held, apply(calibration, new).max(axis=1) < threshold)
    assert 0.1 < held.mean() < 0.9
    edge = float(apply(calibration, new)[0].max())
    moved = calibration.abstention.model_copy(update={"threshold": edge})
    assert not abstain(calibration.model_copy(update={"abstention": moved}), new)[0]
    assert (new.argmax(axis=1) != truth)[~held].mean() < 0.12
    assert binom.cdf(calibration.abstention.wrong, calibration.abstention.answered, 0.1) <= 0.1


def test_where_nothing_can_be_certified_nothing_is_answered():
    probs, labels = sample(40, 3)
    calibration = fit(probs, labels, risk=0.01, **ORIGIN)
    assert calibration.abstention == Abstention(risk=0.01, confidence=0.95, threshold=None, answered=0, wrong=0)
    assert abstain(calibration, probs).all()
    assert "no threshold could be certified, so abstain always" in summary(calibration)
    with pytest.raises(UsageError, match="no threshold for abstention: calibrate with --risk"):
        abstain(fit(probs, labels, **ORIGIN), probs)


# --- the whole ------------------------------------------------------------------------------------------------------


def test_the_map_sees_one_half_and_the_rest_the_other():
    probs, labels = sample(201, 3)
    probs = temper(probs, 0.9)
    found = fit(probs, labels, seed=3, **ORIGIN)
    assert (found.fitted, found.held_out) == (100, 101)
    lac = np.array(found.conformal.lac)
    # Whose scores are they? Each is 1 - p[label] of exactly one example under the map.
    each = 1 - found.map(probs)[np.arange(201), labels]
    held_out = np.array([np.abs(lac - score).min() < 1e-12 for score in each])
    assert held_out.sum() == 101
    assert found.map == fit_map(probs[~held_out], labels[~held_out], "temperature")
    assert found.before == pytest.approx(scores(probs[held_out], labels[held_out]))
    assert found.after == pytest.approx(scores(found.map(probs[held_out]), labels[held_out]))
    assert fit(probs, labels, seed=3, **ORIGIN).model_copy(update={"created": found.created}) == found
    assert fit(probs, labels, seed=4, **ORIGIN).map != found.map


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "platt"}, "method must be temperature or isotonic or beta or histogram or identity, not 'platt'"),
        ({"conformal": "raps"}, "conformal must be lac or aps, not 'raps'"),
        ({"alpha": 0}, "alpha must be positive, not 0"),
        ({"risk": 1.0}, "risk must be below 1, not 1.0"),
        ({"confidence": math.nan}, "confidence must be "),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        fit(*sample(20, 3), **options, **ORIGIN)
    with pytest.raises(UsageError, match=message):
        calibrate(Path("nowhere"), **options)


def test_a_map_that_makes_held_out_scores_worse_says_so_and_the_identity_changes_nothing():
    probs, labels = sample(400, 3)
    order = np.random.default_rng(derive(0, "calibration")).permutation(400)
    wrong = labels.copy()
    wrong[order[:200]] = probs[order[:200]].argmin(axis=1)  # the images that fit the map are not like the others
    worse = fit(probs, wrong, **ORIGIN)
    assert worse.after["nll"] > worse.before["nll"]
    (line,) = [line for line in summary(worse).splitlines() if line.startswith("warning")]
    assert "the NLL" in line and line.endswith("calibrate with --method identity")
    same = fit(probs, wrong, method="identity", **ORIGIN)
    np.testing.assert_allclose(same.map(probs), probs, rtol=1e-12)
    for name in ("error", "nll", "ece"):
        assert same.after[name] == pytest.approx(same.before[name])
    assert "warning" not in summary(same) and "T = 1)" in summary(same)


def test_one_image_is_too_few():
    with pytest.raises(UsageError, match="1 validation image cannot calibrate"):
        fit(*sample(1, 3), **ORIGIN)


def test_other_shapes_are_refused():
    for wrong in (np.ones((2, 3)) / 3, np.ones(4) / 4, np.ones((2, 1, 4)) / 4):
        for function in (apply, prediction_sets):
            with pytest.raises(ShapeError, match=r"for probabilities \(B, 4\), found"):
                function(made(), wrong)
    with pytest.raises(UsageError, match=r"alpha must .* between 0 and 1, not 1"):
        prediction_sets(made(), np.ones((2, 4)) / 4, 1)
    with pytest.raises(UsageError, match="unknown conformal method 'raps'"):
        prediction_sets(made(), np.ones((2, 4)) / 4, method="raps")


# --- with a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return train(dataset(), DeepEnsemble(members=2), Settings(**SETTINGS)).save(folder / "run")


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_is_calibrated_on_its_validation_split(run):
    seen: list[tuple[int, int]] = []
    found = calibrate(run, risk=0.5, device="cpu", seed=2, watch=lambda _, done, total: seen.append((done, total)))
    validation = dataset().validation
    probs = Ensemble.load(run, "cpu").predict(validation.images).probabilities
    expected = fit(
        probs,
        validation.labels.numpy(),
        risk=0.5,
        seed=2,
        run_sha256=found.run_sha256,
        dataset="small",
        validation_sha256=validation.sha256,
    )
    assert found.validation_sha256 == validation.sha256
    # To the bit of what is served: where members vote, images lie on a threshold, and float32 puts them to one side.
    assert (found.map, found.conformal, found.abstention) == (expected.map, expected.conformal, expected.abstention)
    assert seen == [(0, 12), (12, 12)]
    assert "small, validation images: 6 to fit the map (T = " in summary(found)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_comes_back_as_it_went(run, method):
    assert load(run) is None
    probs, labels = sample(90, 3)
    identity = {**ORIGIN, "run_sha256": calibrate(run, device="cpu").run_sha256}
    found = fit(probs, labels, method=method, risk=0.3, **identity)
    assert save(found, run) == run / FILE
    again = load(run)
    assert again == found
    np.testing.assert_array_equal(apply(again, probs), apply(found, probs))
    np.testing.assert_array_equal(prediction_sets(again, probs), prediction_sets(found, probs))
    save(found.model_copy(update={"seed": 7}), run)
    assert load(run).seed == 7
    assert Ensemble.load(run, "cpu").members == 2  # a run with a calibration is a run
    assert not list(run.glob(".partial*"))


def test_an_edited_file_is_refused(run):
    save(calibrate(run, device="cpu"), run)
    file = run / FILE
    text = file.read_text()
    content = json.loads(text)
    edits = [
        text.replace(f'"temperature": {content["map"]["temperature"]}', '"temperature": 1.5'),
        text.replace(content["sha256"], "0" * 64),
        text.replace('"sha256"', '"sha"'),
        text[: len(text) // 2],
        "[]",
        "null",
        "",
    ]
    for edit in edits:
        assert edit != text
        file.write_text(edit)
        with pytest.raises(CorruptError, match=r"calibration\.json has changed since it was written"):
            load(run)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptError):
        load(run)


def test_a_later_format_and_a_wrong_field_are_refused(run):
    found = calibrate(run, device="cpu")
    save(found.model_copy(update={"format": 2}), run)
    with pytest.raises(ArtefactError, match="calibration format 2; this version of ensembler reads 1: update it"):
        load(run)
    save(found.model_copy(update={"map": Temperature.model_construct(temperature=-1.0)}), run)
    with pytest.raises(ArtefactError, match=r"not a calibration of this version \(map"):
        load(run)


def test_other_members_are_refused(run, tmp_path):
    found = calibrate(run, device="cpu")
    save(found, run)
    other = train(dataset(), DeepEnsemble(members=2), Settings(**SETTINGS, seed=1)).save(tmp_path / "other")
    message = "was fitted for another run: run `ensembler calibrate` again"
    with pytest.raises(ArtefactError, match=message):
        save(found, other)
    shutil.copy(run / FILE, other / FILE)
    with pytest.raises(ArtefactError, match=message):
        load(other)
    manifest = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(manifest.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ArtefactError, match=message):
        load(run)
    (run / "manifest.json").write_text(manifest)
    assert load(run) == found
    (run / "vertices.safetensors").write_bytes((other / "vertices.safetensors").read_bytes())
    with pytest.raises(CorruptError, match=r"vertices\.safetensors has changed"):
        Ensemble.load(run, "cpu")  # members that do not fit the manifest do not load at all


def test_no_run_and_no_file(tmp_path):
    assert load(tmp_path) is None
    with pytest.raises(ArtefactError, match=r"no run at .*: it has no manifest\.json"):
        save(made(), tmp_path)
    with pytest.raises(ArtefactError, match=r"cannot read .*: No such file"):
        read(tmp_path / FILE, "0" * 64)
    with pytest.raises(ArtefactError, match="no run at"):
        calibrate(tmp_path / "nowhere")


def test_serving_a_calibration_loads_neither_torch_nor_netcal():
    code = "import ensembler.calibration, sys; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "netcal", "sklearn", "scipy"} & set(loaded)


def test_conformal_scores_are_in_the_record():
    assert len(made().conformal.lac) == len(made().conformal.aps) == 100
    assert made().conformal.lac == sorted(made().conformal.lac)
    with pytest.raises(ValueError, match="less than 1"):
        Conformal(method="lac", alpha=1.0, lac=[], aps=[])
