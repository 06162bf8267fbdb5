"""Reconstructions against loops over pixels, attention maps, curves and the other pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.evaluation import pictures, plots

P, ROWS, COLS = 4, 3, 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def sheets(monkeypatch):
    """Arguments of the sheets that are drawn."""
    found, real = [], pictures._sheet
    monkeypatch.setattr(pictures, "_sheet", lambda *a, **k: found.append(a) or real(*a, **k))
    return found


def make_images():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, ROWS * P, COLS * P)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


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
    images = torch.arange(2 * channels * 12 * 20).reshape(2, channels, 12, 20)
    patches = pictures.patchify(images, P)
    places = itertools.product(range(ROWS), range(COLS), range(P), range(P), range(channels))
    for row, col, y, x, c in places:
        value = images[1, c, row * P + y, col * P + x]
        assert patches[1, row * COLS + col, y * P + x, c] == value


@pytest.mark.parametrize("norm", ["patch", "channel"])
def test_unnormalise_inverts_the_training_target(norm):
    """A perfect prediction gives the original pixels back, mean and std per channel included."""
    images = make_images()
    pred = np.stack([plain_target(image.numpy(), norm) for image in images])
    pixels = pictures.patchify(images, P)
    values = pictures.unnormalise(torch.from_numpy(pred), pixels, norm, MEAN, STD)
    torch.testing.assert_close(values, pixels, rtol=0, atol=1e-6)


def test_unnormalise_without_norm_only_scales():
    pred = torch.randn(2, ROWS * COLS, P * P * 3, dtype=torch.float64)
    values = pictures.unnormalise(
        pred, pictures.patchify(make_images(), P), "none", (0.5,), (0.25,)
    )
    torch.testing.assert_close(values.reshape(pred.shape), 255 * (pred * 0.25 + 0.5))


def test_reconstruction_picture_shows_predictions_only_where_masked(tmp_path, sheets):
    """The caption says where brightness and contrast come from, unless nothing was normalised."""
    images = make_images()
    # bfloat16 with gradient, which numpy cannot hold; 0 and 1 are black and white
    ones = torch.ones(2, ROWS * COLS, P * P * 3, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.arange(ROWS * COLS).expand(2, -1) % 3 == 0
    for norm in ("none", "patch"):
        target = {"norm": norm, "mean": (0.0,), "std": (1.0,)}
        target |= {"names": ["a/$x_1$.png", "long" * 20], "folder": tmp_path / norm, "epoch": 7}
        pictures.reconstruction_picture(images, ones, mask, P, **target)
        assert Image.open(tmp_path / norm / "reconstruction-e0007.png").width > 100
    grid = mask.numpy().reshape(2, ROWS, COLS)
    hidden = np.repeat(np.repeat(grid, P, axis=1), P, axis=2)
    original, rows = images.permute(0, 2, 3, 1).numpy(), sheets[0][0]
    assert np.array_equal(rows["input"], original)
    for row, value in (("masked", 128), ("epoch 7", 255)):
        assert (np.stack(rows[row])[hidden] == value).all()
        assert np.array_equal(np.stack(rows[row])[~hidden], original[~hidden])
    assert sheets[0][2] == "33% of patches masked"
    assert sheets[1][2].startswith("33% of patches masked; predictions have the mean")


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_of_earlier_epochs_are_kept(tmp_path, sheets, channels):
    """Epochs after this one are of an abandoned future; of many, four are shown, evenly chosen."""
    images = make_images()[:, :channels]
    mask = torch.ones(2, ROWS * COLS)
    target = {"norm": "none", "mean": (0.0,), "std": (1.0,), "names": "ab", "folder": tmp_path}
    for epoch in (1, 2, 3, 4, 5, 6, 7, 9, 8):
        pred = torch.full((2, ROWS * COLS, P * P * channels), epoch / 10)
        last = epoch == 8
        pictures.reconstruction_picture(images, pred, mask, P, epoch=epoch, sheet=last, **target)
    [(rows, *_)] = sheets
    assert list(rows) == ["input", "masked", *(f"epoch {e}" for e in (1, 3, 6, 8))]
    for epoch in (1, 8):
        row = np.stack(rows[f"epoch {epoch}"])
        assert row.shape == (2, ROWS * P, COLS * P, channels)
        assert (row == round(25.5 * epoch)).all()


def test_attention_picture_is_bright_where_attention_is(tmp_path, sheets):
    """A peak at the upper right patch lights the upper right of its head, not the lower left."""
    images = torch.zeros(1, 1, 40, 60, dtype=torch.uint8)
    attention = torch.full((1, 2, 6), 1e-3)
    attention[0, 1, 2] = 1.0  # patch (row 0, column 2) of 2 x 3
    path = tmp_path / "a.png"
    pictures.attention_picture(images, attention, (2, 3), 1, names=["a"], path=path)
    assert list(sheets[0][0]) == ["image", "mean of heads", "head 1", "head 2"]
    head = sheets[0][0]["head 2"][0].sum(axis=2)
    means = head.reshape(2, 20, 3, 20).mean(axis=(1, 3))
    assert means.argmax() == 2, means
    assert Image.open(path).width > 100


def test_curves_draw_the_recorded_values(tmp_path, monkeypatch):
    """Epochs on the x axis; distillation on its own log axis; records without a key are skipped."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    train = [
        {"kind": "train", "epoch": s / 10, "loss_reconstruction": 1 / s, "loss_distillation": 5 / s}
        for s in range(1, 41)
    ]
    train[4]["loss_reconstruction"] = None
    val = [{"kind": "val", "epoch": 4.0, "loss_reconstruction": 0.5}]
    event = [{"kind": "event", "message": "resumed"}]
    pictures.curves([*train, *val, *event], path=tmp_path / "a.png")
    left, right = figures[0].axes
    training, validation = left.lines
    assert training.get_xdata().tolist() == [s / 10 for s in range(1, 41) if s != 5]
    assert training.get_ydata().tolist() == [1 / s for s in range(1, 41) if s != 5]
    assert (validation.get_xdata().tolist(), validation.get_ydata().tolist()) == ([4.0], [0.5])
    assert (left.get_xlabel(), left.get_ylabel()) == ("epoch", "reconstruction loss")
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")
    monitor = [{"kind": "val", "epoch": 4.0, "entropy": 0.6, "rank_teacher": 2.5}]
    pictures.curves([*train, *monitor], path=tmp_path / "c.png")
    panels = figures.pop().axes[2:]
    shown = [{s.get_label(): s.get_ydata().tolist() for s in panel.lines} for panel in panels]
    assert shown == [{"teacher": [2.5]}, {"entropy": [0.6]}]
    fine = [{"kind": "val", "epoch": e, "accuracy": 0.7, "auc": None} for e in (1.0, 2.0)]
    pictures.curves(fine, path=tmp_path / "b.png")
    [axes] = figures[1].axes
    assert axes.get_ylabel() == "validation metric"
    assert [line.get_label() for line in axes.lines] == ["accuracy"]
    assert pictures.curves(event, path=tmp_path / "none.png") is None
    assert len(figures) == 2


def test_plots_survive_odd_class_names(tmp_path):
    """A dollar sign is not a formula, long names are shortened."""
    path, names = tmp_path / "c.png", ["$x_1$ & <b>", "a name longer than any axis could show"]
    plots.confusion_plot([[3, 1], [0, 0]], names, path)
    assert Image.open(path).width > 100
    curve = (np.array([0, 1, 1]), np.array([0.1, 0.2, 0.9]))
    plots.roc_plot({r"$\frac{": curve}, tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").width > 100


@pytest.mark.parametrize("shape", [(400, 300), (50, 60, 3)])
def test_thumbnail_keeps_proportions_and_never_enlarges(tmp_path, shape):
    path = tmp_path / "t.png"
    pictures.thumbnail(np.full(shape, 30, dtype=np.uint8), path=path)
    picture = Image.open(path)
    assert picture.size == ((144, 192) if len(shape) == 2 else (60, 50))
    assert np.asarray(picture).mean() == pytest.approx(30, abs=1)


def test_thumbnails_side_by_side_have_one_height(tmp_path):
    """A grey image of 100 x 50 and an RGB one of 20 x 20: 100 + 2 + 50 pixels wide."""
    grey, red = np.full((50, 100), 30, np.uint8), np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 200
    pictures.thumbnail(grey, red, path=tmp_path / "t.png")
    picture = np.asarray(Image.open(tmp_path / "t.png"))
    assert picture.shape == (50, 152, 3)
    assert (picture[:, :100] == 30).all()
    assert (picture[:, 102:] == [200, 0, 0]).all()
