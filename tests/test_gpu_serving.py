"""What ONNX Runtime is told on a machine with a GPU: here it computes on the CPU, and what it was told is noted."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.errors import ArtefactError, ExportError, UsageError
from ensembler.serve import Runtime, export_run
from ensembler.serve.export import precision as precision_module
from ensembler.serve.http.answers import metadata
from ensembler.serve.http.settings import Settings
from ensembler.serve.runtime import runtime as runtime_module
from ensembler.serve.runtime import sessions, strategies, tune
from ensembler.serve.runtime.gpu import GpuOptions
from ensembler.serve.runtime.manifest import PrecisionCheck, Tuning, read_bundle
from ensembler.storage import artefact
from tests._runs import TINY, make_bundle
from tests.test_bundles import dataset, run, traced  # noqa: F401  fixtures
from tests.test_runtime import by_hand, tiny_images

CUDA = "CUDAExecutionProvider"


class Gpu:
    """A machine with one GPU, as ONNX Runtime shows it; each pass is noted as (member, images, number of its graph).

    ``replays`` says what a captured pass does: ``"right"``, ``"stale"`` (the answer of the first images again),
    ``"fails"``.
    """

    def __init__(self) -> None:
        self.opened: list[Any] = []
        self.passes: list[tuple[int, int, str]] = []
        self.uploads: list[tuple[int, ...]] = []
        self.replays, self.refuses, self.off = "right", set[str](), 0.0
        self.count = 1

    def open(self, graph: Path, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        name, given = providers[0] if isinstance(providers[0], tuple) else (providers[0], {})
        if "graphs" in self.refuses and given.get("enable_cuda_graph") == "1":
            raise RuntimeError("not all nodes are on the CUDA provider")
        if "gpu" in self.refuses and name == CUDA:
            raise RuntimeError("no kernel image is available")
        self.opened.append((name, given))
        return _Session(self, name, given, INFERENCE_SESSION(graph, options, providers=["CPUExecutionProvider"]))


INFERENCE_SESSION = onnxruntime.InferenceSession


class _Session:
    def __init__(self, gpu: Gpu, name: str, given: dict[str, str], session: Any) -> None:
        self._gpu, self._name, self._given, self._session = gpu, name, given, session
        self._number = len(gpu.opened) - 1
        self._captured: dict[str, tuple[Any, np.ndarray]] = {}
        self.io_binding = lambda: _Binding(session.io_binding())
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def get_providers(self) -> list[str]:
        return [self._name]

    def run(self, names: Any, feed: dict[str, Any], options: Any) -> Any:
        return self._session.run(names, feed)

    def run_with_iobinding(self, binding: _Binding, options: Any) -> None:
        number = options.get_run_config_entry("gpu_graph_id")
        images, logits = binding.given["images"], binding.given["logits"]
        self._gpu.passes.append((self._number, images.shape()[0], number))
        assert number == "-1" or (number != "0" and self._given["enable_cuda_graph"] == "1")
        self._session.run_with_iobinding(binding.own)
        if self._gpu.off and self._given["use_tf32"] == "1":
            rng = np.random.default_rng(0)
            logits.update_inplace(logits.numpy() + rng.normal(0, self._gpu.off, logits.shape()).astype(np.float32))
        if number != "-1":
            held, first = self._captured.setdefault(number, (binding, logits.numpy().copy()))
            assert held is binding, "a graph replays at the addresses that it was captured with"
            if self._gpu.replays == "fails":
                raise RuntimeError("operation not permitted when stream is capturing")
            if self._gpu.replays == "stale":
                logits.update_inplace(first)


class _Binding:
    def __init__(self, own: Any) -> None:
        self.own, self.given = own, dict[str, Any]()

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.own.bind_ortvalue_input(name, value)
        self.given[name] = value

    bind_ortvalue_output = lambda self, name, value: (  # noqa: E731
        self.own.bind_ortvalue_output(name, value),
        self.given.update({name: value}),
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(onnxruntime, "InferenceSession", found.open)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(sessions, "gpu_count", lambda: found.count)
    monkeypatch.setattr(strategies, "GpuPasses", partial(_in_main_memory, strategies.GpuPasses))
    update = onnxruntime.OrtValue.update_inplace
    monkeypatch.setattr(
        onnxruntime.OrtValue,
        "update_inplace",
        lambda value, array: (found.uploads.append((*array.shape, str(array.dtype))), update(value, array))[1],
    )
    return found


def _in_main_memory(passes: type, sessions: Any, outputs: Any, device_id: int, memory: str) -> Any:
    assert memory == "cuda"
    return passes(sessions, outputs, 0, "cpu")


def timed(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Measuring takes these seconds: each way is run twice all the same."""

    def measure(runs: Any, limit: float) -> dict[str, list[float]]:
        for ask in [*runs.values(), *runs.values()]:
            ask()
        return {name: [seconds[name]] * 5 for name in runs}

    monkeypatch.setattr(tune, "measure", measure)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("gpu") / "bundle")


def assert_right(loaded: Runtime, batch: int) -> None:
    found = loaded.predict_members(tiny_images(batch))
    np.testing.assert_allclose(found, by_hand(tiny_images(batch), 3), atol=1e-6)


def rewritten(path: Path, bundle: Path, **changes: Any) -> Path:
    manifest = read_bundle(bundle).model_copy(update=changes)
    with artefact.write(path, manifest.model_dump()) as folder:
        for file in manifest.files:
            (folder / file).write_bytes((bundle / file).read_bytes())
    return path


def test_the_options_of_the_provider_are_what_was_asked_for(bundle: Path, gpu: Gpu) -> None:
    Runtime.load(bundle)
    assert gpu.opened == 3 * [
        (
            CUDA,
            {
                "device_id": "0",
                "arena_extend_strategy": "kSameAsRequested",
                "use_tf32": "0",
                "cudnn_conv_algo_search": "HEURISTIC",
                "enable_cuda_graph": "1",
            },
        )
    ]
    gpu.count = 3
    asked = GpuOptions(device_id=2, gpu_mem_limit=3_000_000, arena_extend_strategy="kNextPowerOfTwo")
    assert Runtime.load(bundle, gpu=asked).device == "cuda"
    given = gpu.opened[-1][1]
    assert (given["device_id"], given["arena_extend_strategy"]) == ("2", "kNextPowerOfTwo")
    assert given["gpu_mem_limit"] == "1000000", "the limit is of all members together"


def test_the_settings_of_the_service_reach_the_provider(bundle: Path, gpu: Gpu) -> None:
    environment = {"ENSEMBLER_BUNDLE": str(bundle), "ENSEMBLER_DEVICE_ID": "0", "ENSEMBLER_GPU_MEM_LIMIT": "6000000"}
    settings = Settings.read(environment | {"ENSEMBLER_ARENA_EXTEND_STRATEGY": "kNextPowerOfTwo"})
    Runtime.load(settings.bundle, gpu=settings)
    given = gpu.opened[0][1]
    assert (given["gpu_mem_limit"], given["arena_extend_strategy"]) == ("2000000", "kNextPowerOfTwo")
    for name, value, expected in (
        ("DEVICE_ID", "-1", "a whole number from 0 up"),
        ("DEVICE_ID", "first", "a whole number from 0 up"),
        ("GPU_MEM_LIMIT", "0", "a whole number from 1 up"),
        ("ARENA_EXTEND_STRATEGY", "kDouble", "kSameAsRequested or kNextPowerOfTwo"),
        ("USE_TF32", "perhaps", "true or false"),
    ):
        with pytest.raises(UsageError, match=f"^ENSEMBLER_{name} must be {expected}, not '{value}'$"):
            Settings.read(environment | {f"ENSEMBLER_{name}": value})


def test_a_gpu_that_is_asked_for_and_is_not_there_is_refused(
    bundle: Path, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"no GPU 1 for ONNX Runtime, which finds 1: choose another device_id"):
        Runtime.load(bundle, gpu=GpuOptions(device_id=1))
    gpu.refuses = {"gpu"}
    with caplog.at_level(logging.WARNING, "ensembler.serve"), pytest.raises(ArtefactError, match="cannot compute on"):
        Runtime.load(bundle, gpu=GpuOptions(device_id=0))
    assert "no kernel image is available" in caplog.text
    assert Runtime.load(bundle).device == "cpu", "nobody asked for it"
    np.testing.assert_allclose(
        Runtime.load(bundle).predict_members(tiny_images(3)), by_hand(tiny_images(3), 3), atol=1e-6
    )
    gpu.count = 0
    with pytest.raises(UsageError, match="no GPU 0 for ONNX Runtime, which finds 0"):
        Runtime.load(bundle, gpu=GpuOptions(device_id=0))


def test_a_graph_that_cannot_be_captured_runs_on_the_gpu_all_the_same(bundle: Path, gpu: Gpu) -> None:
    gpu.refuses = {"graphs"}
    loaded = Runtime.load(bundle)
    assert (loaded.device, gpu.opened[0][1]["enable_cuda_graph"]) == ("cuda", "0")
    assert_right(loaded, 3)


def test_images_are_padded_and_go_up_once_for_all_members(bundle: Path, gpu: Gpu) -> None:
    loaded = Runtime.load(bundle, threads=2)
    assert loaded._members.strategies == ("loop",), "no batch is split among the threads of the CPU"
    loaded._members.largest = 32
    for batch in (1, 5, 17, 32):
        gpu.passes.clear(), gpu.uploads.clear()
        np.testing.assert_allclose(
            loaded.predict_members(tiny_images(batch)), by_hand(tiny_images(batch), 3), atol=1e-6
        )
        size = 1 << (batch - 1).bit_length()
        assert gpu.uploads == [(size, *TINY, "uint8")]
        assert gpu.passes == [(member, size, "-1") for member in range(3)]
    gpu.passes.clear()
    assert_right(loaded, 70)
    assert [size for _, size, _ in gpu.passes] == 9 * [32]
    loaded.predict(tiny_images(5), members=2)
    assert gpu.passes[-2:] == [(0, 8, "-1"), (1, 8, "-1")]


def test_every_size_has_run_before_the_runtime_is_ready(
    bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, eager=1.0, replayed=1.0)
    loaded = Runtime.load(bundle)
    assert not loaded.ready
    loaded.warm_up(largest=20)
    assert loaded.ready
    assert {size for _, size, _ in gpu.passes} == {1, 2, 4, 8, 16, 32}
    gpu.passes.clear()
    loaded.predict_members(tiny_images(5))
    assert gpu.passes == [(member, 8, "-1") for member in range(3)], "within 4 % a graph is no gain"


def test_graphs_are_replayed_where_they_are_faster_and_right(
    bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timed(monkeypatch, eager=1.0, replayed=0.5)
    for replays, number in (("right", "8"), ("stale", "-1"), ("fails", "-1")):
        gpu.replays = replays
        loaded = Runtime.load(bundle)
        loaded.warm_up(largest=8)
        gpu.passes.clear()
        for batch in (5, 8, 7):
            assert_right(loaded, batch)
        assert {(size, graph) for _, size, graph in gpu.passes} == {(8, number)}, replays
        assert_right(loaded, 9)
        assert gpu.passes[-1][1:] == (16, "-1"), "a size that was not warmed up is not captured while somebody waits"
    assert "not permitted when stream is capturing" in caplog.text


def test_all_members_in_one_graph_are_one_pass(
    run: Path,  # noqa: F811
    tmp_path: Path,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "_SECONDS", 0.0)
    monkeypatch.setattr(
        "ensembler.serve.export.bundle.measure_strategies",
        lambda members, images: Tuning(
            machine="", cpus=2, load=None, device=members.device, members=len(members), winners={1: "merged"}, table=[]
        ),
    )
    loaded = Runtime.load(export_run(run, tmp_path / "bundle", tune=True), threads=2)
    assert loaded._members.strategies == ("loop", "merged")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    gpu.passes.clear()
    together = loaded.predict_members(images)
    assert len(gpu.passes) == 1
    np.testing.assert_allclose(together, loaded._members.ask(images, "loop"), atol=1e-6)
    assert {given["use_tf32"] for _, given in gpu.opened} == {"0"}, "exported under the policy that it is served with"


def test_the_memory_of_the_gpu_is_told(bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, eager=1.0, replayed=1.0)
    free = iter([(8 * 2**30, 2**34), (7 * 2**30, 2**34)])
    monkeypatch.setattr(runtime_module, "gpu_memory", lambda device_id: next(free))
    loaded = Runtime.load(bundle)
    loaded.warm_up(1)
    assert metadata(loaded, {})["inference"]["gpu_memory_bytes"] == 2**30
    gpu.count = 0
    monkeypatch.setattr(runtime_module, "gpu_memory", lambda device_id: None)
    on_cpu = Runtime.load(bundle)
    on_cpu.warm_up()
    assert metadata(on_cpu, {})["inference"]["gpu_memory_bytes"] is None


# --- TF32 ------------------------------------------------------------------------------------------------------------


def test_tf32_is_only_for_a_bundle_that_was_compared_in_it(bundle: Path, tmp_path: Path, gpu: Gpu) -> None:
    with pytest.raises(UsageError, match=r"exported in float32 and not compared in TF32.*export .* --precision tf32"):
        Runtime.load(bundle, gpu=GpuOptions(use_tf32=True))
    check = PrecisionCheck(
        examples=1,
        rank_correlation=1.0,
        least_rank_correlation=0.99,
        accuracy_drop=0.0,
        most_accuracy_drop=0.002,
        calibrated_distance=None,
        most_calibrated_distance=0.01,
    )
    other = rewritten(tmp_path / "tf32", bundle, precision="tf32", precision_check=check)
    for asked, expected in ((None, "1"), (True, "1"), (False, "0")):
        gpu.opened.clear()
        Runtime.load(other, gpu=GpuOptions(use_tf32=asked))
        assert {given["use_tf32"] for _, given in gpu.opened} == {expected}


def test_tf32_is_accepted_within_its_bounds_and_refused_outside(
    run: Path,  # noqa: F811
    tmp_path: Path,
    gpu: Gpu,
) -> None:
    gpu.off = 1e-4
    made = export_run(run, tmp_path / "bundle", precision="tf32")
    manifest = read_bundle(made)
    assert manifest.precision == "tf32" and manifest.precision_check is not None
    assert manifest.precision_check.least_rank_correlation == precision_module.BOUNDS["tf32"][0] == 0.99
    assert {given["use_tf32"] for _, given in gpu.opened} == {"1"}
    assert CliRunner().invoke(app, ["verify", str(made)]).exit_code == 0
    gpu.off = 3.0
    with pytest.raises(ExportError, match=r"^tf32 changes this ensemble too much on \d+ validation images"):
        export_run(run, tmp_path / "other", precision="tf32")
    assert not (tmp_path / "other").exists()


def test_tf32_cannot_be_compared_without_a_gpu(run: Path, tmp_path: Path) -> None:  # noqa: F811
    result = CliRunner().invoke(
        app, ["export", str(run), "--out", str(tmp_path / "bundle"), "--precision", "tf32"], terminal_width=200
    )
    if onnxruntime.get_device() == "GPU" and sessions.gpu_count():
        pytest.skip("there is a GPU")
    assert result.exit_code == 1 and not (tmp_path / "bundle").exists()
    assert "TF32 is computed by NVIDIA's GPUs only" in result.stderr
