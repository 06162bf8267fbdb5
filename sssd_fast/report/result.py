"""How an evaluation looks in a report: headline figures, table with intervals, pictures, worst mistakes, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sssd_fast.evaluation.evaluate import result_rows
from sssd_fast.evaluation.metrics import RATES, aggregate_runs
from sssd_fast.report.read import STAGES, RunFiles
from sssd_fast.report.render import (
    Block,
    Cards,
    Gallery,
    Heading,
    Missing,
    Pair,
    Picture,
    Points,
    Table,
    Text,
)


def result_blocks(run: RunFiles, level: int) -> list[Block]:
    result = run.evaluation
    if not result:
        return [
            Missing(
                "No evaluation yet: eval/metrics.json is not there. `sssd-fast evaluate` writes it."
            )
        ]
    image, patient = result["image"], result.get("patient")
    kind = (
        f"positive: {result['positive_class']}"
        if result.get("positive_class")
        else "macro averages"
    )
    what = f"{result['split']} split, {image['n']} images" + (
        f" of {patient['n']} patients" if patient else ""
    )
    cards = []
    for rate in ("accuracy", "sensitivity", "specificity", "auc"):
        interval = image["intervals"][rate]
        bounds = (
            f"95 %: {_percent(interval['low'])} to {_percent(interval['high'])}"
            if interval["low"] is not None
            else ""
        )
        value = _percent(image[rate]) if image[rate] is not None else "undefined"
        cards.append((RATES[rate], value, bounds))
    rows = [row if patient else row[:2] for row in result_rows(result)]
    header = ["", "per image (95 % interval)"] + (
        ["per patient (95 % interval)"] if patient else []
    )
    blocks: list[Block] = [
        Text(f"{what[0].upper()}{what[1:]}; {kind}."),
        Cards(cards),
        Table(header, rows, numeric=True),
    ]
    blocks += [Points(notes)] if (notes := _notes(result)) else []
    roc = (
        "ROC curve; the dot is the threshold in use."
        if result["positive_class"]
        else "ROC curves, one class against the rest."
    )
    captions = {
        "roc": roc,
        "confusion": "Confusion matrix; counts, and the share of each true class.",
    }
    pictures = []
    for name, caption in captions.items():
        path = run.path / "eval" / f"{name}.png"
        if path.is_file():
            pictures.append(Picture(path, caption, caption.partition(";")[0]))
    blocks += [Pair(pictures)] if pictures else []
    return [*blocks, *_mistakes(run, level)]


def _notes(result: Mapping[str, Any]) -> list[str]:
    boot = result["bootstrap"]
    notes = [
        f"Intervals: {100 * boot['level']:.0f} % percentile bootstrap, {boot['resamples']} resamples of whole {boot['unit']}s, "
        f"not stratified, seed {boot['seed']}."
    ]
    if boot["unit"] == "image":
        notes.append(
            "The data name no patients, so images count as independent; with several per patient the intervals are too narrow."
        )
    for level in ("image", "patient"):
        intervals = (result.get(level) or {}).get("intervals", {})
        left_out = {
            rate: i["skipped"]
            for rate, i in intervals.items()
            if i["low"] is not None and i["skipped"]
        }
        for rate, count in left_out.items():
            notes.append(
                f"{RATES[rate]} per {level}: {count} resamples where it is undefined were left out."
            )
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
    mistakes = run.evaluation.get("mistakes", [])
    total = run.evaluation.get("num_mistakes", 0)
    if not mistakes:
        return [Heading(level, "Worst mistakes"), Text("No image was classified wrongly.")]
    entries = []
    for mistake in mistakes:
        file = (
            run.path / "eval" / "mistakes" / Path(mistake["thumbnail"]).name
            if mistake["thumbnail"]
            else None
        )
        lines = [
            f"is {mistake['label']}, called {mistake['prediction']}",
            f"score {mistake['score']:.3f}",
        ]
        entries.append((file if file and file.is_file() else None, mistake["path"], lines))
    text = f"{total} of {run.evaluation['image']['n']} images are wrong; shown are the {len(mistakes)} most confident."
    if positive := run.evaluation["positive_class"]:
        text += f" The score is that of {positive}."
    return [Heading(level, "Worst mistakes"), Text(text), Gallery(entries)]


def comparison_blocks(runs: Sequence[RunFiles]) -> list[Block]:
    evaluated = [run for run in runs if run.evaluation]
    if not evaluated:
        return [Missing("No evaluation yet: none of the runs holds eval/metrics.json.")]
    blocks: list[Block] = []
    for place, level in enumerate(("image", "patient"), start=1):
        known = [run for run in evaluated if run.evaluation[level]]
        columns = [[f"{level}s", *RATES.values()]]
        for run in known:
            where = f"{run.evaluation['split']}, n = {run.evaluation[level]['n']}"
            columns.append([where, *(row[place] for row in result_rows(run.evaluation))])
        if known:
            rows = [list(row) for row in zip(*columns, strict=True)]
            blocks.append(Text(f"Per {level}, with 95 % bootstrap intervals."))
            blocks.append(Table(["", *(run.title for run in known)], rows, numeric=True))
    groups: dict[tuple[str, ...], list[RunFiles]] = {}
    for run in evaluated:
        key = (run.stage, run.evaluation["split"], *map(str, run.evaluation["classes"]))
        groups.setdefault(key, []).append(run)
    for members in groups.values():
        for level in ("image", "patient"):
            known = [run for run in members if run.evaluation[level]]
            blocks += _over_runs(known, level) if len(known) > 1 else []
    return blocks


def _over_runs(members: Sequence[RunFiles], level: str) -> list[Block]:
    names = ", ".join(run.name for run in members)
    rows = []
    summary = aggregate_runs([run.evaluation[level] for run in members])
    for rate, found in summary.items():
        mean, deviation = found["mean"], found["deviation"]
        spread = f"{100 * deviation:.1f}" if deviation is not None else "-"
        rows.append(
            [
                RATES[rate],
                _percent(mean) if mean is not None else "undefined",
                spread,
                str(found["n"]),
            ]
        )
    stage = STAGES.get(members[0].stage, "Runs")
    return [
        Heading(3, f"{stage} over {len(members)} runs, per {level}"),
        Text(f"Mean and sample standard deviation (in points) over {names}."),
        Table(["", "mean", "deviation", "runs"], rows, numeric=True),
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
