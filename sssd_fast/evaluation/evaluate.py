"""Write what an evaluation leaves in a run folder: eval/metrics.json, predictions.csv, roc.png, confusion.png,
mistakes/*.png.

The rates themselves are in metrics.py and importable from here. Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd_fast.data.labels import positive_class
from sssd_fast.errors import DataError
from sssd_fast.evaluation.metrics import (
    LEVEL,
    RATES,
    Floats,
    Interval,
    Ints,
    Metrics,
    PatientScores,
    aggregate_by_patient,
    aggregate_runs,
    binary_metrics,
    bootstrap_intervals,
    checked,
    multiclass_metrics,
    predict,
    roc_points,
)

__all__ = [
    "Interval",
    "Metrics",
    "PatientScores",
    "aggregate_by_patient",
    "aggregate_runs",
    "binary_metrics",
    "bootstrap_intervals",
    "multiclass_metrics",
    "positive_class",
    "result_rows",
    "write_evaluation",
]

RATE_NAMES = {
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity (recall)",
    "specificity": "Specificity",
    "precision": "Precision",
    "f1": "F1",
    "auc": "AUC",
}
MAX_MISTAKES = 12


def write_evaluation(
    folder: str | Path,
    *,
    labels: ArrayLike,
    probabilities: ArrayLike,
    paths: Sequence[str],
    classes: Sequence[str],
    split: str,
    patients: Sequence[str | None] | None = None,
    positive: int | str | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    resamples: int = 2000,
    load_image: Callable[[str], NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:
    """Write eval/metrics.json, predictions.csv, roc.png, confusion.png and mistakes/*.png under the run folder;
    returns the JSON.

    `labels` [N] class indices, `probabilities` [N, K], `positive` the index or name of the positive class (default
    `positive_class`), `load_image` gives the picture of a path ([H, W] or [H, W, 3] uint8) for thumbnails of the worst
    mistakes. Every file is written atomically; a split of one class gets a note instead of a ROC picture. Raises
    DataError for no images or arrays that do not fit each other.
    """
    from sssd_fast.run.files import atomic_write_bytes, atomic_write_text

    labels_N, probabilities_NK, num_classes = checked(labels, probabilities, binary=False)
    if len(labels_N) == 0:
        raise DataError(f"evaluation: split {split!r} has no images; check the split file")
    if num_classes != len(classes):
        raise DataError(
            f"evaluation: {num_classes} score columns for {len(classes)} classes {list(classes)}"
        )
    if len(paths) != len(labels_N) or (patients is not None and len(patients) != len(labels_N)):
        given = "" if patients is None else f" and {len(patients)} patients"
        raise DataError(
            f"evaluation: {len(paths)} paths{given} for {len(labels_N)} labels; give one of each per image"
        )

    binary = num_classes == 2
    names = list(classes)
    scores_N: Floats = probabilities_NK
    targets_N = labels_N
    if binary:
        positive = positive_class(classes) if positive is None else positive
        if positive not in (0, 1, *classes):
            raise DataError(
                f"evaluation: positive class {positive!r} is not one of {list(classes)}; give its name or 0 or 1"
            )
        positive = classes.index(positive) if isinstance(positive, str) else positive
        names = [classes[1 - positive], classes[positive]]
        scores_N = probabilities_NK[:, positive]
        targets_N = (labels_N == positive).astype(np.int64)
    predicted_N = predict(scores_N, threshold)

    notes: list[str] = []
    known = patients is not None and any(patients)
    groups = (
        [patient or row for row, patient in enumerate(patients)]
        if known and patients is not None
        else None
    )
    image = _level(targets_N, scores_N, threshold, binary, resamples, seed, groups)
    patient_level = None
    if known and patients is not None:
        by_patient = aggregate_by_patient(targets_N, scores_N, patients)
        patient_level = _level(
            by_patient.labels, by_patient.scores, threshold, binary, resamples, seed, None
        )
        if by_patient.mixed:
            rule = "counted as positive" if binary else "given their most frequent label"
            notes.append(
                f"{by_patient.mixed} patients have images of more than one class; they are {rule}."
            )
        if by_patient.without_patient:
            notes.append(
                f"{by_patient.without_patient} images name no patient; they are left out of the per-patient results."
            )
    if image["auc"] is None:
        notes.append(f"No ROC curve: {image['undefined']['auc']}.")

    out = Path(folder) / "eval"
    (out / "mistakes").mkdir(parents=True, exist_ok=True)
    for stale in [out / "roc.png", *(out / "mistakes").glob("*.png")]:
        stale.unlink(missing_ok=True)
    result: dict[str, Any] = {
        "split": split,
        "classes": names,
        "positive_class": names[1] if binary else None,
        "threshold": threshold if binary else None,
        "bootstrap": {
            "level": LEVEL,
            "resamples": resamples,
            "seed": seed,
            "stratified": False,
            "unit": "patient" if known else "image",
        },
        "image": image,
        "patient": patient_level,
        "notes": notes,
        "mistakes": _mistakes(
            out, targets_N, scores_N, predicted_N, paths, names, threshold, load_image
        ),
        "num_mistakes": int((predicted_N != targets_N).sum()),
    }
    table = _predictions_csv(targets_N, scores_N, predicted_N, paths, names, split, patients)
    atomic_write_bytes(out / "predictions.csv", table.encode("utf-8", "surrogateescape"))
    _pictures(out, targets_N, scores_N, names, image, threshold)
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=True)
    atomic_write_text(out / "metrics.json", text + "\n")
    return result


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (rate, per image, per patient) of a metrics.json for tables, e.g. ("Accuracy", "81.8 % (75.0-87.8)", "")."""
    rows = []
    for rate in RATES:
        macro = "" if result.get("positive_class") or rate == "accuracy" else ", macro"
        cells = [_cell(result.get(level), rate) for level in ("image", "patient")]
        rows.append((RATE_NAMES[rate] + macro, cells[0], cells[1]))
    return rows


def _cell(level: Mapping[str, Any] | None, rate: str) -> str:
    if level is None:
        return ""
    if level[rate] is None:
        return f"undefined: {level['undefined'][rate]}"
    interval = level["intervals"][rate]
    if interval["low"] is None:
        return f"{100 * level[rate]:.1f} %"
    return (
        f"{100 * level[rate]:.1f} % ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"
    )


def _level(
    labels_N: Ints,
    scores_N: Floats,
    threshold: float,
    binary: bool,
    resamples: int,
    seed: int,
    groups: Sequence[Hashable] | None,
) -> dict[str, Any]:
    metrics = (
        binary_metrics(labels_N, scores_N, threshold)
        if binary
        else multiclass_metrics(labels_N, scores_N)
    )
    intervals = bootstrap_intervals(
        labels_N, scores_N, n=resamples, seed=seed, groups=groups, threshold=threshold
    )
    return {
        **metrics.as_dict(),
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
    }


def _predictions_csv(
    labels_N: Ints,
    scores_N: Floats,
    predicted_N: Ints,
    paths: Sequence[str],
    names: Sequence[str],
    split: str,
    patients: Sequence[str | None] | None,
) -> str:
    """Every text is quoted (file names hold commas, quotes and line breaks); floats keep all their digits."""
    binary = scores_N.ndim == 1
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(
        [
            "path",
            "label",
            "score",
            "prediction",
            "patient",
            "split",
            *([] if binary else [f"score_{name}" for name in names]),
        ]
    )
    for row, path in enumerate(paths):
        score = float(scores_N[row] if binary else scores_N[row].max())
        patient = (patients[row] or "") if patients is not None else ""
        extra = [] if binary else [float(value) for value in scores_N[row]]
        writer.writerow(
            [path, names[labels_N[row]], score, names[predicted_N[row]], patient, split, *extra]
        )
    return buffer.getvalue()


def _mistakes(
    out: Path,
    labels_N: Ints,
    scores_N: Floats,
    predicted_N: Ints,
    paths: Sequence[str],
    names: Sequence[str],
    threshold: float,
    load_image: Callable[[str], NDArray[np.uint8]] | None,
) -> list[dict[str, Any]]:
    """The most confident wrong predictions, most confident first, with a thumbnail file where the picture can be read."""
    from sssd_fast.evaluation.visualize import thumbnail

    wrong = np.flatnonzero(predicted_N != labels_N)
    if scores_N.ndim == 1:
        margin = np.abs(scores_N - threshold)[wrong]
    else:
        margin = scores_N[wrong, predicted_N[wrong]] - scores_N[wrong, labels_N[wrong]]
    mistakes = []
    for place, row in enumerate(wrong[np.argsort(-margin, kind="stable")][:MAX_MISTAKES]):
        mistake: dict[str, Any] = {
            "path": paths[row].encode("utf-8", "replace").decode(),
            "label": names[labels_N[row]],
            "prediction": names[predicted_N[row]],
            "score": float(
                scores_N[row] if scores_N.ndim == 1 else scores_N[row, predicted_N[row]]
            ),
            "thumbnail": None,
        }
        if load_image is not None:
            try:
                picture = load_image(paths[row])
            except (
                OSError,
                ValueError,
                DataError,
            ) as error:  # a picture that vanished must not cost the evaluation
                mistake["thumbnail_error"] = str(error)
            else:
                mistake["thumbnail"] = f"eval/mistakes/{place:02d}.png"
                thumbnail(picture, path=out / "mistakes" / f"{place:02d}.png")
        mistakes.append(mistake)
    return mistakes


def _pictures(
    out: Path,
    labels_N: Ints,
    scores_N: Floats,
    names: Sequence[str],
    image: Mapping[str, Any],
    threshold: float,
) -> None:
    from sssd_fast.evaluation.plots import confusion_picture, roc_picture

    confusion_picture(image["confusion"], names, path=out / "confusion.png")
    if image["auc"] is None:
        return
    low = image["intervals"]["auc"]["low"]
    high = image["intervals"]["auc"]["high"]
    text = f"AUC {image['auc']:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else "")
    if scores_N.ndim == 1:
        point = (1 - image["specificity"], image["sensitivity"])
        roc_picture(
            {text: roc_points(labels_N == 1, scores_N)},
            operating_point=point,
            threshold=threshold,
            path=out / "roc.png",
        )
        return
    lines = {}
    for k, name in enumerate(names):
        area = binary_metrics(labels_N == k, scores_N[:, k]).auc
        lines[f"{name} against the rest, AUC {area:.3f}"] = roc_points(
            labels_N == k, scores_N[:, k]
        )
    roc_picture(lines, path=out / "roc.png")
