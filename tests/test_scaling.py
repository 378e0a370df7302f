"""The simulations of benchmarks/scaling.py against what is known in closed form, and its page against the script."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scaling

        yield scaling
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_jobs_on_machines_that_stay(scaling):
    assert scaling.simulate(100, 25, 13.0, math.inf, math.inf, random.Random(0)) == (52.0, 1300.0)
    assert scaling.simulate(3, 25, 13.0, math.inf, math.inf, random.Random(0)) == (13.0, 39.0)
    assert scaling.simulate(26, 25, 13.0, math.inf, math.inf, random.Random(0))[0] == 26.0


@pytest.mark.parametrize("mean", [6, 24, 168])
def test_a_job_that_starts_again_costs_what_the_exponential_distribution_says(scaling, mean):
    used = [scaling.simulate(1, 1, 13.0, mean, math.inf, random.Random(seed))[1] for seed in range(20_000)]
    expected = mean * math.expm1(13.0 / mean)  # the mean time to the first uninterrupted 13 hours
    assert statistics.mean(used) == pytest.approx(expected, rel=0.05)


def test_a_job_with_checkpoints_loses_less_than_one_of_them_a_machine(scaling):
    used = [scaling.simulate(1, 1, 13.0, 6, 1 / 60, random.Random(seed))[1] for seed in range(2000)]
    assert min(used) >= 13.0
    assert statistics.mean(used) == pytest.approx(13.0 + 13.0 / 6 * 0.5 / 60, rel=0.01)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_without_batches_the_queue_is_the_textbooks(scaling, load):
    """Pollaczek and Khinchine: the mean wait of Poisson arrivals at a constant service time."""
    found = scaling.latencies(lambda batch: 0.01 * batch, load / 0.01, most=1)
    assert statistics.mean(found) == pytest.approx(0.01 + 0.01 * load / (2 * (1 - load)), rel=0.1)


def test_batches_bear_more_than_one_at_a_time(scaling):
    def service(batch):
        return 0.01 + 0.001 * batch

    alone, together = (scaling.highest_rate(service, most) for most in (1, 64))
    assert alone < 1 / service(1) < together < 64 / service(64)
    assert scaling.highest_rate(lambda batch: 0.2, most=64) == 0.0


def test_the_page_holds_what_the_script_prints(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    constants = json.loads((ROOT / "benchmarks" / "scaling.json").read_text(encoding="utf-8"))["constants"]
    for table in scaling.tables(constants):
        assert table in page
