"""Files that did not change are not decoded again, and nothing else is taken from memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sssd_fast.data.index as module
from sssd_fast.data.index import check_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images, three minutes old."""
    for i in range(6):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}\n%\udcff.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (20, 20 + i), dtype=np.uint8)
        ).save(path)
        age(path)
    return tmp_path / "data"


def age(path: Path, seconds: float = 180) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = module.decode_bytes
    monkeypatch.setattr(
        module, "decode_bytes", lambda data, name: names.append(name) or real(data, name)
    )
    return names


def test_the_second_check_decodes_nothing_and_finds_the_same(
    data: Path, tmp_path: Path, decoded: list[str]
):
    first = check_data(data, index_cache=tmp_path / "memory")
    assert len(decoded) == 6
    decoded.clear()
    assert (
        check_data(data, index_cache=tmp_path / "memory")
        == first
        == check_data(data, index_cache=None)
    )
    assert len(decoded) == 6  # of the check without a memory
    other = tmp_path / "other"
    data.rename(other)
    decoded.clear()
    assert len(check_data(other, index_cache=tmp_path / "memory")) == 6
    assert len(decoded) == 6  # another folder is not known


def test_what_changed_is_decoded_again_and_what_broke_is_excluded(
    data: Path, tmp_path: Path, decoded: list[str]
):
    before = check_data(data, index_cache=tmp_path / "memory")
    paths = [before.file(i) for i in range(6)]
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(paths[0])
    age(paths[0], 60)
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-40])  # truncated
    age(paths[1], 60)
    age(paths[2], 60)  # touched only
    decoded.clear()
    after = check_data(data, index_cache=tmp_path / "memory", max_bad_fraction=0.5)
    assert sorted(decoded) == sorted(before.records[i].path for i in range(3))
    assert [e.path for e in after.excluded] == [before.records[1].path]
    assert after.records[0].sha256 != before.records[0].sha256
    paths[3].unlink()
    assert before.records[3].path not in [
        r.path
        for r in check_data(data, index_cache=tmp_path / "memory", max_bad_fraction=0.5).records
    ]


def test_a_file_that_changed_just_now_is_not_remembered(
    data: Path, tmp_path: Path, decoded: list[str]
):
    young = next(data.rglob("*.png"))
    os.utime(young)
    check_data(data, index_cache=tmp_path / "memory")
    decoded.clear()
    check_data(data, index_cache=tmp_path / "memory")
    assert decoded == [young.relative_to(data).as_posix()]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 0, "files": {}}',
        '{"version": 1, "files": {"x": [1]}}',
        '{"version": 1, "files": []}',
    ],
)
def test_a_damaged_memory_is_as_none(data: Path, tmp_path: Path, decoded: list[str], content: str):
    check_data(data, index_cache=tmp_path / "memory")
    (kept,) = (tmp_path / "memory").iterdir()
    kept.write_text(content)
    decoded.clear()
    assert len(check_data(data, index_cache=tmp_path / "memory")) == 6
    assert len(decoded) == 6


def test_a_memory_that_cannot_be_written_changes_nothing(data: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert check_data(data, index_cache=tmp_path / "file" / "memory") == check_data(data)
