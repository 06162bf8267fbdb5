"""Example inputs of every op: one declaration that lint, tests, sanitizer and benchmarks iterate
over.

Each op file ends with a function `samples()` that lists its calls. A sample makes its tensors from
a `Draw`, which knows the device, dtype and batch size, so the same declaration serves a CPU test in
fp64, a GPU test in bf16 and the lint, which runs on meta tensors.

    for sample in mae_kernels.samples():
        tensors, options = sample.make(Draw("cpu", torch.float32, batch=3))
        out = sample.function(**tensors, **options)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# ImageNet's statistics for colour; a grey image takes the first one
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Layout = Literal["nchw uint8", "nhwc uint8", "nchw float", "nhwc float"]
Size = Literal["small", "model"]
# The tensors of a call by argument name, and its other arguments
Made = tuple[Mapping[str, Tensor | None], dict[str, Any]]


@dataclass(frozen=True)
class Draw:
    """Makes random tensors for a sample.

    Args:
        device: of the tensors. On "meta" they have no values.
        dtype: of floating point tensors, unless the call names another one.
        batch: B, the number of images.
        generator: where the random numbers come from. They are drawn on its device and in fp32,
            then moved and rounded, so that one seed gives the same values on every device and, up
            to rounding, in every dtype. None draws on `device`.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 3
    generator: torch.Generator | None = None

    def _place(self) -> dict[str, Any]:
        if torch.device(self.device).type == "meta" or self.generator is None:
            return {"device": self.device}
        return {"device": self.generator.device, "generator": self.generator}

    def _move(self, x: Tensor) -> Tensor:
        return x if self.generator is None else x.to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Standard normal values times `scale`."""
        x = torch.randn(shape, dtype=torch.float32, **self._place()) * scale
        return self._move(x).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """fp32 values in [0, 1), in every dtype."""
        return self._move(torch.rand(shape, dtype=torch.float32, **self._place()))

    def pixels(
        self, channels: int, height: int, width: int, layout: Layout = "nchw uint8"
    ) -> Tensor:
        """Images [B, C, H, W]: uint8, or fp32 in [0, 1]; "nhwc" is channels-last memory."""
        shape = (self.batch, channels, height, width)
        x = self._move(torch.randint(0, 256, shape, dtype=torch.uint8, **self._place()))
        if layout.startswith("nhwc"):
            x = x.to(memory_format=torch.channels_last)
        return x / 255 if layout.endswith("float") else x

    def ids(self, patches: int, count: int) -> Tensor:
        """[B, count] int64: different patches of each image in random order; a permutation with
        count = patches.
        """
        return self.uniform(self.batch, patches).topk(count).indices

    def mask(self, *shape: int, share: float = 0.75) -> Tensor:
        """bool, True with probability `share`."""
        return self.uniform(*shape) < share


class Case(NamedTuple):
    """Images cut into patches, and how patches are selected."""

    channels: int
    side: tuple[int, int]
    patch: int
    layout: Layout = "nchw uint8"
    select: Literal["ids", "mask"] = "ids"

    @property
    def patches(self) -> int:
        return self.side[0] // self.patch * (self.side[1] // self.patch)

    @property
    def values(self) -> int:
        """Of a patch."""
        return self.channels * self.patch**2

    @property
    def stats(self) -> dict[str, Any]:
        return {"mean": MEAN[: self.channels], "std": STD[: self.channels]}

    @property
    def out_of_range(self) -> dict[str, int]:
        return {"ids": self.patches} if self.select == "ids" else {}

    def images(self, draw: Draw) -> Tensor:
        return draw.pixels(self.channels, *self.side, self.layout)

    def target(self, draw: Draw) -> tuple[dict[str, Tensor | None], dict[str, Any], int]:
        """images and ids or mask; the options; the number of predictions per image."""
        masked = self.patches - self.patches // 4
        options = self.stats | {"patch_size": self.patch}
        images = self.images(draw)
        if self.select == "ids":
            return {"images": images, "ids": draw.ids(self.patches, masked)}, options, masked
        mask = draw.mask(draw.batch, self.patches)
        return {"images": images, "mask": mask}, options, self.patches


RGB_16 = Case(3, (224, 224), 16)
CT_16 = Case(1, (224, 224), 16)


@dataclass(frozen=True)
class Sample:
    """One call of one op: `sample.function(**tensors, **options)` with `tensors, options =
    sample.make(draw)`.

    Args:
        op: name of the public function.
        name: what is special about this call.
        function: the public function.
        make: makes the tensors, some of them perhaps None, and the other arguments.
        gradients: the tensors that get a gradient. They have the dtype of the draw; the others may
        not.
        size: "small" for odd sizes that a CPU or the interpreter computes at once; "model" for
        sizes of real models.
        half_only: on a GPU the kernels run in fp16 and bf16 only.
        wide: the layout allows accesses of 16 bytes in every kernel.
        min_arch, max_arch: the kernels run from sm_<min_arch> to sm_<max_arch>.
        out_of_range: for tensors of indices, a value that is out of range. A kernel that finds it
            must not read there.
    """

    op: str
    name: str
    function: Callable[..., Any]
    make: Callable[[Draw], Made]
    gradients: tuple[str, ...] = ()
    size: Size = "small"
    half_only: bool = False
    wide: bool = True
    min_arch: int = 75
    max_arch: int = 999
    out_of_range: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


SampleList = Callable[[], list[Sample]]


@dataclass(frozen=True)
class Op:
    """What an op file declares: its samples, and the oldest architecture (75 = sm_75) that its
    kernels run on.
    """

    samples: SampleList
    oldest: int


# Filled at import by the op files
OPS: dict[str, Op] = {}


def declares(*ops: str, oldest: int = 75) -> Callable[[SampleList], SampleList]:
    """Decorates the function `samples` of an op file: declares its ops, whose kernels run from
    sm_<oldest> on.
    """

    def declare(function: SampleList) -> SampleList:
        for op in ops:
            OPS[op] = Op(function, oldest)
        return function

    return declare


def samples() -> list[Sample]:
    """The example calls of all ops, for tests and benchmarks. See Sample and Draw."""
    functions = dict.fromkeys(op.samples for op in OPS.values())
    return [sample for function in functions for sample in function()]
