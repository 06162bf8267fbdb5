"""The command line: parses, opens the run folder, calls one function per command, and turns errors into one message and an exit code.

0 done, 2 bad configuration, data or files, 3 numerics, 130/143 interrupted after a saved checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__
from .errors import ConfigError, SssdError

OVERRIDES = "settings as key=value, such as pretrain.epochs=400 data.source=ct/ (see `sssd-fast configs NAME`)"


def main(argv: Sequence[str] | None = None) -> int:
    # Read when torch is loaded, which is later: torch's CPU threads then sleep while they wait for each other. Spinning, the
    # default, makes a step 2.5 times slower where another process shares the cores (measured: 2 threads on 2 busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch's own choice is a temporary folder, which the next start of the machine empties.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sssd_fast", "inductor")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    parser = _parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(["sssd-fast", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.function(args)
    except SssdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, such as `| head`
        sys.stderr.close()
        return 141
    except Exception as error:
        from .guards import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0]}). Lower batch_size and raise accumulate by the same factor: the "
            f"effective batch and the learning rate stay the same.",
            file=sys.stderr,
        )
        return 2
    return 0


# ---- training commands -------------------------------------------------------------------------------------------------------


def _pretrain(args: argparse.Namespace) -> None:
    from .pretrain import pretrain

    with _opened("pretrain", args) as run:
        pretrain(run, _init(args.init), _norm(args))
        _report(run)


def _finetune(args: argparse.Namespace) -> None:
    from .finetune import finetune
    from .inference import evaluate_run

    with _opened("finetune", args) as run:
        finetune(run, _init(args.init), _norm(args))
        evaluate_run(run, args.part)
        _report(run)


def _probe(args: argparse.Namespace) -> None:
    from .inference import evaluate_run
    from .probe import probe

    with _opened("probe", args) as run:
        probe(run, str(_init(args.init)), _norm(args))
        evaluate_run(run, args.part)
        _report(run)


def _run(args: argparse.Namespace) -> None:
    from .pipeline import run_all

    config = _config(args)
    out = Path(args.resume or args.out or "runs/run")
    with _dry(args, out) as (place, limits):
        config = _limited(config, limits)
        run_all(
            config,
            place,
            resume=args.resume is not None,
            overwrite=args.overwrite,
            seeds=args.seeds,
            folds=args.folds,
            pretraining=not args.from_scratch,
            command=args.command,
        )


def _evaluate(args: argparse.Namespace) -> None:
    from .inference import evaluate_run

    with _opened("evaluate", args, existing=args.run) as run:
        evaluate_run(run, args.part)
        _report(run)


def _predict(args: argparse.Namespace) -> None:
    from .distributed import pick_device
    from .inference import find_images, load_trained, predict_files, write_predictions

    trained = load_trained(args.model, pick_device(args.device))
    paths = find_images(args.images)
    scores, bad = predict_files(trained, paths, batch_size=args.batch_size, precision=args.precision)
    write_predictions(Path(args.out), trained, paths, scores)
    print(f"{len(paths) - len(bad)} images scored with {trained.path}; written to {args.out}")
    for path, reason in bad:
        print(f"not scored: {path}: {reason}", file=sys.stderr)
    if bad:
        raise SssdError(f"{len(bad)} of {len(paths)} files could not be read; their rows in {args.out} are empty")


# ---- data, weights, reports --------------------------------------------------------------------------------------------------


def _data_check(args: argparse.Namespace) -> None:
    from .data.index import check_data
    from .data.splits import find_leaks, split_manifest

    index = check_data(
        args.source,
        args.manifest,
        out=args.out,
        max_bad_fraction=args.max_bad_fraction,
        accept_wrong_extension=args.accept_wrong_extension,
    )
    index.print_summary()
    split = split_manifest(index) if any(r.split for r in index.records) else None
    if split is not None:
        print(split.summary(index) if find_leaks(index, split) else f"{split.summary(index)}\n  no leak found")
    print(f"index written to {args.out}" if args.out else "nothing written (give --out FILE.json to keep the index)")


def _data_split(args: argparse.Namespace) -> None:
    from .config import DataConfig
    from .data.index import DataIndex, check_data
    from .data.prepare import make_split

    source = Path(args.source)
    index = (
        DataIndex.load(source)
        if source.suffix == ".json"
        else check_data(source, args.manifest, accept_wrong_extension=args.accept_wrong_extension)
    )
    base = DataConfig(
        source=args.source,
        manifest=args.manifest,
        split=args.protocol,
        test_fraction=args.test,
        val_fraction=args.val,
        split_seed=args.seed,
        folds=args.folds,
        fold=args.fold or 0,
    )
    every = args.protocol == "kfold" and args.fold is None
    for fold in range(args.folds) if every else [base.fold]:
        split = make_split(base.model_copy(update={"fold": fold}), index)
        out = Path(args.out) if not every else Path(args.out).with_suffix(f".fold{fold}.csv")
        split.save(out, index)
        print(split.summary(index))
        print(f"written to {out}")


def _data_synthetic(args: argparse.Namespace) -> None:
    from .data.phantom import write_phantom_dataset

    write_phantom_dataset(Path(args.out), args.count, (args.size, args.size), seed=args.seed)
    print(f"{args.count} synthetic chest-CT-like slices of {args.size}x{args.size} written to {args.out}")


def _data_extract(args: argparse.Namespace) -> None:
    from .data.archive import extract_archive

    print(f"extracted to {extract_archive(args.archive, args.out)}")


def _data_convert(args: argparse.Namespace) -> None:
    from .console import Console
    from .data.convert import convert_volumes

    with Console() as console:
        done = convert_volumes(
            args.source,
            args.out,
            manifest=args.manifest,
            window=args.window,
            every=args.every,
            size=args.size,
            max_bad_fraction=args.max_bad_fraction,
            console=console if console.interactive else None,
        )
    print(done.summary())
    folder, table = (shlex.quote(str(path)) for path in (Path(args.out), Path(args.out, "manifest.csv")))
    print(f"to train on it: data.source={folder} data.manifest={table} data.split=patient")


def _weights(args: argparse.Namespace) -> None:
    from .model import MAE
    from .weights import load_into

    print(load_into(MAE(_config(args).model), str(_init(args.path))).table())


def _export(args: argparse.Namespace) -> None:
    import torch

    from .export import export_classifier, export_encoder
    from .inference import load_trained

    if args.format in ("timm", "huggingface"):
        print(export_encoder(args.model, Path(args.out), args.format))
        return
    trained = load_trained(args.model, torch.device("cpu"))
    for line in export_classifier(trained.model, Path(args.out), [args.format], classes=trained.classes):
        print(line)


def _report_command(args: argparse.Namespace) -> None:
    from .pipeline import stages_of
    from .report import write_combined_report, write_report

    out = Path(args.run)
    stages = stages_of(out)
    paths = write_combined_report(out, stages) if stages else write_report(out)
    print("\n".join(str(path) for path in paths))


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import collect_environment, print_doctor

    if args.json:
        print(json.dumps(collect_environment(probe=True), indent=2))
    else:
        print_doctor()


def _profile(args: argparse.Namespace) -> None:
    from .profile import profile

    profile(_config(args), steps=args.steps, warmup=args.warmup, out=args.out, json_out=args.json, command=args.command)


def _plan(args: argparse.Namespace) -> None:
    from .plan import parse_memory, plan_command

    named = [f"model.name={args.model}"] if args.model else []
    args.overrides = [*named, *args.overrides]
    config = _config(args)
    plan_command(config, args.task, parse_memory(args.memory), effective=args.batch, as_json=args.json)


def _configs(args: argparse.Namespace) -> None:
    from .config import load_config, shipped_configs, to_yaml

    print(to_yaml(load_config(args.name, args.overrides)) if args.name else "\n".join(shipped_configs()))


# ---- shared ------------------------------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> Any:
    """--config, else the configuration of the run that is resumed, evaluated or started from, else the defaults."""
    from .config import load_config

    source = getattr(args, "config", None)
    for folder in (getattr(args, "resume", None), getattr(args, "run", None), getattr(args, "init", None)):
        if source is None and folder and Path(folder, "config.yaml").is_file():
            source = Path(folder, "config.yaml")
    if getattr(args, "resume", None) and not Path(args.resume, "config.yaml").is_file():
        raise ConfigError(
            f"--resume {args.resume}: no config.yaml there, so it is no run folder; give the folder of a run"
        )
    return load_config(source, args.overrides)


def _init(path: str | None) -> str | None:
    """Weights to start from: the newest checkpoint of a run folder, or the file itself."""
    from .inference import checkpoint_of

    if path is not None and Path(path, "checkpoints").is_dir():
        return str(checkpoint_of(path, "last"))
    return path


def _norm(args: argparse.Namespace) -> Any:
    """(mean, std) of --init-norm, None for the model's own."""
    from .weights import IMAGENET

    half = (0.5, 0.5, 0.5)
    return {"imagenet": IMAGENET, "half": (half, half), "model": None}[args.init_norm]


def _limited(config: Any, limits: dict[str, Any]) -> Any:
    stages = {name: getattr(config, name).model_copy(update=limits) for name in ("pretrain", "finetune")}
    return config.model_copy(update=stages) if limits else config


@contextmanager
def _dry(args: argparse.Namespace, out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """With --dry-run a temporary folder beside `out` and two steps; what was written is deleted again."""
    if not args.dry_run:
        yield out, {}
        return
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".dry-run-", dir=out.absolute().parent))
    try:
        yield place / "run", {"max_steps": 2}
        print(
            f"dry run: configuration, data, two steps, checkpoint and evaluation worked; nothing was kept ({out} is untouched)"
        )
    finally:
        shutil.rmtree(place)


@contextmanager
def _opened(task: str, args: argparse.Namespace, existing: str | None = None) -> Iterator[Any]:
    from .distributed import world
    from .runs import open_run

    config = _config(args)
    resume = getattr(args, "resume", None)
    out = Path(existing or resume or args.out or f"runs/{task}")
    with _dry(args, out) as (place, limits), world(config.device) as here:
        config = _limited(config, limits)
        if task in ("pretrain", "finetune") and resume is None:
            from .microbatch import resolve_batch

            config = resolve_batch(config, task, here, say=print if here.main else (lambda text: None))
        with open_run(
            task,
            config,
            place,
            here,
            resume=resume is not None,
            overwrite=getattr(args, "overwrite", False),
            existing=existing is not None,
            command=args.command,
        ) as run:
            yield run


def _report(run: Any) -> None:
    from .report import write_report

    run.tracker.close()  # the report reads what it wrote
    if run.world.main:
        run.console.info(f"report: {write_report(run.out)[1]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sssd-fast", description="Train SSSD-COVID fast on one limited GPU.")
    parser.add_argument("--version", action="version", version=f"sssd_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, *, to: Any = commands) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = to.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function, dry_run=False)
        return sub

    def trains(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--config", metavar="NAME|FILE", help="a shipped configuration (`sssd-fast configs`) or a YAML file"
        )
        sub.add_argument(
            "--init-norm",
            choices=("model", "imagenet", "half"),
            default="model",
            help="pixel mean and std the --init weights were trained with: this model's (default), ImageNet's (public MAE "
            "weights), or 0.5 each; the difference is folded into the patch projection, exactly",
        )
        sub.add_argument("--out", metavar="DIR", help="run folder to make (default runs/COMMAND)")
        sub.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its configuration")
        sub.add_argument("--overwrite", action="store_true", help="replace an existing run in --out")
        sub.add_argument("--dry-run", action="store_true", help="check everything and train two steps; keeps nothing")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    sub = command("run", _run, "pre-train, fine-tune, evaluate and report")
    trains(sub)
    several = sub.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="repeat with these seeds (training and split); mean and deviation",
    )
    several.add_argument("--folds", action="store_true", help="repeat for every fold of data.folds; mean and deviation")
    sub.add_argument("--from-scratch", action="store_true", help="leave out pre-training: the supervised control")

    sub = command("pretrain", _pretrain, "pre-train SSSD without labels")
    sub.add_argument(
        "--init", metavar="WEIGHTS", help="start from these weights (MAE .pth, Hugging Face, timm, a checkpoint)"
    )
    trains(sub)
    for name, function, text in (
        ("finetune", _finetune, "fine-tune a classifier and evaluate it"),
        ("probe", _probe, "linear probe of a frozen encoder"),
    ):
        sub = command(name, function, text)
        sub.add_argument(
            "--init",
            metavar="RUN|WEIGHTS",
            required=name == "probe",
            help="pre-training run, checkpoint, or foreign weights",
        )
        sub.add_argument("--part", default="test", choices=("train", "val", "test"), help="part to evaluate at the end")
        trains(sub)

    sub = command("evaluate", _evaluate, "evaluate a fine-tuned run again, or on another part")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--part", default="test", choices=("train", "val", "test"))
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    sub = command("predict", _predict, "score images with a fine-tuned model")
    sub.add_argument("model", metavar="RUN|CHECKPOINT")
    sub.add_argument("images", nargs="+", metavar="IMAGE|DIR")
    sub.add_argument("--out", default="predictions.csv", metavar="FILE")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    sub.add_argument("--batch-size", type=int, default=64)

    data = command("data", None, "check, split, extract, convert or generate image sets").add_subparsers(
        required=True, metavar="ACTION"
    )
    sub = command("check", _data_check, "decode every image once; list bad files and duplicates", to=data)
    sub.add_argument("source", metavar="DIR|CSV")
    sub.add_argument("--out", metavar="FILE.json", help="keep the index")
    sub.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F")
    _manifest(sub)
    sub = command("split", _data_split, "write a split as CSV path,label,split", to=data)
    sub.add_argument("source", metavar="DIR|CSV|INDEX.json")
    sub.add_argument("--protocol", default="random", help="random, block, patient, kfold, manifest or a CSV file")
    sub.add_argument("--out", default="split.csv", metavar="FILE.csv")
    sub.add_argument("--test", type=float, default=0.2, metavar="F", help="fraction of all images")
    sub.add_argument("--val", type=float, default=0.1, metavar="F", help="fraction of all images; 0 = none")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--folds", type=int, default=5)
    sub.add_argument("--fold", type=int, help="one fold (from 0); without it kfold writes all")
    _manifest(sub)
    sub = command("synthetic", _data_synthetic, "generate synthetic chest-CT-like slices", to=data)
    sub.add_argument("out", metavar="DIR")
    sub.add_argument("--count", type=int, default=1600)
    sub.add_argument("--size", type=int, default=96)
    sub.add_argument("--seed", type=int, default=0)
    sub = command("extract", _data_extract, "unpack a zip or tar of images safely", to=data)
    sub.add_argument("archive")
    sub.add_argument("out", metavar="DIR")
    sub = command("convert", _data_convert, "CT volumes (DICOM, NIfTI) to a folder of grey PNG slices", to=data)
    sub.add_argument("source", metavar="DIR|CSV", help="one folder per class, or a CSV manifest of files and folders")
    sub.add_argument("--out", required=True, metavar="DIR", help="new folder: CLASS/VOLUME/SLICE.png, manifest.csv")
    sub.add_argument("--manifest", metavar="CSV", help="path,label[,split][,patient], paths relative to DIR")
    sub.add_argument(
        "--window",
        default="lung",
        metavar="W",
        help="lung (default: level -600, width 1500 HU), mediastinum (40, 400), --window=LEVEL,WIDTH, file (as each file "
        "says) or minmax (of each volume; for values that are not HU)",
    )
    sub.add_argument("--every", type=int, default=1, metavar="N", help="keep each Nth slice of a volume")
    sub.add_argument("--size", type=int, metavar="PIXELS", help="resize until the shorter side has so many")
    sub.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F")

    sub = command("weights", _weights, "show how foreign weights fit a configuration")
    sub.add_argument("path", metavar="WEIGHTS|RUN")
    sub.add_argument("--config", metavar="NAME|FILE")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    sub = command("export", _export, "export an encoder or a classifier, outputs compared")
    sub.add_argument("model", metavar="RUN|CHECKPOINT")
    sub.add_argument("--format", required=True, choices=("timm", "huggingface", "torch", "onnx"))
    sub.add_argument("--out", required=True, metavar="FILE|DIR")
    sub = command("report", _report_command, "write report.md and report.html of a run again")
    sub.add_argument("run", metavar="RUN")
    sub = command("plan", _plan, "which micro-batch and settings fit a GPU, predicted")
    sub.add_argument("--model", choices=("tiny", "small", "base", "large"), help="the ViT, as model.name")
    sub.add_argument("--config", metavar="NAME|FILE", help="a shipped configuration or a YAML file")
    sub.add_argument("--memory", required=True, metavar="SIZE", help="12GB, 11.5GiB, 8000MB; auto = the GPU here")
    sub.add_argument("--task", default="pretrain", choices=("pretrain", "finetune"))
    sub.add_argument("--batch", type=int, metavar="N", help="effective batch of a process (default: as configured)")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    sub = command("profile", _profile, "where the time of a pre-training step goes, by part and as a whole")
    sub.add_argument("--config", metavar="NAME|FILE", help="a shipped configuration or a YAML file")
    sub.add_argument("--steps", type=int, default=10, metavar="N", help="steps that are measured (default 10)")
    sub.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them (default 3)")
    sub.add_argument("--out", metavar="FILE.png", help="the breakdown as a picture")
    sub.add_argument("--json", metavar="FILE.json", help="every figure, with command, versions and hardware")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    sub = command("doctor", _doctor, "what this machine has, what will be used, and why not the rest")
    sub.add_argument("--json", action="store_true")
    sub = command("configs", _configs, "list the shipped configurations, or print one with every key")
    sub.add_argument("name", nargs="?")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def _manifest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--manifest", metavar="CSV", help="path,label[,split][,patient], paths relative to DIR")
    sub.add_argument("--accept-wrong-extension", action="store_true", help="keep good images named as another format")


if __name__ == "__main__":
    sys.exit(main())
