"""From cases to rows: the gate before any time, failures as rows, results as they come, and the command around them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import attention, kernels, results, terminal
from benchmarks.bench import Bench
from benchmarks.measure import Cache
from benchmarks.op import Op, Provider
from benchmarks.registry import OPS
from benchmarks.results import Results
from benchmarks.shapes import Shape
from sssd_fast.run.log import Console

CPU = torch.device("cpu")
SMALL = Shape("small", 3, 24, 2, 16, 2, image=(24, 40), patch=8, channels=3, logits=20)
RESTORE = OPS["restore_tokens"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    found = Results("kernels", CPU, (), words=["kernels"], path=tmp_path / "rows.json", ceilings={})
    return Bench(CPU, Console(enabled=False), found, Cache(CPU, 0), samples=4)


def rows_of(bench: Bench, op: Op, s: Shape = SMALL) -> dict[tuple[str, str], Any]:
    return {(row.phase, row.provider): row for row in kernels.run_case(bench, op, s, torch.float32)}


def test_a_case_has_a_row_for_everybody(bench: Bench) -> None:
    rows = rows_of(bench, RESTORE)
    assert set(rows) == {
        (phase, name)
        for phase in ("forward", "forward+backward")
        for name in (*RESTORE.providers, *RESTORE.absent)
    }
    for (phase, name), row in rows.items():
        if name == "library":
            assert (row.time, row.reason, row.error) == (None, "no library has it", None)
            continue
        assert row.reason is None
        assert row.time.n == 4 and row.time.gap is not None
        assert row.error <= row.allowed < 1e-5
        assert row.first_call_s > 0 and row.peak_bytes > 0
        assert (row.versus is None) == (name == "ours")
        assert row.bytes == RESTORE.cost(SMALL, 4, {}).forward_bytes or phase == "forward+backward"
    assert (
        rows["forward", "tuned compiled"].first_call_s > 10 * rows["forward", "tuned"].first_call_s
    ), "it compiles"


def planted(call: Any) -> Op:
    return replace(
        RESTORE,
        providers={"tuned": RESTORE.providers["tuned"], "ours": Provider(call)},
        exact="tuned",
    )


def test_a_wrong_sign_gets_no_time(bench: Bench) -> None:
    rows = rows_of(bench, planted(lambda s, x: -RESTORE.providers["tuned"].call(s, x)))
    for phase in ("forward", "forward+backward"):
        assert rows[phase, "ours"].time is None
        assert "off by 2.0e+00 of the largest value" in rows[phase, "ours"].reason
        assert rows[phase, "ours"].error == pytest.approx(2.0)
        assert rows[phase, "tuned"].time is not None and rows[phase, "tuned"].versus is None


def test_a_wrong_gradient_alone_gets_no_time(bench: Bench) -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] / 2

    rows = rows_of(bench, planted(lambda s, x: Halved.apply(RESTORE.providers["tuned"].call(s, x))))
    assert (
        rows["forward", "ours"].time is None and "off by 5.0e-01" in rows["forward", "ours"].reason
    )


def test_a_provider_that_raises_is_a_row_with_the_reason(bench: Bench) -> None:
    def broken(s: Shape, x: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no kernel for this\nand more lines")

    rows = rows_of(bench, planted(broken))
    assert rows["forward+backward", "ours"].reason == "fails: RuntimeError: no kernel for this"
    assert rows["forward+backward", "tuned"].time is not None


def test_too_little_memory_for_the_reference_is_said(bench: Bench) -> None:
    def full(s: Shape, device: torch.device) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = rows_of(bench, replace(RESTORE, make=full))
    assert {row.reason for (_, name), row in rows.items() if name != "library"} == {
        "out of memory in the fp64 reference"
    }


def test_what_is_there_already_is_not_measured_again_and_what_is_left_out_is_named(
    bench: Bench,
) -> None:
    op = replace(RESTORE, providers={"tuned": RESTORE.providers["tuned"]}, exact="tuned")
    cases = [(op, SMALL, torch.float32), (op, SMALL.at(5), torch.float32)]
    kernels.measure_all(bench, cases[:1], "first")
    count = len(bench.results.rows)
    bench.deadline = 0.0
    kernels.measure_all(bench, cases, "again")
    assert len(bench.results.rows) == count
    assert bench.results.head["left_out"] == ["restore_tokens, small, 5 images, fp32"]
    bench.deadline = None
    kernels.measure_all(bench, cases, "later")
    assert len(bench.results.rows) == 2 * count
    assert results.load(bench.results.path)["left_out"] == []


def test_backends_that_cannot_be_are_named(bench: Bench) -> None:
    site = replace(attention.SITES["odd encoder"], batch=2, tokens=5)
    op = attention.attention_op(site, CPU, torch.float32)
    bench.only = ["sdpa flash", "sdpa cudnn", "sdpa efficient", "xformers", "ours", "eager"]
    rows = rows_of(bench, op, site)
    assert rows["forward", "sdpa cudnn"].reason == "torch has no such backend for the CPU"
    assert rows["forward", "xformers"].reason == "its attention needs an NVIDIA GPU"
    assert rows["forward+backward", "sdpa flash"].time is not None
    assert rows["forward+backward", "eager"].versus.ratio > 0
    assert ("forward", "sdpa math") not in rows


def test_who_has_no_figure_stands_below_the_table_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        asdict(results.Row("op", "B, 1", "fp32", "forward", name, reason=why))
        for name, why in (("a", "broken"), ("b", None))
    ]
    rows[1]["time"] = {
        "median_us": 1500.0,
        "p20_us": 1400.0,
        "p80_us": 1600.0,
        "n": 5,
        "again_us": None,
        "gap": None,
    }
    head = {
        "kind": "kernels",
        "device": {"name": "chip"},
        "versions": {"torch": "2"},
        "ceilings": {},
    }
    terminal.show(Console(), head, rows)
    lines = [
        " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()
    ]
    assert lines[0] == "---- kernels: chip, torch 2 ----"
    assert lines[1:3] == ["op, B, 1, fp32, forward", "provider median p20 p80"]
    assert lines[-2:] == ["b 1.50 ms 1.40 ms 1.60 ms", "a: broken"]


# ---- the command ----

WORDS = ["--device", "cpu", "--samples", "2", "--threads", "1"]


def test_the_command_writes_a_file_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "a folder" / "k.json"
    words = [
        "kernels",
        *WORDS,
        "--op",
        "random_masking",
        "--shape",
        "odd",
        "--batch",
        "2",
        "--provider",
        "tuned",
        "ours",
    ]
    assert command.main([*words, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert (document["schema"], document["kind"], document["finished"]) == (
        results.SCHEMA,
        "kernels",
        True,
    )
    assert [row["provider"] for row in document["rows"]] == ["tuned", "ours"]
    assert document["settings"]["samples"] == document["rows"][0]["time"]["n"] == 2
    assert document["ceilings"]["copy_bytes_per_s"] > 1e8
    shown = capsys.readouterr().out
    assert "random_masking, odd, 2 images, fp32, forward" in shown
    columns = next(line for line in shown.splitlines() if line.startswith("provider"))
    assert "median" in columns and "against ours" in columns
    table = shown[shown.index(columns) :].splitlines()
    assert [line.split()[0] for line in table[2:4]] == ["tuned", "ours"]
    assert max(len(line) for line in table[:4]) <= 110, "wider than a terminal"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kernels", "--op", "nonsense"], "invalid choice: 'nonsense'"),
        (["kernels", "--samples", "1"], "--samples: got 1, needs at least 2"),
        (["attention", "--minutes", "-1"], "--minutes: got -1, needs at least"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_bad_arguments_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_device_that_is_not_there_and_a_bad_file_name_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["kernels", *WORDS, "--json", "k.txt"]) == 2
    assert "needs a file name that ends in .json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(["kernels", "--device", "cuda"]) == 2
        assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_all_takes_turns_within_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in order, one file for each kind, a failing kind does not stop the others, and no stage begins after its end."""
    begun: list[tuple[str, float | None]] = []

    def run(kind: str, args: Any, found: Results, console: Console, deadline: float | None) -> None:
        begun.append((kind, deadline))
        if kind == "step":
            raise command.SssdError("no step today")

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(command, "_loader", lambda words: begun.append(("loader", None)))
    monkeypatch.setattr(
        results.machine, "ceilings", lambda device, dtypes: {"copy_bytes_per_s": 1.0}
    )
    assert command.main(["all", *WORDS, "--minutes", "60", "--quick"]) == 2
    assert [kind for kind, _ in begun] == [kind for kind, _, _ in command.STAGES]
    deadlines = [d for _, d in begun if d is not None]
    assert deadlines == sorted(deadlines) and len(deadlines) == len(begun) - 1
    written = sorted((tmp_path / "quick").glob("*.json"))
    assert len(written) == len({kind for kind, _, _ in command.STAGES} - {"loader"})
    begun.clear()
    assert command.main(["all", *WORDS, "--minutes", "0.02"]) == 0
    assert begun == []


def test_a_run_that_is_interrupted_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = kernels.run_case

    def interrupted(bench: Bench, op: Op, *more: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(op.name)
        return real(bench, op, *more)

    monkeypatch.setattr(kernels, "run_case", interrupted)
    out = tmp_path / "k.json"
    words = [
        "kernels",
        *WORDS,
        "--shape",
        "odd",
        "--batch",
        "1",
        "--provider",
        "ours",
        "--json",
        str(out),
    ]
    assert command.main(words) == 130
    document = results.load(out)
    assert document["finished"] is False
    assert {row["case"] for row in document["rows"]} == set(done)


BARE = """
import sys
for name in ("pydantic", "yaml", "rich", "transformers", "PIL", "matplotlib", "sklearn", "safetensors", "xformers", "torchao"):
    sys.modules[name] = None
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_torch_and_triton_alone_are_enough(tmp_path: Path) -> None:
    """Ops and attention are measured on such a machine; the trainer's models are left out with a note."""
    for kind, more in (
        ("kernels", ["--op", "random_masking"]),
        ("step", []),
        ("memory", []),
        ("loader", []),
    ):
        out = tmp_path / f"{kind}.json"
        words = [kind, *(WORDS if kind != "loader" else []), "--quick", *more, "--json", str(out)]
        done = subprocess.run(
            [sys.executable, "-c", BARE, *words], capture_output=True, text=True, timeout=200
        )
        if kind == "loader":
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(
                r"error: bench loader needs \w+, which is not installed: .*\n", done.stderr
            )
            continue
        assert done.returncode == 0, done.stderr
        document = results.load(out)
        if kind == "kernels":
            assert all(row["time"] for row in document["rows"] if row["provider"] == "ours")
        else:
            assert "pydantic" in str(document["missing"]) and document["rows"] == []
            assert "pydantic" in done.stdout
