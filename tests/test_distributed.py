"""Two processes that train one network together end where a single one does, and only the first one writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ensembler.data.images import FileSplit
from ensembler.errors import UsageError
from ensembler.networks.architectures import build
from ensembler.run import Run
from ensembler.trainers import DeepEnsemble, Trainer
from ensembler.trainers.batches import Batches
from ensembler.trainers.distributed import ALONE, Group, join_group
from ensembler.trainers.plan import Plan
from ensembler.trainers.resume import UnfinishedRun
from ensembler.trainers.starts import fresh
from ensembler.trainers.trainer import _synchronised
from ensembler.weights import FlatWeights
from tests._interrupt import after, make
from tests._ports import free_port
from tests._together import DATASET, NAMES, settings, train
from tests.test_batches import load, make_photos
from tests.test_cli import SMALL, call

ROOT = Path(__file__).parents[1]
TOGETHER = ROOT / "tests" / "_together.py"


def torchrun(*arguments, options=(), **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment |= os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def two(nursery, folder, *arguments, module="ensembler.cli", **environment):
    """The two processes that torchrun would start, by rank: it takes as long to start as they do."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | environment
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [nursery.start(folder, *arguments, module=module, environment=own) for own in ranks]


def succeeded(processes):
    """What both printed, once they have ended."""
    assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
    return "".join(process.out for process in processes), "".join(process.err for process in processes)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_point_gets_the_images_that_a_single_process_would_give_it(size):
    for whole in range(1, 18):
        for samples in range(1, 5):
            places = list(range(whole))
            points = [part.tolist() for part in np.array_split(places, min(samples, max(1, whole // 2)))]
            for rank in range(size):
                group = Group(rank, size)
                mine = torch.tensor(places)[group.share].split([size for (size,) in group.shares(whole, samples)])
                expected = [[place for place in point if place % size == rank] for point in points]
                assert [part.tolist() for part in mine] == expected


@pytest.mark.parametrize(
    ("in_memory", "workers", "augmentation"),
    [
        *((in_memory, 0, name) for in_memory in (True, False) for name in ("crop-flip", "resized-crop-flip", "none")),
        (False, 1, "resized-crop-flip"),
    ],
)
def test_the_shares_of_a_batch_are_the_batch(tmp_path, in_memory, workers, augmentation):
    images = load(make_photos(tmp_path / "photos", count=10), in_memory).train.part(slice(10))
    assert isinstance(images, FileSplit) != in_memory

    def stream(group, step=0):
        cpu = torch.device("cpu")
        return Batches(images, 8, augmentation, (0.5,) * 3, (0.5,) * 3, (0, "x"), cpu, workers, group).begin(step)

    with closing(stream(ALONE)) as batches:
        whole = list(islice(batches, 4))
    assert [len(batch.y) for batch in whole] == [8, 2, 8, 2], "the last batch leaves a process without images"
    for rank in range(3):
        for first in (0, 2):  # begun later, it is at the same place
            with closing(stream(Group(rank, 3), first)) as shares:
                for batch in whole[first:]:
                    share = next(shares)
                    chosen = [place for place in range(len(batch.y)) if place % 3 == rank]
                    assert torch.equal(share.x, batch.x[chosen])
                    assert torch.equal(share.y, batch.y[chosen])
                    assert share.size == len(batch.y)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nursery):
    """What two processes hold after each method, and what a single one does."""
    folder = tmp_path_factory.mktemp("together")
    for seed in (1, 2):
        end = make(None, DeepEnsemble(members=1), settings(seed=seed, epochs=2), data=DATASET)
        end.save(folder / f"end {seed}")
    expected = {name: train(folder, name) for name in NAMES if name != "resumed"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after(patch, 27)
        train(folder, "resumed")
    expected["resumed"] = expected["simplex"]
    succeeded(two(nursery, folder, folder, module="tests._together"))
    return folder, expected


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_where_a_single_one_does(trained, name):
    folder, expected = trained[0], trained[1][name]
    first, second = (load_file(folder / f"{name} {rank}.safetensors") for rank in range(2))
    facts = [json.loads((folder / f"{name} {rank}.json").read_text()) for rank in range(2)]
    for parameter, tensor in expected.vertices.items():
        assert torch.equal(first[parameter], second[parameter])
        torch.testing.assert_close(first[parameter], tensor, rtol=0, atol=1e-5)
    entries = expected.manifest.cost.entries
    for found in facts:
        assert found["passes"] == {part: [each.example_passes, each.forward_passes] for part, each in entries.items()}
        assert found["metrics"] == facts[0]["metrics"]
        assert found["device"] == f"2 x {expected.manifest.cost.device}"
        assert len(found["history"]) == len(expected.history)
        for epoch, record in zip(found["history"], expected.history, strict=True):
            assert [epoch.get(key) for key in ("part", "number", "examples", "accuracy")] == [
                record.get(key) for key in ("part", "number", "examples", "accuracy")
            ]
            assert epoch["loss"] == pytest.approx(record["loss"], abs=1e-5)
            assert epoch["held_out_loss"] == pytest.approx(record["held_out_loss"], abs=1e-5)
    if name == "plain":
        assert sum(epoch["examples"] for epoch in facts[0]["history"]) == 33 * 10


NETWORK = ["--arch", "tests._small:holding", "--device", "cpu", "--augmentation", "crop", "--batch-size", 8]
LENGTH = ["--vertices", 2, "--epochs", 10, "--vertex-epochs", 10]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nursery):
    """A run of two processes through the command line, its command, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    images = make_photos(folder / "images", count=12, size=(8, 8))
    command = ["train-simplex", *LENGTH, *NETWORK, "--dataset", images]
    return folder, command, succeeded(two(nursery, folder, *command, "--log", "log", "--out", folder / "whole"))


def same_bytes(one, other):
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("vertices.safetensors", "members.safetensors")
    )


def test_only_the_first_process_writes(whole):
    folder, _, (out, err) = whole
    own = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # PyTorch 2.8 prints such lines here
    assert own[-1] == f"run: {folder / 'whole'}"
    assert out.count("run: ") == 1
    assert err.count("solution 1: epoch 3 of 10,") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["images", "latest", "log", "whole"]
    run = Run.load(folder / "whole")
    logged = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [(line["part"], line["number"]) for line in logged] == [
        (line["part"], line["number"]) for line in run.history
    ]


def processes_of(torchrun_process):
    """The training processes by their rank."""
    found = {}
    for child in psutil.Process(torchrun_process.pid).children():
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


def wait_until_held(unfinished, ended):
    """Wait until the processes of a training are in its second part, where they wait to be killed."""
    while not list(unfinished.glob("*/vertex-2.*")):
        assert not ended()
        time.sleep(0.01)


def test_a_killed_process_costs_no_more_than_a_restart(whole):
    folder, command, _ = whole
    killed, unfinished = folder / "killed", folder / "killed.unfinished"
    arguments = ["-m", "ensembler", *command, "--checkpoint-every", 0, "--out", killed]
    process = torchrun(*arguments, options=["--max-restarts", "2"], TESTS_HOLD_AT=str(unfinished))
    wait_until_held(unfinished, process.poll)
    processes_of(process)[1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert same_bytes(folder / "whole", killed)
    assert not unfinished.exists()
    assert err.count("solution 1: epoch 1 of 10,") == 1, "it was not begun anew"


def test_what_was_interrupted_is_resumed(whole, nursery):
    folder, command, _ = whole
    unfinished = folder / "first.unfinished"
    arguments = [*command, "--checkpoint-every", 0, "--out", "first"]
    first, second = two(nursery, folder, *arguments, TESTS_HOLD_AT=str(unfinished))
    wait_until_held(unfinished, lambda: first.ended() or second.ended())
    assert first.kill() == -signal.SIGKILL
    assert second.kill() in (-signal.SIGKILL, 1), "it waits as well, or has seen that the first is gone"
    assert not (folder / "first").exists()
    succeeded(two(nursery, folder, "train-simplex", "--resume", "first"))
    assert same_bytes(folder / "whole", folder / "first")


def test_a_common_error_is_said_once_by_the_first_process_however_slow_it_is(tmp_path):
    process = torchrun(TOGETHER, "train-simplex", "--vertices", 1, "--out", tmp_path / "x")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    assert err.count("--vertices must be at least 2, not 1") == 1
    assert "error: --vertices must be at least 2, not 1, says the first" in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_an_error_of_one_process_is_said_by_it_and_ends_the_other(nursery, tmp_path):
    """Without torchrun, which may end the other one before it has said anything."""
    first, second = two(nursery, tmp_path, "alone", module="tests._together")
    assert [process.wait() for process in (first, second)] == [1, 1]
    assert "another process of this training has ended" in first.err
    assert second.err.count("rank 1: error: this process alone has failed") == 1


def test_under_torchrun_a_run_has_a_name_and_its_command_resumes_by_itself(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one process of it")
    command = ["train-deep-ensemble", "--members", 1, *SMALL, *images]
    assert "under torchrun, name the run with --out" in call(*command).stderr
    monkeypatch.setattr(UnfinishedRun, "remove", UnfinishedRun.close)  # as if killed before the end

    def interrupted(run, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", interrupted)
        assert call(*command, "--out", "x").exit_code == 130
    assert Path("x.unfinished").is_dir()
    refused = call(*command, "--out", "x", "--lr", 0.2)
    assert refused.exit_code == 1
    assert (
        "x.unfinished was started with other options, data or code: resume it with those, or remove it"
        in refused.stderr
    )
    gone_on = call(*command, "--out", "x")
    assert gone_on.exit_code == 0
    assert "epoch" not in gone_on.stderr, "nothing was left to train"
    assert Run.load(Path("x")).manifest.cost.example_passes == 2 * 64


def test_what_cannot_be_honoured_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="BatchNorm is synchronised on GPUs only"):
        Trainer(DATASET, settings(sync_batchnorm=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(UsageError, match=r"WORLD_SIZE is 2, but .* with torchrun, or unset WORLD_SIZE"),
        join_group("cpu"),
    ):
        pass


def test_the_synchronised_network_has_the_weights_and_buffers_of_the_plain_one():
    weights = FlatWeights(build("resnet20", 3))
    twin = _synchronised(weights)
    kinds = [type(module).__name__ for module in twin.module.modules()]
    assert kinds.count("SyncBatchNorm") > 0
    assert "BatchNorm2d" not in kinds
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in weights.module.modules())
    assert list(twin.module.state_dict()) == list(weights.module.state_dict())
    with torch.no_grad():
        weights.vector.fill_(0.5)
    for name, tensor in twin.module.state_dict(keep_vars=True).items():
        assert tensor is weights.module.state_dict(keep_vars=True)[name]
    assert all(bool((parameter == 0.5).all()) for parameter in twin.module.parameters())


def test_masks_differ_between_processes_and_steps_and_come_again():
    def masks(rank):
        found = []

        class Spy(torch.nn.Module):
            def forward(self, x):
                if self.training:  # not in the held-out measurement of an epoch
                    found.append(torch.rand(4))
                return x

        trainer = Trainer(DATASET, settings().resolved(DATASET), group=Group(rank))
        trainer.weights.module.append(Spy())
        begin = fresh(trainer)
        trainer.fit("part", begin.vector[None].clone(), begin.buffers, Plan(trainer.schedule(4), 4))
        return found

    first, again, second = masks(0), masks(0), masks(1)
    drawn = [tuple(mask.tolist()) for mask in first + second]
    assert len(drawn) == len(set(drawn)) == 8
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
