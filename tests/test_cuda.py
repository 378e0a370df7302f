"""What only a GPU can show: captured steps are the eager ones, nothing waits for the host, and all comes back whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ensembler import Ensemble
from ensembler.networks import batchnorm, capture
from ensembler.side_by_side import SideBySide
from ensembler.trainers import (
    FGE,
    SWAG,
    CyclicalSGMCMC,
    DeepEnsemble,
    Method,
    Settings,
    Simplex,
    Snapshots,
    Subspace,
    train,
)
from ensembler.trainers.step import Step
from tests._small import SETTINGS, dataset
from tests._training import flat

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

METHODS: dict[str, Method] = {
    "single": DeepEnsemble(members=1),
    "FGE": FGE(members=2, cycle=1, start=0.5),
    "snapshots": Snapshots(members=2),
    "SWAG": SWAG(members=2, start=0.5),
    "cSG-MCMC": CyclicalSGMCMC(members=4, samples_per_cycle=2, exploration=0.5),
    "volume": Simplex(vertices=3, vertex_epochs=3),
    "function": Simplex(vertices=3, vertex_epochs=3, regulariser="function", samples_per_step=2),
    "joint subspace": Subspace(vertices=3),
}


def settings(**own: Any) -> Settings:
    return Settings(**SETTINGS | {"device": "cuda", "epochs": 6, "architecture": "tests._small:batchnorm"} | own)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    flags = torch.backends.cudnn
    before = flags.deterministic
    flags.deterministic = True
    yield
    flags.deterministic = before


@pytest.fixture
def _one_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN measures no algorithms: which one is the fastest depends on what else the GPU does."""
    monkeypatch.setattr("ensembler.trainers.trainer.configure", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_captured_steps_are_the_eager_ones(method, precision):
    found, eager = (
        flat(train(dataset(train=32), METHODS[method], settings(precision=precision, eager=eager)))
        for eager in (False, True)
    )
    bound = 1e-5 if precision == "float32" else 1e-2
    assert (found - eager).abs().max() <= bound * eager.abs().max()


@pytest.mark.parametrize("optimiser", ["adamw", "torch.optim:NAdam", "torch.optim:RMSprop"])
@pytest.mark.parametrize("method", ["single", "volume", "joint subspace"])
def test_captured_steps_are_the_eager_ones_with_other_optimisers(method, optimiser):
    own = {"optimiser": optimiser, "warmup": 1.0, "accumulate": 2}
    said: list[str] = []
    found, eager = (
        flat(
            train(
                dataset(train=32), METHODS[method], settings(eager=eager, **own), on_event=lambda e: said.append(str(e))
            )
        )
        for eager in (False, True)
    )
    assert not any("cannot be captured" in text for text in said)
    assert (found - eager).abs().max() <= 1e-4 * eager.abs().max()


@pytest.mark.parametrize("options", [{}, {"optimiser": "adamw", "accumulate": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(method, options, monkeypatch):
    """The loop reads what an epoch has summed at its end, and nothing before."""

    @contextlib.contextmanager
    def mode(name: str) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(name)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def within(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            with mode(name):
                return function(*given, **named)

        return call

    monkeypatch.setattr(capture.Captured, "__call__", within("error", capture.Captured.__call__))
    monkeypatch.setattr(Step, "__call__", within("error", Step.__call__))
    if method == "cSG-MCMC" and options:
        pytest.skip("samples by SGD")
    train(dataset(train=32), METHODS[method], settings(**options))


@pytest.mark.usefixtures("_one_algorithm")
@pytest.mark.parametrize("network", ["batchnorm", "noisy", "layernorm"])
def test_members_side_by_side_are_those_trained_alone(network):
    own = settings(architecture=f"tests._small:{network}")
    together, alone = (
        flat(train(dataset(train=32), DeepEnsemble(members=4), own, engine=engine)) for engine in (SideBySide(4), None)
    )
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_what_a_gpu_trains_a_cpu_predicts_alike(tmp_path: Path):
    path = train(dataset(train=32), Simplex(vertices=2, members=3), settings()).save(tmp_path / "run")
    x = dataset().test.images
    on_gpu, on_cpu = (Ensemble.load(path, device).predict_proba(x) for device in ("cuda", "cpu"))
    assert (on_gpu - on_cpu).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("method", "options"),
    [(name, {}) for name in ("FGE", "SWAG", "cSG-MCMC", "volume")] + [("volume", {"optimiser": "adamw"})],
    ids=str,
)
def test_a_training_resumes_on_the_gpu(method, options, tmp_path, monkeypatch):
    from ensembler.trainers.resume import UnfinishedRun
    from ensembler.trainers.training import Training

    whole = Training.of(dataset(train=32), METHODS[method], settings(**options), {})
    expected = flat(whole.make())
    work, unfinished = Step.epoch, UnfinishedRun(tmp_path / "run", whole.spec, every=0)

    def interrupted(self: Any, number: int, *given: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return work(self, number, *given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Step, "epoch", interrupted)
        whole.make(store=unfinished.store)
    found = flat(whole.make(store=unfinished.store))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_corruptions_have_the_bytes_that_a_cpu_makes():
    """Those that a GPU makes otherwise, on the first images, are made on the CPU."""
    from ensembler.data.datasets import Split
    from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES
    from ensembler.eval.shift.generated import Corrupted

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(96, 3, 5, 5, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(points, size=(32, 32), mode="bicubic").clamp(0, 255)
    clean = Split(smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), torch.zeros(96, dtype=torch.int64))
    different = []
    for name in AVAILABLE:
        for severity in SEVERITIES:
            made = Corrupted(clean, torch.arange(96), name, severity, seed=0)
            on_gpu, on_cpu = (made.images(slice(96), device) for device in (torch.device("cuda"), None))
            different += [] if torch.equal(on_gpu.cpu(), on_cpu) else [(name, severity)]
    assert not different


@pytest.mark.parametrize("network", ["batchnorm", "layernorm", "reads_a_value"])
def test_predictions_that_are_captured_are_the_eager_ones(network, monkeypatch):
    """Asked again and again, with a smaller last batch; what cannot be captured predicts as it is."""
    run = train(dataset(train=32), DeepEnsemble(members=2), settings(architecture=f"tests._small:{network}"))
    x = dataset().test.images
    ensemble, eager = (Ensemble(run, "cuda", batch_size=8) for _ in range(2))
    found = [ensemble.predict_outputs(images) for images in (x, x, x[:5], x, x.flip(0))]
    monkeypatch.setattr(Ensemble, "_captures", False)
    for images, outputs in zip((x, x, x[:5], x, x.flip(0)), found, strict=True):
        assert (eager.predict_outputs(images) - outputs).abs().max() <= 1e-5 * outputs.abs().max()


def test_statistics_of_new_members_wait_for_nothing(monkeypatch):
    """Beyond what is uploaded once at the beginning of a member."""
    run = train(dataset(train=32), Simplex(vertices=2, members=2), settings())
    ensemble, recompute = Ensemble(run, "cuda"), batchnorm.recompute

    def checked(*given: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            recompute(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(batchnorm, "recompute", checked)
    for train_split in (dataset().train, dataset().train.to("cuda")):
        ensemble.sample(4, seed=3, train=train_split)


def test_a_step_that_gathers_gradients_is_that_of_the_cpu():
    """A GPU gathers them at once, a CPU adds them one by one."""
    found = [flat(train(dataset(train=32), DeepEnsemble(members=1), settings(device=name))) for name in ("cuda", "cpu")]
    assert (found[0] - found[1]).abs().max() <= 1e-3 * found[1].abs().max()
