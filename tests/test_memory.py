"""Memory that a step frees is kept for the next: what the C library is told, and that it understands."""

from __future__ import annotations

import ctypes
import platform
import sys

import pytest
import torch

from ensembler import device


class Library:
    """Stands for the C library: keeps what ``mallopt`` is told."""

    def __init__(self, name):
        assert name is None
        self.told = []

    def mallopt(self, option, value):
        self.told.append((option, value))
        return 1


@pytest.fixture
def library(monkeypatch):
    library = Library(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "linux")
    return library


def test_large_blocks_come_from_the_heap_and_a_gibibyte_of_it_stays(library):
    device.keep_freed(torch.device("cpu"))
    assert library.told == [(-3, 32 * 2**20), (-1, 2**30)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def test_nothing_is_told_where_it_is_of_no_use(library, monkeypatch):
    device.keep_freed(torch.device("cuda"))
    monkeypatch.setattr(sys, "platform", "darwin")
    device.keep_freed(torch.device("cpu"))
    assert library.told == []


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    device.keep_freed(torch.device("cpu"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_glibc_accepts_both():
    mallopt = ctypes.CDLL(None).mallopt
    assert mallopt(-3, 2**25) == 1
    assert mallopt(-1, 2**30) == 1
