"""Simplexes of a run: measured against networks loaded by hand, projected, drawn, and refused."""

from __future__ import annotations

import io
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from ensembler.eval.options import SurfaceOptions
from ensembler.eval.report import simplex_figures
from ensembler.eval.simplexes import FACES, lattice, measure_simplexes
from ensembler.run import Run, Sampling
from ensembler.trainers import DeepEnsemble, Simplex
from tests import _small
from tests._small import dataset
from tests._training import call, make
from tests.test_surface import by_hand, flat


@pytest.fixture(autouse=True)
def _images(monkeypatch):
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset(train=32))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    four = make(DeepEnsemble(members=4), dataset(train=32))
    paths = {"four": four.save(folder / "four")}
    four.manifest.sampling = Sampling(simplexes=[[0, 2, 3], [1, 2, 3]], concentration=1.0)
    paths["complex"] = four.save(folder / "complex")
    paths["batchnorm"] = make(
        Simplex(vertices=2, vertex_epochs=1, members=2), dataset(train=32), architecture="tests._small:batchnorm"
    ).save(folder / "batchnorm")
    paths["one"] = make(DeepEnsemble(members=1), dataset(train=32)).save(folder / "one")
    return paths


def measure(path, **options):
    return measure_simplexes(path, SurfaceOptions(device="cpu", **options))


def test_every_point_is_the_network_that_lies_there(runs):
    found = measure(runs["complex"], grid=4)
    W = flat(Run.load(runs["complex"]), _small.network(3))
    assert [edge.ends for edge in found.edges] == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [face.corners for face in found.faces] == [(0, 2, 3), (1, 2, 3)]
    checked = []
    for edge in found.edges:
        assert edge.t == pytest.approx([0, 1 / 3, 2 / 3, 1])
        weights = [(1 - t) * W[edge.ends[0]] + t * W[edge.ends[1]] for t in edge.t]
        checked += zip(weights, edge.train_loss, edge.test_error, strict=True)
    for face in found.faces:
        assert len(face.points) == 10
        weights = list(torch.tensor(face.points, dtype=torch.float64) @ W[list(face.corners)])
        checked += zip(weights, face.train_loss, face.test_error, strict=True)
    checked += [(W[k], vertex.train_loss, vertex.test_error) for k, vertex in enumerate(found.vertices)]
    for weights, loss, error in checked:
        expected = by_hand(_small.network(3), weights)
        assert (loss, error) == (pytest.approx(expected[0], rel=1e-3), pytest.approx(expected[1]))


def test_batchnorm_statistics_are_recomputed_between_the_vertices(runs):
    found = measure(runs["batchnorm"], grid=3)
    first, second = flat(Run.load(runs["batchnorm"]), _small.batchnorm(3))
    ((edge),) = found.edges
    loss, _ = by_hand(_small.batchnorm(3), (first + second) / 2)
    assert edge.train_loss[1] == pytest.approx(loss, rel=1e-3)


def test_four_vertices_are_projected_exactly_and_all_are_one_simplex_without_others(runs):
    found = measure(runs["four"], grid=2)
    W = flat(Run.load(runs["four"]), _small.network(3))
    places = torch.tensor([vertex.place for vertex in found.vertices], dtype=torch.float64)
    torch.testing.assert_close(torch.pdist(places), torch.pdist(W), rtol=1e-6, atol=0)
    assert sum(found.shares) == pytest.approx(1)
    assert [edge.ends for edge in found.edges] == list(combinations(range(4), 2))
    assert len(found.faces) == 4
    assert found.faces_left_out == 0


def test_few_faces_of_many_are_measured_and_the_rest_is_said(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("ensembler.eval.simplexes.FACES", 3)
    result = call("surface", runs["four"], "--3d", "--grid", 2, "--device", "cpu", "--out", tmp_path / "few", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "not measured: 1 more face" in result.stdout
    assert len(json.loads((tmp_path / "few" / "simplexes.json").read_text())["faces"]) == 3
    assert FACES == 12


def test_the_small_triangles_of_a_face_cover_it():
    for parts in (1, 2, 5):
        points = [tuple(share / parts for share in one) for one in lattice(parts, 3)]
        face = simplex_figures.Face(corners=(0, 1, 2), points=points, train_loss=[0.0], test_error=[0.0])
        triangles = simplex_figures._triangles(face)
        assert len(triangles) == parts**2
        areas = np.abs(np.linalg.det(np.array(points)[triangles]))
        np.testing.assert_allclose(areas, 1 / parts**2)


@pytest.mark.parametrize("name", ["four", "complex", "batchnorm"])
def test_pictures_of_simplexes(runs, name):
    found = measure(runs[name], grid=3)
    drawn = [simplex_figures.plot_simplexes(found), simplex_figures.plot_edges(found)]
    drawn += [simplex_figures.plot_faces(found)] if found.faces else []
    for content in drawn:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges == 255).all()  # nothing is cut
        assert pixels.std() > 5
    assert len(drawn) == 2 + (name != "batchnorm")


def test_what_is_no_simplex_is_refused(runs, tmp_path):
    for arguments, said in (
        ([runs["one"]], "has 1 vertex, and a simplex has two or more: name a run of several"),
        ([runs["four"], "--vertices", "0,1,2"], "--3d draws the simplexes of one run, all of them: leave out"),
        ([runs["four"], runs["one"]], "--3d draws the simplexes of one run, all of them: leave out"),
    ):
        result = call("surface", *arguments, "--3d", "--out", tmp_path / "none", "--device", "cpu")
        assert result.exit_code == 1
        assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "none").exists()
