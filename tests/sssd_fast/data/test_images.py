"""Decoding: every kind of file users have ends as the right uint8 picture, or as an error that names the file."""

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


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
def test_lossless_formats_come_back_exactly(kind, pixels):
    decoded = decode_bytes(encode(Image.fromarray(pixels), kind), "x")
    np.testing.assert_array_equal(decoded.pixels, pixels)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.format == kind


def test_jpeg_is_close_and_keeps_grey_grey():
    smooth = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8) * 2
    decoded = decode_bytes(encode(Image.fromarray(smooth), "JPEG", quality=95), "x.jpg")
    assert decoded.pixels.shape == (40, 50)
    assert np.abs(decoded.pixels.astype(int) - smooth).max() <= 3


def test_alpha_is_composited_on_black():
    alpha = np.full((12, 17), 128, np.uint8)
    alpha[:6] = 0
    expected = np.rint(RGB * (alpha[:, :, None] / 255.0))
    decoded = decode_bytes(encode(Image.fromarray(np.dstack([RGB, alpha]))), "x.png").pixels
    assert np.abs(decoded - expected).max() <= 1
    assert decoded.shape == (12, 17, 3)
    grey = decode_bytes(encode(Image.fromarray(np.dstack([GREY, alpha]))), "x.png").pixels
    assert np.abs(grey - np.rint(GREY * (alpha / 255.0))).max() <= 1
    assert grey.shape == (12, 17)


def test_palette_and_its_transparent_colour():
    indexed = Image.fromarray((GREY % 4).astype(np.uint8), "P")
    indexed.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7] + [0] * (252 * 3))
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    np.testing.assert_array_equal(decode_bytes(encode(indexed), "x.png").pixels, colours[GREY % 4])
    colours[2] = 0  # blue becomes transparent, so black
    np.testing.assert_array_equal(
        decode_bytes(encode(indexed, transparency=2), "x.png").pixels, colours[GREY % 4]
    )


def test_one_bit_and_cmyk():
    bits = GREY > 127
    np.testing.assert_array_equal(
        decode_bytes(encode(Image.fromarray(bits)), "x.png").pixels, bits * np.uint8(255)
    )
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    pixels = decode_bytes(encode(cmyk, "JPEG", quality=100), "x.jpg").pixels.astype(int)
    assert pixels[..., 0].min() > 245
    assert pixels[..., 1:].max() < 10


@pytest.mark.parametrize(
    ("top", "full"),
    [(200, 255), (255, 255), (256, 4095), (4095, 4095), (4096, 65535), (65535, 65535)],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_by_the_stated_rule(top, full, kind):
    values = np.linspace(0, top, 12 * 17).reshape(12, 17).astype(np.uint16)
    decoded = decode_bytes(encode(Image.fromarray(values), kind), "x").pixels
    np.testing.assert_array_equal(decoded, np.floor(values * 255.0 / full + 0.5).astype(np.uint8))


def test_negative_integer_and_float_pixels_are_refused_not_wrapped():
    with pytest.raises(ImageError, match=r"from -5 to .*window the CT values first"):
        decode_bytes(encode(Image.fromarray(np.full((9, 9), -5, np.int32)), "TIFF"), "ct.tif")
    with pytest.raises(ImageError, match="mode 'F' have no fixed range"):
        decode_bytes(encode(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "ct.tif")


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to display
    decoded = decode_bytes(encode(Image.fromarray(GREY), "PNG", exif=exif), "x.png").pixels
    np.testing.assert_array_equal(decoded, np.rot90(GREY, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_an_error_that_names_it(kind, part):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    with pytest.raises(ImageError, match=r"bad%1 \(2\)"):
        decode_bytes(data[: int(part * len(data))], "bad%1 (2).png")


def test_flipped_bytes_never_escape_as_another_exception():
    data = bytearray(encode(Image.fromarray(GREY)))
    for place in range(8, len(data)):  # past the signature
        broken = bytearray(data)
        broken[place] ^= 0xFF
        with contextlib.suppress(ImageError):
            decode_bytes(bytes(broken), "x.png")


def test_truncated_pictures_stay_errors_when_another_package_allows_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is True"):
        decode_bytes(encode(Image.fromarray(GREY)), "x.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GIF89a" + b"\0" * 40, "the content is GIF"),
        (b"<!DOCTYPE html><p>404", "the content is HTML"),
        (b"\0" * 128 + b"DICM" + b"\0" * 40, "the content is DICOM"),
        (b"hello", "no known image format"),
    ],
)
def test_content_that_is_no_image_is_named(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_bytes(data, "x.png")


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8200, 9600, 20000, 2**31 - 1])
def test_enormous_pictures_are_refused_before_decoding(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match="pixels"):
        decode_bytes(huge_png(side, side), "bomb.png")


def test_one_pixel_is_refused():
    with pytest.raises(ImageError, match="1 x 1 pixels; at least 8 x 8"):
        decode_bytes(encode(Image.new("L", (1, 1))), "dot.png")


def test_files_that_vanished_or_are_empty_or_folders(tmp_path: Path):
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        decode_image(tmp_path / "gone.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png: empty file"):
        decode_image(tmp_path / "empty.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match=r"folder\.png: cannot be read"):
        decode_image(tmp_path / "folder.png")


def test_to_channels_luma_and_repeat():
    luma = RGB.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(to_channels(RGB, 1) - luma).max() <= 0.51
    np.testing.assert_array_equal(to_channels(GREY, 3), np.stack([GREY] * 3, 2))
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(
        to_channels(to_channels(every, 3), 1), every
    )  # grey survives the round trip exactly
    with pytest.raises(DataError, match="channels is 2"):
        to_channels(GREY, 2)


def test_pixel_hash_follows_pixels_not_storage():
    assert (
        pixel_hash(GREY)
        == pixel_hash(np.stack([GREY] * 3, 2))
        == pixel_hash(np.asfortranarray(GREY))
    )
    other = GREY.copy()
    other[3, 3] ^= 1
    assert len({pixel_hash(GREY), pixel_hash(other), pixel_hash(GREY.T), pixel_hash(RGB)}) == 4


def test_names_print_on_one_line_without_control_characters():
    assert printable("a\nb\x1b[31m é%0.png") == "a\\nb\\x1b[31m é%0.png"
    assert printable("\udcff.png").isprintable()
    assert sniff_format(b"RIFF\0\0\0\0WEBPVP8 ") == "WEBP"
    assert sniff_format(b"RIFF\0\0\0\0WAVE") is None
