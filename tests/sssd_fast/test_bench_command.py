"""`sssd-fast bench` passes every word to the benchmarks of this checkout or package, and to no
others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sssd_fast import cli

PACKAGE = Path(cli.__file__).parent
# A substitute for the benchmarks: prints its words, and ends as the last of them names.
BENCHMARKS = """
import argparse, json

from sssd_fast.errors import NumericsError, SssdError

def main(words):
    print(json.dumps(words))
    last = words[-1:]
    if last == ["refuse"]:
        raise SssdError("no such op")
    if last == ["numerics"]:
        raise NumericsError("not finite")
    if last == ["wrong"]:
        argparse.ArgumentParser(prog="the benchmarks").error("unknown word")
    return 7 if last == ["seven"] else 0
"""
OTHER = "print('another package ran')\ndef main(words):\n    return 0\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the command needs, next to the substitute; in a path with a space."""
    root = tmp_path / "a checkout"
    (root / "sssd_fast").mkdir(parents=True)
    for path in (*PACKAGE.glob("__*__.py"), *PACKAGE.glob("cli*.py"), PACKAGE / "errors.py"):
        shutil.copy(path, root / "sssd_fast")
    (root / "sssd_fast" / "run").mkdir()
    for name in ("__init__.py", "files.py"):
        shutil.copy(PACKAGE / "run" / name, root / "sssd_fast" / "run")
    (root / "kernels" / "mae_kernels").mkdir(parents=True)
    write_package(root / "benchmarks", BENCHMARKS)
    return root


def write_package(folder: Path, code: str) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text(code)


def installed(checkout: Path) -> Path:
    """A folder from which only sssd_fast can be imported, as after an editable installation."""
    site = checkout.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sssd_fast").symlink_to(checkout / "sssd_fast")
    return site


def bench(*words: str, path: list[Path], where: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-m", "sssd_fast", "bench", *words]
    return subprocess.run(command, env=env, cwd=where, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [
        [],
        [
            "kernels",
            "a b",
            *["--help", "--version", "key=value", "--only", "-x", "--y=z", "seven"],
        ],
    ],
    ids=["no word", "words"],
)
def test_bench_passes_every_word_and_the_exit_code(checkout: Path, words: list[str]) -> None:
    done = bench(*words, path=[installed(checkout)], where=checkout.parent)
    assert done.stderr == ""
    assert json.loads(done.stdout) == words
    assert done.returncode == (7 if words else 0)


@pytest.mark.parametrize(
    ("word", "status", "message"),
    [
        ("refuse", 2, "error: no such op\n"),
        ("numerics", 3, "error: not finite\n"),
        ("wrong", 2, "the benchmarks: error: unknown word\n"),
    ],
)
def test_bench_errors_are_one_message(checkout: Path, word: str, status: int, message: str) -> None:
    done = bench("kernels", word, path=[checkout], where=checkout)
    assert done.returncode == status
    assert done.stderr.endswith(message)
    assert "Traceback" not in done.stderr


def test_bench_of_an_installed_package_runs_its_own_benchmarks(checkout: Path) -> None:
    """Also next to another package of that name, and in processes that it starts."""
    site = checkout.parent / "site"
    shutil.copytree(checkout / "sssd_fast", site / "sssd_fast")
    write_package(site / "benchmarks", OTHER)
    code = """
from multiprocessing import get_context

def show(words):
    print(words)

def main(words):
    process = get_context("spawn").Process(target=show, args=(words,))
    process.start()
    process.join()
    return process.exitcode
"""
    write_package(site / "sssd_fast" / "_bench" / "benchmarks", code)
    done = bench("seven", path=[site], where=checkout.parent)
    assert (done.stdout, done.returncode) == ("['seven']\n", 0), done.stderr


def test_bench_never_runs_another_package_of_that_name(checkout: Path) -> None:
    site, other = installed(checkout), checkout.parent / "other"
    write_package(other / "benchmarks", OTHER)
    for path in ([other, site], [other, checkout]):
        assert bench("seven", path=path, where=checkout.parent).stdout == '["seven"]\n'


@pytest.mark.parametrize("words", [["--help"], ["ops", "--help"]], ids=" ".join)
def test_bench_help_is_that_of_the_benchmarks(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *words])
    assert end.value.code == 0
    assert "ops" in capsys.readouterr().out
