"""What each command of the command line does, given its parsed arguments; whatever is slow to import is imported in the function."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sssd_fast.data.splits import save_split, split_summary
from sssd_fast.errors import ConfigError, SssdError

# ---- training commands -------------------------------------------------------------------------------------------------------


def pretrain(args: argparse.Namespace) -> None:
    from sssd_fast import pretrain as task

    with _opened("pretrain", args) as run:
        task.pretrain(run, _init(args.init), _norm(args))
        _report(run)


def finetune(args: argparse.Namespace) -> None:
    from sssd_fast import finetune as task
    from sssd_fast.evaluation.predict import evaluate_run

    with _opened("finetune", args) as run:
        task.finetune(run, _init(args.init), _norm(args))
        evaluate_run(run, args.part)
        _report(run)


def probe(args: argparse.Namespace) -> None:
    from sssd_fast import probe as task
    from sssd_fast.evaluation.predict import evaluate_run

    with _opened("probe", args) as run:
        task.probe(run, str(_init(args.init)), _norm(args))
        evaluate_run(run, args.part)
        _report(run)


def run(args: argparse.Namespace) -> None:
    from sssd_fast.pipeline import run_all

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


def reproduce(args: argparse.Namespace) -> None:
    from sssd_fast.config import changed, from_dict, load_config, to_dict
    from sssd_fast.reproduce import plan as plans
    from sssd_fast.reproduce.public_sets import PUBLIC_SETS
    from sssd_fast.reproduce.reproduce import reproduce as run

    plans.check_overrides(args.overrides)
    out = Path(args.resume or args.out or f"runs/{args.dataset}")
    fields: dict[str, Any] = {}
    if args.resume is not None:
        fields = vars(plans.load_plan(out))
        if args.dataset not in (None, fields["dataset"]) or args.config is not None:
            raise ConfigError(
                f"--resume {args.resume} goes on with {fields['dataset']} and its settings; leave out the name and --config, or "
                f"start anew with --out"
            )
        config = changed(from_dict(fields["config"]), args.overrides)
    else:
        if args.dataset not in PUBLIC_SETS or args.data is None:
            raise ConfigError(
                f"reproduce needs a name ({', '.join(PUBLIC_SETS)}) and its folder: --data DIR"
            )
        config = load_config(args.config or PUBLIC_SETS[args.dataset].config, args.overrides)
        fields = {
            "dataset": args.dataset,
            "methods": plans.METHODS if args.external else plans.METHODS[:3],
        }
    for name in ("data", "external", "official_split"):
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    if args.part is not None:
        fields["split"] = args.part
    for name in (
        "protocols",
        "methods",
        "seeds",
    ):  # on resume they come to those that were asked for before
        if getattr(args, name) is not None:
            before = fields.get(name, ()) if args.resume is not None else ()
            fields[name] = tuple(dict.fromkeys([*before, *getattr(args, name)]))
    if args.tries:
        fields["variants"] = plans.variants_of(args.tries)
    with _dry(args, out) as (place, limits):
        if limits:
            fields["seeds"] = (fields.get("seeds") or plans.SEEDS)[:1]
        fields["commands"] = tuple(dict.fromkeys([*fields.get("commands", ()), args.command]))
        plan = plans.Plan(**{**fields, "config": to_dict(_limited(config, limits))})
        run(plan, place, resume=args.resume is not None and not args.dry_run, minutes=args.minutes)


def evaluate(args: argparse.Namespace) -> None:
    from sssd_fast.evaluation.predict import evaluate_run

    with _opened("evaluate", args, existing=args.run) as run:
        evaluate_run(run, args.part)
        _report(run)


def predict(args: argparse.Namespace) -> None:
    from sssd_fast.evaluation.predict import (
        find_images,
        load_trained,
        predict_files,
        write_predictions,
    )
    from sssd_fast.run.device import pick_device

    trained = load_trained(args.model, pick_device(args.device))
    paths = find_images(args.images)
    scores, bad = predict_files(
        trained, paths, batch_size=args.batch_size, precision=args.precision
    )
    write_predictions(Path(args.out), trained, paths, scores)
    print(f"{len(paths) - len(bad)} images scored with {trained.path}; written to {args.out}")
    for path, reason in bad:
        print(f"not scored: {path}: {reason}", file=sys.stderr)
    if bad:
        raise SssdError(
            f"{len(bad)} of {len(paths)} files could not be read; their rows in {args.out} are empty"
        )


# ---- data, weights, reports --------------------------------------------------------------------------------------------------


def data_check(args: argparse.Namespace) -> None:
    from sssd_fast.data.index import check_data
    from sssd_fast.data.splits import find_leaks, split_manifest

    index = check_data(
        args.source,
        args.manifest,
        out=args.out,
        max_bad_fraction=args.max_bad_fraction,
        accept_wrong_extension=args.accept_wrong_extension,
    )
    print(index.summary())
    split = split_manifest(index) if any(r.split for r in index.records) else None
    if split is not None:
        print(
            split_summary(split, index)
            if find_leaks(index, split)
            else f"{split_summary(split, index)}\n  no leak found"
        )
    print(
        f"index written to {args.out}"
        if args.out
        else "nothing written (give --out FILE.json to keep the index)"
    )


def data_split(args: argparse.Namespace) -> None:
    from sssd_fast.config import DataConfig
    from sssd_fast.data.index import DataIndex, check_data
    from sssd_fast.loaders.prepare import make_split

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
        save_split(split, out, index)
        print(split_summary(split, index))
        print(f"written to {out}")


def data_synthetic(args: argparse.Namespace) -> None:
    from sssd_fast.data.synthetic import write_synthetic_dataset

    write_synthetic_dataset(Path(args.out), args.count, (args.size, args.size), seed=args.seed)
    print(
        f"{args.count} synthetic chest-CT-like slices of {args.size}x{args.size} written to {args.out}"
    )


def data_convert(args: argparse.Namespace) -> None:
    from sssd_fast.convert.convert import convert_volumes
    from sssd_fast.run.log import Console

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
    folder, table = (
        shlex.quote(str(path)) for path in (Path(args.out), Path(args.out, "manifest.csv"))
    )
    print(f"to train on it: data.source={folder} data.manifest={table} data.split=patient")


def weights(args: argparse.Namespace) -> None:
    from sssd_fast.model import MAE
    from sssd_fast.weights.load import load_into

    print(load_into(MAE(_config(args).model), str(_init(args.path))).table())


def export(args: argparse.Namespace) -> None:
    import torch

    from sssd_fast.evaluation.predict import load_trained
    from sssd_fast.weights.export import export_classifier, export_encoder

    if args.format in ("timm", "huggingface"):
        print(export_encoder(args.model, Path(args.out), args.format))
        return
    trained = load_trained(args.model, torch.device("cpu"))
    for line in export_classifier(
        trained.model, Path(args.out), [args.format], classes=trained.classes
    ):
        print(line)


def report(args: argparse.Namespace) -> None:
    from sssd_fast.pipeline import stages_of
    from sssd_fast.report.report import write_combined_report, write_report

    out = Path(args.run)
    stages = stages_of(out)
    paths = write_combined_report(out, stages) if stages else write_report(out)
    print("\n".join(str(path) for path in paths))


def doctor(args: argparse.Namespace) -> None:
    from sssd_fast.run.environment import collect_environment, print_doctor

    if args.json:
        print(json.dumps(collect_environment(probe=True), indent=2))
    else:
        print_doctor()


def profile(args: argparse.Namespace) -> None:
    from sssd_fast.performance import profile as task

    task.profile(
        _config(args),
        steps=args.steps,
        warmup=args.warmup,
        out=args.out,
        json_out=args.json,
        command=args.command,
    )


def plan(args: argparse.Namespace) -> None:
    from sssd_fast.performance.plan import parse_memory, plan_command

    named = [f"model.name={args.model}"] if args.model else []
    args.overrides = [*named, *args.overrides]
    config = _config(args)
    plan_command(
        config, args.task, parse_memory(args.memory), effective=args.batch, as_json=args.json
    )


def configs(args: argparse.Namespace) -> None:
    from sssd_fast.config import load_config, shipped_configs, to_yaml

    print(
        to_yaml(load_config(args.name, args.overrides))
        if args.name
        else "\n".join(shipped_configs())
    )


# ---- shared ------------------------------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> Any:
    """--config, else the configuration of the run that is resumed, evaluated or started from, else the defaults."""
    from sssd_fast.config import load_config

    source = getattr(args, "config", None)
    for folder in (
        getattr(args, "resume", None),
        getattr(args, "run", None),
        getattr(args, "init", None),
    ):
        if source is None and folder and Path(folder, "config.yaml").is_file():
            source = Path(folder, "config.yaml")
    if getattr(args, "resume", None) and not Path(args.resume, "config.yaml").is_file():
        raise ConfigError(
            f"--resume {args.resume}: no config.yaml there, so it is no run folder; give the folder of a run"
        )
    return load_config(source, args.overrides)


def _init(path: str | None) -> str | None:
    """Weights to start from: the newest checkpoint of a run folder, or the file itself."""
    from sssd_fast.run.checkpoint import find_checkpoint

    stages = ("pretrain", "finetune")
    if path is not None and any(Path(path, s, "checkpoints").is_dir() for s in ("", *stages)):
        return str(find_checkpoint(path, "last", stages=stages))
    return path


def _norm(args: argparse.Namespace) -> Any:
    """(mean, std) of --init-norm, None for the model's own."""
    from sssd_fast.weights.load import IMAGENET

    half = (0.5, 0.5, 0.5)
    return {"imagenet": IMAGENET, "half": (half, half), "model": None}[args.init_norm]


def _limited(config: Any, limits: dict[str, Any]) -> Any:
    stages = {
        name: getattr(config, name).model_copy(update=limits) for name in ("pretrain", "finetune")
    }
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
    from sssd_fast.run.device import world
    from sssd_fast.run.folder import open_run

    config = _config(args)
    resume = getattr(args, "resume", None)
    out = Path(existing or resume or args.out or f"runs/{task}")
    with _dry(args, out) as (place, limits), world(config.device) as here:
        config = _limited(config, limits)
        if task in ("pretrain", "finetune") and resume is None:
            from sssd_fast.performance.batch_size import resolve_batch

            config = resolve_batch(
                config, task, here, say=print if here.main else (lambda text: None)
            )
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
    from sssd_fast.report.report import write_report

    run.tracker.close()  # the report reads what it wrote
    if run.world.main:
        run.console.info(f"report: {write_report(run.out)[1]}")
