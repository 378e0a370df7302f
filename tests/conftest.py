"""The tests' helpers are importable as ``tests._small`` and ``tests._runs``, by the tests and as ``--arch``."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests._small import make_images

torch.set_num_threads(1)  # the networks here are too small for two
settings.register_profile("whatever the load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("whatever the load")
_numbers = itertools.count()


def pytest_configure(config):
    """As many tests as there are CPUs run at a time: what they start computes on one thread, too.

    But for the long ones, which run alone, and some of which show what came out on all threads.
    """
    if config.option.markexpr == "not long":
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_users(tmp_path_factory):
    """What fixtures of a module or session decode is not kept in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    """No test finds another's predictions, nor leaves any behind.

    The folder is named, not made: most tests need none, and ``mktemp`` reads the names of all that there are.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "caches" / str(next(_numbers))))


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Starts commands in processes of their own, without their imports."""
    from tests._faults import Nursery

    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture
def images(tmp_path):
    """A folder of images, as options of a command."""
    return make_images(tmp_path / "images")
