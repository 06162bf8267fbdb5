"""Augmentation of whole batches on their device, after crop and flip: rotation, brightness,
contrast, mixing, erasing.

All random numbers come from the caller (crops.py, or a generator). Images are uint8 [B, C, H, W]
before and after.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_FLOAT_IMAGES = 32  # images converted to float at a time, so that no float copy of the batch exists


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies through pinned memory: a copy from pageable memory waits for all earlier GPU work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rotate_and_jitter(images_BCHW: Tensor, jitter_B3: Tensor) -> Tensor:
    """Rotation about the centre, then brightness, then contrast around the image's mean; a new
    uint8 tensor.

    jitter_B3: float32 degrees counter-clockwise, brightness - 1, contrast - 1, on the images'
    device. Corners become black. Interpolation is bicubic (a = -0.75, as in
    torch's grid_sample); pixels are rounded once, at the end.
    """
    out = torch.empty_like(images_BCHW)
    for start in range(0, len(images_BCHW), _FLOAT_IMAGES):
        part = slice(start, start + _FLOAT_IMAGES)
        x_BCHW = _rotate(images_BCHW[part].float(), jitter_B3[part, 0])
        bright, contrast = (jitter_B3[part, i].view(-1, 1, 1, 1) for i in (1, 2))
        x_BCHW = x_BCHW * (1 + bright)
        mean = x_BCHW.mean((1, 2, 3), keepdim=True)
        out[part] = (
            (mean + (1 + contrast) * (x_BCHW - mean)).round_().clamp_(0, 255).to(torch.uint8)
        )
    return out


def _rotate(x_BCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """An angle of 0 returns the pixels exactly."""
    height, width = x_BCHW.shape[-2:]
    radians = torch.deg2rad(degrees_B)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # From output to input, in the [-1, 1] coordinates of grid_sample, whose unit is half a side; y
    # points down.
    theta_B23 = torch.stack(
        [cos, -sin * height / width, zero, sin * width / height, cos, zero], 1
    ).view(-1, 2, 3)
    grid = F.affine_grid(theta_B23, list(x_BCHW.shape), align_corners=False)
    rotated = F.grid_sample(
        x_BCHW, grid, mode="bicubic", padding_mode="zeros", align_corners=False
    ).clamp(0, 255)
    return torch.where((degrees_B == 0).view(-1, 1, 1, 1), x_BCHW, rotated)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """int64 [B] -> float32 [B, num_classes]: 1 - s + s/num_classes on the label, s/num_classes
    elsewhere.
    """
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix_batch(
    images: Tensor,
    targets: Tensor,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., arXiv 1710.09412) or CutMix (Yun et al., arXiv 1905.04899), one kind per
    batch.

    images uint8 [B, C, H, W], targets float [B, num_classes]; generator on the CPU. Each image is
    mixed with a random partner. An alpha of 0 disables that kind; if both are enabled, each is
    chosen with probability 1/2. Mixed pixels are rounded back to uint8 (error at most 0.5 grey
    level); CutMix's weight is the area that was pasted.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, targets
    rng = _numpy_generator(generator)
    coin = rng.random()
    cut = cutmix_alpha > 0 and (mixup_alpha == 0 or coin < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    keep = float(rng.beta(alpha, alpha))
    partner = to_device(torch.from_numpy(rng.permutation(len(images))), images.device)
    if cut:
        top, bottom, left, right = _box_of_area(rng, images.shape[-2], images.shape[-1], 1 - keep)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    else:
        mixed = (
            (images.float() * keep + images[partner].float() * (1 - keep)).round_().to(torch.uint8)
        )
    return mixed, keep * targets + (1 - keep) * targets[partner]


def random_erasing(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al., arXiv 1708.04896): one rectangle per chosen image becomes
    noise, of 2 to 33 % of its area and height / width of 0.3 to 3.3.

    images uint8 [B, C, H, W] -> a new tensor; generator on the CPU. The noise is normal per pixel
    with the image's own mean and deviation, rounded and clipped, so that an erased patch keeps the
    image's brightness.
    """
    if probability == 0 or len(images) == 0:
        return images
    rng = _numpy_generator(generator)
    batch, _, height, width = images.shape
    chosen = rng.random(batch) < probability
    share = rng.uniform(0.02, 1 / 3, batch) * height * width
    aspect = np.exp(rng.uniform(math.log(0.3), math.log(3.3), batch))
    h = np.clip(np.rint(np.sqrt(share / aspect)), 1, height)
    w = np.clip(np.rint(np.sqrt(share * aspect)), 1, width)
    top = np.floor(rng.random(batch) * (height - h + 1))
    left = np.floor(rng.random(batch) * (width - w + 1))
    corners = np.stack([top, top + h * chosen, left, left + w]).astype(np.int64)
    edges = to_device(torch.from_numpy(corners), images.device)
    rows = torch.arange(height, device=images.device)
    cols = torch.arange(width, device=images.device)
    in_rows = (rows >= edges[0, :, None]) & (rows < edges[1, :, None])  # [B, H]
    in_cols = (cols >= edges[2, :, None]) & (cols < edges[3, :, None])  # [B, W]
    erase = (in_rows[:, :, None] & in_cols[:, None, :])[:, None]  # [B, 1, H, W]
    device_generator = torch.Generator(images.device).manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(images.shape, generator=device_generator, device=images.device)
    std, mean = torch.std_mean(images.float(), dim=(1, 2, 3), keepdim=True)
    return torch.where(erase, (noise * std + mean).round_().clamp_(0, 255).to(torch.uint8), images)


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    # torch has no public Beta draw that takes a generator; one number from it seeds numpy's.
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def _box_of_area(
    rng: np.random.Generator, height: int, width: int, share: float
) -> tuple[int, int, int, int]:
    """CutMix's box: `share` of the area before clipping at the borders, centre uniform."""
    h, w = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, left = y - h // 2, x - w // 2
    return max(top, 0), min(top + h, height), max(left, 0), min(left + w, width)
