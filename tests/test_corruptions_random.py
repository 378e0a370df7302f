"""The eight corruptions that draw at random or warp, against ``benchmarks/per_image.py`` on the same random numbers.

The batched functions and the per-image ones share no code: NumPy, SciPy and Python loops over pixels on the one side,
integers, tables and sparse maps on the other.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats
from torch import Tensor

from ensembler.eval.shift import corruptions
from ensembler.eval.shift.corruptions import SEVERITIES, corrupt
from ensembler.eval.shift.pixels import blurs, spatter, weather
from ensembler.eval.shift.pixels.noise import below, branch, image_keys, normals, uniforms

_path = Path(__file__).parents[1] / "benchmarks" / "per_image.py"
_spec = importlib.util.spec_from_file_location("per_image", _path)
assert _spec is not None
assert _spec.loader is not None
per_image = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(per_image)

SIZES = [(32, 32), (28, 33), (5, 8), (48, 32)]


def photographs(count: int, height: int, width: int) -> Tensor:
    rng = np.random.default_rng(1)
    smooth = ndimage.gaussian_filter(rng.normal(size=(count, height, width, 3)), (0, 2, 2, 0.5))
    images = np.clip(smooth * 500 + 128, 0, 255).astype(np.uint8)
    images[0] = rng.integers(0, 256, images[0].shape)
    images[1] = 40
    return torch.from_numpy(images)


class Replay:
    """Random numbers that were drawn elsewhere, given out as a ``numpy.random.Generator`` would."""

    def __init__(self, *draws: Any) -> None:
        self.draws = deque(np.asarray(draw, dtype=np.float64) for draw in draws)

    def _next(self, size: Any) -> Any:
        drawn = self.draws.popleft()
        assert drawn.shape == np.empty(() if size is None else size).shape
        return drawn

    def normal(self, loc: float = 0, scale: float = 1, size: Any = None) -> Any:
        return loc + scale * self._next(size)

    def uniform(self, low: float = 0, high: float = 1, size: Any = None) -> Any:
        return low + (high - low) * (self._next(size) + 1) / 2  # ours lie between -1 and 1

    def integers(self, low: int, high: int, size: Any = None) -> Any:
        drawn = self._next(size).astype(int)
        assert (low <= drawn).all()
        assert (drawn < high).all()
        return drawn


def turned(keys: Tensor) -> float:
    """The angle that was drawn, between -1 and 1 for 45 degrees either way."""
    return (int(below(keys, blurs.ANGLES, 1)) + 0.5) / blurs.ANGLES * 2 - 1


def replay(name: str, keys: Tensor, size: tuple[int, int], level: Any) -> Replay:  # noqa: PLR0911
    """The random numbers of one image, by its key (1,)."""
    H, W = size
    match name:
        case "glass_blur":
            _, reach, rounds = level
            drawn = below(keys, 2 * reach, 2 * rounds * H * W).view(rounds, 2, H * W).numpy() - reach
            steps = drawn.transpose(0, 2, 1)
            return Replay(*steps.reshape(rounds, H, W, 2))
        case "motion_blur":
            return Replay(turned(keys))
        case "snow":
            return Replay(normals(keys, H * W).view(H, W), turned(branch(keys, 1)))
        case "fog":
            side = 1 << (max(H, W) - 1).bit_length()
            noise, parts, m = uniforms(keys, side * side)[0], [], 1
            while m < side:
                parts += [*noise[m * m : 4 * m * m].view(3, m, m)]
                m *= 2
            return Replay(*parts)
        case "elastic_transform":
            return Replay(uniforms(keys, 6).view(3, 2), *uniforms(branch(keys, 1), 2 * H * W).view(2, H, W))
        case "spatter":
            return Replay(normals(keys, H * W).view(H, W))
    return Replay()


def chamfer(edges: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distances of Borgefors' 5 x 5 chamfer, relaxed until nothing changes."""
    moves = [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 1.4), (1, 2, 2.1969), (2, 1, 2.1969)]
    found = np.where(edges, 0.0, 1e3)
    while True:
        before = found.copy()
        for down, right, length in moves:
            for y, x in ((down, right), (down, -right), (-down, right), (-down, -right)):
                shifted = np.pad(found, 2, constant_values=1e3)[2 + y :, 2 + x :][: edges.shape[0], : edges.shape[1]]
                found = np.minimum(found, shifted + length)
        if np.array_equal(before, found):
            return found


def close(found: NDArray[np.uint8], levels: NDArray[np.float64], slack: float) -> NDArray[np.bool_]:
    """Whether each byte is its level truncated, allowing the level an error of ``slack``."""
    levels = levels.clip(0, 255)
    return (np.floor(levels - slack) <= found) & (found <= np.floor(levels + slack))


SLACK = {
    "glass_blur": 2e-4,
    "motion_blur": 1e-3,  # at a tie
    "zoom_blur": 0.05,  # weights are multiples of 2**-16
    "snow": 2e-3,
    "fog": 2e-3,
    "elastic_transform": 1e-2,
    "spatter": 1e-3,
}


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", SLACK)
@pytest.mark.parametrize("size", SIZES)
def test_equals_one_image_at_a_time(name: str, severity: int, size: tuple[int, int]) -> None:
    images = photographs(6, *size)
    indices = torch.arange(70, 76)
    found = corrupt(images, name, severity, indices=indices, seed=5).numpy()
    keys = image_keys(f"5/{name}/{severity}", indices)
    level = per_image.CIFAR[name][severity - 1]
    reference: Callable[..., NDArray[np.float64]] = getattr(per_image, name)
    extra = {"distance": chamfer} if name == "spatter" else {}
    agree = []
    for number, image in enumerate(images.numpy()):
        levels = reference(image, level, replay(name, keys[number : number + 1], size, level), **extra)
        agree.append(close(found[number], levels, SLACK[name]))
    # Where rounding decides a flake's, a drop's or a ridge's fate, a few pixels may part ways.
    assert np.mean(agree) > (0.998 if name in {"snow", "spatter", "glass_blur"} else 0.999999)


@pytest.mark.parametrize(
    "name", ["glass_blur", "motion_blur", "zoom_blur", "snow", "fog", "elastic_transform", "spatter"]
)
def test_equals_one_image_at_a_time_at_imagenets_constants(name: str) -> None:
    images = photographs(3, 70, 66)[2:]
    for severity in (2, 5):
        level = corruptions._TABLE[name].imagenet[severity - 1]
        found = corrupt(images, name, severity, indices=[9]).numpy()[0]
        draws = replay(name, image_keys(f"0/{name}/{severity}", torch.tensor([9])), (70, 66), level)
        extra = {"distance": chamfer} if name == "spatter" else {}
        constants = np.arange(1, *level) if name == "zoom_blur" else level
        levels = getattr(per_image, name)(images[0].numpy(), constants, draws, **extra)
        assert close(found, levels, 0.05).mean() > 0.999


def test_constants_are_those_of_the_script() -> None:
    for name, levels in per_image.CIFAR.items():
        for ours, theirs in zip(corruptions._TABLE[name].cifar, levels, strict=True):
            if name == "zoom_blur":
                np.testing.assert_array_equal(np.arange(1, *ours), theirs)
            elif name == "frost":
                assert ours == (*theirs, 5)
            else:
                assert ours == theirs
    # NumPy's arange lets some ends in that it should leave out.
    assert [len(factors) for factors in per_image.CIFAR["zoom_blur"]] == [7, 12, 16, 21, 26]


# --- frost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (20, 41), (5, 8)])
def test_frost_is_a_part_of_a_photograph(size: tuple[int, int]) -> None:
    H, W = size
    images = photographs(40, H, W)
    keys = image_keys("0/frost/3", torch.arange(40))
    which = below(keys, 5, 1).flatten().tolist()
    ice = per_image.photographs(0.2)
    free = torch.tensor([[ice[number].shape[0] - H, ice[number].shape[1] - W] for number in which])
    parts = below(branch(keys, 1), free, 2).tolist()
    found = corrupt(images, "frost", 3).numpy()
    for number, (photograph, part) in enumerate(zip(which, parts, strict=True)):
        levels = per_image.frost(images[number].numpy(), per_image.CIFAR["frost"][2], Replay(photograph, *part))
        assert close(found[number], levels, 2e-4).all()


def test_frost_draws_the_photographs_with_the_scripts_weights() -> None:
    """Black images show the photographs alone: at severity 1, a fifth of each."""
    found = corrupt(torch.zeros(4000, 4, 4, 3, dtype=torch.uint8), "frost", 1).numpy()
    pixels, shapes = weather._photographs(4, 4, 5, torch.device("cpu"))
    shares = []
    for begin, height, width in shapes.tolist():
        ice = pixels[begin : begin + height * width * 3].view(height, width, 3).numpy()
        corners = {patch.tobytes() for patch in _patches((ice * np.float32(0.2) + 2**-14).astype(np.uint8))}
        shares.append(np.mean([image.tobytes() in corners for image in found]))
    np.testing.assert_allclose(shares, [0.2, 0.4, 0.2, 0.2], atol=0.03)


def _patches(ice: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Every part of 4 x 4 pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(ice, (4, 4, 3))
    return (np.ascontiguousarray(window) for window in windows.reshape(-1, 4, 4, 3))


@pytest.mark.parametrize("size", [(64, 64), (40, 300), (300, 200), (500, 700)])
def test_frost_covers_any_size(size: tuple[int, int]) -> None:
    photographs_, shapes = weather._photographs(*size, 5, torch.device("cpu"))
    assert (shapes[:, 1] > size[0]).all()
    assert (shapes[:, 2] > size[1]).all()
    assert int(shapes[-1, 0] + shapes[-1, 1:].prod() * 3) == len(photographs_)


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1, 3])
def test_glass_copies_pixels_as_the_scripts_slip_does(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 24, 20, 3, dtype=torch.uint8)
    images[..., 0], images[..., 1] = torch.arange(24)[:, None], torch.arange(20)
    monkeypatch.setattr(blurs, "separable", lambda levels, *_: levels.to(torch.float32))
    shaken = blurs.glass_blur(images, (0.1, reach, 2), image_keys("", torch.arange(1)))
    before, after = ([*map(tuple, each.view(-1, 3).tolist())] for each in (images, shaken))
    assert set(after) < set(before)  # a swap would keep every pixel
    assert 0.2 < 1 - len(set(after)) / len(before) < 0.7


def test_angles_are_even_and_trails_whole() -> None:
    known, of_angle = blurs.motion_kernels(8, 2, 0)
    assert len(of_angle) == blurs.ANGLES
    assert all(sum(share for *_, share in kernel) == 2**22 for kernel in known)
    chosen = below(image_keys("angles", torch.arange(20000)), blurs.ANGLES, 1).flatten()
    assert stats.chisquare(chosen.bincount(minlength=blurs.ANGLES).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["motion_blur", "zoom_blur", "elastic_transform", "glass_blur"])
def test_flat_images_stay_as_they_are(name: str) -> None:
    flat = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 8, 9, 3)
    for severity in SEVERITIES:
        assert torch.equal(corrupt(flat, name, severity), flat)


def test_weather_brightens_and_stays_in_range() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 32, 32, 3)
    assert int(corrupt(ends, "snow", 5).amin(0).max()) > 100
    assert corrupt(ends, "fog", 5)[0].sum() == 0  # nothing to scatter: the largest value is 0
    assert corrupt(ends, "frost", 5).amax() == 255


def test_water_equals_opencvs_by_hand() -> None:
    edges = torch.zeros(9, 9, 1, dtype=torch.bool)
    edges[4, 4] = True
    distance = spatter._distance(edges)[..., 0]
    assert distance[4].tolist() == [4, 3, 2, 1, 0, 1, 2, 3, 4]
    np.testing.assert_allclose(distance[0, :5], [5.6, 2 * 1.4 + 2.1969, 2 * 2.1969, 2 + 2.1969, 4], rtol=1e-6)
    assert spatter._distance(torch.zeros(5, 5, 1, dtype=torch.bool)).unique().tolist() == [20]
    layer = torch.tensor([[1, 1, 2, 3], [3, 3, 3, 3]], dtype=torch.int32)[..., None]
    assert spatter._equalised(layer)[..., 0].tolist() == [[0, 0, 42, 255], [255, 255, 255, 255]]
    assert spatter._equalised(torch.full((4, 4, 1), 7, dtype=torch.int32)).unique().tolist() == [7]
