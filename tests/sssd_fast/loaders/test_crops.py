"""Crops: distributions against their definition, geometry against Pillow and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sssd_fast.config import AugmentConfig
from sssd_fast.loaders.crops import (
    CROP_TRIES,
    center_boxes,
    crop_and_resize,
    evaluation_crop,
    random_crop_boxes,
    training_crops,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (60, 90), dtype=np.uint8)
SHAPES = np.tile(np.array([[400, 500]]), (4000, 1))


def draws(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, CROP_TRIES, 4))


@pytest.mark.parametrize("shape", [(60, 90), (60, 90, 3)])
def test_crop_is_pillows_antialiased_bicubic_of_the_box(shape: tuple[int, ...]):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    cut = Image.fromarray(image[10:50, 20:80])
    expected = cut.resize((15, 40), Image.Resampling.BICUBIC).resize(
        (15, 20), Image.Resampling.BICUBIC
    )
    box = np.array([10, 20, 40, 60])
    got = crop_and_resize(image, box, False, (20, 15))
    np.testing.assert_array_equal(got, np.asarray(expected))
    np.testing.assert_array_equal(crop_and_resize(image, box, True, (20, 15)), got[:, ::-1])


def test_crop_ignores_pixels_outside_the_box():
    changed = IMAGE.copy()
    changed[:10], changed[50:], changed[:, :20], changed[:, 80:] = 0, 255, 255, 0
    box = np.array([10, 20, 40, 60])
    np.testing.assert_array_equal(
        crop_and_resize(IMAGE, box, False, (64, 64)), crop_and_resize(changed, box, False, (64, 64))
    )


def test_antialiasing_averages_fine_detail():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = crop_and_resize(stripes, np.array([0, 0, 64, 64]), False, (8, 8))
    assert np.abs(small.astype(int) - 127).max() < 10


def test_crop_boxes_follow_area_and_aspect():
    boxes = random_crop_boxes(SHAPES, (0.2, 0.8), (3 / 4, 4 / 3), draws(4000))
    top, left, height, width = boxes.T
    area, aspect = width * height / 200_000, np.log(width / height)
    assert min(top.min(), left.min()) >= 0
    assert (left + width).max() <= 500
    assert (top + height).max() <= 400
    assert 0.195 < area.min() < 0.21
    assert 0.79 < area.max() < 0.805
    # Uniform, but the largest crops of odd aspect do not fit: a little below the mean of 0.5.
    assert 0.46 < area.mean() < 0.505
    assert abs(aspect.mean()) < 0.02
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.02
    assert 0.16 < aspect.std() < 0.175  # uniform over +-0.2877: 0.1661
    small = width < 250
    assert abs(np.mean(left[small] / (500 - width[small])) - 0.5) < 0.03
    assert abs(np.mean(top[small] / (400 - height[small])) - 0.5) < 0.03


def test_crop_box_equals_one_computed_by_hand():
    u = np.full((1, CROP_TRIES, 4), [0.5, 0.5, 0.25, 0.999])
    # area 0.5 of 100 x 200, aspect exp(0) = 1: 100 x 100, and 101 places along the width
    box = random_crop_boxes(np.array([[100, 200]]), (0.25, 0.75), (0.5, 2.0), u)
    assert box.tolist() == [[0, 100, 100, 100]]


def test_crop_box_is_the_first_try_that_fits():
    u = np.zeros((1, CROP_TRIES, 4))
    u[0, 0] = [1.0, 1.0, 0, 0]  # the whole area at aspect 2: 200 wide in an image of 141
    u[0, 1] = [0.0, 0.5, 0, 0]
    u[0, 2] = [1.0, 0.5, 0, 0]
    box = random_crop_boxes(np.array([[141, 141]]), (0.25, 1.0), (0.5, 2.0), u)
    assert box.tolist() == [[0, 0, 70, 70]]


def test_crop_box_is_centred_if_no_try_fits():
    shapes = np.array([[10, 1000], [1000, 10]])
    boxes = random_crop_boxes(shapes, (0.9, 1.0), (0.5, 2.0), draws(2))
    assert boxes.tolist() == [[0, 490, 10, 20], [490, 0, 20, 10]]


def test_crops_depend_only_on_seed_epoch_and_record():
    spec = AugmentConfig(rotation_deg=10, brightness=0.2, contrast=0.3)
    whole = training_crops(SHAPES, spec, 7, 3)
    part = training_crops(SHAPES[:50], spec, 7, 3)
    for name in ("records", "boxes", "flips", "jitter"):
        np.testing.assert_array_equal(getattr(whole[:50], name), getattr(part, name))
    for other in (training_crops(SHAPES, spec, 8, 3), training_crops(SHAPES, spec, 7, 4)):
        assert (other.boxes != whole.boxes).any(1).mean() > 0.99
        assert 0.4 < (other.flips != whole.flips).mean() < 0.6


def test_crops_do_not_depend_on_other_augmentations():
    plain, turned = (
        training_crops(SHAPES, spec, 0, 0)
        for spec in (AugmentConfig(), AugmentConfig(rotation_deg=45))
    )
    np.testing.assert_array_equal(plain.boxes, turned.boxes)
    np.testing.assert_array_equal(plain.flips, turned.flips)
    assert not plain.jitter.any()


def test_flips_angles_and_factors_have_their_distributions():
    spec = AugmentConfig(hflip=0.3, rotation_deg=30, brightness=0.2, contrast=0.4)
    crops = training_crops(SHAPES, spec, 0, 0)
    assert 0.27 < crops.flips.mean() < 0.33
    for column, limit in enumerate((30, 0.2, 0.4)):
        values = crops.jitter[:, column] / limit
        assert -1 <= values.min() < -0.99
        assert 0.99 < values.max() <= 1
        assert abs(values.std() - 1 / 3**0.5) < 0.02
    correlation = np.corrcoef(np.c_[crops.jitter, crops.boxes, crops.flips].T)
    assert np.abs(correlation - np.eye(8))[:3].max() < 0.06


def test_evaluation_crop_is_the_centre_or_the_whole_image():
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 20:60] = 200
    assert evaluation_crop(wide, (20, 20), "crop").min() > 180
    stretched = evaluation_crop(wide, (20, 20), "stretch")
    assert stretched[:, :4].max() < 20
    assert stretched[:, 7:13].min() > 180
    np.testing.assert_array_equal(evaluation_crop(IMAGE, (60, 90), "crop"), IMAGE)
    tall = evaluation_crop(np.ascontiguousarray(wide.T), (10, 20), "crop")
    assert tall.shape == (10, 20)
    assert tall.min() > 180  # rows 30 to 50 of 80


def test_center_boxes_by_hand():
    shapes = np.array([[100, 200], [200, 100], [101, 101], [1, 1], [3, 500]])
    expected = [
        [0, 50, 100, 100],
        [50, 0, 100, 100],
        [0, 0, 101, 101],
        [0, 0, 1, 1],
        [0, 248, 3, 3],
    ]
    assert center_boxes(shapes, (224, 224), "crop").tolist() == expected
    assert center_boxes(shapes[:1], (100, 50), "crop").tolist() == [[0, 75, 100, 50]]
    assert center_boxes(shapes[:1], (7, 9), "stretch").tolist() == [[0, 0, 100, 200]]
