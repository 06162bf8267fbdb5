"""report.html and report.md of one or several runs, from two jinja2 templates and one context.

Reads only files of the run folders and names those that are missing or unreadable; draws
images/curves.png. The HTML file embeds its pictures and needs neither network nor script.
"""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from sssd_fast import __version__
from sssd_fast.config import from_dict
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.evaluation.evaluate import rate_text, result_table
from sssd_fast.evaluation.metrics import RATES, aggregate_runs
from sssd_fast.evaluation.pictures import curves, data_pictures
from sssd_fast.evaluation.plots import PLOTS
from sssd_fast.performance.fake import make_model
from sssd_fast.report.read import STAGES, RunFiles, read_run, section
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.log import duration

if TYPE_CHECKING:
    from jinja2 import Template

# The configuration's sections that a stage uses in addition to data, model and the top level.
SECTIONS = {
    "pretrain": ("objective", "pretrain"),
    "finetune": ("finetune", "evaluate"),
    "probe": ("probe", "evaluate"),
}
CAPTIONS = {
    "reconstruction": "the image, its masked input, and the prediction of the masked patches.",
    "attention": "attention of the last encoder block: what was read, not why a decision was made.",
    "roc": "Each threshold gives one point; the dashed line is a random score.",
    "precision_recall": "The dashed line is the precision of a random score.",
    "thresholds": "A threshold chosen on these curves would be too good; use the validation split.",
    "calibration": "Points on the dashed line: the score is the frequency. ECE: mean distance.",
}
LISTED = 40  # longest list of files in the report; data.json has all


def write_report(folder: str | Path, runs: Sequence[Path] = ()) -> tuple[Path, Path]:
    """Write report.md and report.html in `folder`: of that run, or of several `runs` inside it.

    Results of several runs (seeds, folds) are shown side by side, with their mean. Raises DataError
    for a folder that is missing.
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
        "facts_of_run": _facts(runs),
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
        "settings": _merged([_settings(run) for run in runs]),
        "environment": _merged([_flat(run.env) for run in runs]),
        "events": [f"{run.title}, {line}" for run in runs for line in _events(run)],
        "footer": f"Written by sssd_fast {__version__} on "
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC. Research software: not a medical "
        "device, not for diagnosis.",
    }


def _facts(runs: Sequence[RunFiles]) -> list[tuple[str, str]]:
    """Model, images, training, data, device and date, as far as recorded."""
    last, training = runs[-1], []
    seconds = sum(max(run.values("time_s"), default=0.0) for run in runs)
    for run in runs:
        epochs = section(run.config, run.stage).get("epochs")
        if epochs and run.values("loss"):
            training.append(f"{epochs} epochs of {STAGES[run.stage].lower()}")
    training = [*dict.fromkeys(training), *([f"{duration(seconds)} in total"] if seconds else [])]
    source = last.data.get("source") or section(last.config, "data").get("source")
    splits: dict[str, dict[str, int]] = last.data.get("counts", {})
    classes = dict.fromkeys(name for counts in splits.values() for name in counts)
    totals = {name: sum(counts.get(name, 0) for counts in splits.values()) for name in classes}
    data = [
        f"{Path(str(source)).name}: {sum(totals.values()):,} images" if source else "",
        ", ".join(f"{name} {count:,}" for name, count in totals.items()),
        ", ".join(f"{name} {sum(counts.values()):,}" for name, counts in splits.items()),
    ]
    gpus = last.env.get("gpus") if last.config.get("device") != "cpu" else None
    gpu, cpu = (gpus or [{}])[0].get("name"), section(last.env, "cpu").get("model")
    env = last.path / "env.json"
    written = env.stat().st_mtime if env.is_file() else None
    facts = {
        **_model_facts(last),
        "Training": ", ".join(training),
        "Data": "; ".join(filter(None, data)),
        "Device": str(gpu or cpu or ""),
        "Date": f"{datetime.fromtimestamp(written, timezone.utc):%Y-%m-%d}" if written else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def _model_facts(run: RunFiles) -> dict[str, str]:
    try:
        config = from_dict(run.config)
    except ConfigError:  # settings of another version
        return {}
    if not run.config:
        return {}
    model = config.model
    width, depth, heads = model.encoder_shape
    task = "pretrain" if run.stage == "pretrain" else "finetune"
    with torch.device("meta"):
        module = make_model(config, task, len(run.data.get("classes", ())) or 2)
    count = sum(parameter.numel() for parameter in module.parameters())
    what = " with decoder and heads" if task == "pretrain" else ""
    pixels = " x ".join(map(str, model.image_size))
    colours = "grey" if model.in_channels == 1 else "RGB"
    return {
        "Model": f"ViT, {depth} blocks of width {width}, {heads} heads; {count / 1e6:.2f} million "
        f"parameters{what}",
        "Input": f"{pixels} pixels, {colours}, patches of {model.patch_size} x {model.patch_size}",
    }


def _result(run: RunFiles) -> dict[str, Any]:
    """The metrics of a run as a table, its plots and examples."""
    result, image = run.evaluation, run.evaluation["image"]
    positive, patient = result["positive_class"], result["patient"]
    people = f" of {patient['n']} patients" if patient else ""
    kind = f"positive class {positive}" if positive else "macro averages"
    header, rows = result_table(result)
    names = {"per image": "this model, per image", "per patient": "this model, per patient"}
    plots = {name: run.evaluation_folder / f"{name}.png" for name in PLOTS}
    return {
        "title": run.title,
        "scope": f"{result['split'].capitalize()} split, {image['n']} images{people}; {kind}.",
        "header": [names.get(name, name) for name in header[1:]],
        "rows": rows,
        "notes": _notes(result),
        "plots": [
            {"path": path, "alt": name.replace("_", " "), "caption": CAPTIONS.get(name, "")}
            for name, path in plots.items()
            if path.is_file()
        ],
        "mistakes": _examples(run, "mistakes"),
        "correct": _examples(run, "correct"),
        "num_mistakes": result["num_mistakes"],
        "n": image["n"],
        "positive": positive,
    }


def _examples(run: RunFiles, kind: str) -> list[dict[str, Any]]:
    examples = []
    for example in run.evaluation.get(kind, []):
        file = run.evaluation_folder / kind / Path(example["thumbnail"] or "none").name
        picture = {"path": file, "alt": example["path"]} if file.is_file() else None
        examples.append({**example, "picture": picture})
    return examples


def _notes(result: Mapping[str, Any]) -> list[str]:
    boot = result["bootstrap"]
    notes = [
        f"In brackets: {100 * boot['level']:.0f} % interval, percentile bootstrap, "
        f"{boot['resamples']} resamples of whole {boot['unit']}s, not stratified, seed "
        f"{boot['seed']}."
    ]
    if boot["unit"] == "image":
        notes.append(
            "The data name no patients, so images count as independent; with several per patient "
            "the intervals are too narrow."
        )
    if result.get("threshold") is not None:
        notes.append(
            f"Threshold {result['threshold']:g} on the score of {result['positive_class']}; "
            f"prevalence {100 * result['image']['prevalence']:.1f} %."
        )
    return [*notes, *result["notes"]]


def _comparison(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Per level a table of runs side by side, with their mean and sample deviation."""
    tables = []
    for level in ("image", "patient"):
        known = [run for run in runs if run.evaluation[level]]
        summary = aggregate_runs([run.evaluation[level] for run in known])
        rows = []
        for rate, name in RATES.items():
            mean, deviation, _ = summary[rate].values()
            average = "undefined" if mean is None else f"{100 * mean:.1f} %"
            average += "" if deviation is None else f" ± {100 * deviation:.1f}"
            rows.append([name, average, *(rate_text(r.evaluation[level], rate) for r in known)])
        title = f"Per {level}: mean ± sample deviation, and runs with 95 % bootstrap intervals"
        header = [f"over {len(known)} runs", *(run.title for run in known)]
        if known:
            tables.append({"title": title, "header": header, "rows": rows})
    return tables


def _training(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Table of what training took, one column per run; empty if nothing was trained."""
    shown = {
        "Steps": ("step", lambda values: f"{values[-1]:.0f}"),
        "Epochs": ("epoch", lambda values: f"{values[-1]:.4g}"),
        "Time": ("time_s", lambda values: duration(values[-1])),
        "Images per second": ("images_per_s", lambda values: f"{median(values):,.1f} (median)"),
        "Waiting for data": ("data_wait_fraction", lambda values: f"{median(values):.1%} (median)"),
        "Peak memory": ("memory_gib", lambda values: f"{max(values):.2f} GiB"),
        "Last loss": ("loss", lambda values: f"{values[-1]:.4f}"),
    }
    trained = [run for run in runs if run.values("step")]
    rows = []
    for name, (key, text) in shown.items():
        found = [run.values(key) for run in trained]
        if any(found):
            rows.append([name, *(text(values) if values else "" for values in found)])
    # a probe is fitted without steps, an evaluation trains nothing
    missing = [r.title for r in runs if r not in trained and r.stage not in ("probe", "evaluate")]
    return {"header": [run.title for run in trained], "rows": rows, "missing": missing}


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
    caption = f"{run.title}: training and validation"
    return [{"path": path, "alt": f"Training curves of {run.title}", "caption": caption}]


def _newest(run: RunFiles, kind: str) -> list[dict[str, Any]]:
    """The picture with the highest epoch in its name (as a number)."""

    def epoch(path: Path) -> tuple[int, str]:
        return int((re.findall(r"\d+", path.stem) or [-1])[-1]), path.name

    found = sorted((run.path / "images").glob(f"{kind}*.png"), key=epoch)
    if not found:
        return []
    caption = f"{run.title}: {CAPTIONS[kind]} File: {found[-1].name}."
    return [{"path": found[-1], "alt": f"{kind.capitalize()} of sample images", "caption": caption}]


def _by_value(runs: Sequence[RunFiles], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """(titles of the runs, value): runs of equal values are listed together."""
    found: dict[str, tuple[list[str], Any]] = {}
    for run, value in zip(runs, values, strict=True):
        found.setdefault(repr(value), ([], value))[0].append(run.title)
    return [(", ".join(titles), value) for titles, value in found.values()]


def _data(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """data.json of each run; equal data are shown once, under the titles of all their runs."""
    sections = []
    first = {repr(run.data): run for run in reversed(runs)}
    for title, data in _by_value(runs, [run.data for run in runs]):
        splits: Mapping[str, Mapping[str, int]] = data.get("counts", {})
        names = dict.fromkeys(name for counts in splits.values() for name in counts)
        rows = [[name, *(f"{c.get(name, 0):,}" for c in splits.values())] for name in names]
        rows.append(["all", *(f"{sum(c.values()):,}" for c in splits.values())])
        counts = {"header": list(splits), "rows": rows}
        pictures, missing = _overview(first[repr(data)])
        more = {"counts": counts, "pictures": pictures, "missing": missing}
        sections.append({"title": title, "data": data, **more})
    return sections


def _overview(run: RunFiles) -> tuple[list[dict[str, Any]], str]:
    """Samples and sizes of the images, drawn once; else the reason for which they are missing."""
    index, folder = run.path / "index.json", run.path / "images"
    paths = [folder / "samples.png", folder / "sizes.png"]
    if not index.is_file():
        return [], ""
    if not all(path.is_file() for path in paths):
        try:
            paths = data_pictures(DataIndex.load(index), folder)
        except (DataError, OSError) as error:
            return [], f"No sample images: {error}."
    captions = ("Samples of each class, evenly spaced in the list of files.", "")
    named = zip(paths, captions, strict=True)
    return [{"path": path, "alt": path.stem, "caption": text} for path, text in named], ""


def _settings(run: RunFiles) -> dict[str, str]:
    used = ("data", "model", *SECTIONS.get(run.stage, tuple(run.config)))
    return _flat({k: v for k, v in run.config.items() if k in used or not isinstance(v, dict)})


def _merged(tables: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """One row per key; values that differ between runs are listed in the order of the runs."""
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = dict.fromkeys(table[key] for table in tables if key in table)
        rows.append((key, " / ".join(values)))
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
    """Render both templates."""
    written = []
    for name in ("report.md", "report.html"):
        text = _template(name).render(values | {"folder": folder})
        # bytes of a file name that are not UTF-8 become question marks
        atomic_write_text(folder / name, text.encode("utf-8", "replace").decode("utf-8"))
        written.append(folder / name)
    return written[0], written[1]


@functools.cache
def _template(name: str) -> Template:
    """HTML is escaped by jinja2, Markdown by `_markdown` on every value."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
    from jinja2.runtime import Context
    from markupsafe import Markup

    @pass_context
    def link(values: Context, path: Path) -> Markup:
        return Markup(quote(Path(os.path.relpath(path, values["folder"])).as_posix()))

    def code(text: str) -> Markup:
        # longer than any run of backticks in the text
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        return Markup(f"{fence}\n{text}\n{fence}")

    def data(path: Path) -> str:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")

    escape = name.endswith(".html")
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
    return environment.get_template(f"{name}.j2")


def _markdown(value: Any) -> Any:
    """Escape what Markdown or its embedded HTML would act on; line breaks become spaces."""
    if hasattr(value, "__html__"):
        return value
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(str(value).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
