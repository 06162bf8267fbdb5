"""results.json of a reproduction as tables, Markdown and a picture, next to the paper's results.

Rates in results.json are fractions; in tables they are percent, mean ± sample deviation over seeds.
`python -m sssd_fast.reproduce.table` rewrites the results in docs/results.md from committed files.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sssd_fast.config import ModelConfig
from sssd_fast.errors import SssdError
from sssd_fast.evaluation import pictures
from sssd_fast.evaluation.metrics import aggregate_runs
from sssd_fast.reproduce.public_sets import PUBLIC_SETS
from sssd_fast.run.files import atomic_write_text

SCHEMA = "sssd_fast.reproduce/2"
RATES = {"accuracy": "Accuracy", "f1": "F1", "auc": "AUC"}
METHODS = {
    "sssd": "SSSD: masked autoencoder with self-distillation",
    "mae": "the same without distillation",
    "supervised": "the same ViT from scratch, no pre-training",
    "external": "SSSD, pre-trained on the other set's images too",
}
NEAREST = "nearest neighbour on 32 x 32 pixels"
PROTOCOLS = {
    "random": "stratified random 80/20, the paper's protocol",
    "controlled": "leak-controlled",
}
LEGEND = (
    "Rates are mean ± sample deviation over the runs. A run is one seed: its split (random), "
    "initial weights, masks and order. Minutes: training of one model, pre-training and "
    "compilation included, evaluation not; machines may have been busy with other work."
)
MARKERS = ("<!-- results -->", "<!-- /results -->")

Results = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(results: Results) -> list[Table]:
    """One table per protocol that has a finished model."""
    found = []
    for protocol, cells in _by_protocol(results).items():
        title = PROTOCOLS[protocol]
        if protocol == "controlled":
            title += f": {PUBLIC_SETS[results['dataset']].controlled_title}"
        split, counts = results["split"], cells[0]["counts"]
        images = f"{counts['train']} training and {counts[split]} {split} images"
        rows = []
        for source, rates in _published(results, protocol).items():
            shown = [f"{100 * rates[rate]:.2f} %" if rate in rates else "" for rate in RATES]
            rows.append([source, *shown, "", ""])
        for label, group in _groups(cells):
            minutes = [(cell.get("pretrain_s", 0) + cell["finetune_s"]) / 60 for cell in group]
            means = _rates([cell["image"] for cell in group])
            rows.append([label, *means, str(len(group)), f"{statistics.fmean(minutes):.1f}"])
        nearest = list({cell["seed"]: cell["nearest"] for cell in cells}.values())
        # equal for all seeds of a fixed split
        nearest = nearest if len({str(one["confusion"]) for one in nearest}) > 1 else nearest[:1]
        # its scores are 0 or 1, so its AUC would be one point
        rows.append([NEAREST, *_rates(nearest)[:2], "", str(len(nearest)), ""])
        header = ["", *RATES.values(), "runs", "minutes each"]
        found.append((f"{results['title']}, {title}; {images}", header, rows))
    return found


def notes(results: Results) -> list[str]:
    """Paired differences, departures from the published set, and what is not finished."""
    found = []
    for protocol, cells in _by_protocol(results).items():
        plain = [cell for cell in cells if not cell["variant"]]
        accuracy = {(cell["method"], cell["seed"]): cell["image"]["accuracy"] for cell in plain}
        for control in ("mae", "supervised", "external"):
            # equal seeds have equal splits
            seeds = [s for method, s in accuracy if method == control and ("sssd", s) in accuracy]
            points = [100 * (accuracy["sssd", s] - accuracy[control, s]) for s in sorted(seeds)]
            if len(points) > 1:
                found.append(
                    f"{protocol}: accuracy of sssd minus {control}, seed by seed: "
                    f"{statistics.fmean(points):+.2f} ± {statistics.stdev(points):.2f} points; "
                    f"higher in {sum(d > 0 for d in points)}, equal in {points.count(0)} of "
                    f"{len(points)} seeds"
                )
    if results["split"] == "val":
        found.append(
            "Evaluated on validation images, which also chose the checkpoint unless "
            "finetune.select=last: only for choosing settings."
        )
    found += sorted({line for cell in results["cells"] for line in cell["departures"]})
    missing = results["planned"] - len(results["cells"])
    if missing:
        found.append(f"{missing} of {results['planned']} models are not trained yet.")
    return found


def markdown(results: Results) -> str:
    title = f"# {results['title']}: the paper's experiment and its controls"
    return f"{title}\n\n{body(results)}\n\n{LEGEND}\n"


def body(results: Results) -> str:
    """Tables, notes, machines and commands as Markdown."""
    blocks = []
    for title, header, rows in tables(results):
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        blocks += [f"**{title}**", "\n".join(lines)]
    blocks.append("\n".join(f"- {line}" for line in notes(results)))
    sources = [
        f"{machine['device']}, torch {machine['torch']}, python {machine['python']}, commit "
        f"{str(machine['commit'])[:10]}{' (modified)' if machine['modified'] else ''}, "
        f"{machine['date']}"
        for machine in results["machines"]
    ]
    sources += [f"`{command}`" for command in results["commands"]]
    return "\n\n".join(filter(None, [*blocks, "; ".join(sources)]))


def picture(results: Results, *, path: str | Path) -> Path | None:
    """A dot per model, a bar at each mean, dashed lines at the published accuracies.

    None if no model is finished.
    """
    lines = {}
    for protocol, cells in _by_protocol(results).items():
        named = [
            (label.split(":")[0], [100 * cell["image"]["accuracy"] for cell in group])
            for label, group in _groups(cells)
        ]
        seeds = {cell["seed"]: 100 * cell["nearest"]["accuracy"] for cell in cells}
        lines[protocol] = [*named, ("nearest neighbour", list(seeds.values()))]
    if not lines:
        return None
    height = 1.6 + 0.45 * max(map(len, lines.values()))
    figure = pictures.new_figure(4.4 * len(lines) + 2.2, height)
    all_axes = figure.subplots(1, len(lines), squeeze=False, sharex=True)[0]
    for axes, (protocol, named) in zip(all_axes, lines.items(), strict=True):
        for row, (_, values) in enumerate(named):
            color = pictures.COLORS[row % len(pictures.COLORS)]
            color = pictures.QUIET if row == len(named) - 1 else color
            axes.plot(values, [row] * len(values), "o", color=color, ms=4.5, alpha=0.75, mec="none")
            axes.plot([statistics.fmean(values)] * 2, [row - 0.28, row + 0.28], color=color, lw=1.8)
        published = _published(results, protocol)
        for (source, rates), dashes in zip(published.items(), ("--", ":"), strict=False):
            x = 100 * rates["accuracy"]
            axes.axvline(x, color=pictures.INK, lw=0.9, ls=dashes, label=source)
        if published:
            place = {"loc": "upper left", "bbox_to_anchor": (0, -0.18)}
            axes.legend(frameon=False, fontsize=7, labelcolor=pictures.INK, **place)
        axes.set_yticks(range(len(named)), [label for label, _ in named], fontsize=8)
        axes.set_ylim(len(named) - 0.5, -0.5)
        title = f"{results['title']}, {protocol.replace('controlled', 'leak-controlled')} split"
        xlabel = f"accuracy on {results['split']} images, %"
        pictures.style_axes(axes, title=title, xlabel=xlabel)
    return pictures.save_figure(figure, path)


def page(text: str, found: Mapping[str, Results]) -> str:
    """`text` with the results between its markers replaced by those of name -> results.json."""

    def on_gpu(results: Results) -> bool:
        return any(machine["type"] == "cuda" for machine in results["machines"])

    blocks = [] if any(map(on_gpu, found.values())) else ["## On a GPU", "Not measured."]
    for name, results in sorted(found.items(), key=lambda one: (not on_gpu(one[1]), one[0])):
        width, depth, _ = ModelConfig.model_validate(results["settings"]["model"]).encoder_shape
        size = " x ".join(map(str, results["settings"]["model"]["image_size"]))
        title = f"## {results['title']}: ViT {width}x{depth} on {size} pixels"
        blocks.append(title + ("" if on_gpu(results) else ", CPU"))
        if not on_gpu(results):
            blocks.append(
                "A small model, trained for minutes on a CPU: this shows that everything runs on "
                "the real images and how the methods compare at this size, not what the paper's "
                "model reaches."
            )
        blocks += [body(results) + f"; file `{name}.json`"]
        blocks += [f"![{results['title']}, accuracy of every model](results/{name}.png)"]
    before, after = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
    return "\n\n".join([before + MARKERS[0], *blocks, MARKERS[1] + after])


def _by_protocol(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The finished models of each protocol that has one."""
    cells = {p: [cell for cell in results["cells"] if cell["protocol"] == p] for p in PROTOCOLS}
    return {protocol: found for protocol, found in cells.items() if found}


def _published(results: Results, protocol: str) -> Mapping[str, Mapping[str, float]]:
    """The paper's results, which are for test images of the random split."""
    comparable = protocol == "random" and results["split"] == "test"
    return dict(results["published"]) if comparable else {}


def _groups(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Models that differ only in the seed, by name; in the order of METHODS, or the best first."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], *cell["variant"]), []).append(cell)
    order = sorted(groups, key=lambda key: list(METHODS).index(key[0]))
    if any(len(key) > 1 for key in order):
        order.sort(key=lambda key: -statistics.fmean(c["image"]["accuracy"] for c in groups[key]))
    return [(", ".join([METHODS[key[0]], *key[1:]]), groups[key]) for key in order]


def _rates(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    summary = aggregate_runs(runs)
    for mean, deviation, _ in (summary[rate].values() for rate in RATES):
        spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
        cells.append("undefined" if mean is None else f"{100 * mean:.2f}{spread} %")
    return cells


def main(folder: Path = Path("benchmarks/results/paper"), docs: Path = Path("docs")) -> None:
    """Rewrite docs/results.md and docs/results/*.png from the files in `folder`."""
    paths = sorted(folder.glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for name, results in found.items():
        if (results["schema"], results["split"]) != (SCHEMA, "test"):
            raise SssdError(f"{name}.json: needs schema {SCHEMA} and results on test images")
    target = docs / "results.md"
    atomic_write_text(target, page(target.read_text(encoding="utf-8"), found))
    for name, results in found.items():
        picture(results, path=docs / "results" / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
