"""How much memory a training step takes: the real model's allocations, counted on fake tensors.

Forward and backward run under torch's FakeTensorMode for two numbers of images. Both runs allocate
in the same order, so each moment of the step is `constant + images * per_image` bytes, and so are
the kept bytes.

Assumed, not counted:
- a compiled step keeps what the eager step keeps, except that no norm casts its input to fp32;
  step.activation_budget is not considered, so a budget below 1 needs less than estimated;
- xformers keeps what scaled_dot_product_attention keeps;
- temporary memory inside an operation, except of gelu_linear, the largest of them;
- an allocator's rounding and fragments, and the CUDA context: see plan.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mae_kernels
from sssd_fast.config import Config
from sssd_fast.errors import ConfigError
from sssd_fast.performance.execution import attention_choices, set_execution
from sssd_fast.performance.fake import DirectDevice, FakeStep
from sssd_fast.run.device import AUTOCAST, autocast

CPU = torch.device("cpu")
FP32 = 4
# torchao keeps the moments of smaller tensors and of incomplete blocks in fp32
BLOCK_8BIT = 256
SMALLEST_8BIT = 4096


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were allocated inside the block and are alive, except those of
    `given`; timeline: these bytes after each operation.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = 0
        self.timeline: list[int] = []
        self._given = {t.untyped_storage()._cdata for t in given}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        self.timeline.append(self.alive + _temporary_bytes(func, args))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._given or key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.alive -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.alive += size


def _temporary_bytes(op: Any, args: Any) -> int:
    """Bytes that an op allocates and frees again: gelu_linear's backward holds dg and g in addition
    to its results, later the gradient of the weight.
    """
    if op is not torch.ops.mae_kernels.gelu_linear_backward.default:
        return 0
    x, weight = args[1], args[3]
    return int(weight.element_size() * max(2 * x.numel() - weight.numel(), x.numel()))


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step. Sums of `constant + images * per_image`."""

    parameters: int  # and buffers
    gradients: int
    trained: tuple[int, ...]  # number of values of each tensor with a gradient
    optimizer_name: str  # adamw or adamw8bit
    input_per_image: float
    kept_constant: float  # alive at the end of the forward
    kept_per_image: float  # activations
    timeline_constant_T: Tensor  # each moment of forward and backward
    timeline_per_image_T: Tensor

    @property
    def optimizer(self) -> float:
        return sum(optimizer_bytes(values, self.optimizer_name) for values in self.trained)

    @property
    def fixed(self) -> float:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    def step_peak(self, images: float) -> float:
        """The peak in forward and backward of one micro-batch, gradients included."""
        return float((self.timeline_constant_T + images * self.timeline_per_image_T).max())

    def peak(self, images: float, *, accumulate: float = 1, gradient_copies: int = 0) -> float:
        """Bytes of everything at the worst moment of a step with `accumulate` micro-batches.

        The loop fetches all micro-batches of a step first. From the second micro-batch on the
        gradients of the first one exist. gradient_copies: such as buffers for several processes.
        """
        batch = images * accumulate * self.input_per_image
        gradients = (gradient_copies + (accumulate > 1)) * self.gradients
        return self.parameters + self.optimizer + batch + gradients + self.step_peak(images)


def estimate(
    config: Config,
    task: str,
    precision: str,
    device: torch.device,
    *,
    compiled: bool,
    capability: tuple[int, int] = (8, 0),
    classes: int = 2,
) -> Estimate:
    """The memory of a step as `config.step` requests it, on `device` or on a GPU that is not there.

    capability: of the CUDA device. Raises ConfigError if a setting cannot be carried out.
    """
    step = FakeStep(config, task, classes)
    module = step.module
    cuda = device.type == "cuda"
    choices = attention_choices(
        module, config.step, AUTOCAST.get(precision, torch.float32), device, compiled, capability
    )
    providers = [provider.replace("xformers", "sdpa") for provider, _ in choices]
    fused_mlp = cuda and config.step.mlp != "plain"
    set_execution(module, config.step, precision, providers, fused_mlp=fused_mlp)
    if cuda and not compiled and precision != "fp32":
        # CUDA's autocast runs LayerNorm in fp32, that of the CPU does not
        for norm in [m for m in module.modules() if isinstance(m, nn.LayerNorm)]:
            norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float(),))
    few, many = 4, 8
    runs = [_run(step, precision, images, capability if cuda else None) for images in (few, many)]
    kept, timelines = zip(*runs, strict=True)
    if len(timelines[0]) != len(timelines[1]):
        raise ConfigError(f"{task}: the step allocates differently for {few} and {many} images")
    kept_per_image = (kept[1] - kept[0]) / (many - few)
    per_image_T = (timelines[1] - timelines[0]) / (many - few)
    trained = [p for p in module.parameters() if p.grad is not None]
    return Estimate(
        parameters=sum(t.nbytes for t in [*module.parameters(), *module.buffers()]),
        gradients=sum(p.nbytes for p in trained),
        trained=tuple(p.numel() for p in trained),
        optimizer_name=config.step.optimizer,
        input_per_image=sum(t.nbytes for t in step.inputs(1)),
        kept_constant=kept[0] - few * kept_per_image,
        kept_per_image=kept_per_image,
        timeline_constant_T=timelines[0] - few * per_image_T,
        timeline_per_image_T=per_image_T,
    )


def _run(
    step: FakeStep, precision: str, images: int, capability: tuple[int, int] | None
) -> tuple[int, Tensor]:
    """(bytes kept at the end of the forward, bytes after each operation)."""
    inputs, module = step.inputs(images), step.module
    module.zero_grad()
    gpu = nullcontext() if capability is None else mae_kernels.as_on_gpu(capability)
    live = LiveBytes([*module.parameters(), *module.buffers(), *inputs])
    with step.mode, gpu, live, DirectDevice():
        with autocast(precision, CPU):
            loss = step.loss(inputs)
        kept = live.alive
        loss.backward()
    return kept, torch.tensor(live.timeline, dtype=torch.float64)


def optimizer_bytes(values: int, optimizer: str) -> float:
    """State of one parameter tensor: the step and two moments, of 4 bytes a value; for adamw8bit
    of 1 byte, with an fp32 scale for each block and a table of 256 fp32 values.
    """
    wide = optimizer == "adamw" or values < SMALLEST_8BIT or values % BLOCK_8BIT
    moment = FP32 * values if wide else values + FP32 * (values // BLOCK_8BIT) + FP32 * 256
    return FP32 + 2 * moment
