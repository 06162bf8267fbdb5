"""What every provider of the training step shares: model and batch, initial weights, masking noise, and the losses they must show.

torch and the standard library suffice to import this file; what needs pydantic is imported inside functions.
Shapes: B images, C channels, H x W pixels, L patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mae_kernels

from .machine import DTYPES

if TYPE_CHECKING:
    from sssd_fast.config import Config
    from sssd_fast.objective import SSSD

SEED = 0
NOISES = 32  # draws of the masking noise; step i takes number i modulo this


@dataclass(frozen=True)
class Setup:
    """step: further keys of StepConfig for every one of our recipes, such as {"cuda_graphs": False}."""

    config: Config  # of the task: objective.weight is 0 for "MAE"
    task: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    step: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """ "ViT-B/16, 224, 256 images" for the known sizes, their width and depth for others."""
        from sssd_fast.config import VIT_SIZES

        model = self.config.model
        size = "x".join(str(n) for n in dict.fromkeys(model.image_size))
        width, depth, _ = model.encoder_shape
        known = (width, depth) == VIT_SIZES[model.name][:2]
        name = f"ViT-{model.name[0].upper()}" if known else f"ViT {width}x{depth}"
        return f"{name}/{model.patch_size}, {size}, {self.batch} images"

    @property
    def sizes(self) -> dict[str, Any]:
        model = self.config.model
        width, depth, heads = model.encoder_shape
        decoder = {"decoder_width": model.decoder_width, "decoder_depth": model.decoder_depth}
        return {
            "batch": self.batch, "image": list(model.image_size), "patch": model.patch_size,
            "channels": model.in_channels, "mask_ratio": model.mask_ratio, "width": width, "depth": depth,
            "heads": heads, **decoder, "decoder_heads": model.decoder_heads,
        }  # fmt: skip

    @property
    def lr(self) -> float:
        from sssd_fast.optim import scaled_lr

        return scaled_lr(self.config.pretrain.base_lr, self.batch)

    @property
    def betas(self) -> tuple[float, float]:
        return self.config.pretrain.beta1, self.config.pretrain.beta2


def configuration(name: str | None, device: torch.device) -> Config:
    """A ViT by size with three channels, as published, or a shipped configuration; None = base on CUDA, cpu_smoke elsewhere."""
    from sssd_fast.config import VIT_SIZES, from_dict, load_config

    name = name or ("base" if device.type == "cuda" else "cpu_smoke")
    return (
        from_dict({"model": {"name": name, "in_channels": 3}})
        if name in VIT_SIZES
        else load_config(name)
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """That of precision "auto"."""
    from sssd_fast.run.device import pick_precision

    return DTYPES[pick_precision("auto", device)]


def for_task(config: Config, task: str) -> Config:
    if task == "SSSD":
        return config
    return config.model_copy(
        update={"objective": config.objective.model_copy(update={"weight": 0.0})}
    )


class Data:
    """One batch of smooth random images with some noise, and the masking noise of the steps; the same on every machine.

    On the device stands what was asked for: `images` for ours, `floats` for the others.
    """

    def __init__(self, setup: Setup) -> None:
        model = setup.config.model
        self._setup = setup
        generator = torch.Generator().manual_seed(SEED)
        (height, width), B, C = model.image_size, setup.batch, model.in_channels
        coarse_BCHW = torch.rand(
            B, C, max(2, height // 16), max(2, width // 16), generator=generator
        )
        images_BCHW = F.interpolate(coarse_BCHW, (height, width), mode="bilinear")
        images_BCHW += 0.1 * torch.rand(images_BCHW.shape, generator=generator)
        self._host_images = (images_BCHW / 1.1 * 255).to(torch.uint8)
        self._noises = torch.rand(NOISES, B, model.num_patches, generator=generator).to(
            setup.device
        )

    @cached_property
    def images(self) -> Tensor:
        """[B, C, H, W] uint8."""
        return self._host_images.to(self._setup.device)

    @cached_property
    def floats(self) -> Tensor:
        """[B, C, H, W] the images normalised, fp32."""
        model = self._setup.config.model
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
        return ((self._host_images.float() / 255 - mean) / std).to(self._setup.device)

    def bytes(self) -> int:
        """On the device."""
        tensors = [
            self.__dict__[name] for name in ("images", "floats", "_noises") if name in self.__dict__
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    def noise(self, step: int) -> Tensor:
        return self._noises[step % NOISES]


def initial_model(config: Config) -> SSSD:
    """On the CPU, from a fixed seed; no bias or norm at 0 or 1, so that one that is dropped shows in the loss."""
    from sssd_fast.objective import SSSD

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SSSD(config.model, config.objective)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def reference_losses(
    setup: Setup, data: Data, source: SSSD, steps: int, images_at_once: int = 16
) -> list[float]:
    """Losses of the first steps of the plain model in fp32, for fp32 in fp64; the batch in parts, so that it fits where they do."""
    from sssd_fast.model import Attention
    from sssd_fast.objective import SSSD
    from sssd_fast.optim import parameter_groups

    wide = torch.float64 if setup.dtype == torch.float32 else torch.float32
    model = SSSD(setup.config.model, setup.config.objective)
    model.load_state_dict(source.state_dict())
    model.to(setup.device, wide)
    for module in model.modules():
        if isinstance(module, Attention):
            module.provider = "sdpa"
    pretrain, losses = setup.config.pretrain, []
    groups = parameter_groups(model, weight_decay=pretrain.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=setup.lr, betas=setup.betas)
    with mae_kernels.backend("reference"):
        for step in range(steps):
            total = 0.0
            center = torch.zeros_like(model.center)
            noise_BL = data.noise(step).to(wide)
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, setup.batch, images_at_once):
                part = slice(start, start + images_at_once)
                out = model(data.images[part], noise_BL[part])
                share = len(data.images[part]) / setup.batch
                (out.total * share).backward()
                total += share * float(out.total.detach())
                if out.batch_center is not None:
                    center += share * out.batch_center
            optimizer.step()
            model.update_center(center, torch.ones((), dtype=torch.bool, device=setup.device))
            losses.append(total)
    return losses
