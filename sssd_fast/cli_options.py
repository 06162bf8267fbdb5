"""Options that several commands share, and how words of the command line become settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from sssd_fast.config import Config


def option(default: Any, help: str, metavar: str | None = None, name: str = "", **more: Any) -> Any:
    """An option of a command; `name` if it is not that of the parameter."""
    return typer.Option(default, *([name] if name else []), metavar=metavar, help=help, **more)


def flag(name: str, help: str) -> Any:
    """An option without a value and without a --no- form."""
    return typer.Option(False, name, help=help)


def argument(metavar: str | None, help: str, default: Any = ...) -> Any:
    """A word without a name."""
    return typer.Argument(default, metavar=metavar, help=help)


Split = Literal["train", "val", "test"]
InitNorm = Literal["model", "imagenet", "half"]
# Options of several commands.
SETTINGS = argument("KEY=VALUE", "Settings, such as pretrain.epochs=400 data.source=ct/.", None)
CONFIG = option(None, "Shipped configuration (see configs) or YAML file.", "NAME|FILE")
OUT = option(None, "Run folder to make.", "DIR", show_default="runs/COMMAND")
RESUME = option(None, "Continue this run with its configuration.", "RUN")
OVERWRITE = flag("--overwrite", "Replace an existing run in --out.")
DRY_RUN = flag("--dry-run", "Check everything, train two steps, delete the result.")
INIT = option(None, "Start from a run or weights (MAE .pth, timm, HF).", "RUN|WEIGHTS")
INIT_NORM = option(
    "model",
    "Pixel mean and std of the --init weights: this model's, ImageNet's (public MAE) or 0.5; a "
    "difference is folded into the patch projection, exactly.",
)
SPLIT = option("test", "Split to evaluate on.")
MANIFEST = option(None, "path,label[,split][,patient], paths relative to DIR.", "CSV")
BAD_FRACTION = option(0.01, "Largest fraction of unusable files; more is an error.", "F")
WRONG_EXTENSION = flag("--accept-wrong-extension", "Keep good images named as another format.")
SEEDS = option(None, "Seeds of the repetitions.", "N...")


def names_first(*words: str | None) -> list[str]:
    """Settings may be given before a name: key=value words come last."""
    return sorted([word for word in words if word is not None], key=lambda word: "=" in word)


def load(config: str | None, settings: Sequence[str] | None) -> Config:
    """The checked settings of a command that opens no run folder."""
    from sssd_fast.config import load_config

    return load_config(config, settings or ())
