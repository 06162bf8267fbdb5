"""Cache of decoded pixels: always the right pixels, one line per problem, never a partial file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.data import pixels
from sssd_fast.data.images import ImageError
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.pixels import PixelStore, cache_folder, decoded_bytes, open_store, store_key
from sssd_fast.errors import ConfigError

SIZES = [(9, 8), (21, 17), (8, 31), (16, 16), (13, 40), (33, 12)]
LATIN1 = os.fsdecode(b"latin1-\xe9.png")


@pytest.fixture
def index(tmp_path: Path) -> DataIndex:
    """Grey and RGB in turn; file names as a file system may contain them."""
    names = ["0.png", "1.png", "new\nline.png", LATIN1, "ünï.png", "5.png"]
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for i, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        shape = (*size, 3) if i % 2 else size
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return check_data(tmp_path / "images")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assert_right(store: PixelStore, index: DataIndex, channels: int) -> None:
    """By Pillow alone, from the files as they are now."""
    assert store.nbytes == decoded_bytes(index, channels)
    for i in range(len(index)):
        expected = np.asarray(Image.open(index.file(i)).convert("L" if channels == 1 else "RGB"))
        np.testing.assert_array_equal(store.image(i), expected)


def assert_complete(cache: Path) -> Path:
    """The one cache file; nothing unfinished next to it."""
    (path,) = cache.glob("*.pixels")
    assert not list(cache.glob("*.part"))
    return path


def assert_nothing_left(cache: Path) -> None:
    assert not [p.name for p in cache.iterdir() if p.suffix != ".lock"]


def never(*args: object) -> None:
    raise AssertionError(f"called with {args}")


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("channels", "threads"), [(1, 1), (3, 3)])
def test_store_has_the_pixels_of_the_files_when_built_and_when_read(
    index: DataIndex, cache: Path, channels: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    umask = os.umask(0o022)
    os.umask(umask)
    seen: list[tuple[int, int]] = []
    first = open_store(
        index, channels, cache, threads=threads, progress=lambda *done: seen.append(done), log=never
    )
    assert seen == [(i, 6) for i in range(1, 7)]
    assert_right(first, index, channels)
    assert first.path == assert_complete(cache)
    assert first.path.stat().st_mode & 0o777 == 0o644 & ~umask
    assert "decoded in" in first.origin
    monkeypatch.setattr(pixels, "decode_record", never)
    monkeypatch.setattr(pixels, "read_file", never)
    second = open_store(index, channels, cache, threads=threads, progress=never, log=never)
    assert_right(second, index, channels)
    assert second.path == first.path
    assert second.origin == "read from the cache"


def test_key_depends_on_content_order_and_channels(index: DataIndex, cache: Path):
    reversed_index = replace(index, records=index.records[::-1])
    keys = [store_key(index, 1), store_key(index, 3), store_key(reversed_index, 1)]
    Image.new("L", (8, 9)).save(index.file(0))  # the same size
    changed = check_data(index.root)
    keys.append(store_key(changed, 1))
    assert len(set(keys)) == 4
    for number in (1, 2):
        assert_right(open_store(changed, 1, cache), changed, 1)
        changed = replace(changed, records=changed.records[::-1])
        assert len(list(cache.glob("*.pixels"))) == number


def test_key_does_not_depend_on_names_and_labels(index: DataIndex, cache: Path):
    open_store(index, 1, cache)
    index.file(0).rename(index.root / "a" / "renamed.png")
    (index.root / "a").rename(index.root / "b")
    renamed = check_data(index.root)
    by_content = {r.sha256: r for r in renamed.records}
    same_order = replace(renamed, records=[by_content[r.sha256] for r in index.records])
    assert_right(open_store(same_order, 1, cache, progress=never), same_order, 1)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :]


def table(data: bytes) -> int:
    """Position of the checksums."""
    return 16 + int.from_bytes(data[8:16], "little")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first pixel": lambda data: flip(data, 4096),
    "last pixel": lambda data: flip(data, len(data) - 1),
    "magic": lambda data: flip(data, 0),
    "length of the header": lambda data: flip(data, 15),
    "number in the header": lambda data: data.replace(b'"images": 6', b'"images": 5'),
    "checksum": lambda data: flip(data, table(data) + 5),
    "one byte short": lambda data: data[:-1],
    "half of the checksums": lambda data: data[: table(data) + 5],
    "half of the header": lambda data: data[:40],
    "empty": lambda data: b"",
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_reported_and_built_again(index: DataIndex, cache: Path, damage: str):
    open_store(index, 1, cache)
    path = assert_complete(cache)
    whole = path.read_bytes()
    broken = DAMAGE[damage](whole)
    assert broken != whole
    path.unlink()  # a new file: the old one may still be mapped
    path.write_bytes(broken)
    messages: list[str] = []
    store = open_store(index, 1, cache, log=messages.append)
    assert_right(store, index, 1)
    (line,) = messages
    assert line.startswith(f"the cache {path} is damaged (")
    assert line.endswith("it is built again")
    assert assert_complete(cache).read_bytes() == whole
    assert "decoded in" in store.origin
    assert open_store(index, 1, cache, progress=never, log=never).path == path


# ---- several processes ----

# argv: data, cache, log. Every decoding writes a line into the log.
CHILD = """
import os, sys, time
from pathlib import Path
from sssd_fast.data import pixels
from sssd_fast.data.index import check_data

root, cache, log = map(Path, sys.argv[1:4])
index = check_data(root)
real = pixels.decode_record

def note(text):
    with open(log, "a") as file:
        file.write(f"{text}\\n")

def stop():
    note("here")
    time.sleep(60)

def decode(*args):
    note(f"decoded {args[1]}")
    return real(*args)

pixels.decode_record = decode
"""
BUILD = """
store = pixels.open_store(index, 1, cache)
"""
MOMENTS = {
    "half of an image written": """
def pwrite(file, data, offset, real=os.pwrite):
    if offset > 4096:  # the second image
        real(file, data[: len(data) // 2], offset)
        stop()
    return real(file, data, offset)
pixels.os.pwrite = pwrite
""",
    "all images written": "pixels.os.ftruncate = lambda *args: stop()",
    "all but the rename": "pixels.os.replace = lambda *args: stop()",
}


Start = Callable[[str, DataIndex, Path, Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(code, index, cache, log): a process with CHILD and the code, killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, index: DataIndex, cache: Path, log: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD + code, str(index.root), str(cache), str(log)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe))
        return started[-1]

    yield run
    for child in started:
        child.kill()
        child.communicate()


def wait_for(log: Path, line: str, child: subprocess.Popen[str]) -> None:
    while not log.exists() or line not in log.read_text().splitlines():
        if child.poll() is not None:
            raise AssertionError(child.communicate()[1])
        threading.Event().wait(0.02)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_process_leaves_no_cache_and_the_next_one_cleans_up(
    index: DataIndex, cache: Path, tmp_path: Path, start: Start, moment: str
):
    log = tmp_path / "log"
    child = start(MOMENTS[moment] + BUILD, index, cache, log)
    wait_for(log, "here", child)
    child.kill()
    child.wait()
    assert len(list(cache.glob("*.part"))) == 1
    assert not list(cache.glob("*.pixels"))
    assert_right(open_store(index, 1, cache, log=never), index, 1)
    assert_complete(cache)


@pytest.mark.timeout(60)
def test_second_process_waits_for_the_file_of_the_first(
    index: DataIndex, cache: Path, tmp_path: Path, start: Start
):
    log, proceed = tmp_path / "log", tmp_path / "proceed"
    slow = f"""
def fsync(file, real=os.fsync):
    note("full")
    while not os.path.exists({str(proceed)!r}):
        time.sleep(0.02)
    real(file)
pixels.os.fsync = fsync
"""
    show = "\nprint([store.image(i).tolist() for i in range(len(index))])"
    child = start(slow + BUILD + show, index, cache, log)
    wait_for(log, "full", child)
    messages: list[str] = []

    def say(text: str) -> None:
        messages.append(text)
        assert not list(cache.glob("*.pixels"))
        proceed.touch()  # only now, so the second has waited

    store = open_store(index, 1, cache, progress=never, log=say)
    printed, problems = child.communicate()
    assert child.returncode == 0, problems
    assert_right(store, index, 1)
    assert printed.strip() == str([store.image(i).tolist() for i in range(len(index))])
    assert messages == [f"waiting for another process that builds {store.path}"]
    assert log.read_text().splitlines() == [*(f"decoded {i}" for i in range(6)), "full"]
    assert_complete(cache)


# ---- folders that cannot hold the file ----


def assert_in_memory(index: DataIndex, folder: Path, reason: str) -> None:
    messages: list[str] = []
    store = open_store(index, 1, folder, log=messages.append)
    assert_right(store, index, 1)
    assert store.path is None
    (line,) = messages
    assert f"no cache in {folder}" in line
    assert reason in line
    assert "kept in memory. Set data.cache to" in line
    assert "\n" not in line


def test_folder_that_cannot_be_created_or_written(index: DataIndex, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    assert_in_memory(index, tmp_path / "file", "File exists")
    assert_in_memory(index, tmp_path / "file" / "below", "Not a directory")
    assert (tmp_path / "file").read_text() == "x"
    # not even root can create the first, or a file in the second
    assert_in_memory(index, Path("/proc/sssd_fast"), "(")
    assert_in_memory(index, Path("/proc/self"), "(")


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "replace"])
def test_disk_that_fills_up(
    index: DataIndex, cache: Path, call: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, call, no_space)
    assert_in_memory(index, cache, "No space left on device")
    assert_nothing_left(cache)
    monkeypatch.undo()
    assert open_store(index, 1, cache, log=never).path == assert_complete(cache)


def test_short_writes_are_continued_until_the_disk_is_full(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.pwrite
    room = 500

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if room == 0:
            no_space()
        written = real(file, data[: min(room, 7)], offset)
        room -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert_in_memory(index, cache, "No space left on device")
    assert_nothing_left(cache)
    room = 10**6
    assert_right(open_store(index, 1, cache, log=never), index, 1)
    assert_complete(cache)


def test_disk_that_is_too_small_is_noticed_before_decoding(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.fstatvfs
    needed = 4096 + decoded_bytes(index, 1)

    def with_room(blocks: int) -> Callable[[int], os.statvfs_result]:
        def fstatvfs(file: int) -> os.statvfs_result:
            values = list(real(file))
            values[1], values[4] = 1, blocks  # f_frsize, f_bavail
            return os.statvfs_result(values)

        return fstatvfs

    monkeypatch.setattr(os, "pwrite", never)
    monkeypatch.setattr(os, "fstatvfs", with_room(needed - 1))
    assert_in_memory(index, cache, "No space left on device: 0 MiB are needed")
    assert_nothing_left(cache)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fstatvfs", with_room(needed))
    assert open_store(index, 1, cache, log=never).path == assert_complete(cache)


def test_file_that_reads_back_wrong_is_not_used(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.replace

    def replace_damaged(part: Path, path: Path) -> None:
        part.write_bytes(flip(part.read_bytes(), 5000))
        real(part, path)

    monkeypatch.setattr(os, "replace", replace_damaged)
    messages: list[str] = []
    store = open_store(index, 1, cache, log=messages.append)
    assert_right(store, index, 1)
    assert store.path is None
    assert len(messages) == 2
    assert "is damaged" in messages[0]
    assert "is damaged right after writing" in messages[1]
    assert_nothing_left(cache)


def test_cache_that_cannot_be_mapped_is_not_used(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some network file systems have no memory maps."""

    def memmap(*args: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(np, "memmap", memmap)
    assert_in_memory(index, cache, "No such device")


@pytest.mark.parametrize("name", ["new\nline", "[1]*?", os.fsdecode(b"latin1-\xe9")])
def test_cache_folder_may_have_any_name(index: DataIndex, tmp_path: Path, name: str):
    assert open_store(index, 1, tmp_path / name, log=never).path is not None
    assert_right(open_store(index, 1, tmp_path / name, progress=never, log=never), index, 1)


def test_cache_none_writes_no_file(
    index: DataIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    store = open_store(index, 3, cache_folder("none"), log=never)
    assert_right(store, index, 3)
    assert store.path is None
    assert sorted(tmp_path.rglob("*")) == before


def test_cache_folder_of_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "sssd_fast" / "pixels"
    assert cache_folder(str(tmp_path / "here")) == tmp_path / "here"
    home = tmp_path / "home" / ".cache" / "sssd_fast" / "pixels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("auto") == home
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == home

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # the message of pathlib

    monkeypatch.setattr(Path, "home", no_home)
    match = r"data\.cache is auto.*home directory.*set it to a folder or none"
    with pytest.raises(ConfigError, match=match):
        cache_folder("auto")


# ---- images that changed since the check ----

OTHER = "another image than the one that was checked"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (lambda path: path.unlink(), "no such file"),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        "truncated or damaged PNG",
    ),
    "text": (lambda path: path.write_text("hello"), "not a known image format"),
    "same size": (lambda path: Image.new("L", Image.open(path).size).save(path), OTHER),
    "same pixels": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), OTHER),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["new\nline.png", LATIN1])
def test_image_that_changed_since_the_check_is_an_error(
    index: DataIndex, cache: Path, change: str, name: str
):
    make, reason = CHANGES[change]
    path = index.root / "a" / name
    make(path)
    for folder in (cache, None):
        with pytest.raises(ImageError) as error:
            open_store(index, 1, folder, threads=2, log=never)
        text = str(error.value)
        assert text.isprintable()
        assert "line.png: " in text or r"latin1-\udce9.png: " in text
        assert reason in text
        assert "restore it, or run `sssd-fast data check` again" in text
    assert_nothing_left(cache)


def test_complete_cache_needs_no_image_file(index: DataIndex, cache: Path):
    before = [image.copy() for image in map(open_store(index, 1, cache).image, range(6))]
    for i in range(6):
        index.file(i).unlink()
    store = open_store(index, 1, cache, log=never)
    for i, image in enumerate(before):
        np.testing.assert_array_equal(store.image(i), image)


def test_interrupted_build_leaves_nothing(index: DataIndex, cache: Path):
    def progress(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(index, 1, cache, threads=2, progress=progress)
    assert_nothing_left(cache)
    assert_right(open_store(index, 1, cache, log=never), index, 1)
