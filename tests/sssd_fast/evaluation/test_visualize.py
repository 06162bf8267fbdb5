"""Reconstructions that cannot leak masked pixels, attention maps, curves and the other pictures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.errors import DataError
from sssd_fast.evaluation.plots import confusion_picture, curves, roc_picture
from sssd_fast.evaluation.reconstruct import patchify, unnormalise, unpatchify
from sssd_fast.evaluation.visualize import (
    attention_grid,
    attention_maps,
    reconstruction_columns,
    reconstruction_grid,
    thumbnail,
)

P, ROWS, COLS = 4, 3, 5


def make_case(channels=1, seed=0, masked=0.6):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, channels, ROWS * P, COLS * P), dtype=np.uint8)
    pred = rng.normal(size=(2, ROWS * COLS, P * P * channels))
    mask = rng.random((2, ROWS * COLS)) < masked
    mask[:, 0] = False
    mask[:, -1] = True
    return images, pred, mask


def pixels_of(mask, shape):
    """[n, H, W] bool: True where a pixel belongs to a masked patch."""
    return np.repeat(np.repeat(mask.reshape(-1, ROWS, COLS), P, axis=1), P, axis=2).reshape(
        shape[0], *shape[2:]
    )


def plain_target(image_CHW, norm, mean, std, eps):
    """Training target by loops: {(row, col): (normalised vector in (row, column, channel) order, centre, spread)}."""
    out = {}
    for row, col in itertools.product(range(ROWS), range(COLS)):
        cell = image_CHW[:, row * P : (row + 1) * P, col * P : (col + 1) * P].astype(np.float64)
        vector = np.array(
            [
                [(cell[c, y, x] / 255 - mean[c]) / std[c] for c in range(len(cell))]
                for y in range(P)
                for x in range(P)
            ]
        )
        if norm == "patch":
            center, var = vector.mean(), vector.var(ddof=1)
        else:
            center, var = vector.mean(axis=0), vector.var(axis=0, ddof=1)
        spread = np.sqrt(var + eps)
        out[row, col] = (((vector - center) / spread).ravel(), center, spread)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_is_row_column_channel(channels):
    """The order of the MAE pixel head; a channel-major order would scramble colour images."""
    images = np.arange(2 * channels * 12 * 20).reshape(2, channels, 12, 20)
    patches = patchify(images, P)
    for row, col, y, x, c in itertools.product(
        range(ROWS), range(COLS), range(P), range(P), range(channels)
    ):
        value = images[1, c, row * P + y, col * P + x]
        assert patches[1, row * COLS + col, (y * P + x) * channels + c] == value
    assert np.array_equal(unpatchify(patches, images.shape, P), images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("norm", ["patch", "channel"])
def test_target_statistics_invert_the_training_target(norm):
    """With the answer's own statistics a perfect prediction gives the original pixels back, mean and std per channel included."""
    images, _, mask = make_case(channels=3)
    mean, std, eps = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 1e-6
    targets = [plain_target(image, norm, mean, std, eps) for image in images]
    pred = np.stack([[vector for vector, _, _ in target.values()] for target in targets])
    values = unnormalise(pred, images, mask, P, "target", norm=norm, mean=mean, std=std, eps=eps)
    assert np.allclose(values[mask], patchify(images, P)[mask], atol=1e-6)
    assert (values[~mask] == 0).all()


def plain_fit(pred_SPPC, known, mask, center, spread):
    """(deviation, mean) per patch by dense least squares over explicit rows, one per pair of touching pixels."""
    rows, values = [], []
    weight = 1 / math.sqrt(P * pred_SPPC.shape[-1])
    for index in range(ROWS * COLS):
        row, col = divmod(index, COLS)
        prior_row = np.zeros((2, 2 * ROWS * COLS))
        prior_row[0, 2 * index] = prior_row[1, 2 * index + 1] = (
            0.1  # sqrt of the prior's weight 0.01
        )
        rows += list(prior_row)
        values += [0.1 * spread[index], 0.1 * center[index]]
        touching = []
        if col + 1 < COLS:
            touching += [((k, P - 1), (k, 0), index + 1) for k in range(P)]
        if row + 1 < ROWS:
            touching += [((P - 1, k), (0, k), index + COLS) for k in range(P)]
        for here, there, other in touching:
            for c in range(pred_SPPC.shape[-1]):
                line, value = np.zeros(2 * ROWS * COLS), 0.0
                for patch, pixel, sign in ((index, here, 1), (other, there, -1)):
                    if mask[patch]:
                        line[2 * patch] += sign * pred_SPPC[patch][pixel][c]
                        line[2 * patch + 1] += sign
                    else:
                        value -= sign * known[patch][pixel][c]
                rows.append(weight * line)
                values.append(weight * value)
    found = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0].reshape(-1, 2)
    return found[:, 0], found[:, 1]


@pytest.mark.parametrize("norm", ["patch", "channel"])
def test_visible_statistics_equal_a_plain_least_squares_fit(norm):
    """The block conjugate gradients find the optimum of the stated problem, whose prior is weighted by 1 / distance^4."""
    images, pred, mask = make_case(channels=3)
    mean, std, eps = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 1e-6
    values = unnormalise(pred, images, mask, P, norm=norm, mean=mean, std=std, eps=eps)
    cells = (patchify(images, P)[1] / 255).reshape(ROWS * COLS, P, P, 3)
    known = (cells - np.array(mean)) / np.array(std)
    target = list(plain_target(images[1], norm, mean, std, eps).values())
    center, spread = np.zeros((ROWS * COLS, 3)), np.zeros((ROWS * COLS, 3))
    for index in range(ROWS * COLS):
        weights = np.zeros(ROWS * COLS)
        for other in np.flatnonzero(~mask[1]):
            distance = math.dist(divmod(index, COLS), divmod(int(other), COLS)) or 1.0
            weights[other] = distance**-4
        weights /= weights.sum()
        center[index] = sum(weight * target[other][1] for other, weight in enumerate(weights))
        spread[index] = sum(weight * target[other][2] for other, weight in enumerate(weights))
    shown = pred[1].reshape(ROWS * COLS, P, P, 3)
    for channels in [[0, 1, 2]] if norm == "patch" else [[0], [1], [2]]:
        fit = plain_fit(
            shown[..., channels],
            known[..., channels],
            mask[1],
            center[:, channels[0]],
            spread[:, channels[0]],
        )
        for index in np.flatnonzero(mask[1]):
            joined = shown[index][..., channels] * max(fit[0][index], 0) + fit[1][index]
            expected = 255 * (joined * np.array(std)[channels] + np.array(mean)[channels])
            got = values[1, index].reshape(P, P, 3)[..., channels]
            assert np.allclose(got, expected, atol=1e-4)


def test_visible_statistics_restore_a_smooth_image():
    """A perfect prediction of a smooth image comes back to a few grey levels with half of it masked."""
    y, x = np.mgrid[: ROWS * P, : COLS * P]
    images = np.stack([128 + 90 * np.sin(x / 4) * np.cos(y / 5), 40 + 8 * x + 2 * y]).astype(
        np.uint8
    )[:, None]
    mask = np.random.default_rng(0).random((2, ROWS * COLS)) < 0.5
    pred = np.stack(
        [
            [vector for vector, _, _ in plain_target(image, "patch", [0], [1], 1e-6).values()]
            for image in images
        ]
    )
    error = (unnormalise(pred, images, mask, P) - patchify(images, P))[mask]
    assert np.sqrt((error**2).mean()) < 9


def test_unnormalised_prediction_without_norm_is_only_scaled():
    images, pred, mask = make_case()
    values = unnormalise(pred, images, mask, P, norm="none", mean=(0.5,), std=(0.25,))
    assert np.allclose(values[mask], 255 * (pred[mask] * 0.25 + 0.5))


@pytest.mark.parametrize("norm", ["patch", "channel", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_masked_pixels_never_reach_the_reconstruction(norm, channels):
    """Changing every masked pixel changes the original column only, bit for bit; with target statistics it leaks."""
    images, pred, mask = make_case(channels)
    hidden = pixels_of(mask, images.shape)[:, None]
    other = np.where(hidden, np.uint8(255) - images // 3, images)
    assert (other != images).any()
    first = reconstruction_columns(images, pred, mask, P, norm=norm)
    second = reconstruction_columns(other, pred, mask, P, norm=norm)
    for name in ("masked input", "prediction", "prediction + visible"):
        assert np.array_equal(first[name], second[name]), name
    assert not np.array_equal(first["original"], second["original"])
    if norm != "none":
        leaks = [
            reconstruction_columns(x, pred, mask, P, norm=norm, norm_statistics="target")[
                "prediction"
            ]
            for x in (images, other)
        ]
        assert not np.array_equal(*leaks)


def test_columns_show_what_they_say():
    """Visible patches are the input's own pixels or grey, masked ones the prediction or grey."""
    images, pred, mask = make_case(channels=3)
    columns = reconstruction_columns(images, pred, mask, P)
    hidden = pixels_of(mask, images.shape)
    original = images.transpose(0, 2, 3, 1)
    assert np.array_equal(columns["original"], original)
    assert (columns["masked input"][hidden] == 128).all()
    assert np.array_equal(columns["masked input"][~hidden], original[~hidden])
    assert (columns["prediction"][~hidden] == 128).all()
    both = columns["prediction + visible"]
    assert np.array_equal(both[~hidden], original[~hidden])
    assert np.array_equal(both[hidden], columns["prediction"][hidden])
    values = unpatchify(unnormalise(pred, images, mask, P), images.shape, P)
    assert np.array_equal(both[hidden], np.clip(np.rint(values[hidden]), 0, 255))


def test_reconstruction_grid_labels_its_statistics(tmp_path):
    """The sheet with target statistics differs in its caption, and both are pictures of the arrays."""
    images, pred, mask = make_case()
    pred = np.zeros_like(pred)
    images[:] = 77  # one grey: both statistics agree, so only the caption can differ
    paths = [
        reconstruction_grid(
            images, pred, mask, P, path=tmp_path / "new" / f"{kind}.png", norm_statistics=kind
        )
        for kind in ("visible", "target")
    ]
    sheets = [np.asarray(Image.open(path)) for path in paths]
    shown = reconstruction_columns(images, pred, mask, P)["masked input"][0, :, :, 0]
    zoom = math.ceil(150 / images.shape[3])
    top, left = 26, 6 + images.shape[3] * zoom + 6
    cell = sheets[0][
        top : top + shown.shape[0] * zoom : zoom, left : left + shown.shape[1] * zoom : zoom, 0
    ]
    assert np.array_equal(cell, shown)
    below = top + 2 * (shown.shape[0] * zoom + 6)
    assert np.array_equal(sheets[0][:below], sheets[1][:below])
    assert sheets[0][below:].min() < 200
    assert sheets[0].shape != sheets[1].shape or not np.array_equal(sheets[0], sheets[1])


def test_torch_tensors_are_accepted():
    """Also bfloat16 with gradient, which numpy cannot hold."""
    images, pred, mask = make_case()
    tensor = torch.from_numpy(pred).bfloat16().requires_grad_()
    values = unnormalise(tensor, torch.from_numpy(images), torch.from_numpy(mask), P)
    assert np.array_equal(values, unnormalise(tensor.detach().float().numpy(), images, mask, P))


def test_wrong_reconstruction_input_is_named():
    images, pred, mask = make_case()
    with pytest.raises(DataError, match=r"pred: got shape \[2, 14, 16\], need \[2, 15, 16\]"):
        unnormalise(pred[:, 1:], images, mask, P)
    with pytest.raises(DataError, match="no visible patch"):
        unnormalise(pred, images, np.ones_like(mask), P)
    with pytest.raises(DataError, match="not finite"):
        unnormalise(np.where(pred > 0, np.nan, pred), images, mask, P)
    with pytest.raises(DataError, match="cannot be cut into patches of 5"):
        unnormalise(pred, images, mask, 5)
    with pytest.raises(DataError, match="need uint8"):
        unnormalise(pred, images / 255, mask, P)
    with pytest.raises(DataError, match="'visible', or 'target'"):
        unnormalise(pred, images, mask, P, "own")


def test_attention_of_the_class_token_or_of_all_queries():
    """Row 0 without the prefix column with a cls token; the mean over rows without one."""
    rng = np.random.default_rng(0)
    attention = rng.random((2, 3, 7, 7))
    got = attention_maps(attention, (2, 3), 1)
    assert np.array_equal(got, attention[:, :, 0, 1:])
    without = attention_maps(attention[:, :, 1:, 1:], (2, 3), 0)
    assert without[1, 2, 4] == pytest.approx(
        sum(attention[1, 2, 1 + query, 5] for query in range(6)) / 6
    )
    with pytest.raises(DataError, match=r"need \[n, heads, 6, 6\]"):
        attention_maps(attention, (2, 3), 0)


def test_attention_grid_is_bright_where_attention_is(tmp_path):
    """A peak at the upper right patch lights the upper right of its head's picture, not a transposed place."""
    images = np.zeros((1, 1, 40, 60), dtype=np.uint8)
    attention = np.full((1, 2, 7, 7), 1e-3)
    attention[0, 1, 0, 1 + 2] = 1.0  # patch (row 0, column 2) of 2 x 3
    sheet = np.asarray(
        Image.open(attention_grid(images, attention, (2, 3), 1, path=tmp_path / "a.png"))
    ).astype(int)
    zoom, columns = math.ceil(150 / 60), 4
    assert sheet.shape[1] == columns * (60 * zoom + 6) + 6
    left = 6 + 3 * (60 * zoom + 6)
    head = sheet[26 : 26 + 40 * zoom, left : left + 60 * zoom].sum(axis=2)
    corners = {
        "upper left": head[:20, :20].mean(),
        "upper right": head[:20, -20:].mean(),
        "lower right": head[-20:, -20:].mean(),
        "lower left": head[-20:, :20].mean(),
    }
    assert max(corners, key=corners.get) == "upper right"
    assert corners["upper right"] > 3 * corners["lower left"]


def test_curves_draw_what_is_there(tmp_path):
    """Records without a key, NaN losses and validation-only files are drawn; no numbers at all give no picture."""
    train = [
        {"kind": "train", "step": s, "loss": 1 / s if s != 5 else math.nan, "lr": 0.1}
        for s in range(1, 40)
    ]
    val = [{"kind": "val", "step": s, "accuracy": 0.7, "auc": None} for s in (10, 20)]
    event = [{"kind": "event", "message": "resumed"}]
    one = Image.open(curves(train, path=tmp_path / "one.png"))
    two = Image.open(curves([*train, *val, *event], path=tmp_path / "two.png"))
    assert two.width == pytest.approx(one.width * 1.5, abs=4)  # a third panel
    assert curves(event, path=tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_plots_survive_odd_class_names(tmp_path):
    """A dollar sign is no formula, long names are shortened, an empty row is not divided by zero."""
    names = ["$x_1$ & <b>", "a name that is much longer than any axis could ever show"]
    assert confusion_picture([[3, 1], [0, 0]], names, path=tmp_path / "c.png").stat().st_size > 1000
    line = (np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0]))
    assert roc_picture({r"$\frac{": line}, path=tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize("shape", [(400, 300), (50, 60, 3)])
def test_thumbnail_keeps_proportions_and_never_enlarges(tmp_path, shape):
    picture = Image.open(thumbnail(np.full(shape, 30, dtype=np.uint8), path=tmp_path / "t.png"))
    assert picture.size == ((144, 192) if len(shape) == 2 else (60, 50))
    assert np.asarray(picture).mean() == pytest.approx(30, abs=1)
