"""`sssd-fast bench`: every word reaches the benchmarks of this checkout and no other package of that name, or one message says why not."""

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
# What stands for the benchmarks: tells the words it got, and does what the last of them says.
BENCHMARKS = """
import argparse, json

from sssd_fast.errors import NumericsError, SssdError

def main(words):
    print(json.dumps(words))
    if "--help" in words:
        argparse.ArgumentParser(prog="the benchmarks").parse_args(["--help"])
    if words[-1:] == ["refuse"]:
        raise SssdError("no such op")
    if words[-1:] == ["numerics"]:
        raise NumericsError("not finite")
    if words[-1:] == ["wrong"]:
        argparse.ArgumentParser(prog="the benchmarks").error("unknown word")
    return 7 if words[-1:] == ["seven"] else 0
"""
STRANGER = "print('a stranger ran')\ndef main(words):\n    return 0\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of this package that the command needs, beside made-up benchmarks; in a path with a space."""
    root = tmp_path / "a checkout"
    (root / "sssd_fast").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "cli.py", "commands.py", "errors.py"):
        shutil.copy(PACKAGE / name, root / "sssd_fast" / name)
    (root / "kernels" / "mae_kernels").mkdir(parents=True)
    _package(root / "benchmarks", BENCHMARKS)
    return root


def _package(folder: Path, code: str) -> None:
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text(code)


def _installed(checkout: Path) -> Path:
    """A folder from which only sssd_fast can be imported, as an editable installation of the checkout has it."""
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
        ["--help"],
        ["kernels", "--help"],
        ["kernels", "--quick", "--only", "a b", "--", "-x", "--config=none", "seven"],
        ["--version"],
        ["bench", "key=value"],
    ],
    ids=" ".join,
)
def test_every_word_arrives_unchanged(checkout: Path, words: list[str]) -> None:
    site = _installed(checkout)
    done = bench(*words, path=[site], where=checkout.parent)
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[0]) == words
    assert ("usage: the benchmarks" in done.stdout) == ("--help" in words)
    assert done.returncode == (7 if "seven" in words else 0)


@pytest.mark.parametrize(
    ("word", "status", "message"),
    [
        ("refuse", 2, "error: no such op\n"),
        ("numerics", 3, "error: not finite\n"),
        ("wrong", 2, "the benchmarks: error: unknown word\n"),
    ],
)
def test_errors_of_the_benchmarks_are_one_message(
    checkout: Path, word: str, status: int, message: str
) -> None:
    done = bench("kernels", word, path=[checkout], where=checkout)
    assert done.returncode == status
    assert done.stderr.endswith(message)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stranger", [False, True], ids=["alone", "beside a stranger"])
def test_an_installation_without_the_benchmarks_says_what_to_do(
    checkout: Path, stranger: bool
) -> None:
    site = checkout.parent / "site"
    shutil.copytree(checkout / "sssd_fast", site / "sssd_fast")
    if stranger:
        _package(site / "benchmarks", STRANGER)
    done = bench("kernels", path=[site], where=checkout.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench needs a checkout of the repository: ")
    assert str(site) in done.stderr
    assert "clone the repository" in done.stderr
    assert done.stdout == ""


def test_a_stranger_of_the_same_name_never_runs(checkout: Path) -> None:
    """Ours is used where it was not on the path yet; where a stranger is found before it there is an error that names it."""
    site, other = _installed(checkout), checkout.parent / "other"
    _package(other / "benchmarks", STRANGER)
    assert bench("seven", path=[other, site], where=checkout.parent).stdout == '["seven"]\n'
    done = bench("seven", path=[other, checkout], where=checkout.parent)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: bench needs the package benchmarks in ")
    assert str(other / "benchmarks") in done.stderr
    assert "PYTHONPATH" in done.stderr


def test_the_parser_knows_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli._parser().parse_args(["bench", "kernels", "--quick", "--json", "x.json"])
    assert args.words == ["kernels", "--quick", "--json", "x.json"]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "bench" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["kernels", "--help"]], ids=" ".join)
def test_help_is_that_of_the_benchmarks_here(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *words])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "WORDS" not in out  # of the command line's own parser
    assert "kernels" in out
