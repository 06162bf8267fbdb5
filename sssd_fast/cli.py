"""Command line. Errors become one message and an exit code. Slow imports are in the functions.

Exit codes: 0 done, 2 bad settings, data or files, 3 numerics, 130/143 interrupted after a
checkpoint, 141 broken pipe. Training commands pass their options on to the function of the same
name in api.py.
"""

from __future__ import annotations

import importlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import typer

from sssd_fast import __version__, cli_tools
from sssd_fast.cli_options import (
    CONFIG,
    INIT,
    SEEDS,
    SETTINGS,
    SPLIT,
    Options,
    Split,
    add_training,
    argument,
    flag,
    load,
    names_first,
    option,
    several,
    text,
)
from sssd_fast.errors import DataError, EndedByMain, SssdError
from sssd_fast.run.files import user_cache

HELP = """Train SSSD-COVID (masked autoencoder + self-distillation for CT slices) fast on limited
hardware.

Start with: sssd-fast run --config cpu_smoke --out runs/demo (synthetic slices, minutes on two CPU
cores); sssd-fast configs (configurations, their hardware); sssd-fast doctor (this machine)."""
app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None, name="sssd-fast"
)
# Options that take several words, such as --seeds 0 1 2.
SEVERAL = ("--seeds", "--protocols", "--methods")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    # Read when torch is imported: CPU threads then sleep while they wait for each other. Spinning,
    # the default, makes a step 2.5 times slower if another process shares the cores (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch's default is a temporary folder, which is emptied when the machine starts.
    with suppress(SssdError):  # no home folder
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "inductor"))
    words = list(sys.argv[1:] if argv is None else argv)
    # a file name may hold bytes that are not UTF-8
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        command = typer.main.get_command(app)
        line = shlex.join(["sssd-fast", *words])
        with command.make_context("sssd-fast", _repeat(words), obj=line) as context:
            command.invoke(context)
        return 0
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:  # wrong words: usage and message
        error.show()  # type: ignore[attr-defined]
        return error.exit_code
    except SssdError as error:
        if not isinstance(error, EndedByMain):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, such as `| head`
        sys.stderr.close()
        return 141
    except Exception as error:
        from sssd_fast.run.device import is_out_of_memory
        from sssd_fast.run.files import unusable_file

        problem = unusable_file(error) if isinstance(error, OSError) else None
        if problem is not None:
            print(f"error: {problem}", file=sys.stderr)
            return 2
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory ({str(error).splitlines()[0]})", file=sys.stderr)
        hint = "the effective batch and the learning rate stay the same"
        print(f"Lower batch_size and raise accumulate by a factor: {hint}", file=sys.stderr)
        return 2


def _repeat(words: Sequence[str]) -> list[str]:
    """`--seeds 0 1` becomes `--seeds 0 --seeds 1`; a setting or an option ends the values."""
    result: list[str] = []
    option = ""
    for word in words:
        if word.startswith("-") or "=" in word:
            option = word if word in SEVERAL else ""
        elif option and result[-1] != option:
            result.append(option)
        result.append(word)
    return result


# ---- training --------------------------------------------------------------------------------

METHODS = "sssd, mae, supervised, external; default all, external only with --external."
SPLITS: Options = {"split": (Split, SPLIT)}
RUN = SEEDS | {
    "folds": (bool, flag("--folds", "Repeat for each fold of data.folds.")),
    "from_scratch": (bool, flag("--from-scratch", "Skip pre-training: the supervised control.")),
    "minutes": (float | None, option(None, "Choose epochs so that a model takes M minutes.", "M")),
}
PROBE = INIT | SPLITS | {"init": (str, option(..., "Run or weights to probe.", "RUN|WEIGHTS"))}
REPRODUCE: Options = {
    "dataset": (str | None, argument("NAME", "covid-ct or sars-cov-2-ct.", None)),
    "data": text("DIR", "Folder of the images, in class folders at any depth."),
    "protocols": several(str, "Splits: random (the paper's), controlled; default both."),
    "methods": several(str, METHODS),
    **SEEDS,
    "external": text("DIR", "Additional images to pre-train on, without labels."),
    "minutes": (float | None, option(None, "Do not start another model after M minutes.", "M")),
}
for name, help, options in (
    ("run", "Pre-train, fine-tune, evaluate and write a report.", RUN),
    ("pretrain", "Pre-train SSSD without labels.", INIT),
    ("finetune", "Fine-tune a classifier and evaluate it.", INIT | SPLITS),
    ("probe", "Fit a linear probe on a frozen encoder and evaluate it.", PROBE),
    ("reproduce", "Run the paper's experiment on a public CT set, with controls.", REPRODUCE),
):
    add_training(app, name, help, options)


SHOWN = 20  # images whose scores predict prints

# ---- use of a model --------------------------------------------------------------------------


@app.command()
def evaluate(
    ctx: typer.Context,
    run: str = argument("RUN", "Fine-tuned run."),
    settings: list[str] | None = SETTINGS,
    split: Split = SPLIT,
) -> None:
    """Evaluate a fine-tuned model on a split."""
    from sssd_fast import api

    run, *words = names_first(run, *(settings or ()))
    api.evaluate(run, split=split, settings=words, command=ctx.obj)


@app.command()
def predict(
    model: str = argument("RUN|CHECKPOINT", "Fine-tuned model."),
    images: list[str] = argument(
        "IMAGE|VOLUME|DIR", "Images, NIfTI volumes, DICOM series (folders) to score."
    ),
    out: str = option("predictions.csv", "Table to write.", "FILE.csv"),
    overwrite: bool = flag("--overwrite", "Replace an existing table."),
    window: str = option("lung", "Window of volumes, as in data convert.", "W"),
    device: str = option("auto", "cpu, cuda, cuda:N or auto."),
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Precision; auto = by device."
    ),
    batch_size: int = option(64, "Images per batch.", "N", min=1),
) -> None:
    """Score images or CT volumes with a fine-tuned model."""
    if Path(out).exists() and not overwrite:
        raise DataError(f"{out} exists; give another --out, or replace it with --overwrite")
    import numpy as np

    from sssd_fast import api
    from sssd_fast.evaluation.predict import find_images, write_predictions
    from sssd_fast.evaluation.volumes import volume_files

    notes: list[str] = []
    files = volume_files(images)
    paths: list[Path] = []
    for target in images:
        if Path(target) not in files:
            try:
                paths += find_images([target], notes)
            except DataError:
                # a folder of volumes alone
                if not any(Path(target) in file.parents for file in files):
                    raise
    for note in notes if not files else ():
        print(f"note: {note}")
    options: dict[str, Any] = {"device": device, "precision": precision, "batch_size": batch_size}
    failed: dict[Path, str] = {}
    table: list[tuple[Path, str, Any]] = []  # path, slice, scores
    if paths:
        found = api.predict(model, paths, **options)
        classes, used = found.classes, found.checkpoint
        failed |= {paths[row]: reason for row, reason in found.failed.items()}
        table += [(path, "", row) for path, row in zip(paths, found.scores, strict=True)]
        scored = [label for label in found.labels if label is not None]
        for path, label, row in list(zip(paths, found.labels, found.scores, strict=True))[:SHOWN]:
            if label is not None:
                print(f"{path}: {label} ({_scores(classes, row)})")
        if scored and len(paths) > SHOWN:
            each = (f"{name} {scored.count(name)}" for name in classes)
            mean = _scores(classes, np.nanmean(found.scores, axis=0))
            print(f"... of {len(scored)} images: {', '.join(each)}; mean scores {mean}")
        print(f"{len(scored)} images scored with {used}; written to {out}")
    if files:
        volumes = api.predict_volumes(model, files, window=window, **options)
        classes, used = volumes.classes, volumes.checkpoint
        failed |= volumes.failed
        for volume in volumes.volumes:
            label = classes[int(volume.mean.argmax())]
            mean, largest = (_scores(classes, row) for row in (volume.mean, volume.maximum))
            slices = f"{len(volume.slices)} slices"
            print(f"{volume.path}: {label}, {slices}, mean {mean}, largest {largest}")
            rows = zip(map(str, volume.slices), volume.scores, strict=True)
            table += [(volume.path, "mean", volume.mean), (volume.path, "max", volume.maximum)]
            table += [(volume.path, number, row) for number, row in rows]
        print(f"{len(volumes.volumes)} volumes scored with {used}; written to {out}")
    if not table:
        raise DataError("\n".join(f"not scored: {path}: {why}" for path, why in failed.items()))
    names, slices_of, rows_of = zip(*table, strict=True)
    write_predictions(Path(out), classes, names, np.stack(rows_of), slices_of if files else ())
    for path, reason in failed.items():
        print(f"not scored: {path}: {reason}", file=sys.stderr)
    unread = [path for path in failed if path in paths]
    if unread:
        problem = f"{len(unread)} of {len(paths)} files cannot be read"
        raise DataError(f"{problem}; their rows in {out} are empty")


def _scores(classes: Sequence[str], row: Any) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in zip(classes, row, strict=True))


@app.command()
def export(
    model: str = argument("RUN|CHECKPOINT", "Model to export."),
    format: Literal["timm", "huggingface", "torch", "onnx"] = option(
        ..., "timm, huggingface: the encoder; torch, onnx: the classifier."
    ),
    out: str = option(..., "File or folder to write.", "FILE|DIR"),
) -> None:
    """Export an encoder or classifier and compare it."""
    import torch

    from sssd_fast.evaluation.predict import load_trained
    from sssd_fast.weights.export import export_classifier, export_encoder

    if format == "timm" or format == "huggingface":
        print(export_encoder(model, Path(out), format))
        return
    trained = load_trained(model, torch.device("cpu"))
    print(export_classifier(trained.model, Path(out), format, trained.classes, trained.grey_range))


@app.command()
def weights(
    path: str = argument("WEIGHTS|RUN", "Weights to compare."),
    settings: list[str] | None = SETTINGS,
    config: str | None = CONFIG,
) -> None:
    """Show how weights match the model of a configuration."""
    path, *words = names_first(path, *(settings or ()))
    loaded = load(config, words)
    from sssd_fast.model import MAE
    from sssd_fast.weights.load import load_into

    print(load_into(MAE(loaded.model), path).table())


@app.command()
def report(run: str = argument("RUN", "Run folder.")) -> None:
    """Write report.md and report.html of a run again."""
    from sssd_fast.pipeline import stages_of
    from sssd_fast.report.report import write_report

    paths = write_report(run, stages_of(Path(run)))
    print("\n".join(str(path) for path in paths))


# The benchmarks parse every word themselves, --help too.
@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
def bench(
    words: list[str] = argument("WORD", "See sssd-fast bench --help.", []),
) -> None:
    """Run the benchmarks."""
    package = Path(__file__).resolve().parent
    root = package.parent
    # A checkout has the ops' folder too; a wheel has the benchmarks inside this package.
    if not (Path(root, "benchmarks").is_dir() and Path(root, "kernels", "mae_kernels").is_dir()):
        root = package / "_bench"
    sys.path.insert(0, str(root))  # first: another installed package may have the same name
    raise typer.Exit(importlib.import_module("benchmarks.__main__").main(words))


@app.callback(invoke_without_command=True)
def _version(
    version: bool = flag("--version", "Print the version."),
) -> None:
    if version:
        print(f"sssd_fast {__version__}")
        raise typer.Exit


app.add_typer(cli_tools.app)

if __name__ == "__main__":
    sys.exit(main())
