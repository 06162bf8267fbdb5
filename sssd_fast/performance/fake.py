"""The real model without its memory: built on the meta device, run under torch's FakeTensorMode.

Shapes, dtypes, storages and the order of operations are those of a training step, values are not. A
new loss or layer is therefore counted without a line of code here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mae_kernels
from sssd_fast.config import Config
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD


class DirectDevice(TorchDispatchMode):
    """Answers where a fake tensor is; must be the last mode entered. Autograd asks so often that
    this is half of the time of a fake step.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        return func(*args, **(kwargs or {}))


def make_model(config: Config, task: str, classes: int) -> SSSD | Classifier:
    if task == "pretrain":
        return SSSD(config.model, config.objective)
    s = config.finetune
    return Classifier(config.model, classes, s.pool, s.drop_path, s.patch_drop)


def random_inputs(config: Config, task: str, images: int, device: torch.device) -> list[Tensor]:
    """uint8 images and, for pre-training, the noise that orders the patches."""
    model = config.model
    shape = images, model.in_channels, *model.image_size
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if task != "pretrain":
        return [pixels]
    return [pixels, torch.rand(images, model.num_patches, device=device)]


class FakeStep:
    """Forward and backward of `task` ("pretrain" or "finetune") on tensors that take no memory."""

    def __init__(self, config: Config, task: str, classes: int = 2) -> None:
        self.config = config
        self.task = task
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.module = make_model(config, task, classes)
        with self.mode:
            self.module.to_empty(device="cpu")

    def inputs(self, images: int) -> list[Tensor]:
        with self.mode:
            return random_inputs(self.config, self.task, images, torch.device("cpu"))

    def loss(self, inputs: list[Tensor]) -> Tensor:
        out = self.module(*inputs)
        total: Tensor = out.total if self.task == "pretrain" else -out.float().log_softmax(1).mean()
        return total

    def flops(self) -> int:
        """Of forward and backward per image."""
        return self.count(lambda *inputs: self.loss([*inputs]).backward())

    def count(self, work: Callable[..., object]) -> int:
        """FLOPs of `work` on one image: matrix products and attention, 2 per multiply-add."""
        inputs, counter = self.inputs(1), FlopCounterMode(display=False)
        # plain torch and its math attention: torch has no formula for the ops of mae_kernels
        plain, math = mae_kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH)
        with self.mode, plain, math, counter, DirectDevice():
            work(*inputs)
        return counter.get_total_flops()


def standard_flops(config: Config) -> int:
    """FLOPs per image by the convention in which masked autoencoders are compared, e.g. for MFU.

    Three times the forward pass of a plain MAE that predicts all patches: 58.1e9 for ViT-B/16 with
    224 x 224 x 3 pixels and 75 % masked. Projection heads and recomputation do not count.
    """
    step = FakeStep(config, "pretrain")
    assert isinstance(step.module, SSSD)
    return 3 * step.count(step.module.mae.reconstruct)
