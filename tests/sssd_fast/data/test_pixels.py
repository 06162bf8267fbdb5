"""Cache of decoded pixels: always the right pixels, one line per problem, never a partial file."""

from __future__ import annotations

import errno
import fcntl
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
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.data.pixels import PixelStore, cache_folder, open_store, store_key
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
    return tmp_path / os.fsdecode(b"[1]*? \xe9")


def assert_right(store: PixelStore, index: DataIndex, channels: int) -> None:
    """By Pillow alone, from the files as they are now."""
    assert store.nbytes == sum(height * width for height, width in SIZES) * channels
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
    seen: list[tuple[int, int]] = []
    first = open_store(
        index, channels, cache, threads=threads, progress=lambda *done: seen.append(done), log=never
    )
    assert seen == [(i, 6) for i in range(1, 7)]
    assert_right(first, index, channels)
    assert first.path == assert_complete(cache)
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


def flip(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first pixel": lambda data: flip(data, 0),
    "last pixel": lambda data: flip(data, -1 - 4 * len(SIZES)),
    "checksum": lambda data: flip(data, -1),
    "one byte short": lambda data: data[:-1],
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
    "decoding": "pixels.decode_record = lambda *args: stop()",
    "all images written": "pixels.os.fsync = lambda file: stop()",
}


Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(index: DataIndex, cache: Path, tmp_path: Path) -> Iterator[Start]:
    """start(code, line): a process with CHILD and the code that has written `line` to the log."""
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "log"

    def run(code: str, line: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD + code, str(index.root), str(cache), str(log)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe)
        started.append(child)
        while not log.exists() or line not in log.read_text().splitlines():
            if child.poll() is not None:
                raise AssertionError(child.communicate()[1])
            threading.Event().wait(0.02)
        return child

    yield run
    for child in started:
        child.kill()
        child.communicate()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_process_leaves_no_cache_and_the_next_one_cleans_up(
    index: DataIndex, cache: Path, start: Start, moment: str
):
    child = start(MOMENTS[moment] + BUILD, "here")
    child.kill()
    child.wait()
    assert len(list(cache.glob("*.part"))) == (moment != "decoding")
    assert not list(cache.glob("*.pixels"))
    assert_right(open_store(index, 1, cache, log=never), index, 1)
    assert_complete(cache)


@pytest.mark.timeout(60)
def test_second_process_waits_for_the_file_of_the_first(
    index: DataIndex, cache: Path, tmp_path: Path, start: Start
):
    proceed = tmp_path / "proceed"
    slow = f"""
def replace(*paths, real=os.replace):
    note("full")
    while not os.path.exists({str(proceed)!r}):
        time.sleep(0.02)
    real(*paths)
pixels.os.replace = replace
"""
    show = "\nprint([store.image(i).tolist() for i in range(len(index))])"
    child = start(slow + BUILD + show, "full")
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
    assert (tmp_path / "log").read_text().splitlines() == [
        *(f"decoded {i}" for i in range(6)),
        "full",
    ]
    assert_complete(cache)


def test_waiting_for_a_moment_prints_nothing(index: DataIndex, cache: Path) -> None:
    path = Path(str(open_store(index, 1, cache, log=print).path))
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        release = threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN))
        release.start()
        messages: list[str] = []
        store = open_store(index, 1, cache, progress=never, log=messages.append)
        release.join()
    assert messages == [] and store.path == path


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
    # not even root can create a file in it
    assert_in_memory(index, Path("/proc/self"), "(")


def no_device(*args: object) -> None:
    """Some network file systems have no memory maps."""
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


@pytest.mark.parametrize(
    ("owner", "call", "replacement", "reason"),
    [
        (os, "fsync", no_space, "No space left"),
        (os, "replace", no_space, "No space left on device"),
        (np, "memmap", no_device, "No such device"),
    ],
)
def test_cache_that_cannot_be_written_or_mapped_is_kept_in_memory(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch, owner, call, replacement, reason
):
    monkeypatch.setattr(owner, call, replacement)
    assert_in_memory(index, cache, reason)
    assert not list(cache.glob("*.pixels"))
    monkeypatch.undo()
    assert open_store(index, 1, cache, log=never).path == assert_complete(cache)


def test_file_that_reads_back_wrong_is_not_used(
    index: DataIndex, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    real = os.replace

    def replace_damaged(part: Path, path: Path) -> None:
        part.write_bytes(flip(part.read_bytes(), 500))
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


def test_cache_folder_of_each_setting(
    index: DataIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("auto") == tmp_path / "xdg" / "sssd_fast" / "pixels"
    assert cache_folder(str(tmp_path / "here")) == tmp_path / "here"
    before = sorted(tmp_path.rglob("*"))
    store = open_store(index, 3, cache_folder("none"), log=never)
    assert_right(store, index, 3)
    assert store.path is None
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("auto") == tmp_path / "home" / ".cache" / "sssd_fast" / "pixels"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # the message of pathlib

    monkeypatch.setattr(Path, "home", no_home)
    match = r"data\.cache is auto.*home directory.*data\.cache to a folder"
    with pytest.raises(ConfigError, match=match):
        cache_folder("auto")
