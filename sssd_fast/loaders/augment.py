"""Augmentation: per image in numpy / Pillow (crop, flip, rotation, intensity), per batch in torch (erasing, mixing).

Every draw comes from a generator that the caller passes. Per-image draws happen in one fixed order whether a switch is
on or off, so turning the rotation on does not move the crops. Images stay uint8 from the file to the patch kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sssd_fast.data.images import ImageArray
from sssd_fast.errors import ConfigError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the source

_CROP_TRIES = 10


@dataclass(frozen=True)
class AugmentSpec:
    """Per-image training augmentation. The defaults are MAE's for pre-training: random resized crop and flip."""

    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the crop over the area of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    hflip: float = 0.5  # probability
    rotation_deg: float = 0.0  # uniform in +- this; corners become black
    brightness: float = 0.0  # factor uniform in 1 +- this
    contrast: float = 0.0  # factor around the image's mean, uniform in 1 +- this

    def __post_init__(self) -> None:
        # YAML and JSON give lists; the spec is hashed and compared, so keep tuples.
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        object.__setattr__(self, "crop_ratio", tuple(self.crop_ratio))
        problems = []
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            problems.append(f"crop_scale is {list(self.crop_scale)}; needed: 0 < low <= high <= 1")
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            problems.append(f"crop_ratio is {list(self.crop_ratio)}; needed: 0 < low <= high")
        if not 0 <= self.hflip <= 1:
            problems.append(f"hflip is {self.hflip}; a probability from 0 to 1 is needed")
        if not 0 <= self.rotation_deg <= 180:
            problems.append(f"rotation_deg is {self.rotation_deg}; 0 to 180 degrees is needed")
        for name, value in (("brightness", self.brightness), ("contrast", self.contrast)):
            if not 0 <= value < 1:
                problems.append(f"{name} is {value}; 0 (off) to below 1 is needed")
        if problems:
            raise ConfigError("; ".join(problems))


def augment(image: ImageArray, spec: AugmentSpec, size: tuple[int, int], rng: np.random.Generator) -> ImageArray:
    """uint8 [H, W] or [H, W, 3] -> the same with [size]: crop, resize, flip, rotate, brightness, contrast."""
    box = random_crop_box(image.shape[0], image.shape[1], spec.crop_scale, spec.crop_ratio, rng)
    flip = rng.random() < spec.hflip
    angle, bright, contrast = rng.uniform(-1, 1, 3) * (spec.rotation_deg, spec.brightness, spec.contrast)
    out = resize_box(image, box, size)
    if flip:
        out = out[:, ::-1]
    if angle:
        out = np.asarray(Image.fromarray(out).rotate(angle, Image.Resampling.BICUBIC))
    if bright or contrast:
        levels = np.arange(256, dtype=np.float64) * (1 + bright)
        mean = (1 + bright) * float(out.mean())
        table = np.clip(np.rint(mean + (1 + contrast) * (levels - mean)), 0, 255).astype(np.uint8)
        out = table[out]
    return np.ascontiguousarray(out)


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Inception crop: area uniform in `scale`, log aspect uniform in `ratio`, place uniform over whole pixels.

    When ten draws do not fit, the largest centred crop of an allowed aspect.
    """
    found: Box | None = None
    for u_area, u_ratio, u_top, u_left in rng.random((_CROP_TRIES, 4)):
        area = height * width * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + u_ratio * math.log(ratio[1] / ratio[0]))
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
            found = (left, top, left + w, top + h)
            break
    if found is None:
        aspect = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - w) // 2, (height - h) // 2
        found = (left, top, left + w, top + h)
    return found


def resize_center_crop(image: ImageArray, size: tuple[int, int], *, fit: str = "crop") -> ImageArray:
    """The evaluation view, uint8 [size].

    fit="crop": the largest centred part of the target's aspect, resized; nothing is stretched. fit="stretch": the whole
    image, so that the edges of wide slices stay visible.
    """
    height, width = image.shape[:2]
    if fit == "stretch":
        return resize_box(image, (0, 0, width, height), size)
    if fit != "crop":
        raise ConfigError(f"evaluation fit is {fit!r}; 'crop' or 'stretch' is needed")
    scale = min(height / size[0], width / size[1])
    h, w = scale * size[0], scale * size[1]
    left, top = (width - w) / 2, (height - h) / 2
    return resize_box(image, (left, top, min(left + w, width), min(top + h, height)), size)


def resize_box(image: ImageArray, box: Box, size: tuple[int, int]) -> ImageArray:
    """Bicubic, antialiased resize of the part `box` to [size] (height, width); Pillow's kernel, a = -0.5."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """int64 [B] -> float32 [B, num_classes]: 1 - s + s/num_classes on the label, s/num_classes elsewhere."""
    if not 0 <= smoothing < 1:
        raise ConfigError(f"label smoothing is {smoothing}; 0 to below 1 is needed")
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix_batch(
    images: Tensor, targets: Tensor, *, mixup_alpha: float, cutmix_alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., arXiv 1710.09412) or CutMix (Yun et al., arXiv 1905.04899), one kind per batch.

    images uint8 [B, C, H, W], targets float [B, num_classes]; generator on the CPU. Each image meets a random partner;
    an alpha of 0 turns that kind off, with both on a fair coin decides. Mixed pixels are rounded back to uint8 (error
    at most 0.5 grey level); CutMix's weight is the area that was really pasted.
    """
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ConfigError(f"mixup_alpha {mixup_alpha} and cutmix_alpha {cutmix_alpha} must not be negative")
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, targets
    rng = _numpy_generator(generator)
    coin = rng.random()
    cut = cutmix_alpha > 0 and (mixup_alpha == 0 or coin < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    keep = float(rng.beta(alpha, alpha))
    partner = _on_device(rng.permutation(len(images)), images.device)
    if cut:
        top, bottom, left, right = _box_of_area(rng, images.shape[-2], images.shape[-1], 1 - keep)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    else:
        mixed = (images.float() * keep + images[partner].float() * (1 - keep)).round_().to(torch.uint8)
    return mixed, keep * targets + (1 - keep) * targets[partner]


def random_erasing(
    images: Tensor,
    probability: float,
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """Random erasing (Zhong et al., arXiv 1708.04896): one rectangle per chosen image becomes noise.

    images uint8 [B, C, H, W] -> a new tensor; generator on the CPU. The noise is normal per pixel with the image's own
    mean and deviation, rounded and clipped, so that an erased patch keeps the image's brightness.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"random erasing probability is {probability}; 0 to 1 is needed")
    if probability == 0 or len(images) == 0:
        return images
    rng = _numpy_generator(generator)
    batch, _, height, width = images.shape
    chosen = rng.random(batch) < probability
    share = rng.uniform(*area, batch) * height * width
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), batch))
    h = np.clip(np.rint(np.sqrt(share / aspect)), 1, height)
    w = np.clip(np.rint(np.sqrt(share * aspect)), 1, width)
    top, left = np.floor(rng.random(batch) * (height - h + 1)), np.floor(rng.random(batch) * (width - w + 1))
    edges = _on_device(np.stack([top, top + h * chosen, left, left + w]).astype(np.int64), images.device)
    rows, cols = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows = (rows >= edges[0, :, None]) & (rows < edges[1, :, None])  # [B, H]
    in_cols = (cols >= edges[2, :, None]) & (cols < edges[3, :, None])  # [B, W]
    erase = (in_rows[:, :, None] & in_cols[:, None, :])[:, None]  # [B, 1, H, W]
    device_generator = torch.Generator(images.device).manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(images.shape, generator=device_generator, device=images.device)
    std, mean = torch.std_mean(images.float(), dim=(1, 2, 3), keepdim=True)
    return torch.where(erase, (noise * std + mean).round_().clamp_(0, 255).to(torch.uint8), images)


def _on_device(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Through pinned memory, because a copy from other memory waits until the device has done everything before it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    # torch has no public Beta draw that takes a generator; one number from it seeds numpy's.
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def _box_of_area(rng: np.random.Generator, height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """CutMix's box: `share` of the area before clipping at the borders, centre uniform."""
    h, w = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, left = y - h // 2, x - w // 2
    return max(top, 0), min(top + h, height), max(left, 0), min(left + w, width)
