"""The cache of decoded images: always the right pixels, one line about whatever is wrong with the file, never half a file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sssd_fast.data import pixels
from sssd_fast.data.images import ImageError, decode_image, to_channels
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.pixels import PixelStore, cache_folder, decoded_bytes, open_store, store_key
from sssd_fast.errors import ConfigError

SIZES = [(9, 8), (21, 17), (8, 31), (16, 16), (13, 40), (33, 12)]


@pytest.fixture
def index(tmp_path: Path) -> DataIndex:
    """Grey and RGB in turn; file names as a file system may hold them."""
    names = ["0.png", "1.png", "new\nline.png", os.fsdecode(b"latin1-\xe9.png"), "ünï.png", "5.png"]
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
        np.testing.assert_array_equal(
            store.image(i), to_channels(decode_image(index.file(i)), channels)
        )


def assert_whole(cache: Path) -> Path:
    """The one cache file; nothing unfinished beside it."""
    (path,) = cache.glob("*.pixels")
    assert not list(cache.glob("*.part"))
    return path


def assert_nothing_left(cache: Path) -> None:
    assert not [p.name for p in cache.iterdir() if p.suffix != ".lock"]


def never(*args: object) -> None:
    raise AssertionError(f"called with {args}")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_files_from_the_cache_too(
    index: DataIndex, cache: Path, channels: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    first = open_store(index, channels, cache, threads=threads, log=never)
    assert_right(first, index, channels)
    assert first.path == assert_whole(cache)
    assert first.path.stat().st_mode & 0o777 == 0o644 & ~current_umask()
    assert "decoded in" in first.origin
    monkeypatch.setattr(pixels, "decode_record", never)
    monkeypatch.setattr(pixels, "read_file", never)
    second = open_store(index, channels, cache, threads=threads, progress=never, log=never)
    assert_right(second, index, channels)
    assert second.path == first.path
    assert second.origin == "read from the cache"


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def test_the_key_follows_content_order_and_channels(index: DataIndex, cache: Path):
    turned = DataIndex(index.root, index.classes, index.records[::-1])
    keys = [store_key(index, 1), store_key(index, 3), store_key(turned, 1)]
    Image.new("L", (8, 9)).save(index.file(0))  # the same size
    keys.append(store_key(check_data(index.root), 1))
    assert len(set(keys)) == 4
    assert store_key(check_data(index.root), 1) == keys[3]
    changed = check_data(index.root)
    for number in (1, 2):
        assert_right(open_store(changed, 1, cache), changed, 1)
        changed = DataIndex(index.root, index.classes, changed.records[::-1])
        assert len(list(cache.glob("*.pixels"))) == number


def test_the_key_does_not_follow_names_and_labels(index: DataIndex, cache: Path):
    """Files that were renamed or moved to another class are still the same pictures."""
    open_store(index, 1, cache)
    index.file(0).rename(index.root / "a" / "renamed.png")
    (index.root / "a").rename(index.root / "b")
    renamed = check_data(index.root)
    by_content = {r.sha256: r for r in renamed.records}
    same_order = DataIndex(
        renamed.root, renamed.classes, [by_content[r.sha256] for r in index.records]
    )
    store = open_store(same_order, 1, cache, progress=never)
    assert_right(store, same_order, 1)


def pixels_start(data: bytes, index: DataIndex) -> int:
    return len(data) - decoded_bytes(index, 1)


DAMAGE: dict[str, Callable[[bytes, DataIndex], bytes]] = {
    "first pixel": lambda data, index: flip(data, pixels_start(data, index)),
    "last pixel": lambda data, index: flip(data, len(data) - 1),
    "magic": lambda data, index: flip(data, 0),
    "length of the header": lambda data, index: flip(data, 8),
    "huge length of the header": lambda data, index: flip(data, 15),
    "JSON of the header": lambda data, index: flip(data, 16),
    "number in the header": lambda data, index: data.replace(b'"images": 6', b'"images": 5'),
    "key in the header": lambda data, index: data.replace(store_key(index, 1).encode(), b"0" * 32),
    "table": lambda data, index: flip(data, 16 + int.from_bytes(data[8:16], "little") + 5),
    "one byte short": lambda data, index: data[:-1],
    "half": lambda data, index: data[: len(data) // 2],
    "within the table": lambda data, index: data[: 16 + int.from_bytes(data[8:16], "little") + 5],
    "within the header": lambda data, index: data[:40],
    "within the length": lambda data, index: data[:11],
    "empty": lambda data, index: b"",
    "one byte more": lambda data, index: data + b"\0",
    "zeros": lambda data, index: bytes(len(data)),
}


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_told_and_made_again(index: DataIndex, cache: Path, damage: str):
    open_store(index, 1, cache)
    path = assert_whole(cache)
    whole = path.read_bytes()
    broken = DAMAGE[damage](whole, index)
    assert broken != whole
    path.unlink()  # a new file: the old one may still be mapped
    path.write_bytes(broken)
    said: list[str] = []
    store = open_store(index, 1, cache, log=said.append)
    assert_right(store, index, 1)
    (line,) = said
    assert line.startswith(f"the cache {path} is damaged (")
    assert line.endswith("it is built again")
    assert assert_whole(cache).read_bytes() == whole
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
index = check_data(root, threads=1)
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
    "nothing decoded": "pixels.decode_record = lambda *args: stop()",
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
    """start(code, index, cache, log): a process that runs CHILD and the code; it does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, index: DataIndex, cache: Path, log: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD + code, str(index.root), str(cache), str(log)]
        started.append(
            subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
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
def test_a_killed_process_leaves_no_cache_and_the_next_one_clears_up(
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
    assert_whole(cache)


@pytest.mark.timeout(60)
def test_of_two_processes_one_decodes_and_the_other_waits_for_its_file(
    index: DataIndex, cache: Path, tmp_path: Path, start: Start
):
    log, go_on = tmp_path / "log", tmp_path / "go_on"
    slow = f"""
def fsync(file, real=os.fsync):
    note("full")
    while not os.path.exists({str(go_on)!r}):
        time.sleep(0.02)
    real(file)
pixels.os.fsync = fsync
"""
    show = "\nprint([store.image(i).tolist() for i in range(len(index))])"
    child = start(slow + BUILD + show, index, cache, log)
    wait_for(log, "full", child)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        assert not list(cache.glob("*.pixels"))
        go_on.touch()  # only now, so the second has waited

    store = open_store(index, 1, cache, progress=never, log=say)
    printed, problems = child.communicate()
    assert child.returncode == 0, problems
    assert_right(store, index, 1)
    assert printed.strip() == str([store.image(i).tolist() for i in range(len(index))])
    assert said == [f"waiting for another process that builds {store.path}"]
    assert log.read_text().splitlines() == [*(f"decoded {i}" for i in range(6)), "full"]
    assert_whole(cache)


# ---- places that cannot hold the file ----


def assert_in_memory(index: DataIndex, folder: Path, reason: str) -> None:
    said: list[str] = []
    store = open_store(index, 1, folder, log=said.append)
    assert_right(store, index, 1)
    assert store.path is None
    (line,) = said
    assert f"no cache in {folder}" in line
    assert reason in line
    assert "kept in memory. Set data.cache to" in line
    assert "\n" not in line


def test_a_folder_that_cannot_be_made_or_written_to(index: DataIndex, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    assert_in_memory(index, tmp_path / "file", "File exists")
    assert_in_memory(index, tmp_path / "file" / "below", "Not a directory")
    assert (tmp_path / "file").read_text() == "x"
    assert_in_memory(index, Path("/proc/sssd_fast"), "(")  # not even root can make that,
    assert_in_memory(index, Path("/proc/self"), "(")  # nor put a file in here


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "replace"])
def test_a_disk_that_fills_up_on_the_way(
    index: DataIndex, cache: Path, call: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, call, no_space)
    assert_in_memory(index, cache, "No space left on device")
    assert_nothing_left(cache)
    monkeypatch.undo()
    assert open_store(index, 1, cache, log=never).path == assert_whole(cache)


def test_a_disk_that_fills_up_in_the_middle_of_an_image(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """pwrite first writes less than it was asked to, as it does on a disk that is nearly full."""
    real, room = os.pwrite, 500

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if room == 0:
            no_space()
        written = real(file, data[:room], offset)
        room -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert_in_memory(index, cache, "No space left on device")
    assert_nothing_left(cache)


def test_short_writes_are_continued(index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    assert_right(open_store(index, 1, cache, log=never), index, 1)


def test_a_disk_that_is_too_small_is_seen_before_decoding(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    real, needed = os.fstatvfs, 4096 + decoded_bytes(index, 1)

    def with_room(blocks: int) -> Callable[[int], os.statvfs_result]:
        def fstatvfs(file: int) -> os.statvfs_result:
            values = list(real(file))
            values[1], values[4] = 1, blocks  # f_frsize, f_bavail
            return os.statvfs_result(values)

        return fstatvfs

    written: list[object] = []
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    monkeypatch.setattr(os, "fstatvfs", with_room(needed - 1))
    assert_in_memory(index, cache, "No space left on device: 0 MiB are needed")
    assert_nothing_left(cache)
    assert not written
    monkeypatch.undo()
    monkeypatch.setattr(os, "fstatvfs", with_room(needed))
    assert open_store(index, 1, cache, log=never).path == assert_whole(cache)


def test_a_file_that_reads_back_wrong_is_not_used(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """A broken disk: what is written is not what is read."""
    real = os.replace

    def replace(part: Path, path: Path) -> None:
        part.write_bytes(flip(part.read_bytes(), 5000))
        real(part, path)

    monkeypatch.setattr(os, "replace", replace)
    said: list[str] = []
    store = open_store(index, 1, cache, log=said.append)
    assert_right(store, index, 1)
    assert store.path is None
    assert len(said) == 2
    assert "is damaged" in said[0]
    assert "is damaged right after writing" in said[1]
    assert_nothing_left(cache)


def test_none_keeps_files_nowhere(
    index: DataIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "pwrite", never)
    before = sorted(tmp_path.rglob("*"))
    folder = cache_folder("none")
    assert folder is None
    store = open_store(index, 3, folder, log=never)
    assert_right(store, index, 3)
    assert store.path is None
    assert sorted(tmp_path.rglob("*")) == before


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "sssd_fast" / "pixels"
    assert cache_folder(str(tmp_path / "here")) == tmp_path / "here"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME") if unset is None else monkeypatch.setenv(
            "XDG_CACHE_HOME", unset
        )
        assert cache_folder("auto") == tmp_path / "home" / ".cache" / "sssd_fast" / "pixels"


def test_without_a_home_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # pathlib's words

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(
        ConfigError, match=r"data\.cache is auto.*home directory.*set it to a folder or none"
    ):
        cache_folder("auto")


def test_a_cache_that_cannot_be_mapped_is_not_used(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some network file systems have no memory maps."""

    def memmap(*args: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(np, "memmap", memmap)
    assert_in_memory(index, cache, "No such device")


def test_a_cache_folder_with_any_name(index: DataIndex, tmp_path: Path):
    for name in ("new\nline", "[1]*?", os.fsdecode(b"latin1-\xe9")):
        store = open_store(index, 1, tmp_path / name, log=never)
        assert_right(store, index, 1)
        assert store.path is not None
        assert_right(open_store(index, 1, tmp_path / name, progress=never, log=never), index, 1)


# ---- images that changed since the check ----

CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "vanished": (lambda path: path.unlink(), "no such file"),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        "truncated or damaged PNG",
    ),
    "empty": (lambda path: path.write_bytes(b""), "empty file (0 bytes)"),
    "text": (lambda path: path.write_text("hello"), "not a known image format"),
    "same size": (
        lambda path: Image.new("L", (31, 8)).save(path),
        "another image than the one that was checked",
    ),
    "larger": (
        lambda path: Image.new("L", (99, 99)).save(path),
        "another image than the one that was checked",
    ),
    "same picture, other file": (
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "another image than the one that was checked",
    ),
}


@pytest.mark.parametrize("folder", ["cache", None])
@pytest.mark.parametrize("change", CHANGES)
def test_an_image_that_changed_since_the_check_ends_it(
    index: DataIndex, tmp_path: Path, change: str, folder: str | None
):
    make, reason = CHANGES[change]
    (i,) = (i for i, r in enumerate(index.records) if "\n" in r.path)
    good = index.file(i).read_bytes()
    make(index.file(i))
    place = None if folder is None else tmp_path / folder
    with pytest.raises(ImageError) as error:
        open_store(index, 1, place, threads=2, log=never)
    text = str(error.value)
    assert "new\\nline.png: " in text
    assert "\n" not in text
    assert reason in text
    assert (
        "it was good when the data were checked: restore it, or run `sssd-fast data check` again"
        in text
    )
    if place is not None:
        assert_nothing_left(place)
    index.file(i).write_bytes(good)
    assert_right(open_store(index, 1, place, log=never), index, 1)


def test_an_image_under_an_undecodable_name_is_named_printably(index: DataIndex):
    (i,) = (i for i, r in enumerate(index.records) if "latin1" in r.path)
    index.file(i).unlink()
    with pytest.raises(ImageError, match=r"latin1-\\udce9\.png: no such file") as error:
        open_store(index, 1, None)
    str(error.value).encode()


def test_a_whole_cache_needs_no_image_file(index: DataIndex, cache: Path):
    before = [image.copy() for image in map(open_store(index, 1, cache).image, range(6))]
    for i in range(6):
        index.file(i).unlink()
    store = open_store(index, 1, cache, log=never)
    for i, image in enumerate(before):
        np.testing.assert_array_equal(store.image(i), image)


@pytest.mark.parametrize("folder", ["cache", None])
def test_progress_counts_every_image_once_in_order(
    index: DataIndex, tmp_path: Path, folder: str | None
):
    seen: list[tuple[int, int]] = []
    place = None if folder is None else tmp_path / folder
    open_store(index, 1, place, threads=3, progress=lambda *done: seen.append(done))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_an_interrupt_in_the_middle_leaves_nothing(index: DataIndex, cache: Path):
    def progress(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(index, 1, cache, threads=2, progress=progress)
    assert_nothing_left(cache)
    assert_right(open_store(index, 1, cache, log=never), index, 1)
