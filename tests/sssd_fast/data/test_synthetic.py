"""Synthetic slices: seeded, named synthetic; the task needs positions, not global statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.cli import main
from sssd_fast.data import synthetic
from sssd_fast.data.index import check_data
from sssd_fast.data.synthetic import (
    CLASSES,
    COVID,
    NORMAL,
    is_synthetic,
    make_synthetic_slice,
    write_synthetic_dataset,
)
from sssd_fast.errors import DataError

SIZE = (96, 96)
TRAIN = 500
COUNT = 800


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(COUNT) % 2
    images = [make_synthetic_slice(11, i, int(label), SIZE) for i, label in enumerate(labels)]
    return np.stack(images), labels


def mean_variance(images: np.ndarray) -> np.ndarray:
    pixels = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([pixels.mean(1), pixels.var(1)], 1)


def histogram(images: np.ndarray) -> np.ndarray:
    return np.stack([np.histogram(image, 32, (0, 256))[0] for image in images]).astype(np.float64)


def accuracy(model, features: np.ndarray, labels: np.ndarray) -> float:
    """On 300 held-out images; chance is 50 +- 3 %."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), model).fit(features[:TRAIN], labels[:TRAIN])
    return float(fitted.score(features[TRAIN:], labels[TRAIN:]))


@pytest.mark.parametrize("features", [mean_variance, histogram])
def test_global_statistics_do_not_separate_the_classes(data, features):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = data
    for model in (
        LogisticRegression(max_iter=500),
        RandomForestClassifier(100, random_state=0),
        KNeighborsClassifier(5),
        KNeighborsClassifier(1),
    ):
        assert accuracy(model, features(images), labels) < 0.65, model


def test_position_separates_the_classes(data):
    """A linear map of the pixels learns the task; nearest neighbours hardly do."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = data
    small = [Image.fromarray(i).resize((32, 32), Image.Resampling.BOX) for i in images]
    pixels = np.stack(small).reshape(COUNT, -1).astype(np.float64)
    assert accuracy(LogisticRegression(C=0.01, max_iter=300), pixels, labels) > 0.8
    assert accuracy(KNeighborsClassifier(1), pixels, labels) < 0.8


def test_twins_differ_only_in_the_position_of_the_haze():
    """The brightness added by `covid` is further from the middle of the lungs."""
    rows, cols = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    radius = np.hypot((np.abs(cols) - 0.4) / 0.35, rows / 0.55)
    further = 0
    for i in range(40):
        covid = make_synthetic_slice(6, i, COVID, SIZE).astype(int)
        gain = covid - make_synthetic_slice(6, i, NORMAL, SIZE)
        changed = np.abs(gain) > 3
        assert 0.01 < changed.mean() < 0.35
        # skin, bones and background are the same
        assert not changed[:6].any()
        assert not changed[:, :3].any()
        # what one label adds here, the other adds elsewhere
        smaller, bigger = sorted([gain.clip(0).sum(), (-gain).clip(0).sum()])
        assert bigger < 3 * smaller
        assert abs(gain.mean()) < 5
        outer, inner = (np.average(radius, weights=(sign * gain).clip(0)) for sign in (1, -1))
        further += int(outer > inner)
    assert further >= 38


def test_slices_are_seeded_and_vary():
    first = make_synthetic_slice(0, 3, COVID, SIZE)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, make_synthetic_slice(0, 3, COVID, SIZE))
    for other in (make_synthetic_slice(1, 3, COVID, SIZE), make_synthetic_slice(0, 4, COVID, SIZE)):
        assert np.abs(first.astype(int) - other).mean() > 5


@pytest.mark.parametrize("size", [(96, 96), (64, 128), (224, 224), (32, 32), (120, 90)])
def test_slices_look_like_a_chest_in_a_lung_window(size: tuple[int, int]):
    images = np.stack([make_synthetic_slice(2, i, i % 2, size) for i in range(16)]).astype(float)
    height, width = size
    average = images.mean(0)
    corner = average[: height // 12, : width // 12].mean()
    lung = average[height // 3 : height // 2, width // 4 : width // 3].mean()
    middle = slice(int(0.47 * width), int(0.53 * width))
    spine = average[int(0.74 * height) : int(0.8 * height), middle].mean()
    assert corner < 30 < lung < 130 < spine
    assert images.shape[1:] == size
    assert (images.std((1, 2)) > 30).all()


def test_written_set_is_complete_named_synthetic_and_readable(tmp_path: Path):
    out = write_synthetic_dataset(tmp_path / "set", 10, (48, 64), 3)
    assert "SYNTHETIC" in (out / "README.md").read_text()
    by_folder = check_data(out)
    index = check_data(out / "manifest.csv")
    assert by_folder.classes == index.classes == list(CLASSES)
    assert index.counts() == {"synthetic_covid": 5, "synthetic_normal": 5}
    assert len({r.pixel_hash for r in index.records}) == 10
    for record in index.records:
        i = int(Path(record.path).stem.split("_")[1])
        stored = np.asarray(Image.open(out / record.path))
        np.testing.assert_array_equal(stored, make_synthetic_slice(3, i, record.label, (48, 64)))


def test_interrupted_or_existing_set_is_never_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def draw(seed: int, index: int, *rest: object) -> np.ndarray:
        if index == 4:
            raise KeyboardInterrupt
        return make_synthetic_slice(seed, index, *rest)

    monkeypatch.setattr(synthetic, "make_synthetic_slice", draw)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_dataset(tmp_path / "set", 8, (32, 32))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(DataError, match="exists and is not empty"):
        write_synthetic_dataset(tmp_path / "mine", 8, (32, 32))


def test_folder_named_synthetic_is_not_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert is_synthetic("synthetic")
    assert not is_synthetic("my_ct")
    Path("synthetic").mkdir()
    assert not is_synthetic("./synthetic")
    with pytest.raises(DataError, match=r"write \./synthetic to use its images"):
        is_synthetic("synthetic")
    arguments = ["run", "--config", "cpu_smoke", "--out", "demo", "data.source=synthetic"]
    assert main(arguments) == 2


def test_impossible_slices_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="at least 32 x 32"):
        make_synthetic_slice(0, 0, COVID, (16, 64))
    with pytest.raises(DataError, match="1 synthetic images"):
        write_synthetic_dataset(tmp_path / "one", 1, SIZE)
