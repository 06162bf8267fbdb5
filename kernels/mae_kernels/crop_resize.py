"""Random-resized crops of decoded images, back to back in one uint8 tensor: crop, resize, mirror.

    first pass, along rows:      line[y, j] = round(sum_x k(t) box[y, x] / sum_x k(t))
                                 with t = ((x + 1/2) - (j + 1/2) sx) / max(sx, 1)
    second pass, along columns:  out[i, j]  = round( the same sum over y of line[y, j], with sy )
    sx = box width / output width, sy = box height / output height; round = half up, clipped to
    0..255
    k(t) = 1.5 |t|^3 - 2.5 |t|^2 + 1 for |t| < 1
         = -0.5 |t|^3 + 2.5 |t|^2 - 4 |t| + 2 for 1 <= |t| < 2; 0 beyond

The sums run over the pixels of the box alone: nothing outside it is read (crop, then resize). A
mirrored image takes its columns from right to left.
Source: Keys, Cubic convolution interpolation for digital image processing, IEEE TASSP 29 (1981), a
= -1/2. The wider kernel when an image shrinks and the two rounded passes are those of Pillow's
`Image.resize(BICUBIC)` and of torch's uint8 `interpolate(mode="bicubic", antialias=True)`. Pillow
13 takes the columns first where that is less work, as for tall boxes that shrink; it then differs,
by several grey levels on noise.

On the CPU each image goes through torch's `interpolate`, whose weights are 16-bit numbers: 1 grey
level off here and there. On a GPU one launch does all: a program makes BLOCK_H x BLOCK_W pixels of
one channel. It walks over the rows of the box that these need, ROWS at a time: weights along rows
are computed once for ROWS of them, and nothing between the passes is written. Distances to a
kernel's centre are whole numbers over a common denominator, so exact. There an image outside
`pixels` or a box outside its image, which only debug_checks reports, gives zeros, and nothing of it
is read.

Shapes: B images, T values in all, C channels, h x w pixels of the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ._checks import can_look, check_dtype, check_int, check_same_device, check_shape
from ._runtime import flat, jit, launch, next_power_of_2, tl, triton_op, use_triton, wants_reference
from ._samples import Draw, Made, Sample, Size, declares

MAX_SIDE = 2**17  # of an image, and
MAX_RESULT = 2**12  # of a result: (2 x + 1) h and (2 i + 1) H stay below 2^31
MAX_CHANNELS = 4


class Images(NamedTuple):
    """The tensors of crop_resize: pixels [T], offsets [B], shapes [B,2], boxes [B,4], flips [B]."""

    pixels: Tensor
    offsets: Tensor
    shapes: Tensor
    boxes: Tensor
    flips: Tensor


# ---- reference ----
def reference(x: Images, h: int, w: int, channels: int) -> Tensor:
    """One image after the other, on the CPU, where torch has a resize of uint8 in two passes, in as
    many threads as torch uses (the resize itself takes one).
    """
    device = x.pixels.device
    x = Images(x.pixels, *(t.cpu() for t in x[1:]))
    check_ranges(x, channels)
    batch = x.offsets.shape[0]
    out_BChw = torch.empty((batch, channels, h, w), dtype=torch.uint8)
    starts, shapes, boxes, flips = (t.tolist() for t in x[1:])
    inference = torch.is_inference_mode_enabled()  # threads do not inherit it

    def work(images: range) -> None:
        with torch.inference_mode(inference):
            for b in images:
                (height, width), (top, left, rows, columns) = shapes[b], boxes[b]
                # of other devices the listed images are copied, one by one
                image_T = x.pixels[starts[b] : starts[b] + height * width * channels].cpu()
                image_HWC = image_T.view(height, width, channels)
                crop_HWC = image_HWC[top : top + rows, left : left + columns]
                # channels-last memory, which torch resizes without a copy
                crop_1CHW = crop_HWC.permute(2, 0, 1)[None]
                resized_Chw = F.interpolate(crop_1CHW, (h, w), mode="bicubic", antialias=True)[0]
                out_BChw[b].copy_(resized_Chw.flip(2) if flips[b] else resized_Chw)

    threads = min(torch.get_num_threads(), batch)
    if threads <= 1:
        work(range(batch))
    else:
        # made for each call: 0.1 ms, and no thread that a fork would lose
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [range(t, batch, threads) for t in range(threads)]))
    return out_BChw.to(device)


# ---- kernel ----
@jit
def _cubic(t):
    t = tl.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return tl.where(t < 1.0, near, tl.where(t < 2.0, far, 0.0))


@jit
def _first(index, SIZE: tl.constexpr, box):
    """The first of `box` pixels that output `index` of SIZE uses, in whole numbers: |t| < 2 and not
    before the box.
    """
    before = (2 * index + 1) * box - 4 * tl.maximum(box, SIZE) - SIZE
    return tl.where(before < 0, 0, before // (2 * SIZE) + 1)


@jit
def _place(x, index, SIZE: tl.constexpr, box):
    """t of pixel x for output `index`."""
    return tl.div_rn(
        ((2 * x + 1) * SIZE - (2 * index + 1) * box).to(tl.float32),
        (2 * tl.maximum(box, SIZE)).to(tl.float32),
    )


@jit
def _taps(SIZE: tl.constexpr, box):
    """No output uses more pixels."""
    return (4 * tl.maximum(box, SIZE) + SIZE - 1) // SIZE


@jit
def _step(SIZE: tl.constexpr, box):
    """From the t of one pixel to that of the next."""
    return tl.div_rn(SIZE * 1.0, tl.maximum(box, SIZE).to(tl.float32))


@jit
def _grey_level(x):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


# total changes with each batch of staged rows: its divisibility must not compile another variant
@jit(do_not_specialize=["total"])
def _crop_resize_kernel(
    PIXELS, OFFSETS, SHAPES, BOXES, FLIPS, OUT, total, stride_offset, stride_shape, stride_side,
    stride_box, stride_edge, stride_flip, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    MAX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    TILES_W: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H * TILES_W
    plane = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    image, channel = plane // C, plane % C

    offset = tl.load(OFFSETS + image * stride_offset)
    height = tl.load(SHAPES + image * stride_shape)
    width = tl.load(SHAPES + image * stride_shape + stride_side)
    box = BOXES + image * stride_box
    top, left = tl.load(box), tl.load(box + stride_edge)
    box_h, box_w = tl.load(box + 2 * stride_edge), tl.load(box + 3 * stride_edge)
    mirror = tl.load(FLIPS + image * stride_flip) != 0  # a compiled function passes bool as uint8
    valid = (height >= 1) & (height <= MAX) & (width >= 1) & (width <= MAX)
    valid &= (offset >= 0) & (offset <= total - height * width * C)
    valid &= (top >= 0) & (box_h >= 1) & (top <= height - box_h)
    valid &= (left >= 0) & (box_w >= 1) & (left <= width - box_w)
    box_h = tl.where(valid, box_h, 1).to(tl.int32)
    box_w = tl.where(valid, box_w, 1).to(tl.int32)

    # along rows: what every row of the box shares
    j = tile % TILES_W * BLOCK_W + tl.arange(0, BLOCK_W)
    column = tl.minimum(j, W - 1)
    column = tl.where(mirror, W - 1 - column, column)
    first_x = _first(column, W, box_w)
    place_x = _place(first_x, column, W, box_w)
    step_x = _step(W, box_w)
    taps_x = _taps(W, box_w)
    sum_x = tl.zeros([BLOCK_W], tl.float32)
    for k in range(taps_x):
        sum_x += tl.where(first_x + k < box_w, _cubic(place_x + k * step_x), 0.0)
    scale_x = tl.div_rn(1.0, sum_x)

    # along columns
    i = tile // TILES_W * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.minimum(i, H - 1)
    first_y = _first(tile // TILES_W * BLOCK_H, H, box_h)
    last_y = _first(tl.minimum(tile // TILES_W * BLOCK_H + BLOCK_H, H) - 1, H, box_h)
    last_y += _taps(H, box_h)
    last_y = tl.where(valid, tl.minimum(last_y, box_h), first_y)
    place_y, step_y = _place(first_y, row, H, box_h), _step(H, box_h)
    r = tl.arange(0, ROWS)
    acc = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    sum_y = tl.zeros([BLOCK_H], tl.float32)
    for y in range(first_y, last_y, ROWS):
        in_box = y + r < box_h
        start = PIXELS + (offset + ((top + y + r) * width + left) * C + channel)
        lines = tl.zeros([ROWS, BLOCK_W], tl.float32)
        for k in range(taps_x):
            x = first_x + k
            weight = _cubic(place_x + k * step_x)
            wanted = in_box[:, None] & (x < box_w)[None, :]
            value = tl.load(start[:, None] + (x * C)[None, :], mask=wanted, other=0)
            lines += weight[None, :] * value.to(tl.float32)
        lines = _grey_level(lines * scale_x[None, :])
        weight = _cubic(place_y[:, None] + (y - first_y + r)[None, :] * step_y)
        weight = tl.where(in_box[None, :], weight, 0.0)
        sum_y += tl.sum(weight, 1)
        acc += tl.sum(weight[:, :, None] * lines[None, :, :], 1)
    scale_y = tl.div_rn(1.0, tl.where(valid, sum_y, 1.0))
    out = _grey_level(acc * scale_y[:, None]).to(tl.uint8)
    at = (plane * H + i)[:, None] * W + j[None, :]
    tl.store(OUT + at, out, mask=(i < H)[:, None] & (j < W)[None, :])


# (BLOCK_H, BLOCK_W, ROWS): one warp each. Chosen by the registers and the instructions per pixel
# that the compiler makes; not tuned on a GPU
TILE = (16, 64, 4)


def _launch(x: Images, h: int, w: int, channels: int) -> Tensor:
    batch = x.offsets.shape[0]
    out_BChw = torch.empty((batch, channels, h, w), dtype=torch.uint8, device=x.pixels.device)
    block_h = min(TILE[0], next_power_of_2(h))
    block_w = max(32, min(TILE[1], next_power_of_2(w)))
    grid = (batch * channels * -(-h // block_h) * -(-w // block_w),)
    strides = [stride for t in x[1:] for stride in t.stride()]
    sizes = {"C": channels, "H": h, "W": w, "MAX": MAX_SIDE, "BLOCK_H": block_h}
    sizes |= {"BLOCK_W": block_w, "ROWS": TILE[2], "num_warps": 1}
    arguments = (*x, out_BChw, x.pixels.shape[0], *strides)
    launch(_crop_resize_kernel, grid, x.pixels, *arguments, **sizes)
    return out_BChw


# ---- registration ----
@custom_op("mae_kernels::crop_resize_reference", mutates_args=())
@flat
def _reference_op(x: Images, size: list[int], channels: int) -> Tensor:
    """A node that is not traced into: the reference depends on the values of the boxes."""
    h, w = size
    return reference(x, h, w, channels)


@_reference_op.register_fake
def _(pixels, offsets, shapes, boxes, flips, size, channels):
    return pixels.new_empty((offsets.shape[0], channels, *size))


@triton_op("mae_kernels::crop_resize", mutates_args=())
@flat
def _crop_resize_op(x: Images, size: list[int], channels: int) -> Tensor:
    if use_triton("crop_resize", x.pixels.device):
        h, w = (int(n) for n in size)
        return _launch(x, h, w, channels)
    return _reference_op(*x, size, channels)


# ---- checks ----
def check_ranges(x: Images, channels: int) -> None:
    """Images inside `pixels`, boxes inside their images; waits for the device."""
    height, width = x.shapes.unbind(1)
    top, left, rows, columns = x.boxes.unbind(1)
    big = ((x.shapes < 1) | (x.shapes > MAX_SIDE)).any(1)
    out = (x.offsets < 0) | (x.offsets > x.pixels.shape[0] - height * width * channels)
    cut = (top < 0) | (left < 0) | (rows < 1) | (columns < 1)
    cut |= (top > height - rows) | (left > width - columns)
    for b in (big | out | cut).nonzero()[:1, 0].tolist():
        (at,), (h, w), box = (t[b].reshape(-1).tolist() for t in x[1:4])
        which = f"for image {b}"
        if big[b]:
            raise ValueError(f"shapes: got {h} x {w} {which}, needs sides from 1 to {MAX_SIDE}")
        if out[b]:
            raise ValueError(
                f"offsets: got {at} {which}, which ends at {at + h * w * channels}, "
                f"needs it inside the {x.pixels.shape[0]} of pixels"
            )
        raise ValueError(
            f"boxes: got (top, left, height, width) = {tuple(box)} {which}, "
            f"needs at least one pixel, all inside the image's {h} x {w}"
        )


def _check_arguments(x: Images, size: Sequence[int], channels: int) -> tuple[int, int]:
    check_dtype("pixels", x.pixels, torch.uint8)
    check_shape("pixels", x.pixels, (None,), "[T]")
    if not x.pixels.is_contiguous():
        raise ValueError(f"pixels: got stride {x.pixels.stride(0)}, needs contiguous memory")
    for name, t, more, meaning in (
        ("offsets", x.offsets, (), "[B]"),
        ("shapes", x.shapes, (2,), "[B, 2]"),
        ("boxes", x.boxes, (4,), "[B, 4]"),
        ("flips", x.flips, (), "[B]"),
    ):
        check_dtype(name, t, torch.bool if name == "flips" else torch.int64)
        batch = None if name == "offsets" else x.offsets.shape[0]
        check_shape(name, t, (batch, *more), meaning)
        check_same_device(name, t, "pixels", x.pixels)
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size: got {size!r}, needs two ints (h, w)")
    limits = (("size", MAX_RESULT), ("size", MAX_RESULT), ("channels", MAX_CHANNELS))
    for (name, most), n in zip(limits, (*size, channels), strict=True):
        check_int(name, n, 1)
        if n > most:
            raise ValueError(f"{name}: got {n}, needs at most {most}")
    return size[0], size[1]


# ---- public ----
def crop_resize(
    pixels: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    size: Sequence[int],
    *,
    channels: int = 1,
) -> Tensor:
    """Crop a box of each image, resize it (antialiased bicubic), and mirror it left-right if its
    flip is True.

    Args:
        pixels: [T] uint8, contiguous: images back to back, each [H, W, C]. Images may overlap or be
        listed twice.
        offsets: [B] int64, where each image starts in `pixels`.
        shapes: [B, 2] int64, (H, W) of each image in pixels, at most 131072.
        boxes: [B, 4] int64, (top, left, height, width) in whole pixels, inside the image.
        flips: [B] bool. These four may have any strides.
        size: (h, w) of the result in pixels, at most 4096.
        channels: C, 1 to 4.

    Returns: [B, C, h, w] uint8, contiguous. No gradient.

    Raises: TypeError or ValueError naming the argument. On a GPU images and boxes out of range are
        reported with debug_checks only; without, such an image is all zeros, and nothing of it is
        read.

    Example:
        >>> images = torch.randint(0, 256, (2, 40, 60), dtype=torch.uint8)  # two grey images
        >>> offsets, shapes = torch.tensor([0, 2400]), torch.tensor([[40, 60], [40, 60]])
        >>> boxes = torch.tensor([[0, 0, 40, 40], [8, 9, 20, 30]])  # top, left, height, width
        >>> flips = torch.tensor([False, True])
        >>> crop_resize(images.flatten(), offsets, shapes, boxes, flips, (32, 32)).shape
        torch.Size([2, 1, 32, 32])
    """
    images = Images(pixels, offsets, shapes, boxes, flips)
    h, w = _check_arguments(images, size, channels)
    if can_look(pixels) and not wants_reference(pixels):  # the reference looks itself, compiled too
        check_ranges(images, channels)
    return _crop_resize_op(*images, [h, w], channels)


# ---- samples ----
def _sample(
    size: Size, name: str, channels: int, result: tuple[int, int], places: Sequence[Sequence[int]]
) -> Sample:
    """`places`: height and width of the images, then (top, left, height, width) of their boxes;
    used in turn.
    """

    def make(draw: Draw) -> Made:
        sizes = [place[0] * place[1] * channels for place in places]
        ends = [*itertools.accumulate(sizes, initial=0)]
        rows = [[start, *place] for start, place in zip(ends, places, strict=False)]
        # columns of one tensor: the op takes them with any strides
        chosen = [rows[b % len(rows)] for b in range(draw.batch)]
        table = torch.tensor(chosen, device=draw.device).reshape(draw.batch, 7)
        tensors = {
            "pixels": (draw.uniform(ends[-1]) * 256).byte(),
            "offsets": table.select(1, 0),
            "shapes": table.narrow(1, 1, 2),
            "boxes": table.narrow(1, 3, 4),
            "flips": draw.mask(draw.batch, share=0.5),
        }
        return tensors, {"size": result, "channels": channels}

    bad = {"boxes": 10**6, "offsets": 10**9, "shapes": 10**6}
    # its loads are single bytes, wherever the pixels of an output are
    other: dict[str, Any] = {"wide": False, "out_of_range": bad}
    return Sample("crop_resize", name, crop_resize, make, size=size, **other)


@declares("crop_resize")
def samples() -> list[Sample]:
    """Boxes that grow and shrink, whole images, images that are not square; crops of CT slices at
    224.
    """
    odd = [(13, 19, 2, 3, 11, 16), (7, 5, 0, 0, 7, 5), (21, 9, 3, 0, 18, 9)]
    slices = [(512, 512, 31, 70, 300, 411), (400, 350, 0, 0, 400, 350), (256, 300, 10, 90, 97, 131)]
    return [
        _sample("small", "grey", 1, (9, 37), odd),
        _sample("small", "rgb", 3, (5, 130), odd[:2]),
        _sample("model", "ct", 1, (224, 224), slices),
        _sample("model", "rgb", 3, (224, 224), slices),
    ]
