"""Ops and attention: providers compute the same, costs are those of the real tensors, and a wrong
provider is not timed."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mae_kernels as mk
from benchmarks import __main__, harness
from benchmarks import ops as module
from benchmarks.harness import BOTH, FORWARD, Bench, Calls, Op, Provider, costs, truth
from benchmarks.race import error_of
from benchmarks.results import load
from tests.benchmarks.helpers import CPU, make_bench

FP32, BF16 = torch.float32, torch.bfloat16
# the small samples that the published code supports too: biases, both options of the losses
SMALL = [
    sample
    for sample in mk.samples()
    if sample.size == "small"
    and "without bias" not in sample.name
    and sample.name not in ("grey 192", "1500 logit")
]
SMALL = [s for s in SMALL if s.op != "attention"] + [module.attention_sample(9, 3, 8)]


def op_of(name: str, dtype: torch.dtype = FP32) -> Op:
    sample = next(sample for sample in SMALL if str(sample).startswith(name))
    return module.op_of(sample, CPU, dtype, 2)


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_provider_computes_the_published_form_in_fp64(sample: mk.Sample) -> None:
    op = module.op_of(sample, CPU, torch.float64, 2)
    inputs = op.inputs().exact()
    exact = Calls(inputs, op.providers["published"]).results()
    assert len(exact) >= len(sample.gradients) + 1
    assert any(bool(t.abs().max() > 0) for t in exact)
    for name, provider in op.providers.items():
        if not provider.compiled:
            error = error_of(Calls(inputs, provider).results(), exact)
            assert error <= (op.tolerance or 1e-6), name  # some losses are fp32 numbers


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_op_passes_the_gate_in_bf16(sample: mk.Sample) -> None:
    op = module.op_of(sample, CPU, BF16, 2)
    inputs = op.inputs()
    exact, allowed = truth(op, inputs)
    assert error_of(Calls(inputs, op.providers["ours"]).results(), exact) <= allowed < 0.1


def test_published_masking_sorts_by_noise() -> None:
    noise = torch.rand(5, 16)
    ids, restore, masked, mask = module.eager.random_masking(noise, 4)
    for b in range(5):
        order = sorted(range(16), key=lambda i: float(noise[b, i]))
        assert [*ids[b].tolist(), *masked[b].tolist()] == order
        assert [order[place] for place in restore[b].tolist()] == list(range(16))
        assert [i for i in range(16) if mask[b, i] == 0] == sorted(order[:4])


# ---- costs ----


@pytest.mark.parametrize(
    ("name", "forward", "both", "moved"),
    [
        # qkv 2 x 9 x 3 x 24 values, result a third of it
        ("attention", 4 * 2 * 3 * 9 * 9 * 8, 12 * 2 * 3 * 9 * 9 * 8, (4 * 432, 11 * 432)),
        # x 2 x 7 x 37, bias 37, weight 19 x 37, out_bias 19, result 2 x 7 x 19
        ("gelu_linear 37", 2 * 14 * 37 * 19, 6 * 14 * 37 * 19, (1543, 1543 + 1277 * 2 + 266)),
    ],
)
def test_costs_are_those_of_products_and_tensors(
    name: str, forward: int, both: int, moved: tuple[int, int]
) -> None:
    op = op_of(name)
    inputs = op.inputs()
    assert costs(op, inputs, FORWARD) == (4 * moved[0], forward)
    assert costs(op, inputs, BOTH) == (4 * moved[1], both)


# ---- rows ----

EAGER_ONLY = ("published", "plain", "ours")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench("ops", tmp_path, EAGER_ONLY)


def run(bench: Bench, ours: Any = None) -> dict[tuple[str, str], harness.Row]:
    op = op_of("restore_tokens")
    if ours is not None:
        op = replace(op, providers={**op.providers, "ours": Provider(ours)})
    return {(row.phase, row.provider): row for row in harness.run_op(bench, op)}


def test_op_has_a_row_for_every_provider_and_phase(bench: Bench) -> None:
    rows = run(bench)
    assert set(rows) == {(phase, name) for phase in (FORWARD, BOTH) for name in EAGER_ONLY}
    for (_, provider), row in rows.items():
        assert row.reason is None and row.time is not None and row.first_call_s is not None
        assert row.time.n == 4 and row.time.median_us > 0 and row.time.host_us > 0
        assert row.error is not None and row.allowed is not None and row.error <= row.allowed
        assert (row.versus is None) == (provider == "ours")


def _negated(**given: Any) -> Tensor:
    return -mk.restore_tokens(**given)


def _wrong_gradient(visible: Tensor, **given: Any) -> Tensor:
    return mk.restore_tokens(visible.detach() + 2 * (visible - visible.detach()), **given)


def _raises(**given: Any) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def _out_of_memory(**given: Any) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate")


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (_negated, "wrong: its error is 2.0e+00"),
        (_wrong_gradient, "wrong: its error is 1.0e+00"),
        (_raises, "fails: RuntimeError: no kernel image"),
        (_out_of_memory, "out of memory"),
    ],
)
def test_wrong_or_failing_provider_is_not_timed_and_the_others_are(
    bench: Bench, ours: Any, reason: str
) -> None:
    rows = run(bench, ours)
    for phase in (FORWARD, BOTH):
        assert str(rows[phase, "ours"].reason).startswith(reason)
        assert rows[phase, "ours"].time is None
        plain = rows[phase, "plain"]
        assert plain.time is not None and plain.versus is None


def test_op_whose_reference_fails_leaves_the_next_op_measured(bench: Bench) -> None:
    broken = op_of("restore_tokens")
    broken = replace(broken, providers={**broken.providers, "published": Provider(_raises)})
    harness.measure_all(bench, [broken, op_of("random_masking")], "ops")
    by_op: dict[str, list[dict[str, Any]]] = {}
    for row in bench.results.rows:
        by_op.setdefault(row["case"], []).append(row)
    failed, measured = by_op["restore_tokens"], by_op["random_masking"]
    reason = "fp64 reference: fails: RuntimeError: no kernel image"
    assert {row["reason"] for row in failed if row["provider"] in broken.providers} == {reason}
    assert any(row["time"] for row in measured) and not any(row["time"] for row in failed)


def test_provider_that_fails_in_the_race_leaves_the_others_timed(bench: Bench) -> None:
    calls = 0

    def later() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise ValueError("later")

    rows = {n: harness.Row("op", "s", "fp32", FORWARD, n) for n in ("ours", "a")}
    harness.time_rows(bench, rows, {"ours": lambda: None, "a": later}, "ours")
    assert rows["a"].reason == "fails: ValueError: later" and rows["a"].time is None
    assert rows["ours"].time is not None


def test_ops_after_the_deadline_are_skipped(bench: Bench) -> None:
    bench.deadline = time.monotonic() - 1
    harness.measure_all(bench, [op_of("random_masking")], "ops")
    label = "random_masking 37 patches, 2 images, fp32"
    assert bench.results.head["skipped"] == [label] and not bench.results.rows


# ---- the command ----


def test_command_writes_a_file_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "Cache", lambda device: harness.Cache(device, 0))
    words = ["attention", "--quick", "--device", "cpu", "--samples", "2", "--batch", "2"]
    path = tmp_path / "a.json"
    providers = ["--provider", "published", "ours", "sdpa cudnn"]
    assert __main__.main([*words, *providers, "--out", str(path)]) == 0
    found = load(path)
    assert found["finished"] and found["kind"] == "attention" and "doubts" in found
    assert {row["dtype"] for row in found["rows"]} == {"fp32", "bf16"} and len(found["rows"]) == 12
    out = capsys.readouterr().out
    assert "published" in out and "torch has it for CUDA only" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops", "--op", "nothing"], "invalid choice"),
        (["ops", "--samples", "1"], "needs at least 2"),
        (["compare", "nowhere.json", "a.json"], "nowhere.json: no such file"),
        (["report", "--results", "nowhere"], "nowhere: not a folder"),
    ],
)
def test_bad_arguments_end_with_a_message_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = __main__.main(words)
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == 2
    assert message in capsys.readouterr().err


def test_all_runs_the_kinds_in_order_and_survives_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def fake(args: Any, words: Any, console: Any) -> None:
        assert 0 < args.minutes <= 9 and args.samples == 7
        ran.append(args.kind)
        if args.kind == "step":
            raise RuntimeError("broken step")

    monkeypatch.setattr(__main__, "_measure", fake)
    assert __main__.main(["all", "--device", "cpu", "--quick", "--samples", "7"]) == 1
    assert ran == list(__main__.MEASURED)
    assert "broken step" in capsys.readouterr().err


def test_ops_and_attention_need_torch_numpy_and_triton_only(tmp_path: Path) -> None:
    hidden = "PIL pydantic yaml omegaconf typer transformers matplotlib sklearn safetensors"
    code = f"""
import sys
for name in {hidden!r}.split():
    sys.modules[name] = None  # importing it raises ImportError
from benchmarks.__main__ import main
words = ["ops", "--quick", "--device", "cpu", "--op", "random_masking", "--dtype", "fp32"]
words += ["--samples", "2", "--provider", "ours", "--out", {str(tmp_path / "a.json")!r}]
sys.exit(main(words))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load(tmp_path / "a.json")["rows"][0]["time"]
