"""The paper's two experiments with their controls, over seeds and on two kinds of split, beside what the paper says.

For each seed, protocol and method: pre-train, fine-tune, evaluate. Order: all methods of the first seed first, so that a run that is
stopped has something to compare. Everything lies in run folders of the usual kind; what is finished is never computed again.

OUT/plan.json                            what was asked
OUT/PROTOCOL/seed-N/pretrain-METHOD/     shared by variants that differ in fine-tuning alone
OUT/PROTOCOL/seed-N/METHOD/              fine-tuning and evaluation; cell.json when finished
OUT/results.json  results.md  results.png     anew after every cell
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
from sssd_fast.data.splits import split_csv
from sssd_fast.errors import CheckpointError, RunExistsError
from sssd_fast.evaluation.predict import evaluate_run
from sssd_fast.finetune import finetune
from sssd_fast.performance.batch_size import resolve_batch
from sssd_fast.pretrain import pretrain
from sssd_fast.report.report import write_report
from sssd_fast.reproduce.nearest import NearestNeighbour
from sssd_fast.reproduce.plan import Cell, Plan, cell_config, cells_of, folder_name
from sssd_fast.reproduce.public_sets import departures, image_root, write_official_split
from sssd_fast.reproduce.table import SCHEMA, lines, markdown, picture, tables
from sssd_fast.run.checkpoint import CheckpointManager, find_checkpoint
from sssd_fast.run.device import World, world
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import Run, differences, open_run
from sssd_fast.run.log import Console, duration
from sssd_fast.run.metrics_log import read_metrics


def reproduce(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Runs what is not finished yet; returns results.json. `minutes`: no cell begins later than that. Raises SssdError."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with world(from_dict(plan.config).device) as here:
        if (out / "plan.json").exists() and not resume:
            raise RunExistsError(
                f"{out} holds a reproduction already; go on with --resume {shlex.quote(str(out))}, or give another --out"
            )
        here.barrier()
        work = _Reproduction(plan, out, here)
        every = cells_of(plan)
        finished = [
            work.finished(cell) for cell in every
        ]  # refuses other settings before the plan is written
        here.barrier()
        if here.main:
            atomic_write_text(out / "plan.json", json.dumps(asdict(plan), indent=2) + "\n")
        began, trained = time.monotonic(), 0
        for number, cell in enumerate(every):
            if finished[number]:
                continue
            if here.any(deadline is not None and time.monotonic() > deadline):
                work.say(
                    f"{minutes:g} minutes are over, so no further model begins. Go on with: {work.again}"
                )
                break
            rates, trained = work.run(cell), trained + 1
            elapsed, ahead = time.monotonic() - began, finished[number + 1 :].count(False)
            work.say(
                f"model {number + 1} of {len(every)} ({cell.protocol} split, seed {cell.seed}, {cell.label}): {rates}; {duration(elapsed)} "
                f"elapsed, about {duration(elapsed / trained * ahead)} left"
            )
        results = work.results()
        if here.main:
            with Console(log_file=out / "train.log") as console:
                for title, header, rows in tables(results):
                    console.table(title, header, rows)
                console.info("\n".join([*lines(results), f"results: {out / 'results.md'}"]))
    return results


class _Reproduction:
    def __init__(self, plan: Plan, out: Path, here: World) -> None:
        self.plan = plan
        self.out = out
        self.here = here
        self.again = f"sssd-fast reproduce --resume {shlex.quote(str(out))}"
        self.root = image_root(plan.public, plan.data).absolute()
        self.official = (out / "official.csv").absolute()
        self.nearest = NearestNeighbour()
        out.mkdir(parents=True, exist_ok=True)
        self._ready = set[Path]()  # pre-trainings that this process has seen finished
        if here.main and plan.public.controlled == "official" and "controlled" in plan.protocols:
            where = write_official_split(
                plan.public, plan.data, self.root, plan.official_split, self.official
            )
            self.say(f"leak-controlled split of {plan.public.title}: {where}")
        here.barrier()
        self.machine = _machine(here)

    def say(self, text: str) -> None:
        with Console(log_file=self.out / "train.log", enabled=self.here.main) as console:
            console.info(text)

    def config(self, cell: Cell) -> Config:
        return cell_config(self.plan, cell, self.root, self.official)

    def finished(self, cell: Cell) -> bool:
        """Whether its result is there, of these settings. Raises CheckpointError for a result of other settings."""
        place = cell.folder(self.out)
        if not (place / "cell.json").is_file():
            return False
        done = json.loads((place / "cell.json").read_text(encoding="utf-8"))
        changes = differences(from_dict(done["config"]), _anywhere(self.config(cell)))
        if done["part"] != self.plan.part:
            changes.append(f"evaluated on {done['part']}, now asked for {self.plan.part}")
        if changes:
            listed = "\n".join(f"  - {change}" for change in changes)
            raise CheckpointError(
                f"{place} is finished, but with other settings:\n{listed}\nUndo the change, or give another --out."
            )
        return True

    def run(self, cell: Cell) -> str:
        """Trains and evaluates; returns the main rates as a phrase."""
        config, place, init = self.config(cell), cell.folder(self.out), None
        seconds = {}
        before = cell.pretraining()
        if before is not None:
            folder = before.folder(self.out).with_name(
                "pretrain-" + folder_name(before.method, before.variant)
            )
            if folder not in self._ready:
                self._stage("pretrain", self.config(before), folder)
                self._ready.add(folder)
            init = str(find_checkpoint(folder, "last"))
            seconds["pretrain_s"] = _seconds(folder)
        result = self._stage("finetune", config, place, init)
        seconds["finetune_s"] = _seconds(place)
        if self.here.main:
            index = DataIndex.load(place / "index.json")
            split = split_csv(index, place / "split.csv")
            rates = {name: value for name, value in result["image"].items() if name != "intervals"}
            facts = {
                "protocol": cell.protocol, "seed": cell.seed, "method": cell.method, "variant": list(cell.variant),
                "part": self.plan.part, **seconds,
                "counts": {part: len(split.ids(part)) for part in ("train", "val", "test")}, "image": rates,
                "nearest": self.nearest.rates(index, split, self.plan.part),
                "departures": departures(self.plan.public, index.counts()),
                "config": to_dict(_anywhere(config)), "machine": self.machine,
            }  # fmt: skip
            atomic_write_text(
                place / "cell.json", json.dumps(facts, indent=2, allow_nan=False) + "\n"
            )
            write_report(place)
            self.results()
        self.here.barrier()
        shown = [(name, result.get("image", {}).get(name)) for name in ("accuracy", "auc")]
        return ", ".join(
            f"{name} {100 * value:.1f} %" for name, value in shown if value is not None
        )

    def _stage(
        self, stage: str, config: Config, place: Path, init: str | None = None
    ) -> dict[str, Any]:
        """One run folder from where it stands to its end; for fine-tuning, the evaluation."""
        begun = (
            CheckpointManager(place / "checkpoints").latest() is not None
            if place.exists()
            else False
        )
        self.here.barrier()
        if not begun:
            config = resolve_batch(config, stage, self.here, say=self.say)
        elif (
            getattr(config, stage).batch is not None
        ):  # the micro-batch that was found at the first start
            found = getattr(load_config(place / "config.yaml"), stage)
            config = config.model_copy(update={stage: found})
        with open_run(
            stage,
            config,
            place,
            self.here,
            resume=begun,
            resume_with=self.again,
            command=self.plan.commands[-1],
        ) as run:
            run.console.rule(f"{stage}: {place.relative_to(self.out)}")
            return self._train(stage, run, init)

    def _train(self, stage: str, run: Run, init: str | None) -> dict[str, Any]:
        if stage == "pretrain":
            pretrain(run)
            return {}
        finetune(run, init)
        return evaluate_run(run, self.plan.part)

    def results(self) -> dict[str, Any]:
        """Everything finished so far as results.json, results.md and results.png."""
        found = []
        for cell in cells_of(self.plan):
            path = cell.folder(self.out) / "cell.json"
            if path.is_file():
                done = json.loads(path.read_text(encoding="utf-8"))
                found.append({name: value for name, value in done.items() if name != "config"})
        results = {
            "schema": SCHEMA,
            "dataset": self.plan.dataset,
            "title": self.plan.public.title,
            "part": self.plan.part,
            "planned": len(cells_of(self.plan)),
            "commands": [_without_folders(command) for command in self.plan.commands],
            "settings": {
                **self.plan.config,
                "data": {**self.plan.config["data"], "source": self.plan.dataset},
            },
            "machines": [
                json.loads(text)
                for text in dict.fromkeys(json.dumps(cell.pop("machine")) for cell in found)
            ],
            "published": {who: dict(rates) for who, rates in self.plan.public.published.items()},
            "cells": found,
        }
        if self.here.main:
            atomic_write_text(
                self.out / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n"
            )
            atomic_write_text(self.out / "results.md", markdown(results))
            picture(results, path=self.out / "results.png")
        return results


def _anywhere(config: Config) -> Config:
    """Without the places of folders and files, which may be moved between two starts."""
    data, extra = config.data, config.pretrain.extra
    moved = {"source": Path(data.source).name, "split": Path(data.split).name}
    pretrain = {"extra": None if extra is None else Path(extra).name}
    return config.model_copy(
        update={
            "data": data.model_copy(update=moved),
            "pretrain": config.pretrain.model_copy(update=pretrain),
        }
    )


def _seconds(folder: Path) -> float:
    """Of training, over all its starts, compilation included."""
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
    """Paths cut down to their last part: results are shown to others."""
    return shlex.join(
        Path(word).name if "/" in word and Path(word).exists() else word
        for word in shlex.split(command)
    )
