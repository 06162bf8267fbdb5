"""crop_resize against its formula in float64: dense weight matrices, loops over outputs, nothing of torch.

Shapes: B images, T values in all, C channels.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_kernels import backend, crop_resize
from mae_kernels._runtime import INTERPRET
from mae_kernels.crop_resize import two_float_passes

Array = np.ndarray[Any, Any]
Box = tuple[int, int, int, int]  # top, left, height, width


class Packed(NamedTuple):
    """The tensors of crop_resize, and the images they hold."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    images: list[Array]  # [H, W, C]
    channels: int


def pack(
    images: list[Array], boxes: Sequence[Box], flips: Sequence[bool], device: torch.device
) -> Packed:
    """The images back to back, after 3 bytes that belong to none; in the order of the boxes."""
    starts = 3 + np.cumsum([0, *(x.size for x in images)])[:-1]
    pixels = np.concatenate([np.full(3, 77, np.uint8), *(x.reshape(-1) for x in images)])
    shapes = torch.tensor([x.shape[:2] for x in images]).reshape(-1, 2)
    tensors = (
        torch.from_numpy(pixels),
        torch.from_numpy(starts),
        shapes,
        torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4),
        torch.tensor(flips, dtype=torch.bool),
    )
    a, b, c, d, e = (x.to(device) for x in tensors)
    return Packed((a, b, c, d, e), images, images[0].shape[2] if images else 1)


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
        for x in range(
            max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), length)
        ):
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


def assert_near_formula(
    got: Tensor, packed: Packed, boxes: Sequence[Box], flips: Sequence[bool], size: Any
) -> None:
    assert (got.shape, got.dtype) == (
        (len(boxes), packed.channels, *size),
        torch.uint8,
    ) and got.is_contiguous()
    means = []
    for b, image in enumerate(packed.images):
        difference = np.abs(
            got[b].cpu().numpy().astype(np.float64) - by_formula(image, boxes[b], flips[b], size)
        )
        assert difference.max() <= 1, f"image {b}"
        means.append(difference.mean())
    assert (
        np.mean(means) < 0.02
    )  # of all: enlarged from one column, an image has few different values


# channels, size, (image height, width), box, flip: enlarged, shrunk by 7, one pixel, one row, one column, as it is
CASES: dict[str, tuple[int, tuple[int, int], list[tuple[tuple[int, int], Box, bool]]]] = {
    "grey": (
        1,
        (13, 37),
        [
            ((40, 50), (3, 5, 30, 40), True),
            ((9, 11), (0, 0, 9, 11), False),
            ((97, 263), (2, 1, 91, 259), True),
            ((1, 1), (0, 0, 1, 1), True),
            ((5, 70), (4, 3, 1, 67), False),
            ((30, 4), (1, 3, 29, 1), False),
            ((20, 40), (7, 2, 13, 37), True),
        ],
    ),
    "rgb": (3, (21, 10), [((24, 17), (1, 2, 20, 15), True), ((7, 80), (0, 9, 7, 70), False)]),
    "four channels, more than a tile wide": (4, (3, 131), [((6, 9), (2, 1, 4, 8), True)]),
    "two channels, one pixel out": (
        2,
        (1, 1),
        [((6, 9), (2, 1, 4, 8), True), ((3, 2), (0, 0, 3, 2), False)],
    ),
}


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(name: str, device: torch.device) -> None:
    channels, size, rows = CASES[name]
    boxes, flips = [box for _, box, _ in rows], [flip for _, _, flip in rows]
    images = [noise(*shape, channels, seed=i) for i, (shape, _, _) in enumerate(rows)]
    packed = pack(images, boxes, flips, device)
    before = [x.clone() for x in packed.tensors]
    got, again = (crop_resize(*packed.tensors, size, channels=channels) for _ in range(2))
    assert torch.equal(got, again), "two runs differ"
    assert all(torch.equal(a, b) for a, b in zip(before, packed.tensors, strict=True)), (
        "an input was changed"
    )
    assert_near_formula(got, packed, boxes, flips, size)


@pytest.mark.kernel
@pytest.mark.parametrize("channels", [1, 3])
def test_at_its_own_size_a_box_is_cut_out_exactly(channels: int, device: torch.device) -> None:
    """Top and left, the axis of the mirror, rows and columns, the order of channels: each mistake shows."""
    images = [noise(9, 14, channels), noise(7, 11, channels, seed=1)]
    boxes: list[Box] = [(1, 4, 6, 9), (0, 2, 6, 9)]
    got = (
        crop_resize(*pack(images, boxes, [False, True], device).tensors, (6, 9), channels=channels)
        .cpu()
        .numpy()
    )
    assert np.array_equal(got[0], images[0][1:7, 4:13].transpose(2, 0, 1))
    assert np.array_equal(got[1], images[1][0:6, 2:11][:, ::-1].transpose(2, 0, 1))


@pytest.mark.kernel
def test_pixels_outside_the_box_and_other_images_do_not_matter(device: torch.device) -> None:
    boxes: list[Box] = [(3, 4, 5, 20), (2, 0, 7, 9)]
    results = []
    for poison in (0, 255):
        images = [np.full((12, 30, 1), poison, np.uint8), np.full((9, 13, 1), poison, np.uint8)]
        for image, (top, left, height, width) in zip(images, boxes, strict=True):
            image[top : top + height, left : left + width] = noise(height, width, 1)
        results.append(crop_resize(*pack(images, boxes, [True, False], device).tensors, (8, 7)))
    assert torch.equal(*results)


@pytest.mark.kernel
def test_constant_images_stay_constant(device: torch.device) -> None:
    """The weights sum to one at every place, edges included, and sums of 255 do not wrap."""
    images = [np.full((5, 8, 1), level, np.uint8) for level in (0, 1, 254, 255)]
    got = crop_resize(*pack(images, [(0, 0, 5, 8)] * 4, [False] * 4, device).tensors, (17, 3))
    assert [x.unique().tolist() for x in got] == [[0], [1], [254], [255]]


@pytest.mark.kernel
def test_strided_places_and_no_image(device: torch.device) -> None:
    images = [noise(9, 14, 1), noise(5, 6, 1, seed=1), noise(8, 8, 1, seed=2)]
    boxes: list[Box] = [(1, 4, 6, 9), (0, 2, 5, 4), (1, 1, 6, 7)]
    pixels, offsets, shapes, boxes_B4, flips = pack(
        images, boxes, [False, True, True], device
    ).tensors
    packed = torch.cat([offsets[:, None], shapes, boxes_B4, flips[:, None]], 1)
    mirrored = torch.stack([~flips, flips], 1)[:, 1]
    want = crop_resize(pixels, offsets, shapes, boxes_B4, flips, [7, 5])
    assert torch.equal(
        crop_resize(pixels, packed[:, 0], packed[:, 1:3], packed[:, 3:7], mirrored, (7, 5)), want
    )
    assert not packed[:, 3:7].is_contiguous() and mirrored.stride() == (2,)
    for none in (pixels, pixels[:0]):
        empty = crop_resize(
            none, packed[:0, 0], packed[:0, 1:3], packed[:0, 3:7], mirrored[:0], (7, 5), channels=3
        )
        assert (empty.shape, empty.dtype) == ((0, 3, 7, 5), torch.uint8)


@pytest.mark.kernel
def test_out_of_range_beyond_the_checks(device: torch.device) -> None:
    """The kernel: zeros, and the images beside are right. The reference looks at the values, whoever calls it."""
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


def test_the_float_passes_of_other_devices_equal_the_formula() -> None:
    for shape, size in (((40, 9, 3), (13, 17)), ((5, 70, 1), (9, 10))):
        image = noise(*shape)
        got = two_float_passes(torch.from_numpy(image).permute(2, 0, 1)[None], *size)[0]
        packed = Packed(
            pack([image], [(0, 0, *shape[:2])], [False], torch.device("cpu")).tensors,
            [image],
            shape[2],
        )
        assert_near_formula(got[None], packed, [(0, 0, *shape[:2])], [False], size)


def some() -> tuple[Tensor, ...]:
    images = [noise(9, 14 + i, 1, seed=i) for i in range(7)]
    return pack(
        images, [(1, 4, 6, 9)] * 7, [i % 2 == 0 for i in range(7)], torch.device("cpu")
    ).tensors


def test_threads_and_inference_mode_change_nothing() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(crop_resize(*some(), (8, 8)))
            with torch.inference_mode():
                results.append(crop_resize(*some(), (8, 8)))
        torch.set_num_threads(3)
        pixels, offsets, *rest = some()
        with pytest.raises(
            ValueError, match="offsets: got 9999 for image 6"
        ):  # from a thread or before it: not lost
            crop_resize(pixels, torch.cat([offsets[:-1], torch.tensor([9999])]), *rest, (8, 8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], x) for x in results[1:])


def _in_a_child(threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    queue.put(crop_resize(*some(), (8, 8)).numpy())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_works_after_its_parent_did() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = crop_resize(*some(), (8, 8)).numpy()
        context = multiprocessing.get_context("fork")
        for threads in (1, 2):
            queue = context.Queue()
            child = context.Process(target=_in_a_child, args=(threads, queue))
            child.start()
            got = queue.get(timeout=60)
            child.join(60)
            assert child.exitcode == 0 and np.array_equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_a_compiled_call_checks_ranges_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: crop_resize(*a, (8, 8)), fullgraph=True, backend="aot_eager"
    )
    pixels, offsets, *rest = some()
    assert torch.equal(
        compiled(pixels, offsets, *rest), crop_resize(pixels, offsets, *rest, (8, 8))
    )
    with pytest.raises(ValueError, match="offsets: got 10003 for image 0"):
        compiled(pixels, offsets + 10000, *rest)


I64 = torch.int64
GOOD: dict[str, Any] = {
    "pixels": torch.zeros(200, dtype=torch.uint8),
    "offsets": torch.tensor([0, 100]),
    "shapes": torch.tensor([[10, 10], [5, 20]]),
    "boxes": torch.tensor([[0, 0, 10, 10], [1, 2, 4, 18]]),
    "flips": torch.zeros(2, dtype=torch.bool),
    "size": (8, 8),
}


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("pixels", [0], TypeError, "pixels: got list, needs a torch.Tensor"),
        (
            "pixels",
            torch.zeros(200),
            TypeError,
            "pixels: got dtype torch.float32, needs torch.uint8",
        ),
        (
            "pixels",
            torch.zeros(2, 100, dtype=torch.uint8),
            ValueError,
            r"pixels: got shape \(2, 100\), needs \[T\]",
        ),
        (
            "pixels",
            torch.zeros(400, dtype=torch.uint8)[::2],
            ValueError,
            "pixels: got stride 2, needs contiguous memory",
        ),
        (
            "offsets",
            torch.zeros(2, dtype=torch.int32),
            TypeError,
            "offsets: got dtype torch.int32, needs torch.int64",
        ),
        (
            "offsets",
            torch.zeros(2, 1, dtype=I64),
            ValueError,
            r"offsets: got shape \(2, 1\), needs \[B\]",
        ),
        (
            "shapes",
            torch.zeros(2, 2),
            TypeError,
            "shapes: got dtype torch.float32, needs torch.int64",
        ),
        (
            "shapes",
            torch.ones(3, 2, dtype=I64),
            ValueError,
            r"shapes: got shape \(3, 2\), needs \[B, 2\] = \(2, 2\)",
        ),
        (
            "boxes",
            torch.zeros(2, 4),
            TypeError,
            "boxes: got dtype torch.float32, needs torch.int64",
        ),
        (
            "boxes",
            torch.ones(2, 2, dtype=I64),
            ValueError,
            r"boxes: got shape \(2, 2\), needs \[B, 4\] = \(2, 4\)",
        ),
        (
            "flips",
            torch.zeros(2, dtype=I64),
            TypeError,
            "flips: got dtype torch.int64, needs torch.bool",
        ),
        (
            "flips",
            torch.zeros(1, dtype=torch.bool),
            ValueError,
            r"flips: got shape \(1,\), needs \[B\] = \(2\)",
        ),
        (
            "flips",
            torch.zeros(2, dtype=torch.bool, device="meta"),
            ValueError,
            "flips: got device meta, needs the device of",
        ),
        ("size", 8, ValueError, r"size: got 8, needs two ints \(h, w\)"),
        ("size", (8, 8, 8), ValueError, r"size: got \(8, 8, 8\), needs two ints \(h, w\)"),
        ("size", (8, 8.0), TypeError, "size: got float, needs an int"),
        ("size", (0, 8), ValueError, "size: got 0, needs at least 1"),
        ("size", (8, 4097), ValueError, "size: got 4097, needs at most 4096"),
        ("channels", 5, ValueError, "channels: got 5, needs at most 4"),
        ("channels", True, TypeError, "channels: got bool, needs an int"),
        (
            "channels",
            3,
            ValueError,
            "offsets: got 0 for image 0, which ends at 300, needs it inside the 200 of pixels",
        ),
        (
            "offsets",
            torch.tensor([0, 101]),
            ValueError,
            "offsets: got 101 for image 1, which ends at 201, needs it inside",
        ),
        (
            "offsets",
            torch.tensor([-1, 0]),
            ValueError,
            "offsets: got -1 for image 0, which ends at 99, needs it inside",
        ),
        (
            "shapes",
            torch.tensor([[0, 9], [5, 20]]),
            ValueError,
            "shapes: got 0 x 9 for image 0, needs sides from 1 to 131072",
        ),
        (
            "boxes",
            torch.tensor([[0, 0, 10, 10], [2, 1, 4, 18]]),
            ValueError,
            r"boxes: got \(top, left, height, width\) = \(2, 1, 4, 18\) for image 1, needs at least one pixel, all inside "
            "the image's 5 x 20",
        ),
    ],
)
def test_refuses(name: str, value: Any, error: type[Exception], text: str) -> None:
    """Before any kernel: tensors on the CPU, whatever the device of the other tests."""
    arguments = GOOD | {name: value}
    with pytest.raises(error, match=text):
        crop_resize(**arguments)


def test_the_reference_backend_is_the_default_on_the_cpu() -> None:
    with backend("reference"):
        want = crop_resize(*some(), (8, 8))
    assert torch.equal(crop_resize(*some(), (8, 8)), want)
