"""From a run folder to report.md and report.html: what ran, on which data, with what result, and where it was wrong.

Reads only files of the run folder: config.yaml, command.txt, env.json, data.json, metrics.jsonl, images/*.png, eval/*. A part that is
missing or unreadable is named in the report and never stops it. Draws images/curves.png.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sssd_fast import __version__
from sssd_fast.errors import DataError
from sssd_fast.evaluation.pictures import curves
from sssd_fast.report.read import RunFiles, read_run, section
from sssd_fast.report.render import (
    Banner,
    Block,
    Code,
    Facts,
    Heading,
    Lead,
    Missing,
    Picture,
    Points,
    Table,
    Text,
    to_html,
    to_markdown,
)
from sssd_fast.report.result import comparison_blocks, result_blocks
from sssd_fast.run.files import atomic_write_text

SECTIONS = {
    "pretrain": ("objective", "pretrain"),
    "finetune": ("finetune", "evaluate"),
    "probe": ("probe", "evaluate"),
}
PICTURES = {
    "reconstruction": (
        "Reconstructions",
        "Left to right: the image, what the encoder saw, the decoder's prediction of the masked patches alone, both together. "
        "Each patch is predicted after normalisation; the line under the picture says where brightness and contrast come from.",
    ),
    "attention": (
        "Attention",
        "Where the last encoder block looks. A map of attention shows what was read, not why a decision was taken.",
    ),
}
LISTED = 40  # longest list of files in the report; data.json and index.json hold all
FOOTER = f"Written by sssd_fast {__version__} on {{date}}. Research software: not a medical device, not for diagnosis."


def write_report(run_folder: str | Path) -> tuple[Path, Path]:
    """Write report.md and report.html of one run (pretrain, finetune, probe or evaluate). Raises DataError without a folder."""
    folder = _folder(run_folder)
    run = read_run(folder)
    blocks = [Heading(1, run.title), Lead(_lead([run])), *_banner([run]), *_run_blocks(run, 2)]
    return _write(folder, run.title, blocks)


def write_combined_report(
    folder: str | Path, subfolders: Sequence[str | Path]
) -> tuple[Path, Path]:
    """Write one report on several runs in `folder` (names or paths inside it): results side by side, then each run.

    Runs of one stage with the same classes and split are also averaged over (seeds, folds). Raises DataError for a folder
    that does not exist or lies outside `folder`.
    """
    folder = _folder(folder)
    runs = []
    for sub in subfolders:
        found = [
            path
            for path in (Path(sub), folder / sub)
            if path.resolve().is_relative_to(folder.resolve())
        ]
        if not found:
            raise DataError(
                f"{sub} lies outside {folder}; a combined report covers runs inside its folder"
            )
        path = _folder(next((path for path in found if path.is_dir()), found[-1]))
        runs.append(read_run(path, path.resolve().relative_to(folder.resolve()).as_posix()))
    title = f"Report: {folder.resolve().name}"
    blocks: list[Block] = [
        Heading(1, title),
        Lead(_lead(runs)),
        *_banner(runs),
        Heading(2, "Results"),
    ]
    blocks += comparison_blocks(runs)
    for place, run in enumerate(runs):
        blocks += [Heading(2, run.title), *_run_blocks(run, 3, runs[:place])]
    return _write(folder, title, blocks)


def _run_blocks(run: RunFiles, level: int, earlier: Sequence[RunFiles] = ()) -> list[Block]:
    """The sections of one run; data and machine are not repeated where an `earlier` run of the same report shows them."""
    blocks: list[Block] = [Missing(problem) for problem in run.problems]
    if run.stage != "pretrain":
        blocks += [Heading(level, "Result"), *result_blocks(run, level + 1)]
    if run.stage != "evaluate" and (
        run.stage != "probe" or run.records
    ):  # a probe is fitted without steps
        blocks += [Heading(level, "Training"), *_training(run)]
    for kind in ("reconstruction", "attention"):
        pictures = _pictures(run, kind)
        if pictures or run.stage == "pretrain":
            blocks += [Heading(level, PICTURES[kind][0]), *_latest(pictures, kind)]
    blocks += [Heading(level, "Data"), *_data(run, earlier)]
    blocks += [
        Heading(level, "What ran, where, with which settings"),
        *_what_ran(run, level + 1, earlier),
    ]
    return blocks


def _lead(runs: Sequence[RunFiles]) -> str:
    sources = list(
        dict.fromkeys(
            str(run.data.get("source") or section(run.config, "data").get("source") or "")
            for run in runs
        )
    )
    return (
        "SSSD-COVID with sssd_fast. Data: "
        + (", ".join(filter(None, sources)) or "not recorded")
        + "."
    )


def _banner(runs: Sequence[RunFiles]) -> list[Block]:
    if not any(run.synthetic for run in runs):
        return []
    text = "These images were drawn by a program. The figures show that the software works; they say nothing about patients."
    return [Banner("Synthetic data", text)]


def _training(run: RunFiles) -> list[Block]:
    if not run.records:
        return [Missing("No training records: metrics.jsonl is missing or empty.")]
    blocks: list[Block] = []
    rows = _progress(run)
    if rows:
        blocks.append(Facts(rows))
    drawn = curves(run.records, path=run.path / "images" / "curves.png")
    if drawn:
        blocks.append(
            Picture(drawn, "Training curves as recorded, without smoothing.", "Training curves")
        )
    else:
        blocks.append(
            Missing("No curves: the records hold no loss, learning rate or validation figure yet.")
        )
    events = [_event(record) for record in run.records if record.get("kind") == "event"]
    return [*blocks, Points(events[-LISTED:])] if events else blocks


def _progress(run: RunFiles) -> list[tuple[str, str]]:
    trained = run.trained()
    if not trained:
        return []
    last, rows = trained[-1], []
    planned = section(run.config, run.stage).get("epochs")
    epoch = last.get("epoch")
    done = (
        f", epoch {epoch:.4g}" + (f" of {planned}" if planned else "")
        if isinstance(epoch, (int, float))
        else ""
    )
    rows.append(("Steps", f"{last.get('step', '?')}{done}"))
    for key, name, shown in (
        ("time_s", "Time", lambda values: _duration(values[-1])),
        (
            "images_per_s",
            "Images per second",
            lambda values: f"{statistics.median(values):,.1f} (median)",
        ),
        (
            "data_wait_fraction",
            "Waiting for data",
            lambda values: f"{statistics.median(values):.1%} of the time (median)",
        ),
        ("memory_gib", "Peak memory", lambda values: f"{max(values):.2f} GiB"),
        ("loss", "Last loss", lambda values: f"{values[-1]:.4f}"),
    ):
        values = [record[key] for record in trained if isinstance(record.get(key), (int, float))]
        if values:
            rows.append((name, shown(values)))
    return rows


def _pictures(run: RunFiles, kind: str) -> list[Path]:
    """By epoch, that is by number and not by name."""
    return sorted(
        (run.path / "images").glob(f"{kind}*.png"), key=lambda path: (_number(path), path.name)
    )


def _latest(found: Sequence[Path], kind: str) -> list[Block]:
    if not found:
        return [Missing(f"No {kind} pictures in images/ yet.")]
    title, caption = PICTURES[kind]
    earlier = f" Earlier pictures in images/: {len(found) - 1}." if len(found) > 1 else ""
    return [
        Picture(
            found[-1], f"{caption} File: {found[-1].name}.{earlier}", f"{title} of sample images"
        )
    ]


def _data(run: RunFiles, earlier: Sequence[RunFiles]) -> list[Block]:
    data = run.data
    if not data:
        return [Missing("No data.json: what the run was trained on is not recorded.")]
    if same := next((other for other in earlier if other.data == data), None):
        return [Text(f"The same images and split as in {same.title}.")]
    blocks: list[Block] = []
    rows = [
        (name, str(data[key]))
        for key, name in (("source", "Source"), ("split_protocol", "Split"))
        if data.get(key)
    ]
    blocks += [Facts(rows)] if rows else []
    counts: Mapping[str, Mapping[str, int]] = data.get("counts", {})
    classes = data.get("classes") or list(
        dict.fromkeys(name for part in counts.values() for name in part)
    )
    if counts:
        table = [
            [str(name), *(f"{part.get(name, 0):,}" for part in counts.values())] for name in classes
        ]
        table.append(["all", *(f"{sum(part.values()):,}" for part in counts.values())])
        blocks.append(Table(["class", *counts], table, numeric=True))
    excluded = data.get("excluded", [])
    blocks.append(Text(f"Files left out because they cannot be used: {len(excluded) or 'none'}."))
    blocks += _listed([f"{item['path']}: {item['reason']}" for item in excluded])
    duplicates, leaks = data.get("duplicates", []), data.get("leaks", [])
    blocks += _listed([_line(item).strip() for item in duplicates]) or [
        Text("Identical pictures: not recorded.")
    ]
    if leaks:
        text = f"{len(leaks)} patients or groups of identical images lie in more than one part, so the test figures are too good."
        blocks += [Banner("The split leaks", text), *_listed([_line(item) for item in leaks])]
    notes = [_line(item) for item in data.get("notes", [])]
    return [*blocks, Text("From the check of the images:"), *_listed(notes)] if notes else blocks


def _what_ran(run: RunFiles, level: int, earlier: Sequence[RunFiles]) -> list[Block]:
    blocks: list[Block] = [
        Code(run.command)
        if run.command
        else Missing("No command.txt: the command is not recorded.")
    ]
    blocks.append(Heading(level, "Settings"))
    shown = {
        key: value
        for key, value in run.config.items()
        if not isinstance(value, dict) or _concerns(run.stage, key)
    }
    blocks.append(
        Facts(_flat(shown), wide=True)
        if shown
        else Missing("No config.yaml: the settings are not recorded.")
    )
    blocks.append(Heading(level, "Environment"))
    same = next((other for other in earlier if run.env and _machine(other) == _machine(run)), None)
    if same:
        blocks.append(Text(f"The same machine and versions as in {same.title}."))
    elif rows := [row for row in _flat(run.env) if row[1] not in ("None", "")]:
        blocks.append(Facts(rows, wide=True))
    else:
        blocks.append(Missing("No env.json: the machine is not recorded."))
    return blocks


def _machine(run: RunFiles) -> dict[str, Any]:
    """env.json without what changes from minute to minute."""
    return {key: value for key, value in run.env.items() if key not in ("memory", "disk")}


def _concerns(stage: str, section: str) -> bool:
    return stage not in SECTIONS or section in ("data", "model", *SECTIONS[stage])


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise DataError(
            f"no run folder at {path}; give the folder that holds config.yaml and metrics.jsonl"
        )
    return path


def _write(folder: Path, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    markdown, page = folder / "report.md", folder / "report.html"
    footer = FOOTER.format(date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))
    atomic_write_text(markdown, to_markdown(blocks, folder, footer))
    atomic_write_text(page, to_html(title, blocks, footer))
    return markdown, page


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{key}", ", ".join(map(_line, value))))
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _listed(lines: Sequence[str]) -> list[Block]:
    more = [f"and {len(lines) - LISTED} more (data.json)"] if len(lines) > LISTED else []
    return [Points([*lines[:LISTED], *more])] if lines else []


def _line(item: Any) -> str:
    return (
        ", ".join(f"{key}: {value}" for key, value in item.items())
        if isinstance(item, dict)
        else str(item)
    )


def _event(record: Mapping[str, Any]) -> str:
    rest = {
        key: value
        for key, value in record.items()
        if key not in ("kind", "step", "epoch", "time_s")
    }
    return f"step {record.get('step', '?')}: {_line(rest)}"


def _number(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{seconds:.1f} s"
    )
