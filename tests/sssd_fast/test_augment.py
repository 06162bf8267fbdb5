"""Augmentation: geometry against Pillow and hand arithmetic, distributions against their definition, all seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.errors import ConfigError
from sssd_fast.loaders.augment import (
    AugmentSpec,
    augment,
    mix_batch,
    random_crop_box,
    random_erasing,
    resize_box,
    resize_center_crop,
    soft_targets,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (60, 90), dtype=np.uint8)
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}  # the crop is all of a 60 x 90 image


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(60, 90), (60, 90, 3)])
def test_resize_is_pillows_antialiased_bicubic(shape):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    crop = Image.fromarray(image[10:50, 20:80])
    expected = np.asarray(crop.resize((15, 20), Image.Resampling.BICUBIC))
    got = resize_box(image, (20, 10, 80, 50), (20, 15))
    assert got.shape == (20, 15, *shape[2:])
    # the box may look past the crop's edge, so compare inside
    np.testing.assert_array_equal(got[3:-3, 3:-3], expected[3:-3, 3:-3])


def test_antialias_averages_fine_detail_away():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert np.abs(resize_box(stripes, (0, 0, 64, 64), (8, 8)).astype(int) - 127).max() < 10


def test_crop_boxes_follow_area_and_aspect():
    rng, scale, ratio = seeded(), (0.2, 0.8), (3 / 4, 4 / 3)
    boxes = np.array([random_crop_box(400, 500, scale, ratio, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height / 200_000, np.log(width / height)
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= 500
    assert boxes[:, 3].max() <= 400
    assert 0.195 < area.min() < 0.21
    assert 0.79 < area.max() < 0.805
    # Uniform, but the largest crops of odd aspect do not fit: a little below the mean of 0.5.
    assert 0.46 < area.mean() < 0.505
    assert abs(aspect.mean()) < 0.02
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.02
    assert 0.16 < aspect.std() < 0.175  # uniform over +-0.2877: 0.1661
    small = width < 250
    assert abs(np.mean(boxes[small, 0] / (500 - width[small])) - 0.5) < 0.03


def test_crop_falls_back_to_the_centre_when_nothing_fits():
    assert random_crop_box(10, 1000, (0.9, 1.0), (0.5, 2.0), seeded()) == (490, 0, 510, 10)
    assert random_crop_box(1000, 10, (0.9, 1.0), (0.5, 2.0), seeded()) == (0, 490, 10, 510)


def test_flip_mirrors_columns_at_its_rate():
    always = augment(IMAGE, AugmentSpec(**WHOLE, hflip=1.0), (30, 45), seeded())
    never = augment(IMAGE, AugmentSpec(**WHOLE, hflip=0.0), (30, 45), seeded())
    np.testing.assert_array_equal(always, never[:, ::-1])
    spec = AugmentSpec(**WHOLE, hflip=0.3)
    flips = [np.array_equal(augment(IMAGE, spec, (30, 45), seeded(s)), always) for s in range(600)]
    assert 0.24 < np.mean(flips) < 0.36


def test_switches_do_not_move_the_crop():
    plain = AugmentSpec(hflip=0.0)
    bright = AugmentSpec(hflip=0.0, brightness=1e-9, contrast=1e-9)  # on, but without an effect after rounding
    for seed in range(5):
        np.testing.assert_array_equal(
            augment(IMAGE, plain, (24, 24), seeded(seed)), augment(IMAGE, bright, (24, 24), seeded(seed))
        )


def test_brightness_and_contrast_are_the_stated_linear_map():
    image = np.clip(RNG.normal(120, 12, (60, 90)), 60, 180).astype(np.uint8)
    base = augment(image, AugmentSpec(**WHOLE, hflip=0.0), (60, 90), seeded()).astype(float)
    gains, offsets = [], []
    for seed in range(200):
        spec = AugmentSpec(**WHOLE, hflip=0.0, brightness=0.2, contrast=0.3)
        out = augment(image, spec, (60, 90), seeded(seed)).astype(float)
        gain, offset = np.polyfit(base.ravel(), out.ravel(), 1)
        assert np.abs(gain * base + offset - out).max() < 1
        gains.append(out.mean() / base.mean())
        offsets.append(gain / gains[-1])
    assert 0.8 <= min(gains) < 0.83  # brightness factor: 1 +- 0.2
    assert 1.17 < max(gains) <= 1.201
    assert 0.69 < min(offsets) < 0.74  # contrast factor: 1 +- 0.3
    assert 1.26 < max(offsets) < 1.31


def test_rotation_turns_within_its_range_and_fills_black():
    bar = np.zeros((65, 65), np.uint8)
    bar[:, 30:35] = 255
    spec = AugmentSpec(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0.0, rotation_deg=30)
    angles = []
    for seed in range(100):
        out = augment(bar, spec, (65, 65), seeded(seed)).astype(float)
        y, x = np.nonzero(out > 128)
        angles.append(np.degrees(np.arctan(np.polyfit(y, x, 1)[0])))
    assert -31 < min(angles) < -22
    assert 22 < max(angles) < 31
    white = augment(np.full((64, 64), 255, np.uint8), spec, (64, 64), seeded(1))
    assert white[0, 0] == 0
    assert white[32, 32] == 255


def test_evaluation_view_crops_the_centre_or_keeps_the_whole():
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 20:60] = 200
    assert resize_center_crop(wide, (20, 20)).min() > 180
    stretched = resize_center_crop(wide, (20, 20), fit="stretch")
    assert stretched[:, :4].max() < 20
    assert stretched[:, 7:13].min() > 180
    np.testing.assert_array_equal(resize_center_crop(IMAGE, (60, 90)), IMAGE)
    tall = resize_center_crop(np.ascontiguousarray(wide.T), (10, 20))
    assert tall.shape == (10, 20)
    assert tall.min() > 180  # rows 30 to 50 of 80
    with pytest.raises(ConfigError, match="'pad'; 'crop' or 'stretch'"):
        resize_center_crop(wide, (20, 20), fit="pad")


def test_spec_lists_everything_out_of_range():
    with pytest.raises(ConfigError) as error:
        AugmentSpec((0.9, 0.2), (0.0, 1.0), 2.0, 400.0, -1.0, 1.0)
    for name in ("crop_scale", "crop_ratio", "hflip", "rotation_deg", "brightness", "contrast"):
        assert name in str(error.value)
    assert AugmentSpec(crop_scale=[0.5, 1.0]) == AugmentSpec(crop_scale=(0.5, 1.0))  # type: ignore[arg-type]


def test_soft_targets_by_hand():
    expected = torch.tensor([[0.05, 0.05, 0.05, 0.85], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(soft_targets(torch.tensor([3, 0]), 4, 0.2), expected)
    labels, logits = torch.tensor([1, 0, 2]), torch.randn(3, 3, generator=gen())
    ours = -(soft_targets(labels, 3, 0.1) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    with pytest.raises(ConfigError, match="smoothing is 1"):
        soft_targets(labels, 3, 1.0)


def batch(size: int = 8, height: int = 20, width: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Constant images whose level is 10 * row, with one-hot targets of their own: every mix can be read off."""
    levels = (torch.arange(size, dtype=torch.uint8) * 10)[:, None, None, None]
    return levels.expand(size, 1, height, width).contiguous(), torch.eye(size)


def test_mixup_pixels_agree_with_targets():
    images, targets = batch()
    keeps = []
    for seed in range(100):
        mixed, soft = mix_batch(images, targets, mixup_alpha=0.8, cutmix_alpha=0.0, generator=gen(seed))
        assert mixed.dtype == torch.uint8
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        expected = soft @ (torch.arange(8) * 10.0)
        assert (mixed[:, 0].float() - expected[:, None, None]).abs().max() <= 0.5 + 1e-4
        keeps.append(soft.diagonal()[soft.diagonal() < 1].min().item() if (soft.diagonal() < 1).any() else 1.0)
    assert 0.4 < np.mean(keeps) < 0.6  # Beta(0.8, 0.8)
    assert 0.25 < np.std(keeps) < 0.36  # 0.31


def test_cutmix_area_agrees_with_targets():
    images, targets = batch()
    clipped = 0
    for seed in range(100):
        mixed, soft = mix_batch(images, targets, mixup_alpha=0.0, cutmix_alpha=1.0, generator=gen(seed))
        own = torch.stack([(mixed[i] == 10 * i).float().mean() for i in range(8)])
        torch.testing.assert_close(own, soft.diagonal())
        changed = (mixed[:, 0] != images[:, 0]).any(0)
        if changed.any():
            rows, cols = changed.any(1).nonzero(), changed.any(0).nonzero()
            filled = (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
            assert changed.sum() == filled  # one rectangle
            clipped += int(rows.min() == 0 or cols.min() == 0)
    assert clipped > 10


def test_mixing_chooses_fairly_is_seeded_and_leaves_its_input_alone():
    images, targets = batch()
    before = images.clone(), targets.clone()
    kinds = []
    for seed in range(200):
        mixed, soft = mix_batch(images, targets, mixup_alpha=1.0, cutmix_alpha=1.0, generator=gen(seed))
        again = mix_batch(images, targets, mixup_alpha=1.0, cutmix_alpha=1.0, generator=gen(seed))
        assert torch.equal(mixed, again[0])
        assert torch.equal(soft, again[1])
        kinds.append(bool((mixed % 10 == 0).all()))  # CutMix only moves pixels
    assert 0.4 < np.mean(kinds) < 0.62
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])
    off = mix_batch(images, targets, mixup_alpha=0.0, cutmix_alpha=0.0, generator=gen())
    assert off[0] is images
    with pytest.raises(ConfigError, match="must not be negative"):
        mix_batch(images, targets, mixup_alpha=-1.0, cutmix_alpha=0.0, generator=gen())


def test_random_erasing_makes_one_noisy_rectangle_at_its_rate():
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
    with pytest.raises(ConfigError, match=r"probability is 1.5"):
        random_erasing(images, 1.5, gen())
