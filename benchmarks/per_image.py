"""The nineteen corruptions of one image in NumPy, SciPy and Pillow, step by step as the authors' script goes.

What a batch is measured against, and in the tests held to. Each is a function ``(image, constants, rng) -> levels``:
uint8 (H, W, 3) in, float levels out, to be clipped to 0 to 255 and truncated.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Levels = NDArray[np.float64]
Bytes = NDArray[np.uint8]

CIFAR: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": tuple(np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}


def truncated(levels: Levels) -> Bytes:
    return np.clip(levels, 0, 255).astype(np.uint8)


def gaussian_noise(image: Bytes, c: float, rng: Generator) -> Levels:
    return image + rng.normal(scale=255 * c, size=image.shape)


def shot_noise(image: Bytes, c: float, rng: Generator) -> Levels:
    return rng.poisson(image / 255 * c) / c * 255


def impulse_noise(image: Bytes, c: float, rng: Generator) -> Levels:
    chance = rng.random(image.shape)
    levels = image.astype(np.float64)
    levels[chance < c] = 255
    levels[chance < c / 2] = 0
    return levels


def speckle_noise(image: Bytes, c: float, rng: Generator) -> Levels:
    return image + image * rng.normal(scale=c, size=image.shape)


def smooth(levels: NDArray[Any], sigma: float) -> Levels:
    sigmas = (sigma, sigma, 0)[: levels.ndim]
    return ndimage.gaussian_filter(levels.astype(np.float64), sigmas, mode="nearest", truncate=4)


def gaussian_blur(image: Bytes, c: float, rng: Generator) -> Levels:
    return smooth(image, c)


@cache
def disk(radius: float, alias: float) -> Levels:
    reach = max(8, int(radius))
    grid = np.arange(-reach, reach + 1)
    aliased = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(np.float64)
    small = np.exp(-0.5 * (np.arange(-1, 2) / alias) ** 2)
    return ndimage.correlate(aliased / aliased.sum(), np.outer(small, small) / small.sum() ** 2, mode="mirror")


def defocus_blur(image: Bytes, c: tuple[float, float], rng: Generator) -> Levels:
    return ndimage.correlate(image.astype(np.float64), disk(*c)[..., None], mode="mirror")


def glass_blur(image: Bytes, c: tuple[float, int, int], rng: Generator) -> Levels:
    sigma, reach, rounds = c
    pixels = truncated(smooth(image, sigma) + 1e-4)
    height, width, _ = image.shape
    for _ in range(rounds):
        steps = rng.integers(-reach, reach, size=(height, width, 2)).tolist()
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                down, right = steps[h][w]
                # The script's swap. Both sides are views, so that the partner is copied, and then to itself.
                pixels[h, w], pixels[h + down, w + right] = pixels[h + down, w + right], pixels[h, w]
    return smooth(pixels, sigma)


def motion(levels: NDArray[Any], radius: int, sigma: float, degrees: float) -> Levels:
    height, width = levels.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    down = np.ceil(steps * np.sin(np.deg2rad(degrees)) - 0.5).astype(int)
    right = np.ceil(steps * np.cos(np.deg2rad(degrees)) - 0.5).astype(int)
    reach = 2 * radius
    padded = np.pad(levels, [(reach, reach), (reach, reach), (0, 0)][: levels.ndim], mode="edge")
    total = np.zeros(levels.shape)
    for weight, y, x in zip(weights / weights.sum(), down + reach, right + reach, strict=True):
        total += weight * padded[y : y + height, x : x + width]
    return total


def motion_blur(image: Bytes, c: tuple[int, float], rng: Generator) -> Levels:
    return motion(image, *c, rng.uniform(-45, 45))


def clipped_zoom(levels: Levels, factor: float) -> Levels:
    sizes = levels.shape[:2]
    crops = [int(np.ceil(size / factor)) for size in sizes]
    inner = tuple(slice((size - crop) // 2, (size - crop) // 2 + crop) for size, crop in zip(sizes, crops, strict=True))
    wide = ndimage.zoom(levels[inner], (factor, factor, 1)[: levels.ndim], order=1)
    starts = [(long - size) // 2 for long, size in zip(wide.shape[:2], sizes, strict=True)]
    return wide[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def zoom_blur(image: Bytes, c: Levels, rng: Generator) -> Levels:
    levels = image.astype(np.float64)
    return (levels + sum(clipped_zoom(levels, factor) for factor in c)) / (len(c) + 1)


def snow(image: Bytes, c: tuple[float, float, float, float, int, float, float], rng: Generator) -> Levels:
    mean, deviation, zoom, threshold, radius, sigma, mix = c
    flakes = clipped_zoom(rng.normal(mean, deviation, size=image.shape[:2]), zoom)
    flakes[flakes < threshold] = 0
    layer = truncated(motion(truncated(flakes * 255 + 1e-4), radius, sigma, rng.uniform(-135, -45))).astype(np.float64)
    grey = image @ np.array([0.299, 0.587, 0.114])
    pale = mix * image + (1 - mix) * np.maximum(image, (1.5 * grey + 127.5)[..., None])
    return pale + (layer + np.rot90(layer, 2))[..., None]


@cache
def photographs(scale: float) -> list[Levels]:
    """The script's first five: its third is its second; sampled bilinearly without smoothing first, as by OpenCV."""
    found = []
    for number in (1, 2, 2, 3, 4):
        file = resources.files("torch_uncertainty_assets.frost") / f"frost{number}.jpg"
        pixels = np.asarray(Image.open(io.BytesIO(file.read_bytes()))).astype(np.float64)
        sizes = [round(size * scale) for size in pixels.shape[:2]]
        axes = [(np.arange(n) + 0.5) * (size / n) - 0.5 for n, size in zip(sizes, pixels.shape[:2], strict=True)]
        places = np.meshgrid(*axes, np.arange(3), indexing="ij")
        found.append(np.rint(ndimage.map_coordinates(pixels, places, order=1, mode="nearest")))
    return found


def frost(image: Bytes, c: tuple[float, float], rng: Generator) -> Levels:
    photograph = photographs(0.2)[rng.integers(0, 5)]
    height, width, _ = image.shape
    top = rng.integers(0, photograph.shape[0] - height)
    left = rng.integers(0, photograph.shape[1] - width)
    return c[0] * image + c[1] * photograph[top : top + height, left : left + width]


def plasma(side: int, decay: float, rng: Generator) -> Levels:
    points = np.zeros((side, side))
    step, wibble = side, 100.0
    while step >= 2:
        half = step // 2
        corners = points[::step, ::step]
        shape = corners.shape
        right, down = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        middles = (corners + right + down + np.roll(down, -1, 1)) / 4 + wibble * rng.uniform(-wibble, wibble, shape)
        points[half::step, half::step] = middles
        above, beside = np.roll(middles, 1, 0), np.roll(middles, 1, 1)
        points[::step, half::step] = (corners + right + middles + above) / 4 + wibble * rng.uniform(
            -wibble, wibble, shape
        )
        points[half::step, ::step] = (corners + down + middles + beside) / 4 + wibble * rng.uniform(
            -wibble, wibble, shape
        )
        step, wibble = half, wibble / decay
    points -= points.min()
    return points / points.max()


def fog(image: Bytes, c: tuple[float, float], rng: Generator) -> Levels:
    weight, decay = c
    height, width, _ = image.shape
    haze = plasma(1 << (max(height, width) - 1).bit_length(), decay, rng)[:height, :width]
    largest = image.max() / 255
    return (image + 255 * weight * haze[..., None]) * largest / (largest + weight)


def canny(layer: Bytes, low: int, high: int) -> NDArray[np.bool_]:
    x = ndimage.sobel(layer.astype(np.int32), 1, mode="nearest")
    y = ndimage.sobel(layer.astype(np.int32), 0, mode="nearest")
    slope = np.abs(x) + np.abs(y)
    padded = np.pad(slope, 1)
    height, width = layer.shape

    def around(down: int, right: int) -> NDArray[np.int32]:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat = np.abs(y) < np.tan(np.pi / 8) * np.abs(x)
    steep = np.abs(y) > np.tan(3 * np.pi / 8) * np.abs(x)
    ridges = [
        (slope > around(0, -1)) & (slope >= around(0, 1)),
        (slope > around(-1, 0)) & (slope >= around(1, 0)),
        (slope > around(-1, 1)) & (slope > around(1, -1)),
    ]
    falling = (slope > around(-1, -1)) & (slope > around(1, 1))
    candidates = np.select([flat, steep, x * y < 0], ridges, falling) & (slope > low)
    numbers, count = ndimage.label(candidates, np.ones((3, 3)))
    strong = np.bincount(numbers[candidates & (slope > high)], minlength=count + 1) > 0
    strong[0] = False
    return strong[numbers]


def euclidean(edges: NDArray[np.bool_]) -> Levels:
    return ndimage.distance_transform_edt(~edges) if edges.any() else np.full(edges.shape, 20.0)


def spatter(
    image: Bytes,
    c: tuple[float, float, float, float, float, int],
    rng: Generator,
    distance: Callable[[NDArray[np.bool_]], Levels] = euclidean,
) -> Levels:
    mean, deviation, sigma, threshold, strength, muddy = c
    liquid = smooth(rng.normal(mean, deviation, size=image.shape[:2]), sigma)
    liquid[liquid < threshold] = 0
    if muddy:
        mud = smooth((liquid > threshold).astype(np.float64), strength)
        mud[mud < 0.8] = 0
        return image * (1 - mud[..., None]) + mud[..., None] * (63, 42, 20)
    drops = truncated(liquid * 255)
    far = np.minimum(distance(canny(drops, 50, 150)), 20)
    values = (ndimage.uniform_filter(far, 3, mode="mirror") + 1e-4).astype(np.uint8)
    upto = np.bincount(values.ravel(), minlength=256).cumsum()
    fewest = upto[values.min()]
    if fewest < values.size:
        values = np.rint((upto - fewest) * 255 / (values.size - fewest)).clip(0)[values].astype(np.uint8)
    light = ndimage.correlate(values.astype(np.float64), [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], mode="mirror")
    glint = np.rint(ndimage.uniform_filter(light.clip(0, 255), 3, mode="mirror"))
    water = drops * glint
    return image + strength * (water / max(water.max(), 1))[..., None] * (175, 238, 238)


def brightness(image: Bytes, c: float, rng: Generator) -> Levels:
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + c, 0, 1)
    return hsv_to_rgb(hsv) * 255


def contrast(image: Bytes, c: float, rng: Generator) -> Levels:
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * c + mean


def saturate(image: Bytes, c: tuple[float, float], rng: Generator) -> Levels:
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * c[0] + c[1], 0, 1)
    return hsv_to_rgb(hsv) * 255


def elastic_transform(image: Bytes, c: tuple[float, float, float], rng: Generator) -> Levels:
    height, width, _ = image.shape
    alpha, sigma, jitter = (part * min(height, width) for part in c)
    third = min(height, width) // 3
    x, y = width // 2, height // 2
    before = np.array([[x + third, y + third], [x + third, y - third], [x - third, y - third]], dtype=np.float64)
    after = before + rng.uniform(-jitter, jitter, size=(3, 2))
    affine = np.linalg.solve(np.column_stack((after, np.ones(3))), before).T  # (x, y) from (x, y, 1)
    matrix = np.array([[affine[1, 1], affine[1, 0], 0], [affine[0, 1], affine[0, 0], 0], [0, 0, 1]])
    offset = [affine[1, 2], affine[0, 2], 0]
    levels = ndimage.affine_transform(image.astype(np.float64), matrix, offset, order=1, mode="mirror")
    if alpha == 0:
        return levels
    down, right = (
        ndimage.gaussian_filter(rng.uniform(-1, 1, size=(height, width)), sigma, mode="reflect", truncate=3) * alpha
        for _ in range(2)
    )
    rows, columns, channels = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    places = (rows + down[..., None], columns + right[..., None], channels)
    return ndimage.map_coordinates(levels, places, order=1, mode="reflect")


def pixelate(image: Bytes, c: float, rng: Generator) -> Levels:
    height, width, _ = image.shape
    small = Image.fromarray(image).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)).astype(np.float64)


def jpeg_compression(image: Bytes, c: int, rng: Generator) -> Levels:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=c)
    return np.asarray(Image.open(file)).astype(np.float64)
