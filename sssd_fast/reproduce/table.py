"""results.json of a reproduction as tables in Markdown, next to the paper's results.

Rates in results.json are fractions; in tables they are percent, mean ± sample deviation over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sssd_fast.config import ModelConfig
from sssd_fast.evaluation.metrics import aggregate_runs
from sssd_fast.reproduce.public_sets import PUBLIC_SETS

SCHEMA = "sssd_fast.reproduce/3"
RATES = {"accuracy": "Accuracy", "f1": "F1", "auc": "AUC"}
METHODS = {
    "sssd": "SSSD: masked autoencoder with self-distillation",
    "mae": "the same without distillation",
    "supervised": "the same ViT from scratch, no pre-training",
    "external": "SSSD, pre-trained on the other set's images too",
}
NEAREST = "nearest neighbour on 32 x 32 pixels"

Cells = list[Mapping[str, Any]]
Results = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(results: Results) -> list[Table]:
    """One table per protocol that has a finished model."""
    found = []
    for protocol, groups in _protocols(results):
        cells = [cell for group in groups.values() for cell in group]
        nearest = list({cell["seed"]: cell["nearest"] for cell in cells}.values())
        rows = []
        if protocol == "random":
            title = "stratified random 80/20, the paper's protocol"
            for source, known in results["published"].items():
                shown = [f"{100 * known[rate]:.2f} %" if rate in known else "" for rate in RATES]
                rows.append([source, *shown, "", ""])
        else:
            title = f"leak-controlled: {PUBLIC_SETS[results['dataset']].controlled_title}"
            # the split is the same for all seeds
            nearest = nearest[:1]
        for method, group in groups.items():
            minutes = statistics.fmean(c.get("pretrain_s", 0) + c["finetune_s"] for c in group) / 60
            rates = _rates(cell["image"] for cell in group)
            rows.append([METHODS[method], *rates, str(len(group)), f"{minutes:.1f}"])
        # its scores are 0 or 1, so its AUC would be one point
        rows.append([NEAREST, *_rates(nearest)[:2], "", str(len(nearest)), ""])
        counts = cells[0]["counts"]
        images = f"{counts['train']} training and {counts['test']} test images"
        header = ["", *RATES.values(), "runs", "minutes each"]
        found.append((f"{results['title']}, {title}; {images}", header, rows))
    return found


def notes(results: Results) -> list[str]:
    """Paired differences, departures from the published set, and what is not finished."""
    found = []
    for protocol, groups in _protocols(results):
        accuracy = {m: {c["seed"]: c["image"]["accuracy"] for c in g} for m, g in groups.items()}
        ours = accuracy.pop("sssd", {})
        for control, theirs in accuracy.items():
            # equal seeds have equal splits
            points = [100 * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys()]
            if len(points) > 1:
                found.append(
                    f"{protocol}: accuracy of sssd minus {control}, seed by seed: "
                    f"{statistics.fmean(points):+.2f} ± {statistics.stdev(points):.2f} points over "
                    f"{len(points)} seeds"
                )
    found += sorted({line for cell in results["cells"] for line in cell["departures"]})
    missing = results["planned"] - len(results["cells"])
    if missing:
        found.append(f"{missing} of {results['planned']} models are not trained yet.")
    return found


def markdown(results: Results) -> str:
    """Tables, notes, machines and commands."""
    width, depth, _ = ModelConfig.model_validate(results["settings"]["model"]).encoder_shape
    size = " x ".join(map(str, results["settings"]["model"]["image_size"]))
    blocks = [f"## {results['title']}: ViT {width}x{depth} on {size} pixels"]
    for title, header, rows in tables(results):
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        blocks += [f"**{title}**", "\n".join(lines)]
    blocks.append("\n".join(f"- {line}" for line in notes(results)))
    sources = [*dict.fromkeys(cell["machine"] for cell in results["cells"])]
    sources += [f"`{command}`" for command in results["commands"]]
    return "\n\n".join(filter(None, [*blocks, "; ".join(sources)])) + "\n"


def _protocols(results: Results) -> Iterator[tuple[str, dict[str, Cells]]]:
    """(protocol, method -> its models) of each protocol with a finished model."""
    for protocol in ("random", "controlled"):
        cells: Cells = [cell for cell in results["cells"] if cell["protocol"] == protocol]
        groups = {m: [cell for cell in cells if cell["method"] == m] for m in METHODS}
        if cells:
            yield protocol, {m: group for m, group in groups.items() if group}


def _rates(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    cells = []
    summary = aggregate_runs(list(runs))
    for mean, deviation, _ in (summary[rate].values() for rate in RATES):
        spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
        cells.append("undefined" if mean is None else f"{100 * mean:.2f}{spread} %")
    return cells
