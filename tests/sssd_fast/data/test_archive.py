"""Archives: honest ones unpack whole; nothing in a hostile one is ever written, inside the target or outside."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sssd_fast.data.archive import extract_archive
from sssd_fast.errors import DataError

FILES = {"set/covid/a b%0.png": b"one" * 50, "set/normal/(2).png": b"two", "set/empty.txt": b""}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, body in files.items():
            pack.writestr(name, body)
    return path


def write_tar(
    path: Path, files: dict[str, bytes], mode: str = "w", extra: tarfile.TarInfo | None = None
) -> Path:
    with tarfile.open(path, mode) as pack:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            pack.addfile(info, io.BytesIO(body))
        if extra is not None:
            pack.addfile(extra)
    return path


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def assert_refused(archive: Path, match: str, **limits: float) -> None:
    before = everything(archive.parent)
    with pytest.raises(DataError, match=match):
        extract_archive(archive, archive.parent / "out", **limits)
    assert everything(archive.parent) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda p: write_zip(p / "a.zip", FILES),
        lambda p: write_tar(p / "a.tar", FILES),
        lambda p: write_tar(p / "a.tar.gz", FILES, "w:gz"),
        lambda p: write_tar(p / "a.tgz", FILES, "w:gz"),
    ],
)
def test_honest_archives_unpack_whole(tmp_path: Path, make: Callable[[Path], Path]):
    out = extract_archive(make(tmp_path), tmp_path / "new" / "out")
    assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == FILES
    assert everything(tmp_path / "new")[0] == "out"
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "name", ["/abs.png", "../up.png", "a/../../up.png", "a\\..\\up.png", "C:\\up.png"]
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_leave_the_folder(tmp_path: Path, write: Callable[..., Path], name: str):
    assert_refused(write(tmp_path / "a", {"good.png": b"x", name: b"evil"}), "leaves the folder")


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_name_that_comes_twice(tmp_path: Path, write: Callable[..., Path]):
    assert_refused(write(tmp_path / "a", {"x/A.png": b"1", "x/./a.png": b"2"}), "comes twice")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_tar_links_and_devices(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("link.png")
    info.type = kind
    info.linkname = "/etc/passwd"
    assert_refused(write_tar(tmp_path / "a.tar", FILES, extra=info), "link.png is a link or device")


def test_zip_links(tmp_path: Path):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as pack:
        pack.writestr(info, "/etc/passwd")
    assert_refused(tmp_path / "a.zip", "link.png is a link or device")


def test_every_unsafe_member_is_listed(tmp_path: Path):
    with pytest.raises(DataError) as error:
        extract_archive(
            write_zip(tmp_path / "a.zip", {"../1": b"", "../2": b"", "fine": b""}), tmp_path / "out"
        )
    text = str(error.value)
    assert "../1 leaves" in text
    assert "../2 leaves" in text
    assert "fine" not in text


def test_size_and_ratio_limits(tmp_path: Path):
    zeros = {"zeros.bin": bytes(20 * 2**20)}
    assert_refused(write_zip(tmp_path / "a.zip", zeros), "decompression bomb")
    assert_refused(write_tar(tmp_path / "a.tar.gz", zeros, "w:gz"), "decompression bomb")
    assert_refused(tmp_path / "a.zip", "over the limit of 1000", max_bytes=1000, max_ratio=1e9)
    assert extract_archive(tmp_path / "a.zip", tmp_path / "out", max_ratio=1e9).is_dir()


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path):
    path = write_zip(tmp_path / "a.zip", {"lie.bin": bytes(100_000)})
    data = path.read_bytes()
    path.write_bytes(data.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    before = everything(tmp_path)
    with pytest.raises(DataError):
        extract_archive(path, tmp_path / "out")
    assert everything(tmp_path) == before


def test_damaged_archives_leave_nothing_behind(tmp_path: Path):
    whole = write_tar(
        tmp_path / "a.tar.gz", {"noise.bin": bytes(range(256)) * 4000}, "w:gz"
    ).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path / "a.tar.gz", "cannot be unpacked")
    body = bytearray(write_zip(tmp_path / "b.zip", {"x.bin": bytes(range(256)) * 40}).read_bytes())
    body[60] ^= 0xFF
    (tmp_path / "b.zip").write_bytes(bytes(body))
    assert_refused(tmp_path / "b.zip", "cannot be unpacked")
    (tmp_path / "c.zip").write_text("hello")
    assert_refused(tmp_path / "c.zip", "neither a zip nor a tar")


def test_an_existing_target_is_never_touched(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert_refused(write_zip(tmp_path / "a.zip", FILES), "out exists")
    with pytest.raises(DataError, match="no such file"):
        extract_archive(tmp_path / "gone.zip", tmp_path / "new")
