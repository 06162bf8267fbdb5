"""A reproduction: data set, splits, methods, seeds, and the configuration of each model."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from sssd_fast.config import Config, changed, from_dict
from sssd_fast.errors import CheckpointError, ConfigError
from sssd_fast.reproduce.public_sets import PUBLIC_SETS, PublicSet

PROTOCOLS = ("random", "controlled")
METHODS = ("sssd", "mae", "supervised", "external")
SEEDS = (0, 1, 2, 3, 4)
SET_HERE = (
    *("data.source", "data.manifest", "data.split", "data.split_seed"),
    *("seed", "objective.weight", "pretrain.extra"),
)
Overrides = tuple[str, ...]  # key=value


@dataclass(frozen=True)
class Plan:
    """Content of plan.json: the arguments of `reproduce`, and all `commands`, oldest first."""

    dataset: str
    data: str
    config: dict[str, Any]
    protocols: tuple[str, ...] = PROTOCOLS
    methods: tuple[str, ...] = METHODS[:3]
    seeds: tuple[int, ...] = SEEDS
    external: str | None = None
    official_split: str | None = None
    split: str = "test"
    variants: tuple[Overrides, ...] = ((),)
    commands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "external" in self.methods and self.external is None:
            raise ConfigError(
                "method external pre-trains on a second image set too; name its folder with "
                "--external DIR"
            )
        if len(self.variants) > 1 and self.split == "test":
            raise ConfigError(
                "--try compares settings, and test images must not choose among them: "
                "add --split val"
            )

    @property
    def public(self) -> PublicSet:
        return PUBLIC_SETS[self.dataset]

    def models(self) -> list[PlannedModel]:
        """All models, every method of the first seed first, so that a stop leaves a comparison."""
        order = itertools.product(self.seeds, self.protocols, self.methods, self.variants)
        return [
            PlannedModel(protocol, seed, method, variant)
            for seed, protocol, method, variant in order
        ]


@dataclass(frozen=True)
class PlannedModel:
    """One fine-tuned model."""

    protocol: str
    seed: int
    method: str
    variant: Overrides = ()

    def folder(self, out: Path) -> Path:
        """OUT/PROTOCOL/seed-N/METHOD[-settings]; long names end in a hash, so that two stay two."""
        name = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join([self.method, *self.variant]))
        if len(name) > 100:
            name = f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return out / self.protocol / f"seed-{self.seed}" / name

    def pretraining(self) -> PlannedModel | None:
        """The model with only the settings of pre-training, which variants share."""
        if self.method == "supervised":
            return None
        kept = (v for v in self.variant if not v.startswith(("finetune.", "evaluate.")))
        return replace(self, variant=tuple(kept))

    def config(self, plan: Plan, root: Path, official: Path) -> Config:
        config = changed(from_dict(plan.config), self.variant)
        kind = "random" if self.protocol == "random" else plan.public.controlled
        data = {"source": str(root), "manifest": None, "split_seed": self.seed, "split": kind}
        if kind == "official":
            data["split"] = str(official)
        update: dict[str, Any] = {"seed": self.seed}
        if self.method == "mae":
            update["objective"] = config.objective.model_copy(update={"weight": 0.0})
        if self.method == "supervised":
            # smaller rates for lower layers are for layers that are trained already
            update["finetune"] = config.finetune.model_copy(update={"layer_decay": 1.0})
        if self.method == "external":
            update["pretrain"] = config.pretrain.model_copy(update={"extra": plan.external})
            # COVID-CT has such files, and may be the other set
            data["accept_wrong_extension"] = True
        update["data"] = config.data.model_copy(update=data)
        return config.model_copy(update=update)


def planned(cell: Mapping[str, Any]) -> PlannedModel:
    """The model of an entry of results.json."""
    return PlannedModel(cell["protocol"], cell["seed"], cell["method"], tuple(cell["variant"]))


def variants_of(tries: Sequence[str]) -> tuple[Overrides, ...]:
    """Every combination of --try key=[v1, v2] as key=value. Raises ConfigError for another form."""
    import yaml

    choices = []
    for text in tries:
        key, _, raw = text.partition("=")
        try:
            values = yaml.safe_load(raw)
        except yaml.YAMLError:
            values = None
        if not key or not isinstance(values, list) or not values:
            raise ConfigError(
                f"--try {text!r} needs the form key=[VALUE, VALUE], such as "
                "finetune.base_lr=[5e-4, 1e-3]"
            )
        words = [value if isinstance(value, str) else json.dumps(value) for value in values]
        choices.append([f"{key}={word}" for word in words])
    return tuple(itertools.product(*choices))


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
        return TypeAdapter(Plan).validate_json((out / "plan.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--resume {out}: no plan of `sssd-fast reproduce` there ({error}); start with "
            f"--out {out}"
        ) from None
