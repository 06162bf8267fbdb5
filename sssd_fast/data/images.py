"""Image files to uint8 arrays: one decoder for the check, the loaders and the evaluation.

Rules, so that an image never depends on which code opened it:
- the content (first bytes) decides the format; the check (index.py) compares it with the suffix;
- 8-bit grey stays [H, W]; colour, palette, CMYK and YCbCr become RGB [H, W, 3]; 1-bit is 0/255;
- transparency is composited on black;
- 16-bit grey is scaled linearly from a range of values to 0..255. A checked set has one range for
  all images (index.py); a single file has 0..2^b - 1, where b is the smallest of 8, 12 and 16 bits
  that holds its largest value (12-bit CT stored in 16 bits would otherwise be almost black).
  16-bit colour keeps the high byte (Pillow's rule);
- several pictures in one file (pages, animation) are an error, because a reader takes the first;
- an EXIF orientation is applied;
- a truncated file is an error, never an image with a grey remainder.
"""

from __future__ import annotations

import hashlib
import re
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps

from sssd_fast.errors import DataError

ImageArray = npt.NDArray[np.uint8]  # [H, W] grey or [H, W, 3] RGB
GreyRange = tuple[int, int]  # values of 16-bit grey that become 0 and 255

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
MIN_SIDE = 8  # pixels: the smallest patch
WHITES = (255, 4095, 65535)  # largest value of 8, 12 and 16 bits
MAX_PIXELS = 64 * 2**20  # 8192 x 8192: far above any CT slice, far below what would exhaust memory

_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF (save it as a classic TIFF or PNG)"),
    (0, b"MM\0+", "BigTIFF (save it as a classic TIFF or PNG)"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (128, b"DICM", "DICOM"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "GZIP"),
    (0, b"<", "HTML or XML"),
    (0, b"ObjectType", "MetaImage (.mha, convert it to NIfTI)"),
    (0, b"NRRD", "NRRD (convert it to NIfTI)"),
)


class ImageError(DataError):
    """A file that is not a usable image. `reason` is the message without the file's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{printable(name)}: {reason}")
        self.name = name
        self.reason = reason


class Decoded(NamedTuple):
    pixels: ImageArray
    mode: str  # Pillow's mode of the stored file, before conversion
    format: str  # one of SUFFIXES' values, by content
    plain: bool  # see `_is_plain`
    values: npt.NDArray[np.uint16] | None  # of 16-bit grey, [H, W] before scaling


def printable(name: str) -> str:
    """`name` on one line: control characters and undecodable bytes become \\-escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in name
    )


def sniff_format(data: bytes) -> str | None:
    """The format according to the first bytes, or None."""
    for offset, magic, name in _MAGIC:
        if data[offset : offset + len(magic)] == magic:
            return name
    return None


def read_file(path: str | PathLike[str]) -> bytes:
    """The bytes of `path`. Raises ImageError if it is missing, unreadable or empty."""
    name = fspath(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(name, "no such file") from None
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror or error})") from error
    if not data:
        raise ImageError(name, "empty file (0 bytes)")
    return data


def decode_bytes(data: bytes, name: str, grey_range: GreyRange | None = None) -> Decoded:
    """Decode a file that is in memory; `name` is used in errors.

    grey_range: for 16-bit grey; None = the smallest that fits.

    Raises ImageError: unknown format, truncated or damaged data, fewer than MIN_SIDE pixels a side,
    more than MAX_PIXELS, several pictures, a pixel type without a fixed range (32-bit float).
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: damaged files would be read as half grey "
            "images. Some imported package or your code set it; set it to False."
        )
    found = sniff_format(data)
    if found is None or found not in SUFFIXES.values():
        content = f"the content is {found}" if found else "the content is not a known image format"
        raise ImageError(name, f"{content}; needed: {', '.join(sorted(set(SUFFIXES.values())))}")
    # MPO is a JPEG followed by further images, as some cameras write
    formats = [found, "MPO"] if found == "JPEG" else [found]
    try:
        with Image.open(BytesIO(data), formats=formats) as image:
            width, height = image.size
            size = f"{width} x {height} pixels"
            if width * height > MAX_PIXELS:
                raise ImageError(name, f"{size} is over the limit of {MAX_PIXELS} (2^26)")
            if min(width, height) < MIN_SIDE:
                raise ImageError(name, f"{size}; at least {MIN_SIDE} x {MIN_SIDE} are needed")
            # a JPEG may hold a preview of the same picture
            count = 1 if found == "JPEG" else int(getattr(image, "n_frames", 1))
            if count > 1:
                problem = f"{count} pictures in one file ({found})"
                raise ImageError(name, f"{problem}; save each one as a separate file")
            mode = image.mode
            image.load()
            plain = _is_plain(image, found)
            upright, values = ImageOps.exif_transpose(image), None
            if mode.startswith("I"):
                values = _grey_16_bit(np.asarray(upright), name)
                pixels = _scale(values, grey_range or (0, _smallest(int(values.max()))))
            else:
                pixels = _to_uint8(upright, name)
            return Decoded(pixels, mode, found, plain, values)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"too many pixels ({error})") from error
    except Exception as error:  # Pillow raises a dozen types on damaged data
        text = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))
        reason = f"truncated or damaged {found} ({type(error).__name__}: {text})"
        raise ImageError(name, reason) from error


def decode_image(path: str | PathLike[str], grey_range: GreyRange | None = None) -> ImageArray:
    """Read and decode one file -> uint8 [H, W] or [H, W, 3]. Raises ImageError naming the file."""
    return decode_bytes(read_file(path), fspath(path), grey_range).pixels


def to_channels(image: ImageArray, channels: int) -> ImageArray:
    """uint8 [H, W] or [H, W, 3] -> [H, W] for channels=1, [H, W, 3] for channels=3.

    RGB to grey is ITU-R 601 luma in Pillow's fixed-point form, which returns v for (v, v, v); grey
    is repeated.
    """
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}; 1 (grey) or 3 (RGB) is needed")
    if image.ndim == 2:
        return image if channels == 1 else np.repeat(image[:, :, None], 3, axis=2)
    return image if channels == 3 else np.array(Image.fromarray(image).convert("L"))


def pixel_hash(image: npt.NDArray[np.uint8 | np.uint16]) -> str:
    """SHA-256 of the pixels, independent of the file format; grey stored as RGB counts as grey, and
    16-bit values that fit in 8 bits as 8-bit grey.
    """
    if image.dtype != np.uint8 and image.max() <= 255:
        image = image.astype(np.uint8)
    if image.ndim == 3 and (image[:, :, :1] == image).all():
        image = image[:, :, 0]
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _is_plain(image: Image.Image, found: str) -> bool:
    """True if a decoder that knows none of the rules above gives the same RGB.

    This holds for an upright, opaque 8-bit PNG or JPEG.
    """
    if found not in ("PNG", "JPEG") or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return False
    if image.mode in ("RGBA", "LA"):
        return image.getchannel("A").getextrema() == (255, 255)
    rgb_jpeg = found == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform") == 0
    return image.mode in ("L", "RGB") and not image.has_transparency_data and not rgb_jpeg


def _to_uint8(image: Image.Image, name: str) -> ImageArray:
    if image.has_transparency_data:  # RGBA, LA, or a PNG with one transparent colour
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        rgb = np.array(Image.alpha_composite(black, rgba).convert("RGB"))
        return rgb[:, :, 0].copy() if image.mode in ("L", "LA", "La") else rgb
    if image.mode in ("L", "1"):
        return np.array(image.convert("L"))
    if image.mode in ("RGB", "P", "CMYK", "YCbCr", "RGBX"):
        return np.array(image.convert("RGB"))
    problem = f"pixels of Pillow mode {image.mode!r} have no fixed range"
    raise ImageError(name, f"{problem}; convert the file to 8 or 16 bits")


def _grey_16_bit(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.uint16]:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        problem = f"integer pixels from {low} to {high}; 0 to 65535 is needed"
        raise ImageError(name, f"{problem} (window the CT values first)")
    return values.astype(np.uint16)


def _smallest(high: int) -> int:
    return next(white for white in WHITES if high <= white)


def _scale(values: npt.NDArray[np.uint16], grey_range: GreyRange) -> ImageArray:
    """Linear, rounded to nearest; values outside of the range become 0 and 255."""
    low, high = grey_range
    wide = np.clip(values, low, high).astype(np.int64) - low
    return ((wide * 255 + (high - low) // 2) // (high - low)).astype(np.uint8)
