"""What a container's limits leave of the CPUs, from files as kernels write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ensembler.machine import available_cpus, resident_memory


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def machine(root: Path, group: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V1 = "9:name=systemd:/\n4:memory:/box\n1:cpu,cpuacct:/box\n"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),  # rounded down
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # never to 0
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),  # the affinity is the tighter one
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "200000 100000\n"}, 2),  # a group around it
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "cpu.max": "500000 100000\n"}, 5),
        ("0::/host/only\n", {"cpu.max": "200000 100000\n"}, 2),  # a path of the host's, not mounted here
        ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
        ("0::/\n", {"cpu.max": ""}, 8),
        ("", {"cpu.max": "200000 100000\n"}, 8),
        (V1, {"cpu,cpuacct/box/cpu.cfs_quota_us": "250000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (V1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "0\n"}, 8),
        (V1, {"memory/box/cpu.cfs_quota_us": "100000", "memory/box/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_limits_of_cpu_time(tmp_path: Path, group: str, files: dict[str, str], expected: int) -> None:
    assert available_cpus(machine(tmp_path, group, files)) == expected


def test_a_machine_without_such_files_lends_what_the_affinity_says(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == 8


def test_memory_grows_with_what_is_held() -> None:
    if not sys.platform.startswith("linux"):
        assert resident_memory() is None
        return
    code = """
from ensembler.machine import resident_memory
before = resident_memory()
held = bytearray(b"x") * 50_000_000
print(resident_memory() - before)
"""
    # In a process of its own: one that has freed as much before would not grow.
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 40_000_000 < grown < 80_000_000


_LIMITED = """
import os, sys, threading
from pathlib import Path
from ensembler import machine
limits = machine._limits
machine._limits = lambda root: limits(Path(sys.argv[1]))
os.sched_getaffinity = lambda process: set(range(8))
import torch
torch.set_num_threads(8)
from ensembler.data import loading
from ensembler.ensemble import Ensemble
from ensembler.serve.runtime.runtime import Runtime
from tests._runs import make_bundle, make_run
from tests._training import trainer
folder = Path(sys.argv[2])
for use in (lambda: trainer(), lambda: Ensemble.load(make_run(folder / "run"), "cpu")):
    torch.set_num_threads(8)
    from ensembler import device
    device._obey_limit.cache_clear()
    use()
    print(torch.get_num_threads())
made = []
loading.DataLoader = lambda *rest, num_workers, **options: made.append(num_workers) or iter(())
try:
    next(loading.read_ahead(type("Split", (), {"shape": (8, 8)}), iter(()), "none", torch.device("cpu")))
except (RuntimeError, StopIteration):
    pass
print(made[0])
print(Runtime.load(make_bundle(folder / "bundle")).threads)
print(trainer(threads=5) and torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}),
        (V1, {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}),
    ],
)
def test_a_limit_holds_for_training_evaluation_reading_and_serving(
    tmp_path: Path, group: str, files: dict[str, str]
) -> None:
    root = machine(tmp_path / "machine", group, files)
    found = subprocess.run(
        [sys.executable, "-c", _LIMITED, root, tmp_path],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["2", "2", "2", "2", "5"]


@pytest.mark.parametrize("home", ["file", "home"])
def test_matplotlib_says_nothing_of_a_home_that_cannot_be_written_and_keeps_its_own_where_it_can(home, tmp_path):
    (tmp_path / "file").write_text("in the way")
    script = "import ensembler.eval, os, matplotlib; print(os.environ.get('MPLCONFIGDIR'), matplotlib.get_cachedir())"
    left = {"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"}
    environment = {name: value for name, value in os.environ.items() if name not in left}
    environment |= {"HOME": str(tmp_path / home), "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    given, folder = done.stdout.split()
    assert done.stderr == ""
    assert (given != "None") == (home == "file")
    assert given in (folder, "None") and not list(tmp_path.glob("ensembler-*"))  # removed at the end
