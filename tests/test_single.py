"""The whole ensemble in one ONNX file, and as a model of Triton: the numbers of the runtime, without this package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

from ensembler import calibration, calibration_maps
from ensembler.cli import app
from ensembler.errors import ArtefactError, ExportError, UsageError
from ensembler.serve import Runtime, export_run
from ensembler.serve.export import single
from ensembler.serve.export.triton import write_triton
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.serve.runtime.verify import verify_bundle
from tests._runs import make_bundle
from tests._service import make_calibrated, tiny_images
from tests.test_bundles import batchnorm, calibrate, dataset, run, traced  # noqa: F401  fixtures
from tests.test_tampered import reseal

OUTPUTS = ["probabilities", "predictive_entropy", "expected_entropy", "mutual_information", "members"]


def ask(file: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"images": images}), strict=True)
    )


def assert_the_runtimes_numbers(file: Path, bundle: Path, images: np.ndarray) -> None:
    loaded = Runtime.load(bundle)
    scaled = loaded.manifest.input == "float"
    for batch in (1, 2, 7):
        expected = loaded.predict(images[:batch])
        found = ask(file, images[:batch] / np.float32(255) if scaled else images[:batch])
        np.testing.assert_allclose(found["members"], expected.members.swapaxes(0, 1), atol=1e-6)
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-6)
        for name in OUTPUTS[1:4]:
            np.testing.assert_allclose(found[name], getattr(expected, name), atol=1e-6, err_msg=name)
        assert ("calibrated" in found) == (loaded.calibration is not None)
        if loaded.calibration is not None:
            calibrated = calibration.apply(loaded.calibration, expected.probabilities)
            np.testing.assert_allclose(found["calibrated"], calibrated, atol=1e-6)
            assert np.abs(found["calibrated"] - found["probabilities"]).max() > 1e-3


@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("run", {}),
        ("batchnorm", {}),
        ("run", {"pixels": "float"}),
        ("run", {"precision": "int8"}),
        ("batchnorm", {"precision": "float16"}),
    ],
)
def test_one_file_gives_the_runtimes_numbers(
    which: str,
    options: Any,
    dataset: Any,  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    own = shutil.copytree(request.getfixturevalue(which), tmp_path / "run")
    calibrate(own)
    made = export_run(own, tmp_path / "bundle", layout="single", **options)
    shutil.copy(made / "ensemble.onnx", tmp_path / "alone.onnx")  # it needs no file beside it
    assert_the_runtimes_numbers(tmp_path / "alone.onnx", made, dataset.test.images.numpy())
    found = verify_bundle(made)
    assert found.single is not None and found.single <= found.allowed
    props = {entry.key: entry.value for entry in onnx.load(tmp_path / "alone.onnx").metadata_props}
    assert json.loads(props["classes"]) == ["bottom", "middle", "top"]


def test_a_calibration_that_is_no_temperature_is_left_out_and_it_is_said(run: Path, tmp_path: Path) -> None:  # noqa: F811
    own, said = shutil.copytree(run, tmp_path / "run"), list[str]()
    calibrate(own, calibration_maps.Beta(a=[1.0] * 3, b=[1.0] * 3, c=[0.0] * 3))
    made = export_run(own, tmp_path / "bundle", layout="single", say=said.append)
    assert said == ["ensemble.onnx has no calibrated probabilities: the calibration is by beta, not by temperature."]
    names = [output.name for output in onnx.load(made / "ensemble.onnx").graph.output]
    assert names == OUTPUTS
    assert Runtime.load(made).calibration is not None


def test_one_member_has_no_mutual_information(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "one", members=1)
    onnx.save(single.single_graph(bundle, read_bundle(bundle)), tmp_path / "one.onnx")
    found = ask(tmp_path / "one.onnx", tiny_images(3))
    assert "mutual_information" not in found
    np.testing.assert_allclose(found["predictive_entropy"], found["expected_entropy"], atol=1e-7)


def test_certain_members_give_no_nan(tmp_path: Path) -> None:
    """Logits of thousands: probabilities of exactly 0 and 1."""
    weights = np.random.default_rng(0).normal(0, 100, (3, 3, 5)).astype(np.float32)
    bundle = make_bundle(tmp_path / "sure", weights=weights)
    onnx.save(single.single_graph(bundle, read_bundle(bundle)), tmp_path / "sure.onnx")
    found, expected = ask(tmp_path / "sure.onnx", tiny_images(20)), Runtime.load(bundle).predict(tiny_images(20))
    assert (expected.members == 1.0).any()
    for name in OUTPUTS[1:4]:
        np.testing.assert_allclose(found[name], getattr(expected, name), atol=1e-6)


def test_a_file_that_differs_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(single, "merge", lambda models, merge=single.merge: merge(models[::-1]))
    with pytest.raises(ExportError, match=r"ensemble.onnx differs from the members by .*: export without --layout"):
        export_run(run, tmp_path / "bundle", layout="single", use_data=False)
    assert list(tmp_path.iterdir()) == []


def test_verify_covers_it(run: Path, tmp_path: Path) -> None:  # noqa: F811
    made = export_run(run, tmp_path / "bundle", layout="single", use_data=False)
    model = onnx.load(made / "ensemble.onnx")
    entropies = [output for output in model.graph.output if output.name.endswith("entropy")]
    entropies[0].name, entropies[1].name = entropies[1].name, entropies[0].name
    for node in model.graph.node:
        swapped = {"predictive_entropy": "expected_entropy", "expected_entropy": "predictive_entropy"}
        node.output[0] = swapped.get(node.output[0], node.output[0])
    onnx.save(model, made / "ensemble.onnx")
    reseal(made)
    with pytest.raises(ArtefactError, match=r"ensemble.onnx differs by"):
        verify_bundle(made)


def test_a_model_of_triton(tmp_path: Path) -> None:
    bundle = make_calibrated(tmp_path / "bundle")
    result = CliRunner().invoke(
        app, ["triton", str(bundle), "--out", str(tmp_path / "models"), "--name", "shapes", "--max-batch", "8"]
    )
    assert result.exit_code == 0, result.output
    folder = tmp_path / "models" / "shapes"
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert held == {"config.pbtxt", "labels.txt", "1/model.onnx"}
    assert (folder / "labels.txt").read_text().split("\n") == [*(f"class {n}" for n in range(5)), ""]
    config = (folder / "config.pbtxt").read_text()
    assert config.count("{") == config.count("}") and config.count("[") == config.count("]")
    for words in ('name: "shapes"\n', 'backend: "onnxruntime"', "max_batch_size: 8", "dynamic_batching {"):
        assert words in config
    # Every input and output is declared with its type and its shape, but for the batch.
    model = onnx.load(folder / "1" / "model.onnx")
    puts = re.findall(
        r'name: "(\w+)"\n\s+data_type: (\w+)\n\s+dims: \[ ([\d, ]+) \](\n\s+reshape { shape: \[ \] })?', config
    )
    declared = {
        name: (kind, [] if reshape else [int(n) for n in dims.split(",")]) for name, kind, dims, reshape in puts
    }
    kinds = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    assert declared == {
        put.name: (
            kinds[put.type.tensor_type.elem_type],
            [dim.dim_value for dim in put.type.tensor_type.shape.dim[1:]],
        )
        for put in (*model.graph.input, *model.graph.output)
    }
    assert all(put.type.tensor_type.shape.dim[0].dim_param for put in (*model.graph.input, *model.graph.output))
    assert list(declared) == ["images", *OUTPUTS, "calibrated"]
    loaded = Runtime.load(bundle).predict(tiny_images(8))
    found = ask(folder / "1" / "model.onnx", tiny_images(8))
    np.testing.assert_allclose(found["probabilities"], loaded.probabilities, atol=1e-6)
    np.testing.assert_allclose(found["mutual_information"], loaded.mutual_information, atol=1e-6)
    with pytest.raises(UsageError, match="already exists"):
        write_triton(bundle, tmp_path / "models", "shapes")
    for name in ("../x", "", 'a"b', ".hidden", "a\nb"):
        with pytest.raises(UsageError, match="is not a name of a model"):
            write_triton(bundle, tmp_path / "models", name)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["shapes"]


def test_the_file_needs_nothing_but_onnx_runtime(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    write_triton(bundle, tmp_path / "models", "shapes")
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "print(session.run(['mutual_information'], {'images': numpy.zeros((2, 4, 6, 3), numpy.uint8)})[0].shape)\n"
        "print('ensembler' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "models" / "shapes" / "1" / "model.onnx")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(2,)", "False"]
