"""From the data section of a configuration to a checked index and a split, the same on every process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from sssd_fast.config import AugmentConfig, Config, DataConfig
from sssd_fast.data.index import DataIndex, check_data, report_duplicates
from sssd_fast.data.labels import positive_class
from sssd_fast.data.pixels import cache_folder
from sssd_fast.data.split import Split
from sssd_fast.data.splits import (
    carve_validation,
    find_leaks,
    save_split,
    split_block,
    split_csv,
    split_kfold,
    split_manifest,
    split_patient,
    split_random,
    split_summary,
)
from sssd_fast.data.synthetic import write_synthetic_dataset
from sssd_fast.errors import DataError
from sssd_fast.loaders import AugmentSpec, Loader, build_loader
from sssd_fast.run.folder import Run
from sssd_fast.run.log import Progress as Bar


def prepare_data(run: Run) -> tuple[DataIndex, Split]:
    """Checks every image, splits, and records both in the run folder (index.json, split.csv, data.json).

    With several processes the first one does the work and the others read its files. On resume the recorded index and split are
    used again, so that a file added to the folder since cannot change the run.
    """
    out, world = run.out, run.world
    if world.main and not (run.resume and (out / "index.json").exists()):
        _make(run)
    world.barrier()
    index = DataIndex.load(out / "index.json")
    split = split_csv(index, out / "split.csv")
    run.data_fingerprint = index.fingerprint([*split.train, *split.val, *split.test])
    return index, split


def pretraining_images(run: Run, index: DataIndex, split: Split) -> tuple[DataIndex, list[int]]:
    """What pre-training reads: the training part, and with pretrain.extra the images there too, without their labels.

    An extra image with the pixels of an image of `index` is left out, whatever part that one is in. What was taken is recorded in
    the run folder (extra.json), enters the fingerprint of the data, and is used again on resume.
    """
    folder, recorded = run.config.pretrain.extra, run.out / "extra.json"
    if folder is None:
        return index, split.train
    if run.world.main and not (run.resume and recorded.exists()):
        with run.console.announce(f"checking every image in {folder}"):
            extra = check_data(
                folder,
                max_bad_fraction=run.config.data.max_bad_fraction,
                accept_wrong_extension=run.config.data.accept_wrong_extension,
                index_cache=cache_folder(run.config.data.cache),
            )
        _joined(index, split.train, extra).save(recorded)
    run.world.barrier()
    both = DataIndex.load(recorded)
    run.console.info("\n".join(both.notes))
    run.data_fingerprint = hashlib.sha256(
        f"{run.data_fingerprint} {both.fingerprint()}".encode()
    ).hexdigest()
    return both, list(range(len(both)))


def _joined(index: DataIndex, train: Sequence[int], extra: DataIndex) -> DataIndex:
    """Records `train` of `index`, then those of `extra` with other pixels than any of `index`; of one class, since labels are not read."""
    root = Path(os.path.commonpath([index.root.absolute(), extra.root.absolute()]))
    seen = {record.pixel_hash for record in index.records}
    new = [i for i, record in enumerate(extra.records) if record.pixel_hash not in seen]
    taken = [(index, i) for i in train] + [(extra, i) for i in new]
    records = [
        replace(
            one.records[i],
            path=one.file(i).absolute().relative_to(root).as_posix(),
            label=0,
            split=None,
            patient=None,
        )
        for one, i in taken
    ]
    notes = [
        f"pre-training reads {len(train)} images of the training part and {len(new)} from {extra.root}, without labels",
        f"{len(extra) - len(new)} images there have the pixels of an image of {index.root} and are left out; "
        f"{len(extra.excluded)} are unusable",
    ]
    return DataIndex(root, ["no label"], records, extra.excluded, notes)


def positive_label(config: Config, index: DataIndex) -> int:
    """The class that sensitivity and the score are about: data.positive, or the one not named as a negation."""
    name = config.data.positive
    if name is None:
        return positive_class(index.classes)
    if name not in index.classes:
        raise DataError(
            f"data.positive is {name!r}, needs one of the classes: {', '.join(index.classes)}"
        )
    return index.classes.index(name)


def make_split(config: DataConfig, index: DataIndex) -> Split:
    """The protocol that data.split names; parts given without validation get one of val_fraction from their training part."""
    val, seed = config.val_fraction, config.split_seed
    if config.split == "random":
        return split_random(index, config.test_fraction, seed, val=val)
    if config.split == "block":
        return split_block(index, config.test_fraction, val=val)
    if config.split == "patient":
        return split_patient(index, config.test_fraction, seed, val=val)
    if config.split == "kfold":
        return split_kfold(index, config.folds, config.fold, seed, val=val)
    given = split_manifest(index) if config.split == "manifest" else split_csv(index, config.split)
    return given if given.val or val == 0 else carve_validation(index, given, val, seed)


def make_loader(
    run: Run,
    index: DataIndex,
    ids: Sequence[int],
    *,
    batch_size: int,
    augment: AugmentConfig | None = None,
    shard: bool = True,
) -> Loader:
    """The loader of this run's settings: augmented and shuffled with `augment`, else the evaluation view in order.

    `shard` deals the images to all processes; without it each process sees all of them.
    """
    config, world = run.config, run.world
    with _Decoding(run) as decoding:
        loader = build_loader(
            index,
            ids,
            batch_size=batch_size,
            image_size=config.model.image_size,
            channels=config.model.in_channels,
            train=None if augment is None else AugmentSpec(**augment.model_dump()),
            seed=config.seed,
            rank=world.rank if shard else 0,
            world=world.size if shard else 1,
            workers=config.data.workers,
            provider=config.data.loader,
            cache=config.data.cache,
            limit_gib=config.data.resident_gib,
            device=world.device,
            fit=config.data.fit,
            progress=decoding.progress,
            say=run.console.warn,
        )
    if augment is not None:
        run.console.info(f"loader: {loader.choice}")
        run.console.info(f"loader: {loader.describe()}")
    return loader


class _Decoding:
    """A progress bar that appears with the first image decoded, so that a set read from the cache shows none."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = ExitStack()
        self._bar: Bar | None = None

    def __enter__(self) -> _Decoding:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def progress(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(
                self._run.console.progress(total, "decoding the images once")
            )
        self._bar.update(done)


def _make(run: Run) -> None:
    config, console = run.config.data, run.console
    synthetic = config.source == "synthetic"
    source: Path = Path(config.source)
    if synthetic:
        source = _synthetic_slices(run)
    with console.announce(f"checking every image in {source}"):
        index = check_data(
            source,
            config.manifest,
            max_bad_fraction=config.max_bad_fraction,
            accept_wrong_extension=config.accept_wrong_extension,
            index_cache=cache_folder(config.cache),
        )
    split = make_split(config, index)
    index.save(run.out / "index.json")
    save_split(split, run.out / "split.csv", index)
    console.info(index.summary())
    console.info(split_summary(split, index))
    run.write_json("data.json", _facts(index, split, synthetic))


def _synthetic_slices(run: Run) -> Path:
    """The synthetic slices of this size and number, written once beside the run folder and used again."""
    config, (height, width) = run.config, run.config.model.image_size
    count = config.data.synthetic_images
    folder = (
        run.out.absolute().parent
        / f"synthetic-ct-{count}-{height}x{width}-seed{config.data.synthetic_seed}"
    )
    if not (folder / "manifest.csv").exists():
        with run.console.announce(
            f"drawing {count} synthetic chest-CT-like slices of {height}x{width} into {folder}"
        ):
            write_synthetic_dataset(folder, count, (height, width), seed=config.data.synthetic_seed)
    return folder


def _facts(index: DataIndex, split: Split, synthetic: bool) -> dict[str, Any]:
    """data.json: what the report says about the data."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    duplicates = report_duplicates(index, split)
    return {
        "source": str(index.root),
        "synthetic": synthetic,
        "classes": index.classes,
        "counts": {name: index.counts(ids) for name, ids in parts.items()},
        "excluded": [{"path": e.path, "reason": e.reason} for e in index.excluded],
        "notes": index.notes,
        "duplicates": duplicates.lines(),
        "leaks": find_leaks(index, split),
        "split_protocol": split.protocol,
    }
