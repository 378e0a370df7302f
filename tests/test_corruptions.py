"""The interface of the corruptions, and those without randomness against per-image references."""

from __future__ import annotations

import colorsys
import hashlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.eval.shift import corruptions
from ensembler.eval.shift.corruptions import (
    AVAILABLE,
    HEADLINE,
    SEVERITIES,
    VALIDATION,
    Constants,
    corrupt,
    fingerprint,
)

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
RANDOM = (*NOISES, "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "spatter")
DETERMINISTIC = tuple(name for name in AVAILABLE if name not in RANDOM)


def photographs(count: int = 24, height: int = 32, width: int = 32) -> Tensor:
    """Smooth colourful images with some black, white, grey and saturated ones among them."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(count, height, width, 3)), (0, 2, 2, 0.5))
    images = np.clip(smooth * 500 + 128, 0, 255).astype(np.uint8)
    images[0], images[1], images[2] = 0, 255, 100
    images[3] = (255, 0, 0)
    images[4] = images[4, ..., :1]
    images[5] = rng.integers(0, 256, images[5].shape)
    return torch.from_numpy(images)


IMAGES = photographs()


# --- the interface --------------------------------------------------------------------------------------------------


def test_names_are_the_protocols() -> None:
    assert len(HEADLINE) == 15
    assert len(VALIDATION) == 4
    assert len({*HEADLINE, *VALIDATION}) == 19
    assert HEADLINE + VALIDATION == AVAILABLE
    assert corruptions._TABLE.keys() == {*AVAILABLE}
    assert all(len(known.cifar) == len(known.imagenet) == 5 for known in corruptions._TABLE.values())
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("name", AVAILABLE)
def test_gives_new_bytes_of_the_same_shape(name: str) -> None:
    before = IMAGES.clone()
    for severity in SEVERITIES:
        found = corrupt(IMAGES, name, severity)
        assert found.dtype == torch.uint8
        assert found.shape == IMAGES.shape
        assert found.is_contiguous()
        assert not torch.equal(found, IMAGES)
    assert torch.equal(IMAGES, before)
    assert corrupt(IMAGES[:0], name, 1).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("severity", [1, 4, 5])
def test_a_slice_holds_the_bytes_of_the_whole(name: str, severity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = corrupt(IMAGES, name, severity, seed=3)
    chosen = torch.tensor([17, 3, 4, 20, 0])
    assert torch.equal(corrupt(IMAGES[chosen], name, severity, indices=chosen, seed=3), whole[chosen])
    assert torch.equal(corrupt(IMAGES[9:10], name, severity, indices=[9], seed=3), whole[9:10])
    strided = IMAGES.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert torch.equal(corrupt(strided, name, severity, seed=3), whole)
    monkeypatch.setitem(corruptions._CHUNK, "cpu", 7 * 32 * 32 * 3)
    assert torch.equal(corrupt(IMAGES, name, severity, seed=3), whole)


@pytest.mark.parametrize("name", RANDOM)
def test_noise_depends_on_seed_severity_and_index_alone(name: str) -> None:
    grey = IMAGES[7:8].expand(3, 32, 32, 3)
    first = corrupt(grey, name, 3, indices=[5, 5, 6])
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert torch.equal(first, corrupt(grey, name, 3, indices=torch.tensor([5, 5, 6], dtype=torch.int32), seed=0))
    assert not torch.equal(first[0], corrupt(grey, name, 3, indices=[5, 5, 6], seed=1)[0])
    assert not torch.equal(first[0], corrupt(grey, name, 4, indices=[5, 5, 6])[0])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_rest_depends_on_nothing_but_the_image(name: str) -> None:
    assert torch.equal(corrupt(IMAGES, name, 3, seed=1, indices=range(5, 29)), corrupt(IMAGES, name, 3))


def test_the_bytes_of_a_release_are_the_bytes_of_the_next() -> None:
    ramp = (torch.arange(2 * 32 * 32 * 3) % 256).to(torch.uint8).view(2, 32, 32, 3)
    digests = {
        name: hashlib.sha256(corrupt(ramp, name, 3, seed=7).numpy().tobytes()).hexdigest()[:16] for name in NOISES
    }
    assert digests == {
        "gaussian_noise": "d27d5940869322f0",
        "shot_noise": "717adea8c4fa8576",
        "impulse_noise": "ed44ebf233e47960",
        "speckle_noise": "8fe0f01c71368c4d",
    }


def test_a_fingerprint_notices_code_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        fingerprint(name, severity, seed, shape)
        for name in ("fog", "contrast")
        for severity in (1, 2)
        for seed in (0, 1)
        for shape in ((32, 32), (28, 32))
    }
    assert len(found) == 12  # contrast draws nothing, so that its seed changes nothing
    assert all(len(digest) == 64 for digest in found)
    before = fingerprint("contrast", 3, 0, (32, 32))
    assert fingerprint("contrast", 3, 0, (32, 32)) == before
    table = corruptions._TABLE
    monkeypatch.setitem(table, "contrast", table["contrast"]._replace(cifar=(0.75, 0.5, 0.41, 0.3, 0.15)))
    assert fingerprint("contrast", 3, 0, (32, 32)) != before


@pytest.mark.parametrize("name", AVAILABLE)
def test_large_images_take_the_constants_of_imagenet(name: str) -> None:
    for size, expected in (((65, 66), "imagenet"), ((64, 66), "cifar")):
        images = photographs(8, *size)[6:]
        found = {key: corrupt(images, name, 5, constants=key) for key in ("cifar", "imagenet")}
        assert torch.equal(corrupt(images, name, 5), found[expected])
        assert not torch.equal(found["cifar"], found["imagenet"])


@pytest.mark.parametrize("name", AVAILABLE)
def test_images_of_imagenets_size(name: str) -> None:
    images = photographs(7, 224, 224)[5:]
    whole = corrupt(images, name, 2)
    assert whole.shape == images.shape
    assert torch.equal(corrupt(images[1:], name, 2, indices=[1]), whole[1:])


@given(
    st.sampled_from(AVAILABLE),
    st.sampled_from(SEVERITIES),
    st.integers(1, 5),
    st.integers(4, 40),
    st.integers(4, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["cifar", "imagenet"]),
)
@settings(max_examples=80, deadline=None)
def test_any_size_works(
    name: str, severity: int, count: int, height: int, width: int, seed: int, constants: Constants
) -> None:
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))
    whole = corrupt(images, name, severity, seed=seed, constants=constants)
    assert whole.shape == images.shape
    last = corrupt(images[-1:], name, severity, indices=[count - 1], seed=seed, constants=constants)
    assert torch.equal(last, whole[-1:])


@pytest.mark.parametrize(
    ("images", "name", "severity", "indices", "error", "message"),
    [
        (IMAGES, "rain", 1, None, UsageError, "'rain' is not available here; choose one of gaussian_noise, shot_noise"),
        (IMAGES, "contrast", 0, None, UsageError, "severity 0 of contrast does not exist; choose one of 1, 2, 3, 4, 5"),
        (IMAGES, "contrast", True, None, UsageError, "severity True"),
        (IMAGES, "contrast", 1.0, None, UsageError, "severity 1.0"),
        (IMAGES.float(), "contrast", 1, None, ShapeError, "found torch.float32; give the bytes 0 to 255"),
        (IMAGES.numpy(), "contrast", 1, None, ShapeError, "found ndarray"),
        (IMAGES.permute(0, 3, 1, 2), "contrast", 1, None, ShapeError, r"\(24, 3, 32, 32\); put the channels last"),
        (IMAGES[0], "contrast", 1, None, ShapeError, r"found \(32, 32, 3\)"),
        (IMAGES[:, :3], "contrast", 1, None, ShapeError, "at least 4"),
        (IMAGES, "contrast", 1, [1, 2], ShapeError, "indices must be 24 integers"),
        (IMAGES, "contrast", 1, torch.zeros(24), ShapeError, "found torch.float32"),
        (IMAGES, "contrast", 1, torch.ones(24, dtype=torch.bool), ShapeError, "found torch.bool"),
    ],
)
def test_bad_input_is_named(images, name, severity, indices, error: type[EnsemblerError], message: str) -> None:
    with pytest.raises(error, match=message):
        corrupt(images, name, severity, indices=indices)


def test_unknown_constants_and_seeds_are_named() -> None:
    for seed in ("7", 1.5):
        with pytest.raises(UsageError, match=f"the seed must be a whole number, not {seed!r}"):
            corrupt(IMAGES, "contrast", 1, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="constants 'mnist' do not exist; choose 'cifar', 'imagenet' or None"):
        corrupt(IMAGES, "contrast", 1, constants="mnist")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        *NOISES,
        *("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "snow", "fog"),
        *("contrast", "brightness", "pixelate", "jpeg_compression"),
    ],
)
def test_severity_grows(name: str) -> None:
    change = [float((corrupt(IMAGES, name, severity).float() - IMAGES.float()).abs().mean()) for severity in SEVERITIES]
    assert change == sorted(change)
    assert change[0] > 0.05


# --- everything else, against one image at a time -------------------------------------------------------------------


def reference_gaussian_blur(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    sigma = (0.4, 0.6, 0.7, 0.8, 1)[severity - 1]
    channels = [ndimage.gaussian_filter(image[..., c] / 255.0, sigma, mode="nearest", truncate=4) for c in range(3)]
    return np.stack(channels, -1) * 255


def reference_defocus_blur(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    columns, rows = np.meshgrid(np.arange(-8, 9), np.arange(-8, 9))
    disk = (columns**2 + rows**2 <= radius**2).astype(float)
    weights = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * alias**2))
    smooth = np.outer(weights, weights) / weights.sum() ** 2
    kernel = ndimage.correlate(disk / disk.sum(), smooth, mode="mirror")
    channels = [ndimage.correlate(image[..., c] / 255.0, kernel, mode="mirror") for c in range(3)]
    return np.stack(channels, -1) * 255


def reference_contrast(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    x = image / 255.0
    mean = x.mean((0, 1), keepdims=True)
    return ((x - mean) * factor + mean) * 255


def reference_brightness(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    amount = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    hsv = (colorsys.rgb_to_hsv(*pixel) for pixel in (image / 255.0).reshape(-1, 3))
    rgb = [colorsys.hsv_to_rgb(h, s, min(v + amount, 1)) for h, s, v in hsv]
    return np.array(rgb).reshape(image.shape) * 255


def reference_saturate(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    a, b = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    hsv = (colorsys.rgb_to_hsv(*pixel) for pixel in (image / 255.0).reshape(-1, 3))
    rgb = [colorsys.hsv_to_rgb(h, min(max(s * a + b, 0), 1), v) for h, s, v in hsv]
    return np.array(rgb).reshape(image.shape) * 255


def reference_pixelate(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    factor = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)).astype(np.float64)


def reference_jpeg_compression(image: NDArray[np.uint8], severity: int) -> NDArray[np.float64]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    return np.asarray(Image.open(file)).astype(np.float64)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "zoom_blur"])
@pytest.mark.parametrize("size", [(32, 32), (28, 33), (5, 8), (48, 32)])
def test_equals_one_image_at_a_time(name: str, severity: int, size: tuple[int, int]) -> None:
    images = photographs(10, *size)[3:]
    reference = globals()[f"reference_{name}"]
    levels = np.stack([reference(image.numpy(), severity) for image in images])
    found = corrupt(images, name, severity).numpy()
    # The bytes are the truncated levels; where a level is a whole number but for rounding errors, as a mean of five
    # bytes is in one of five cases, those errors decide whether the script keeps it or loses one.
    np.testing.assert_array_less(np.floor(levels - 2e-4) - 1, found)
    np.testing.assert_array_less(found, np.floor(levels + 2e-4) + 1)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "contrast", "pixelate"])
def test_flat_images_stay_as_they_are(name: str) -> None:
    flat = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 8, 9, 3)
    for severity in SEVERITIES:
        assert torch.equal(corrupt(flat, name, severity), flat)


def test_saturate_tints_grey_red_as_the_script_does() -> None:
    grey = torch.full((1, 4, 4, 3), 100, dtype=torch.uint8)
    assert torch.equal(corrupt(grey, "saturate", 3), grey)
    assert corrupt(grey, "saturate", 5)[0, 0, 0].tolist() == [100, 80, 80]


@pytest.mark.parametrize("size", [(32, 32), (28, 33), (31, 17), (4, 4), (7, 5), (6, 70), (66, 80)])
def test_jpeg_is_pillows_to_the_byte(size: tuple[int, int]) -> None:
    images = photographs(10, *size)[3:]
    for constants, qualities in (("cifar", (80, 65, 58, 50, 40)), ("imagenet", (25, 18, 15, 10, 7))):
        for severity, quality in zip(SEVERITIES, qualities, strict=True):
            found = corrupt(images, "jpeg_compression", severity, constants=constants)
            for image, ours in zip(images.numpy(), found.numpy(), strict=True):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "JPEG", quality=quality)
                np.testing.assert_array_equal(ours, np.asarray(Image.open(file)))
