"""The whole job: pre-train, fine-tune, evaluate, report; once, or over several seeds or folds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sssd_fast.config import Config
from sssd_fast.data.index import count_images
from sssd_fast.evaluation.evaluate import evaluate_run
from sssd_fast.evaluation.metrics import RATES, aggregate_runs
from sssd_fast.finetune import finetune
from sssd_fast.performance.batch_size import resolve_batch
from sssd_fast.performance.schedule import fit_minutes
from sssd_fast.pretrain import pretrain
from sssd_fast.report.report import write_report
from sssd_fast.run.checkpoint import find_checkpoint
from sssd_fast.run.device import World, world
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import open_run
from sssd_fast.run.log import Console

STAGES = ("pretrain", "finetune")


def run_all(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    seeds: Sequence[int] = (),
    folds: bool = False,
    pretraining: bool = True,
    minutes: float | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Writes out/pretrain, out/finetune and out/report.html, or the same below out/seed-N or
    out/fold-N and out/summary.json. Returns the metrics, of several runs the summary.

    minutes: of one model, see `fit_minutes`.
    """
    stages = STAGES if pretraining else STAGES[1:]
    options: dict[str, Any] = {
        "resume": resume,
        "overwrite": overwrite,
        "command": command,
        "top": out,
    }
    with world(config.device) as here:
        here.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
        if not resume:
            log = print if here.main else lambda text: None
            for stage in stages:
                config = resolve_batch(config, stage, here, log=log)
            data = config.data
            images = round(count_images(data) * (1 - data.test_fraction - data.val_fraction))
            config = fit_minutes(config, stages, images, minutes, here, log)
        variants = _variants(config, seeds, folds)
        if not variants:
            return _once(config, out, here, stages, **options)
        results = {
            name: _once(variant, out / name, here, stages, **options)
            for name, variant in variants.items()
        }
        return _summary(out, results) if here.main else {}


def stages_of(out: Path) -> list[Path]:
    """The runs in a folder of `run`: both stages, or the fine-tuning of each seed or fold."""
    single = [out / name for name in STAGES if (out / name / "config.yaml").exists()]
    return single or sorted(path.parent for path in out.glob("*-*/finetune/config.yaml"))


def _variants(config: Config, seeds: Sequence[int], folds: bool) -> dict[str, Config]:
    def changed(seed: int, **data: Any) -> Config:
        return config.model_copy(update={"seed": seed, "data": config.data.model_copy(update=data)})

    if seeds:
        return {f"seed-{s}": changed(s, split_seed=s) for s in seeds}
    count = config.data.folds if folds else 0
    return {f"fold-{k}": changed(config.seed, split="kfold", fold=k) for k in range(count)}


def _once(
    config: Config,
    out: Path,
    here: World,
    stages: Sequence[str],
    *,
    resume: bool,
    overwrite: bool,
    command: str,
    top: Path,
) -> dict[str, Any]:
    """One run of all stages. When resuming, a complete stage is not trained again, and one without
    a checkpoint starts again.
    """
    init = None
    result: dict[str, Any] = {}
    for number, stage in enumerate(stages, 1):
        place, position = out / stage, f"stage {number} of {len(stages)}"
        again = resume and any((place / "checkpoints").glob("*.pt"))
        if not again:
            config = resolve_batch(
                config, stage, here, log=print if here.main else lambda text: None
            )
        with open_run(
            stage,
            config,
            place,
            here,
            resume=again,
            overwrite=overwrite,
            resume_with=f"sssd-fast run --resume {shlex.quote(str(top))}",
            command=command,
            top=top,
            position=position,
            later=tuple(stages[number:]),
        ) as run:
            run.console.rule(f"{run.title}: {place}")
            if stage == "pretrain":
                pretrain(run)
                init = str(find_checkpoint(place, "last"))
            else:
                finetune(run, init)
                result = evaluate_run(run)
    if here.main:
        report = write_report(out, stages_of(out))
        with Console(log_file=out / "train.log") as console:
            console.info(f"report: {report[1]}")
    return result


def _summary(out: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation of each rate over the runs: summary.json and a table."""
    summary: dict[str, Any] = {"runs": list(results)}
    with Console(log_file=out / "train.log") as console:
        for level in ("image", "patient"):
            found = [result[level] for result in results.values() if result[level] is not None]
            if not found:
                continue
            summary[level] = aggregate_runs(found)
            rows = [
                (RATES[rate], _percent(v["mean"]), _percent(v["deviation"]), str(v["n"]))
                for rate, v in summary[level].items()
            ]
            title = f"over {len(results)} runs, per {level}"
            console.table(title, ("", "mean", "deviation", "runs"), rows)
        atomic_write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        report = write_report(out, [out / name / "finetune" for name in results])
        console.info(f"summary: {out / 'summary.json'}\nreport: {report[1]}")
    return summary


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.2f} %"
