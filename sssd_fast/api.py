"""Python API; `import sssd_fast as sf` loads it on first use. Each function is a command too.

    import sssd_fast as sf

    sf.pretrain("ct/", out="runs/pre", config="8gb", settings={"pretrain.epochs": 400})
    result = sf.finetune("ct/", init="runs/pre", out="runs/fine")
    print(result.metrics["image"]["auc"])
    scores = sf.predict("runs/fine", ["a.png", "b.png"]).scores
    features = sf.load_encoder("runs/pre")(images)  # uint8, or floats from 0 to 1

Settings are checked before torch is imported: a mistake is reported at once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from sssd_fast.config import Config, changed, from_dict, load_config, to_dict
from sssd_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from sssd_fast.evaluation.volumes import VolumeScores
    from sssd_fast.objective import SSSD
    from sssd_fast.run.folder import Run
    from sssd_fast.weights.encoder import FeatureExtractor

PathLike = str | Path
Settings = Sequence[str] | Mapping[str, Any]
Split = Literal["train", "val", "test"]
InitNorm = Literal["model", "imagenet", "half"]


@dataclass(frozen=True)
class Result:
    """Folder of a command, and the content of its metrics.json."""

    out: Path
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictions:
    """Scores of N images, in the order given."""

    classes: list[str]
    scores: NDArray[np.float64]  # [N, classes] softmax; NaN for files that cannot be read
    failed: dict[int, str]  # row -> reason
    checkpoint: Path

    @property
    def labels(self) -> list[str | None]:
        """The class with the highest score of each image; None for files that cannot be read."""
        best = [self.classes[i] for i in self.scores.argmax(1)] if len(self.scores) else []
        return [None if row in self.failed else label for row, label in enumerate(best)]


@dataclass(frozen=True)
class VolumePredictions:
    """Scores of volumes, and the files that were not used."""

    classes: list[str]
    volumes: list[VolumeScores]
    failed: dict[Path, str]  # file -> reason
    checkpoint: Path


class Start(TypedDict, total=False):
    """Keyword arguments of every function that trains."""

    # shipped configuration, YAML file, or "auto" = by the number of images and the device (default
    # of `run`); default: that of `init`, if a run
    config: PathLike | None
    settings: Settings | None  # ["key=value", ...] or {"key": value}, with dotted keys
    out: PathLike | None  # run folder to make; default runs/COMMAND
    resume: PathLike | None  # run folder to continue, with its configuration
    overwrite: bool  # replace an existing run in `out`
    dry_run: bool  # train two steps in a temporary folder, then delete it
    command: str  # text for command.txt


def pretrain(
    data: PathLike | None = None,
    *,
    init: PathLike | None = None,
    init_norm: InitNorm = "model",
    objective: type[SSSD] | None = None,
    **start: Unpack[Start],
) -> Result:
    """Pre-trains SSSD without labels.

    Args (of all functions that train, with those in `Start`):
        data: folder of images, instead of data.source.
        init: a run, a checkpoint, or other weights (MAE, timm, Hugging Face) to start from.
        init_norm: pixel mean and std of the weights in `init`; a difference to this model's is
            folded into the patch projection, exactly.
        objective: subclass of `sssd_fast.objective.SSSD`, as in examples/custom_loss.py.

    Raises:
        SssdError: bad settings, data or files; NumericsError: the loss is not finite.
    """
    with _opened("pretrain", start, data, init) as run:
        from sssd_fast.objective import SSSD
        from sssd_fast.pretrain import pretrain as train

        train(run, str(init) if init else None, _norm(init_norm), objective or SSSD)
        return _finish(run, start)


def finetune(
    data: PathLike | None = None,
    *,
    init: PathLike | None = None,
    init_norm: InitNorm = "model",
    split: Split = "test",
    **start: Unpack[Start],
) -> Result:
    """Fine-tunes a classifier and evaluates it on `split`; arguments as in `pretrain`."""
    with _opened("finetune", start, data, init) as run:
        from sssd_fast.evaluation.evaluate import evaluate_run
        from sssd_fast.finetune import finetune as train

        train(run, str(init) if init else None, _norm(init_norm))
        return _finish(run, start, evaluate_run(run, split))


def probe(
    data: PathLike | None = None,
    *,
    init: PathLike,
    init_norm: InitNorm = "model",
    split: Split = "test",
    **start: Unpack[Start],
) -> Result:
    """Fits logistic regression on the frozen encoder in `init` and evaluates it on `split`."""
    if start.get("resume"):
        raise ConfigError("a probe cannot be resumed; start it again with out and overwrite")
    with _opened("probe", start, data, init) as run:
        from sssd_fast.evaluation.evaluate import evaluate_run
        from sssd_fast.probe import probe as train

        train(run, str(init), _norm(init_norm))
        return _finish(run, start, evaluate_run(run, split))


def run(
    data: PathLike | None = None,
    *,
    seeds: Sequence[int] = (),
    folds: bool = False,
    from_scratch: bool = False,
    minutes: float | None = None,
    **start: Unpack[Start],
) -> Result:
    """Pre-trains, fine-tunes, evaluates and writes a report; once, or for several seeds or folds.

    The metrics of several seeds or folds are mean and deviation (summary.json).

    Args:
        seeds: repeat with these seeds for training and split.
        folds: repeat for every fold of data.folds.
        from_scratch: skip pre-training: the supervised control.
        minutes: choose the epochs of both stages so that each model takes about so long here.
    """
    if seeds and folds:
        raise ConfigError("seeds and folds exclude each other; give one of them")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes is {minutes:g}, needs a positive number")
    config, resume = _config(start, data, default="auto"), start.get("resume")
    with _folder(Path(resume or start.get("out") or "runs/run"), start) as out:
        from sssd_fast.pipeline import run_all

        metrics = run_all(
            _limited(config, start),
            out,
            resume=resume is not None,
            overwrite=start.get("overwrite", False),
            seeds=seeds,
            folds=folds,
            pretraining=not from_scratch,
            minutes=minutes,
            command=start.get("command", "sssd_fast.run"),
        )
        return Result(out, metrics)


def evaluate(
    run: PathLike,
    *,
    split: Split = "test",
    settings: Settings | None = None,
    command: str = "sssd_fast.evaluate",
) -> Result:
    """Evaluates the best checkpoint of a fine-tuned run; writes RUN/eval/SPLIT/."""
    start: Start = {"settings": settings, "command": command}
    stage = Path(run, "finetune")  # of a folder of `run`
    existing = stage if (stage / "config.yaml").is_file() else Path(run)
    with _opened("evaluate", start, existing=existing) as opened:
        from sssd_fast.evaluation.evaluate import evaluate_run

        return _finish(opened, start, evaluate_run(opened, split))


def predict(
    model: PathLike,
    images: PathLike | NDArray[np.uint8] | Sequence[PathLike | NDArray[np.uint8]],
    *,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    batch_size: int = 64,
) -> Predictions:
    """Scores images with a fine-tuned model.

    Args:
        model: run folder or checkpoint of `finetune` or `probe`.
        images: one image or several: files (folders only on the command line), or uint8
            arrays [H, W] (grey) or [H, W, 3] (RGB) of any size; [N, H, W] counts as N images.
    """
    import numpy as np

    from sssd_fast.evaluation.predict import load_trained, predict_files
    from sssd_fast.run.device import pick_device

    many = [images] if isinstance(images, str | Path) else list(images)
    if isinstance(images, np.ndarray) and images.ndim == 2:
        many = [images]
    inputs = [image if isinstance(image, np.ndarray) else Path(image) for image in many]
    for row, image in enumerate(inputs):
        if isinstance(image, np.ndarray):
            rgb = image.ndim == 3 and image.shape[2] == 3
            if image.dtype != np.uint8 or not (image.ndim == 2 or rgb):
                found = f"{image.dtype} {list(image.shape)}"
                raise DataError(f"image {row} is {found}, needs uint8 [H, W] or [H, W, 3]")
    trained = load_trained(model, pick_device(device))
    scores, bad = predict_files(trained, inputs, batch_size=batch_size, precision=precision)
    return Predictions(trained.classes, scores, bad, trained.path)


def predict_volumes(
    model: PathLike,
    volumes: PathLike | Sequence[PathLike],
    *,
    window: str = "lung",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    batch_size: int = 64,
) -> VolumePredictions:
    """Scores the slices of CT volumes, converted in memory by the rules of `data convert`.

    Args:
        model: run folder or checkpoint of `finetune` or `probe`.
        volumes: NIfTI files, DICOM files or folders of them. A DICOM series is one volume.
        window: that of the training images: lung, mediastinum, LEVEL,WIDTH, file or minmax.
    """
    from sssd_fast.evaluation.predict import load_trained
    from sssd_fast.evaluation.volumes import score_volumes, volume_files
    from sssd_fast.run.device import pick_device

    many = [volumes] if isinstance(volumes, str | Path) else list(volumes)
    files = volume_files(many)
    if not files:
        raise DataError(f"no DICOM or NIfTI file in {', '.join(map(str, many))}")
    trained = load_trained(model, pick_device(device))
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    found, failed = score_volumes(trained, files, window, **options)
    return VolumePredictions(trained.classes, found, failed, trained.path)


def load_encoder(path: PathLike, *, device: str = "cpu") -> FeatureExtractor:
    """The encoder of a run or checkpoint: images [B, C, H, W] in, features [B, D] out.

    Mean and std of the run are applied inside.
    """
    from sssd_fast.run.device import pick_device
    from sssd_fast.weights.encoder import load_encoder as load

    return load(path).to(pick_device(device))


def reproduce(
    dataset: str | None = None,
    *,
    data: PathLike | None = None,
    protocols: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    external: PathLike | None = None,
    minutes: float | None = None,
    **start: Unpack[Start],
) -> Result:
    """Runs the paper's experiment on a public CT set; see `sssd-fast reproduce --help`."""
    from sssd_fast.reproduce import reproduce as plans
    from sssd_fast.reproduce.public_sets import PUBLIC_SETS

    words, resume = _words(start.get("settings")), start.get("resume")
    plans.check_overrides(words)
    out = Path(resume or start.get("out") or f"runs/{dataset}")
    lists: dict[str, Sequence[Any]] = {"protocols": protocols, "methods": methods, "seeds": seeds}
    for name, known in (("protocols", plans.PROTOCOLS), ("methods", plans.METHODS)):
        if not set(lists[name]) <= set(known):
            chosen = ", ".join(lists[name])
            raise ConfigError(f"{name} is {chosen}, needs some of {', '.join(known)}")
    fields: dict[str, Any]
    if resume is not None:
        fields = dict(vars(plans.load_plan(out)))
        if dataset not in (None, fields["dataset"]) or start.get("config") is not None:
            what = f"--resume {resume} continues {fields['dataset']} with its settings"
            raise ConfigError(f"{what}; omit the name and --config, or use another --out")
        config = changed(from_dict(fields["config"]), words, _log)
        # added to those of the earlier commands
        lists = {name: (*fields[name], *values) for name, values in lists.items()}
    else:
        if dataset not in PUBLIC_SETS or data is None:
            names = ", ".join(PUBLIC_SETS)
            raise ConfigError(f"reproduce needs a name ({names}) and its folder: --data DIR")
        config = load_config(start.get("config") or _paper_config(dataset, words), words, _log)
        fields = {"dataset": dataset, "methods": plans.METHODS if external else plans.METHODS[:3]}
    given = {"data": data, "external": external}
    fields |= {name: str(value) for name, value in given.items() if value is not None}
    lists["commands"] = [*fields.get("commands", ()), start.get("command", "sssd_fast.reproduce")]
    fields |= {name: tuple(dict.fromkeys(values)) for name, values in lists.items() if values}
    with _folder(out, start) as place:
        dry = start.get("dry_run", False)
        if dry:
            fields["seeds"] = fields.get("seeds", plans.SEEDS)[:1]
        fields["config"] = to_dict(_limited(config, start))
        again = resume is not None and not dry
        plan = plans.Plan(**fields)
        return Result(place, plans.reproduce(plan, place, resume=again, minutes=minutes))


def _paper_config(dataset: str, words: Sequence[str]) -> str:
    """The recipe for a GPU, or that for CPU cores."""
    from sssd_fast.reproduce.public_sets import PUBLIC_SETS
    from sssd_fast.run.device import pick_device

    device = pick_device(load_config(None, words).device)
    return PUBLIC_SETS[dataset].config + ("_cpu" if device.type == "cpu" else "")


STAGES = {"pretrain": ("pretrain",), "finetune": ("finetune",), "run": ("pretrain", "finetune")}


def start_processes(name: str, start: Mapping[str, Any], words: Sequence[str]) -> int | None:
    """Runs the command `sssd-fast WORDS` in several processes where that is faster.

    Returns its exit code; None if it shall run in this process. The functions of this module use
    one process with all threads.
    """
    if name not in STAGES or start.get("dry_run") or "WORLD_SIZE" in os.environ:
        return None
    given: Any = start
    default = "auto" if name == "run" else None
    quiet: Any = {"default": default, "log": lambda line: None}
    config = _config(given, start.get("data"), start.get("init"), **quiet)
    if start.get("resume") and config.processes == "auto":
        return None  # a run of several processes has recorded their number

    from sssd_fast.run.processes import cpu_threads, launch, pick_processes

    count, why = pick_processes(config, STAGES[name])
    _log(f"processes: {count}, {why}")
    if count == 1:
        return None
    return launch(words, count, max(1, cpu_threads(config) // count))


def _log(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several processes
        print(line)


def _words(settings: Settings | None, data: PathLike | None = None) -> list[str]:
    """Settings as key=value; values in JSON, which YAML reads."""
    if isinstance(settings, str):
        raise ConfigError(f"settings is the text {settings!r}, needs a list or a dict")
    if isinstance(settings, Mapping):
        pairs = settings.items()
        settings = [f"{key}={json.dumps(value, default=str)}" for key, value in pairs]
    source = [] if data is None else [f"data.source={json.dumps(str(data))}"]
    return [*source, *(settings or ())]


def _config(
    start: Start,
    data: PathLike | None = None,
    *folders: PathLike | None,
    default: str | None = None,
    log: Callable[[str], object] | None = None,
) -> Config:
    """start["config"], else that of the run that is resumed or in `folders`, else `default`, else
    the defaults of all settings.
    """
    source, resume = start.get("config"), start.get("resume")
    if resume is not None and start.get("dry_run"):
        raise ConfigError(
            f"--dry-run tries a new run, --resume continues {resume}; omit one of them"
        )
    if resume is not None and not Path(resume, "config.yaml").is_file():
        raise ConfigError(f"--resume {resume} is not a run folder: config.yaml is missing")
    for folder in (resume, *folders):
        if source is None and folder is not None and Path(folder, "config.yaml").is_file():
            source = Path(folder, "config.yaml")
    source = default if source is None else source
    words, log = _words(start.get("settings"), data), log or _log
    if source != "auto":
        return load_config(source, words, log)
    given = load_config(None, words)

    from sssd_fast.data.index import count_images
    from sssd_fast.performance.schedule import choose_config
    from sssd_fast.run.device import pick_device

    name, why = choose_config(count_images(given.data), pick_device(given.device))
    log(f"config: {name}, because {why}")
    return load_config(name, words, log)


def _limited(config: Config, start: Start) -> Config:
    """`config` with two steps per stage for a dry run."""
    two = ["pretrain.max_steps=2", "finetune.max_steps=2"]
    return changed(config, two) if start.get("dry_run") else config


@contextmanager
def _folder(out: Path, start: Start) -> Iterator[Path]:
    """`out`; for a dry run a temporary folder next to it, which is deleted at the end."""
    if not start.get("dry_run"):
        yield out
        return
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".dry-run-", dir=out.absolute().parent))
    try:
        yield place / "run"
        _log(f"dry run: all stages worked for two steps; their files are deleted, not {out}")
    finally:
        shutil.rmtree(place)


@contextmanager
def _opened(
    task: str,
    start: Start,
    data: PathLike | None = None,
    init: PathLike | None = None,
    existing: Path | None = None,
) -> Iterator[Run]:
    """The open run folder of a command, on its device."""
    config, resume = _config(start, data, existing, init), start.get("resume")

    from sssd_fast.performance.batch_size import resolve_batch
    from sssd_fast.run.device import world
    from sssd_fast.run.folder import open_run

    out = Path(existing or resume or start.get("out") or f"runs/{task}")
    with _folder(out, start) as place, world(config.device) as here:
        config = _limited(config, start)
        if task in ("pretrain", "finetune") and resume is None:
            config = resolve_batch(config, task, here, log=_log)
        with open_run(
            task,
            config,
            place,
            here,
            resume=resume is not None,
            overwrite=start.get("overwrite", False),
            existing=existing is not None,
            command=start.get("command", f"sssd_fast.{task}"),
        ) as run:
            yield run


def _finish(run: Run, start: Start, metrics: dict[str, Any] | None = None) -> Result:
    """Writes the report."""
    from sssd_fast.report.report import write_report

    run.tracker.close()  # the report reads what it wrote
    if run.world.main:
        path = write_report(run.out)[1]
        if not start.get("dry_run"):
            run.console.info(f"report: {path}")
    return Result(run.out, metrics or {})


def _norm(init_norm: InitNorm) -> Any:
    """(mean, std) of the weights to start from; None = the model's."""
    from sssd_fast.weights.load import IMAGENET

    half = (0.5, 0.5, 0.5)
    known = {"model": None, "imagenet": IMAGENET, "half": (half, half)}
    if init_norm not in known:
        raise ConfigError(f"init_norm is {init_norm!r}, needs one of {', '.join(known)}")
    return known[init_norm]
