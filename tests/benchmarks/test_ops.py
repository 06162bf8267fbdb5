"""Ops and attention: providers compute the same, costs are those of the real tensors, and a wrong
provider is not timed."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__, attention, harness
from benchmarks.harness import BOTH, FORWARD, Bench, Calls, Op, Provider, cast, flops, truth
from benchmarks.ops import OPS
from benchmarks.race import allowed_error, error_of, tensors
from benchmarks.results import load
from benchmarks.shapes import MODELS, SEQUENCES, Shape, chosen
from tests.benchmarks.helpers import CPU, make_bench

# no two sizes are equal, so that a transposed one is detected
SMALL = Shape("small", 3, 24, 2, 16, 2, image=(24, 40), patch=8, channels=3, logits=20)
GREY = Shape(
    "grey", 2, 20, 5, 12, 3, image=(21, 35), patch=7, channels=1, mask_ratio=0.6, logits=11
)
HEADS = Shape("heads", 2, 24, 3, tokens=9)
CASES: dict[str, tuple[Op, Shape]] = {
    **{f"{name}, {s.model}": (op, s) for name, op in OPS.items() for s in (SMALL, GREY)},
    "attention": (attention.attention_op(HEADS, CPU, torch.float32), HEADS),
}
EAGER = [
    (case, n) for case, (op, _) in CASES.items() for n, p in op.providers.items() if not p.compiled
]


def made(op: Op, s: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return cast(op, op.make(s, CPU), dtype)


@pytest.mark.parametrize(("case", "provider"), EAGER)
def test_provider_computes_the_reference_in_fp64(case: str, provider: str) -> None:
    op, s = CASES[case]
    inputs = made(op, s, torch.float64)
    exact = Calls(op, s, inputs, op.providers[op.exact]).results()
    got = Calls(op, s, inputs, op.providers[provider]).results()
    assert error_of(got, exact) <= (op.tolerance or 1e-12)
    assert any(bool(t.abs().max() > 0) for t in got)
    assert len(got) >= len(op.leaves) + 1


@pytest.mark.parametrize("case", CASES)
def test_op_passes_the_gate_in_bf16(case: str) -> None:
    op, s = CASES[case]
    inputs = made(op, s, torch.bfloat16)
    exact, eager = truth(op, s, inputs)
    assert eager == 0 or 1e-6 < eager < 0.1, "eager PyTorch in bf16"
    error = error_of(Calls(op, s, inputs, op.providers["ours"]).results(), exact)
    assert error <= (op.tolerance or allowed_error(eager, torch.bfloat16))


def test_published_loss_depends_on_masked_rows_only() -> None:
    op = OPS["masked_reconstruction_loss"]
    inputs = made(op, SMALL)
    index = inputs["ids_masked"].unsqueeze(-1).expand_as(inputs["pred"])
    assert torch.equal(inputs["pred_all"].gather(1, index), inputs["pred"])
    loss = op.providers["published"].call(SMALL, inputs)
    (gradient,) = torch.autograd.grad(loss, inputs["pred_all"])
    kept = inputs["ids_keep"].unsqueeze(-1).expand(-1, -1, SMALL.values)
    assert not gradient.gather(1, kept).any() and gradient.any()


# ---- costs and shapes ----

READ = {
    "random_masking": "noise",
    "restore_tokens": "visible ids_restore mask_token pos",
    "gelu_linear": "x bias weight out_bias",
    "attention": "qkv",
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_bytes_are_those_of_inputs_and_results(name: str, dtype: torch.dtype) -> None:
    op, s = CASES.get(name) or CASES[f"{name}, small"]
    inputs = made(op, s, dtype)
    moved = [inputs[n] for n in READ[name].split()]
    moved += tensors(op.providers["ours"].call(s, inputs))
    expected = sum(t.numel() * t.element_size() for t in moved)
    assert op.moved(s, dtype.itemsize, inputs)[0] == expected


def test_bytes_of_losses_count_masked_pixels_once_as_uint8() -> None:
    masked = SMALL.batch * SMALL.masked
    inputs = made(OPS["sssd_loss"], SMALL, torch.bfloat16)
    moved = OPS["masked_reconstruction_loss"].moved(SMALL, 2, inputs)
    assert moved[0] == masked * (SMALL.values * (2 + 1) + 8)
    assert moved[1] == masked * (SMALL.values * (2 * 2 + 1) + 8)
    both = OPS["sssd_loss"].moved(SMALL, 2, inputs)
    assert both[1] - moved[1] == 4 * SMALL.batch * SMALL.logits * 2 + SMALL.logits * 4


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # B K V D, and the gradient of the weight only
        ("embed_patches, small", 2 * 3 * 3 * 192 * 24, 2 * 3 * 3 * 192 * 24),
        ("gelu_linear, small", 2 * 3 * 16 * 64 * 16, 4 * 3 * 16 * 64 * 16),  # B (1+L) 4E E
        ("linear_reconstruction_loss, small", 2 * 3 * 12 * 16 * 192, 4 * 3 * 12 * 16 * 192),
        ("attention", 4 * 2 * 3 * 9 * 9 * 8, 8 * 2 * 3 * 9 * 9 * 8),  # B H N N d
        ("distillation_loss, small", 0, 0),
    ],
)
def test_flops_are_those_of_the_matrix_products(case: str, forward: int, backward: int) -> None:
    op, s = CASES[case]
    inputs = made(op, s)
    assert flops(op, s, inputs, FORWARD) == forward
    assert flops(op, s, inputs, BOTH) == forward + backward


def test_shapes_are_those_of_the_models() -> None:
    base = MODELS["ViT-B"]
    assert (base.patches, base.keep, base.masked, base.values) == (196, 49, 147, 768)
    args: Any = SimpleNamespace(quick=False, batch=None, shape=None)
    assert chosen(MODELS, args, torch.device("cuda"))[0].name == "ViT-B, 256 images"
    found = {name: (s.tokens, s.heads, s.head_width) for name, s in SEQUENCES.items()}
    assert found["ViT-B encoder"] == (50, 12, 64) and found["ViT-B decoder"] == (197, 16, 32)


# ---- rows ----

EAGER_ONLY = ("published", "tuned", "ours")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench("ops", tmp_path, EAGER_ONLY)


def run(bench: Bench, ours: Any = None) -> dict[tuple[str, str], harness.Row]:
    op = OPS["restore_tokens"]
    if ours is not None:
        op = replace(op, providers={**op.providers, "ours": Provider(ours)})
    rows = harness.run_case(bench, op, SMALL, torch.float32)
    return {(row.phase, row.provider): row for row in rows}


def test_case_has_a_row_for_every_provider_and_phase(bench: Bench) -> None:
    rows = run(bench)
    assert set(rows) == {(phase, name) for phase in (FORWARD, BOTH) for name in EAGER_ONLY}
    for (_, provider), row in rows.items():
        assert row.reason is None and row.time is not None and row.first_call_s is not None
        assert row.time.n == 3 and row.time.median_us > 0
        assert row.time.host_us is not None and row.time.host_us > 0
        assert row.error is not None and row.allowed is not None and row.error <= row.allowed
        assert (row.versus is None) == (provider == "ours")


def _negated(s: Shape, x: dict[str, Tensor]) -> Tensor:
    return -OPS["restore_tokens"].providers["tuned"].call(s, x)


def _wrong_gradient(s: Shape, x: dict[str, Tensor]) -> Tensor:
    other = {**x, "visible": x["visible"].detach() + 2 * (x["visible"] - x["visible"].detach())}
    return OPS["restore_tokens"].providers["tuned"].call(s, other)


def _raises(s: Shape, x: dict[str, Tensor]) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def _out_of_memory(s: Shape, x: dict[str, Tensor]) -> Tensor:
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
        tuned = rows[phase, "tuned"]
        assert tuned.time is not None and tuned.versus is None


def test_provider_that_fails_in_the_race_leaves_the_others_timed(bench: Bench) -> None:
    calls = 0

    def later() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise ValueError("later")

    rows = {n: harness.Row("op", "s", "fp32", FORWARD, n) for n in ("ours", "a")}
    harness.time_rows(bench, rows, {"ours": lambda: None, "a": later})
    assert rows["a"].reason == "fails: ValueError: later" and rows["a"].time is None
    assert rows["ours"].time is not None


def test_cases_after_the_deadline_are_skipped(bench: Bench) -> None:
    bench.deadline = time.monotonic() - 1
    harness.measure_all(bench, [(OPS["random_masking"], SMALL, torch.float32)], "ops")
    label = "random_masking, small, 3 images, fp32"
    assert bench.results.head["skipped"] == [label] and not bench.results.rows


# ---- the command ----


def test_command_writes_a_file_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "Cache", lambda device: harness.Cache(device, 0))
    words = ["attention", "--quick", "--device", "cpu", "--samples", "2", "--shape"]
    path = tmp_path / "a.json"
    providers = ["--provider", "eager", "ours", "sdpa cudnn"]
    assert __main__.main([*words, "ViT-S encoder", *providers, "--json", str(path)]) == 0
    found = load(path)
    assert found["finished"] and found["kind"] == "attention" and len(found["rows"]) == 6
    assert "doubts" in found
    out = capsys.readouterr().out
    assert "eager" in out and "torch has it for CUDA only" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops", "--op", "nothing"], "invalid choice"),
        (["ops", "--samples", "1"], "needs at least 2"),
        (["attention", "--json", "a.txt"], "ends in .json"),
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def fake(args: Any, words: Any, console: Any, deadline: float) -> None:
        assert deadline > time.monotonic() and args.samples == 7
        ran.append(args.kind)
        if args.kind == "step":
            raise RuntimeError("broken step")

    monkeypatch.setattr(__main__, "_measure", fake)
    words = ["all", "--device", "cpu", "--quick", "--samples", "7", "--out", str(tmp_path)]
    assert __main__.main(words) == 2
    assert ran == list(__main__.MEASURED)
    assert "broken step" in capsys.readouterr().err


def test_ops_and_attention_need_torch_numpy_and_triton_only(tmp_path: Path) -> None:
    hidden = "PIL pydantic yaml omegaconf typer transformers matplotlib sklearn safetensors"
    code = f"""
import sys
for name in {hidden!r}.split():
    sys.modules[name] = None  # importing it raises ImportError
from benchmarks.__main__ import main
words = ["ops", "--quick", "--device", "cpu", "--shape", "ViT-S", "--op", "random_masking"]
words += ["--samples", "2", "--provider", "ours", "--json", {str(tmp_path / "a.json")!r}]
sys.exit(main(words))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load(tmp_path / "a.json")["rows"][0]["time"]
