"""Files of an evaluation in eval/: metrics.json, predictions.csv and pictures.

Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
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
    folder: str | Path,
    *,
    labels: ArrayLike,
    probabilities: ArrayLike,
    paths: Sequence[str],
    classes: Sequence[str],
    split: str,
    patients: Sequence[str | None] | None = None,
    positive: int | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    resamples: int = 2000,
    load_image: Callable[[str], NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:
    """Write the files of eval/ in the run folder; returns the content of metrics.json.

    `labels` [N] class indices, `probabilities` [N, K], `positive` the index of the positive class
    (default `positive_class`), `load_image` reads a path as [H, W] or [H, W, 3] uint8 for
    thumbnails of the worst mistakes. Every file is written atomically; a split of one class gets a
    note instead of a ROC picture. Raises DataError for a split without images and unusable scores.
    """
    labels_N, scores_N, num_classes = check_scores(labels, probabilities)
    if len(labels_N) == 0:
        raise DataError(f"evaluation: split {split!r} has no images; check the split file")
    names, binary = list(classes), num_classes == 2
    patients = list(patients or [None] * len(paths))
    if binary:
        index = positive_class(classes) if positive is None else positive
        names = [classes[1 - index], classes[index]]
        labels_N, scores_N = (labels_N == index).astype(np.int64), scores_N[:, index]
    predicted_N = predict_classes(scores_N, threshold)

    def level(labels_N: Ints, scores_N: Floats, groups: list[Any] | None) -> dict[str, Any]:
        metrics = classification_metrics(labels_N, scores_N, threshold)
        intervals = bootstrap_intervals(
            labels_N, scores_N, n=resamples, seed=seed, groups=groups, threshold=threshold
        )
        return {**metrics.as_dict(), "intervals": {k: asdict(v) for k, v in intervals.items()}}

    grouped = any(patients)
    # an image without a patient is a group of one
    groups = [patient or row for row, patient in enumerate(patients)] if grouped else None
    image, patient_level = level(labels_N, scores_N, groups), None
    notes: list[str] = []
    if grouped:
        found = aggregate_by_patient(labels_N, scores_N, patients)
        patient_level = level(found.labels, found.scores, None)
        if found.mixed:
            rule = "counted as positive" if binary else "given their most frequent label"
            notes.append(
                f"{found.mixed} patients have images of more than one class; they are {rule}."
            )
        if found.without_patient:
            notes.append(
                f"{found.without_patient} images name no patient; "
                "the per-patient results exclude them."
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
            "unit": "patient" if grouped else "image",
        },
        "image": image,
        "patient": patient_level,
        "notes": notes,
        "mistakes": [],
        "num_mistakes": int((predicted_N != labels_N).sum()),
    }
    for place, row in enumerate(_worst(labels_N, scores_N, predicted_N, threshold)):
        score = scores_N[row] if binary else scores_N[row, predicted_N[row]]
        mistake = {
            "path": paths[row].encode("utf-8", "replace").decode(),
            "label": names[labels_N[row]],
            "prediction": names[predicted_N[row]],
            "score": float(score),
        }
        picture = out / "mistakes" / f"{place:02d}.png"
        result["mistakes"].append(mistake | _thumbnail(load_image, paths[row], picture))

    header = ["path", "label", "score", "prediction", "patient", "split"]
    rows: list[list[Any]] = []
    for row, path in enumerate(paths):
        score = float(scores_N[row].max())
        label, prediction = names[labels_N[row]], names[predicted_N[row]]
        extra = [] if binary else scores_N[row].tolist()
        rows.append([path, label, score, prediction, patients[row] or "", split, *extra])
    table = _csv([header if binary else [*header, *(f"score_{name}" for name in names)], *rows])
    atomic_write_bytes(out / "predictions.csv", table.encode("utf-8", "surrogateescape"))

    confusion_picture(image["confusion"], names, path=out / "confusion.png")
    if image["auc"] is not None:
        _draw_roc(labels_N, scores_N, names, image, path=out / "roc.png")
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=True)
    atomic_write_text(out / "metrics.json", text + "\n")
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


def _thumbnail(
    load_image: Callable[[str], NDArray[np.uint8]] | None, path: str, out: Path
) -> dict[str, str | None]:
    if load_image is None:
        return {"thumbnail": None}
    try:
        picture = load_image(path)
    except (OSError, ValueError, DataError) as error:
        # an image that was deleted meanwhile must not cost the evaluation
        return {"thumbnail": None, "thumbnail_error": str(error)}
    thumbnail(picture, path=out)
    return {"thumbnail": f"eval/mistakes/{out.name}"}


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    """Text is quoted (file names hold commas, quotes and line breaks); floats keep all digits."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _draw_roc(
    labels_N: Ints, scores_N: Floats, names: Sequence[str], image: Mapping[str, Any], *, path: Path
) -> None:
    """One curve with the threshold in use, or one per class against the rest."""
    from sklearn.metrics import roc_curve

    def points(truth_N: NDArray[np.bool_], score_N: Floats) -> tuple[Floats, Floats]:
        false_rate, true_rate, _ = roc_curve(truth_N, score_N, drop_intermediate=False)
        return false_rate, true_rate

    if scores_N.ndim == 1:
        low, high = image["intervals"]["auc"]["low"], image["intervals"]["auc"]["high"]
        interval = "" if low is None else f" ({low:.3f} to {high:.3f})"
        lines = {f"AUC {image['auc']:.3f}{interval}": points(labels_N == 1, scores_N)}
        mark = (1 - image["specificity"], image["sensitivity"], image["threshold"])
        roc_picture(lines, operating_point=mark, path=path)
        return
    lines = {}
    for k, name in enumerate(names):
        area = classification_metrics(labels_N == k, scores_N[:, k]).auc
        label = f"{name} against the rest, AUC {area:.3f}"
        lines[label] = points(labels_N == k, scores_N[:, k])
    roc_picture(lines, path=path)
