"""The paper's two experiments with their controls, over seeds and two splits, next to its results.

Every model has run folders of the usual kind; a finished model is never trained again.

OUT/plan.json                              what was requested
OUT/PROTOCOL/seed-N/pretrain-METHOD/       shared by variants that differ only in fine-tuning
OUT/PROTOCOL/seed-N/METHOD/                fine-tuning and evaluation
OUT/results.json                           results of the finished models, in "cells"
OUT/results.md  results.png                the same to read, rewritten after every model
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sssd_fast.config import from_dict, load_config
from sssd_fast.data.index import DataIndex
from sssd_fast.data.manifest import SPLIT_NAMES
from sssd_fast.data.split import split_csv
from sssd_fast.errors import CheckpointError, RunExistsError
from sssd_fast.evaluation.predict import evaluate_run
from sssd_fast.finetune import finetune
from sssd_fast.performance.batch_size import resolve_batch
from sssd_fast.pretrain import pretrain
from sssd_fast.report.report import write_report
from sssd_fast.reproduce.nearest import nearest_rates
from sssd_fast.reproduce.plan import Plan, PlannedModel, load_plan, planned
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
    """Train what is not finished yet, for about `minutes`; returns results.json."""
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
        missing = [model for model in models if model not in runner.cells]
        here.barrier()
        if here.main:
            _write_json(out / "plan.json", asdict(plan))
        began = time.monotonic()
        for trained, model in enumerate(missing, start=1):
            if here.any(deadline is not None and time.monotonic() > deadline):
                runner.log(
                    f"{minutes:g} minutes are over, so no further model begins. "
                    f"Continue with: {runner.resume_with}"
                )
                break
            rates = runner.train(model)
            elapsed = time.monotonic() - began
            left = elapsed / trained * (len(missing) - trained)
            name = " ".join([model.method, *model.variant])
            runner.log(
                f"model {models.index(model) + 1} of {len(models)} ({model.protocol} split, seed "
                f"{model.seed}, {name}): {rates}; {duration(elapsed)} elapsed, about "
                f"{duration(left)} left"
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
        self.machine = _machine(here)
        self.results: dict[str, Any] = {"cells": [], "machines": []}
        self.cells: dict[PlannedModel, Any] = {}
        earlier = out / "results.json"
        if (out / "plan.json").is_file() and earlier.is_file():
            try:
                self.results = json.loads(earlier.read_text(encoding="utf-8"))
                self.cells = {planned(cell): cell for cell in self.results["cells"]}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{earlier} is damaged ({error}); delete it: finished models are evaluated "
                    "again, not trained"
                ) from None
            _check_settings(out, load_plan(out), plan, self.results)
        out.mkdir(parents=True, exist_ok=True)
        if here.main and plan.public.controlled == "official" and "controlled" in plan.protocols:
            where = write_official_split(
                plan.public, plan.data, self.root, plan.official_split, self.official
            )
            self.log(f"leak-controlled split of {plan.public.title}: {where}")
        here.barrier()

    def log(self, text: str) -> None:
        with Console(log_file=self.out / "train.log", enabled=self.here.main) as console:
            console.info(text)

    def train(self, model: PlannedModel) -> str:
        """Train and evaluate one model; returns its main rates as text."""
        place, init, times = model.folder(self.out), None, {}
        before = model.pretraining()
        if before is not None:
            folder = before.folder(self.out)
            folder = folder.with_name(f"pretrain-{folder.name}")
            if folder not in self.pretrained:
                self._stage("pretrain", before, folder)
                self.pretrained.add(folder)
            init = str(find_checkpoint(folder, "last"))
            times["pretrain_s"] = _training_time(folder)
        result = self._stage("finetune", model, place, init)
        times["finetune_s"] = _training_time(place)
        if self.here.main:
            index = DataIndex.load(place / "index.json")
            split = split_csv(index, place / "split.csv")
            self.cells[model] = {
                **asdict(model),
                **times,
                "counts": {name: len(split.ids(name)) for name in SPLIT_NAMES},
                "image": {k: v for k, v in result["image"].items() if k != "intervals"},
                "nearest": nearest_rates(index, split, self.plan.split, self.pixels),
                "departures": departures(self.plan.public, index.counts()),
            }
            if self.machine not in self.results["machines"]:
                self.results["machines"].append(self.machine)
            write_report(place)
            self.write_results()
        self.here.barrier()
        shown = {name: result.get("image", {}).get(name) for name in ("accuracy", "auc")}
        return ", ".join(f"{name} {100 * v:.1f} %" for name, v in shown.items() if v is not None)

    def _stage(
        self, stage: str, model: PlannedModel, place: Path, init: str | None = None
    ) -> dict[str, Any]:
        """Start or continue one run to its end; returns the evaluation of a fine-tuning."""
        folder = place / "checkpoints"
        begun = folder.is_dir() and CheckpointManager(folder).latest() is not None
        self.here.barrier()
        config = model.config(self.plan, self.root, self.official)
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
        self.results |= {
            "schema": SCHEMA,
            "dataset": plan.dataset,
            "title": plan.public.title,
            "split": plan.split,
            "planned": len(models),
            "commands": [_without_folders(command) for command in plan.commands],
            "settings": {**plan.config, "data": {**plan.config["data"], "source": plan.dataset}},
            "published": plan.public.published,
            "cells": [self.cells[model] for model in models if model in self.cells],
        }
        if self.here.main:
            _write_json(self.out / "results.json", self.results)
            atomic_write_text(self.out / "results.md", markdown(self.results))
            picture(self.results, path=self.out / "results.png")
        return self.results


def _write_json(path: Path, content: Any) -> None:
    atomic_write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _check_settings(out: Path, before: Plan, now: Plan, results: dict[str, Any]) -> None:
    """Raises CheckpointError if finished models are not those of the plan `now`."""
    changes = differences(from_dict(before.config), from_dict(now.config))
    if results["split"] != now.split:
        changes.append(f"evaluated on {results['split']}, {now.split} is requested now")
    # folders may be moved between two starts
    if before.external and Path(before.external).name != Path(str(now.external)).name:
        changes.append(f"external was {before.external}, is {now.external}")
    if changes and results["cells"]:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise CheckpointError(
            f"{out} holds finished models of other settings:\n{listed}\n"
            "Undo the change, or give another --out."
        )


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
