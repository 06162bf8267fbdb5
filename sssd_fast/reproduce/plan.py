"""What a reproduction of the paper consists of: data set, splits, methods, seeds and settings, and the configuration of each model."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sssd_fast.config import Config, changed, from_dict
from sssd_fast.errors import CheckpointError, ConfigError
from sssd_fast.reproduce.public_sets import PUBLIC_SETS, PublicSet

PROTOCOLS = ("random", "controlled")
METHODS = ("sssd", "mae", "supervised", "external")
SEEDS = (0, 1, 2, 3, 4)
SET_HERE = (
    "data.source",
    "data.manifest",
    "data.split",
    "data.split_seed",
    "seed",
    "objective.weight",
    "pretrain.extra",
)


@dataclass(frozen=True)
class Plan:
    """What a reproduction consists of; plan.json."""

    dataset: str
    data: str
    config: dict[str, Any]
    protocols: tuple[str, ...] = PROTOCOLS
    methods: tuple[str, ...] = METHODS[:3]
    seeds: tuple[int, ...] = SEEDS
    external: str | None = None  # folder of the images that `external` pre-trains on too
    official_split: str | None = None
    part: str = "test"
    variants: tuple[tuple[str, ...], ...] = (
        (),
    )  # key=value of each; more than one only on the validation part
    commands: tuple[str, ...] = ()  # all that were typed, oldest first

    def __post_init__(self) -> None:
        if "external" in self.methods and self.external is None:
            raise ConfigError(
                "method external pre-trains on a second image set too; name its folder with --external DIR"
            )
        if len(self.variants) > 1 and self.part == "test":
            raise ConfigError(
                "--try compares settings, and test images must not choose among them: add --part val"
            )

    @property
    def public(self) -> PublicSet:
        return PUBLIC_SETS[self.dataset]


@dataclass(frozen=True)
class Cell:
    """One fine-tuned model."""

    protocol: str
    seed: int
    method: str
    variant: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.method, *self.variant])

    def folder(self, out: Path) -> Path:
        return out / self.protocol / f"seed-{self.seed}" / folder_name(self.method, self.variant)

    def pretraining(self) -> Cell | None:
        """The cell in whose folder its pre-training is described: what only fine-tuning reads is left out."""
        if self.method == "supervised":
            return None
        return replace(
            self,
            variant=tuple(v for v in self.variant if not v.startswith(("finetune.", "evaluate."))),
        )


def variants_of(tries: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Every combination of --try key=[v1, v2], as key=value overrides. Raises ConfigError for another form."""
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
                f"--try {text!r} needs the form key=[VALUE, VALUE], such as finetune.base_lr=[5e-4, 1e-3]"
            )
        choices.append(
            [
                f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
                for value in values
            ]
        )
    return tuple(itertools.product(*choices))


def check_overrides(texts: Sequence[str]) -> None:
    """Raises ConfigError for settings that the protocol or the method sets."""
    taken = [text for text in texts if text.partition("=")[0] in SET_HERE]
    if taken:
        raise ConfigError(
            f"{', '.join(taken)}: reproduce sets this itself ({', '.join(SET_HERE)}); use --data, --protocols, --methods, --seeds, "
            f"--external, or `sssd-fast run` for another experiment"
        )


def load_plan(out: Path) -> Plan:
    """The plan of an earlier start. Raises CheckpointError where there is none."""
    path = out / "plan.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(body[name]) for name in ("protocols", "methods", "seeds", "commands")}
        return Plan(**{**body, **lists, "variants": tuple(tuple(v) for v in body["variants"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"--resume {out}: no plan of `sssd-fast reproduce` there ({error}); start with --out {out}"
        ) from None


def cells_of(plan: Plan) -> list[Cell]:
    return [
        Cell(protocol, seed, method, variant)
        for seed in plan.seeds
        for protocol in plan.protocols
        for method in plan.methods
        for variant in plan.variants
    ]


def cell_config(plan: Plan, cell: Cell, root: Path, official: Path) -> Config:
    """The settings of a cell: the plan's, with what its protocol, seed and method say."""
    config = changed(from_dict(plan.config), cell.variant)
    kind = "random" if cell.protocol == "random" else plan.public.controlled
    data = {"source": str(root), "manifest": None, "split_seed": cell.seed, "split": kind}
    if kind == "official":
        data["split"] = str(official)
    update: dict[str, Any] = {"seed": cell.seed}
    if cell.method == "mae":
        update["objective"] = config.objective.model_copy(update={"weight": 0.0})
    if (
        cell.method == "supervised"
    ):  # smaller rates for lower layers presume that these are trained already
        update["finetune"] = config.finetune.model_copy(update={"layer_decay": 1.0})
    if cell.method == "external":
        update["pretrain"] = config.pretrain.model_copy(update={"extra": plan.external})
        data["accept_wrong_extension"] = True  # COVID-CT holds such files, and may be the other set
    return config.model_copy(update={**update, "data": config.data.model_copy(update=data)})


def folder_name(method: str, variant: Sequence[str]) -> str:
    """A folder name; long ones end in a hash, so that two stay two."""
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join([method, *variant]))
    return (
        name if len(name) <= 100 else f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    )
