"""The paper's two experiments with their controls, over seeds and two splits, next to its results.

Every model has run folders of the usual kind; a finished model is never trained again.

OUT/plan.json                              what was requested
OUT/PROTOCOL/seed-N/pretrain-METHOD/       shared by variants that differ only in fine-tuning
OUT/PROTOCOL/seed-N/METHOD/                fine-tuning and evaluation; cell.json when finished
OUT/results.json  results.md  results.png  rewritten after every model
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sssd_fast.config import Config, from_dict, load_config, to_dict
from sssd_fast.data.index import DataIndex
from sssd_fast.data.manifest import SPLIT_NAMES
from sssd_fast.data.splits import split_csv
from sssd_fast.errors import CheckpointError, RunExistsError
from sssd_fast.evaluation.predict import evaluate_run
from sssd_fast.finetune import finetune
from sssd_fast.performance.batch_size import resolve_batch
from sssd_fast.pretrain import pretrain
from sssd_fast.report.report import write_report
from sssd_fast.reproduce.nearest import nearest_rates
from sssd_fast.reproduce.plan import Plan, PlannedModel
from sssd_fast.reproduce.public_sets import departures, image_root, write_official_split
from sssd_fast.reproduce.table import SCHEMA, markdown, notes, picture, tables
from sssd_fast.run.checkpoint import CheckpointManager, find_checkpoint
from sssd_fast.run.device import World, world
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import differences, open_run
from sssd_fast.run.log import Console, duration
from sssd_fast.run.metrics_log import read_metrics


def reproduce(
    plan: Plan, out: Path, *, resume: bool = False, minutes: float | None = None
) -> dict[str, Any]:
    """Train what is not finished yet; returns results.json.

    After `minutes` no further model begins. Raises SssdError.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with world(from_dict(plan.config).device) as here:
        if (out / "plan.json").exists() and not resume:
            raise RunExistsError(
                f"{out} holds a reproduction already; continue it with --resume "
                f"{shlex.quote(str(out))}, or give another --out"
            )
        here.barrier()
        runner = _Runner(plan, out, here)
        models = plan.models()
        # rejects a result of other settings before the plan is written
        finished = [runner.finished(model) for model in models]
        here.barrier()
        if here.main:
            _write_json(out / "plan.json", asdict(plan))
        began, trained = time.monotonic(), 0
        for number, model in enumerate(models):
            if finished[number]:
                continue
            if here.any(deadline is not None and time.monotonic() > deadline):
                runner.log(
                    f"{minutes:g} minutes are over, so no further model begins. "
                    f"Continue with: {runner.resume_with}"
                )
                break
            rates = runner.train(model)
            trained += 1
            elapsed = time.monotonic() - began
            left = elapsed / trained * finished[number + 1 :].count(False)
            name = " ".join([model.method, *model.variant])
            runner.log(
                f"model {number + 1} of {len(models)} ({model.protocol} split, seed {model.seed}, "
                f"{name}): {rates}; {duration(elapsed)} elapsed, about {duration(left)} left"
            )
        results = runner.write_results()
        if here.main:
            with Console(log_file=out / "train.log") as console:
                for title, header, rows in tables(results):
                    console.table(title, header, rows)
                console.info("\n".join([*notes(results), f"results: {out / 'results.md'}"]))
    return results


class _Runner:
    """Trains and evaluates the models of a plan in `out`."""

    def __init__(self, plan: Plan, out: Path, here: World) -> None:
        self.plan = plan
        self.out = out
        self.here = here
        self.resume_with = f"sssd-fast reproduce --resume {shlex.quote(str(out))}"
        self.root = image_root(plan.public, plan.data).absolute()
        self.official = (out / "official.csv").absolute()
        self.pixels: dict[str, Any] = {}  # of the nearest neighbour
        self.pretrained = set[Path]()  # finished in this process
        out.mkdir(parents=True, exist_ok=True)
        if here.main and plan.public.controlled == "official" and "controlled" in plan.protocols:
            where = write_official_split(
                plan.public, plan.data, self.root, plan.official_split, self.official
            )
            self.log(f"leak-controlled split of {plan.public.title}: {where}")
        here.barrier()
        self.machine = _machine(here)

    def log(self, text: str) -> None:
        with Console(log_file=self.out / "train.log", enabled=self.here.main) as console:
            console.info(text)

    def config(self, model: PlannedModel) -> Config:
        return model.config(self.plan, self.root, self.official)

    def finished(self, model: PlannedModel) -> bool:
        """Whether its result exists. Raises CheckpointError for a result of other settings."""
        place = model.folder(self.out)
        if not (place / "cell.json").is_file():
            return False
        done = json.loads((place / "cell.json").read_text(encoding="utf-8"))
        changes = differences(from_dict(done["config"]), _without_places(self.config(model)))
        if done["split"] != self.plan.split:
            changes.append(f"evaluated on {done['split']}, {self.plan.split} is requested now")
        if changes:
            listed = "\n".join(f"  - {change}" for change in changes)
            raise CheckpointError(
                f"{place} is finished, but with other settings:\n{listed}\n"
                "Undo the change, or give another --out."
            )
        return True

    def train(self, model: PlannedModel) -> str:
        """Train and evaluate one model; returns its main rates as text."""
        place, init, times = model.folder(self.out), None, {}
        before = model.pretraining()
        if before is not None:
            folder = before.folder(self.out)
            folder = folder.with_name(f"pretrain-{folder.name}")
            if folder not in self.pretrained:
                self._stage("pretrain", self.config(before), folder)
                self.pretrained.add(folder)
            init = str(find_checkpoint(folder, "last"))
            times["pretrain_s"] = _training_time(folder)
        result = self._stage("finetune", self.config(model), place, init)
        times["finetune_s"] = _training_time(place)
        if self.here.main:
            index = DataIndex.load(place / "index.json")
            split = split_csv(index, place / "split.csv")
            facts = {
                "protocol": model.protocol,
                "seed": model.seed,
                "method": model.method,
                "variant": list(model.variant),
                "split": self.plan.split,
                **times,
                "counts": {name: len(split.ids(name)) for name in SPLIT_NAMES},
                "image": {k: v for k, v in result["image"].items() if k != "intervals"},
                "nearest": nearest_rates(index, split, self.plan.split, self.pixels),
                "departures": departures(self.plan.public, index.counts()),
                "config": to_dict(_without_places(self.config(model))),
                "machine": self.machine,
            }
            _write_json(place / "cell.json", facts)
            write_report(place)
            self.write_results()
        self.here.barrier()
        shown = {name: result.get("image", {}).get(name) for name in ("accuracy", "auc")}
        return ", ".join(f"{name} {100 * v:.1f} %" for name, v in shown.items() if v is not None)

    def _stage(
        self, stage: str, config: Config, place: Path, init: str | None = None
    ) -> dict[str, Any]:
        """Start or continue one run to its end; returns the evaluation of a fine-tuning."""
        folder = place / "checkpoints"
        begun = folder.is_dir() and CheckpointManager(folder).latest() is not None
        self.here.barrier()
        if not begun:
            config = resolve_batch(config, stage, self.here, log=self.log)
        elif getattr(config, stage).batch is not None:
            # the micro-batch that was found at the first start
            found = getattr(load_config(place / "config.yaml"), stage)
            config = config.model_copy(update={stage: found})
        with open_run(
            stage,
            config,
            place,
            self.here,
            resume=begun,
            resume_with=self.resume_with,
            command=self.plan.commands[-1],
        ) as run:
            run.console.rule(f"{stage}: {place.relative_to(self.out)}")
            if stage == "pretrain":
                pretrain(run)
                return {}
            finetune(run, init)
            return evaluate_run(run, self.plan.split)

    def write_results(self) -> dict[str, Any]:
        """results.json, results.md and results.png of all that is finished so far."""
        plan, models = self.plan, self.plan.models()
        found = []
        for path in (model.folder(self.out) / "cell.json" for model in models):
            if path.is_file():
                found.append(json.loads(path.read_text(encoding="utf-8")))
        machines = dict.fromkeys(json.dumps(cell.pop("machine")) for cell in found)
        results = {
            "schema": SCHEMA,
            "dataset": plan.dataset,
            "title": plan.public.title,
            "split": plan.split,
            "planned": len(models),
            "commands": [_without_folders(command) for command in plan.commands],
            "settings": {**plan.config, "data": {**plan.config["data"], "source": plan.dataset}},
            "machines": [json.loads(text) for text in machines],
            "published": {source: dict(rates) for source, rates in plan.public.published.items()},
            "cells": [{k: v for k, v in cell.items() if k != "config"} for cell in found],
        }
        if self.here.main:
            _write_json(self.out / "results.json", results)
            atomic_write_text(self.out / "results.md", markdown(results))
            picture(results, path=self.out / "results.png")
        return results


def _write_json(path: Path, content: Any) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _without_places(config: Config) -> Config:
    """File names only: folders may be moved between two starts."""
    data, extra = config.data, config.pretrain.extra
    names = {"source": Path(data.source).name, "split": Path(data.split).name}
    extra_name = {"extra": None if extra is None else Path(extra).name}
    pretraining = config.pretrain.model_copy(update=extra_name)
    update = {"data": data.model_copy(update=names), "pretrain": pretraining}
    return config.model_copy(update=update)


def _training_time(folder: Path) -> float:
    """Seconds of training over all starts of a run, compilation included."""
    return max((float(record["time_s"]) for record in read_metrics(folder)), default=0.0)


def _machine(here: World) -> dict[str, Any]:
    env = collect_environment()
    gpu = env["gpus"][here.device.index or 0]["name"] if here.device.type == "cuda" else None
    threads = env["cpu"]["torch_threads"]
    return {
        "type": here.device.type,
        "device": gpu or f"{env['cpu']['model']}, {threads} thread{'s' * (threads != 1)}",
        "processes": here.size,
        "torch": env["torch"]["version"],
        "python": env["python"]["version"],
        "commit": env["sssd_fast"]["commit"],
        "modified": env["sssd_fast"]["modified"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _without_folders(command: str) -> str:
    """Paths cut to their last name: results are shown to others."""
    words = shlex.split(command)
    return shlex.join(Path(w).name if "/" in w and Path(w).exists() else w for w in words)
