"""What a container's limits leave of the CPUs, from files as kernels write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ensembler.serve.runtime.machine import available_cpus, resident_memory


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
from ensembler.serve.runtime.machine import resident_memory
before = resident_memory()
held = bytearray(b"x") * 50_000_000
print(resident_memory() - before)
"""
    # In a process of its own: one that has freed as much before would not grow.
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 40_000_000 < grown < 80_000_000
