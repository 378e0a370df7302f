from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from ensembler import load_dataset
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError, CorruptError, ExportError, UsageError
from ensembler.run import Run
from ensembler.serve import Runtime, export_run
from ensembler.serve.export import graphs, writer
from ensembler.serve.http import page
from ensembler.serve.runtime.manifest import Precision, read_bundle
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.storage import artefact
from ensembler.task import Task
from ensembler.trainers import DeepEnsemble
from tests._runs import CLASSES, SHAPE, make_run
from tests._small import NEWER, dataset
from tests._training import make

BUNDLE_FILES = ["manifest.json", "manifest.sha256", *(f"member-00{m}.onnx" for m in range(3)), "probe.npz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and bundles of two architectures, 3 members each: without and with buffers."""
    folder = tmp_path_factory.mktemp("export")
    for architecture in ("cnn", "resnet20"):
        export_run(make_run(folder / "runs" / architecture, architecture), folder / architecture)
    return folder


@pytest.mark.parametrize("architecture", ["cnn", "resnet20"])
def test_members_agree_with_pytorch_at_any_batch(folder: Path, architecture: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (15, *SHAPE), dtype=np.uint8)
    expected = Ensemble.load(folder / "runs" / architecture, device="cpu").predict_members(images).numpy()
    runtime = Runtime.load(folder / architecture)
    for part in (slice(0, 1), slice(1, 3), slice(3, 10), slice(0, 15)):
        found = runtime.predict_members(images[part])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:, part], atol=1e-5)


def test_each_member_has_its_own_weights_and_buffers(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    cnn = Runtime.load(folder / "cnn").predict_members(images)
    resnet = Runtime.load(folder / "resnet20").predict_members(images)
    assert np.array_equal(cnn[0], cnn[1])  # the same coefficients, and no buffers
    assert np.abs(resnet[0] - resnet[1]).max() > 0.01  # the same coefficients, other BatchNorm statistics
    for members in (cnn, resnet):
        assert np.abs(members[0] - members[2]).max() > 0.01


@pytest.mark.parametrize("architecture", ["cnn", "resnet20"])
def test_the_batch_of_every_graph_is_symbolic(folder: Path, architecture: str) -> None:
    for path in sorted((folder / architecture).glob("*.onnx")):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        (images,), (logits,) = model.graph.input, model.graph.output
        taken, given = images.type.tensor_type, logits.type.tensor_type
        assert (images.name, taken.elem_type) == ("images", onnx.TensorProto.UINT8)
        assert (logits.name, given.elem_type) == ("logits", onnx.TensorProto.FLOAT)
        assert taken.shape.dim[0].dim_param == given.shape.dim[0].dim_param != ""
        assert [dim.dim_value for dim in taken.shape.dim[1:]] == SHAPE
        assert [dim.dim_value for dim in given.shape.dim[1:]] == [len(CLASSES)]


def test_the_manifest_says_what_was_exported(folder: Path) -> None:
    manifest = Runtime.load(folder / "cnn").manifest
    run = json.loads((folder / "runs" / "cnn" / "manifest.json").read_text())
    assert (manifest.method, manifest.architecture, manifest.members) == ("spro-simplex", "cnn", 3)
    assert (manifest.classes, manifest.image_shape) == (CLASSES, SHAPE)
    assert manifest.training_cost == run["cost"]
    assert manifest.run.sha256 == artefact.sha256(folder / "runs" / "cnn" / "manifest.json")
    assert 0 < manifest.max_difference < 1e-5
    assert manifest.opset >= 18


def test_no_file_holds_a_path_of_this_machine(folder: Path) -> None:
    for path in (folder / "cnn").iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(__file__).parents[1]).encode() not in content
        assert str(folder).encode() not in content


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_flipped_byte_is_found_and_named(folder: Path, tmp_path: Path, name: str) -> None:
    assert sorted(path.name for path in (folder / "cnn").iterdir()) == BUNDLE_FILES
    bundle = shutil.copytree(folder / "cnn", tmp_path / "bundle")
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    named = "manifest.json" if name == "manifest.sha256" else name
    with pytest.raises(CorruptError, match=rf"{named} has changed since it was written"):
        Runtime.load(bundle)


def test_an_existing_folder_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(UsageError, match="already exists"):
        export_run(folder / "runs" / "cnn", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_missing_run_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no run at"):
        export_run(tmp_path / "nothing", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_member_that_differs_is_named_and_leaves_no_bundle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "replace_weights", lambda model, weights: None)
    with pytest.raises(ExportError, match=r"resnet20: member 2: ONNX differs from PyTorch by .* at a batch of \d"):
        export_run(folder / "runs" / "resnet20", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_what_float32_cannot_tell_is_no_fault_of_the_graph(tmp_path: Path) -> None:
    """Logits so large that they are rounded to steps of whole probabilities, in PyTorch as in ONNX Runtime."""
    path = make_run(tmp_path / "run", "tests._networks:rounded", members=2)
    bundle = export_run(path, tmp_path / "bundle")
    manifest = read_bundle(bundle)
    assert 1e-4 < manifest.max_difference <= manifest.tolerance
    assert verify_bundle(bundle).allowed == manifest.tolerance


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_wrong_graph_is_refused_whatever_float64_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also where the network cannot be made double."""
    if kind == "float32":
        monkeypatch.setattr(torch.nn.Module, "double", lambda self: self)
    monkeypatch.setattr(writer, "replace_weights", lambda model, weights: None)
    with pytest.raises(ExportError, match="more than 1e-04: the network computes something"):
        export_run(folder / "runs" / "resnet20", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("branch", r"a branch on a value of the images \(_networks\.py:\d+\): compute both .* with torch\.where"),
        ("loop", r"a branch on a value of the images \(_networks\.py:\d+\): compute both .* with torch\.where"),
        ("median", r"no ONNX function for aten\.median\.dim: take it from the values that sort\(\) gives"),
        (
            "max_pool",
            r"no ONNX function for aten\.adaptive_max_pool2d: use max_pool2d with a kernel, or .* average pool",
        ),
        ("solve", r"no ONNX function for aten\._linalg_solve_ex: compute that with other operations of PyTorch"),
        ("bags", r"NotImplementedError: nn\.EmbeddingBag with offsets .*: use nn\.Embedding, and sum over each row.*"),
        ("packed", r"TypeError: .* \(_networks\.py:\d+\): give recurrent layers whole batches, not packed sequences"),
        ("scripted", r"TypeError: .* \(_networks\.py:\d+\): leave out torch\.jit\.script, .*"),
    ],
)
def test_what_stopped_the_exporter_is_said_in_one_line(tmp_path: Path, kind: str, reason: str) -> None:
    record = make(DeepEnsemble(members=1), architecture=f"tests._networks:{kind}", epochs=0.1).save(tmp_path / "run")
    with pytest.raises(ExportError, match=f"with a free batch: {reason}$") as raised:
        export_run(record, tmp_path / "bundle", use_data=False)
    assert str(raised.value).isprintable()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("float32", r"ONNX Runtime cannot run this network \(.*bfloat16.*\): leave out autocast in its forward"),
        ("int8", r"this network cannot be converted to int8 \(.+\): use float32"),
    ],
)
def test_a_graph_that_onnx_runtime_cannot_run_is_named_with_its_mend(
    tmp_path: Path, precision: Precision, sentence: str
) -> None:
    run = make(DeepEnsemble(members=1), architecture="tests._networks:autocast", epochs=0.1).save(tmp_path / "run")
    with pytest.raises(ExportError, match=sentence):
        export_run(run, tmp_path / "bundle", precision=precision, dataset=dataset(), use_data=precision != "float32")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("batch", [(2, 2), ("batch", 2), ("batch", "other")])
def test_a_graph_with_a_frozen_batch_is_refused(batch: tuple[int | str, int | str]) -> None:
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, [batch[0], *SHAPE])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch[1], 5])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "frozen", [images], [logits]))
    with pytest.raises(ExportError, match=r"the network must take any batch .*; len\(x\) fixes its size, x.shape"):
        graphs._check_shapes(model, SHAPE, 5)


ODD_NETWORKS = '''
import torch
from torch import nn


class Odd(nn.Module):
    """Tied weights, a constant that no state holds, a parameter that is used or not, maybe a complex buffer."""

    def __init__(self, classes, unused, turn=None):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, classes)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
        self.register_buffer("turn", turn)
        if unused:
            self.unused = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        x = x.mean(dim=(2, 3)) * self.scale
        x = x if self.turn is None else (x * self.turn).abs()
        return self.head(torch.relu(self.second(self.first(x))))


class Fixed(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head(x.mean(dim=(2, 3)).reshape(10 if len(x) == 10 else 2, 3))


def tied(num_classes):
    return Odd(num_classes, unused=False)


def unused(num_classes):
    return Odd(num_classes, unused=True)


def turned(num_classes):
    return Odd(num_classes, unused=False, turn=torch.tensor([1 + 2j, 3 - 1j, 2j]))


def fixed(num_classes):
    return Fixed(num_classes)
'''


@pytest.fixture
def odd_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "odd_networks.py").write_text(ODD_NETWORKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("factory", "traces"), [("tied", 1), ("unused", 3), pytest.param("turned", 3, marks=NEWER)])
def test_a_weight_that_no_graph_holds_has_every_member_traced(
    odd_networks: Path, monkeypatch: pytest.MonkeyPatch, factory: str, traces: int
) -> None:
    traced = []
    trace = writer.trace
    monkeypatch.setattr(writer, "trace", lambda *args: traced.append(1) or trace(*args))
    run = make_run(odd_networks / "run", f"odd_networks:{factory}")
    images = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    found = Runtime.load(export_run(run, odd_networks / "bundle")).predict_members(images)
    np.testing.assert_allclose(found, Ensemble.load(run, device="cpu").predict_members(images).numpy(), atol=1e-5)
    assert len(traced) == traces


def test_a_network_that_fixes_its_batch_is_refused(odd_networks: Path) -> None:
    run = make_run(odd_networks / "run", "odd_networks:fixed")
    with pytest.raises(UsageError, match=r"^odd_networks:fixed .* must take a batch of any size, also of one$"):
        export_run(run, odd_networks / "bundle")
    assert not (odd_networks / "bundle").exists()


def test_the_page_shows_test_images_of_a_public_dataset(odd_networks: Path) -> None:
    digits = load_dataset("digits")
    run = make_run(odd_networks / "run", "odd_networks:tied", dataset=digits)
    bundle = export_run(run, odd_networks / "bundle", examples=10)
    *images, pattern = page.examples(bundle, read_bundle(bundle))["examples"]
    assert [one["name"] for one in images] == [f"test image {number}" for number in range(1, 9)]
    assert pattern["name"] == "a random pattern, of no class"
    for one in images:
        pixels = np.frombuffer(base64.b64decode(one["pixels"]), np.uint8).reshape(SHAPE)
        assert (digits.test.images.numpy() == pixels).all(axis=(1, 2, 3)).any()


def test_a_task_that_is_not_served_is_refused(odd_networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (odd_networks / "odd_tasks.py").write_text(
        "from ensembler.task import Task\nclass Other(Task):\n    name = 'other'\n"
        + "".join(f"    {name} = lambda self, *given: None\n" for name in sorted(Task.__abstractmethods__))
    )
    run = Run.load(make_run(odd_networks / "run", "odd_networks:tied"))
    run.manifest.task = "odd_tasks:Other"
    with pytest.raises(UsageError, match="only classifiers of images can be exported"):
        export_run(run.save(odd_networks / "other"), odd_networks / "bundle")


def test_the_command_exports_the_latest_run_and_says_what_is_next(
    odd_networks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ensembler.cli import app

    make_run(odd_networks / "runs" / "mine", "odd_networks:tied", members=2)
    result = CliRunner().invoke(app, ["export"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "ensembler serve bundles/mine" in result.output
    assert "2 x odd_networks:tied" in result.output
    order = re.search(r"order +by .*: ([\d, ]+)", result.output)
    assert order and sorted(map(int, order[1].split(","))) == [1, 2]  # members count from 1, as everywhere
    assert Runtime.load("bundles/mine").members == 2
    assert capfd.readouterr() == ("", "")  # the exporter's chatter is not shown
    again = CliRunner().invoke(app, ["export"])
    assert again.exit_code == 1
    assert "bundles/mine already exists" in again.output
    bundle = CliRunner().invoke(app, ["export", "bundles/mine"])  # whose own name is taken, too
    assert bundle.exit_code == 1
    assert "is a bundle, not a run" in " ".join(bundle.output.split())
