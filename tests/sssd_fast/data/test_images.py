"""Decoder: every kind of file becomes the right uint8 image, or an error that names the file.

loaders/test_loader_faults.py has alpha, palettes, CMYK, orientation and JPEG.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from sssd_fast.data.images import (
    MAX_PIXELS,
    ImageError,
    decode_bytes,
    decode_image,
    pixel_hash,
    printable,
    sniff_format,
    to_channels,
)
from sssd_fast.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(data: bytes) -> np.ndarray:
    return decode_bytes(data, "x").pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
def test_lossless_formats_are_exact(kind, pixels):
    decoded = decode_bytes(encode(pixels, kind), "x")
    np.testing.assert_array_equal(decoded.pixels, pixels)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.format == kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("top", "full"),
    [(200, 255), (255, 255), (256, 4095), (4095, 4095), (4096, 65535), (65535, 65535)],
)
def test_16_bit_grey_is_scaled_by_the_smallest_range_that_fits(top, full, kind):
    values = np.linspace(0, top, 12 * 17).reshape(12, 17).astype(np.uint16)
    expected = np.floor(values * 255.0 / full + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(values, kind)), expected)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_file_of_several_pictures_is_refused(kind):
    pages = [Image.fromarray(np.roll(GREY, i, axis=0)) for i in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(pages[0], kind, save_all=True, append_images=pages[1:], **options)
    with pytest.raises(ImageError, match=rf"x: 3 pictures in one file \({kind}\); save each one"):
        decode(data)


def test_reason_of_a_damaged_file_names_no_object_in_memory():
    with pytest.raises(ImageError) as raised:
        decode(encode(GREY)[:30])
    assert "truncated or damaged PNG" in str(raised.value)
    assert "BytesIO" not in str(raised.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_truncated_file_is_an_error_that_names_it(kind, fraction):
    data = encode(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    with pytest.raises(ImageError, match=r"bad%1 \(2\)"):
        decode_bytes(data[: int(fraction * len(data))], "bad%1 (2).png")


def test_flipped_bytes_raise_no_other_exception():
    data = encode(GREY)
    for i in range(8, len(data)):  # after the signature
        with contextlib.suppress(ImageError):
            decode(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])


def test_truncated_files_are_refused_if_another_package_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is True"):
        decode(encode(GREY))


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8200, 9600, 20000, 2**31 - 1])
def test_enormous_images_are_refused_before_decoding(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match="pixels"):
        decode(huge_png(side))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GIF89a" + b"\0" * 40, "the content is GIF"),
        (b"<!DOCTYPE html><p>404", "the content is HTML"),
        (b"\0" * 128 + b"DICM" + b"\0" * 40, "the content is DICOM"),
        (b"hello", "not a known image format"),
        (b"II+\0\x08\0\0\0" + b"\0" * 40, "the content is BigTIFF .save it as a classic TIFF"),
        (encode(np.zeros((1, 1), np.uint8)), "1 x 1 pixels; at least 8 x 8"),
        (encode(np.full((9, 9), -5, np.int32), "TIFF"), "from -5 to .*window the CT values first"),
        (encode(np.ones((9, 9), np.float32), "TIFF"), "mode 'F' have no fixed range"),
    ],
)
def test_unusable_content_is_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_missing_empty_and_unreadable_files(tmp_path: Path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, reason in [
        ("gone.png", "no such file"),
        ("empty.png", "empty file"),
        ("folder.png", "cannot be read"),
    ]:
        with pytest.raises(ImageError, match=f"{name}: {reason}"):
            decode_image(tmp_path / name)


def test_to_channels_is_luma_and_repetition():
    luma = RGB.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(to_channels(RGB, 1) - luma).max() <= 0.51
    np.testing.assert_array_equal(to_channels(GREY, 3), np.stack([GREY] * 3, 2))
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(to_channels(to_channels(every, 3), 1), every)
    with pytest.raises(DataError, match="channels is 2"):
        to_channels(GREY, 2)


def test_pixel_hash_depends_on_pixels_and_not_on_storage():
    stored = [GREY, np.stack([GREY] * 3, 2), np.asfortranarray(GREY)]
    assert len(set(map(pixel_hash, stored))) == 1
    other = GREY.copy()
    other[3, 3] ^= 1
    assert len(set(map(pixel_hash, [GREY, other, GREY.T, RGB]))) == 4


def test_printable_names_and_webp_signature():
    assert printable("a\nb\x1b[31m é%0.png") == "a\\nb\\x1b[31m é%0.png"
    assert printable("\udcff.png").isprintable()
    assert sniff_format(b"RIFF\0\0\0\0WEBPVP8 ") == "WEBP"
    assert sniff_format(b"RIFF\0\0\0\0WAVE") is None
