"""Evaluate a trained classifier on a split of its run's data, with baselines of the same split.

An evaluation is written to eval/SPLIT/: metrics.json, predictions.csv and pictures. Shapes: N
images, K classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd_fast.data.images import decode_image
from sssd_fast.data.index import DataIndex
from sssd_fast.data.split import split_csv
from sssd_fast.errors import DataError
from sssd_fast.evaluation import metrics, pictures
from sssd_fast.evaluation.metrics import Floats, Ints
from sssd_fast.evaluation.predict import load_trained, predict
from sssd_fast.loaders.prepare import make_loader, positive_label
from sssd_fast.run.device import autocast
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.run.folder import Run

MAX_MISTAKES = 12


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
