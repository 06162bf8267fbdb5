"""Command line: one function per command. Errors become one message and an exit code.

Exit codes: 0 done, 2 bad settings, data or files, 3 numerics, 130/143 interrupted after a checkpoint, 141 broken pipe.
Training commands pass their options on to the function of the same name in api.py. Slow imports are in the functions.
"""

from __future__ import annotations

import importlib
import importlib.util
import json as json_module
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sssd_fast import __version__
from sssd_fast.errors import DataError, SssdError

HELP = """Train SSSD-COVID (masked autoencoder + self-distillation for CT slices) fast on limited hardware.

Start with: sssd-fast run --config cpu_smoke --out runs/demo (synthetic slices, minutes on two CPU cores);
sssd-fast configs (configurations and their hardware); sssd-fast doctor (what this machine can use)."""
app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None, name="sssd-fast"
)
data_app = typer.Typer(help="Check, split, convert or generate image sets.", rich_markup_mode=None)
app.add_typer(data_app, name="data", no_args_is_help=True)

# Options that several commands share. A value starts in the help text where `metavar` says so.
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings, such as pretrain.epochs=400 data.source=ct/ (list: sssd-fast configs NAME).",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="NAME|FILE", help="Shipped configuration or YAML file."),
]
Out = Annotated[
    str | None, typer.Option(metavar="DIR", help="Run folder to make.", show_default="runs/COMMAND")
]
Resume = Annotated[
    str | None, typer.Option(metavar="RUN", help="Continue this run with its configuration.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run in --out.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, train two steps, delete the result.")
]
Init = Annotated[
    str | None,
    typer.Option(metavar="RUN|WEIGHTS", help="Start from a run or weights (MAE, timm, HF)."),
]
InitNorm = Annotated[
    Literal["model", "imagenet", "half"],
    typer.Option(
        help="Pixel mean and std of the --init weights: this model's, ImageNet's (public MAE), or 0.5; "
        "a difference is folded into the patch projection, exactly."
    ),
]
SplitOption = Annotated[
    Literal["train", "val", "test"], typer.Option("--split", help="Split to evaluate on.")
]
Manifest = Annotated[
    str | None,
    typer.Option(metavar="CSV", help="path,label[,split][,patient], paths relative to DIR."),
]
BadFraction = Annotated[
    float, typer.Option(metavar="F", help="Largest fraction of unusable files; more is an error.")
]
WrongExtension = Annotated[
    bool,
    typer.Option("--accept-wrong-extension", help="Keep good images named as another format."),
]
Seeds = Annotated[list[int] | None, typer.Option(metavar="N...", help="Seeds of the repetitions.")]
# Options that take several words, such as --seeds 0 1 2.
SEVERAL = ("--seeds", "--protocols", "--methods")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    # Read when torch is imported: CPU threads then sleep while they wait for each other. Spinning,
    # the default, makes a step 2.5 times slower if another process shares the cores (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch's default is a temporary folder, which is emptied when the machine starts.
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(cache, "sssd_fast", "inductor")))
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["bench"]:  # the benchmarks parse every word themselves, --help too
            return _bench(words[1:])
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

        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0]}). Lower batch_size and raise "
            f"accumulate by the same factor: the effective batch and the learning rate stay the same.",
            file=sys.stderr,
        )
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


def _names_first(*words: str | None) -> list[str]:
    """Settings may be given before a name: key=value words come last."""
    return sorted([word for word in words if word is not None], key=lambda word: "=" in word)


# ---- training --------------------------------------------------------------------------------


@app.command()
def run(
    ctx: typer.Context,
    settings: Settings = None,
    config: ConfigOption = None,
    seeds: Seeds = None,
    folds: bool = typer.Option(False, "--folds", help="Repeat for each fold of data.folds."),
    from_scratch: bool = typer.Option(
        False, "--from-scratch", help="Skip pre-training: the supervised control."
    ),
    out: Out = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Pre-train, fine-tune, evaluate and write a report."""
    _call(ctx)


@app.command()
def pretrain(
    ctx: typer.Context,
    settings: Settings = None,
    init: Init = None,
    init_norm: InitNorm = "model",
    config: ConfigOption = None,
    out: Out = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Pre-train SSSD without labels."""
    _call(ctx)


@app.command()
def finetune(
    ctx: typer.Context,
    settings: Settings = None,
    init: Init = None,
    init_norm: InitNorm = "model",
    split: SplitOption = "test",
    config: ConfigOption = None,
    out: Out = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a classifier and evaluate it."""
    _call(ctx)


@app.command()
def probe(
    ctx: typer.Context,
    init: str = typer.Option(
        ..., metavar="RUN|WEIGHTS", help="Run or weights to probe.", show_default=False
    ),
    settings: Settings = None,
    init_norm: InitNorm = "model",
    split: SplitOption = "test",
    config: ConfigOption = None,
    out: Out = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Fit a linear probe on a frozen encoder and evaluate it."""
    _call(ctx)


@app.command()
def reproduce(
    ctx: typer.Context,
    dataset: str | None = typer.Argument(None, metavar="NAME", help="covid-ct or sars-cov-2-ct."),
    settings: Settings = None,
    data: str | None = typer.Option(
        None, metavar="DIR", help="Folder of the images, in class folders at any depth."
    ),
    protocols: list[str] | None = typer.Option(
        None, metavar="NAME...", help="Splits: random (the paper's), controlled; default both."
    ),
    methods: list[str] | None = typer.Option(
        None,
        metavar="NAME...",
        help="sssd, mae, supervised, external; default all, external only with --external.",
    ),
    seeds: Seeds = None,
    external: str | None = typer.Option(
        None, metavar="DIR", help="Additional images to pre-train on, without labels."
    ),
    official_split: str | None = typer.Option(
        None, metavar="CSV", help="path,label,split of COVID-CT, if not in DIR."
    ),
    split: Literal["test", "val"] | None = typer.Option(
        None, help="Split to evaluate on: test, or val to compare settings.", show_default="test"
    ),
    tries: list[str] | None = typer.Option(
        None,
        "--try",
        metavar="KEY=[A, B]",
        help="With --split val: compare settings in all combinations; may be repeated.",
    ),
    minutes: float | None = typer.Option(
        None, metavar="M", help="Do not start another model after M minutes."
    ),
    config: ConfigOption = None,
    out: Out = None,
    resume: str | None = typer.Option(
        None,
        metavar="DIR",
        help="Continue in this folder; seeds, methods and protocols may be added.",
    ),
    dry_run: DryRun = False,
) -> None:
    """Run the paper's experiment on a public CT set, with controls."""
    words = _names_first(dataset, *(settings or ()))
    name = words.pop(0) if words and "=" not in words[0] else None
    _call(ctx, dataset=name, settings=words)


def _call(ctx: typer.Context, **changed: Any) -> None:
    """Calls the function of this command's name in api.py; its parameters have the options' names."""
    from sssd_fast import api

    given = {name: value for name, value in (ctx.params | changed).items() if value is not None}
    getattr(api, str(ctx.info_name))(**given, command=ctx.obj)


# ---- use of a model --------------------------------------------------------------------------


@app.command()
def evaluate(
    ctx: typer.Context,
    run: str = typer.Argument(..., metavar="RUN", help="Fine-tuned run."),
    settings: Settings = None,
    split: SplitOption = "test",
) -> None:
    """Evaluate a fine-tuned model on a split."""
    run, *words = _names_first(run, *(settings or ()))
    _call(ctx, run=run, settings=words)


@app.command()
def predict(
    model: str = typer.Argument(..., metavar="RUN|CHECKPOINT", help="Fine-tuned model."),
    images: list[str] = typer.Argument(..., metavar="IMAGE|DIR", help="Images to score."),
    out: str = typer.Option("predictions.csv", metavar="FILE.csv", help="Table to write."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing table."),
    device: str = typer.Option("auto", help="cpu, cuda, cuda:N or auto."),
    precision: Literal["auto", "fp32", "bf16", "fp16"] = typer.Option(
        "auto", help="Precision; auto = by device."
    ),
    batch_size: int = typer.Option(64, metavar="N", min=1, help="Images per batch."),
) -> None:
    """Score images with a fine-tuned model."""
    if Path(out).exists() and not overwrite:
        raise DataError(f"{out} exists; give another --out, or replace it with --overwrite")
    from sssd_fast import api
    from sssd_fast.evaluation.predict import find_images, write_predictions

    paths = find_images(images)
    found = api.predict(model, paths, device=device, precision=precision, batch_size=batch_size)
    write_predictions(Path(out), found.classes, paths, found.scores)
    for row, label in list(enumerate(found.labels))[:20]:
        if label is not None:
            scores = zip(found.classes, found.scores[row], strict=True)
            text = ", ".join(f"{name} {score:.3f}" for name, score in scores)
            print(f"{paths[row]}: {label} ({text})")
    scored = len(paths) - len(found.failed)
    print(f"{scored} images scored with {found.checkpoint}; written to {out}")
    for row, reason in found.failed.items():
        print(f"not scored: {paths[row]}: {reason}", file=sys.stderr)
    if found.failed:
        raise DataError(
            f"{len(found.failed)} of {len(paths)} files cannot be read; their rows in {out} are empty"
        )


@app.command()
def export(
    model: str = typer.Argument(..., metavar="RUN|CHECKPOINT", help="Model to export."),
    format: Literal["timm", "huggingface", "torch", "onnx"] = typer.Option(
        ..., help="timm, huggingface: the encoder; torch, onnx: the classifier."
    ),
    out: str = typer.Option(..., metavar="FILE|DIR", help="File or folder to write."),
) -> None:
    """Export an encoder or classifier and compare it."""
    import torch

    from sssd_fast.evaluation.predict import load_trained
    from sssd_fast.weights.export import export_classifier, export_encoder

    if format == "timm" or format == "huggingface":
        print(export_encoder(model, Path(out), format))
        return
    trained = load_trained(model, torch.device("cpu"))
    lines = export_classifier(trained.model, Path(out), [format], classes=trained.classes)
    print("\n".join(lines))


@app.command()
def weights(
    path: str = typer.Argument(..., metavar="WEIGHTS|RUN", help="Weights to compare."),
    settings: Settings = None,
    config: ConfigOption = None,
) -> None:
    """Show how weights match the model of a configuration."""
    path, *words = _names_first(path, *(settings or ()))
    loaded = _load(config, words)
    from sssd_fast.api import _weights
    from sssd_fast.model import MAE
    from sssd_fast.weights.load import load_into

    print(load_into(MAE(loaded.model), str(_weights(path))).table())


@app.command()
def report(run: str = typer.Argument(..., metavar="RUN", help="Run folder.")) -> None:
    """Write report.md and report.html of a run again."""
    from sssd_fast.pipeline import stages_of
    from sssd_fast.report.report import write_report

    paths = write_report(run, stages_of(Path(run)))
    print("\n".join(str(path) for path in paths))


# ---- data ------------------------------------------------------------------------------------


@data_app.command("check")
def data_check(
    source: str = typer.Argument(..., metavar="DIR|CSV", help="Images or manifest."),
    out: str | None = typer.Option(None, metavar="FILE.json", help="Write the index."),
    max_bad_fraction: BadFraction = 0.01,
    manifest: Manifest = None,
    accept_wrong_extension: WrongExtension = False,
) -> None:
    """Decode every image once; list bad files, duplicates and leakage between splits."""
    from sssd_fast.data.index import check_data
    from sssd_fast.data.splits import find_leaks, split_manifest, split_summary

    index = check_data(
        source,
        manifest,
        out=out,
        max_bad_fraction=max_bad_fraction,
        accept_wrong_extension=accept_wrong_extension,
    )
    print(index.summary())
    if any(record.split for record in index.records):
        split = split_manifest(index)
        clean = "" if find_leaks(index, split) else "\n  no leakage found"
        print(f"{split_summary(split, index)}{clean}")
    print(f"index written to {out}" if out else "nothing written (--out FILE.json keeps the index)")


@data_app.command("split")
def data_split(
    source: str = typer.Argument(
        ..., metavar="DIR|CSV|INDEX.json", help="Images, manifest or index."
    ),
    protocol: str = typer.Option(
        "random", help="random, block, patient, kfold, manifest or a CSV file."
    ),
    out: str = typer.Option("split.csv", metavar="FILE.csv", help="File to write."),
    test: float = typer.Option(0.2, metavar="F", help="Test images, as a fraction of all."),
    val: float = typer.Option(
        0.1, metavar="F", help="Validation images, as a fraction of all; 0 = none."
    ),
    seed: int = typer.Option(0, metavar="N", help="Seed of the split."),
    folds: int = typer.Option(5, metavar="N", help="Number of folds of kfold."),
    fold: int | None = typer.Option(
        None, metavar="N", help="Fold of kfold, from 0.", show_default="all"
    ),
    manifest: Manifest = None,
    accept_wrong_extension: WrongExtension = False,
) -> None:
    """Write a split as CSV path,label,split."""
    options = {"split": protocol, "test_fraction": test, "val_fraction": val, "split_seed": seed}
    options |= {"source": source, "manifest": manifest, "folds": folds, "fold": fold or 0}
    config = _load(
        None, [f"data.{key}={json_module.dumps(value)}" for key, value in options.items()]
    )
    from sssd_fast.data.index import DataIndex, check_data
    from sssd_fast.data.splits import save_split, split_summary
    from sssd_fast.loaders.prepare import make_split

    if source.endswith(".json"):
        index = DataIndex.load(source)
    else:
        index = check_data(source, manifest, accept_wrong_extension=accept_wrong_extension)
    every = protocol == "kfold" and fold is None
    for number in range(folds) if every else [fold or 0]:
        split = make_split(config.data.model_copy(update={"fold": number}), index)
        path = Path(out).with_suffix(f".fold{number}.csv") if every else Path(out)
        save_split(split, path, index)
        print(f"{split_summary(split, index)}\nwritten to {path}")


@data_app.command("synthetic")
def data_synthetic(
    out: str = typer.Argument(..., metavar="DIR", help="Folder to make."),
    count: int = typer.Option(1600, metavar="N", help="Number of slices."),
    size: int = typer.Option(96, metavar="PIXELS", help="Height and width."),
    seed: int = typer.Option(0, metavar="N", help="Seed of the slices."),
) -> None:
    """Generate synthetic chest-CT-like slices."""
    from sssd_fast.data.synthetic import write_synthetic_dataset

    write_synthetic_dataset(Path(out), count, (size, size), seed=seed)
    print(f"{count} synthetic chest-CT-like slices of {size}x{size} written to {out}")


@data_app.command("convert")
def data_convert(
    source: str = typer.Argument(
        ..., metavar="DIR|CSV", help="One folder per class, or manifest of volumes."
    ),
    out: str = typer.Option(
        ..., metavar="DIR", help="New folder: CLASS/VOLUME/SLICE.png, manifest.csv."
    ),
    manifest: Manifest = None,
    window: str = typer.Option(
        "lung",
        metavar="W",
        help="lung (level -600, width 1500 HU), mediastinum (40, 400), --window=LEVEL,WIDTH, file "
        "(as each file says) or minmax (of each volume; for values that are not HU).",
    ),
    every: int = typer.Option(1, metavar="N", help="Keep each Nth slice of a volume."),
    size: int | None = typer.Option(
        None, metavar="PIXELS", help="Resize the shorter side to this size."
    ),
    max_bad_fraction: BadFraction = 0.01,
) -> None:
    """Convert CT volumes (DICOM, NIfTI) to a folder of grey PNG slices."""
    from sssd_fast.convert.convert import convert_volumes
    from sssd_fast.run.log import Console

    with Console() as console:
        done = convert_volumes(
            source,
            out,
            manifest=manifest,
            window=window,
            every=every,
            size=size,
            max_bad_fraction=max_bad_fraction,
            console=console if console.interactive else None,
        )
    print(done.summary())
    folder, table = (shlex.quote(str(path)) for path in (out, Path(out, "manifest.csv")))
    print(f"to train on it: data.source={folder} data.manifest={table} data.split=patient")


# ---- speed, memory, machine ------------------------------------------------------------------


@app.command()
def plan(
    memory: str = typer.Option(
        ..., metavar="SIZE", help="12GB, 11.5GiB, 8000MB, or auto = the GPU of this machine."
    ),
    settings: Settings = None,
    model: Literal["tiny", "small", "base", "large"] | None = typer.Option(
        None, help="Sets model.name."
    ),
    config: ConfigOption = None,
    task: Literal["pretrain", "finetune"] = typer.Option("pretrain", help="Stage to estimate."),
    batch: int | None = typer.Option(
        None, metavar="N", help="Effective batch of a process.", show_default="as configured"
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Estimate which micro-batch and settings fit a GPU."""
    named = [f"model.name={model}"] if model else []
    loaded = _load(config, [*named, *(settings or ())])
    from sssd_fast.performance.plan import parse_memory, plan_command

    plan_command(loaded, task, parse_memory(memory), effective=batch, as_json=json)


@app.command()
def profile(
    ctx: typer.Context,
    settings: Settings = None,
    config: ConfigOption = None,
    steps: int = typer.Option(10, metavar="N", help="Steps to measure."),
    warmup: int = typer.Option(3, metavar="N", help="Steps before them."),
    out: str | None = typer.Option(None, metavar="FILE.png", help="Write a picture."),
    json: str | None = typer.Option(
        None, metavar="FILE.json", help="Write all numbers, with versions and hardware."
    ),
) -> None:
    """Measure the time of each component of a pre-training step."""
    loaded = _load(config, settings)
    from sssd_fast.performance import profile as task

    task.profile(loaded, steps=steps, warmup=warmup, out=out, json_out=json, command=ctx.obj)


@app.command()
def bench(
    words: list[str] = typer.Argument(..., help="See sssd-fast bench --help."),
) -> None:
    """Run the benchmarks; needs a checkout."""
    raise NotImplementedError("main calls _bench")


def _bench(words: list[str]) -> int:
    """Passes the words on to the benchmarks next to this package in a checkout."""
    root = Path(__file__).resolve().parent.parent
    # Another installed package may also be called benchmarks; a checkout has the ops' folder too.
    own = Path(root, "benchmarks", "__main__.py")
    if not (own.is_file() and Path(root, "kernels", "mae_kernels").is_dir()):
        raise SssdError(
            "bench needs a checkout of the repository: the benchmarks are not part of the installed "
            f"package in {root}; clone the repository, and in it run `make setup` and "
            "`.venv/bin/sssd-fast bench ...`"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found = importlib.util.find_spec("benchmarks")
    where = found.origin if found is not None else None
    if where is None or Path(where).resolve().parent != root / "benchmarks":
        raise SssdError(
            f"bench needs the package benchmarks in {root}, but Python finds another one of that name "
            f"({where or 'no file'}); remove its folder from PYTHONPATH, or run `python -m benchmarks "
            f"...` in {root}"
        )
    return int(importlib.import_module("benchmarks.__main__").main(words))


@app.command()
def doctor(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show hardware, packages and selected implementations."""
    from sssd_fast.run.environment import collect_environment, print_doctor

    if json:
        print(json_module.dumps(collect_environment(probe=True), indent=2))
    else:
        print_doctor(more=_attention)


def _attention(env: dict[str, Any]) -> list[tuple[str, str]]:
    """The attention that `auto` chooses for a ViT-B/16 at 224 pixels, on the first GPU if any."""
    import torch

    from sssd_fast.attention import AttentionShape, choose
    from sssd_fast.run.device import AUTOCAST, pick_precision

    device = torch.device("cuda" if env["gpus"] else "cpu")
    dtype = AUTOCAST.get(pick_precision("auto", device), torch.float32)
    sizes = {"step.attention": (50, 12, 64), "step.decoder_attention": (197, 16, 32)}
    rows = []
    for setting, (tokens, heads, width) in sizes.items():
        shape = AttentionShape(device, dtype, tokens, heads, width, compiled=bool(env["gpus"]))
        rows.append(("attention", choose("auto", shape, setting).line()))
    return rows


@app.command()
def configs(
    name: str | None = typer.Argument(
        None,
        metavar="NAME|FILE",
        help="Configuration to print, with a description of each setting.",
    ),
    settings: Settings = None,
    schema: bool = typer.Option(False, "--schema", help="Print the JSON schema, for editors."),
) -> None:
    """List the shipped configurations, or print one."""
    from sssd_fast.config import Config, shipped_configs, to_yaml

    words = _names_first(name, *(settings or ()))
    source = words.pop(0) if words and "=" not in words[0] else None
    if schema:
        print(json_module.dumps(Config.model_json_schema(), indent=2))
    elif source is None and not words:
        print("\n".join(f"{key:18}{purpose}" for key, purpose in shipped_configs().items()))
    else:
        print(to_yaml(_load(source, words)), end="")


def _load(config: str | None, settings: Sequence[str] | None) -> Any:
    from sssd_fast.config import load_config

    return load_config(config, settings or (), print)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    if version:
        print(f"sssd_fast {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    sys.exit(main())
