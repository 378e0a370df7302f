"""What export makes of a run whose images are at hand: layouts, precisions, order, tuning; and what verify finds."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from typer.testing import CliRunner

from ensembler import calibration, calibration_maps, load_dataset
from ensembler.cli import app
from ensembler.data.datasets import Dataset
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, CorruptError, DataError, ExportError, UsageError
from ensembler.ordering import greedy_order
from ensembler.run import Sampling
from ensembler.serve import Runtime, export_run
from ensembler.serve.export import bundle as export_module
from ensembler.serve.export import graphs, precision, writer
from ensembler.serve.http import page
from ensembler.serve.runtime.manifest import Layout, Precision, Timing, Tuning, read_bundle
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.storage import artefact
from tests._runs import make_run

SAMPLING = Sampling(simplexes=[[0, 1], [1, 2]], concentration=1.0)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """90 images of three classes, told apart by where they are bright."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("top", "middle", "bottom")):
        (folder / name).mkdir()
        for number in range(30):
            pixels = rng.integers(0, 150, (8, 8, 3), dtype=np.uint8)
            pixels[label * 3 : label * 3 + 2] += 100
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return load_dataset(f"folder:{folder}")


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "plain", "tests._small:network", 6, dataset, SAMPLING)


@pytest.fixture(scope="module")
def batchnorm(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "batchnorm", "tests._small:batchnorm", 4, dataset, SAMPLING)


@pytest.fixture(scope="module", autouse=True)
def traced() -> Iterator[list[str]]:
    """Each kind of network is traced once for this file, which takes a second; and a list of what asked for it."""
    asked, known, trace = [], {}, writer.trace

    def once(graph: graphs.Graph, record: Any) -> Any:
        kind = f"{graph.network} {graph.scaled}"
        asked.append(kind)
        if kind not in known or "unused" in dict(graph.network.named_parameters()):
            known[kind] = trace(graph, record)
        return copy.deepcopy(known[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "trace", once)
        yield asked


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run, tmp_path_factory.mktemp("bundles") / "vertices")


def expected(run: Path, images: np.ndarray, order: list[int]) -> np.ndarray:
    return Ensemble.load(run, device="cpu").predict_members(images).numpy()[order]


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["run", "batchnorm"])
@pytest.mark.parametrize(
    ("options", "layout"),
    [({}, "vertices"), ({"layout": "members"}, "members"), ({"pixels": "float"}, "vertices")],
)
def test_every_layout_agrees_with_pytorch(
    which: str, options: Any, layout: str, dataset: Dataset, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path, images = request.getfixturevalue(which), dataset.test.images.numpy()
    loaded = Runtime.load(export_run(path, tmp_path / "bundle", **options))
    manifest = loaded.manifest
    assert (manifest.layout, manifest.vertices, manifest.members) == (layout, 3, loaded.members)
    assert len(manifest.graphs) == (1 if layout == "vertices" else loaded.members)
    assert manifest.compared_on == ["test images", "seeded patches"]
    assert 0 < manifest.max_difference < 1e-5
    found = loaded.predict_members(images)
    np.testing.assert_allclose(found, expected(path, images, manifest.order), atol=1e-5)
    assert len({float(member[0, 0]) for member in found}) >= loaded.members - 1  # two have the same coefficients
    if manifest.input == "float":
        np.testing.assert_allclose(loaded.predict_members(images / 255.0), found, atol=1e-6)
        with pytest.raises(Exception, match="floats outside 0 to 1: divide pixels by 255"):
            loaded.predict(images.astype(np.float32))
        with pytest.raises(Exception, match=r"expected images of shape \(batch, 8, 8, 3\)"):
            loaded.predict(images[0] / 255.0)


def test_a_member_alone_runs_anywhere(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    export_run(run, tmp_path / "bundle", layout="members")
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "member-002.onnx")
    (logits,) = session.run(None, {"images": dataset.test.images.numpy()})
    probabilities = torch.softmax(torch.from_numpy(logits), -1)
    np.testing.assert_allclose(probabilities, expected(run, dataset.test.images.numpy(), [2])[0], atol=1e-5)


def test_vertices_take_less_room_and_a_hundred_members_one_trace(
    run: Path, dataset: Dataset, tmp_path: Path, traced: list[str]
) -> None:
    del traced[:]
    export_run(run, tmp_path / "hundred", members=100, seed=5)
    assert len(traced) == 1
    loaded = Runtime.load(tmp_path / "hundred")
    assert loaded.members == 100
    assert (tmp_path / "hundred" / "weights.npz").stat().st_size < 6000
    sampled = Ensemble.load(run, device="cpu").sample(100, seed=5).predict_members(dataset.test.images).numpy()
    found = loaded.predict_members(dataset.test.images.numpy())
    np.testing.assert_allclose(found, sampled[loaded.manifest.order], atol=1e-5)


def test_the_server_makes_as_many_members_as_it_is_asked_for(bundle: Path, run: Path, dataset: Dataset) -> None:
    images = dataset.test.images.numpy()
    own = Runtime.load(bundle).predict_members(images)
    np.testing.assert_array_equal(Runtime.load(bundle, members=2).predict_members(images), own[:2])
    more = Runtime.load(bundle, members=30, seed=1)
    assert more.members == 30
    found = more.predict_members(images)
    np.testing.assert_array_equal(found[:6], own)
    assert np.abs(found[6:] - Runtime.load(bundle, members=30, seed=2).predict_members(images)[6:]).max() > 1e-3
    # Each further one lies in a simplex: on one of two edges, so that it is one of a family of one parameter.
    ensemble = Ensemble.load(run, device="cpu")
    edges = torch.cat(
        [
            torch.stack([1 - t, t, 0 * t], dim=1) if edge == 0 else torch.stack([0 * t, 1 - t, t], dim=1)
            for edge in (0, 1)
            for t in (torch.linspace(0, 1, 101),)
        ]
    )
    family = ensemble.at(edges).predict_members(images[:1]).numpy()[:, 0]
    for member in found[6:, 0]:
        assert np.abs(family - member).max(axis=1).min() < 0.02
    assert more.predict(images[:2]).complete.all()


def test_members_that_cannot_be_made_are_refused(
    bundle: Path, batchnorm: Path, run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"cannot make new members: their BatchNorm statistics.*export --members"):
        Runtime.load(export_run(batchnorm, tmp_path / "batchnorm"), members=5)
    with pytest.raises(UsageError, match="holds 6 members and no vertices to make 7 of"):
        Runtime.load(export_run(run, tmp_path / "members", layout="members"), members=7)
    with pytest.raises(UsageError, match="at least one member, not 0"):
        Runtime.load(bundle, members=0)
    fixed = make_run(tmp_path / "fixed", "tests._small:network", 4, dataset)
    with pytest.raises(
        UsageError, match="holds 4 members of a run by spro-simplex, which draws no others: ask for at most 4"
    ):
        Runtime.load(export_run(fixed, tmp_path / "fixed-bundle"), members=5)
    with pytest.raises(UsageError, match="fixed: nothing to sample from"):
        export_run(fixed, tmp_path / "other", members=5)


def test_batchnorm_members_sampled_at_export_have_their_own_statistics(
    batchnorm: Path, dataset: Dataset, tmp_path: Path
) -> None:
    loaded = Runtime.load(export_run(batchnorm, tmp_path / "bundle", members=5, seed=2))
    sampled = Ensemble.load(batchnorm, device="cpu").sample(5, 2, dataset.train)
    found, images = loaded.predict_members(dataset.test.images.numpy()), dataset.test.images
    np.testing.assert_allclose(found, sampled.predict_members(images).numpy()[loaded.manifest.order], atol=1e-5)


ODD_NETWORKS = """
import torch
from torch import nn


def partly_frozen(num_classes):
    layers = [nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, num_classes)]
    network = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(7)
    for parameter in network[1].parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 14
        parameter.requires_grad = False
    network[3].weight.data += torch.eye(4)
    return network


class Unused(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)
        self.unused = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.head(x.mean(dim=(2, 3)))


def unused(num_classes):
    return Unused(num_classes)
"""


@pytest.fixture
def odd_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_ones.py").write_text(ODD_NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("odd_networks")
def test_frozen_parameters_are_every_members(dataset: Dataset, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "odd_ones:partly_frozen", 4, dataset, SAMPLING)
    loaded = Runtime.load(export_run(path, tmp_path / "bundle"), members=5)
    found, images = loaded.predict_members(dataset.test.images.numpy()), dataset.test.images.numpy()
    np.testing.assert_allclose(found[:4], expected(path, images, loaded.manifest.order), atol=1e-5)
    with np.load(tmp_path / "bundle" / "weights.npz") as weights:
        assert [name for name in weights.files if name.startswith("shared/")] == [
            "shared/network.1.weight",
            "shared/network.1.bias",
        ]


@pytest.mark.usefixtures("odd_networks")
def test_weights_without_names_cannot_be_made_of_vertices(dataset: Dataset, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "odd_ones:unused", 4, dataset)
    with pytest.raises(UsageError, match="does not hold every weight by its name: export it with --layout members"):
        export_run(path, tmp_path / "bundle", layout="vertices")
    assert export_run(path, tmp_path / "bundle").is_dir()
    assert Runtime.load(tmp_path / "bundle").manifest.layout == "members"


def test_large_weights_lie_beside_their_graph(
    run: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "EXTERNAL_ABOVE", 500)
    monkeypatch.setattr(export_module, "measure_strategies", lambda members, images: tuning(len(members), "merged"))
    bundle = export_run(run, tmp_path / "bundle", layout="members", tune=True)
    names = {path.name for path in bundle.iterdir()}
    assert {"member-000.onnx", "member-000.onnx.data", "merged.onnx", "merged.onnx.data"} <= names
    loaded, images = Runtime.load(bundle), dataset.test.images.numpy()
    assert loaded.strategy(5) == "merged"
    np.testing.assert_allclose(loaded.predict_members(images), expected(run, images, loaded.manifest.order), atol=1e-5)
    content = bytearray((bundle / "member-003.onnx.data").read_bytes())
    content[-1] ^= 1
    (bundle / "member-003.onnx.data").write_bytes(content)
    with pytest.raises(CorruptError, match=r"member-003.onnx.data has changed"):
        Runtime.load(bundle)


# --- what validation images tell -------------------------------------------------------------------------------------


def test_order_and_usual_doubt_are_of_the_validation_images(bundle: Path, run: Path, dataset: Dataset) -> None:
    manifest = Runtime.load(bundle).manifest
    labels = dataset.validation.labels.numpy()
    members = expected(run, dataset.validation.images.numpy(), list(range(6))).astype(np.float64)
    known, mean = manifest.validation, members.mean(axis=0)
    assert manifest.ordered_by == "validation NLL"
    assert manifest.order == greedy_order(members[:, np.arange(len(labels)), labels]) != list(range(6))
    assert known is not None and known.examples == len(labels)
    assert known.accuracy == pytest.approx((mean.argmax(-1) == labels).mean())
    assert known.nll == pytest.approx(-np.log(mean[np.arange(len(labels)), labels]).mean(), abs=1e-5)
    entropy = -(mean * np.log(mean)).sum(-1)
    information = entropy + (members * np.log(members)).sum(-1).mean(0)
    assert {0.0, 0.5, 0.9, 0.95, 0.99, 1.0} < set(known.levels)
    np.testing.assert_allclose(known.predictive_entropy, np.quantile(entropy, known.levels), atol=1e-5)
    np.testing.assert_allclose(known.mutual_information, np.quantile(information, known.levels), atol=1e-5)
    drift = {binned.measure: binned for binned in known.drift}
    assert drift["class"].counts == np.bincount(mean.argmax(-1), minlength=mean.shape[-1]).tolist()
    for measure, values in {"predictive_entropy": entropy, "mutual_information": information}.items():
        np.testing.assert_allclose(drift[measure].edges, np.quantile(values, np.arange(1, 10) / 10), atol=1e-5)
        assert sum(drift[measure].counts) == len(labels)


def test_without_images_the_runs_order_is_kept_and_it_is_said(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = Runtime.load(export_run(run, tmp_path / "none", use_data=False, say=said.append)).manifest
    assert (manifest.order, manifest.ordered_by, manifest.validation) == (list(range(6)), "the run", None)
    assert manifest.compared_on == ["seeded patches"]
    assert len(said) == 1 and "keep the run's order" in said[0]
    moved = Path(dataset.name.removeprefix("folder:"))
    moved.rename(moved.with_name("elsewhere"))
    try:
        said.clear()
        export_run(run, tmp_path / "missing", say=said.append)
        assert "images were not found: no folder of images at" in said[0]
        with pytest.raises(DataError, match="no folder of images"):
            export_run(run, tmp_path / "asked", data=tmp_path / "nowhere")
        with pytest.raises(UsageError, match="float16 is accepted only after a comparison on validation images"):
            export_run(run, tmp_path / "unchecked", precision="float16")
    finally:
        moved.with_name("elsewhere").rename(moved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["missing", "none"]


def test_no_more_images_are_used_than_asked(run: Path, tmp_path: Path) -> None:
    known = Runtime.load(export_run(run, tmp_path / "few", examples=3)).manifest.validation
    assert known is not None and known.examples == 3
    with pytest.raises(UsageError, match="at least 1 validation image"):
        export_run(run, tmp_path / "other", examples=0)


def test_a_folders_images_stay_out_of_the_bundle(bundle: Path) -> None:
    (only,) = page.examples(bundle, read_bundle(bundle))["examples"]
    assert only["name"] == "a random pattern, of no class"


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [("float16", "vertices"), ("float16", "members"), ("int8", "members")])
def test_fewer_bits_are_accepted_within_bounds(
    name: Precision, layout: Layout, run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    loaded = Runtime.load(export_run(run, tmp_path / "bundle", precision=name, layout=layout))
    check, images = loaded.manifest.precision_check, dataset.validation.images.numpy()
    found, exact = loaded.predict_members(images), expected(run, images, loaded.manifest.order)
    assert 1e-7 < np.abs(found - exact).max() < 0.05  # it really is another precision
    information = [-(p.mean(0) * np.log(p.mean(0))).sum(-1) + (p * np.log(p)).sum(-1).mean(0) for p in (found, exact)]
    assert check is not None and check.rank_correlation == pytest.approx(spearmanr(*information).statistic, abs=1e-3)
    assert (check.least_rank_correlation, check.most_accuracy_drop) == precision.BOUNDS[name]
    assert loaded.manifest.compared_on == ["test images"]
    assert verify_bundle(tmp_path / "bundle").images == 10


@pytest.mark.parametrize("bounds", [(1.1, 1.0), (-1.0, -1.0)])
@pytest.mark.parametrize("name", ["float16", "int8"])
def test_out_of_bounds_there_is_no_bundle(
    name: Precision, bounds: tuple[float, float], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precision.BOUNDS, name, bounds)
    with pytest.raises(
        ExportError, match=rf"^{name} changes this ensemble too much on \d+ validation images: .*0\.\d+"
    ):
        export_run(run, tmp_path / "bundle", precision=name)
    assert list(tmp_path.iterdir()) == []


def test_int8_cannot_be_made_of_vertices(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export int8 with --layout members"):
        export_run(run, tmp_path / "bundle", precision="int8", layout="vertices")
    assert Runtime.load(export_run(run, tmp_path / "bundle", precision="int8")).manifest.layout == "members"


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, 6, (2, 30)).astype(float)
    assert precision.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert precision.rank_correlation(a, np.zeros(30)) == 0.0


# --- tuning ----------------------------------------------------------------------------------------------------------


def tuning(members: int, winner: Any) -> Tuning:
    from ensembler.machine import available_cpus

    rows = [Timing(batch=1, strategy=winner, seconds=0.001, repeats=5)]
    return Tuning(
        machine="a test",
        cpus=available_cpus(),
        load=None,
        device="cpu",
        members=members,
        winners={1: winner},
        table=rows,
    )


@pytest.mark.parametrize("which", ["run", "batchnorm"])
def test_all_members_in_one_graph_are_the_members(
    which: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    path, images = request.getfixturevalue(which), dataset.test.images.numpy()
    monkeypatch.setattr(export_module, "measure_strategies", lambda members, images: tuning(len(members), "merged"))
    loaded = Runtime.load(export_run(path, tmp_path / "bundle", tune=True))
    assert loaded.strategy(7) == "merged"
    assert loaded.manifest.order != sorted(loaded.manifest.order)
    for batch in (1, 2, 7):
        merged = loaded.predict_members(images[:batch])
        np.testing.assert_allclose(merged, expected(path, images[:batch], loaded.manifest.order), atol=1e-5)
        np.testing.assert_allclose(merged, loaded._members.ask(images[:batch]), atol=1e-6)
    assert loaded.predict(images, "exact").classes.tolist() == loaded.predict(images).classes.tolist()
    assert loaded.predict(images, members=2).members_used.tolist() == [2] * len(images)
    loaded.warm_up()
    assert verify_bundle(tmp_path / "bundle").merged is not None


def test_a_measurement_is_kept_with_its_winners(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ensembler.serve.runtime import tune

    monkeypatch.setattr(export_module, "measure_strategies", lambda *given: tune.tune(*given, seconds=0.05))
    manifest = Runtime.load(export_run(run, tmp_path / "bundle", tune=True)).manifest
    assert manifest.tuning is not None
    for batch in (1, 8, 64):
        rows = {row.strategy: row.seconds for row in manifest.tuning.table if row.batch == batch}
        assert set(rows) == {"sessions", "loop", "merged"}
        assert rows[manifest.tuning.winners[batch]] <= 1.04 * min(rows.values())
    assert ("merged" in manifest.tuning.winners.values()) == (tmp_path / "bundle" / "merged.onnx").exists()


def test_a_graph_of_all_that_differs_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = writer.merge
    monkeypatch.setattr(writer, "merge", lambda models: merge(list(models)[::-1]))
    with pytest.raises(ExportError, match=r"differ by .* when they run in one graph: export without --tune"):
        export_run(run, tmp_path / "bundle", tune=True, layout="members")
    assert list(tmp_path.iterdir()) == []


# --- calibration -----------------------------------------------------------------------------------------------------


SMOOTH = calibration_maps.Temperature(temperature=1.5)
JUMPY = calibration_maps.Histogram(y=[[0.1, 0.9] * 500] * 3)  # a probability that moves by 0.001 lands in another bin


def calibrate(run: Path, fitted_map: calibration_maps.Map = SMOOTH) -> calibration.Calibration:
    scores = [0.1, 0.2, 0.6]
    fitted = calibration.Calibration(
        run_sha256=artefact.sha256(run / "manifest.json"),
        dataset="images",
        validation_sha256="0" * 64,
        classes=3,
        fitted=3,
        held_out=3,
        seed=0,
        map=fitted_map,
        conformal=calibration.Conformal(method="lac", alpha=0.1, lac=scores, aps=scores),
        abstention=None,
        before={},
        after={},
        created="",
        versions={},
    )
    calibration.save(fitted, run)
    return fitted


def test_a_calibration_goes_with_the_members_that_it_was_fitted_for(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    fitted = calibrate(own)
    bundle = export_run(own, tmp_path / "bundle")
    assert Runtime.load(bundle).calibration == fitted
    assert Runtime.load(bundle, members=5).calibration is None
    assert Runtime.load(bundle, members=7).calibration is None
    said: list[str] = []
    sampled = export_run(own, tmp_path / "sampled", members=4, say=said.append)
    assert Runtime.load(sampled).calibration is None
    assert said == ["The run's calibration is left out: it was fitted for the run's own members."]
    (bundle / "calibration.json").unlink()
    with pytest.raises(CorruptError, match=r"calibration.json is missing"):
        verify_bundle(bundle)
    (own / "calibration.json").write_text((own / "calibration.json").read_text().replace("images", "others"))
    with pytest.raises(CorruptError, match=r"calibration.json has changed since it was written"):
        export_run(own, tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize(
    ("name", "fitted_map", "kept"),
    [("float32", JUMPY, True), ("float16", SMOOTH, True), ("int8", SMOOTH, True), ("int8", JUMPY, False)],
)
def test_a_calibration_goes_only_with_members_that_it_still_holds_for(
    name: Precision, fitted_map: calibration_maps.Map, kept: bool, run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    fitted = calibrate(own, fitted_map)
    said: list[str] = []
    loaded = Runtime.load(export_run(own, tmp_path / "bundle", precision=name, say=said.append))
    assert (loaded.calibration == fitted) == kept
    assert (tmp_path / "bundle" / "calibration.json").exists() == kept
    images, check = dataset.validation.images.numpy(), loaded.manifest.precision_check
    members = expected(run, images, list(range(6))), loaded.predict_members(images)
    p, q = (calibration.apply(fitted, each.mean(axis=0, dtype=np.float64)) for each in members)
    distance = np.abs(p - q).sum(axis=1).mean() / 2
    assert (distance <= 0.01) == kept
    if check is not None:
        assert check.calibrated_distance == pytest.approx(distance, abs=1e-5)
        assert check.most_calibrated_distance == 0.01
    assert said == [] if kept else len(said) == 1
    if not kept:
        assert said[0].startswith("The run's calibration is left out: it was fitted in float32, and")
        assert said[0].endswith("on average (at most 0.01 is allowed): export in float32 to keep it.")


# --- verify ----------------------------------------------------------------------------------------------------------


def rewritten(bundle: Path, path: Path, change: Callable[[Path, dict[str, Any]], None]) -> Path:
    """A copy with other content and true hashes of it."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    with artefact.write(path, manifest) as folder:
        for name in manifest["files"]:
            shutil.copy(bundle / name, folder / name)
        change(folder, manifest)
    return path


def test_verify_says_what_it_found(bundle: Path) -> None:
    found = verify_bundle(bundle)
    assert (found.images, found.device, len(found.differences)) == (10, "cpu", 6)
    assert max(found.differences) < 1e-5 < found.allowed
    result = CliRunner().invoke(app, ["verify", str(bundle)], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "of PyTorch's on 10 images (1e-04 allowed)" in result.output


def test_verify_names_the_whole_path(bundle: Path, tmp_path: Path) -> None:
    place = shutil.copytree(bundle, tmp_path / ("a bundle " * 20).strip())
    for columns in ("40", "200"):
        result = CliRunner().invoke(app, ["verify", str(place)], env={"COLUMNS": columns})
        assert f"{place}, format 1\n" in result.output


def test_verify_names_a_damaged_file(bundle: Path, tmp_path: Path) -> None:
    for name in ("graph.onnx", "weights.npz", "probe.npz", "manifest.json"):
        damaged = shutil.copytree(bundle, tmp_path / name)
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / name).write_bytes(content)
        result = CliRunner().invoke(app, ["verify", str(damaged)])
        assert result.exit_code == 1
        assert f"{name} has changed since it was written" in result.stderr.replace("\n", " ")
        assert len(result.stderr.splitlines()) == 1


def test_verify_finds_members_that_answer_otherwise(bundle: Path, tmp_path: Path) -> None:
    def other_answers(folder: Path, _: dict[str, Any]) -> None:
        with np.load(folder / "probe.npz") as file:
            images, probabilities = file["images"], file["probabilities"].copy()
        probabilities[4] = probabilities[4, :, ::-1]
        np.savez(folder / "probe.npz", images=images, probabilities=probabilities)

    with pytest.raises(ArtefactError, match=r"^member 5 of .* differs by .* from the stored answer"):
        verify_bundle(rewritten(bundle, tmp_path / "answers", other_answers))


@pytest.mark.parametrize("name", ["graph.onnx", "weights.npz", "probe.npz"])
def test_verify_finds_files_that_are_none(bundle: Path, tmp_path: Path, name: str) -> None:
    def nonsense(folder: Path, _: dict[str, Any]) -> None:
        (folder / name).write_bytes(b"nothing of the kind")

    with pytest.raises(ArtefactError, match=rf"{name}.*export the run again"):
        verify_bundle(rewritten(bundle, tmp_path / "bundle", nonsense))


def test_nothing_pickled_is_read(bundle: Path, tmp_path: Path) -> None:
    def pickled(folder: Path, _: dict[str, Any]) -> None:
        np.savez(folder / "weights.npz", coefficients=np.array([{"a": 1}], dtype=object))

    with pytest.raises(ArtefactError, match="holds no vertices that can be read"):
        Runtime.load(rewritten(bundle, tmp_path / "bundle", pickled))


def test_serving_needs_neither_torch_nor_onnx(bundle: Path) -> None:
    """What makes members of vertices, too: nothing but ONNX Runtime, NumPy, pydantic and Pillow."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'scipy', 'sklearn', 'safetensors', 'bentoml'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np\n"
        "from ensembler.serve.runtime.runtime import Runtime\n"
        "from ensembler.serve.runtime.verify import verify_bundle\n"
        "loaded = Runtime.load(sys.argv[1], members=8)\n"
        "print(loaded.predict(np.zeros((2, 8, 8, 3), np.uint8), 'exact').members_used.max() <= 8)\n"
        "print(max(verify_bundle(sys.argv[1]).differences) < 1e-5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(run: Path, tmp_path: Path) -> None:
    arguments = ["export", str(run), "--out", str(tmp_path / "b"), "--precision", "float16", "--members", "9"]
    result = CliRunner().invoke(app, [*arguments, "--input", "float"], terminal_width=200)
    assert result.exit_code == 0, result.output
    for words in ("9 x tests._small:network", "3 vertices, float16", "rank correlation", "by validation NLL"):
        assert words in result.output
    manifest = Runtime.load(tmp_path / "b").manifest
    assert (manifest.members, manifest.input, manifest.precision) == (9, "float", "float16")
