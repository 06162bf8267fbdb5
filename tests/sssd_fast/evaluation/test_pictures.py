"""Reconstructions against loops over pixels, attention maps, curves and the other pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.evaluation import pictures

P, ROWS, COLS = 4, 3, 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def _full_resolution(monkeypatch):
    monkeypatch.setattr(pictures, "DPI", 160)


def make_case(channels=1, masked=0.6):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, channels, ROWS * P, COLS * P), dtype=np.uint8)
    pred = rng.normal(size=(2, ROWS * COLS, P * P * channels))
    mask = rng.random((2, ROWS * COLS)) < masked
    mask[:, 0] = False
    mask[:, -1] = True
    return images, pred, mask


def pixels_of(mask):
    """[n, H, W] bool: True where a pixel belongs to a masked patch."""
    grid = mask.reshape(-1, ROWS, COLS)
    return np.repeat(np.repeat(grid, P, axis=1), P, axis=2)


def plain_target(image_CHW, norm, eps=1e-6):
    """Training target by loops: normalised vector of each patch in (row, column, channel) order."""
    out = []
    for row, col in itertools.product(range(ROWS), range(COLS)):
        cell = image_CHW[:, row * P : (row + 1) * P, col * P : (col + 1) * P].astype(np.float64)
        pixels = itertools.product(range(P), range(P))
        channels = range(len(cell))
        vector = np.array(
            [[(cell[c, y, x] / 255 - MEAN[c]) / STD[c] for c in channels] for y, x in pixels]
        )
        axis = None if norm == "patch" else 0
        spread = np.sqrt(vector.var(axis=axis, ddof=1) + eps)
        out.append(((vector - vector.mean(axis=axis)) / spread).ravel())
    return np.stack(out)


@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_is_row_column_channel(channels):
    """The order of the MAE pixel head; a channel-major order would scramble colour images."""
    images = np.arange(2 * channels * 12 * 20).reshape(2, channels, 12, 20)
    patches = pictures.patchify(images, P)
    places = itertools.product(range(ROWS), range(COLS), range(P), range(P), range(channels))
    for row, col, y, x, c in places:
        value = images[1, c, row * P + y, col * P + x]
        assert patches[1, row * COLS + col, (y * P + x) * channels + c] == value
    back = pictures.unpatchify(patches, images.shape, P)
    assert np.array_equal(back, images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("norm", ["patch", "channel"])
def test_unnormalise_inverts_the_training_target(norm):
    """A perfect prediction gives the original pixels back, mean and std per channel included."""
    images, _, _ = make_case(channels=3)
    pred = np.stack([plain_target(image, norm) for image in images])
    values = pictures.unnormalise(pred, images, P, norm=norm, mean=MEAN, std=STD)
    assert np.allclose(values, pictures.patchify(images, P), atol=1e-6)


def test_unnormalise_without_norm_only_scales():
    images, pred, _ = make_case()
    values = pictures.unnormalise(pred, images, P, norm="none", mean=(0.5,), std=(0.25,))
    assert np.allclose(values, 255 * (pred * 0.25 + 0.5))


def test_reconstruction_rows_show_predictions_only_where_masked():
    images, pred, mask = make_case(channels=3)
    # bfloat16 with gradient, which numpy cannot hold
    tensor = torch.from_numpy(pred).bfloat16().requires_grad_()
    pred = tensor.detach().float().numpy()
    rows = pictures.reconstruction_rows(torch.from_numpy(images), tensor, mask, P)
    hidden, original = pixels_of(mask), images.transpose(0, 2, 3, 1)
    assert np.array_equal(rows["input"], original)
    assert (rows["masked"][hidden] == 128).all()
    assert np.array_equal(rows["masked"][~hidden], original[~hidden])
    assert np.array_equal(rows["reconstruction"][~hidden], original[~hidden])
    values = pictures.unpatchify(pictures.unnormalise(pred, images, P), images.shape, P)
    expected = np.clip(np.rint(values[hidden]), 0, 255)
    assert np.array_equal(rows["reconstruction"][hidden], expected)


def test_reconstruction_picture_names_the_target_statistics(tmp_path, monkeypatch):
    """The caption says where brightness and contrast come from, unless nothing was normalised."""
    captions = []
    real = pictures._sheet
    monkeypatch.setattr(pictures, "_sheet", lambda *args: captions.append(args[2]) or real(*args))
    images, pred, mask = make_case()
    for norm in ("patch", "none"):
        path = tmp_path / "new" / f"{norm}.png"
        names = ["a/$x_1$.png", "long" * 20]
        pictures.reconstruction_picture(images, pred, mask, P, path=path, norm=norm, names=names)
        assert Image.open(path).width > 400
    assert captions[0].startswith(f"{mask.mean():.0%} of patches masked; ")
    assert "standard deviation of the target patches" in captions[0]
    assert captions[1] == f"{mask.mean():.0%} of patches masked"


def test_attention_maps_of_the_class_token_or_of_all_queries():
    """Row 0 without the prefix column with a cls token; the mean over rows without one."""
    attention = np.random.default_rng(0).random((2, 3, 7, 7))
    got = pictures.attention_maps(attention, 1)
    assert np.array_equal(got, attention[:, :, 0, 1:])
    without = pictures.attention_maps(attention[:, :, 1:, 1:], 0)
    mean = sum(attention[1, 2, 1 + query, 5] for query in range(6)) / 6
    assert without[1, 2, 4] == pytest.approx(mean)


def test_attention_picture_is_bright_where_attention_is(tmp_path):
    """A peak at the upper right patch lights the upper right of its head, not the lower left."""
    images = np.zeros((1, 1, 40, 60), dtype=np.uint8)
    attention = np.full((1, 2, 7, 7), 1e-3)
    attention[0, 1, 0, 1 + 2] = 1.0  # patch (row 0, column 2) of 2 x 3
    path = pictures.attention_picture(images, attention, (2, 3), 1, path=tmp_path / "a.png")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # the black mosaic: image, mean of heads, head 1 and head 2 from top to bottom
    dark = np.flatnonzero((picture.sum(axis=2) < 30).sum(axis=1) > 200)
    lines = picture[dark[0] :][: 4 * (dark[-1] - dark[0]) // 4]
    dark_columns = np.flatnonzero((lines.sum(axis=2) < 30).mean(axis=0) > 0.2)
    mosaic = lines[:, dark_columns[0] : dark_columns[-1]]
    height, width = len(mosaic) // 4, mosaic.shape[1]
    head = mosaic[-height:].sum(axis=2)
    halves = [head[: height // 2, : width // 3], head[: height // 2, -width // 3 :]]
    below = [head[height // 2 :, : width // 3], head[height // 2 :, -width // 3 :]]
    means = {
        "upper left": halves[0].mean(),
        "upper right": halves[1].mean(),
        "lower left": below[0].mean(),
        "lower right": below[1].mean(),
    }
    assert max(means, key=means.get) == "upper right", means


def test_curves_draw_the_recorded_values(tmp_path, monkeypatch):
    """Epochs on the x axis; distillation on its own log axis; records without a key are skipped."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    steps = range(1, 41)
    train = [
        {
            "kind": "train",
            "step": step,
            "epoch": step / 10,
            "loss_reconstruction": 1 / step if step != 5 else None,
            "loss_distillation": 5.0 / step**3,
        }
        for step in steps
    ]
    val = [{"kind": "val", "step": 40, "epoch": 4.0, "loss_reconstruction": 0.5}]
    event = [{"kind": "event", "message": "resumed"}]
    pictures.curves([*train, *val, *event], path=tmp_path / "a.png")
    left, right = figures[0].axes
    raw, means, validation = left.lines
    assert raw.get_xdata().tolist() == [s / 10 for s in steps if s != 5]
    assert raw.get_ydata().tolist() == [1 / s for s in steps if s != 5]
    expected = [np.mean([1 / s for s in range(k, k + 10) if s != 5]) for k in (1, 11, 21, 31)]
    assert means.get_xdata().tolist() == [1, 2, 3, 4]
    assert means.get_ydata() == pytest.approx(expected)
    assert (validation.get_xdata().tolist(), validation.get_ydata().tolist()) == ([4.0], [0.5])
    assert (left.get_xlabel(), left.get_ylabel()) == ("epoch", "reconstruction loss")
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")
    fine = [{"kind": "val", "epoch": e, "accuracy": 0.7, "auc": None} for e in (1.0, 2.0)]
    pictures.curves(fine, path=tmp_path / "b.png")
    [axes] = figures[1].axes
    assert axes.get_ylabel() == "validation metric"
    assert [line.get_label() for line in axes.lines] == ["accuracy"]
    assert pictures.curves(event, path=tmp_path / "none.png") is None
    assert len(figures) == 2


def test_plots_survive_odd_class_names(tmp_path):
    """A dollar sign is not a formula, long names are shortened, an empty row has no share."""
    names = ["$x_1$ & <b>", "a name that is much longer than any axis could ever show"]
    path = pictures.confusion_picture([[3, 1], [0, 0]], names, path=tmp_path / "c.png")
    assert Image.open(path).width > 400
    line = (np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0]))
    path = pictures.roc_picture({r"$\frac{": line}, path=tmp_path / "r.png")
    assert Image.open(path).width > 400


@pytest.mark.parametrize("shape", [(400, 300), (50, 60, 3)])
def test_thumbnail_keeps_proportions_and_never_enlarges(tmp_path, shape):
    image = np.full(shape, 30, dtype=np.uint8)
    picture = Image.open(pictures.thumbnail(image, path=tmp_path / "t.png"))
    assert picture.size == ((144, 192) if len(shape) == 2 else (60, 50))
    assert np.asarray(picture).mean() == pytest.approx(30, abs=1)
