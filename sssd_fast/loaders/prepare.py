"""From the `data` settings to a checked index, a split and loaders, the same on every process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from sssd_fast.config import AugmentConfig, Config, DataConfig, load_config
from sssd_fast.data.images import GreyRange, printable
from sssd_fast.data.index import DataIndex, check_data, duplicate_lines, positive_class
from sssd_fast.data.pixels import cache_folder
from sssd_fast.data.split import (
    Split,
    find_leaks,
    make_split,
    save_split,
    split_csv,
    split_summary,
)
from sssd_fast.data.synthetic import is_synthetic, write_synthetic_dataset
from sssd_fast.errors import CheckpointError, DataError
from sssd_fast.loaders import Loader, SampleOrder, build_loader
from sssd_fast.run.folder import Run
from sssd_fast.run.log import Progress as Bar


def prepare_data(run: Run) -> tuple[DataIndex, Split]:
    """Checks every image, splits, and records both in the run folder (index.json, split.csv,
    data.json).

    With several processes the first one does the work and the others read its files. A resumed run
    uses the recorded index and split, so a file added to the folder meanwhile cannot change the
    run.
    """

    def first() -> None:
        if not (run.resume and (run.out / "index.json").exists()):
            _make(run)
        load_data(run)

    run.world.on_main(first)
    index, split = load_data(run)
    run.data_fingerprint = index.fingerprint([*split.train, *split.val, *split.test])
    sizes = [f"{name} {len(split.ids(name))}" for name in ("train", "val", "test")]
    run.data_summary = f"{index.root}: {len(index)} images; {', '.join(sizes)}"
    run.train_images = len(split.train)
    return index, split


def load_data(run: Run) -> tuple[DataIndex, Split]:
    """The recorded index and split of a run.

    A data folder that was moved is given by data.source; its files are compared with the index.
    """
    index = _load_index(run, "index.json", "data.source")
    return index, split_csv(index, run.out / "split.csv")


def _load_index(run: Run, name: str, setting: str) -> DataIndex:
    """Recorded index `name` of the folder that `setting` names."""
    path, (section, key) = run.out / name, setting.split(".")
    index = DataIndex.load(path)
    given = getattr(getattr(run.config, section), key)
    before = getattr(getattr(load_config(run.out / "config.yaml"), section), key)
    if given == before and index.root.is_dir():
        return index
    place = _synthetic_slices(run) if is_synthetic(given) else Path(given)
    place = place.parent if place.is_file() else place
    if not place.is_dir():
        missing = index.root if given == before else place
        raise DataError(
            f"{path}: the data folder {printable(str(missing))} does not exist; if it was moved, "
            f"add {setting}=DIR to the command. The images are then compared with the index"
        )
    return index.moved_to(place, setting)


def pretraining_images(run: Run, index: DataIndex, split: Split) -> tuple[DataIndex, list[int]]:
    """Images for pre-training: the training split and the images of pretrain.extra, without labels.

    An extra image with the pixels of any image of `index` is excluded. The check is recorded in the
    run folder (extra.json), is included in the fingerprint of the data, and is used again on
    resume.
    """
    folder, recorded = run.config.pretrain.extra, run.out / "extra.json"
    if folder is None:
        return index, split.train
    if run.resume and not recorded.exists():
        raise CheckpointError(
            f"pretrain.extra is {folder}, but {run.out} was trained without additional images; "
            "omit it, or start a new run"
        )

    def first() -> None:
        with run.console.announce(f"checking every image in {folder}"):
            known = index.grey_range
            extra = _check(run.config.data, folder, grey_range=known, labelled=False)
        extra.save(recorded)

    if not run.resume:
        run.world.on_main(first)
    extra = _load_index(run, recorded.name, "pretrain.extra")
    both = joined(index, split.train, extra)
    run.console.info("\n".join(both.notes))
    fingerprints = f"{run.data_fingerprint} {extra.fingerprint()}"
    run.data_fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()
    return both, list(range(len(both)))


def joined(index: DataIndex, train: Sequence[int], extra: DataIndex) -> DataIndex:
    """Records `train` of `index`, then those of `extra` whose pixels are new, all in one class."""
    root = Path(os.path.commonpath([index.root.absolute(), extra.root.absolute()]))
    seen = {record.pixel_hash for record in index.records}
    new = [i for i, record in enumerate(extra.records) if record.pixel_hash not in seen]
    taken = [(index, i) for i in train] + [(extra, i) for i in new]
    records = []
    for one, i in taken:
        path = one.file(i).absolute().relative_to(root).as_posix()
        records.append(replace(one.records[i], path=path, label=0, split=None, patient=None))
    notes = [
        f"pre-training uses {len(train)} images of the training split and {len(new)} from "
        f"{extra.root}",
        f"{len(extra) - len(new)} images there have the pixels of an image of {index.root} and are "
        f"excluded; {len(extra.excluded)} are unusable",
    ]
    grey_range = index.grey_range or extra.grey_range
    return DataIndex(root, ["no label"], records, extra.excluded, notes, grey_range)


def require_classes(index: DataIndex) -> None:
    """Raises DataError if a classifier cannot be trained on the images."""
    if len(index.classes) < 2:
        names = ", ".join(map(printable, index.classes))
        notes = "".join(f"\n  note: {note}" for note in index.notes)
        raise DataError(
            f"the data have {len(index.classes)} class ({names}); a classifier needs 2 or more"
            f"{notes}"
        )


def require_threshold(config: Config, split: Split) -> None:
    """Raises DataError if evaluate.threshold is auto without validation images."""
    if config.evaluate.threshold == "auto" and not split.val:
        raise DataError(
            "evaluate.threshold is auto, which needs validation images, and the split has none; "
            "set data.val_fraction=0.1 or a number, such as evaluate.threshold=0.5"
        )


def positive_label(config: Config, index: DataIndex) -> int:
    """The class of sensitivity and scores: data.positive, or the one not named as a negation."""
    name = config.data.positive
    if name is None:
        return positive_class(index.classes)
    if name not in index.classes:
        classes = ", ".join(index.classes)
        raise DataError(f"data.positive is {name!r}, needs one of the classes: {classes}")
    return index.classes.index(name)


def make_loader(
    run: Run,
    index: DataIndex,
    ids: Sequence[int],
    *,
    batch_size: int,
    augment: AugmentConfig | None = None,
    shard: bool = True,
) -> Loader:
    """The loader of this run's settings: augmented and shuffled with `augment`, else evaluation
    crops.

    shard: distribute the images over all processes; without it each process sees all of them.
    """
    model, data, world = run.config.model, run.config.data, run.world
    order = SampleOrder(
        index,
        ids,
        batch_size=batch_size,
        image_size=model.image_size,
        channels=model.in_channels,
        augment=augment,
        seed=run.config.seed,
        rank=world.rank if shard else 0,
        world=world.size if shard else 1,
        fit=data.fit,
    )
    bars: list[Bar] = []
    with ExitStack() as stack:

        def progress(done: int, total: int) -> None:
            # made with the first decoded image: a set read from the cache shows no bar
            if not bars:
                bar = run.console.progress(total, "decoding the images once")
                bars.append(stack.enter_context(bar))
            bars[0].update(done)

        loader = build_loader(
            order,
            world.device,
            provider=data.loader,
            workers=data.workers,
            cache=data.cache,
            limit_gib=data.resident_gib,
            progress=progress,
            warn=run.console.warn,
        )
    return loader


def _make(run: Run) -> None:
    config, console = run.config.data, run.console
    synthetic = is_synthetic(config.source)
    source = _synthetic_slices(run) if synthetic else Path(config.source)
    with console.announce(f"checking every image in {source}"):
        index = _check(config, source, config.manifest)
    # a command of several stages: before the first one is trained
    if run.top is not None:
        require_classes(index)
    split = make_split(config, index)
    require_threshold(run.config, split)
    index.save(run.out / "index.json")
    save_split(split, run.out / "split.csv", index)
    console.info(index.summary())
    console.info(split_summary(split, index))
    # what the report shows
    splits = {"train": split.train, "val": split.val, "test": split.test}
    facts = {
        "source": str(index.root),
        "synthetic": synthetic,
        "classes": index.classes,
        "counts": {name: index.counts(ids) for name, ids in splits.items()},
        "excluded": [asdict(e) for e in index.excluded],
        "notes": index.notes,
        "duplicates": duplicate_lines(index),
        "leaks": find_leaks(index, split),
        "split_protocol": split.protocol,
    }
    run.write_json("data.json", facts)


def _check(
    config: DataConfig,
    source: str | Path,
    manifest: str | None = None,
    grey_range: GreyRange | None = None,
    labelled: bool = True,
) -> DataIndex:
    return check_data(
        source,
        manifest,
        max_bad_fraction=config.max_bad_fraction,
        accept_wrong_extension=config.accept_wrong_extension,
        index_cache=cache_folder(config.cache),
        grey_range=grey_range or config.grey_range,
        labelled=labelled,
    )


def _synthetic_slices(run: Run) -> Path:
    """Folder of synthetic slices of this size, number and seed; written once next to the run
    folder.
    """
    size = run.config.model.image_size
    count, seed = run.config.data.synthetic_images, run.config.data.synthetic_seed
    shape = f"{size[0]}x{size[1]}"
    folder = run.out.absolute().parent / f"synthetic-ct-{count}-{shape}-seed{seed}"
    if not (folder / "manifest.csv").exists():
        slices = f"{count} synthetic chest-CT-like slices of {shape}"
        with run.console.announce(f"drawing {slices} into {folder}"):
            write_synthetic_dataset(folder, count, size, seed=seed)
    return folder
