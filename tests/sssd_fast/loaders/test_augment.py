"""Augmentation of whole batches: rotation against Pillow, linear maps and mixes by hand,
distributions, all seeded.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.loaders.augment import mix_batch, random_erasing, rotate_and_jitter, soft_targets


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(count: int = 3, channels: int = 1, height: int = 60, width: int = 90) -> torch.Tensor:
    """Smooth noise, on which bicubic kernels of different sharpness agree."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 200, (count * channels, height // 10, width // 10), dtype=np.uint8)
    fine = [
        np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
        for c in coarse
    ]
    return torch.from_numpy(np.stack(fine)).view(count, channels, height, width)


def jitter(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_is_counter_clockwise_about_the_centre_with_black_corners(channels: int):
    images = smooth(3, channels)
    out = rotate_and_jitter(images, jitter((30, 0, 0), (-90, 0, 0), (0, 0, 0)))
    assert out.dtype == torch.uint8
    assert torch.equal(out[2], images[2])  # an angle of 0 changes nothing
    for i, angle in enumerate((30, -90)):
        for c in range(channels):
            turned = Image.fromarray(images[i, c].numpy()).rotate(angle, Image.Resampling.BICUBIC)
            white = Image.fromarray(np.full((60, 90), 255, np.uint8)).rotate(angle)
            inside = np.asarray(white) == 255
            shifts = [(n, axis) for n in (3, -3) for axis in (0, 1)]
            inside = np.all([inside, *(np.roll(inside, *shift) for shift in shifts)], axis=0)
            difference = np.abs(out[i, c].numpy().astype(int) - np.asarray(turned).astype(int))
            assert difference[inside].max() <= 3
            assert difference.mean() < 1.5
    assert out[1, 0, 30, 0] == 0  # 60 x 90 rotated by 90 degrees leaves the sides empty
    assert out[0, 0, 0, 0] == 0


def test_brightness_and_contrast_are_the_stated_linear_map():
    images = smooth(2)
    out = rotate_and_jitter(images, jitter((0, 0.2, 0), (0, -0.1, 0.3))).double()
    x = images.double()
    assert (out[0] - (x[0] * 1.2).clamp(0, 255)).abs().max() <= 0.5 + 1e-4
    mean = 0.9 * x[1].mean()
    assert (out[1] - (mean + 1.3 * (0.9 * x[1] - mean)).clamp(0, 255)).abs().max() <= 0.5 + 1e-3


def test_jitter_of_a_row_does_not_depend_on_its_batch():
    images = smooth(40, height=20, width=20)
    kept = smooth(40, height=20, width=20)
    table = torch.rand(40, 3, generator=gen()) * torch.tensor([40.0, 0.2, 0.2])
    whole = rotate_and_jitter(images, table)
    assert torch.equal(images, kept)
    for i in (0, 31, 32, 39):
        assert torch.equal(rotate_and_jitter(images[i : i + 1], table[i : i + 1])[0], whole[i])
    assert rotate_and_jitter(images[:0], table[:0]).shape == (0, 1, 20, 20)
    channels_last = images.expand(40, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        rotate_and_jitter(channels_last, table)[:, 2],
        rotate_and_jitter(images.expand(40, 3, 20, 20), table)[:, 0],
    )


def test_soft_targets_by_hand():
    expected = torch.tensor([[0.05, 0.05, 0.05, 0.85], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(soft_targets(torch.tensor([3, 0]), 4, 0.2), expected)
    labels, logits = torch.tensor([1, 0, 2]), torch.randn(3, 3, generator=gen())
    ours = -(soft_targets(labels, 3, 0.1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(
        ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    )


def batch(size: int = 8, height: int = 20, width: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Constant images of level 10 * row with different one-hot targets: pixels and targets show
    every mix.
    """
    levels = (torch.arange(size, dtype=torch.uint8) * 10)[:, None, None, None]
    return levels.expand(size, 1, height, width).contiguous(), torch.eye(size)


Tensors = tuple[torch.Tensor, torch.Tensor]


def mix(x: torch.Tensor, y: torch.Tensor, mixup: float, cutmix: float, seed: int = 0) -> Tensors:
    return mix_batch(x, y, mixup_alpha=mixup, cutmix_alpha=cutmix, generator=gen(seed))


def test_mixup_pixels_agree_with_targets():
    images, targets = batch()
    keeps = []
    for seed in range(100):
        mixed, soft = mix(images, targets, 0.8, 0.0, seed)
        assert mixed.dtype == torch.uint8
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        expected = soft @ (torch.arange(8) * 10.0)
        assert (mixed[:, 0].float() - expected[:, None, None]).abs().max() <= 0.5 + 1e-4
        own = soft.diagonal()
        keeps.append(own[own < 1].min().item() if (own < 1).any() else 1.0)
    assert 0.4 < np.mean(keeps) < 0.6  # Beta(0.8, 0.8)
    assert 0.25 < np.std(keeps) < 0.36  # 0.31


def test_cutmix_area_agrees_with_targets():
    images, targets = batch()
    clipped = 0
    for seed in range(100):
        mixed, soft = mix(images, targets, 0.0, 1.0, seed)
        own = torch.stack([(mixed[i] == 10 * i).float().mean() for i in range(8)])
        torch.testing.assert_close(own, soft.diagonal())
        changed = (mixed[:, 0] != images[:, 0]).any(0)
        if changed.any():
            rows, cols = changed.any(1).nonzero(), changed.any(0).nonzero()
            filled = (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
            assert changed.sum() == filled  # one rectangle
            clipped += int(rows.min() == 0 or cols.min() == 0)
    assert clipped > 10


def test_mix_batch_chooses_evenly_is_seeded_and_keeps_its_input():
    images, targets = batch()
    before = images.clone(), targets.clone()
    kinds = []
    for seed in range(200):
        mixed, soft = mix(images, targets, 1.0, 1.0, seed)
        again = mix(images, targets, 1.0, 1.0, seed)
        assert torch.equal(mixed, again[0])
        assert torch.equal(soft, again[1])
        kinds.append(bool((mixed % 10 == 0).all()))  # CutMix only moves pixels
    assert 0.4 < np.mean(kinds) < 0.62
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])
    off = mix(images, targets, 0.0, 0.0)
    assert off[0] is images


def test_random_erasing_draws_one_noisy_rectangle_at_its_rate():
    images = torch.randint(60, 180, (400, 1, 24, 32), generator=gen(), dtype=torch.uint8)
    before = images.clone()
    out = random_erasing(images, 0.25, gen(5))
    assert torch.equal(images, before)
    assert torch.equal(out, random_erasing(images, 0.25, gen(5)))
    changed = (out != images).any(1)
    touched = changed.flatten(1).any(1)
    assert 0.18 < touched.float().mean() < 0.32
    shares = []
    for mask in changed[touched]:
        rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = int((rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1))
        assert mask.sum() > 0.9 * box - 3  # noise may hit the old value
        shares.append(box / (24 * 32))
    assert 0.01 < min(shares) < 0.06
    assert 0.27 < max(shares) < 0.36
    noise = out[(out != images)].float()
    assert abs(noise.mean() - images.float().mean()) < 3  # the image's own brightness, not black
    assert 0.85 < noise.std() / images.float().std() < 1.15


def test_random_erasing_erases_all_channels_together_and_can_be_off():
    images = torch.randint(0, 256, (16, 3, 24, 24), generator=gen(), dtype=torch.uint8)
    erased = random_erasing(images, 1.0, gen(1)) != images
    boxes = erased.any(1)
    assert (erased.float().sum((2, 3)) > 0.8 * boxes.sum((1, 2))[:, None]).all()
    assert random_erasing(images, 0.0, gen()) is images
    assert len(random_erasing(images[:0], 1.0, gen())) == 0
