"""Pixels mean one thing: each kind of file against what it must look like, and those without a meaning refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ensembler.data import datasets
from ensembler.data.decoding import decode, read_image
from ensembler.errors import DataError, ShapeError

GREY = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def saved(folder: Path, image: Image.Image, suffix: str, **options) -> Path:
    path = folder / f"image{suffix}"
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(GREY), ".png"),
        (Image.fromarray(GREY), ".tif"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), ".png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), ".tif"),
        (Image.fromarray(GREY.astype(np.float32) / 255), ".tif"),
        (Image.fromarray(GREY).convert("P"), ".png"),
        (Image.fromarray(GREY).convert("LA"), ".png"),
        (Image.fromarray(GREY).convert("RGBA"), ".webp"),
        (Image.fromarray(GREY), ".gif"),
        (Image.fromarray(GREY), ".bmp"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_grey_is_grey_whatever_the_file(tmp_path, image, suffix):
    path = saved(tmp_path, image, suffix, **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(read_image(path), np.stack([GREY] * 3, axis=2))


def test_a_grey_map_of_16_bits_is_grey(tmp_path):
    path = tmp_path / "image.pgm"  # written by hand: Pillow 10.4 only reads such files
    head = f"P5 {GREY.shape[1]} {GREY.shape[0]} 65535\n".encode()
    path.write_bytes(head + (GREY.astype(">u2") * 257).astype(">u2").tobytes())
    assert np.array_equal(read_image(path), np.stack([GREY] * 3, axis=2))


def test_one_bit_is_black_and_white(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY > 127), ".png")
    with Image.open(path) as opened:
        assert opened.mode == "1"
    assert np.array_equal(read_image(path)[..., 1], np.where(GREY > 127, 255, 0))


def test_transparent_parts_are_white(tmp_path):
    alpha = np.where(GREY > 127, 255, GREY)[..., None].astype(np.uint8)
    seen = np.rint((COLOUR.astype(float) * alpha + 255.0 * (255 - alpha)) / 255)
    assert np.array_equal(read_image(saved(tmp_path, Image.fromarray(np.dstack([COLOUR, alpha])), ".png")), seen)
    assert np.array_equal(read_image(saved(tmp_path, Image.fromarray(np.dstack([COLOUR, alpha])), ".tif")), seen)
    hole = np.array([[0, 1], [1, 2]], np.uint8)
    palette = Image.fromarray(hole, "P")
    palette.putpalette([9, 9, 9, 50, 60, 70, 1, 2, 3])
    for suffix in (".png", ".gif"):
        read = read_image(saved(tmp_path, palette, suffix, transparency=0))
        assert read.tolist() == [[[255] * 3, [50, 60, 70]], [[50, 60, 70], [1, 2, 3]]]
    key = read_image(
        saved(tmp_path, Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]])), ".png", transparency=(1, 2, 3))
    )
    assert key.tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk_is_converted(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOUR).convert("CMYK"), ".tif")
    assert np.array_equal(read_image(path), COLOUR)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_photos_are_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = saved(tmp_path, Image.fromarray(COLOUR), suffix, exif=exif)
    lying = read_image(saved(tmp_path / "..", Image.fromarray(COLOUR), suffix)) if suffix == ".jpg" else COLOUR
    upright = {1: lying, 2: lying[:, ::-1], 3: lying[::-1, ::-1], 4: lying[::-1], 5: lying.transpose(1, 0, 2)}
    upright |= {6: np.rot90(lying, -1), 7: np.rot90(lying, 2).transpose(1, 0, 2), 8: np.rot90(lying)}
    assert np.array_equal(read_image(path), upright[orientation])
    assert read_image(path, (3, 5)).shape == (3, 5, 3)


def tiff(path: Path, data: bytes, bits: int, **tags: int) -> Path:
    """Write a grey TIFF file of 8 x 6 pixels, uncompressed, with tags by their names."""
    numbers = {"white": 262, "orientation": 274, "kind": 339}  # PhotometricInterpretation, Orientation, SampleFormat
    entries = {256: 8, 257: 6, 258: bits, 259: 1, 262: 1, 273: 200, 277: 1, 278: 6, 279: len(data)}
    entries |= {numbers[name]: value for name, value in tags.items()}
    table = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(entries.items()))
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    path.write_bytes(header.ljust(200, b"\0") + data)
    return path


@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint8), (16, np.uint16)])
def test_grey_tiff_files_are_upright(tmp_path, bits, kind):
    data = (GREY.astype(np.uint16) * (257 if bits == 16 else 1)).astype(kind).tobytes()
    read = read_image(tiff(tmp_path / "image.tif", data, bits, orientation=6))
    assert np.array_equal(read[..., 1], np.rot90(GREY, -1))


def test_tiff_files_say_what_is_white(tmp_path):
    wide = (GREY.astype("<u2") * 257).tobytes()
    assert np.array_equal(read_image(tiff(tmp_path / "image.tif", wide, 16, white=0))[..., 1], 255 - GREY)
    values = np.rint(GREY.astype(float) * 4095 / 255).astype(int)
    packed = bytes.fromhex("".join(f"{value:03x}" for value in values.flat))
    assert np.array_equal(read_image(tiff(tmp_path / "image.tif", packed, 12))[..., 1], GREY)
    with pytest.raises(DataError, match=r"pixels of mode L \(signed\), which do not say what is white"):
        read_image(tiff(tmp_path / "image.tif", GREY.tobytes(), 8, kind=2))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_transparent_grey_of_a_png_of_few_bits_is_white(tmp_path, bits):
    values = GREY % 2**bits
    values[0, 0] = 1
    rows = [int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits, "big") for row in values]
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, chunk in {b"IHDR": header, b"tRNS": b"\0\1", b"IDAT": data, b"IEND": b""}.items():
        content += struct.pack(">I", len(chunk)) + name + chunk + struct.pack(">I", zlib.crc32(name + chunk))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    seen = np.where(values == 1, 255, values.astype(int) * 255 // (2**bits - 1))
    assert np.array_equal(read_image(path)[..., 1], seen)


def test_an_animation_is_its_first_image(tmp_path):
    frames = [Image.fromarray(pixels) for pixels in (GREY, 255 - GREY)]
    path = saved(tmp_path, frames[0], ".gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_image(path)[..., 0], GREY)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(GREY.astype(np.float32)), r"floats from \d+ to \d+ \(mode F\), not from 0 to 1: save it with"),
        (Image.fromarray(np.full((6, 8), np.nan, np.float32)), r"floats from nan to nan \(mode F\)"),
        (
            Image.fromarray(GREY.astype(np.int32)),
            r"pixels of mode I \(signed\), which do not say what is white: save it with 8 or 16",
        ),
        (Image.fromarray(COLOUR).convert("LAB"), "pixels of mode LAB, which do not say"),
    ],
)
def test_pixels_without_a_meaning_are_refused(tmp_path, image, message):
    path = saved(tmp_path, image, ".tif")
    with pytest.raises(DataError, match=f"cannot read the image {path}: {message}"):
        read_image(path)
    with pytest.raises(ShapeError, match=f"^{message}"):
        decode(path)


def test_an_image_of_too_many_pixels_is_to_be_made_smaller(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(GREY), ".png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"^the image .*image.png has more pixels than Pillow reads: make it smaller$"):
        read_image(path)


def folder_of(folder: Path, make, suffix: str) -> str:
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (8, 8), dtype=np.uint8)
            make(pixels).save(folder / name / f"{number}{suffix}")
    return f"folder:{folder}"


@pytest.mark.parametrize("in_memory", [True, False])
def test_16_bits_and_floats_train_as_8_bits(tmp_path, in_memory):
    makes = {
        "8": (Image.fromarray, ".png"),
        "16": (lambda pixels: Image.fromarray(pixels.astype(np.uint16) * 257), ".png"),
        "F": (lambda pixels: Image.fromarray(pixels.astype(np.float32) / 255), ".tif"),
    }
    options = {"in_memory": in_memory, "image_size": 8}
    found = {name: datasets.load(folder_of(tmp_path / name, *kind), **options) for name, kind in makes.items()}
    for part in ("train", "validation", "test"):
        right = next(getattr(found["8"], part).batches(99)).images
        for name in ("16", "F"):
            assert torch.equal(right, next(getattr(found[name], part).batches(99)).images)


def test_files_that_use_few_of_their_bits_are_said(tmp_path):
    dark = folder_of(tmp_path, lambda pixels: Image.fromarray(pixels.astype(np.uint16) * 16), ".png")  # 12 of 16 bits
    (note,) = (line for line in datasets.load(dark).notes if "brighter" in line)
    assert note.startswith("no training image has a pixel brighter than 16 of 255: if the files hold fewer bits")
