"""Tables from result files: numbers, shares of ceilings, which rows are shown, and what is said of them."""

from __future__ import annotations

import math

import pytest

from benchmarks import formats, machine, report, rows, tables
from tests.benchmarks.documents import GPU, document, kernels, loader, memory, race, row, step

# ---- numbers ----


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.0123, "0.0123 µs"), (1.0, "1.00 µs"), (12.34, "12.3 µs"), (999.4, "999 µs"), (999.6, "1.00 ms"), (12345, "12.3 ms"),
        (2.5e6, "2.50 s"),
    ],
)  # fmt: skip
def test_times_have_three_digits_and_the_unit_that_fits(us: float, text: str) -> None:
    assert formats.time_text(us) == text


def test_sizes_rates_and_shares() -> None:
    assert formats.size_text(2_345_678) == "2.35 MB"
    assert formats.size_text(47.5e9) == "47.5 GB"
    assert formats.rate_text(4.3e12, "B/s") == "4.30 TB/s"
    assert formats.rate_text(96e9, "FLOP/s") == "96.0 GFLOP/s"
    assert [formats.percent(x) for x in (0.634, 0.0042, 0.999, 1.274)] == [
        "63 %",
        "0.42 %",
        "99.9 %",
        "127 %",
    ]
    assert [formats.significant(x) for x in (0.0, 0.9996, 1234.5, -0.04567)] == [
        "0",
        "1.00",
        "1,230",
        "-0.0457",
    ]
    assert formats.markdown(["a"], [["b|<c>\nd"]]).splitlines()[2] == "| b\\|&lt;c> d |"


# ---- what a row says ----


@pytest.mark.parametrize(
    ("moved", "flops", "share", "ceiling"),
    [
        (1e9, 0.0, 0.5, "copy"),  # 1 GB in 1 ms = 1 TB/s of 2 TB/s
        (1e8, 3e11, 0.375, "matmul"),  # 0.1 TB/s = 5 % of copy; 300 TFLOP/s of 800
        (1.6e9, 3e11, 0.8, "copy"),
    ],
)
def test_the_share_is_of_the_ceiling_that_is_nearer(
    moved: float, flops: float, share: float, ceiling: str
) -> None:
    one = row("gelu_linear", "ours", 1000.0, dtype="bf16", bytes=moved, flops=flops)
    found = rows.share_of_ceiling(document("kernels", [one]), one)
    assert found is not None
    assert (found.share, found.ceiling) == (pytest.approx(share), ceiling)
    assert found.per_s == pytest.approx((moved if ceiling == "copy" else flops) / 1e-3)


def test_no_share_without_a_time_or_without_a_ceiling_of_the_dtype() -> None:
    for one in (
        row("x", "ours", None, bytes=1e9),
        row("x", "ours", 1.0, dtype="fp16", flops=1e9),
        row("x", "ours", 1.0),
    ):
        assert rows.share_of_ceiling(document("kernels", [one]), one) is None


def test_the_representative_is_vit_b_at_its_largest_batch_forward_and_backward() -> None:
    found = kernels()
    for shape, batch in (
        ("ViT-L, 1024 images", 1024),
        ("ViT-B, CT, 1024 images", 1024),
        ("ViT-B, 2048 images", 2048),
    ):
        us = None if batch == 2048 else 1.0  # nothing ran at the largest batch
        found["rows"].append(
            row(
                "gelu_linear",
                "ours",
                us,
                shape=shape,
                phase="forward+backward",
                sizes={"batch": batch},
            )
        )
    chosen = {group.case: group for group in rows.representative(found)}
    assert chosen["gelu_linear"].shape == "ViT-B, 256 images"
    assert chosen["gelu_linear"].phase == "forward+backward"


def test_the_short_table_shows_every_provider_and_where_ours_loses() -> None:
    lines = {
        line.split("`")[1]: line for line in tables.short(kernels()).splitlines() if "`" in line
    }
    assert lines["restore_tokens"] == (
        "| `restore_tokens` | ViT-B, 256 images, fp32 | forward+backward | 12.8 ms | 6.72 ms | 2.56 ms | no time | 3.20 ms | 3.10 ms "
        "| 1.25× slower than tuned compiled |"
    )
    assert lines["gelu_linear"].endswith("| 1.50× faster than tuned compiled |"), (
        "300 us against 200 us"
    )


def test_attention_shows_every_site_at_its_largest_batch_with_the_best_sdpa() -> None:
    found = []
    for batch, us in ((64, 100.0), (256, 400.0), (1024, "out of memory")):
        times = {
            "sdpa flash": us,
            "sdpa cudnn": us if isinstance(us, str) else 0.9 * us,
            "xformers": "not installed",
            "ours": us,
        }
        sizes = {"batch": batch, "tokens": 50, "heads": 12, "head_width": 64}
        shape = f"ViT-B encoder [{batch}, 50, 12x64]"
        found += race(
            "attention", times, shape=shape, sizes=sizes, sources=machine.sources_hash("attention")
        )
    lines = tables.short(document("attention", found)).splitlines()[2:]
    assert lines == [
        "| ViT-B encoder [256, 50, 12x64], fp32 | forward | - | - | 360 µs (cudnn) | no time | 400 µs | - | 1.11× slower than sdpa cudnn |"
    ]


def test_the_full_table_has_every_row_with_error_share_and_note() -> None:
    found = kernels()
    text = tables.full(found)
    for case in ("restore_tokens", "gelu_linear"):
        assert f"#### `{case}`" in text
    assert sum(line.startswith("| ViT-B") for line in text.splitlines()) == len(found["rows"])
    line = next(line for line in text.splitlines() if "| published |" in line)
    # 8 MB in 400 us = 20 GB/s of 2 TB/s
    assert (
        "| 400 µs | 384 µs to 416 µs | 50 | +1.0% | 4.00 (3.88 to 4.12) slower | 1.0e-07 / 3.0e-06 | 20.0 GB/s, 1.0 % copy |"
        in line
    )
    assert "| 3.00 MB |" in line
    assert text.count("no library has this op") == 8


def test_the_overview_counts_losses_and_takes_the_geometric_mean() -> None:
    """Against torch.compile of the tuned reference: 0.8 twice (lost), 1.5 twice."""
    lines = {
        line.split(" | ")[2]: line
        for line in tables.overview([kernels()]).splitlines()
        if line.startswith("| kernels")
    }
    mean = math.sqrt(0.8 * 1.5)
    assert lines["tuned compiled"].endswith(f"| {mean:.2f}× | 0.800 to 1.50 | 4 | 2 |")
    assert lines["published"].endswith("| 4.00× | 4.00 to 4.00 | 4 | 0 |")
    assert "library" not in lines, "it has no time anywhere"


def test_what_was_measured_before_the_sources_changed_is_marked() -> None:
    found = kernels()
    assert tables.MARK not in tables.summary("kernels", [found])
    for one in found["rows"]:
        if one["case"] == "gelu_linear":
            one["sources"] = "0" * 64
    text = tables.summary("kernels", [found])
    assert "`gelu_linear`†" in text
    assert "`restore_tokens` |" in text
    assert text.count(tables.STALE) == 1
    assert "| ours† |" in tables.full(found)
    assert "| kernels† |" in tables.overview([found])


def test_staleness_of_steps_and_loaders_follows_their_own_sources() -> None:
    one = row("MAE", "ours", 1.0, phase="step", sources=machine.sources_hash("step"))
    assert not rows.is_stale(document("step", []), one)
    assert rows.is_stale(document("step", []), {**one, "sources": machine.sources_hash()})
    assert not rows.is_stale(loader(), loader()["rows"][0]), (
        "without a hash of its own, that of the file"
    )
    assert rows.is_stale({**loader(), "kernel_sources": "0"}, loader()["rows"][0])


def test_captions_say_what_ran_where() -> None:
    text = formats.caption(
        kernels(
            GPU,
            modified=True,
            finished=False,
            left_out=["sssd_loss"],
            missing={"xformers": "not installed"},
        )
    )
    for part in (
        "Made-up GPU 80GB; 79.1 GiB, driver 580.1", "power limit 700.00 W", "SM clock 1980 MHz before, 1980 MHz after", "torch 2.13.0",
        "triton 3.7.1", "commit 0123456789+changes;", "`sssd-fast bench kernels`", "2026-03-01", "Unfinished", "sssd_loss",
        "xformers (not installed)",
    ):  # fmt: skip
        assert part in text
    on_cpu = {"attention": "reference (the tensors are on the CPU)"}
    text = formats.caption(kernels(ops=on_cpu))
    assert "Made-up CPU, 2 cores, 2 threads; torch" in text
    assert "the ops are their references in plain PyTorch" in text
    assert "references" not in formats.caption(
        kernels(GPU, ops={**on_cpu, "restore_tokens": "triton"})
    )


def test_steps_memory_and_loaders_have_their_tables() -> None:
    text = tables.full(step())
    assert (
        "| MAE | ViT-B, 8 images, fp32 | 256 | published | 90.0 ms | 2,840 | 20 % | 20.0 | 3.00 (slower) |"
        in text
    )
    rest = text[text.index("#### MAE, ViT-B, 8 images, fp32: what each part adds") :].splitlines()[
        4:
    ]
    assert [line.split(" | ")[2:5] for line in rest] == [
        ["1,000", "-", "1.00×"],
        ["3,000", "+200.0%", "3.00×"],
        ["2,700", "-10.0%", "2.70×"],
    ]
    text = tables.short(memory())
    assert "| MAE | ViT-B, 128 images, fp32 | 128 | published | 5.12 GB | 40.0 | - | 2.00 |" in text
    assert "| MAE, ViT-B, fp32 | ours | 256, 12,000 images/s | 384 (predicted) |" in text
    text = tables.summary("loader", [loader()])
    assert "| ct | 1 | resident | 1,230 | 1,200 to 1,300 | 5 | +2.0% | 2.50 |" in text
    assert "DALI is not installed" in text


def test_loader_parity_and_memory_are_shown_in_full() -> None:
    head = {"data": "ct", "channels": 1, "provider": "dali"}
    parity = {
        **head,
        "view": "training",
        "mean": 0.1676,
        "max": 17,
        "images": 7,
        "images_differing": 7,
        "beyond_2": 0.000285,
    }
    assert "| training | 0.168 | 17 | 0.0285% |" in tables.full(document("loader-parity", [parity]))
    kept = {
        **head,
        "before": 380.4,
        "epochs": [410.4] * 12,
        "peak": 455.3,
        "flat": True,
        "reason": None,
    }
    assert "| 380 MiB | 410 MiB | 410 MiB | - | 455 MiB | yes |" in tables.full(
        document("loader-memory", [kept])
    )


@pytest.mark.parametrize("section", tables.SECTIONS)
def test_not_measured_is_printed_where_there_is_no_file(section: str) -> None:
    assert tables.summary(section, []) == "NVIDIA GPU: not measured.\n\nCPU: not measured."
    assert report.page([]).count("NVIDIA GPU: not measured.\n\nCPU: not measured.") == len(
        tables.SECTIONS
    )


def test_a_cpu_file_leaves_the_gpu_not_measured() -> None:
    text = tables.summary("kernels", [kernels()])
    assert text.endswith("NVIDIA GPU: not measured.")
    assert "CPU: not measured" not in text
    assert (
        "NVIDIA GPU: not measured (kernels, attention, step, memory, loader)."
        in tables.overview([kernels()])
    )
