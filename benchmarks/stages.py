"""What `bench session` runs: its stages, their shares of the time, and the commands of each.

A stage is a row of groups, one after the other; the commands of a group run at once.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Shares of the time. Of the stages that were asked for, each gets its part of what is left when it begins: a generous share of one that
# is soon done, as info, takes nothing from the others.
SHARES = {"info": 0.12, "tests": 0.37, "sanitize": 0.14, "bench": 0.26, "tune": 0.06, "paper": 0.05}
OF_LIMIT = 0.9  # what a command is told of its limit, where it can be told: what it has begun by then is finished in time
DATA_SETS = ("covid-ct", "sars-cov-2-ct")
# The tests of the trainer need these; without them the ops and the harness are tested alone (as in tests/conftest.py).
TRAINER_NEEDS = ("pydantic", "yaml", "rich", "PIL", "sklearn", "safetensors")
STEP_TESTS = "tests/sssd_fast/test_step_gpu.py"
SMALL_TESTS = (
    "tests/kernels/test_interpreted.py"  # the small tests of every kernel, on a device too
)
ON_THE_DEVICE = ("MAE_KERNELS_TEST_DEVICE=cuda", "MAE_KERNELS_BACKEND=triton", "TRITON_INTERPRET=0")
DESCRIBE = (
    "import json, pathlib, sys, torch; from benchmarks import machine; "
    "text = json.dumps(machine.describe(torch.device('cuda')), indent=1); pathlib.Path(sys.argv[1]).write_text(text); print(text)"
)

Commands = Callable[[float], list[list[str]]]  # the seconds they have -> command lines


class Group(NamedTuple):
    share: float  # of its stage's time
    commands: Commands


@dataclass(frozen=True)
class Stage:
    name: str
    share: float
    groups: Sequence[Group]
    left_out: str | None = None  # why it cannot take part
    notes: Sequence[str] = ()  # what of it cannot


def stages(args: argparse.Namespace, out: Path, work: Path) -> list[Stage]:
    """`info` always: without it nobody knows which card the rest is of. work: where the stages leave what is to come back."""
    papers = [_paper(name, args, out) for name in DATA_SETS if folder(args, name) is not None]
    tests, notes = _tests(work)
    groups: dict[str, list[Group]] = {
        "info": [_info(work)],
        "tests": tests,
        "sanitize": [Group(1, lambda s: [_sanitize(s, work)])],
        "bench": [Group(1, lambda s: [_bench(s, "all", "--device", "cuda")])],
        "tune": [Group(1, lambda s: [_bench(s, "tune")])],
        "paper": papers,
    }
    reasons = {
        "paper": None if papers else "no folder was given: --covid-ct DIR, --sars-cov-2-ct DIR"
    }
    wanted = [name for name in SHARES if name == "info" or name in (args.stages or SHARES)]
    told = {"tests": notes}
    return [
        Stage(name, SHARES[name], groups[name], reasons.get(name), told.get(name, ()))
        for name in wanted
    ]


def folder(args: argparse.Namespace, name: str) -> str | None:
    found: str | None = getattr(args, name.replace("-", "_"))
    return found


def paper_folder(out: Path) -> Path:
    """Not in --out, which holds only what should come back from the machine."""
    return ROOT / "runs" / f"{out.name}-paper"


# ---- the commands ----


def _info(work: Path) -> Group:
    own = [
        [sys.executable, "-m", "mae_kernels"],
        [sys.executable, "-c", DESCRIBE, str(work / "machine.json")],
    ]
    return Group(1, lambda s: [["nvidia-smi"], *own])


def _bench(seconds: float, *words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", *words, "--minutes", _minutes(seconds)]


def _minutes(seconds: float) -> str:
    return f"{max(OF_LIMIT * seconds / 60, 0.01):.3f}"


def _sanitize(seconds: float, work: Path) -> list[str]:
    words = [
        "--seconds",
        f"{max(OF_LIMIT * seconds, 1):.0f}",
        "--json",
        str(work / "sanitize.json"),
    ]
    return [sys.executable, "tests/kernels/sanitize_run.py", *words]


def _paper(name: str, args: argparse.Namespace, out: Path) -> Group:
    """Goes on where an earlier session stopped."""
    run = paper_folder(out) / name
    data = str(Path(str(folder(args, name))).resolve())
    words = (
        ["--resume", str(run)]
        if (run / "plan.json").exists()
        else [name, "--data", data, "--out", str(run)]
    )
    command = [sys.executable, "-m", "sssd_fast", "reproduce", *words]
    return Group(1, lambda s: [[*command, "--minutes", _minutes(s)]])


def _tests(work: Path) -> tuple[list[Group], list[str]]:
    """Those that compile much at once, on different cores; behind them, alone, those that look at the whole card."""
    kernels = sorted(
        name for name in gpu_tests() if name.startswith("tests/kernels/") and name != SMALL_TESTS
    )
    others = sorted(
        name for name in gpu_tests() if not name.startswith("tests/kernels/") and name != STEP_TESTS
    )
    at_once = {
        "ops": ["-m", "gpu", *kernels, "-k", "not test_compiled"],
        "compiled": ["-m", "gpu", *kernels, "-k", "test_compiled"],
        **{f"small-{Path(name).stem}": ["-m", "kernel", name] for name in small_tests()},
        "step": ["-m", "gpu", STEP_TESTS],
    }
    notes = []
    if missing := [name for name in TRAINER_NEEDS if find_spec(name) is None]:
        del at_once["step"]
        others = [name for name in others if name.startswith("tests/benchmarks/test_g")]
        notes.append(f"without the tests of the trainer, which need {', '.join(missing)}")
    if find_spec("transformers") is None:
        del at_once["small-test_patch_model"]
        notes.append("without the tests of patch_model, which need transformers")

    def pytest(name: str, words: Sequence[str]) -> list[str]:
        own = ["-q", "-p", "no:cacheprovider", f"--junitxml={work / f'tests-{name}.xml'}"]
        where = ["env", *ON_THE_DEVICE] if name.startswith("small-") else []
        return [*where, sys.executable, "-m", "pytest", *own, *words]

    first = [pytest(name, words) for name, words in at_once.items()]
    return [
        Group(0.75, lambda s: first),
        Group(0.25, lambda s: [pytest("others", ["-m", "gpu", *others])]),
    ], notes


def gpu_tests() -> set[str]:
    """The files with tests for a GPU: to import all the others costs more than some of these take."""
    files = (ROOT / "tests").glob("*/test_*.py")
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if "mark.gpu" in path.read_text(encoding="utf-8")
    }


def small_tests() -> list[str]:
    """What SMALL_TESTS runs on a device, all in one process; here each file has its own, and what was done counts when time is up."""
    tree = ast.parse((ROOT / SMALL_TESTS).read_text(encoding="utf-8"))
    (files,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FILES"
    )
    return [f"tests/kernels/{name}" for name in ast.literal_eval(files)]
