"""results.json of a reproduction as tables, Markdown and a picture: the paper's figures above ours, each control below.

Rates in results.json are fractions; in tables they are percent, mean ± sample deviation over the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sssd_fast.evaluation.metrics import aggregate_runs

SCHEMA = "sssd_fast.reproduce/1"
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
CONTROLLED = {
    "covid-ct": "the authors' split by patient",
    "sars-cov-2-ct": "last 20 % of file numbers per class",
}

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table per protocol that has a finished cell."""
    made = []
    for protocol in PROTOCOLS:
        cells = [cell for cell in results["cells"] if cell["protocol"] == protocol]
        if not cells:
            continue
        header = ["", *RATES.values(), "runs", "minutes each"]
        rows = []
        if protocol == "random" and results["part"] == "test":
            for who, rates in results["published"].items():
                rows.append(
                    [who, *(f"{100 * rates[r]:.2f} %" if r in rates else "" for r in RATES), "", ""]
                )
        ours = [
            (_mean([c["image"]["accuracy"] for c in group]), label, group)
            for label, group in _groups(cells)
        ]
        if any(cell["variant"] for cell in cells):
            ours.sort(key=lambda one: -one[0])
        for _, label, group in ours:
            minutes = _mean([(c.get("pretrain_s", 0) + c["finetune_s"]) / 60 for c in group])
            rows.append(
                [label, *_rates([c["image"] for c in group]), str(len(group)), f"{minutes:.1f}"]
            )
        of_split = {cell["seed"]: cell["nearest"] for cell in cells}
        same = len({tuple(n["confusion"][0] + n["confusion"][1]) for n in of_split.values()}) == 1
        nearest = list(of_split.values())[: 1 if same else None]
        rows.append([NEAREST, *_rates(nearest, ("accuracy", "f1")), str(len(nearest)), ""])
        made.append((_title(results, protocol, cells), header, rows))
    return made


def summary(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy alone, methods by splits: header and rows."""
    found = {title: {row[0]: row[1] for row in rows} for title, _, rows in tables(results)}
    names = dict.fromkeys(name for column in found.values() for name in column if name != NEAREST)
    header = ["", *(title.partition(", ")[2].partition(";")[0] for title in found)]
    return header, [
        [name, *(column.get(name, "") for column in found.values())]
        for name in [*names, NEAREST]
        if found
    ]


def lines(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know besides: paired differences, departures from the published set, what is not finished."""
    found = []
    for protocol in PROTOCOLS:
        for control in ("mae", "supervised", "external"):
            pairs = _pairs(results["cells"], protocol, "sssd", control)
            if len(pairs) > 1:
                differences = [100 * (a - b) for a, b in pairs]
                higher = sum(d > 0 for d in differences)
                found.append(
                    f"{protocol}: accuracy of sssd minus {control}, seed by seed: {_mean(differences):+.2f} ± "
                    f"{statistics.stdev(differences):.2f} points; higher in {higher}, equal in "
                    f"{sum(d == 0 for d in differences)} of {len(pairs)} seeds"
                )
    if results["part"] == "val":
        found.append(
            "Evaluated on validation images, which also chose the checkpoint unless finetune.select=last: only for choosing settings."
        )
    found += sorted({line for cell in results["cells"] for line in cell["departures"]})
    missing = results["planned"] - len(results["cells"])
    if missing:
        found.append(f"{missing} of {results['planned']} models are not trained yet.")
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """results.md."""
    return "\n".join(
        [
            f"# {results['title']}: the paper's experiment and its controls",
            "",
            *body(results),
            "",
            LEGEND,
            "",
        ]
    )


LEGEND = (
    "Rates are mean ± sample deviation over the runs. A run is one seed: its split (random), initial weights, masks and order. Minutes: "
    "training of one model, pre-training and compilation included, evaluation not; machines may have been busy with other work."
)


def body(results: Mapping[str, Any]) -> list[str]:
    """Tables, what a reader must know besides, and where it was measured, as lines of Markdown."""
    parts = []
    for title, header, rows in tables(results):
        parts += [f"**{title}**", "", *_markdown_table(header, rows), ""]
    parts += [f"- {line}" for line in lines(results)]
    parts += [
        "",
        "; ".join(
            [
                *map(_machine, results["machines"]),
                *(f"`{command}`" for command in results["commands"]),
            ]
        ),
    ]
    return parts


def _machine(machine: Mapping[str, Any]) -> str:
    changes = " (modified)" if machine["modified"] else ""
    return (
        f"{machine['device']}, torch {machine['torch']}, python {machine['python']}, commit {str(machine['commit'])[:10]}{changes}, "
        f"{machine['date']}"
    )


def picture(results: Mapping[str, Any], *, path: str | Path) -> Path | None:
    """A dot per model, a bar at each mean, dashed lines at the published accuracies; None without a finished cell."""
    from sssd_fast.evaluation.pictures import (
        COLORS,
        INK,
        QUIET,
        new_figure,
        save_figure,
        style_axes,
    )

    panels = [p for p in PROTOCOLS if any(c["protocol"] == p for c in results["cells"])]
    if not panels:
        return None
    groups = {p: _groups([c for c in results["cells"] if c["protocol"] == p]) for p in panels}
    height = 1.6 + 0.45 * max(len(g) + 1 for g in groups.values())
    figure = new_figure(4.4 * len(panels) + 2.2, height)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, protocol in zip(all_axes, panels, strict=True):
        named = [
            (label.split(":")[0], [100 * c["image"]["accuracy"] for c in cells])
            for label, cells in groups[protocol]
        ]
        seeds = {
            c["seed"]: 100 * c["nearest"]["accuracy"]
            for _, cells in groups[protocol]
            for c in cells
        }
        named.append(("nearest neighbour", list(seeds.values())))
        for row, (_, values) in enumerate(named):
            color = QUIET if row == len(named) - 1 else COLORS[row % len(COLORS)]
            axes.plot(values, [row] * len(values), "o", color=color, ms=4.5, alpha=0.75, mec="none")
            axes.plot([_mean(values)] * 2, [row - 0.28, row + 0.28], color=color, lw=1.8)
        if protocol == "random" and results["part"] == "test":
            for (who, rates), dashes in zip(
                results["published"].items(), ("--", ":"), strict=False
            ):
                axes.axvline(100 * rates["accuracy"], color=INK, lw=0.9, ls=dashes, label=who)
            axes.legend(
                frameon=False,
                fontsize=7,
                labelcolor=INK,
                loc="upper left",
                bbox_to_anchor=(0, -0.18),
            )
        axes.set_yticks(range(len(named)), [label for label, _ in named], fontsize=8)
        axes.set_ylim(len(named) - 0.5, -0.5)
        style_axes(
            axes,
            title=f"{results['title']}, {protocol} split",
            xlabel=f"accuracy on {results['part']} images, %",
        )
    return save_figure(figure, path)


def _title(results: Mapping[str, Any], protocol: str, cells: Sequence[Mapping[str, Any]]) -> str:
    how = PROTOCOLS[protocol]
    if protocol == "controlled":
        how += f": {CONTROLLED[results['dataset']]}"
    counts = cells[0]["counts"]
    return f"{results['title']}, {how}; {counts['train']} training and {counts[results['part']]} {results['part']} images"


def _groups(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Cells that differ in the seed alone, under their name, in the order of METHODS."""
    groups: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], tuple(cell["variant"])), []).append(cell)
    order = sorted(groups, key=lambda key: list(METHODS).index(key[0]))
    return [(", ".join([METHODS[key[0]], *key[1]]), groups[key]) for key in order]


def _pairs(
    cells: Sequence[Mapping[str, Any]], protocol: str, one: str, other: str
) -> list[tuple[float, float]]:
    """Accuracies of two methods on equal seeds (and so equal splits), without variants."""
    found = {
        (cell["method"], cell["seed"]): cell["image"]["accuracy"]
        for cell in cells
        if cell["protocol"] == protocol and not cell["variant"]
    }
    seeds = sorted({seed for _, seed in found})
    return [
        (found[one, s], found[other, s]) for s in seeds if (one, s) in found and (other, s) in found
    ]


def _rates(runs: Sequence[Mapping[str, Any]], shown: Iterable[str] = tuple(RATES)) -> list[str]:
    summary = aggregate_runs(runs)
    return [_percent(summary[rate]) if rate in shown else "" for rate in RATES]


def _percent(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "undefined"
    spread = "" if value["deviation"] is None else f" ± {100 * value['deviation']:.2f}"
    return f"{100 * value['mean']:.2f}{spread} %"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
