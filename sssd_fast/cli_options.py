"""Options that several commands share, and how words of the command line become settings."""

from __future__ import annotations

import inspect
import shlex
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
SETTINGS = argument("KEY=VALUE", "Settings, such as pretrain.epochs=400 data.source=ct/.", None)
CONFIG = option(
    None,
    "Shipped configuration (see configs), YAML file, or auto: by images and device.",
    "NAME|FILE",
)
SPLIT = option("test", "Split to evaluate on.")
MANIFEST = option(None, "path,label[,split][,patient], paths relative to DIR.", "CSV")
BAD_FRACTION = option(0.01, "Largest fraction of unusable files; more is an error.", "F")
WRONG_EXTENSION = flag(
    "--reject-wrong-extension", "Count good images that are named as another format as unusable."
)

# Options of the commands that train: (type, option) of each.
Options = dict[str, tuple[Any, Any]]


def text(metavar: str, help: str, **more: Any) -> tuple[Any, Any]:
    return str | None, option(None, help, metavar, **more)


def several(kind: Any, help: str, metavar: str = "NAME...") -> tuple[Any, Any]:
    return list[kind] | None, option(None, help, metavar)


START: Options = {
    "settings": (list[str] | None, SETTINGS),
    "config": (str | None, CONFIG),
    "out": text("DIR", "New run folder.", show_default="runs/COMMAND"),
    "resume": text("RUN", "Continue this run with its configuration."),
    "overwrite": (bool, flag("--overwrite", "Replace an existing run in --out.")),
    "dry_run": (bool, flag("--dry-run", "Check everything, train two steps, delete the result.")),
}
NORM = """Pixel mean and std of the --init weights: this model's, ImageNet's (public MAE) or 0.5; a
difference is folded into the patch projection, exactly."""
INIT: Options = {
    "init": text("RUN|WEIGHTS", "Start from a run or weights (MAE .pth, timm, HF)."),
    "init_norm": (Literal["model", "imagenet", "half"], option("model", NORM)),
}
SEEDS: Options = {"seeds": several(int, "Seeds of the repetitions.", "N...")}


def add_training(app: typer.Typer, name: str, help: str, options: Options) -> None:
    """Adds a command with `options` and those in START.

    It calls the function of this name in api.py, whose parameters have the names of the options.
    """

    def call(ctx: typer.Context, **given: Any) -> None:
        from sssd_fast import api

        chosen = {key: value for key, value in given.items() if value is not None}
        if "dataset" in given:
            words = names_first(given["dataset"], *(given["settings"] or ()))
            chosen["dataset"] = words.pop(0) if words and "=" not in words[0] else None
            chosen["settings"] = words
        started = api.start_processes(name, chosen, shlex.split(ctx.obj)[1:])
        if started is not None:
            raise typer.Exit(started)
        getattr(api, name)(**chosen, command=ctx.obj)

    known = {"ctx": (typer.Context, inspect.Parameter.empty), **options, **START}
    if name == "reproduce":
        del known["overwrite"]  # it only adds to a folder
    parameters = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for key, (kind, default) in known.items()
    ]
    # typer reads types and options from here
    call.__annotations__ = {key: kind for key, (kind, _) in known.items()}
    vars(call)["__signature__"] = inspect.Signature(parameters)
    app.command(name, help=help)(call)


def names_first(*words: str | None) -> list[str]:
    """Settings may be given before a name: key=value words come last."""
    return sorted([word for word in words if word is not None], key=lambda word: "=" in word)


def load(config: str | None, settings: Sequence[str] | None) -> Config:
    """The checked settings of a command that opens no run folder."""
    from sssd_fast.config import load_config

    return load_config(config, settings or ())
