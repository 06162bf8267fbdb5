"""Commands for data, speed, memory and this machine; cli.py adds them to the command line."""

from __future__ import annotations

import json as json_module
import shlex
from pathlib import Path
from typing import Any, Literal

import typer

from sssd_fast.cli_options import (
    BAD_FRACTION,
    CONFIG,
    MANIFEST,
    SETTINGS,
    WRONG_EXTENSION,
    argument,
    flag,
    load,
    names_first,
    option,
)

app = typer.Typer()
data_app = typer.Typer(help="Check, split or convert image sets.", rich_markup_mode=None)
app.add_typer(data_app, name="data", no_args_is_help=True)


# ---- data ------------------------------------------------------------------------------------


@data_app.command("check")
def data_check(
    source: str = argument("DIR|CSV", "Images or manifest."),
    out: str | None = option(None, "Write the index.", "FILE.json"),
    max_bad_fraction: float = BAD_FRACTION,
    manifest: str | None = MANIFEST,
    reject_wrong_extension: bool = WRONG_EXTENSION,
    grey_range: tuple[int, int] | None = option(
        None, "Values of 16-bit images that become black, white (data.grey_range).", "LOW HIGH"
    ),
) -> None:
    """Decode every image once; list bad files, duplicates and leakage between splits."""
    from sssd_fast.data.index import check_data
    from sssd_fast.data.split import find_leaks, split_manifest, split_summary

    index = check_data(
        source,
        manifest,
        out=out,
        max_bad_fraction=max_bad_fraction,
        accept_wrong_extension=not reject_wrong_extension,
        grey_range=grey_range,
    )
    print(index.summary())
    if any(record.split for record in index.records):
        split = split_manifest(index)
        clean = "" if find_leaks(index, split) else "\n  no leakage found"
        print(f"{split_summary(split, index)}{clean}")
    print(f"index written to {out}" if out else "nothing written (--out FILE.json keeps the index)")


@data_app.command("split")
def data_split(
    source: str = argument("DIR|CSV|INDEX.json", "Images, manifest or index."),
    settings: list[str] | None = SETTINGS,
    out: str = option("split.csv", "File to write; split=kfold: one per fold.", "FILE.csv"),
) -> None:
    """Write a split as CSV path,label,split; settings: data.split, data.test_fraction, ..."""
    config = load(None, [f"data.source={json_module.dumps(source)}", *(settings or ())]).data
    from sssd_fast.data.index import DataIndex, check_data
    from sssd_fast.data.split import make_split, save_split, split_summary

    if source.endswith(".json"):
        index = DataIndex.load(source)
    else:
        accept = config.accept_wrong_extension
        index = check_data(source, config.manifest, accept_wrong_extension=accept)
    for note in index.notes:
        print(f"note: {note}")
    every = config.split == "kfold"
    for number in range(config.folds) if every else [config.fold]:
        split = make_split(config.model_copy(update={"fold": number}), index)
        path = Path(out).with_suffix(f".fold{number}.csv") if every else Path(out)
        save_split(split, path, index)
        print(f"{split_summary(split, index)}\nwritten to {path}")


@data_app.command("convert")
def data_convert(
    source: str = argument("DIR|CSV", "One folder per class, or manifest of volumes."),
    out: str = option(..., "New folder: CLASS/VOLUME/SLICE.png, manifest.csv.", "DIR"),
    manifest: str | None = MANIFEST,
    window: str = option(
        "lung",
        "lung (level -600, width 1500 HU), mediastinum (40, 400), --window=LEVEL,WIDTH, file (the "
        "window in each file) or minmax (of each volume; for values that are not HU).",
        "W",
    ),
    every: int = option(1, "Keep each Nth slice of a volume.", "N"),
    size: int | None = option(None, "Resize the shorter side to this size.", "PIXELS"),
    max_bad_fraction: float = BAD_FRACTION,
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
    given = "manifest" if any(volume.split for volume in done.written) else "patient"
    print(f"to train on it: data.source={folder} data.manifest={table} data.split={given}")


@data_app.command("cache")
def data_cache(empty: bool = flag("--empty", "Delete it; not while a run starts.")) -> None:
    """Show what is kept between runs: decoded images, compiled steps. It can always be deleted."""
    from sssd_fast.run.files import user_cache

    folder, total = user_cache(), 0
    kinds = {"pixels": "decoded images and results of checks", "inductor": "compiled steps"}
    for place in sorted(folder.glob("*")):
        files = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        total += size
        named = f"{place.name} ({kinds[place.name]})" if place.name in kinds else place.name
        print(f"{size / 2**20:10,.1f} MiB in {len(files)} files: {named}")
        if empty:
            for path in files:
                path.unlink(missing_ok=True)
    done = "deleted" if empty else "in all; --empty deletes them"
    print(f"{total / 2**20:10,.1f} MiB {done} ({folder})")


# ---- speed, memory, machine ------------------------------------------------------------------


@app.command()
def plan(
    memory: str = option(..., "12GB, 11.5GiB, 8000MB, or auto = the GPU of this machine.", "SIZE"),
    settings: list[str] | None = SETTINGS,
    model: Literal["tiny", "small", "base", "large"] | None = option(None, "Sets model.name."),
    config: str | None = CONFIG,
    task: Literal["pretrain", "finetune"] = option("pretrain", "Stage to estimate."),
    batch: int | None = option(
        None, "Effective batch of a process.", "N", show_default="as configured"
    ),
) -> None:
    """Estimate which micro-batch and settings fit a GPU."""
    named = [f"model.name={model}"] if model else []
    loaded = load(config, [*named, *(settings or ())])
    from sssd_fast.performance.plan import parse_memory, plan_command

    plan_command(loaded, task, parse_memory(memory), effective=batch)


@app.command()
def profile(
    settings: list[str] | None = SETTINGS,
    config: str | None = CONFIG,
    steps: int = option(10, "Steps to measure.", "N"),
    warmup: int = option(3, "Steps before them.", "N"),
    out: str | None = option(None, "Write a picture.", "FILE.png"),
) -> None:
    """Measure the time of each component of a pre-training step."""
    loaded = load(config, settings)
    from sssd_fast.performance import profile as task
    from sssd_fast.pretrain import PretrainTask
    from sssd_fast.train import make_step

    def build(run: Any, *data: Any) -> Any:
        return make_step(PretrainTask(run, *data), run, run.config)

    task.profile(loaded, build, steps=steps, warmup=warmup, out=out)


def _choices() -> dict[str, str]:
    """What the settings with the value auto select on this machine for a ViT-T."""
    import torch

    from sssd_fast.attention import AttentionShape, choose
    from sssd_fast.config import Config
    from sssd_fast.run.device import AUTOCAST, pick_device, pick_precision, precision_reason
    from sssd_fast.run.processes import pick_processes

    device = pick_device("auto")
    precision = pick_precision("auto", device)
    dtype = AUTOCAST.get(precision, torch.float32)
    count, why = pick_processes(Config(), ("pretrain", "finetune"))
    return {
        "precision": f"{precision}, {precision_reason('auto', device)}",
        "attention": choose("auto", AttentionShape(device, dtype, 197, 3, 64))[1],
        "processes": f"{count}, {why}",
    }


@app.command()
def doctor(json: bool = flag("--json", "Print JSON.")) -> None:
    """Show hardware, packages, kernels and what is missing."""
    from sssd_fast.run.environment import collect_environment, print_doctor

    env = collect_environment(probe=True)
    env["choices"] = _choices()
    if json:
        print(json_module.dumps(env, indent=2))
    else:
        print_doctor(env)


@app.command()
def configs(
    name: str | None = argument(
        "NAME|FILE", "Configuration to print, with a description of each setting.", None
    ),
    settings: list[str] | None = SETTINGS,
    schema: bool = flag("--schema", "Print the JSON schema, for editors."),
) -> None:
    """List the shipped configurations, or print one."""
    from sssd_fast.config import Config, shipped_configs, to_yaml

    words = names_first(name, *(settings or ()))
    source = words.pop(0) if words and "=" not in words[0] else None
    if schema:
        print(json_module.dumps(Config.model_json_schema(), indent=2))
    elif source is None and not words:
        found = shipped_configs()
        width = max(map(len, found)) + 2
        print("\n".join(f"{key:{width}}{purpose}" for key, purpose in found.items()))
        print(
            "auto, the default of run, is one of these. At its start run prints the expected time "
            "on this machine; run --minutes M chooses the epochs."
        )
    else:
        print(to_yaml(load(source, words)), end="")
