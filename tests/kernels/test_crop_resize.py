"""crop_resize against its formula in float64: dense weight matrices, loops over outputs, nothing of
torch.

Shapes: B images, T values in all, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_kernels import crop_resize
from mae_kernels._runtime import INTERPRET

Array = np.ndarray[Any, Any]
Box = tuple[int, int, int, int]  # top, left, height, width


class Packed(NamedTuple):
    """The tensors of crop_resize, and the images they hold."""

    tensors: list[Tensor]
    images: list[Array]  # [H, W, C]
    channels: int


def pack(
    images: list[Array], boxes: Sequence[Box], flips: Sequence[bool], device: torch.device
) -> Packed:
    """The images back to back, after 3 bytes that belong to none; in the order of the boxes."""
    starts = 3 + np.cumsum([0, *(x.size for x in images)])[:-1]
    pixels = np.concatenate([np.full(3, 77, np.uint8), *(x.reshape(-1) for x in images)])
    shapes = [x.shape[:2] for x in images]
    tensors = [torch.as_tensor(x, device=device) for x in (pixels, starts, shapes, boxes, flips)]
    return Packed(tensors, images, images[0].shape[2])


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def keys(t: float) -> float:
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def weights(size: int, length: int) -> Array:
    """[size, length]: row i holds what output i takes of each pixel."""
    scale, matrix = length / size, np.zeros((size, length))
    stretch = max(scale, 1.0)
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = (int(centre + side * stretch + 0.5) for side in (-2, 2))
        for x in range(max(first, 0), min(last, length)):
            matrix[i, x] = keys((x - centre + 0.5) / stretch)
        matrix[i] /= matrix[i].sum()
    return matrix


def by_formula(image: Array, box: Box, flip: bool, size: tuple[int, int]) -> Array:
    """[C, h, w] float64, whole numbers."""
    top, left, height, width = box
    cut = image[top : top + height, left : left + width].astype(np.float64)
    lines = np.clip(np.floor(np.einsum("jx,yxc->yjc", weights(size[1], width), cut) + 0.5), 0, 255)
    out = np.clip(np.floor(np.einsum("iy,yjc->cij", weights(size[0], height), lines) + 0.5), 0, 255)
    return out[:, :, ::-1] if flip else out


# channels, size, (image height, width), box, flip: enlarged, shrunk by 7, one pixel, one row, one
# column, as it is
Rows = list[tuple[tuple[int, int], Box, bool]]
GREY: Rows = [
    ((40, 50), (3, 5, 30, 40), True),
    ((9, 11), (0, 0, 9, 11), False),
    ((50, 150), (2, 1, 47, 146), True),
    ((1, 1), (0, 0, 1, 1), True),
    ((5, 70), (4, 3, 1, 67), False),
    ((30, 4), (1, 3, 29, 1), False),
    ((20, 40), (7, 2, 13, 37), True),
]
RGB: Rows = [((24, 17), (1, 2, 20, 15), True), ((7, 80), (0, 9, 7, 70), False)]
TWO: Rows = [((6, 9), (2, 1, 4, 8), True), ((3, 2), (0, 0, 3, 2), False)]
CASES: dict[str, tuple[int, tuple[int, int], Rows]] = {
    "grey": (1, (7, 21), GREY),
    "rgb": (3, (9, 10), RGB),
    "four channels, more than a tile wide": (4, (3, 131), TWO[:1]),
    "two channels, one pixel out": (2, (1, 1), TWO),
}


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_crop_resize_equals_the_formula(name: str, device: torch.device) -> None:
    channels, size, rows = CASES[name]
    boxes, flips = [box for _, box, _ in rows], [flip for _, _, flip in rows]
    images = [noise(*shape, channels, seed=i) for i, (shape, _, _) in enumerate(rows)]
    packed = pack(images, boxes, flips, device)
    got = crop_resize(*packed.tensors, size, channels=channels)
    assert (got.shape, got.dtype) == ((len(boxes), channels, *size), torch.uint8)
    assert got.is_contiguous()
    means = []
    for b, image in enumerate(packed.images):
        want = by_formula(image, boxes[b], flips[b], size)
        difference = np.abs(got[b].cpu().numpy().astype(np.float64) - want)
        assert difference.max() <= 1, f"image {b}"
        means.append(difference.mean())
    # of all: enlarged from one column, an image has few different values
    assert np.mean(means) < 0.02


@pytest.mark.kernel
def test_crop_resize_keeps_constant_images(device: torch.device) -> None:
    """The weights sum to one at every place, edges included, and sums of 255 do not wrap."""
    images = [np.full((5, 8, 1), level, np.uint8) for level in (0, 1, 254, 255)]
    got = crop_resize(*pack(images, [(0, 0, 5, 8)] * 4, [False] * 4, device).tensors, (9, 3))
    assert [x.unique().tolist() for x in got] == [[0], [1], [254], [255]]


@pytest.mark.kernel
def test_crop_resize_out_of_range_beyond_the_checks(device: torch.device) -> None:
    """The kernel: zeros, and the other images are right. The reference always checks the values."""
    rows = [  # offset, shape, box of images inside 200 values; the first is right
        (8, (9, 14), (1, 4, 6, 9)),
        (-1, (9, 14), (1, 4, 6, 9)),
        (75, (9, 14), (1, 4, 6, 9)),
        (0, (2**62, 2**62), (0, 0, 1, 1)),
        (0, (0, 14), (0, 0, 1, 1)),
        (0, (9, 14), (4, 4, 6, 9)),
        (0, (9, 14), (1, 6, 6, 9)),
        (0, (9, 14), (1, -1, 6, 9)),
        (0, (9, 14), (2**63 - 2, 4, 6, 9)),
        (0, (9, 14), (1, 4, 0, 9)),
        (0, (9, 14), (1, 4, 6, 2**63 - 1)),
    ]
    pixels = torch.from_numpy(noise(200)).to(device)
    places = [torch.tensor([row[i] for row in rows], device=device) for i in range(3)]
    flips = torch.zeros(len(rows), dtype=torch.bool, device=device)
    call = torch.ops.mae_kernels.crop_resize
    if not INTERPRET and device.type == "cpu":
        for b in range(1, len(rows)):
            with pytest.raises(ValueError, match=r"(offsets|shapes|boxes): got"):
                call(pixels, *(x[b : b + 1] for x in places), flips[:1], [6, 9], 1)
        return
    got = call(pixels, *places, flips, [6, 9], 1)
    assert torch.equal(got[0, 0], pixels[8 : 8 + 126].view(9, 14)[1:7, 4:13])
    assert not got[1:].any()


def some() -> list[Tensor]:
    images = [noise(9, 14 + i, 1, seed=i) for i in range(7)]
    flips = [i % 2 == 0 for i in range(7)]
    return pack(images, [(1, 4, 6, 9)] * 7, flips, torch.device("cpu")).tensors


def test_crop_resize_is_equal_with_threads_and_in_inference_mode() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(crop_resize(*some(), (8, 8)))
            with torch.inference_mode():
                results.append(crop_resize(*some(), (8, 8)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], x) for x in results[1:])


def test_crop_resize_compiled_checks_ranges() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: crop_resize(*a, (8, 8)), fullgraph=True, backend="aot_eager"
    )
    pixels, offsets, *rest = some()
    with pytest.raises(ValueError, match="offsets: got 10003 for image 0"):
        compiled(pixels, offsets + 10000, *rest)


U8, BOOL = torch.uint8, torch.bool
GOOD: dict[str, Any] = {
    "pixels": torch.zeros(200, dtype=U8),
    "offsets": torch.tensor([0, 100]),
    "shapes": torch.tensor([[10, 10], [5, 20]]),
    "boxes": torch.tensor([[0, 0, 10, 10], [1, 2, 4, 18]]),
    "flips": torch.zeros(2, dtype=torch.bool),
    "size": (8, 8),
}
BAD_BOXES = torch.tensor([[0, 0, 10, 10], [2, 1, 4, 18]])


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("pixels", [0], TypeError, "pixels: got list, needs a torch.Tensor"),
        ("pixels", torch.zeros(200), TypeError, "pixels: got dtype torch.float32, needs torch.u"),
        ("pixels", torch.zeros(400, dtype=U8)[::2], ValueError, "pixels: got stride 2, needs con"),
        ("offsets", torch.zeros(2).int(), TypeError, "offsets: got dtype torch.int32, needs torc"),
        ("shapes", torch.ones(3, 2).long(), ValueError, r"shapes: got .*\[B, 2\] = \(2, 2\)"),
        ("flips", torch.zeros(2).long(), TypeError, "flips: got dtype torch.int64, needs torch.b"),
        ("flips", GOOD["flips"].to("meta"), ValueError, "flips: got device meta, needs the devi"),
        ("size", 8, ValueError, r"size: got 8, needs two ints \(h, w\)"),
        ("size", (8, 8.0), TypeError, "size: got float, needs an int"),
        ("size", (0, 8), ValueError, "size: got 0, needs at least 1"),
        ("size", (8, 4097), ValueError, "size: got 4097, needs at most 4096"),
        ("channels", 5, ValueError, "channels: got 5, needs at most 4"),
        ("channels", 3, ValueError, "offsets: got 0 for image 0, which ends at 300, needs it ins"),
        ("offsets", torch.tensor([0, 101]), ValueError, "offsets: got 101 for image 1, .* at 201"),
        ("shapes", torch.tensor([[0, 9], [5, 20]]), ValueError, "shapes: got 0 x 9 for image 0, "),
        ("boxes", BAD_BOXES, ValueError, r"boxes: got .* = \(2, 1, 4, 18\) for image 1, .* 5 x 20"),
    ],
)
def test_crop_resize_names_a_bad_argument(name: str, value: Any, error, text: str) -> None:
    """Before any kernel: tensors on the CPU, whatever the device of the other tests."""
    with pytest.raises(error, match=text):
        crop_resize(**GOOD | {name: value})
