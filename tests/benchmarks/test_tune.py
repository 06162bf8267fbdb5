"""`bench tune`: choices that hold for a block and no longer, the gate and the verdict, tables with and without a device."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mae_kernels
from benchmarks import __main__ as command
from benchmarks import tune
from benchmarks.bench import Bench
from benchmarks.candidates import AS_IS, Candidate, Site, Started, choosing, sites
from benchmarks.measure import Cache, Time, Versus
from benchmarks.occupancy import code_of, occupancy
from benchmarks.results import Results, Row
from benchmarks.shapes import MODELS
from mae_kernels import backend
from mae_kernels._runtime import record_launches
from sssd_fast.run.log import Console
from tools import lint_kernels as lint

H100 = tune.Target(90, 132, 3.35e12, listed=False)
SITES = {
    site.kernel: site for site in sites(MODELS["ViT-B"].at(256))
}  # of attention_kernel the one of the decoder

# ---- choices ----


def launches(site: Site, candidate: Candidate = AS_IS) -> list[Started]:
    call = site.call(tune.inputs_of(site, tune.META, H100.dtype))
    with backend("triton"), record_launches(90) as recorded, choosing(site, candidate) as started:
        call()
    mine = [one for one in recorded if one.kernel.fn.__name__.strip("_") == site.kernel]
    assert [one.launch.constants for one in started] == [one.constants for one in mine], (
        "what is listed is what is launched"
    )
    return started


def test_a_loop_is_seen_in_real_code() -> None:
    """The gather makes its rows at once, the backward of restoring walks over them."""
    found = [
        code_of(launches(SITES[kernel])[0].launch, 90)
        for kernel in ("gather_kernel", "restore_backward_kernel")
    ]
    assert [code.varies for code in found] == [False, True]
    assert all(100 < code.instructions < 1000 for code in found)


def test_a_choice_reaches_grid_and_constants_and_is_gone_afterwards() -> None:
    site = SITES["restore_kernel"]
    before = launches(site)
    (changed,) = launches(site, Candidate({"rows_per_program": lambda device, width: (8, 2)}, 2))
    assert (changed.launch.constants["ROWS"], changed.warps, changed.grid) == (
        8,
        2,
        (256 * 197 // 8, 1),
    )
    (narrow,) = launches(site, Candidate({"column_block": lambda width: 256}))
    assert (narrow.launch.constants["BLOCK_D"], narrow.grid) == (256, (256 * 197 // 8, 2))
    (one,) = launches(site)
    assert (one.label, one.grid) == (before[0].label, before[0].grid)
    assert one.label == "ROWS=4 BLOCK_D=512 warps=4 x12608"


@pytest.mark.parametrize("kernel", SITES)
def test_every_candidate_is_another_launch(kernel: str) -> None:
    """One that changes nothing, on the architecture that the tables were made for, would be the chosen one under another name."""
    site = SITES[kernel]
    (chosen,) = launches(site)
    tried = [
        started.label for candidate in site.candidates for started in launches(site, candidate)
    ]
    assert len(tried) == len(set(tried)) == len(site.candidates)
    assert len({*tried} - {chosen.label}) >= 2


def test_names_come_back_after_an_exception() -> None:
    site = SITES["crop_resize_kernel"]
    before = dict(vars(site.module))

    def interrupted() -> None:
        with choosing(site, Candidate({"TILE": (1, 32, 1)})):
            assert site.module.TILE == (1, 32, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert vars(site.module) == before


def test_a_name_that_is_gone_is_refused_and_nothing_is_left_changed() -> None:
    site = SITES["crop_resize_kernel"]
    before = dict(vars(site.module))
    with (
        pytest.raises(AttributeError, match="TILES"),
        choosing(site, Candidate({"TILE": (1, 32, 1), "TILES": (1, 32, 1)})),
    ):
        pytest.fail("a choice that the op would not read was tried")
    assert vars(site.module) == before


def test_no_function_of_the_package_remembers_a_choice() -> None:
    """A cache would give a choice to calls after the block. The one that there is holds what a device is."""
    found = set()
    for path in Path(mae_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "cache" in ast.unparse(d) for d in node.decorator_list
            ):
                found.add(f"{path.stem}.{node.name}")
    assert found == {"_runtime._capability"}


INTERPRETED = """
import sys
for name in ("pydantic", "yaml", "rich", "transformers", "PIL", "matplotlib", "sklearn", "safetensors", "xformers", "torchao"):
    sys.modules[name] = None  # torch, triton and numpy are enough
from dataclasses import replace
from pathlib import Path
import torch
from benchmarks import measure, tune
from benchmarks.bench import Bench
from benchmarks.candidates import Candidate, sites
from benchmarks.measure import Cache
from benchmarks.results import Results
from benchmarks.shapes import Shape
from mae_kernels import restore
from sssd_fast.run.log import Console
from tools import lint_kernels as lint

torch.set_num_threads(1)
measure.WARM_UP_CALLS, measure.WARM_UP_S = 1, 0.0
device, target = torch.device("cpu"), tune.Target(75, 4, 1e9)
found = Results("tune", device, [target.dtype], words=["tune"], path=Path(sys.argv[1]), ceilings={})
bench = Bench(device, Console(), found, Cache(device, 0), samples=2, passes=1)
small = sites(Shape("small", 1, 32, 2, 32, 2, image=(16, 16), patch=8, channels=3, logits=40))
real, timed = restore._launch_restore, tune.time_rows

def wrong(*given):
    return -real(*given)

def broken(device, width):
    raise RuntimeError("no such tile")

def time_rows(bench, rows, calls, ours):
    # the interpreter is slow: one op's times are enough, and of the others the gate
    if next(iter(rows.values())).case == "restore_tokens":
        timed(bench, rows, calls, ours=ours)

tune.time_rows = time_rows
planted = (Candidate({"_launch_restore": wrong}, 32), Candidate({"rows_per_program": broken}), Candidate({"gone": 1}))
kernels = {site.kernel: site for site in small if site.op in sys.argv[2:]}
kernels["restore_kernel"] = replace(kernels["restore_kernel"], candidates=planted)
tune.measure_sites(bench, list(kernels.values()), target)
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Rows and printed tables of a run on the CPU, its kernels interpreted, where torch, triton and numpy are all there is."""
    path = tmp_path_factory.mktemp("tune") / "rows.json"
    ops = ["restore_tokens", "gather_patches"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "KINETO_LOG_LEVEL": "6"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(path), *ops],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())["rows"], done.stdout


def test_every_candidate_gives_the_right_result(
    interpreted: tuple[list[dict[str, Any]], str],
) -> None:
    rows = [row for row in interpreted[0] if row["more"]["kernel"] != "restore_kernel"]
    for row in rows:
        assert row["reason"] is None, row
        assert row["error"] <= row["allowed"] < 0.02
        assert (row["time"] is not None) == (row["case"] == "restore_tokens")
    count = Counter(row["more"]["kernel"] for row in rows)
    assert set(count) == {"restore_backward_kernel", "gather_kernel"} and min(count.values()) >= 5
    restored = [row for row in rows if row["case"] == "restore_tokens"]
    (best,) = [row for row in restored if row["more"].get("best")]
    assert best["time"]["median_us"] == min(row["time"]["median_us"] for row in restored)
    assert restored[0]["more"]["chosen"]
    assert restored[0]["more"]["verdict"] in ("keep", f"change to {best['provider']}")


def test_who_is_wrong_or_fails_is_a_row_without_a_time(
    interpreted: tuple[list[dict[str, Any]], str],
) -> None:
    chosen, wrong, broken, gone = [
        row for row in interpreted[0] if row["more"]["kernel"] == "restore_kernel"
    ]
    assert chosen["reason"] is None and chosen["more"]["verdict"] == "keep"
    assert "off by 2.0e+00 of the largest" in wrong["reason"] and wrong["time"] is None
    assert broken["reason"] == "fails: RuntimeError: no such tile"
    assert gone["reason"].startswith("fails: AttributeError") and "gone" in gone["reason"]
    assert f"  {wrong['provider']}: its results are off by" in interpreted[1]
    assert "/ chosen" in interpreted[1] and "  keep" in interpreted[1]


# ---- rows ----


def row(name: str, median: float | None, verdict: str | None = None) -> Row:
    time = None if median is None else Time(median, median, median, 5)
    ratio = None if verdict is None else Versus(0.9, 0.89, 0.91, verdict)
    return Row(
        "op",
        "s",
        "bf16",
        "forward",
        name,
        time=time,
        versus=ratio,
        more={"chosen": name == "chosen"},
    )


@pytest.mark.parametrize(
    ("rows", "best", "said"),
    [
        ([row("chosen", 10.0), row("a", 9.9, "same"), row("b", 12.0, "slower")], "a", "keep"),
        (
            [row("chosen", 10.0), row("a", 9.0, "faster"), row("b", 9.5, "faster")],
            "a",
            "change to a",
        ),
        ([row("chosen", 10.0), row("a", 11.0, "slower")], "chosen", "keep"),
        ([row("chosen", None), row("a", 11.0)], "a", "change to a"),
    ],
)
def test_the_chosen_launch_is_kept_unless_it_is_beaten(
    rows: list[Row], best: str, said: str
) -> None:
    tune.decide(rows)
    assert [one.provider for one in rows if one.more.get("best")] == [best]
    assert rows[0].more["verdict"] == said


def test_nothing_timed_decides_nothing() -> None:
    rows = [row("chosen", None), row("a", None)]
    tune.decide(rows)
    assert not any("best" in one.more or "verdict" in one.more for one in rows)


def test_what_spills_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """256 values in each thread do not fit its registers."""
    spilling = Candidate({"rows_per_program": lambda device, width: (16, 1)}, 1)
    site = replace(SITES["gather_kernel"], candidates=(spilling,))
    chosen, refused = tune.site_rows(Console(), site, H100, None)
    assert chosen.reason is None
    assert (
        refused.reason is not None
        and refused.reason.startswith("refused: ")
        and "bytes of stack" in refused.reason
    )
    tune.show(Console(), site, H100, [chosen, refused])
    assert f"  ROWS=16 warps=1 x784: {refused.reason}" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    site = replace(SITES["gather_kernel"], candidates=())

    def judged(registers: int, *problems: str) -> Callable[..., lint.Row]:
        return lambda op, launch, arch, wide: lint.Row(
            op, site.kernel, arch, registers, 0, 0, 16, problems
        )

    monkeypatch.setattr(lint, "judge", judged(32, "233000 bytes of shared memory, limit 227 KiB"))
    (found,) = tune.site_rows(Console(), site, H100, None)
    assert found.reason == "refused: 233000 bytes of shared memory, limit 227 KiB"
    monkeypatch.setattr(lint, "judge", judged(300))
    monkeypatch.setattr(Started, "warps", 16)
    (found,) = tune.site_rows(Console(), site, H100, None)
    assert found.reason == "refused: no block fits an SM (registers)"


def test_when_time_is_up_the_chosen_launch_is_all_that_is_looked_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = SITES["gather_kernel"]
    (found,) = tune.site_rows(Console(), site, H100, 0.0)
    assert found.more["chosen"] and found.reason is None
    told = capsys.readouterr().err
    assert (
        f"{site.name}: time was up before {len(site.candidates)} of {len(site.candidates) + 1} candidates"
        in told
    )


def test_an_op_that_is_not_begun_in_time_is_named_and_one_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = torch.device("cpu")
    document = Results("tune", device, [], words=["tune"], path=tmp_path / "rows.json", ceilings={})
    bench = Bench(device, Console(), document, Cache(device, 0), deadline=0.0)
    tune.measure_sites(bench, [SITES["gather_kernel"], SITES["masking_kernel"]], H100)
    left = json.loads((tmp_path / "rows.json").read_text())["left_out"]
    assert left == [SITES["gather_kernel"].name, SITES["masking_kernel"].name]

    def measured(bench: Bench, found: list[Site], target: tune.Target) -> None:
        if found[0].op == "gather_patches":
            raise RuntimeError("no memory for the truth")
        done.append(found[0].op)

    done: list[str] = []
    monkeypatch.setattr(tune, "measure_op", measured)
    tune.measure_sites(bench, [SITES["gather_kernel"], SITES["masking_kernel"]], H100)
    assert done == ["random_masking"]
    left = json.loads((tmp_path / "rows.json").read_text())["left_out"]
    assert left[2:] == ["gather_patches: fails: RuntimeError: no memory for the truth"]
    assert "gather_patches: fails: RuntimeError: no memory for the truth" in capsys.readouterr().err


def test_old_cards_have_no_kernels_for_attention(capsys: pytest.CaptureFixture[str]) -> None:
    left = tune._with_kernels(Console(), list(SITES.values()), tune.Target(75, 40, 3e11))
    assert {site.op for site in left} == set(tune.NAMED) - {"attention"}
    assert "attention: has no kernels before sm_80" in capsys.readouterr().out
    assert tune.Target(75, 40, 3e11).dtype == torch.float16


# ---- the command ----


def test_a_prediction_is_a_table_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a folder" / "tune.json"
    assert (
        command.main(["tune", "--predict", "sm_90", "--op", "random_masking", "--json", str(path)])
        == 0
    )
    shown = capsys.readouterr().out
    bytes_ = 256 * 196 * (4 + 2 * 8 + 1)  # noise in fp32, two lists of ids, the mask
    assert f"{bytes_ / 1e6:.2f} MB to move, at least {bytes_ / 3.35e6:.3f} µs" in shown
    assert "H100 SXM: 132 SMs, 3.35 TB/s" in shown
    document = json.loads(path.read_text())
    assert (document["schema"], document["finished"]) == ("sssd_fast.tune/1", True)
    assert document["settings"] == {"predicted_for": "sm_90", "sms": 132, "bytes_per_s": 3.35e12}
    rows = document["rows"]
    assert len(rows) == len(SITES["masking_kernel"].candidates), (
        "the chosen launch is also among the candidates"
    )
    chosen = rows[0]
    assert chosen["provider"] == "warps=4 x256" and chosen["bytes"] == pytest.approx(
        bytes_, rel=1e-4
    )
    for one in rows:
        more, warps = one["more"], int(one["provider"].split("warps=")[1].split()[0])
        assert one["reason"] is None and one["time"] is None and more["widest"] == 4
        fits = occupancy(90, more["registers"], more["shared"], warps)
        assert (more["blocks"], more["warps"], more["limit"]) == (
            fits.blocks,
            fits.warps,
            fits.limit,
        )
        programs = int(one["provider"].rpartition("x")[2])
        assert more["waves"] == pytest.approx(programs / (132 * fits.blocks), rel=1e-4)
        assert not more["varies"]
        assert more["cycles"] == pytest.approx(
            more["instructions"] * warps * programs / (4 * 132), rel=1e-4
        )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--op", "nonsense"], "invalid choice: 'nonsense'"),
        (["--predict", "sm_42"], "invalid choice: 'sm_42'"),
        (["--predict", "sm_90", "--batch", "many"], "invalid int value: 'many'"),
    ],
)
def test_unknown_names_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["tune", *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--predict", "sm_90", "--sms", "0"], "--sms is 0, needs at least 1"),
        (["--predict", "sm_90", "--bandwidth", "-3"], "--bandwidth is -3, needs at least 0.001"),
        (["--minutes", "0"], "--minutes is 0, needs at least 0.01"),
        (["--sms", "132"], "--sms and --bandwidth are of a prediction"),
        (["--predict", "sm_90", "--json", "k.txt"], "needs a file name that ends in .json"),
    ],
)
def test_bad_values_are_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["tune", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("HAVE_TRITON", False, "not installed"), ("INTERPRET", True, "unset it")],
)
def test_without_a_compiler_it_says_what_to_do(
    name: str,
    value: bool,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tune, name, value)
    assert command.main(["tune", "--predict", "sm_90"]) == 2
    assert told in capsys.readouterr().err


def test_without_a_device_it_points_to_the_prediction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tune"]) == 2
    error = capsys.readouterr().err
    assert "torch finds none here" in error and "--predict sm_90" in error
