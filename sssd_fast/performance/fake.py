"""The real model without its memory: built on the meta device, run under torch's FakeTensorMode.

Shapes, dtypes, storages and the order of operations are those of a training step, values are not. A new
loss or layer is therefore counted without a line of code here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mae_kernels
from sssd_fast.config import Config
from sssd_fast.model import MAE, Classifier
from sssd_fast.objective import SSSD


class FakeStep:
    """Forward and backward of `task` ("pretrain" or "finetune") on tensors that take no memory."""

    def __init__(self, config: Config, task: str, classes: int = 2) -> None:
        self.config = config
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.module: SSSD | Classifier
        with torch.device("meta"):
            if task == "pretrain":
                self.module = SSSD(config.model, config.objective)
            else:
                s = config.finetune
                self.module = Classifier(config.model, classes, s.pool, s.drop_path)
        with self.mode:
            self.module.to_empty(device="cpu")

    def inputs(self, images: int) -> list[Tensor]:
        """uint8 images and, for pre-training, the noise that orders the patches."""
        model = self.config.model
        with self.mode:
            pixels = torch.empty((images, model.in_channels, *model.image_size), dtype=torch.uint8)
            if isinstance(self.module, Classifier):
                return [pixels]
            return [pixels, torch.empty(images, model.num_patches)]

    def loss(self, inputs: list[Tensor]) -> Tensor:
        out = self.module(*inputs)
        if isinstance(self.module, Classifier):
            return -F.log_softmax(out.float(), 1).mean()
        total: Tensor = out.total
        return total

    def flops(self) -> int:
        """FLOPs of forward and backward per image: matrix products and attention, 2 per multiply-add."""
        counter = FlopCounterMode(display=False)
        inputs = self.inputs(1)
        # plain torch and its math attention: torch has no formula for the ops of mae_kernels
        with self.mode, mae_kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH), counter:
            self.loss(inputs).backward()
        self.module.zero_grad()
        return counter.get_total_flops()


def standard_flops(config: Config) -> int:
    """FLOPs per image by the convention in which masked autoencoders are compared, e.g. for MFU.

    Three times the forward pass of a plain MAE that predicts all patches: 58.1e9 for ViT-B/16 with
    224 x 224 x 3 pixels and 75 % masked. Projection heads and recomputation do not count.
    """
    step = FakeStep(config, "pretrain")
    assert isinstance(step.module, SSSD)
    mae: MAE = step.module.mae
    counter = FlopCounterMode(display=False)
    inputs = step.inputs(1)
    with step.mode, mae_kernels.backend("reference"), sdpa_kernel(SDPBackend.MATH), counter:
        mae.reconstruct(*inputs)
    return 3 * counter.get_total_flops()
