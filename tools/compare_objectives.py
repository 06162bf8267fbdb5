"""Compare the forms of the self-distillation: linear probe and fine-tuning on validation images.

    python tools/compare_objectives.py covid-ct path/to/covid-ct/images --out runs/objectives \
        --json benchmarks/results/objectives/covid-ct.json pretrain.epochs=100 finetune.epochs=30

For each seed, every form is trained with the same data, order, masks and number of steps. The test
split stays unread. A finished model is not trained again. The table and the picture are those of
docs/self-distillation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import sssd_fast as sf
from sssd_fast.config import OBJECTIVES
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.metrics_log import read_metrics

NONE = "none"  # plain masked autoencoder
FORMS = (NONE, *OBJECTIVES)
# A fifth for validation: more images than a run needs, for a smaller error.
SPLIT = ["data.split=random", "data.test_fraction=0.2", "data.val_fraction=0.2"]
MONITOR = ("loss_reconstruction", "loss_distillation", "rank_student", "rank_teacher", "entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("data")
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="PNG of the monitor of collapse")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    for seed in args.seeds:
        for form in args.forms:
            found = _model(args, seed, form)
            print(form, seed, {k: found[k] for k in ("probe", "finetune", "minutes")}, flush=True)
    models = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/model.json"))]
    env = collect_environment()
    record = {
        "set": args.name,
        "config": args.config,
        "settings": args.settings,
        "cpu": env["cpu"]["model"],
        "torch": env["torch"]["version"],
        "commit": env["sssd_fast"]["commit"],
        "models": models,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    if args.picture:
        picture(record, args.picture)


def _model(args: argparse.Namespace, seed: int, form: str) -> dict[str, Any]:
    """Trains one model, or reads what was found earlier."""
    place = args.out / f"{form}-{seed}"
    if (place / "model.json").exists():
        return dict(json.loads((place / "model.json").read_text()))
    objective = ["objective.weight=0"] if form == NONE else [f"objective.name={form}"]
    quiet = ["tensorboard=false", "pretrain.image_epochs=0", "evaluate.bootstrap=100"]
    seeds = [f"seed={seed}", f"data.split_seed={seed}"]
    common: dict[str, Any] = {"config": args.config, "overwrite": True}
    common["settings"] = [*SPLIT, *quiet, *seeds, *args.settings, *objective]
    start = time.perf_counter()
    pre = sf.pretrain(args.data, out=place / "pretrain", **common)
    init = {"init": pre.out, "split": "val"}
    probe = sf.probe(args.data, out=place / "probe", **init, **common).metrics["image"]
    fine = sf.finetune(args.data, out=place / "finetune", **init, **common).metrics["image"]
    found = {
        "form": form,
        "seed": seed,
        "probe": {rate: probe[rate] for rate in ("accuracy", "auc")},
        "finetune": {rate: fine[rate] for rate in ("accuracy", "auc")},
        "validation_images": probe["n"],
        "monitor": [
            {name: record[name] for name in ("epoch", *MONITOR) if name in record}
            for record in read_metrics(pre.out)
            if record["kind"] == "val"
        ],
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }
    part = place / f"model.json.{os.getpid()}"
    part.write_text(json.dumps(found))
    part.replace(place / "model.json")
    return found


def table(record: dict[str, Any]) -> str:
    """Means and sample deviations over the seeds, and the paired difference to no distillation."""
    lines = [
        f"**{record['set']}**, {record['models'][0]['validation_images']} validation images",
        "",
        "| form | probe: accuracy | AUC | fine-tuned: accuracy | AUC | minus none "
        "| rank of student / teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    by = {(m["form"], m["seed"]): m for m in record["models"]}
    for form in FORMS:
        group = [m for m in record["models"] if m["form"] == form]
        if not group:
            continue
        cells = [
            _spread([100 * m[stage][rate] for m in group])
            for stage in ("probe", "finetune")
            for rate in ("accuracy", "auc")
        ]
        pairs = [
            100 * (m["finetune"]["accuracy"] - by[NONE, m["seed"]]["finetune"]["accuracy"])
            for m in group
            if (NONE, m["seed"]) in by
        ]
        cells.append("" if form == NONE else _spread(pairs))
        last = [m["monitor"][-1] for m in group]
        ranks = (
            [statistics.fmean(v[f"rank_{s}"] for v in last) for s in ("student", "teacher")]
            if "rank_student" in last[0]
            else []
        )
        cells.append(f"{ranks[0]:.1f} / {ranks[1]:.1f}" if ranks else "")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(record: dict[str, Any], path: Path) -> None:
    """The monitor over the epochs of pre-training, mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "rank_student": "effective rank, student",
        "rank_teacher": "effective rank, teacher",
        "entropy": "entropy of the mean assignment",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for color, form in enumerate(FORMS):
            curves = [m["monitor"] for m in record["models"] if m["form"] == form]
            if not curves or name not in curves[0][0]:
                continue
            epochs = [point["epoch"] for point in curves[0]]
            rows = zip(*([point[name] for point in curve] for curve in curves), strict=True)
            means = [statistics.fmean(row) for row in rows]
            axis.plot(epochs, means, color=f"C{color}", label=form)
        axis.set_title(title)
        axis.set_xlabel("epoch of pre-training")
        axis.set_ylim(bottom=0)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
