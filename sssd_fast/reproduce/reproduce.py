"""The paper's two experiments with their controls, over seeds and two splits, next to its results.

Every model has run folders of the usual kind; a finished model is never trained again.

OUT/plan.json                              what was requested
OUT/PROTOCOL/seed-N/pretrain-METHOD/       pre-training
OUT/PROTOCOL/seed-N/METHOD/                fine-tuning and evaluation
OUT/PROTOCOL/seed-N/METHOD/cell.json       its result; a model is finished when this exists
OUT/results.json                           all of them
OUT/results.md                             the same as tables, rewritten after every model
"""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from sssd_fast.config import Config, from_dict, load_config
from sssd_fast.data.manifest import SPLIT_NAMES
from sssd_fast.errors import CheckpointError, ConfigError, DataError, RunExistsError
from sssd_fast.evaluation.baselines import NEAREST
from sssd_fast.evaluation.evaluate import evaluate_run
from sssd_fast.finetune import finetune
from sssd_fast.loaders.prepare import load_data
from sssd_fast.performance.batch_size import resolve_batch
from sssd_fast.pretrain import pretrain
from sssd_fast.report.report import write_report
from sssd_fast.reproduce.public_sets import PUBLIC_SETS, PublicSet, image_root, write_official_split
from sssd_fast.reproduce.table import SCHEMA, markdown, notes, tables
from sssd_fast.run.checkpoint import CheckpointManager, find_checkpoint
from sssd_fast.run.device import World, world
from sssd_fast.run.environment import collect_environment
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import differences, open_run
from sssd_fast.run.log import Console, duration
from sssd_fast.run.metrics_log import read_metrics

PROTOCOLS = ("random", "controlled")
METHODS = ("sssd", "mae", "supervised", "external")
SEEDS = (0, 1, 2, 3, 4)
SET_HERE = (
    *("data.source", "data.manifest", "data.split", "data.split_seed"),
    *("seed", "objective.weight", "pretrain.extra"),
)


class Model(NamedTuple):
    """One fine-tuned model."""

    protocol: str
    seed: int
    method: str


class Plan(BaseModel, frozen=True):
    """Content of plan.json: the arguments of `reproduce`, and all `commands`, oldest first."""

    dataset: str
    data: str
    config: dict[str, Any]
    protocols: tuple[str, ...] = PROTOCOLS
    methods: tuple[str, ...] = METHODS[:3]
    seeds: tuple[int, ...] = SEEDS
    external: str | None = None
    commands: tuple[str, ...] = ()

    @property
    def public(self) -> PublicSet:
        return PUBLIC_SETS[self.dataset]

    def models(self) -> list[Model]:
        """All models, every method of the first seed first, so that a stop leaves a comparison."""
        order = itertools.product(self.seeds, self.protocols, self.methods)
        return [Model(protocol, seed, method) for seed, protocol, method in order]

    def config_of(self, model: Model, official: Path) -> Config:
        """The settings of one model; `official` is the CSV of the authors' split."""
        config, kind = from_dict(self.config), self.public.controlled
        data: dict[str, Any] = {
            "source": str(image_root(self.public, self.data).absolute()),
            "manifest": None,
            "split_seed": model.seed,
            "split": str(official.absolute()) if kind == "official" else kind,
        }
        update: dict[str, Any] = {"seed": model.seed}
        if model.protocol == "random":
            data["split"] = "random"
        if model.method == "mae":
            update["objective"] = config.objective.model_copy(update={"weight": 0.0})
        if model.method == "supervised":
            # smaller rates for lower layers are for layers that are trained already
            update["finetune"] = config.finetune.model_copy(update={"layer_decay": 1.0})
        if model.method == "external":
            update["pretrain"] = config.pretrain.model_copy(update={"extra": self.external})
        update["data"] = config.data.model_copy(update=data)
        return config.model_copy(update=update)


def check_overrides(texts: Sequence[str]) -> None:
    """Raises ConfigError for settings that the protocol or the method sets."""
    taken = [text for text in texts if text.partition("=")[0] in SET_HERE]
    if taken:
        raise ConfigError(
            f"{', '.join(taken)}: reproduce sets this itself ({', '.join(SET_HERE)}); use --data, "
            "--protocols, --methods, --seeds, --external, or `sssd-fast run` for another experiment"
        )


def load_plan(out: Path) -> Plan:
    """The plan of an earlier start. Raises CheckpointError if it is missing or damaged."""
    try:
        return Plan.model_validate_json((out / "plan.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--resume {out}: no plan of `sssd-fast reproduce` there ({error}); start with "
            f"--out {out}"
        ) from None


def reproduce(
    plan: Plan, out: Path, *, resume: bool = False, minutes: float | None = None
) -> dict[str, Any]:
    """Train what is not finished yet, for about `minutes`; returns results.json."""
    began = time.monotonic()
    again = f"sssd-fast reproduce --resume {shlex.quote(str(out))}"
    if "external" in plan.methods and plan.external is None:
        raise ConfigError(
            "method external pre-trains on a second image set too; name its folder with "
            "--external DIR"
        )
    if resume:
        _check_same(out, load_plan(out), plan)
    elif (out / "plan.json").exists():
        raise RunExistsError(
            f"{out} holds a reproduction already; continue it with {again}, or give another --out"
        )
    with (
        world(from_dict(plan.config).device) as here,
        Console(log_file=out / "train.log", enabled=here.main) as console,
    ):
        here.barrier()
        if here.main:
            if plan.public.controlled == "official" and "controlled" in plan.protocols:
                write_official_split(plan.public, plan.data, out / "official.csv")
            atomic_write_text(out / "plan.json", plan.model_dump_json(indent=2))
        models = plan.models()
        for number, model in enumerate(models, start=1):
            place = out / model.protocol / f"seed-{model.seed}" / model.method
            if here.any((place / "cell.json").exists()):
                continue
            elapsed = time.monotonic() - began
            if here.any(minutes is not None and elapsed > 60 * minutes):
                console.info(f"{minutes:g} minutes are over. Continue with: {again}")
                break
            console.info(f"model {number} of {len(models)}; {duration(elapsed)} elapsed")
            _train(plan, model, place, out, here, console, again)
            if here.main:
                _write_results(plan, out)
        if not here.main:
            return {}
        results = _write_results(plan, out)
        for title, header, rows in tables(results):
            console.table(title, header, rows)
        console.info("\n".join([*notes(results), f"results: {out / 'results.md'}"]))
        return results


def _check_same(out: Path, before: Plan, now: Plan) -> None:
    """Raises CheckpointError if the models of `before` are not those of the plan `now`."""
    changes = differences(from_dict(before.config), from_dict(now.config), evaluation=True)
    # folders may be moved between two starts
    if before.external and Path(before.external).name != Path(str(now.external)).name:
        changes.append(f"external was {before.external}, is {now.external}")
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise CheckpointError(
            f"{out} holds models of other settings:\n{listed}\n"
            "Undo the change, or give another --out."
        )


def _train(
    plan: Plan, model: Model, place: Path, out: Path, here: World, console: Console, again: str
) -> None:
    """Train and evaluate one model, or continue it; writes its cell.json."""
    folders = {"pretrain": place.with_name(f"pretrain-{model.method}"), "finetune": place}
    if model.method == "supervised":
        del folders["pretrain"]
    init: str | None = None
    result: dict[str, Any] = {}
    for stage, folder in folders.items():
        saved = folder / "checkpoints"
        begun = saved.is_dir() and CheckpointManager(saved).latest() is not None
        here.barrier()
        config = plan.config_of(model, out / "official.csv")
        if not begun:
            config = resolve_batch(config, stage, here, log=console.info)
        elif getattr(config, stage).batch is not None:
            # the micro-batch that was found at the first start
            found = getattr(load_config(folder / "config.yaml"), stage)
            config = config.model_copy(update={stage: found})
        options: dict[str, Any] = {"resume": begun, "resume_with": again}
        with open_run(stage, config, folder, here, command=plan.commands[-1], **options) as run:
            run.console.rule(f"{stage}: {folder.relative_to(out)}")
            if stage == "pretrain":
                pretrain(run)
                init = str(find_checkpoint(folder, "last"))
            else:
                finetune(run, init)
                result = evaluate_run(run)
    if not here.main:
        return
    write_report(place)
    index, split = load_data(run)
    # seconds over all starts, compilation included
    times = {f"{s}_s": max(r["time_s"] for r in read_metrics(f)) for s, f in folders.items()}
    if NEAREST not in result["baselines"]:
        raise DataError("; ".join(result["notes"]))
    rates = {"image": result["image"], "nearest": result["baselines"][NEAREST]}
    cell = {
        **model._asdict(),
        **times,
        "counts": {name: len(split.ids(name)) for name in SPLIT_NAMES},
        **{n: {k: v for k, v in r.items() if k != "intervals"} for n, r in rates.items()},
        "departures": plan.public.departures(index.counts()),
        "machine": _machine(here),
    }
    atomic_write_text(place / "cell.json", json.dumps(cell, indent=2, allow_nan=False) + "\n")


def _write_results(plan: Plan, out: Path) -> dict[str, Any]:
    """results.json and results.md of all that is finished so far."""
    cells = sorted(out.glob("*/seed-*/*/cell.json"))
    results = {
        "schema": SCHEMA,
        "dataset": plan.dataset,
        "title": plan.public.title,
        "planned": len(plan.models()),
        "commands": [_without_folders(command) for command in plan.commands],
        "settings": {**plan.config, "data": {**plan.config["data"], "source": plan.dataset}},
        "published": plan.public.published,
        "cells": [json.loads(path.read_text(encoding="utf-8")) for path in cells],
    }
    atomic_write_text(out / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    atomic_write_text(out / "results.md", markdown(results))
    return results


def _machine(here: World) -> str:
    env = collect_environment()
    gpu = env["gpus"][here.device.index or 0]["name"] if here.device.type == "cuda" else None
    device = gpu or f"{env['cpu']['model']}, {env['cpu']['torch_threads']} threads"
    versions = f"torch {env['torch']['version']}, python {env['python']['version']}"
    commit = f"commit {str(env['sssd_fast']['commit'])[:10]}"
    commit += " (modified)" if env["sssd_fast"]["modified"] else ""
    date = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    return f"{here.size} x {device}, {versions}, {commit}, {date}"


def _without_folders(command: str) -> str:
    """Paths cut to their last name: results are shown to others."""
    words = shlex.split(command)
    return shlex.join(Path(w).name if "/" in w and Path(w).exists() else w for w in words)
