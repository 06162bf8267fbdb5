"""Stages that pass, fail, hang, leave children or write without end: each has its result, none stops the next, and nothing is lost."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import processes, results, session
from benchmarks import stages as stages_module
from benchmarks.session import Count, Stopped, conduct, count, main, pack, verdict
from benchmarks.stages import SHARES, Group, Stage, gpu_tests, stages
from sssd_fast import cli
from sssd_fast.errors import SssdError
from tests.kernels.test_interpreted import FILES

ROOT = stages_module.ROOT


def shell(code: str, share: float = 1) -> Group:
    return Group(share, lambda seconds: [["sh", "-c", code]])


def stage(name: str, *groups: Group, share: float = 1, left_out: str | None = None) -> Stage:
    return Stage(name, share, groups, left_out)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """--out; impatient signals, and results of benchmarks in a folder of this test."""
    graces = ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 5.0))
    monkeypatch.setattr(processes, "SIGNALS", graces)
    monkeypatch.setattr(processes, "TICK_S", 0.1)
    monkeypatch.setattr(session, "ARCHIVE_EVERY_S", 0.1)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "checkout" / "benchmarks" / "results")
    monkeypatch.setattr(session, "paper_folder", lambda out: tmp_path / "paper")
    return tmp_path / "out"


def state_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "session.json").read_text(encoding="utf-8"))


def outcomes(out: Path) -> dict[str, str]:
    return {found["name"]: found["result"] for found in state_of(out)["stages"]}


def archived(out: Path) -> dict[str, bytes]:
    if not (out / "results.tar").exists():
        return {}
    with tarfile.open(out / "results.tar") as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def printed(out: Path) -> list[str]:
    """The lines of bench.log behind the command."""
    return text_of(out / "bench.log").splitlines()[1:]


def wait_for(what: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return pid in processes.members({pid})


# ---- a whole session ----


def test_no_stage_stops_the_next(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pids = tmp_path / "pids"
    hanging = f"echo begun; sleep 61 & echo $! >> '{pids}'; (trap '' INT TERM; sleep 62) & echo $! >> '{pids}'; wait"
    made = [
        stage("good", shell("echo it works")),
        stage("bad", shell("echo it breaks >&2; exit 3")),
        stage("hangs", shell(hanging), share=0.2),
        stage("missing", Group(1, lambda s: [["no-such-program", "x"]])),
        stage("writes", shell("yes 0123456789 | head -c 20000000; echo the end")),
        stage("absent", shell("exit 9"), left_out="nobody asked for it"),
        Stage("noted", 1, [shell("true")], notes=["without the half of it"]),
        stage(
            "last",
            shell("echo one; echo first"),
            Group(1, lambda s: [["echo", "two"], ["echo", "three"]]),
        ),
    ]
    assert conduct(lambda work: made, out, 0.3, ["session", "--minutes", "0.3"]) == 1
    found = outcomes(out)
    assert re.fullmatch(r"cut off after \d+ s", found.pop("hangs"))
    assert found == {
        "good": "passed", "bad": "failed: exit code 3", "missing": "failed: exit code 127", "writes": "passed", "noted": "passed",
        "absent": "left out because nobody asked for it", "last": "passed",
    }  # fmt: skip
    assert len(pids.read_text().split()) == 2
    assert not [pid for pid in pids.read_text().split() if alive(int(pid))], (
        "the children of what hangs are still there"
    )
    assert (out / "good.log").read_text() == "$ sh -c 'echo it works'\nit works\n"
    assert (out / "bad.log").read_text().splitlines()[1:] == ["it breaks"]
    assert (out / "hangs.log").read_text().splitlines()[1:] == ["begun"]
    assert (
        out / "missing.log"
    ).read_text() == "$ no-such-program x\nno-such-program: No such file or directory\n"
    assert (out / "last.log").read_text().splitlines()[1:] == [
        "one", "first", "", "$ echo two", "two", "", "$ echo three", "three",
    ]  # fmt: skip
    log = (out / "writes.log").read_text()
    assert (
        len(log) < session.LOG_BYTES + 100
        and "\n0123456789\n" in log[:100]
        and log.endswith("the end\n")
    )
    assert "bytes are left out here]" in log
    printed, warned = capsys.readouterr()
    assert "noted: without the half of it" in warned
    table = printed[printed.index("of 0.3 minutes\n") :]
    assert re.search(r"^bad +failed: exit code 3 +\d+ +bad\.log$", table, re.M)
    assert re.search(r"^absent +left out because nobody asked for it +0 +-$", table, re.M)
    assert "  it breaks" in printed, "the end of the log of a stage that failed is shown"
    state = state_of(out)
    assert state["finished"] and state["command"] == "sssd-fast bench session --minutes 0.3"
    assert [s["ok"] for s in state["stages"]] == [True, False, False, False, True, True, True, True]
    assert [s["notes"] for s in state["stages"] if s["notes"]] == [["without the half of it"]]
    assert state["stages"][1]["commands"][0] | {"seconds": 0} == {
        "command": "sh -c 'echo it breaks >&2; exit 3'", "returncode": 3, "seconds": 0,
    }  # fmt: skip


def test_all_passed_is_exit_code_0_and_the_files_can_come_back(out: Path) -> None:
    out.mkdir()
    for old in ("tune.log", "results.tar", "mine.log"):
        (out / old).write_text("old")
    made = [stage(name, shell("true")) for name in SHARES if name != "tune"]
    assert conduct(lambda work: made, out, 0.5) == 0
    names = {path.name for path in out.iterdir()} - {"mine.log"}
    assert names == {f"{name}.log" for name in SHARES if name != "tune"} | {
        "session.json",
        "results.tar",
    }
    assert archived(out) == {}, "results.tar is the old one"
    assert (out / "mine.log").read_text() == "old"
    most = {f"{name}.log" for name in SHARES} | {"session.json", "results.tar"}
    assert len(most) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in most)
    assert max(session.LOG_BYTES, session.ARCHIVE_BYTES) < 16 << 20


def test_an_interrupt_first_so_that_a_program_can_write_what_it_has(out: Path) -> None:
    code = "import time\ntry:\n    print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    made = [stage("bench", Group(1, lambda s: [[sys.executable, "-c", code]]))]
    assert conduct(lambda work: made, out, 0.02) == 1
    assert (out / "bench.log").read_text().splitlines()[-2:] == ["begun", "saved"]


def test_children_in_sessions_of_their_own_and_those_left_behind_are_ended(
    out: Path, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    own = f"import os, time; os.setsid(); open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(63)"
    hangs = shell(f'{sys.executable} -c "{own}" & wait')
    leaves = shell(f"sleep 64 & echo $! >> '{pids}'; exit 0")
    assert conduct(lambda work: [stage("a", leaves), stage("b", hangs)], out, 0.03) == 1
    assert outcomes(out)["a"] == "passed"
    assert len(pids.read_text().split()) == 2
    assert not [pid for pid in pids.read_text().split() if alive(int(pid))]


# ---- time ----


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def limits(
    out: Path, monkeypatch: pytest.MonkeyPatch, made: Sequence[Stage], uses: dict[str, float]
) -> dict[str, float]:
    """The limit that each stage got, when each used so many seconds of it (1 where not said)."""
    clock, seen = Clock(), dict[str, float]()
    monkeypatch.setattr(session, "time", clock)

    def run(
        commands: Sequence[Sequence[str]], outputs: Sequence[Path], limit_s: float, **_: Any
    ) -> list[processes.Done]:
        name = commands[0][-1]
        seen[name] = limit_s
        clock.now += min(uses.get(name, 1.0), limit_s)
        return [processes.Done(list(commands[0]), 0, 1.0)]

    monkeypatch.setattr(processes, "run", run)
    conduct(lambda work: made, out, 1)
    return seen


def test_what_a_stage_does_not_use_goes_to_the_next(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [stage("a", shell("a")), stage("b", shell("b")), stage("c", shell("c"), share=2)]
    seen = limits(out, monkeypatch, made, {"a": 3, "b": 19})
    assert seen == pytest.approx({"a": 15, "b": (60 - 3) / 3, "c": 60 - 3 - 19})


def test_who_is_left_out_leaves_its_share(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [stage("a", shell("a")), stage("b", shell("b"), left_out="no"), stage("c", shell("c"))]
    assert limits(out, monkeypatch, made, {"a": 30}) == pytest.approx({"a": 30, "c": 30})


def test_groups_share_the_time_of_their_stage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [stage("a", shell("a1", 3), shell("a2", 1))]
    assert limits(out, monkeypatch, made, {"a1": 5}) == pytest.approx({"a1": 45, "a2": 55})


def test_without_time_a_stage_is_left_out_and_that_is_no_success(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(session, "time", clock)

    def too_long(*_: Any, **__: Any) -> list[processes.Done]:
        clock.now += 58  # what was begun was finished beyond its limit
        return [processes.Done(["x"], 0, 58.0)]

    monkeypatch.setattr(processes, "run", too_long)
    assert conduct(lambda work: [stage("a", shell("a")), stage("b", shell("b"))], out, 1) == 1
    assert outcomes(out) == {"a": "passed", "b": "left out because the time was up"}


# ---- a session that is stopped ----


@pytest.fixture
def background(out: Path) -> Iterator[Callable[[Sequence[Stage]], Any]]:
    """Conducts stages in a process of its own."""
    started: list[Any] = []

    def start(made: Sequence[Stage]) -> Any:
        def work() -> None:
            sys.exit(conduct(lambda folder: made, out, 1))

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_session_leaves_everything_until_then(
    out: Path, background: Callable[..., Any]
) -> None:
    new = results.FOLDER / "attention-new.json"
    measure = (
        f"mkdir -p '{results.FOLDER}'; echo rows > '{new}'; echo measuring; echo $$; exec sleep 65"
    )
    process = background(
        [
            stage("tests", shell("echo fine")),
            stage("bench", shell(measure)),
            stage("tune", shell("true")),
        ]
    )
    try:
        wait_for(lambda: archived(out) and "measuring" in printed(out))
        process.kill()  # SIGKILL: nothing of the session can tidy up
        process.join()
        assert outcomes(out) == {"tests": "passed", "bench": "running"}
        assert not state_of(out)["finished"]
        assert text_of(out / "tests.log").splitlines()[-1] == "fine"
        assert archived(out) == {"benchmarks/results/attention-new.json": b"rows\n"}
    finally:
        process.kill()
        orphans = {int(pid) for pid in printed(out)[1:]}
        processes.end(orphans, processes.SIGNALS[-1:])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_and_is_told(
    out: Path, background: Callable[..., Any], which: signal.Signals
) -> None:
    process = background(
        [stage("bench", shell("echo $$; exec sleep 66")), stage("tune", shell("true"))]
    )
    wait_for(lambda: printed(out))
    os.kill(process.pid, which)
    process.join(20)
    assert process.exitcode == 128 + which
    found = outcomes(out)
    assert list(found) == ["bench"] and re.fullmatch(
        rf"cut off after \d+ s by {which.name}", found["bench"]
    )
    assert not state_of(out)["finished"]
    assert not alive(int(printed(out)[0]))


# ---- what comes back ----


def test_the_archive_holds_what_was_made_since_the_session_began(out: Path, tmp_path: Path) -> None:
    results.FOLDER.mkdir(parents=True)
    for name in ("old", "changed"):
        (results.FOLDER / f"{name}.json").write_text("before")
    paper = tmp_path / "paper" / "covid-ct"
    (paper / "random").mkdir(parents=True)
    (paper / "earlier.md").write_text("before")
    script = (
        f"cd '{results.FOLDER}'; mkdir tune; echo after > changed.json; echo new > new.json; echo tuned > tune/t.json; "
        f"cd '{paper}'; echo table > results.md; echo weights > last.pt; echo figures > results.json; echo cell > random/results.json"
    )

    def make(work: Path) -> list[Stage]:
        return [stage("bench", shell(f"{script}; echo '<x/>' > '{work}/tests-a.xml'"))]

    assert conduct(make, out, 0.5) == 0
    held = archived(out)
    (published,) = (name for name in held if name.startswith("benchmarks/results/paper/"))
    assert re.fullmatch(r"benchmarks/results/paper/covid-ct-\d{8}-\d{6}\.json", published)
    assert held == {
        published: b"figures\n", "paper/covid-ct/results.json": b"figures\n", "paper/covid-ct/random/results.json": b"cell\n",
        "benchmarks/results/changed.json": b"after\n", "benchmarks/results/new.json": b"new\n",
        "benchmarks/results/tune/t.json": b"tuned\n", "paper/covid-ct/results.md": b"table\n", "session/tests-a.xml": b"<x/>\n",
    }  # fmt: skip
    assert state_of(out)["archive"] == {
        "file": "results.tar",
        "holds": sorted(held),
        "left_out": [],
    }


def test_the_archive_stays_small_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FILE_BYTES", 3000)
    monkeypatch.setattr(session, "ARCHIVE_BYTES", 6000)
    files = {"a": 100, "b": 3001, "c": 2999, "d": 2000, "e": 10}
    for name, size in files.items():
        (tmp_path / name).write_bytes(bytes(size))
    data, left_out = pack({name: tmp_path / name for name in [*files, "gone"]})
    assert left_out == ["b", "d", "gone"]
    (tmp_path / "x.tar").write_bytes(data)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames() == ["a", "c", "e"]


def test_the_machine_is_told_once_it_is_known(out: Path) -> None:
    def make(work: Path) -> list[Stage]:
        half = stage("info", shell(f"printf '{{\"commit\": ' > '{work}/machine.json'"))
        return [
            half,
            stage("bench", shell(f"echo '{{\"commit\": \"abc\"}}' > '{work}/machine.json'")),
        ]

    assert conduct(make, out, 0.5) == 0
    assert state_of(out)["machine"] == {"commit": "abc"}


# ---- what a result is called ----

SUITE = '<testsuites><testsuite name="pytest" tests="{}" failures="{}" errors="{}" skipped="{}"></testsuite></testsuites>'


def test_tests_are_counted_over_all_files(tmp_path: Path) -> None:
    for name, text in {
        "a": SUITE.format(10, 1, 2, 3),
        "b": SUITE.format(5, 0, 0, 0),
        "cut": "<testsuites><tests",
    }.items():
        (tmp_path / name).write_text(text)
    assert count([tmp_path / name for name in ("a", "b", "cut")]) == Count(
        ran=12, failed=3, skipped=3
    )
    assert count([tmp_path / "cut"]) is None
    assert count([]) is None


def test_the_lines_of_the_checker_are_counted(out: Path) -> None:
    rows = [{"tool": "memcheck", "op": "a", "ok": ok} for ok in (True, False, True)]

    def make(work: Path) -> list[Stage]:
        return [
            stage("sanitize", shell(f"echo '{json.dumps(rows)}' > '{work}/sanitize.json'; exit 1"))
        ]

    assert conduct(make, out, 0.5) == 1
    assert outcomes(out) == {"sanitize": "failed 1 of 3"}


@pytest.mark.parametrize(
    ("codes", "tests", "stopped", "said"),
    [
        ([0, 0], None, None, "passed"),
        ([0], Count(240, 0, 0), None, "passed 240"),
        ([0], Count(240, 0, 3), None, "passed 240, 3 skipped"),
        ([1, 0], Count(240, 3, 2), None, "failed 3 of 240, 2 skipped"),
        ([5], Count(0, 0, 0), None, "failed: exit code 5"),
        ([2, -11, 2], None, None, "failed: exit code 2, exit code -11"),
        ([None], None, None, "cut off after 7 s"),
        ([0, None], Count(100, 2, 0), None, "cut off after 7 s, 2 of 100 failed until then"),
        ([], None, Stopped(signal.SIGTERM), "cut off after 7 s by SIGTERM"),
    ],
)
def test_the_verdict(
    codes: list[int | None], tests: Count | None, stopped: Stopped | None, said: str
) -> None:
    assert verdict(codes, tests, 7.2, stopped) == said


# ---- the real stages ----


def given(*words: str) -> argparse.Namespace:
    return command._parse(["session", *words])


def words_of(found: Stage) -> list[list[str]]:
    return [words for group in found.groups for words in group.commands(60)]


def test_info_is_always_there_and_the_order_is_that_of_the_table(tmp_path: Path) -> None:
    names = [
        found.name for found in stages(given("--stages", "bench", "tests"), tmp_path, tmp_path)
    ]
    assert names == ["info", "tests", "bench"]
    everything = stages(given(), tmp_path, tmp_path)
    assert [found.name for found in everything] == list(SHARES)
    assert {found.name for found in everything if found.left_out} == {"paper"}
    assert sum(SHARES.values()) == pytest.approx(1)


def test_the_commands_are_accepted_as_they_stand(tmp_path: Path) -> None:
    import importlib.util

    for name in stages_module.DATA_SETS:
        (tmp_path / name).mkdir()
    args = given(
        "--covid-ct", str(tmp_path / "covid-ct"), "--sars-cov-2-ct", str(tmp_path / "sars-cov-2-ct")
    )
    found = {one.name: words_of(one) for one in stages(args, tmp_path / "out", tmp_path)}
    for words in (*found["bench"], *found["tune"]):
        assert words[1:3] == ["-m", "benchmarks"]
        assert command._parse(words[3:]).minutes == pytest.approx(0.9)
    assert len(found["paper"]) == 2
    for words, name in zip(found["paper"], stages_module.DATA_SETS, strict=True):
        parsed = cli._parser().parse_args(words[3:])
        assert (parsed.dataset, parsed.data, parsed.minutes) == (
            name,
            str(tmp_path / name),
            pytest.approx(0.9),
        )
        assert Path(parsed.out) == ROOT / "runs" / "out-paper" / name
    (words,) = found["sanitize"]
    file = ROOT / words[1]
    spec = importlib.util.spec_from_file_location("sanitize_run_here", file)
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    sys.modules["sanitize_run_here"] = runner  # dataclasses look their module up
    spec.loader.exec_module(runner)
    assert runner._arguments(words[2:]).seconds == 54


def test_the_paper_goes_on_where_an_earlier_session_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "paper_folder", lambda out: tmp_path / "paper")
    (tmp_path / "paper" / "covid-ct").mkdir(parents=True)
    (tmp_path / "paper" / "covid-ct" / "plan.json").touch()
    (words,) = words_of(stages(given("--covid-ct", str(tmp_path)), tmp_path, tmp_path)[-1])
    assert (
        words[4:6] == ["--resume", str(tmp_path / "paper" / "covid-ct")] and "--data" not in words
    )


MARK = "mark." + "gpu"  # not in one word, which would make this file one with such tests


def files(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.endswith(".py")]


def test_every_test_for_a_gpu_is_in_one_command_and_the_kernels_come_first(tmp_path: Path) -> None:
    first, rest = stages(given(), tmp_path, tmp_path)[1].groups
    halves, *at_once = first.commands(60)[:2], *first.commands(60)[2:]
    small, (step,), (others,) = at_once[:-1], at_once[-1:], rest.commands(60)
    assert (
        files(halves[0])
        == files(halves[1])
        == ["tests/kernels/test_attention.py", "tests/kernels/test_gpu.py"]
    )
    assert [words[words.index("-k") + 1] for words in halves] == [
        "not test_compiled",
        "test_compiled",
    ]
    named = [*files(halves[0]), stages_module.SMALL_TESTS, *files(step), *files(others)]
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text()
    }
    assert sorted(named) == sorted(marked) == sorted(gpu_tests())
    for words in (*halves, step, others):
        assert words[-1] != "-x" and "-x" not in words and words[words.index("-m", 2) + 1] == "gpu"
    assert {name for words in small for name in files(words)} == {
        f"tests/kernels/{name}" for name in FILES
    }
    for words in small:
        assert words[:4] == [
            "env",
            "MAE_KERNELS_TEST_DEVICE=cuda",
            "MAE_KERNELS_BACKEND=triton",
            "TRITON_INTERPRET=0",
        ]
        assert words[words.index("-m", 7) + 1] == "kernel"
    reports = {
        word
        for words in (*halves, *at_once, others)
        for word in words
        if word.startswith("--junitxml=")
    }
    assert len(reports) == 2 + len(FILES) + 1 + 1, "each has a file of its own"


@pytest.mark.parametrize("missing", ["PIL", "transformers"])
def test_without_a_package_the_rest_is_tested_and_that_is_told(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = {
        name for words in words_of(stages(given(), tmp_path, tmp_path)[1]) for name in files(words)
    }
    monkeypatch.setattr(
        stages_module, "find_spec", lambda name: None if name == missing else object()
    )
    found = stages(given(), tmp_path, tmp_path)[1]
    left = everything - {name for words in words_of(found) for name in files(words)}
    if missing == "transformers":
        assert left == {"tests/kernels/test_patch_model.py"}
        assert found.notes == ["without the tests of patch_model, which need transformers"]
        return
    assert found.notes == ["without the tests of the trainer, which need PIL"]
    stays = {name for name in everything - left if "/kernels/" not in name}
    assert "tests/benchmarks/test_gpu_harness.py" in stays
    assert all(name.startswith("tests/benchmarks/test_g") for name in stays), (
        "what tests/conftest.py lets pass as well"
    )
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    listed = re.search(r"TRAINER_NEEDS = \[\s*name for name in \(([^)]*)\)", conftest)
    assert (
        listed is not None
        and tuple(re.findall(r'"(\w+)"', listed[1])) == stages_module.TRAINER_NEEDS
    )


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--minutes", "0"], "--minutes is 0, needs at least 0.1"),
        (["--minutes", "nan"], "--minutes is nan, needs at least 0.1"),
        (["--covid-ct", "no/such/folder"], "--covid-ct is 'no/such/folder', which is no folder"),
    ],
)
def test_refuses(words: list[str], error: str) -> None:
    with pytest.raises(SssdError, match=re.escape(error)):
        main(given(*words), words)


def test_without_a_gpu_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SssdError, match="needs a CUDA device, and torch finds none here"):
        main(given("--out", str(tmp_path / "out")), [])
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(SssdError, match="which is a file; give a folder"):
        conduct(lambda work: [], tmp_path / "out", 1)
