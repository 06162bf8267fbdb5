"""Argument checks shared by the ops: every message names the argument, what it got and what it
needs.

Shapes: B images, C channels, H x W pixels, P patch side, L = (H/P)*(W/P) patches, K or M listed
patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_debug = False


def debug_checks(enabled: bool = True) -> None:
    """Also check what needs a device synchronisation on CUDA, or a sort: ids and boxes in range,
    ids_restore a permutation.

    On the CPU the range is always checked in eager mode, because it is nearly free there.
    """
    global _debug
    _debug = bool(enabled)


def can_look(x: Tensor) -> bool:
    """Whether x may be read now: on the CPU in eager mode, on CUDA with debug_checks."""
    if torch.compiler.is_compiling() or is_fake(x):
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and _debug)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Tensor")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype, hint: str = "") -> None:
    check_tensor(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, needs {dtype}{hint}")


def check_floating(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: got dtype {x.dtype}, needs a floating point dtype")


def check_shape(
    name: str, x: Tensor, shape: Sequence[int | None], meaning: str, hint: str = ""
) -> None:
    """`shape`: the size of each dimension, None for any; `meaning`: its spelling."""
    ok = x.dim() == len(shape) and all(
        need is None or got == need for got, need in zip(x.shape, shape, strict=True)
    )
    if not ok:
        needed = ", ".join("any" if n is None else str(n) for n in shape)
        after = f"; {hint}" if hint else ""
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs {meaning} = ({needed}){after}")


def check_floating_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, needs a floating point dtype")


def check_vector(
    name: str, x: Tensor | None, size: int, meaning: str, other_name: str, other: Tensor
) -> None:
    """x: floating point [size] on the device of `other`, or None."""
    if x is not None:
        check_floating(name, x)
        check_shape(name, x, (size,), meaning)
        check_same_device(name, x, other_name, other)


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name}: got device {x.device}, needs the device of {other_name}, {other.device}"
        )


def check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs an int")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, needs at least {minimum}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}: got {value!r}, needs one of {', '.join(repr(c) for c in choices)}"
        )


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a Python number")
    if not value > 0:
        raise ValueError(f"{name}: got {value}, needs a positive number")


def check_images(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Checks images [B,C,H,W] against the patch side and returns the patch grid (rows, columns)."""
    check_tensor("images", images)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: got dtype {images.dtype}, needs uint8 or a floating point dtype")
    check_int("patch_size", patch_size, 1)
    check_shape("images", images, (None, None, None, None), "[B, C, H, W]")
    height, width = images.shape[2], images.shape[3]
    if images.shape[1] < 1 or height < 1 or width < 1:
        raise ValueError(f"images: got shape {tuple(images.shape)}, needs C, H and W of at least 1")
    if height % patch_size != 0 or width % patch_size != 0:
        raise ValueError(
            f"images: got {height} x {width} pixels, "
            f"needs a height and width divisible by patch_size = {patch_size}"
        )
    return height // patch_size, width // patch_size


def check_ids(name: str, ids: Tensor, rows: int, upper: int, *, distinct: bool = False) -> None:
    """ids [B, any] int64 in [0, upper); `distinct` in a row: with debug_checks only."""
    check_dtype(name, ids, torch.int64)
    check_shape(name, ids, (rows, None), "[B, K]")
    if ids.numel() == 0 or not can_look(ids):
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= upper:
        raise ValueError(f"{name}: got ids from {low} to {high}, needs ids from 0 to {upper - 1}")
    if distinct and _debug and bool((ids.sort(1).values.diff(dim=1) == 0).any()):
        raise ValueError(f"{name}: got an id more than once in one row, needs a permutation")
