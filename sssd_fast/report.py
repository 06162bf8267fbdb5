"""From a run folder to report.md and report.html: what ran, on which data, with what result, and where it was wrong.

Reads only files of the run folder: config.yaml, command.txt, env.json, data.json, metrics.jsonl, images/*.png, eval/*. A part that is
missing or unreadable is named in the report and never stops it. Draws images/curves.png.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .checkpoint import atomic_write_text
from .errors import DataError
from .evaluate import RATE_NAMES, aggregate_runs, result_rows
from .plots import curves
from .report_read import STAGES, RunFiles, read_run, section
from .report_render import (
    Banner,
    Block,
    Cards,
    Code,
    Facts,
    Gallery,
    Heading,
    Lead,
    Missing,
    Pair,
    Picture,
    Points,
    Table,
    Text,
    to_html,
    to_markdown,
)

SECTIONS = {"pretrain": ("objective", "pretrain"), "finetune": ("finetune", "evaluate"), "probe": ("probe", "evaluate")}
LISTED = 40  # longest list of files in the report; data.json and index.json hold all
FOOTER = f"Written by sssd_fast {__version__}. Research software: not a medical device, not for diagnosis."


def write_report(run_folder: str | Path) -> tuple[Path, Path]:
    """Write report.md and report.html of one run (pretrain, finetune, probe or evaluate). Raises DataError without a folder."""
    folder = _folder(run_folder)
    run = read_run(folder)
    blocks = [Heading(1, run.title), Lead(_lead([run])), *_banner([run]), *_run_blocks(run, 2)]
    return _write(folder, run.title, blocks)


def write_combined_report(folder: str | Path, subfolders: Sequence[str | Path]) -> tuple[Path, Path]:
    """Write one report on several runs in `folder` (relative names or paths inside it): results side by side, then each run.

    Runs of one stage with the same classes and split are also averaged over (seeds, folds). Raises DataError for a folder
    that does not exist or lies outside `folder`.
    """
    folder = _folder(folder)
    runs = []
    for sub in subfolders:
        path = _folder(folder / sub)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path} lies outside {folder}; a combined report covers runs inside its folder")
        runs.append(read_run(path))
    title = f"Report: {folder.resolve().name}"
    blocks: list[Block] = [Heading(1, title), Lead(_lead(runs)), *_banner(runs), Heading(2, "Results")]
    blocks += _comparison(runs)
    for run in runs:
        blocks += [Heading(2, run.title), *_run_blocks(run, 3)]
    return _write(folder, title, blocks)


def _run_blocks(run: RunFiles, level: int) -> list[Block]:
    trains = run.stage != "evaluate"
    blocks: list[Block] = [Missing(problem) for problem in run.problems]
    if run.stage != "pretrain":
        blocks += [Heading(level, "Result"), *_result(run, level + 1)]
    if trains:
        blocks += [Heading(level, "Training"), *_training(run)]
    if run.stage in ("pretrain", ""):
        blocks += [Heading(level, "Reconstructions"), *_latest(run, "reconstruction")]
    if trains:
        blocks += [Heading(level, "Attention"), *_latest(run, "attention")]
    blocks += [Heading(level, "Data"), *_data(run)]
    blocks += [Heading(level, "What ran"), *_what_ran(run)]
    return blocks


def _lead(runs: Sequence[RunFiles]) -> str:
    sources = list(
        dict.fromkeys(str(run.data.get("source") or section(run.config, "data").get("source") or "") for run in runs)
    )
    return "SSSD-COVID with sssd_fast. Data: " + (", ".join(filter(None, sources)) or "not recorded") + "."


def _banner(runs: Sequence[RunFiles]) -> list[Block]:
    if not any(run.synthetic for run in runs):
        return []
    text = "These images were drawn by a program. The figures show that the software works; they say nothing about patients."
    return [Banner("Synthetic data", text)]


def _result(run: RunFiles, level: int) -> list[Block]:
    result = run.evaluation
    if not result:
        return [Missing("No evaluation yet: eval/metrics.json is not there. `sssd-fast evaluate` writes it.")]
    image, patient = result["image"], result.get("patient")
    kind = f"positive: {result['positive_class']}" if result.get("positive_class") else "macro averages"
    what = f"{result['split']} split, {image['n']} images" + (f" of {patient['n']} patients" if patient else "")
    cards = []
    for rate in ("accuracy", "sensitivity", "specificity", "auc"):
        interval = image["intervals"][rate]
        bounds = (
            f"95 %: {_percent(interval['low'])} to {_percent(interval['high'])}" if interval["low"] is not None else ""
        )
        value = _percent(image[rate]) if image[rate] is not None else "undefined"
        cards.append((RATE_NAMES[rate], value, bounds))
    rows = [row if patient else row[:2] for row in result_rows(result)]
    header = ["", "per image (95 % interval)"] + (["per patient (95 % interval)"] if patient else [])
    blocks: list[Block] = [
        Text(f"{what[0].upper()}{what[1:]}; {kind}."),
        Cards(cards),
        Table(header, rows, numeric=True),
    ]
    blocks += [Points(notes)] if (notes := _notes(result)) else []
    pictures = []
    for name, caption in (
        (
            "roc",
            "ROC curve; the dot is the threshold in use."
            if result.get("positive_class")
            else "ROC curves, one class against the rest.",
        ),
        ("confusion", "Confusion matrix: counts, and the share of each true class."),
    ):
        path = run.path / "eval" / f"{name}.png"
        if path.is_file():
            pictures.append(Picture(path, caption, caption.partition(";")[0].partition(":")[0]))
    blocks += [Pair(pictures)] if pictures else []
    return [*blocks, *_mistakes(run, level)]


def _notes(result: Mapping[str, Any]) -> list[str]:
    boot = result["bootstrap"]
    notes = [
        f"Intervals: {boot['level']:.0%} percentile bootstrap, {boot['resamples']} resamples of whole {boot['unit']}s, not stratified, "
        f"seed {boot['seed']}."
    ]
    if boot["unit"] == "image":
        notes.append(
            "The data name no patients, so images count as independent; with several images per patient the intervals are too narrow."
        )
    for level in ("image", "patient"):
        intervals = (result.get(level) or {}).get("intervals", {})
        left_out = {rate: i["left_out"] for rate, i in intervals.items() if i["low"] is not None and i["left_out"]}
        for rate, count in left_out.items():
            notes.append(f"{RATE_NAMES[rate]} per {level}: {count} resamples where it is undefined were left out.")
        if any(i["low"] is not None and i["low"] == i["high"] for i in intervals.values()):
            notes.append(
                f"An interval of width zero (per {level}) means that no resample could differ, not that no error is possible."
            )
    if result.get("threshold") is not None:
        prevalence = result["image"]["prevalence"]
        notes.append(
            f"Threshold {result['threshold']:g} on the score of {result['positive_class']}; prevalence {_percent(prevalence)}."
        )
    return [*notes, *result.get("notes", [])]


def _mistakes(run: RunFiles, level: int) -> list[Block]:
    mistakes, total = run.evaluation.get("mistakes", []), run.evaluation.get("num_mistakes", 0)
    if not mistakes:
        return [Heading(level, "Worst mistakes"), Text("No image was classified wrongly.")]
    entries = []
    for mistake in mistakes:
        file = run.path / mistake["thumbnail"] if mistake["thumbnail"] else None
        lines = [f"is {mistake['label']}, called {mistake['prediction']}", f"score {mistake['score']:.3f}"]
        entries.append((file if file and file.is_file() else None, mistake["path"], lines))
    text = f"{total} of {run.evaluation['image']['n']} images are wrong; shown are the {len(mistakes)} most confident."
    return [Heading(level, "Worst mistakes"), Text(text), Gallery(entries)]


def _training(run: RunFiles) -> list[Block]:
    if not run.records:
        return [Missing("No training records: metrics.jsonl is missing or empty.")]
    blocks: list[Block] = []
    rows = _progress(run)
    if rows:
        blocks.append(Facts(rows))
    drawn = curves(run.records, path=run.path / "images" / "curves.png")
    if drawn:
        blocks.append(Picture(drawn, "Training curves as recorded, without smoothing.", "Training curves"))
    else:
        blocks.append(Missing("No curves: the records hold no loss, learning rate or validation figure yet."))
    events = [_event(record) for record in run.records if record.get("kind") == "event"]
    return [*blocks, Points(events[-LISTED:])] if events else blocks


def _progress(run: RunFiles) -> list[tuple[str, str]]:
    trained = run.trained()
    if not trained:
        return []
    last, rows = trained[-1], []
    planned = section(run.config, run.stage).get("epochs")
    epoch = last.get("epoch")
    done = f", epoch {epoch:.4g}" + (f" of {planned}" if planned else "") if isinstance(epoch, (int, float)) else ""
    rows.append(("Steps", f"{last.get('step', '?')}{done}"))
    for key, name, shown in (
        ("time_s", "Time", lambda values: _duration(values[-1])),
        ("images_per_s", "Images per second", lambda values: f"{statistics.median(values):,.1f} (median)"),
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


def _latest(run: RunFiles, kind: str) -> list[Block]:
    """The picture of the last epoch, by number and not by name."""
    found = sorted((run.path / "images").glob(f"{kind}*.png"), key=lambda path: (_number(path), path.name))
    if not found:
        return [Missing(f"No {kind} pictures in images/ yet.")]
    captions = {
        "reconstruction": "Left to right: the image, what the encoder saw, the decoder's prediction of the masked patches alone, and both "
        "together. The model is trained to predict each patch after normalisation; the line under the picture says where the brightness and "
        "contrast shown here come from.",
        "attention": "Where the last encoder block looks. A map of attention shows what was read, not why a decision was taken.",
    }
    earlier = f" {len(found) - 1} earlier pictures are in images/." if len(found) > 1 else ""
    return [
        Picture(
            found[-1], f"{captions[kind]} File: {found[-1].name}.{earlier}", f"{kind.capitalize()} of sample images"
        )
    ]


def _data(run: RunFiles) -> list[Block]:
    data = run.data
    if not data:
        return [Missing("No data.json: what the run was trained on is not recorded.")]
    blocks: list[Block] = []
    rows = [
        (name, str(data[key])) for key, name in (("source", "Source"), ("split_protocol", "Split")) if data.get(key)
    ]
    blocks += [Facts(rows)] if rows else []
    counts: Mapping[str, Mapping[str, int]] = data.get("counts", {})
    classes = data.get("classes") or list(dict.fromkeys(name for part in counts.values() for name in part))
    if counts:
        table = [[str(name), *(f"{part.get(name, 0):,}" for part in counts.values())] for name in classes]
        table.append(["all", *(f"{sum(part.values()):,}" for part in counts.values())])
        blocks.append(Table(["class", *counts], table, numeric=True))
    excluded = data.get("excluded", [])
    blocks.append(Text(f"Files left out because they cannot be used: {len(excluded) or 'none'}."))
    blocks += _listed([f"{item['path']}: {item['reason']}" for item in excluded])
    duplicates, leaks = data.get("duplicates", []), data.get("leaks", [])
    blocks.append(Text(f"Identical images: {len(duplicates)} groups." if duplicates else "Identical images: none."))
    blocks += _listed([_line(item) for item in duplicates])
    if leaks:
        blocks.append(
            Banner(
                "The split leaks",
                f"{len(leaks)} images or patients are in more than one part; test figures are too good.",
            )
        )
        blocks += _listed([_line(item) for item in leaks])
    return [*blocks, *_listed([_line(item) for item in data.get("notes", [])])]


def _what_ran(run: RunFiles) -> list[Block]:
    blocks: list[Block] = [Code(run.command)] if run.command else [Missing("No command.txt.")]
    rows = _flat(run.env)
    if rows:
        blocks += [
            Text("Environment (env.json)"),
            Facts([row for row in rows if row[1] not in ("None", "")], wide=True),
        ]
    else:
        blocks.append(Missing("No env.json: the machine is not recorded."))
    shown = {
        key: value for key, value in run.config.items() if not isinstance(value, dict) or _concerns(run.stage, key)
    }
    if shown:
        blocks += [
            Text("Configuration (resolved, config.yaml; sections of this stage)"),
            Facts(_flat(shown), wide=True),
        ]
    else:
        blocks.append(Missing("No config.yaml: the settings are not recorded."))
    return blocks


def _concerns(stage: str, section: str) -> bool:
    return stage not in SECTIONS or section in ("data", "model", *SECTIONS[stage])


def _comparison(runs: Sequence[RunFiles]) -> list[Block]:
    evaluated = [run for run in runs if run.evaluation]
    if not evaluated:
        return [Missing("No evaluation yet: none of the runs holds eval/metrics.json.")]
    rates = list(RATE_NAMES)
    rows = []
    for run in evaluated:
        cells = {rate: cell for rate, (_, cell, _) in zip(rates, result_rows(run.evaluation), strict=True)}
        rows.append(
            [
                run.title,
                f"{run.evaluation['split']}, n = {run.evaluation['image']['n']}",
                *(cells[rate] for rate in rates),
            ]
        )
    blocks: list[Block] = [Text("Per image, with 95 % bootstrap intervals.")]
    names = [f"{RATE_NAMES[rate]}" for rate in rates]
    blocks.append(
        Table(
            ["measure", *(row[0] for row in rows)],
            [list(line) for line in zip(["images", *names], *(row[1:] for row in rows), strict=True)],
            numeric=True,
        )
    )
    groups: dict[tuple[str, ...], list[RunFiles]] = {}
    for run in evaluated:
        key = (run.stage, run.evaluation["split"], *map(str, run.evaluation["classes"]))
        groups.setdefault(key, []).append(run)
    for members in groups.values():
        blocks += _over_runs(members) if len(members) > 1 else []
    return blocks


def _over_runs(members: Sequence[RunFiles]) -> list[Block]:
    names = ", ".join(run.path.name for run in members)
    rows = []
    summary = aggregate_runs([run.evaluation["image"] for run in members])
    for rate, found in summary.items():
        mean, deviation = found["mean"], found["deviation"]
        spread = f"{100 * deviation:.1f}" if deviation is not None else "-"
        rows.append([RATE_NAMES[rate], _percent(mean) if mean is not None else "undefined", spread, str(found["n"])])
    stage = STAGES.get(members[0].stage, "Runs")
    return [
        Heading(3, f"{stage} over {len(members)} runs"),
        Text(f"Mean and sample standard deviation (in points) over {names}."),
        Table(["", "mean", "deviation", "runs"], rows, numeric=True),
    ]


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no run folder at {path}; give the folder that holds config.yaml and metrics.jsonl")
    return path


def _write(folder: Path, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    markdown, page = folder / "report.md", folder / "report.html"
    atomic_write_text(markdown, to_markdown(blocks, folder, FOOTER))
    atomic_write_text(page, to_html(title, blocks, FOOTER))
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
    return ", ".join(f"{key}: {value}" for key, value in item.items()) if isinstance(item, dict) else str(item)


def _event(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key not in ("kind", "step", "epoch", "time_s")}
    return f"step {record.get('step', '?')}: {_line(rest)}"


def _number(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
