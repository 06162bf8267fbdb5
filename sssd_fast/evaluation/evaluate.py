"""Files of an evaluation in eval/SPLIT/: metrics.json, predictions.csv and pictures.

Shapes: N images, K classes.
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

from sssd_fast.errors import DataError
from sssd_fast.evaluation.metrics import (
    LEVEL,
    RATES,
    Floats,
    Ints,
    aggregate_by_patient,
    bootstrap_intervals,
    check_scores,
    classification_metrics,
    predict_classes,
)
from sssd_fast.evaluation.pictures import confusion_picture, roc_picture, thumbnail
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text

MAX_MISTAKES = 12


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
    worst mistakes. Raises DataError for a split without images and unusable scores.
    """
    labels_N, scores_N, _ = check_scores(labels, probabilities)
    if len(labels_N) == 0:
        raise DataError(f"evaluation: split {split!r} has no images; check the split file")
    names = list(classes)
    binary = positive is not None
    if positive is not None:
        names = [classes[1 - positive], classes[positive]]
        labels_N, scores_N = (labels_N == positive).astype(np.int64), scores_N[:, positive]
    predicted_N = predict_classes(scores_N, threshold)

    def level(labels_N: Ints, scores_N: Floats, groups: list[Any] | None) -> dict[str, Any]:
        metrics = classification_metrics(labels_N, scores_N, threshold)
        intervals = bootstrap_intervals(labels_N, scores_N, resamples, seed, groups, threshold)
        return {**metrics, "intervals": intervals}

    patients = list(patients or [None] * len(paths))
    grouped = any(patients)
    # an image without a patient is a group of one
    groups = [patient or row for row, patient in enumerate(patients)] if grouped else None
    image, patient_level = level(labels_N, scores_N, groups), None
    notes: list[str] = []
    if grouped:
        patient_labels, patient_scores, mixed = aggregate_by_patient(labels_N, scores_N, patients)
        patient_level = level(patient_labels, patient_scores, None)
        if mixed:
            rule = "counted as positive" if binary else "given their most frequent label"
            notes.append(f"{mixed} patients have images of more than one class; they are {rule}.")
        if without := len(patients) - sum(map(bool, patients)):
            notes.append(f"{without} images name no patient; the per-patient results exclude them.")
    if image["auc"] is None:
        notes.append(f"No ROC curve: {image['undefined']['auc']}.")

    out = folder / "eval" / split
    for stale in [out / "roc.png", *out.glob("mistakes/*.png")]:
        stale.unlink(missing_ok=True)
    mistakes = []
    for place, row in enumerate(_worst(labels_N, scores_N, predicted_N, threshold)):
        picture = f"eval/{split}/mistakes/{place:02d}.png"
        mistake = {
            "path": paths[row].encode("utf-8", "replace").decode(),
            "label": names[labels_N[row]],
            "prediction": names[predicted_N[row]],
            "score": float(scores_N[row] if binary else scores_N[row, predicted_N[row]]),
            "thumbnail": picture,
        }
        try:
            thumbnail(load_image(paths[row]), path=folder / picture)
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

    confusion_picture(image["confusion"], names, path=out / "confusion.png")
    if image["auc"] is not None:
        _draw_roc(labels_N, scores_N, names, image, out / "roc.png")
    result = {
        "split": split,
        "classes": names,
        "positive_class": names[1] if binary else None,
        "threshold": threshold if binary else None,
        "bootstrap": {
            "level": LEVEL,
            "resamples": resamples,
            "seed": seed,
            "stratified": False,
            "unit": "patient" if grouped else "image",
        },
        "image": image,
        "patient": patient_level,
        "notes": notes,
        "mistakes": mistakes,
        "num_mistakes": int((predicted_N != labels_N).sum()),
    }
    atomic_write_text(out / "metrics.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(rate, per image, per patient), such as ("Accuracy", "81.8 % (75.0 to 87.8)", "")."""
    rows = []
    for rate, name in RATES.items():
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


def _worst(labels_N: Ints, scores_N: Floats, predicted_N: Ints, threshold: float) -> list[int]:
    """Rows of the wrong predictions, most confident first."""
    wrong = np.flatnonzero(predicted_N != labels_N)
    if scores_N.ndim == 1:
        margin = np.abs(scores_N - threshold)[wrong]
    else:
        margin = scores_N[wrong, predicted_N[wrong]] - scores_N[wrong, labels_N[wrong]]
    return [int(row) for row in wrong[np.argsort(-margin, kind="stable")][:MAX_MISTAKES]]


def _draw_roc(
    labels_N: Ints, scores_N: Floats, names: Sequence[str], image: Mapping[str, Any], path: Path
) -> None:
    """One curve with the threshold in use, or one per class against the rest."""
    if scores_N.ndim == 1:
        low, high = image["intervals"]["auc"]["low"], image["intervals"]["auc"]["high"]
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        mark = (1 - image["specificity"], image["sensitivity"], image["threshold"])
        label = f"AUC {image['auc']:.3f}{interval}"
        roc_picture({label: (labels_N, scores_N)}, operating_point=mark, path=path)
        return
    curves = {}
    for k, name in enumerate(names):
        curve = ((labels_N == k).astype(np.int64), scores_N[:, k])
        area = classification_metrics(*curve)["auc"]
        curves[f"{name} against the rest, AUC {area:.3f}"] = curve
    roc_picture(curves, path=path)
