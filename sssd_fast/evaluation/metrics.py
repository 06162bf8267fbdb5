"""How good is a classifier: rates, ROC area, bootstrap intervals, per patient, over seeds or folds.

Shapes: N images, K classes, R bootstrap resamples, G groups (patients), U distinct scores. numpy only. For two classes
`scores` is [N], the probability of the positive class, and an image is called positive when score >= threshold. For
more classes `scores` is [N, K], the prediction is the largest score, and rates are macro averages of one class against
the rest. A rate whose denominator is zero is None, with the reason in `Metrics.undefined`; it is never reported as 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd_fast.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RATES = ("accuracy", "sensitivity", "specificity", "precision", "f1", "auc")
LEVEL = 0.95
_ELEMENTS_AT_ONCE = 4_000_000  # bounds the [R, N] weight matrix of the bootstrap to 32 MB


@dataclass(frozen=True)
class Metrics:
    """Rates in [0, 1] or None; `confusion[true][predicted]` in counts, for two classes in the order negative,
    positive.
    """

    n: int
    accuracy: float | None
    sensitivity: float | None
    specificity: float | None
    precision: float | None
    f1: float | None
    auc: float | None
    prevalence: float | None
    threshold: float | None
    confusion: tuple[tuple[int, ...], ...]
    undefined: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """95 % percentile interval over `used` resamples; `left_out` resamples had no defined value. None bounds carry a
    reason.
    """

    low: float | None
    high: float | None
    used: int
    left_out: int
    reason: str | None = None


@dataclass(frozen=True)
class PatientScores:
    """One row per patient, in order of first appearance."""

    patients: tuple[str, ...]
    labels: Ints
    scores: Floats
    images: Ints
    mixed: int
    without_patient: int


def binary_metrics(labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> Metrics:
    """Metrics of two classes. `labels` [N] of 0 and 1 (1 = positive), `scores` [N] finite floats.

    Raises DataError for another shape, other labels or scores that are not finite.
    """
    return _metrics(*checked(labels, scores, binary=True), threshold)


def multiclass_metrics(labels: ArrayLike, scores: ArrayLike) -> Metrics:
    """Metrics of K >= 2 classes. `labels` [N] in 0..K-1, `scores` [N, K]; macro averages, one-vs-rest AUC. Raises
    DataError.
    """
    return _metrics(*checked(labels, scores, binary=False), None)


def bootstrap_intervals(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    n: int = 2000,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    threshold: float = 0.5,
) -> dict[str, Interval]:
    """95 % percentile intervals (Efron and Tibshirani 1993, chapter 13) of every rate, from `n` resamples.

    Not stratified: prevalence varies as it would in a new sample, since accuracy, precision and F1 depend on it. With
    `groups` (patient per image) whole patients are drawn, because images of one patient are not independent. A
    resample in which a rate is undefined (AUC: only one class drawn) is left out for that rate and counted in
    `Interval.left_out`.
    """
    labels_N, scores_N, num_classes = checked(labels, scores, binary=np.ndim(scores) == 1)
    if n < 1:
        raise DataError(f"bootstrap: n is {n}; give at least 1 resample, 2000 by default")
    if groups is not None and len(groups) != len(labels_N):
        raise DataError(
            f"bootstrap: {len(groups)} groups for {len(labels_N)} labels; give one group per image"
        )
    number_of: dict[Hashable, int] = {}
    group_N = np.array(
        [number_of.setdefault(group, len(number_of)) for group in groups or range(len(labels_N))],
        dtype=np.int64,
    )
    num_groups = len(number_of)
    if num_groups < 2:
        unit = "image" if groups is None else "patient"
        reason = (
            f"resampling needs at least 2 {unit}s, there is {num_groups}"
            if num_groups
            else "no images"
        )
        return {name: Interval(None, None, 0, n, reason) for name in RATES}

    rng = np.random.default_rng(seed)
    predicted_N = predict(scores_N, threshold)
    rows = max(1, _ELEMENTS_AT_ONCE // len(labels_N))
    parts: list[dict[str, Floats]] = []
    for start in range(0, n, rows):
        size = min(rows, n - start)
        drawn_RG = (
            rng.integers(0, num_groups, size=(size, num_groups))
            + num_groups * np.arange(size)[:, None]
        )
        counts_RG = np.bincount(drawn_RG.ravel(), minlength=size * num_groups).reshape(
            size, num_groups
        )
        weights_RN = counts_RG[:, group_N].astype(np.float64)
        parts.append(_rates(labels_N, predicted_N, scores_N, weights_RN, num_classes))
    return {name: _interval(np.concatenate([part[name] for part in parts]), n) for name in RATES}


def aggregate_by_patient(
    labels: ArrayLike, scores: ArrayLike, patients: Sequence[str | None]
) -> PatientScores:
    """Mean score per patient. `scores` [N] or [N, K].

    A patient whose images carry different labels is counted in `mixed` and labelled positive if any image is (two
    classes), else by the most frequent label, the lowest of equals. Images without a patient (None or "") are left out
    and counted.
    """
    labels_N, scores_N, num_classes = checked(labels, scores, binary=np.ndim(scores) == 1)
    if len(patients) != len(labels_N):
        raise DataError(
            f"per patient: {len(patients)} patients for {len(labels_N)} labels; give one per image, None where unknown"
        )
    rows_of: dict[str, list[int]] = {}
    for row, patient in enumerate(patients):
        if patient:
            rows_of.setdefault(patient, []).append(row)
    label_of, score_of, mixed = [], [], 0
    for rows in rows_of.values():
        counts_K = np.bincount(labels_N[rows], minlength=num_classes)
        several = np.count_nonzero(counts_K) > 1
        mixed += int(several)
        label_of.append(1 if several and num_classes == 2 else int(counts_K.argmax()))
        score_of.append(scores_N[rows].mean(axis=0))
    images = np.array([len(rows) for rows in rows_of.values()], dtype=np.int64)
    return PatientScores(
        patients=tuple(rows_of),
        labels=np.array(label_of, dtype=np.int64),
        scores=np.array(score_of, dtype=np.float64).reshape(len(rows_of), *scores_N.shape[1:]),
        images=images,
        mixed=mixed,
        without_patient=len(labels_N) - int(images.sum()),
    )


def aggregate_runs(
    runs: Sequence[Metrics | Mapping[str, Any]],
) -> dict[str, dict[str, float | int | None]]:
    """Mean and sample standard deviation (n - 1) of every rate over seeds or folds; `n` counts the runs where it is
    defined.

    `mean` is None without a defined run, `deviation` is None for fewer than two.
    """
    summary: dict[str, dict[str, float | int | None]] = {}
    for name in RATES:
        found = [run.as_dict()[name] if isinstance(run, Metrics) else run[name] for run in runs]
        values = [float(value) for value in found if value is not None]
        summary[name] = {
            "mean": float(np.mean(values)) if values else None,
            "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
        }
    return summary


def roc_points(is_positive: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates at every distinct score from high to low, starting at (0, 0). Needs both classes."""
    positive_N = np.asarray(is_positive, dtype=bool)
    scores_N = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-scores_N, kind="stable")
    last = np.flatnonzero(np.diff(scores_N[order], append=-np.inf))
    hits = positive_N[order].cumsum()[last]
    alarms = (~positive_N[order]).cumsum()[last]
    return np.r_[0.0, alarms / (~positive_N).sum()], np.r_[0.0, hits / positive_N.sum()]


def checked(labels: ArrayLike, scores: ArrayLike, *, binary: bool) -> tuple[Ints, Floats, int]:
    labels_N, scores_N = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels_N.ndim != 1 or (labels_N.size and labels_N.dtype.kind not in "iub"):
        raise DataError(
            f"labels: need whole numbers of shape [N], got {labels_N.dtype} of shape {list(labels_N.shape)}"
        )
    if scores_N.ndim != (1 if binary else 2) or len(scores_N) != len(labels_N):
        need = "[N]" if binary else "[N, K]"
        raise DataError(
            f"scores: need shape {need} with N = {len(labels_N)} like the labels, got {list(scores_N.shape)}"
        )
    num_classes = 2 if binary else scores_N.shape[1]
    if num_classes < 2:
        raise DataError(f"scores: need at least 2 classes, got {num_classes} column")
    outside = (labels_N < 0) | (labels_N >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(f"labels: row {row} is {labels_N[row]}; need 0 to {num_classes - 1}")
    bad = ~np.isfinite(scores_N if scores_N.ndim == 1 else scores_N.sum(axis=1))
    if bad.any():
        raise DataError(
            f"scores: {int(bad.sum())} of {len(bad)} rows are not finite, the first is row {int(bad.argmax())}; "
            "the model gave NaN or infinity, so evaluate an earlier checkpoint or in fp32"
        )
    return labels_N.astype(np.int64), scores_N, num_classes


def predict(scores_N: Floats, threshold: float) -> Ints:
    predicted = scores_N >= threshold if scores_N.ndim == 1 else scores_N.argmax(axis=1)
    return predicted.astype(np.int64)


def _rates(
    labels_N: Ints, predicted_N: Ints, scores_N: Floats, weights_RN: Floats, num_classes: int
) -> dict[str, Floats]:
    """Every rate for R weightings of the images; NaN where undefined."""
    cells_NX = np.eye(num_classes * num_classes)[labels_N * num_classes + predicted_N]
    confusion_RKK = (weights_RN @ cells_NX).reshape(-1, num_classes, num_classes)
    true_RK = np.diagonal(confusion_RKK, axis1=1, axis2=2)
    total_R1 = confusion_RKK.sum(axis=(1, 2))[:, None]
    missed_RK = confusion_RKK.sum(axis=2) - true_RK
    false_RK = confusion_RKK.sum(axis=1) - true_RK
    rest_RK = total_R1 - true_RK - missed_RK - false_RK
    with np.errstate(invalid="ignore", divide="ignore"):
        per_class = {
            "sensitivity": true_RK / (true_RK + missed_RK),
            "specificity": rest_RK / (rest_RK + false_RK),
            "precision": true_RK / (true_RK + false_RK),
            "f1": 2 * true_RK / (2 * true_RK + false_RK + missed_RK),
        }
        rates = {"accuracy": true_RK.sum(axis=1) / total_R1[:, 0]}
    if num_classes == 2 and scores_N.ndim == 1:
        rates |= {name: values_RK[:, 1] for name, values_RK in per_class.items()}
        rates["auc"] = _auc(labels_N == 1, scores_N, weights_RN)
    else:
        rates |= {name: values_RK.mean(axis=1) for name, values_RK in per_class.items()}
        aucs = [_auc(labels_N == k, scores_N[:, k], weights_RN) for k in range(num_classes)]
        rates["auc"] = np.mean(aucs, axis=0)
    return rates


def _auc(is_positive_N: NDArray[np.bool_], scores_N: Floats, weights_RN: Floats) -> Floats:
    """P(score of a positive > score of a negative) + half of the ties (Mann-Whitney), weighted; NaN with one class
    only.
    """
    if len(scores_N) == 0:
        return np.full(len(weights_RN), np.nan)
    order = np.argsort(scores_N, kind="stable")
    starts_U = np.flatnonzero(np.diff(scores_N[order], prepend=-np.inf))
    positive_RU = np.add.reduceat((weights_RN * is_positive_N)[:, order], starts_U, axis=1)
    negative_RU = np.add.reduceat((weights_RN * ~is_positive_N)[:, order], starts_U, axis=1)
    below_RU = negative_RU.cumsum(axis=1) - negative_RU
    pairs_R = positive_RU.sum(axis=1) * negative_RU.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(
            (positive_RU * (below_RU + 0.5 * negative_RU)).sum(axis=1) / pairs_R, dtype=np.float64
        )


def _metrics(
    labels_N: Ints, scores_N: Floats, num_classes: int, threshold: float | None
) -> Metrics:
    binary = scores_N.ndim == 1
    predicted_N = predict(scores_N, 0.0 if threshold is None else threshold)
    values = {
        name: float(v[0])
        for name, v in _rates(
            labels_N, predicted_N, scores_N, np.ones((1, len(labels_N))), num_classes
        ).items()
    }
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels_N, predicted_N), 1)
    undefined = {
        name: _reason(name, confusion, binary) for name, value in values.items() if np.isnan(value)
    }
    rates = {name: None if name in undefined else value for name, value in values.items()}
    prevalence = float((labels_N == 1).mean()) if binary and len(labels_N) else None
    cells = tuple(tuple(int(count) for count in row) for row in confusion)
    return Metrics(
        n=len(labels_N),
        prevalence=prevalence,
        threshold=threshold,
        confusion=cells,
        undefined=undefined,
        **rates,
    )


def _reason(name: str, confusion_KK: Ints, binary: bool) -> str:
    if confusion_KK.sum() == 0:
        return "no images"
    images_K, predictions_K = confusion_KK.sum(axis=1), confusion_KK.sum(axis=0)
    if binary:
        reasons = {
            "sensitivity": "no positives",
            "specificity": "no negatives",
            "precision": "nothing was predicted positive",
            "f1": "no positives and none predicted positive",
            "auc": "only positives" if images_K[0] == 0 else "only negatives",
        }
        return reasons[name]
    empty = (
        np.flatnonzero(predictions_K == 0) if name == "precision" else np.flatnonzero(images_K == 0)
    )
    if name == "specificity" or len(empty) == 0:
        return "all images are of one class"
    what = "was never predicted" if name == "precision" else "has no images"
    return f"class {', '.join(map(str, empty))} {what}"


def _interval(values_R: Floats, n: int) -> Interval:
    defined = values_R[~np.isnan(values_R)]
    if len(defined) == 0:
        return Interval(None, None, 0, n, "undefined in every resample")
    low, high = np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high), len(defined), n - len(defined))
