"""Use a trained classifier: evaluate it on a split of its run's data, or score any images.

An evaluation is written to eval/SPLIT/: metrics.json, predictions.csv and pictures. Shapes: N
images, K classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from sssd_fast.config import Config, from_dict
from sssd_fast.data.images import decode_image, to_channels
from sssd_fast.data.index import DataIndex
from sssd_fast.data.split import split_csv
from sssd_fast.errors import CheckpointError, DataError
from sssd_fast.evaluation import metrics, pictures
from sssd_fast.evaluation.metrics import Floats, Ints
from sssd_fast.loaders import Loader
from sssd_fast.loaders.crops import evaluation_crop
from sssd_fast.loaders.prepare import make_loader, positive_label
from sssd_fast.model import Classifier
from sssd_fast.run.checkpoint import find_checkpoint, load_checkpoint
from sssd_fast.run.device import World, autocast, pick_precision
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.run.folder import Run

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MAX_MISTAKES = 12


@dataclass
class Trained:
    """A classifier loaded from a checkpoint."""

    model: Classifier
    config: Config
    classes: list[str]
    path: Path


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """Raises CheckpointError if the checkpoint is damaged or does not hold a classifier."""
    path = find_checkpoint(path)
    state = load_checkpoint(path)
    if state.get("task") not in ("finetune", "probe"):
        raise CheckpointError(
            f"{path} is a checkpoint of `{state.get('task')}`, needs one of `finetune` or `probe`; "
            f"make one with: sssd-fast finetune --init {path.parent.parent}"
        )
    config, classes = from_dict(state["config"]), list(state["classes"])
    model = Classifier(config.model, len(classes), state["pool"])
    model.load_state_dict(state["model"])
    return Trained(model.to(device).eval(), config, classes, path)


def evaluate_run(run: Run, split: str = "test") -> dict[str, Any]:
    """Evaluate the best checkpoint on a split; writes eval/SPLIT/ and prints a table."""
    trained, config = load_trained(run.out, run.world.device), run.config
    index = DataIndex.load(run.out / "index.json")
    ids = split_csv(index, run.out / "split.csv").ids(split)
    if not ids:
        raise DataError(
            f"the data of {run.out} have no {split} images; choose a --split that data.json lists"
        )
    loader = make_loader(run, index, ids, batch_size=config.evaluate.batch_size, shard=True)
    context = autocast(run.precision, run.world.device)
    classes = trained.classes
    labels, scores = predict(trained.model, loader, ids, len(classes), run.world, context)
    if not run.world.main:
        return {}
    records = [index.records[i] for i in ids]
    result = write_evaluation(
        run.out,
        labels=labels,
        probabilities=scores,
        paths=[r.path for r in records],
        classes=classes,
        split=split,
        load_image=lambda path: decode_image(index.root / path),
        patients=[r.patient for r in records],
        positive=positive_label(config, index) if len(classes) == 2 else None,
        threshold=config.evaluate.threshold,
        seed=config.seed,
        resamples=config.evaluate.bootstrap,
    )
    shown = ids[:8]
    first = make_loader(run, index, shown, batch_size=len(shown), shard=False)
    images, encoder = next(iter(first.epoch(0))).images, trained.model.encoder
    pictures.attention_picture(
        images,
        encoder.attention_maps(images),
        encoder.grid,
        encoder.num_prefix,
        names=[r.path for r in records[: len(shown)]],
        path=run.out / "images" / f"attention-{split}.png",
    )
    columns = 2 if result["patient"] is None else 3
    header = ["", "per image (95 % interval)", "per patient (95 % interval)"][:columns]
    title = f"{len(ids)} {split} images, {trained.path.name}"
    run.console.table(title, header, [row[:columns] for row in result_rows(result)])
    for note in result["notes"]:
        run.console.info(note)
    return result


def write_evaluation(
    folder: Path,
    *,
    labels: ArrayLike,
    probabilities: ArrayLike,
    paths: Sequence[str],
    classes: Sequence[str],
    split: str,
    load_image: Callable[[str], NDArray[np.uint8]],
    patients: Sequence[str | None] | None = None,
    positive: int | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Write the files of eval/SPLIT/ in the run folder; returns the content of metrics.json.

    `labels` [N] class indices, `probabilities` [N, K], `positive` the index of the positive class
    of two (else None), `load_image` reads a path as [H, W] or [H, W, 3] uint8 for thumbnails of the
    worst mistakes. Raises DataError for scores that are not finite.
    """
    labels_N, scores_N = metrics.check_scores(labels, probabilities)
    names, out = list(classes), folder / "eval" / split
    binary = positive is not None
    if positive is not None:
        names = [classes[1 - positive], classes[positive]]
        labels_N, scores_N = (labels_N == positive).astype(np.int64), scores_N[:, positive]
    predicted_N = metrics.predict_classes(scores_N, threshold)

    def level(labels_N: Ints, scores_N: Floats, groups: list[Any] | None) -> dict[str, Any]:
        drawn = (resamples, seed, groups, threshold)
        intervals = metrics.bootstrap_intervals(labels_N, scores_N, *drawn)
        rates = metrics.classification_metrics(labels_N, scores_N, threshold)
        return {**rates, "intervals": intervals}

    patients = list(patients or [None] * len(paths))
    grouped = any(patients)
    # an image without a patient is a group of one
    groups = [patient or row for row, patient in enumerate(patients)] if grouped else None
    image, patient_level = level(labels_N, scores_N, groups), None
    notes: list[str] = []
    if grouped:
        patient_labels, patient_scores, mixed = metrics.aggregate_by_patient(
            labels_N, scores_N, patients
        )
        patient_level = level(patient_labels, patient_scores, None)
        if mixed:
            rule = "counted as positive" if binary else "given their most frequent label"
            notes.append(f"{mixed} patients have images of more than one class; they are {rule}.")
        if without := len(patients) - sum(map(bool, patients)):
            notes.append(f"{without} images name no patient; the per-patient results exclude them.")

    for stale in [out / "roc.png", *out.glob("mistakes/*.png")]:
        stale.unlink(missing_ok=True)
    pictures.confusion_picture(image["confusion"], names, path=out / "confusion.png")
    if image["auc"] is None:
        notes.append(f"No ROC curve: {image['undefined']['auc']}.")
    elif binary:
        mark = (1 - image["specificity"], image["sensitivity"], threshold)
        pictures.roc_picture({names[1]: (labels_N, scores_N)}, mark=mark, path=out / "roc.png")
    else:
        each = {name: (labels_N == k, scores_N[:, k]) for k, name in enumerate(names)}
        pictures.roc_picture(each, path=out / "roc.png")

    confidence_N = np.abs(scores_N - threshold) if binary else scores_N.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    worst = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:MAX_MISTAKES]
    mistakes = []
    for place, row in enumerate(worst.tolist()):
        picture = f"eval/{split}/mistakes/{place:02d}.png"
        mistake = {
            "path": paths[row].encode("utf-8", "replace").decode(),
            "label": names[labels_N[row]],
            "prediction": names[predicted_N[row]],
            "score": float(scores_N[row].max()),
            "thumbnail": picture,
        }
        try:
            pictures.thumbnail(load_image(paths[row]), path=folder / picture)
        except (OSError, ValueError, DataError) as error:
            # an image that was deleted meanwhile must not cost the evaluation
            mistake |= {"thumbnail": None, "thumbnail_error": str(error)}
        mistakes.append(mistake)

    table = io.StringIO(newline="")
    # text is quoted (file names hold commas, quotes and line breaks); floats keep all digits
    writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    header = ["path", "label", "score", "prediction", "patient", "split"]
    writer.writerow(header + ([] if binary else [f"score_{name}" for name in names]))
    for row, path in enumerate(paths):
        label, prediction = names[labels_N[row]], names[predicted_N[row]]
        cells = [path, label, float(scores_N[row].max()), prediction, patients[row] or "", split]
        writer.writerow(cells + ([] if binary else scores_N[row].tolist()))
    content = table.getvalue().encode("utf-8", "surrogateescape")
    atomic_write_bytes(out / "predictions.csv", content)

    unit = "patient" if grouped else "image"
    result = {
        "split": split,
        "classes": names,
        "positive_class": names[1] if binary else None,
        "threshold": threshold if binary else None,
        "bootstrap": {"level": metrics.LEVEL, "resamples": resamples, "seed": seed, "unit": unit},
        "image": image,
        "patient": patient_level,
        "notes": notes,
        "mistakes": mistakes,
        "num_mistakes": len(wrong),
    }
    atomic_write_text(out / "metrics.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(rate, per image, per patient), such as ("Accuracy", "81.8 % (75.0 to 87.8)", "")."""
    rows = []
    for rate, name in metrics.RATES.items():
        macro = "" if result.get("positive_class") or rate == "accuracy" else ", macro"
        cells = [_cell(result.get(level), rate) for level in ("image", "patient")]
        rows.append((name + macro, cells[0], cells[1]))
    return rows


def _cell(level: Mapping[str, Any] | None, rate: str) -> str:
    if level is None:
        return ""
    if level[rate] is None:
        return f"undefined: {level['undefined'][rate]}"
    low, high = level["intervals"][rate]["low"], level["intervals"][rate]["high"]
    interval = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * level[rate]:.1f} %{interval}"


def predict_files(
    trained: Trained, inputs: Sequence[Path | NDArray[np.uint8]], *, batch_size: int, precision: str
) -> tuple[NDArray[np.float64], dict[int, str]]:
    """[N, classes] scores of files or [H, W] or [H, W, 3] arrays.

    Rows of files that cannot be read are NaN and listed with the reason.
    """
    config, device = trained.config, next(trained.model.parameters()).device
    context = autocast(pick_precision(precision, device), device)
    scores = np.full((len(inputs), len(trained.classes)), np.nan)
    bad: dict[int, str] = {}
    for start in range(0, len(inputs), batch_size):
        images: dict[int, Tensor] = {}
        for row, image in enumerate(inputs[start : start + batch_size], start):
            try:
                image = decode_image(image) if isinstance(image, Path) else image
                picture = to_channels(image, config.model.in_channels)
            except (DataError, OSError) as error:
                bad[row] = str(error)
                continue
            view = evaluation_crop(picture, config.model.image_size, config.data.fit)
            # a copy, since decoded images may be read-only; [H, W] or [H, W, C] -> [C, H, W]
            images[row] = torch.tensor(np.atleast_3d(view)).permute(2, 0, 1).contiguous()
        if images:
            with torch.no_grad(), context:
                logits = trained.model(torch.stack(list(images.values())).to(device))
            scores[list(images)] = logits.double().softmax(1).cpu().numpy()
    return scores, bad


def find_images(targets: Sequence[str]) -> list[Path]:
    """Image files, and those in folders, sorted. Raises DataError if there are none."""
    found: list[Path] = []
    for target in map(Path, targets):
        if not target.exists():
            raise DataError(f"{target} does not exist; give image files or folders")
        inside = sorted(p for p in target.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        found += [p for p in inside if p.is_file()] if target.is_dir() else [target]
    if not found:
        raise DataError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {', '.join(targets)}")
    return found


def write_predictions(
    out: Path, classes: Sequence[str], paths: Sequence[Path], scores: NDArray[np.float64]
) -> None:
    """CSV path,prediction,score_CLASS...; empty cells where a file could not be read."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "prediction", *(f"score_{name}" for name in classes)])
    for path, row in zip(paths, scores, strict=True):
        known = bool(np.isfinite(row).all())
        cells = [f"{value:.9g}" for value in row] if known else [""] * len(row)
        writer.writerow([str(path), classes[int(row.argmax())] if known else "", *cells])
    atomic_write_text(out, text.getvalue())


def predict(
    model: nn.Module,
    loader: Loader,
    ids: Sequence[int],
    num_classes: int,
    world: World,
    autocast: torch.autocast,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels [N] and softmax scores [N, classes] of the images `ids`, from all processes."""
    training = model.training
    model.eval()
    labels_N, logits_NC = outputs(model, loader, ids, num_classes, world, autocast)
    model.train(training)
    if not torch.isfinite(logits_NC).all():
        raise DataError(
            "the model's scores are not finite; the checkpoint is unusable, or fp16 overflows "
            "(try precision=fp32)"
        )
    return labels_N.numpy(), logits_NC.softmax(1).numpy()


@torch.no_grad()
def outputs(
    function: Callable[[Tensor], Tensor],
    loader: Loader,
    ids: Sequence[int],
    width: int,
    world: World,
    autocast: torch.autocast,
) -> tuple[Tensor, Tensor]:
    """Labels [N] and fp64 values [N, width] of `function` for the images `ids`, on the CPU."""
    row_of = {image: row for row, image in enumerate(ids)}
    values_NX = torch.zeros(len(ids), width, device=world.device)
    labels_N = torch.zeros(len(ids), device=world.device, dtype=torch.int64)
    for batch in loader.epoch(0):
        keep = batch.valid
        found = [row_of[i] for i in batch.indices[keep].tolist()]
        rows = torch.tensor(found, dtype=torch.int64, device=world.device)
        with autocast:
            values = function(batch.images)
        values_NX[rows] = values[keep].float()
        labels_N[rows] = batch.labels[keep]
    # every image belongs to one process, the other rows are 0
    world.sum_(values_NX)
    world.sum_(labels_N)
    return labels_N.cpu(), values_NX.double().cpu()
