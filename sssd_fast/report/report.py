"""report.html and report.md of one or several runs, from two jinja2 templates and one context.

Reads only files of the run folders and names those that are missing or unreadable; draws
images/curves.png. The HTML file embeds its pictures and needs neither network nor script.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from sssd_fast import __version__
from sssd_fast.errors import DataError
from sssd_fast.evaluation.evaluate import result_rows
from sssd_fast.evaluation.metrics import RATES, aggregate_runs
from sssd_fast.evaluation.pictures import curves
from sssd_fast.report.read import STAGES, RunFiles, read_run, section
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.log import duration

# The configuration's sections that a stage uses in addition to data, model and the top level.
SECTIONS = {
    "pretrain": ("objective", "pretrain"),
    "finetune": ("finetune", "evaluate"),
    "probe": ("probe", "evaluate"),
}
# Describes the kernels for a default model, not for the model of the run.
SKIPPED_ENVIRONMENT = ("attention", "schema")
CAPTIONS = {
    "reconstruction": "the image, its masked input, and the prediction of the masked patches.",
    "attention": "attention of the last encoder block: what was read, not why a decision was made.",
    "roc": "ROC curve",
    "confusion": "Confusion matrix: counts, and the share of each true class",
}
LISTED = 40  # longest list of files in the report; data.json has all


def write_report(folder: str | Path, runs: Sequence[Path] = ()) -> tuple[Path, Path]:
    """Write report.md and report.html in `folder`: of that run, or of several `runs` inside it.

    Results of several runs are shown side by side; runs of one stage with the same classes and
    split (seeds, folds) are averaged as well. Raises DataError for a folder that is missing.
    """
    folder = Path(folder)
    for path in (folder, *runs):
        if not path.is_dir():
            raise DataError(
                f"no run folder at {path}; give the folder that holds config.yaml and metrics.jsonl"
            )
    top = folder.resolve()
    found = [read_run(path, path.resolve().relative_to(top).as_posix()) for path in runs]
    title, found = f"Report: {top.name}", found or [read_run(folder, top.name)]
    return _write(folder, context(title if runs else found[0].title, found))


def context(title: str, runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Everything that the templates show. Texts are plain, pictures are {path, alt, caption}."""
    evaluated = [run for run in runs if run.evaluation]
    return {
        "title": title,
        "summary": _summary(runs),
        "synthetic": any(run.synthetic for run in runs),
        "leaks": {_line(leak) for run in runs for leak in run.data.get("leaks", [])},
        "problems": [f"{run.title}: {problem}" for run in runs for problem in run.problems],
        "expects_results": any(run.stage != "pretrain" for run in runs),
        "results": [_result(run) for run in evaluated],
        "comparison": _comparison(evaluated) if len(evaluated) > 1 else [],
        "training": _training(runs),
        "curves": [picture for run in runs for picture in _curves(run)],
        "reconstruction": [p for run in runs for p in _newest(run, "reconstruction")],
        "attention": [p for run in runs for p in _newest(run, "attention")],
        "data": _data(runs),
        "commands": _by_value(runs, [run.command for run in runs]),
        "settings": _merged(runs, [_settings(run) for run in runs]),
        "environment": _merged(runs, [_environment(run) for run in runs]),
        "events": [f"{run.title}, {line}" for run in runs for line in _events(run)],
        "footer": f"Written by sssd_fast {__version__} on "
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC. Research software: not a medical "
        "device, not for diagnosis.",
    }


def _summary(runs: Sequence[RunFiles]) -> str:
    """Model, parameters, image size, epochs, data set, date and device, as far as recorded."""
    last = runs[-1]
    items = _model_items(section(last.config, "model"))
    for run in runs:
        epochs = section(run.config, run.stage).get("epochs")
        if epochs and run.values("loss"):
            items.append(f"{epochs} epochs of {STAGES[run.stage].lower()}")
    source = last.data.get("source") or section(last.config, "data").get("source")
    if source:
        images = sum(sum(split.values()) for split in last.data.get("counts", {}).values())
        items.append(f"{Path(str(source)).name}" + (f" ({images:,} images)" if images else ""))
    gpus = last.env.get("gpus") or [{}]
    items.append(str(gpus[0].get("name") or section(last.env, "cpu").get("model", "")))
    if (env := last.path / "env.json").is_file():
        items.append(f"{datetime.fromtimestamp(env.stat().st_mtime, timezone.utc):%Y-%m-%d}")
    return ", ".join(filter(None, items))


def _model_items(model: Mapping[str, Any]) -> list[str]:
    """["ViT 128x4", "0.8 M parameters", "96 x 96 pixels"], [] for settings of another version."""
    import torch

    from sssd_fast.config import ModelConfig
    from sssd_fast.model import MAE

    try:
        config = ModelConfig.model_validate(model)
        with torch.device("meta"):
            encoder = MAE(config).encoder
    except (ValueError, TypeError):
        return []
    width, depth, _ = config.encoder_shape
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    height, width_px = config.image_size
    size = f"{height} x {width_px} pixels"
    return [f"ViT {width}x{depth}", f"{parameters / 1e6:.1f} M parameters", size]


def _result(run: RunFiles) -> dict[str, Any]:
    """The metrics of a run, each as (name, per image, interval, per patient)."""
    result, image = run.evaluation, run.evaluation["image"]
    positive, patient = result["positive_class"], result["patient"]
    people = f" of {patient['n']} patients" if patient else ""
    kind = f"positive class {positive}" if positive else "macro averages"
    metrics = []
    for name, per_image, per_patient in result_rows(result):
        value, _, interval = per_image.partition(" (")
        metrics.append((name, value, interval.rstrip(")"), per_patient))
    mistakes = []
    for mistake in result["mistakes"]:
        file = run.evaluation_folder / "mistakes" / Path(mistake["thumbnail"] or "none").name
        picture = {"path": file, "alt": mistake["path"]} if file.is_file() else None
        mistakes.append({**mistake, "picture": picture})
    files = [run.evaluation_folder / f"{name}.png" for name in ("roc", "confusion")]
    captions = {path: CAPTIONS[path.stem] for path in files if path.is_file()}
    pictures = [{"path": p, "alt": text, "caption": text} for p, text in captions.items()]
    return {
        "title": run.title,
        "scope": f"{result['split'].capitalize()} split, {image['n']} images{people}; {kind}.",
        "metrics": metrics,
        "per_patient": patient is not None,
        "notes": _notes(result),
        "pictures": pictures,
        "mistakes": mistakes,
        "num_mistakes": result["num_mistakes"],
        "n": image["n"],
        "positive": positive,
    }


def _notes(result: Mapping[str, Any]) -> list[str]:
    boot = result["bootstrap"]
    notes = [
        f"Intervals: {100 * boot['level']:.0f} % percentile bootstrap, {boot['resamples']} "
        f"resamples of whole {boot['unit']}s, not stratified, seed {boot['seed']}."
    ]
    if boot["unit"] == "image":
        notes.append(
            "The data name no patients, so images count as independent; with several per patient "
            "the intervals are too narrow."
        )
    for level in ("image", "patient"):
        found = (result[level] or {}).get("intervals", {})
        known = {RATES[rate]: one for rate, one in found.items() if one["low"] is not None}
        notes += [
            f"{name} per {level} is undefined in {one['skipped']} resamples, which are skipped."
            for name, one in known.items()
            if one.get("skipped")
        ]
        if any(one["low"] == one["high"] for one in known.values()):
            notes.append(
                f"An interval of width zero (per {level}) means that no resample could differ, not "
                "that no error is possible."
            )
    if result.get("threshold") is not None:
        notes.append(
            f"Threshold {result['threshold']:g} on the score of {result['positive_class']}; "
            f"prevalence {100 * result['image']['prevalence']:.1f} %."
        )
    return [*notes, *result["notes"]]


def _comparison(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Tables {title, header, rows}: runs side by side, then mean and deviation of equal runs."""
    tables = []
    for place, level in enumerate(("image", "patient"), start=1):
        known = [run for run in runs if run.evaluation[level]]
        scopes = [f"{run.evaluation['split']}, n = {run.evaluation[level]['n']}" for run in known]
        columns = [[row[place] for row in result_rows(run.evaluation)] for run in known]
        rows = [[f"{level}s", *scopes]]
        rows += [list(row) for row in zip(RATES.values(), *columns, strict=True)]
        if known:
            title = f"Per {level}, with 95 % bootstrap intervals"
            tables.append({"title": title, "header": [r.title for r in known], "rows": rows})
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        key = str([run.stage, run.evaluation["split"], run.evaluation["classes"]])
        groups.setdefault(key, []).append(run)
    for members in groups.values():
        for level in ("image", "patient"):
            known = [run for run in members if run.evaluation[level]]
            if len(known) > 1:
                tables.append(_average(known, level))
    return tables


def _average(runs: Sequence[RunFiles], level: str) -> dict[str, Any]:
    rows = []
    for rate, found in aggregate_runs([run.evaluation[level] for run in runs]).items():
        mean, deviation = found["mean"], found["deviation"]
        value = "undefined" if mean is None else f"{100 * mean:.1f} %"
        spread = "-" if deviation is None else f"{100 * deviation:.1f}"
        rows.append([RATES[rate], value, spread, str(found["n"])])
    title = f"{STAGES.get(runs[0].stage, 'Runs')} over {len(runs)} runs, per {level}: "
    title += "mean and sample standard deviation (points) over "
    title += ", ".join(run.name for run in runs)
    return {"title": title, "header": ["mean", "deviation", "runs"], "rows": rows}


def _training(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Table of what training took, one column per run; empty if nothing was trained."""
    shown = {
        "Time": ("time_s", lambda values: duration(values[-1])),
        "Images per second": ("images_per_s", lambda values: f"{median(values):,.1f} (median)"),
        "Waiting for data": ("data_wait_fraction", lambda values: f"{median(values):.1%} (median)"),
        "Peak memory": ("memory_gib", lambda values: f"{max(values):.2f} GiB"),
        "Last loss": ("loss", lambda values: f"{values[-1]:.4f}"),
    }
    trained = [run for run in runs if run.values("step")]
    rows = [["Steps", *(_progress(run) for run in trained)]]
    for name, (key, text) in shown.items():
        found = [run.values(key) for run in trained]
        if any(found):
            rows.append([name, *(text(values) if values else "" for values in found)])
    # a probe is fitted without steps, an evaluation trains nothing
    missing = [r.title for r in runs if r not in trained and r.stage not in ("probe", "evaluate")]
    return {"header": [run.title for run in trained], "rows": rows, "missing": missing}


def _progress(run: RunFiles) -> str:
    steps, epochs = run.values("step"), run.values("epoch")
    planned = section(run.config, run.stage).get("epochs")
    of_planned = f" of {planned}" if planned else ""
    return f"{steps[-1]:.0f}" + (f", epoch {epochs[-1]:.4g}{of_planned}" if epochs else "")


def _events(run: RunFiles) -> list[str]:
    skipped = ("kind", "step", "epoch", "time_s")
    return [
        f"step {event.get('step', '?')}: {_line({k: event[k] for k in event if k not in skipped})}"
        for event in run.records
        if event.get("kind") == "event"
    ][-LISTED:]


def _curves(run: RunFiles) -> list[dict[str, Any]]:
    path = curves(run.records, path=run.path / "images" / "curves.png")
    if path is None:
        return []
    caption = f"{run.title}: thin lines as recorded, thick lines the mean of each epoch."
    return [{"path": path, "alt": f"Training curves of {run.title}", "caption": caption}]


def _newest(run: RunFiles, kind: str) -> list[dict[str, Any]]:
    """The picture with the highest epoch in its name (as a number)."""

    def epoch(path: Path) -> tuple[int, str]:
        return int((re.findall(r"\d+", path.stem) or [-1])[-1]), path.name

    found = sorted((run.path / "images").glob(f"{kind}*.png"), key=epoch)
    if not found:
        return []
    earlier = f" Earlier pictures in images/: {len(found) - 1}." if len(found) > 1 else ""
    caption = f"{run.title}: {CAPTIONS[kind]} File: {found[-1].name}.{earlier}"
    return [{"path": found[-1], "alt": f"{kind.capitalize()} of sample images", "caption": caption}]


def _by_value(runs: Sequence[RunFiles], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """(titles of the runs, value): runs of equal values are listed together."""
    found: list[tuple[list[str], Any]] = []
    for run, value in zip(runs, values, strict=True):
        titles = next((titles for titles, other in found if other == value), None)
        if titles is None:
            found.append(([run.title], value))
        else:
            titles.append(run.title)
    return [(", ".join(titles), value) for titles, value in found]


def _data(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """data.json of each run; equal data are shown once, under the names of all their runs."""
    sections = []
    for title, data in _by_value(runs, [run.data for run in runs]):
        splits: Mapping[str, Mapping[str, int]] = data.get("counts", {})
        names = dict.fromkeys(name for counts in splits.values() for name in counts)
        rows = [[name, *(f"{c.get(name, 0):,}" for c in splits.values())] for name in names]
        rows.append(["all", *(f"{sum(c.values()):,}" for c in splits.values())])
        counts = {"header": list(splits), "rows": rows}
        sections.append({"title": title, "data": data, "counts": counts})
    return sections


def _settings(run: RunFiles) -> dict[str, str]:
    used = ("data", "model", *SECTIONS.get(run.stage, tuple(run.config)))
    return _flat({k: v for k, v in run.config.items() if k in used or not isinstance(v, dict)})


def _environment(run: RunFiles) -> dict[str, str]:
    rows = _flat({key: v for key, v in run.env.items() if key not in SKIPPED_ENVIRONMENT})
    return {key: value for key, value in rows.items() if value not in ("None", "")}


def _merged(runs: Sequence[RunFiles], tables: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """One row per key; values that differ between runs are listed with the runs' titles."""
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        having = [run for run, table in zip(runs, tables, strict=True) if key in table]
        found = _by_value(having, [table[key] for table in tables if key in table])
        several = len(found) > 1
        rows.append((key, ", ".join(f"{v} ({names})" if several else v for names, v in found)))
    return rows


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows[f"{prefix}{key}"] = ", ".join(map(_line, value))
        else:
            rows[f"{prefix}{key}"] = str(value)
    return rows


def _line(item: Any) -> str:
    pairs = item.items() if isinstance(item, dict) else []
    return ", ".join(f"{key}: {value}" for key, value in pairs) if pairs else str(item)


def _lines(items: Sequence[Any]) -> list[str]:
    """The first `LISTED` items as text, and how many more there are."""
    more = [f"and {len(items) - LISTED} more (data.json)"] if len(items) > LISTED else []
    return [*(_line(item).strip() for item in items[:LISTED]), *more]


def _write(folder: Path, values: dict[str, Any]) -> tuple[Path, Path]:
    """Render both templates. HTML is escaped by jinja2, Markdown by `_markdown` on every value."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def link(path: Path) -> Markup:
        return Markup(quote(Path(os.path.relpath(path, folder)).as_posix()))

    def code(text: str) -> Markup:
        # longer than any run of backticks in the text
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return Markup(f"{fence}\n{text}\n{fence}")

    def data(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")

    written = []
    for name, escape in (("report.md", False), ("report.html", True)):
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=escape,
            finalize=None if escape else _markdown,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters |= {"link": link, "code": code, "data": data, "lines": _lines}
        text = environment.get_template(f"{name}.j2").render(values)
        # bytes of a file name that are not UTF-8 become question marks
        atomic_write_text(folder / name, text.encode("utf-8", "replace").decode("utf-8"))
        written.append(folder / name)
    return written[0], written[1]


def _markdown(value: Any) -> Any:
    """Escape what Markdown or its embedded HTML would act on; line breaks become spaces."""
    if hasattr(value, "__html__"):
        return value
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(str(value).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
