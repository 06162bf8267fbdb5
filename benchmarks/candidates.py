"""What `bench tune` compares: the launches of each kernel that chooses a size, and a few other choices around that size.

`choosing` is how a choice is tried, the only way: for the time of a `with` block it replaces the names by which the op's module
chooses (rows_per_program, TILE, FORWARD, ...) and the warps of one kernel's launch; the op's own launcher then works out grid and
constants as always. Every name comes back afterwards, whatever happened. Nothing in the package remembers a choice, but what was
compiled or captured does: it keeps the one that it was traced with. Ops only ever run eagerly here.

num_stages is no choice of these kernels: the compiler makes the same code of each with 1, 3 or 5. linear_reconstruction_loss launches
the kernels of masked_reconstruction_loss, and crops and embeddings of other sizes the same kernels: they are not tried apart.

Shapes: as in shapes.py; N tokens, H heads, d head width, F hidden width of an MLP.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_kernels._runtime import Launch
from mae_kernels.short_attention import ROWS_KERNEL_TOKENS, Sizes

from .attention import Attention
from .eager import WEIGHT
from .measure import Call
from .op import FP32, IDS, Inputs, normal, stats
from .registry import OPS
from .shapes import Shape

# constants that a choice sets
LAUNCHED = ("T0", "T1", "T2", "TILE", "BLOCK_H", "BLOCK_W", "ROWS", "BLOCK_D", "BLOCK_F")
USUAL_WARPS = 4  # of a launch that does not say: Triton's own default
EPS, TEMPS = 1e-6, (0.1, 0.04)  # the ops' defaults


@dataclass(frozen=True)
class Candidate:
    """What is in force inside `choosing`: names of the op's module, and warps of the kernel's launch. None = as they are."""

    names: dict[str, Any] = field(default_factory=dict)
    warps: int | None = None


AS_IS = Candidate()


@dataclass(frozen=True)
class Site:
    """One kernel at one shape. phase: the part of the op in which it runs."""

    op: str
    phase: str
    kernel: str
    module: ModuleType
    launcher: (
        str  # the module's function that starts the kernel and finishes what its programs leave
    )
    shape: Shape
    given: Callable[
        [Shape, Inputs], tuple[Any, ...]
    ]  # the launcher's arguments, from the op's inputs
    cost: Callable[[Shape, int], float]  # bytes that must be moved, for values of so many bytes
    candidates: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        return f"{self.op} {self.phase}, {self.kernel}, {self.shape.name}"

    def call(self, inputs: Inputs) -> Call:
        """The launcher on arguments that are made once."""
        given = self.given(self.shape, {name: t.detach() for name, t in inputs.items()})
        return lambda: getattr(self.module, self.launcher)(*given)


class Started(NamedTuple):
    """A launch as it was made."""

    grid: tuple[int, ...]
    launch: Launch

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def warps(self) -> int:
        return int(self.launch.constants.get("num_warps", USUAL_WARPS))

    @property
    def label(self) -> str:
        """The choice in words, read off the launch itself; x: programs."""
        said = [
            f"{name}={self.launch.constants[name]}"
            for name in LAUNCHED
            if self.launch.constants.get(name)
        ]
        return " ".join([*said, f"warps={self.warps}", f"x{self.programs}"])


@contextmanager
def choosing(site: Site, candidate: Candidate) -> Iterator[list[Started]]:
    """Inside the block the site's module chooses as the candidate says; what it starts of the site's kernel is listed.

    Raises AttributeError where the module has no such name any more: nothing is tried that the op would not read.
    """
    real, started = site.module.launch, list[Started]()

    def launch(
        kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **constants: Any
    ) -> None:
        if kernel.fn.__name__.strip("_") == site.kernel:
            if candidate.warps is not None:
                constants["num_warps"] = candidate.warps
            started.append(Started(grid, Launch(kernel, args, constants)))
        real(kernel, grid, on, *args, **constants)

    names = {"launch": launch, **candidate.names}
    before = {name: getattr(site.module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(site.module, name, value)
        yield started
    finally:
        for name, value in before.items():
            setattr(site.module, name, value)


# ---- sites ----


def sites(s: Shape) -> list[Site]:
    """The most telling first: attention, losses, restoring, patches, the rest."""
    return [
        *_attention_sites(s),
        *_loss_sites(s),
        *_restore_sites(s),
        *_patch_sites(s),
        *_other_sites(s),
    ]


def _module(name: str) -> ModuleType:
    return importlib.import_module(
        f"mae_kernels.{name}"
    )  # functions of the package hide some of its modules


def _bytes(op: str, phase: str) -> Callable[[Shape, int], float]:
    """The registry's formula, where one kernel is all that the op does in this phase."""
    return lambda s, b: float(getattr(OPS[op].cost(s, b, {}), f"{phase}_bytes"))


def _tiles(*choices: tuple[int, ...], block: int | None = None) -> tuple[Candidate, ...]:
    """(rows of a program, its warps, where the kernel walks over its rows: number of programs); block: columns of a program."""
    return tuple(_tile(block, *choice) for choice in choices)


def _tile(block: int | None, rows: int, warps: int, programs: int | None = None) -> Candidate:
    names: dict[str, Any] = {"rows_per_program": lambda device, width: (rows, warps)}
    names |= {} if block is None else {"column_block": lambda width: block}
    return Candidate(names | ({} if programs is None else {"BACKWARD_PROGRAMS": programs}), warps)


def _attention_sites(s: Shape) -> Iterator[Site]:
    """The rows kernel takes short sequences in one piece: its warps are all that it chooses."""
    blocks = (
        ("encoder", s.width, s.heads, 1 + s.keep),
        ("decoder", s.decoder, s.decoder_heads, 1 + s.patches),
    )
    for block, width, heads, tokens in blocks:
        site = Attention(
            f"{s.model} {block}", s.batch, width, heads, tokens=tokens, head_width=width // heads
        )
        cuts = (False,) if tokens <= 128 else (True, False)
        rows = ((16, 2), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 8))
        forward = [
            _sizes("FORWARD", cut, *pair)
            for cut in cuts
            for pair in rows[0 if tokens <= ROWS_KERNEL_TOKENS else 2 :]
        ]
        if tokens <= ROWS_KERNEL_TOKENS:
            kernel = "backward_rows_kernel"
            backward = [Candidate(warps=warps) for warps in (2, 4, 8)]
        else:
            pairs = ((16, 4), (16, 8), (32, 4), (32, 8), (64, 8))
            kernel = "backward_keys_kernel"
            backward = [_sizes("BACKWARD", cut, *pair) for cut in cuts for pair in pairs]
        where = partial(Site, op="attention", module=_module("short_attention"), shape=site)
        yield where(
            phase="forward", kernel="attention_kernel", launcher="_launch_attention", candidates=tuple(forward),
            given=lambda s, x: (x["qkv"], x["qkv"].shape[4] ** -0.5), cost=partial(_attention_bytes, 4, 0),
        )  # fmt: skip
        yield where(
            phase="backward", kernel=kernel, launcher="_launch_attention_backward", candidates=tuple(backward),
            given=_attention_backward, cost=partial(_attention_bytes, 7, 1),
        )  # fmt: skip


def _sizes(table: str, split: bool, rows: int, warps: int) -> Candidate:
    """A table of one line, which holds for all that the kernels take."""
    return Candidate({table: (Sizes(80, 256, 128, split, rows, warps),)})


def _attention_backward(s: Shape, x: Inputs) -> tuple[Any, ...]:
    """The log-sum-exp is about that of normal scores: probabilities of a usual size."""
    qkv = x["qkv"]
    batch, tokens, _, heads, width = qkv.shape
    dout, out = (torch.randn_like(qkv[:, :, 0]).contiguous() for _ in range(2))
    return dout, qkv, out, torch.full((batch, heads, tokens), 8.5, device=qkv.device), width**-0.5


def _attention_bytes(tensors: int, more: int, s: Shape, b: int) -> float:
    """So many tensors of the result's size; beyond 64 tokens the log-sum-exp and, in the backward, the result as well."""
    assert isinstance(s, Attention)
    rows, beyond = s.batch * s.tokens * s.heads, s.tokens > ROWS_KERNEL_TOKENS
    return float(rows * s.head_width * b * (tensors + more * beyond) + rows * FP32 * beyond)


def _loss_sites(s: Shape) -> Iterator[Site]:
    def pixels(s: Shape, x: Inputs) -> tuple[Any, ...]:
        return (x["images"], x["ids_masked"], None, s.patch, "patch", EPS, *stats(s).values())

    def logits(x: Inputs) -> tuple[Tensor, ...]:
        return x["student"], x["teacher"], x["center"]

    def one(x: Inputs) -> Tensor:
        return torch.ones((), device=next(iter(x.values())).device)

    tiles = _tiles((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (4, 8))
    where = partial(
        Site,
        op="masked_reconstruction_loss",
        module=_module("reconstruction"),
        shape=s,
        candidates=tiles,
    )
    yield where(
        phase="forward", kernel="loss_kernel", launcher="launch_loss_rows",
        given=lambda s, x: (x["pred"], *pixels(s, x)), cost=_bytes("masked_reconstruction_loss", "forward"),
    )  # fmt: skip
    yield where(
        phase="backward", kernel="loss_backward_kernel", launcher="launch_loss_backward",
        given=lambda s, x: (one(x), one(x), x["pred"], *pixels(s, x)), cost=_bytes("masked_reconstruction_loss", "backward"),
    )  # fmt: skip

    groups = ((128, 4), (128, 8), (128, 16), (64, 8), (256, 4), (256, 8))
    where = partial(Site, op="distillation_loss", module=_module("distillation"), shape=s)
    yield where(
        phase="forward", kernel="distillation_kernel", launcher="_launch_distillation",
        given=lambda s, x: (*logits(x), False, *TEMPS), cost=_bytes("distillation_loss", "forward"),
        candidates=tuple(Candidate({"FORWARD_GROUPS": count}, warps) for count, warps in groups),
    )  # fmt: skip
    yield where(
        phase="backward", kernel="distillation_backward_kernel", launcher="_launch_distillation_backward",
        given=lambda s, x: (one(x), *logits(x), *TEMPS, True), cost=_bytes("distillation_loss", "backward"),
        candidates=tuple(Candidate(warps=warps) for warps in (4, 8, 16)),
    )  # fmt: skip

    def merged(rows: int, warps: int) -> Candidate:
        return Candidate(
            {
                "_constants": lambda pixels, logits: {
                    **pixels,
                    **logits,
                    "num_warps": warps,
                    "ROWS": rows,
                }
            }
        )

    pairs = tuple(
        merged(*pair) for pair in ((2, 4), (4, 4), (2, 8), (4, 8), (8, 8), (4, 16), (8, 16))
    )
    where = partial(Site, op="sssd_loss", module=_module("sssd"), shape=s, candidates=pairs)
    yield where(
        phase="forward", kernel="sssd_kernel", launcher="_launch", cost=_bytes("sssd_loss", "forward"),
        given=lambda s, x: (x["pred"], *logits(x), WEIGHT, False, TEMPS, *pixels(s, x)),
    )  # fmt: skip
    yield where(
        phase="backward", kernel="sssd_backward_kernel", launcher="_launch_backward", cost=_bytes("sssd_loss", "backward"),
        given=lambda s, x: ((one(x),) * 3, one(x), x["pred"], *logits(x), WEIGHT, TEMPS, True, *pixels(s, x)),
    )  # fmt: skip


def _restore_sites(s: Shape) -> Iterator[Site]:
    def gradient(s: Shape, x: Inputs) -> tuple[Any, ...]:
        visible, tokens = x["visible"], 1 + s.patches
        grad = normal(s.batch, tokens, s.decoder, device=visible.device).to(visible.dtype)
        return grad, x["ids_restore"], visible.shape[1], 1, visible.dtype

    where = partial(Site, op="restore_tokens", module=_module("restore"), shape=s)
    tiles = _tiles((1, 1), (1, 2), (2, 1), (2, 2), (4, 4), (8, 4), (8, 8), (16, 8), block=512)
    yield where(
        phase="forward", kernel="restore_kernel", launcher="_launch_restore", candidates=tiles,
        given=lambda s, x: (x["visible"], x["ids_restore"], x["mask_token"], x["pos"], 1),
        cost=_bytes("restore_tokens", "forward"),
    )  # fmt: skip
    choices = (
        (4, 4, 256),
        (4, 4, 1024),
        (4, 4, 2048),
        (4, 2, 2048),
        (8, 8, 512),
        (8, 8, 1024),
        (16, 8, 1024),
    )
    yield where(
        phase="backward", kernel="restore_backward_kernel", launcher="_launch_restore_backward", given=gradient,
        cost=_bytes("restore_tokens", "backward"), candidates=_tiles(*choices, block=512),
    )  # fmt: skip


def _patch_sites(s: Shape) -> Iterator[Site]:
    def tokens(s: Shape, x: Inputs) -> Tensor:
        return normal(s.batch, s.keep, s.width, device=x["pos"].device).to(x["pos"].dtype)

    def listed(passes: int, s: Shape, b: int) -> float:
        """The visible tokens so many times, their ids, and the positions once."""
        return float(s.batch * s.keep * (passes * s.width * b + IDS) + s.patches * s.width * b)

    where = partial(Site, module=_module("patches"), shape=s)
    yield where(
        op="gather_patches", phase="forward", kernel="gather_kernel", launcher="_launch_gather",
        given=lambda s, x: (x["images"], x["ids_keep"], s.patch, *stats(s).values(), x["like"].dtype),
        cost=_bytes("gather_patches", "forward"),
        candidates=_tiles((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8), (4, 4), (4, 8)),
    )  # fmt: skip
    yield where(
        op="embed_patches", phase="forward", kernel="add_positions_kernel", launcher="_launch_add_positions",
        given=lambda s, x: (tokens(s, x), x["pos"], x["ids_keep"], x["pos"].dtype), cost=partial(listed, 2),
        candidates=_tiles((2, 1), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8), (16, 8), block=256),
    )  # fmt: skip
    yield where(
        op="embed_patches", phase="backward", kernel="sum_positions_kernel", launcher="_launch_sum_positions",
        given=lambda s, x: (tokens(s, x), x["ids_keep"], s.patches, x["pos"].dtype), cost=partial(listed, 1),
        candidates=_tiles((8, 2), (16, 4), (32, 8), block=256) + _tiles((8, 4), (16, 4), block=128) + _tiles((32, 4), block=64),
    )  # fmt: skip


def _other_sites(s: Shape) -> Iterator[Site]:
    def hidden(passes: int, s: Shape, b: int) -> float:
        return float((passes * s.batch * (1 + s.patches) + 1) * 4 * s.decoder * b)

    def crops(s: Shape, b: int) -> float:
        """What ops_tokens.crop_op makes, on average: 60 % of images of 300 to 600 pixels a side."""
        return float(s.batch * s.channels * (0.6 * 450**2 + s.image[0] * s.image[1]))

    def rows(x: Inputs) -> Tensor:
        return x["x"].flatten(0, 1)

    where = partial(Site, op="gelu_linear", module=_module("gelu_linear"), shape=s)
    yield where(
        phase="forward", kernel="gelu_kernel", launcher="_launch_gelu", cost=partial(hidden, 2),
        given=lambda s, x: (rows(x), x["bias"], x["x"].dtype),
        candidates=_tiles((1, 1), (2, 2), (2, 4), (4, 2), (4, 8), (8, 4), block=512) + _tiles((1, 2), block=1024),
    )  # fmt: skip
    choices = (
        (4, 8, 1024),
        (4, 8, 2048),
        (2, 4, 1024),
        (2, 4, 2048),
        (4, 4, 1024),
        (8, 8, 512),
        (8, 16, 512),
    )
    yield where(
        phase="backward", kernel="gelu_backward_kernel", launcher="_launch_gelu_backward", cost=partial(hidden, 4),
        given=lambda s, x: (rows(x), x["bias"], torch.randn_like(rows(x)), x["x"].dtype),
        candidates=_tiles(*choices, block=512),
    )  # fmt: skip
    yield Site(
        op="random_masking", phase="forward", kernel="masking_kernel", launcher="_launch", module=_module("masking"), shape=s,
        given=lambda s, x: (x["noise"], s.keep), cost=_bytes("random_masking", "forward"),
        candidates=tuple(Candidate(warps=warps) for warps in (1, 2, 4, 8)),
    )  # fmt: skip
    shaped = (
        (8, 64, 4, 1),
        (8, 128, 4, 2),
        (8, 128, 8, 1),
        (16, 64, 4, 1),
        (16, 128, 4, 2),
        (4, 128, 4, 1),
        (8, 32, 4, 1),
    )
    yield Site(
        op="crop_resize", phase="forward", kernel="crop_resize_kernel", launcher="_launch", module=_module("crop_resize"),
        shape=s, cost=crops, candidates=tuple(Candidate({"TILE": one[:3]}, one[3]) for one in shaped),
        given=lambda s, x: (*(x[name] for name in ("pixels", "offsets", "shapes", "boxes", "flips")), *s.image, s.channels),
    )  # fmt: skip
