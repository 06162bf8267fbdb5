"""predict on CT volumes: the scores are those of the slices that `data convert` writes."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest

import sssd_fast as sf
from sssd_fast.cli import main
from sssd_fast.convert.convert import convert_volumes
from sssd_fast.errors import DataError
from tests.sssd_fast.ct_files import dataset, write

Captured = pytest.CaptureFixture[str]


def scan(seed: int, slices: int = 3) -> np.ndarray:
    """[slices, 40, 48] Hounsfield units: air with a bright body whose size depends on the slice."""
    values = np.random.default_rng(seed).integers(-1000, -800, (slices, 40, 48)).astype(np.int16)
    for number in range(slices):
        values[number, 10 : 20 + 5 * number, 8:40] += 900
    return values


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path]:
    """A DICOM series, whose file names are not in the order of its slices, and a NIfTI volume."""
    series, nifti = tmp_path / "ct" / "covid" / "series", tmp_path / "ct" / "normal" / "scan.nii.gz"
    for number, stored in enumerate(scan(1)):
        ds = dataset(stored, number=number + 1, z=5.0 * number)
        write(series / f"{2 - number}.dcm", ds)
    nifti.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(scan(2).T, np.diag([-1.0, -1.0, 5.0, 1.0])), nifti)
    return series, nifti


def test_predict_scores_volumes_as_their_converted_slices(
    trained: Path, volumes: tuple[Path, Path], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "scores.csv"
    assert main(["predict", str(trained), *map(str, volumes), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with open(out, newline="") as file:
        table = list(csv.DictReader(file))
    convert_volumes(tmp_path / "ct", tmp_path / "png")
    for volume, label in zip(volumes, ("covid", "normal"), strict=True):
        rows = {row["slice"]: row for row in table if row["path"] == str(volume)}
        files = sorted((tmp_path / "png" / label).glob("*/*.png"))
        wanted = sf.predict(trained, files).scores
        assert list(rows) == ["mean", "max", "0", "1", "2"]
        names = [f"score_{name}" for name in sf.predict(trained, files).classes]
        got = {key: [float(row[name]) for name in names] for key, row in rows.items()}
        np.testing.assert_allclose([got[str(i)] for i in range(3)], wanted, atol=1e-6)
        np.testing.assert_allclose(got["mean"], wanted.mean(0), atol=1e-6)
        np.testing.assert_allclose(got["max"], wanted.max(0), atol=1e-6)
        assert rows["max"]["prediction"] == ""
        assert f"{volume}: {rows['mean']['prediction']}, 3 slices, mean " in printed
    assert "2 volumes scored" in printed


def test_predict_names_volumes_that_it_cannot_use(
    trained: Path, volumes: tuple[Path, Path], tmp_path: Path
) -> None:
    """Values from 0 to 255 are not Hounsfield units; another window accepts them."""
    path = tmp_path / "grey.nii.gz"
    grey = np.random.default_rng(0).integers(0, 255, (48, 40, 2)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(grey, np.diag([-1.0, -1.0, 5.0, 1.0])), path)
    found = sf.predict_volumes(trained, [path, volumes[0]])
    assert [volume.path for volume in found.volumes] == [volumes[0]]
    assert "not in Hounsfield units" in found.failed[path]
    assert len(sf.predict_volumes(trained, path, window="minmax").volumes[0].slices) == 2
    with pytest.raises(DataError, match="no DICOM or NIfTI file"):
        sf.predict_volumes(trained, trained / "config.yaml")
