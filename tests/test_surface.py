"""The plane through three networks, against explicit Gram and Schmidt and networks loaded by hand; the pictures."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils import vector_to_parameters
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.data.datasets import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, DivergedError, UsageError
from ensembler.eval import surface as module
from ensembler.eval.options import SurfaceOptions
from ensembler.eval.report.plots import new_figure, scale_by_log
from ensembler.eval.report.surface_figures import draw_surface, plot_paths, plot_surface
from ensembler.eval.surface import Surface, plane, plane_coefficients
from ensembler.run import Run
from ensembler.trainers import Curve, DeepEnsemble, Settings, train
from tests import _small
from tests._small import SETTINGS, dataset


def trained(method, **changes):
    return train(changes.pop("dataset", dataset(train=32)), method, Settings(**(SETTINGS | changes)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name, trained once: three single networks, an ensemble of four, and a curve."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {}
    for seed in range(3):
        paths[f"single{seed}"] = trained(DeepEnsemble(members=1), seed=seed).save(folder / f"single{seed}")
    made = {
        "four": trained(DeepEnsemble(members=4)),
        "curve": trained(curve(paths, members=5, points=5)),
        "batchnorm": trained(DeepEnsemble(members=3), architecture="tests._small:batchnorm", epochs=12),
    }
    return paths | {name: run.save(folder / name) for name, run in made.items()}


def measure_surface(paths, vertices=None, **options):
    return module.measure_surface(paths, vertices, SurfaceOptions(**options))


def curve(paths, **options):
    return Curve(first=str(paths["single0"]), second=str(paths["single1"]), **options)


@pytest.fixture(autouse=True)
def _images(monkeypatch):
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset(train=32))


def flat(run, network):
    """The vertices (K, P) in float64, parameters in the network's own order."""
    return torch.cat([run.vertices[name].flatten(1) for name, _ in network.named_parameters()], dim=1).double()


def gram_schmidt(w0, w1, w2):
    u = w2 - w0
    u = u / u.norm()
    v = (w1 - w0) - (w1 - w0).dot(u) * u
    return u, v / v.norm()


def by_hand(network, weights):
    """Train loss and test error of a fresh network with these weights in it."""
    vector_to_parameters(weights.float(), network.parameters())
    images = dataset(train=32)
    seen, unseen = (
        normalise(split.images, images.mean, images.std).contiguous() for split in (images.train, images.test)
    )
    network.train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        network(seen)  # one batch, which is all of the images: its mean and variance become the statistics
        network.eval()
        loss = cross_entropy(network(seen), images.train.labels).item()
        error = (network(unseen).argmax(1) != images.test.labels).double().mean().item()
    return loss, error


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_coordinates_are_those_of_gram_and_schmidt(scale):
    for seed in range(5):
        W = scale * torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        u, v = gram_schmidt(*W)
        found = plane(W)
        expected = torch.stack([(W - W[0]) @ u, (W - W[0]) @ v], dim=1)
        np.testing.assert_allclose(found, expected, atol=1e-9 * scale)
        torch.testing.assert_close(plane_coefficients(found, found), torch.eye(3), atol=1e-6, rtol=0)
        points = scale * np.random.default_rng(seed).normal(size=(7, 2))
        coefficients = plane_coefficients(points, found)
        torch.testing.assert_close(coefficients.sum(1), torch.ones(7))
        weights = W[0] + torch.from_numpy(points) @ torch.stack([u, v])
        torch.testing.assert_close(coefficients.double() @ W, weights, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize(("name", "vertices"), [("four", [3, 0, 2]), ("batchnorm", None)])
def test_every_point_is_the_network_that_lies_there(runs, name, vertices):
    surface = measure_surface([runs[name]], vertices, grid=3, device="cpu")
    run = Run.load(runs[name])
    make = _small.batchnorm if name == "batchnorm" else _small.network
    W = flat(run, make(3))[vertices or [0, 1, 2]]
    u, v = gram_schmidt(*W)
    assert [corner.label for corner in surface.corners] == [f"w{k}" for k in vertices or (0, 1, 2)]
    for k, corner in enumerate(surface.corners):
        torch.testing.assert_close(W[0] + corner.x * u + corner.y * v, W[k], atol=1e-5, rtol=0)
        if name != "batchnorm":  # whose corners keep the statistics that they were trained with
            loss, error = by_hand(make(3), W[k])
            assert (corner.train_loss, corner.test_error) == (pytest.approx(loss, rel=1e-4), pytest.approx(error))
    for i, y in enumerate(surface.y):
        for j, x in enumerate(surface.x):
            loss, error = by_hand(make(3), W[0] + x * u + y * v)
            assert surface.train_loss[i][j] == pytest.approx(loss, rel=1e-3)
            assert surface.test_error[i][j] == pytest.approx(error)
    places = np.array([(corner.x, corner.y) for corner in surface.corners])
    low, high = places.min(0), places.max(0)
    assert [surface.x[0], surface.y[0]] == pytest.approx(low - 0.2 * (high - low))
    assert [surface.x[-1], surface.y[-1]] == pytest.approx(high + 0.2 * (high - low))
    chosen = sorted(range(3), key=(vertices or [0, 1, 2]).__getitem__)
    np.testing.assert_array_equal(surface.members, places[chosen])  # each vertex is a member: in the run's order


def test_a_batchnorm_vertex_keeps_its_own_loss(runs):
    images = dataset(train=32).train
    surface = measure_surface([runs["batchnorm"]], grid=2, device="cpu")
    members = Ensemble.load(runs["batchnorm"], device="cpu").predict_members(images.images)
    for corner, probabilities in zip(surface.corners, members, strict=True):
        own = -probabilities[torch.arange(32), images.labels].log().mean().item()
        assert corner.train_loss == pytest.approx(own, rel=1e-4)


def test_three_runs_span_a_plane_of_their_first_members(runs):
    names = ["curve", "single1", "single2"]
    surface = measure_surface([runs[name] for name in names], grid=2, device="cpu")
    assert [(c.label, c.run, c.vertex) for c in surface.corners] == [(f"w{k}", names[k], None) for k in range(3)]
    for name, corner in zip(["single0", *names[1:]], surface.corners, strict=True):  # where the curve begins
        network = _small.network(3)
        loss, error = by_hand(network, flat(Run.load(runs[name]), network)[0])
        assert (corner.train_loss, corner.test_error) == (pytest.approx(loss, rel=1e-4), pytest.approx(error))
    assert (surface.members, surface.curve, surface.paths) == ([], [], [])
    assert plot_surface(surface).startswith(b"\x89PNG")


def test_images_are_drawn_with_the_seed(runs):
    found = [
        measure_surface([runs["four"]], grid=2, examples=9, seed=seed, device="cpu").model_dump(exclude={"seconds"})
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert found[0]["train_loss"] != found[2]["train_loss"]
    assert (found[0]["train_examples"], found[0]["test_examples"]) == (9, 9)


def test_a_curve_is_drawn_through_its_plane(runs):
    surface = measure_surface([runs["curve"]], grid=2, device="cpu")
    assert [corner.vertex for corner in surface.corners] == [0, 1, 2]
    w0, bend, w2 = (np.array([corner.x, corner.y]) for corner in surface.corners)
    for t, point in zip(np.linspace(0, 1, 101), surface.curve, strict=True):
        np.testing.assert_allclose(point, (1 - t) ** 2 * w0 + 2 * t * (1 - t) * bend + t**2 * w2, atol=1e-5)
    np.testing.assert_allclose(surface.members, surface.curve[::25], atol=1e-5)
    ((path),) = surface.paths
    measured = Run.load(runs["curve"]).manifest.metrics["path"]
    assert {name: way.test_error for name, way in path.ways.items()} == {
        name: way["test_error"] for name, way in measured.items()
    }


def test_a_longer_curve_shows_its_ends_around_the_middle_bend(runs, tmp_path):
    path = trained(curve(runs, curve="chain", bends=3, members=2, points=3)).save(tmp_path / "long")
    surface = measure_surface([path], grid=2, device="cpu")
    assert [corner.vertex for corner in surface.corners] == [0, 2, 4]
    assert surface.curve == []


def test_every_path_of_a_complex_has_its_row(runs, tmp_path):
    run = Run.load(runs["curve"])
    way = run.manifest.metrics.pop("path")
    run.manifest.metrics["paths"] = [
        {"name": f"mode {k} to mode {k + 1}", "line": way["line"], "complex": way["curve"]} for k in (1, 2)
    ] + [{"name": "something else", "volume": 3.0}]
    surface = measure_surface([run.save(tmp_path / "complex")], grid=2, device="cpu")
    assert [(path.name, list(path.ways)) for path in surface.paths] == [
        ("mode 1 to mode 2", ["line", "complex"]),
        ("mode 2 to mode 3", ["line", "complex"]),
    ]
    one = surface.model_copy(update={"paths": surface.paths[:1]})
    heights = [Image.open(io.BytesIO(plot_paths(part))).height for part in (one, surface)]
    assert heights[1] > 1.8 * heights[0]


def test_a_logarithmic_axis_has_plain_numbers():
    axes = new_figure(4, 3).subplots()
    axes.plot([0.6, 0.9, 2.5])
    scale_by_log(axes)
    labels = [label.get_text() for minor in (False, True) for label in axes.get_yticklabels(minor=minor)]
    assert {"0.6", "2"} <= set(labels) and not [label for label in labels if "e" in label or "$" in label]


def test_pictures_of_flat_and_of_narrow_planes(runs):
    surface = measure_surface([runs["curve"]], grid=2, device="cpu")
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    named = {"dataset": r"images of $\frac{1$", "architecture": "x" * 90}
    for update in (named, {"train_loss": zeros, "test_error": zeros}, {"y": [0.0, 1e-3]}, {"y": [0.0, 1e3]}):
        assert plot_surface(surface.model_copy(update=update)).startswith(b"\x89PNG")


@pytest.mark.parametrize("height", [0.01, 0.3, 1.0, 3.0, 100.0])
def test_panels_are_of_equal_size_whatever_the_planes_proportions(runs, height):
    surface = measure_surface([runs["curve"]], grid=2, device="cpu")
    figure = draw_surface(surface.model_copy(update={"x": [0.0, 1.0], "y": [0.0, height]}))
    figure.draw_without_rendering()
    sizes = [axes.get_window_extent().size for axes in figure.axes[:2]]
    assert np.ptp(sizes) < 1  # pixel: both are the same square
    assert sizes[0][0] > 350
    for axes in figure.axes[:2]:
        assert axes.get_xlim()[0] <= 0 and axes.get_xlim()[1] >= 1
        assert axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] >= height
        scales = [np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())]
        said = "times as large" in axes.get_xlabel() + axes.get_ylabel()
        assert said == (scales[0] != pytest.approx(scales[1]))


def test_what_cannot_be_drawn_is_refused(runs, tmp_path, monkeypatch):
    draw = lambda names, *rest, **options: measure_surface(  # noqa: E731
        [runs[name] for name in names], *rest, device="cpu", **options
    )
    for arguments, message in (
        ((["single0", "single1"],), "takes one run or three, not 2"),
        ((["single0"],), "has 1 vertex and a plane takes three: name three runs"),
        ((["four"], [0, 1, 1]), "three different ones of 0 to 3 of .*four, such as 0,1,2: not 0,1,1"),
        ((["four"], [0, 1, 4]), "not 0,1,4"),
        ((["four"], [0, 1, -1]), "not 0,1,-1"),
        ((["four"], [0, 1]), "not 0,1"),
        ((["single0", "single1", "single2"], [0, 1, 2]), "--vertices chooses among the vertices of one run"),
        ((["single0", "single1", "single0"],), "on one line, or two are the same"),
        ((["single0", "single1", "batchnorm"],), "name three runs of one network"),
    ):
        with pytest.raises(UsageError, match=message):
            draw(*arguments)
    for options, message in (
        ({"grid": 1}, "grid must be at least 2, not 1"),
        ({"margin": -0.1}, "margin must be at least 0, not -0.1"),
        ({"margin": float("nan")}, "margin must be "),
        ({"examples": 0}, "examples must be at least 1, not 0"),
        ({"batchnorm_examples": 1}, "batchnorm_examples must be at least 2, not 1"),
    ):
        with pytest.raises(UsageError, match=message):
            draw(["four"], **options)
    with pytest.raises(DivergedError, match="choose a lower --margin"):
        draw(["four"], margin=1e38)

    other = dataclasses.replace(dataset(), title="other")
    paths = [runs["single0"], runs["single1"]]
    paths.append(trained(DeepEnsemble(members=1), dataset=other).save(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"trained on other and .*single0 on small.*: name three runs of one dataset"):
        measure_surface(paths, device="cpu")
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset(train=31))
    with pytest.raises(DataError, match="is not what the run was trained on, or has changed since"):
        draw(["four"])


def test_points_on_one_line_span_no_plane():
    w = torch.randn(2, 50)
    for third in (w[0], w[1], 0.3 * w[0] + 0.7 * w[1]):
        with pytest.raises(UsageError, match="on one line"):
            plane(torch.stack([*w, third]).double())


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_from_end_to_end(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("surface", runs["curve"], "--grid", 3, "--device", "cpu", "--json", "also.json")
    assert result.exit_code == 0, result.output
    for part in ("w0 (curve): train loss", "lowest on the plane", "highest on the plane", "surface.png, path.png"):
        assert part in result.stdout
    assert "surface: 12 of 12 points" in result.stderr
    ((folder),) = (tmp_path / "surfaces").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["files.sha256", "path.png", "surface.json", "surface.png"]
    text = (folder / "surface.json").read_text()
    assert text == (tmp_path / "also.json").read_text()
    surface = Surface.model_validate_json(text, strict=True)
    assert json.loads(text)["paths"][0]["ways"].keys() == {"line", "curve"}
    assert np.shape(surface.train_loss) == np.shape(surface.test_error) == (3, 3)

    singles = [runs[f"single{seed}"] for seed in range(3)]
    result = call("surface", *singles, "--grid", 2, "--device", "cpu", "--out", "of-three")
    assert result.exit_code == 0, result.output
    assert "w2 (single2): train loss" in result.stdout
    assert sorted(path.name for path in (tmp_path / "of-three").iterdir()) == [
        "files.sha256",
        "surface.json",
        "surface.png",
    ]


def test_bad_input_gets_one_clear_line(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    for arguments, message in (
        ([], "no run in runs: train one first"),
        ([runs["four"], "--vertices", "a,b,c"], "--vertices takes three numbers, such as 0,1,2: not 'a,b,c'"),
        ([runs["four"], "--out", "file/surface"], "cannot write to file"),
        ([runs["four"], "--device", "nothing"], "cannot compute on the device 'nothing'"),
    ):
        result = call("surface", *arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert not (tmp_path / "surfaces").exists()
