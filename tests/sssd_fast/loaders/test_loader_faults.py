"""Files that are damaged after the check must be named by each provider; files that programs decode
differently must be decoded correctly.

Good files are tested in test_loaders.py, the check of bad files in test_index.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.data.images import printable
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.errors import DataError
from sssd_fast.loaders import Loader
from tests.sssd_fast.loaders.loading import PLAIN, Make, loader_of

pytestmark = pytest.mark.timeout(60)

FEEDS: dict[str, dict[str, Any]] = {
    "torch": {"provider": "torch", "workers": 2},
    "resident": {"provider": "resident"},
    "dali": {"provider": "dali"},
}
# largest difference to the torch loader; DALI does not round between the two passes, and decodes
# JPEG in its own way
EXACTNESS = {"torch": 0, "resident": 2, "dali": 40}


@pytest.fixture(params=FEEDS)
def feed(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(feed: str) -> Iterator[Make]:
    """Builds loaders of the provider under test and closes them."""
    made: list[Loader] = []

    def make(index: DataIndex, **changes: Any) -> Loader:
        made.append(loader_of(index, **{"batch_size": 3, **FEEDS[feed], **changes}))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def coarse(seed: int, shape: tuple[int, ...] = (48, 64, 3)) -> np.ndarray:
    """An image without fine detail, for which all resize methods and JPEG decoders agree well."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, *shape[2:]), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def write_set(root: Path, seed: int) -> DataIndex:
    """Nine images: PNG, JPEG, and PNG with transparency, which Pillow decodes for DALI."""
    (root / "a").mkdir(parents=True)
    for i in range(9):
        pixels = coarse(9 * seed + i)
        if i % 3 == 0:
            Image.fromarray(pixels[:, :, 0].copy()).save(root / "a" / f"{i}.png")
        elif i % 3 == 1:
            Image.fromarray(pixels).save(root / "a" / f"{i}.jpg", quality=95)
        else:
            alpha = np.full((48, 64, 1), 200, np.uint8)
            Image.fromarray(np.concatenate([pixels, alpha], 2)).save(root / "a" / f"{i}.png")
    return check_data(root)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    return write_set(tmp_path_factory.mktemp("good"), 0)


@pytest.fixture
def index(tmp_path: Path, sets: Iterator[int]) -> DataIndex:
    return write_set(tmp_path / "data", next(sets))


@pytest.fixture(scope="module")
def sets() -> Iterator[int]:
    # Resident sets with the same images are shared, so each set gets another seed.
    return itertools.count(1)


def by_torch(index: DataIndex, channels: int = 1) -> torch.Tensor:
    """The images of the torch loader, [N, C, H, W] in the order of the index."""
    settings = {"channels": channels, "batch_size": len(index)}
    return next(loader_of(index, provider="torch", **settings).epoch(0)).images


def count_right(loader: Loader, reference: torch.Tensor, feed: str, epoch: int = 0) -> int:
    """The number of images in an epoch, after checking each of them."""
    count = 0
    for batch in loader.epoch(epoch):
        ids = batch.indices[: batch.count]
        difference = (batch.images[: batch.count].int() - reference[ids].int()).abs()
        assert difference.max() <= EXACTNESS[feed]
        assert difference.float().mean((1, 2, 3)).max() <= 1
        count += len(ids)
    return count


# ---- files that are damaged after the check ----


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_picture(path: Path) -> None:
    with Image.open(path) as image:
        mode, size = image.mode, image.size
    Image.new(mode, size).save(path)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (Path.unlink, "no such file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "truncated or damaged"),
    "zero bytes": (lambda path: path.write_bytes(b""), "empty file"),
    "another picture": (other_picture, "another image than the one that was checked"),
    "text": (lambda path: path.write_text("404 not found"), "not a known image format"),
    "directory": (directory, "cannot be read"),
}


@pytest.mark.parametrize(
    ("fault", "name"),
    [*((fault, "4.jpg") for fault in FAULTS), ("truncated", "3.png"), ("truncated", "5.png")],
)
def test_file_damaged_after_the_check_is_named_and_never_returned(
    index: DataIndex, good: DataIndex, build: Make, feed: str, fault: str, name: str
):
    """The file is in the second of three batches."""
    reference = by_torch(index)
    spoil, reason = FAULTS[fault]
    bad = index.root / "a" / name
    content = bad.read_bytes()
    spoil(bad)
    loader = None
    with pytest.raises(DataError) as error:  # noqa: PT012 - the resident set is read when its loader is made
        loader = build(index)
        count_right(loader, reference, feed)
    assert_names(error.value, bad, reason)
    assert count_right(build(good), by_torch(good), feed) == 9  # the process still works
    with pytest.raises(DataError) as error:
        count_right(loader or build(index), reference, feed)
    assert_names(error.value, bad, reason)
    if bad.is_dir():
        bad.rmdir()
    bad.write_bytes(content)
    loader = loader or build(index)
    for epoch in range(2):
        assert count_right(loader, reference, feed, epoch) == 9


def assert_names(error: DataError, file: Path, reason: str) -> None:
    """Checks for one line with the file, the problem and what to do."""
    text = str(error)
    assert text.startswith(f"{printable(str(file))}: ")
    assert reason in text
    assert text.endswith(
        "it was good when the data were checked: restore it, or run `sssd-fast data check` again"
    )
    assert text.isprintable()


@pytest.mark.parametrize("feed", [name for name in FEEDS if name != "resident"], indirect=True)
def test_file_deleted_during_training_ends_the_run(index: DataIndex, build: Make, feed: str):
    loader = build(index, augment=PLAIN)
    assert len(list(loader.epoch(0))) == 3
    bad = index.root / "a" / "7.jpg"
    bad.unlink()
    with pytest.raises(DataError) as error:
        list(
            itertools.chain.from_iterable(map(loader.epoch, range(1, 5)))
        )  # DALI may have read the next ones already
    assert_names(error.value, bad, "no such file")


def test_resident_set_needs_no_file_after_decoding(index: DataIndex):
    reference = by_torch(index)
    loader = loader_of(index, batch_size=3, provider="resident")
    for i in range(9):
        index.file(i).unlink()
    assert count_right(loader, reference, "resident") == 9


def test_file_that_only_dali_cannot_decode_is_an_error_with_advice(tmp_path: Path):
    """Pillow reads some damaged files; here one is declared good."""
    index = write_set(tmp_path, 10**6)
    damaged = index.file(4).read_bytes()[:300]
    index.file(4).write_bytes(damaged)
    records = list(index.records)
    records[4] = dataclasses.replace(records[4], sha256=hashlib.sha256(damaged).hexdigest())
    loader = loader_of(dataclasses.replace(index, records=records), provider="dali")
    with pytest.raises(DataError, match=r"DALI stopped.*set data\.loader to torch or resident"):
        list(loader.epoch(0))
    loader.close()


# ---- files that programs decode differently ----


def png(pixels: np.ndarray, colour: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of kinds that Pillow cannot write. pixels: [H, W] or [H, W, samples], in 8 or 16
    bits, or packed by the caller.
    """

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = pixels.shape[:2]
    width = width * 8 // bits if bits < 8 else width
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = pixels.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    extra = b"".join(itertools.starmap(chunk, chunks))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
    return start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def save(image: np.ndarray, *, mode: str | None = None, kind: str = "PNG", **options: Any) -> bytes:
    """mode: Pillow's mode, if the shape does not determine it."""
    picture = (
        Image.fromarray(image)
        if mode is None
        else Image.frombytes(mode, image.shape[1::-1], image.tobytes())
    )
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


RGB = coarse(1)
GREY = coarse(2, (48, 64))
ALPHA = coarse(3, (48, 64))
SOLID = np.full((48, 64), 255, np.uint8)
SHINE = ALPHA[:, :, None] / 255  # remaining brightness of a colour over black
FEW = (GREY // 64).astype(np.uint8)  # 0 to 3
COLOURS = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230], [90, 200, 220]], np.uint8)
CMYK = np.concatenate([RGB, GREY[:, :, None] // 2], 2)
FINE = GREY.astype(np.uint16) * 257
WITHOUT_20 = np.where(GREY == 20, 21, GREY)


def palette(**options: Any) -> bytes:
    image = Image.fromarray(FEW).convert("P")
    image.putpalette(COLOURS.tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(8 - bits, -1, -bits)
    return (values.reshape(len(values), -1, 8 // bits) << shifts).sum(2).astype(np.uint8)


# file name -> content, its pixels as displayed [H, W] or [H, W, 3], and by how much a decoder may
# differ from that
KINDS: dict[str, tuple[bytes, np.ndarray, float]] = {
    "grey.png": (save(GREY), GREY, 0),
    "rgb.png": (save(RGB), RGB, 0),
    "grey with alpha.png": (save(np.dstack([GREY, ALPHA])), GREY * SHINE[:, :, 0], 1),
    "rgb with alpha.png": (save(np.dstack([RGB, ALPHA])), RGB * SHINE, 1),
    "grey with solid alpha.png": (save(np.dstack([GREY, SOLID])), GREY, 0),
    "rgb with solid alpha.png": (save(np.dstack([RGB, SOLID])), RGB, 0),
    "rgb with one transparent colour.png": (
        save(np.where(FEW[:, :, None] == 2, 77, RGB).astype(np.uint8), transparency=(77, 77, 77)),
        np.where(FEW[:, :, None] == 2, 0, RGB),
        0,
    ),
    "grey with one transparent value.png": (
        save(np.where(FEW == 2, 20, WITHOUT_20).astype(np.uint8), transparency=20),
        np.where(FEW == 2, 0, WITHOUT_20),
        0,
    ),
    "palette.png": (palette(), COLOURS[FEW], 0),
    "palette with a transparent colour.png": (
        palette(transparency=3),
        np.where(FEW == 3, 0, 1)[:, :, None] * COLOURS[FEW],
        0,
    ),
    "16 bits.png": (save(FINE), GREY, 0),
    "12 in 16 bits.png": (save(GREY.astype(np.uint16) * 16), GREY * (16 * 255 / 65535), 1),
    "16 bits rgb.png": (png(RGB.astype(np.uint16) * 257, 2, 16), RGB, 0),
    "16 bits rgb with solid alpha.png": (
        png(np.dstack([RGB, SOLID]).astype(np.uint16) * 257, 6, 16),
        RGB,
        0,
    ),
    "16 bits grey with solid alpha.png": (
        png(np.dstack([GREY, SOLID]).astype(np.uint16) * 257, 4, 16),
        GREY,
        0,
    ),
    "1 bit.png": (save(GREY > 127), (GREY > 127) * 255, 0),
    "2 bits.png": (png(packed(FEW, 2), 0, 2), FEW * 85, 0),
    "4 bits.png": (png(packed(GREY // 16, 4), 0, 4), GREY // 16 * 17, 0),
    "gamma.png": (png(GREY, 0, 8, (b"gAMA", struct.pack(">I", 100000))), GREY, 0),
    "gamma rgb.png": (png(RGB, 2, 8, (b"gAMA", struct.pack(">I", 100000))), RGB, 0),
    "significant bits.png": (png(RGB, 2, 8, (b"sBIT", b"\5\5\5")), RGB, 0),
    "grey.jpg": (save(GREY, kind="JPEG", quality=95), GREY, 8),
    "rgb.jpg": (save(RGB, kind="JPEG", quality=95), RGB, 16),
    "progressive.jpg": (save(RGB, kind="JPEG", quality=95, progressive=True), RGB, 16),
    "whole chroma.jpg": (save(RGB, kind="JPEG", quality=95, subsampling=0), RGB, 12),
    "stored as rgb.jpg": (save(RGB, kind="JPEG", quality=95, keep_rgb=True), RGB, 12),
    "cmyk.jpg": (
        save(CMYK, mode="CMYK", kind="JPEG", quality=95),
        (255 - RGB.astype(float)) * (1 - CMYK[:, :, 3:] / 255.0),
        16,
    ),
    "bytes behind the end.jpg": (save(RGB, kind="JPEG", quality=95) + b"\0" * 99, RGB, 16),
    "turn by 180.jpg": (save(np.rot90(RGB, 2), kind="JPEG", quality=95, exif=turned(3)), RGB, 16),
    "turn right.jpg": (save(np.rot90(RGB), kind="JPEG", quality=95, exif=turned(6)), RGB, 16),
    "turn left.jpg": (save(np.rot90(RGB, -1), kind="JPEG", quality=95, exif=turned(8)), RGB, 16),
    "turn right.png": (save(np.rot90(RGB), exif=turned(6)), RGB, 0),
    "mirror.png": (save(RGB[:, ::-1], exif=turned(2)), RGB, 0),
    "rgb.bmp": (save(RGB, kind="BMP"), RGB, 0),
    "grey.tif": (save(GREY, kind="TIFF"), GREY, 0),
    "16 bits.tif": (save(FINE, kind="TIFF"), GREY, 0),
    "rgb.webp": (save(RGB, kind="WEBP", lossless=True), RGB, 0),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    root = tmp_path_factory.mktemp("kinds")
    (root / "a").mkdir()
    for name, (content, _, _) in KINDS.items():
        (root / "a" / name).write_bytes(content)
    index = check_data(root)
    assert sorted(Path(r.path).name for r in index.records) == sorted(KINDS)
    return index


@pytest.mark.parametrize(
    ("feed", "channels"), [("torch", 1), ("dali", 1), ("dali", 3)], indirect=["feed"]
)
def test_every_kind_of_file_is_decoded_as_displayed(
    kinds: DataIndex, build: Make, feed: str, channels: int
):
    reference = by_torch(kinds, channels).numpy().astype(int)
    (batch,) = build(kinds, channels=channels, batch_size=len(kinds)).epoch(0)
    wrong = {}
    for i, record in enumerate(kinds.records):
        name = Path(record.path).name
        _, seen, tolerance = KINDS[name]
        picture = Image.fromarray(np.rint(seen).astype(np.uint8)).convert(
            "L" if channels == 1 else "RGB"
        )
        expected = np.asarray(
            picture.resize((32, 48), Image.Resampling.BICUBIC).resize(
                (32, 24), Image.Resampling.BICUBIC
            )
        )
        shown_CHW = batch.images[i].numpy().astype(int)
        from_seen = np.abs(shown_CHW - expected.reshape(24, 32, channels).transpose(2, 0, 1))
        from_torch = np.abs(shown_CHW - reference[i])
        if from_seen.max() > tolerance + EXACTNESS[feed] or from_seen.mean() > 1 + tolerance / 8:
            wrong[name] = ("seen", from_seen.max(), from_seen.mean())
        if from_torch.max() > EXACTNESS[feed] or from_torch.mean() > 1:
            wrong[name] = ("torch", from_torch.max(), from_torch.mean())
    assert not wrong
