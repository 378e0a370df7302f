"""The noises against the laws that they should follow, and the random numbers that all corruptions draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ensembler.eval.shift.corruptions import corrupt
from ensembler.eval.shift.pixels import noise

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
GREYS = (0, 1, 40, 128, 200, 254, 255)


def noise_law(name: str, severity: int, x: int) -> NDArray[np.float64]:
    """P(corrupted byte = v | clean byte x) for v = 0 to 255, from SciPy's distributions and the script's formulas."""
    below = np.arange(1, 256)
    match name:
        case "gaussian_noise":
            cdf = stats.norm.cdf(below, x, 255 * (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1])
        case "speckle_noise":
            scale = x * (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
            cdf = stats.norm.cdf(below, x, scale) if x else np.ones(255)
        case "impulse_noise":
            amount = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
            pmf = np.zeros(256)
            pmf[[0, 255]] = amount / 2
            pmf[x] += 1 - amount
            return pmf
        case _:
            rate = (500, 250, 100, 75, 50)[severity - 1]
            pmf = np.zeros(256)
            for count in range(3 * rate + 50):
                pmf[int(min(count / rate, 1) * 255)] += stats.poisson.pmf(count, x / 255 * rate)
            return pmf
    return np.diff(cdf, prepend=0, append=1)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("severity", [1, 5])
def test_noise_follows_its_law(name: str, severity: int) -> None:
    for x in GREYS:
        law = noise_law(name, severity, x)
        grey = torch.full((40, 32, 32, 3), x, dtype=torch.uint8)
        drawn = corrupt(grey, name, severity).numpy().ravel()
        counts = np.bincount(drawn, minlength=256)
        assert counts[law == 0].sum() == 0
        levels = np.arange(256)
        mean = levels @ law
        variance = (levels - mean) ** 2 @ law
        error = np.sqrt(variance / drawn.size)
        assert abs(drawn.mean() - mean) <= 4 * error
        kurtosis = (levels - mean) ** 4 @ law
        assert abs(drawn.var() - variance) <= 4.5 * np.sqrt(max(kurtosis - variance**2, 0) / drawn.size) + 16 * error**2
        # Kolmogorov and Smirnov's distance; 1.95 / sqrt(n) is exceeded once in a thousand tries.
        assert np.abs(counts.cumsum() / drawn.size - law.cumsum()).max() < 1.95 / np.sqrt(drawn.size)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("gaussian_noise", noise._gaussian_table(0.08)),
        ("shot_noise", noise._shot_table(100)),
        ("impulse_noise", noise._impulse_table(0.03)),
        ("speckle_noise", noise._speckle_table(0.12)),
    ],
)
def test_alias_tables_hold_the_laws(name: str, table: Tensor) -> None:
    entries = table.view(256, 256).numpy().astype(np.int64)
    kept, alias = (entries >> 8) + 2**23, entries & 255
    for x in range(256):
        mass = kept[x].astype(np.float64)
        np.add.at(mass, alias[x], 2**24 - kept[x])
        np.testing.assert_allclose(mass / 2**32, noise_law(name, 3, x), atol=2**-31, rtol=0)


def test_noise_is_not_correlated() -> None:
    grey = torch.full((60, 32, 32, 3), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian_noise", 3).numpy().astype(np.float64) - 128
    other = corrupt(grey, "gaussian_noise", 3, seed=1).numpy() - 128.0
    harder = corrupt(grey, "gaussian_noise", 4).numpy() - 128.0
    speckle = corrupt(grey, "speckle_noise", 3).numpy() - 128.0
    for a, b in [
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[..., 1:], noise[..., :-1]),
        (noise[1:], noise[:-1]),
        (noise, other),
        (noise, harder),
        (noise, speckle),
    ]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_generator_is_splitmix64() -> None:
    mask = 2**64 - 1

    def splitmix64(state: int) -> int:
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the generator's first number from seed 0
    states = [0, 1, 0x9E3779B97F4A7C15, 2**63, mask, *(k * 0x9E3779B97F4A7C15 & mask for k in range(2, 50))]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    assert [int(z) & mask for z in noise.mix(signed)] == [splitmix64(state) for state in states]


# --- what the other corruptions draw --------------------------------------------------------------------------------


def keys(count: int) -> Tensor:
    return noise.image_keys("test", torch.arange(count))


def test_uniforms_normals_and_integers_follow_their_laws() -> None:
    uniform = noise.uniforms(keys(50), 4000).numpy().ravel()
    normal = noise.normals(keys(50), 4001).numpy().ravel()
    critical = 1.95 / np.sqrt(uniform.size) + 2**-12  # once in a thousand tries, and the width of a step
    assert stats.kstest(uniform, stats.uniform(-1, 2).cdf).statistic < critical
    assert stats.kstest(normal, "norm").statistic < critical
    assert abs(normal.var() - 1) < 4 * np.sqrt(2 / normal.size)
    assert np.abs(normal).max() < 4.4
    for bound in (1, 2, 6, 8, 128, 491):
        counts = np.bincount(noise.below(keys(50), bound, 4000).numpy().ravel(), minlength=bound)
        assert len(counts) == bound
        assert bound == 1 or stats.chisquare(counts).pvalue > 1e-3


def test_bounds_may_differ_from_draw_to_draw() -> None:
    drawn = noise.below(keys(4000), torch.tensor([[3, 70]]), 2).numpy()
    assert stats.chisquare(np.bincount(drawn[:, 0], minlength=3)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(drawn[:, 1], minlength=70)).pvalue > 1e-3


@pytest.mark.parametrize("draw", [noise.uniforms, noise.normals, noise.random_bits])
def test_a_draw_depends_on_its_place_alone(draw) -> None:
    whole = draw(keys(6), 101)
    assert torch.equal(draw(keys(6), 50), whole[:, :50])
    assert torch.equal(draw(keys(6)[4:5], 101), whole[4:5])


def test_streams_are_not_correlated() -> None:
    one = keys(50)
    streams = [noise.uniforms(stream, 4000) for stream in (one, noise.branch(one, 1), noise.branch(one, 2))]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        for shift in (0, 1):
            pair = torch.stack((streams[a][:, shift:].flatten(), streams[b][:, : 4000 - shift].flatten()))
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / np.sqrt(pair.shape[1])
