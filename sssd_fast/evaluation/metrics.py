"""Classification metrics: rates, ROC AUC, bootstrap intervals, per patient, over seeds or folds.

Shapes: N images, K classes, R bootstrap resamples, G groups (patients), U distinct scores. For two
classes `scores` is [N], the probability of the positive class, and the prediction is positive when
score >= threshold. For more classes `scores` is [N, K], the prediction is the largest score, and
rates are macro averages, one class against the rest. A rate with denominator zero is None, with the
reason in "undefined"; it is never reported as 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sssd_fast.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RATES = {
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity (recall)",
    "specificity": "Specificity",
    "precision": "Precision",
    "f1": "F1",
    "auc": "AUC",
}
LEVEL = 0.95
# Limits the [R, N] weight matrix of the bootstrap to 32 MB.
_MAX_ELEMENTS = 4_000_000


def classification_metrics(
    labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5
) -> dict[str, Any]:
    """n, the RATES in [0, 1] or None, prevalence, threshold, confusion[true][predicted], undefined.

    `labels` [N] of class numbers; `scores` [N] of the positive class (label 1), or [N, K] of each
    class: then `threshold` is not used. Raises DataError for another shape, other labels or scores
    that are not finite.
    """
    labels_N, scores_N, _ = check_scores(labels, scores)
    binary, n = scores_N.ndim == 1, len(labels_N)
    confusion_1KK, rates = _weighted_metrics(labels_N, scores_N, threshold, np.ones((1, n)))
    confusion_KK = confusion_1KK[0].astype(np.int64)
    values = {name: float(value_1[0]) for name, value_1 in rates.items()}
    undefined = {k: _reason(k, confusion_KK, binary) for k, v in values.items() if np.isnan(v)}
    return {
        "n": n,
        **{name: None if name in undefined else value for name, value in values.items()},
        "prevalence": float(labels_N.mean()) if binary and n else None,
        "threshold": threshold if binary else None,
        "confusion": confusion_KK.tolist(),
        "undefined": undefined,
    }


def bootstrap_intervals(
    labels: ArrayLike,
    scores: ArrayLike,
    n: int,
    seed: int,
    groups: Sequence[Hashable] | None = None,
    threshold: float = 0.5,
) -> dict[str, dict[str, Any]]:
    """95 % percentile interval of every rate (Efron and Tibshirani 1993, chapter 13).

    Returns {rate: {low, high, used, skipped, reason}}; bounds of None have a reason. The `n`
    resamples are not stratified: prevalence varies as it would in a new sample, since accuracy,
    precision and F1 depend on it. With `groups` (patient per image) whole patients are drawn,
    because images of one patient are not independent. A resample in which a rate is undefined (AUC:
    only one class drawn) is skipped for that rate and counted.
    """
    labels_N, scores_N, _ = check_scores(labels, scores)
    unit = "image" if groups is None else "patient"
    groups = range(len(labels_N)) if groups is None else groups
    number_of: dict[Hashable, int] = {}
    group_N = np.array([number_of.setdefault(g, len(number_of)) for g in groups], dtype=np.int64)
    num_groups = len(number_of)
    if num_groups < 2:
        few = f"resampling needs at least 2 {unit}s, there is 1" if num_groups else "no images"
        return dict.fromkeys(RATES, _interval(np.full(n, np.nan), few))

    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_ELEMENTS // len(labels_N))
    found: dict[str, list[Floats]] = {name: [] for name in RATES}
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        drawn_RG = rng.integers(0, num_groups, size=(size, num_groups))
        # one bincount for all resamples: each has its own range of numbers
        drawn_RG += num_groups * np.arange(size)[:, None]
        counts_RG = np.bincount(drawn_RG.ravel(), minlength=size * num_groups)
        weights_RN = counts_RG.reshape(size, num_groups)[:, group_N].astype(np.float64)
        _, rates = _weighted_metrics(labels_N, scores_N, threshold, weights_RN)
        for name, values_R in rates.items():
            found[name].append(values_R)
    return {name: _interval(np.concatenate(values)) for name, values in found.items()}


def aggregate_by_patient(
    labels: ArrayLike, scores: ArrayLike, patients: Sequence[str | None]
) -> tuple[Ints, Floats, int]:
    """(label, mean score) per patient, in order of first appearance, and how many are mixed.

    A patient whose images have different labels is mixed, and labelled positive if any image is
    (two classes), else by the most frequent label, the lowest of equals. Images without a patient
    (None or "") are excluded.
    """
    labels_N, scores_N, num_classes = check_scores(labels, scores)
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
    scores = np.array(score_of, dtype=np.float64).reshape(len(rows_of), *scores_N.shape[1:])
    return np.array(label_of, dtype=np.int64), scores, mixed


def aggregate_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{rate: {mean, deviation, n}} over seeds or folds; sample standard deviation (n - 1).

    `runs` are of `classification_metrics`. `n` counts the runs with a defined rate; `mean` is None
    for n = 0, `deviation` for n < 2.
    """
    summary = {}
    for name in RATES:
        values = [float(run[name]) for run in runs if run[name] is not None]
        summary[name] = {
            "mean": float(np.mean(values)) if values else None,
            "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
        }
    return summary


def check_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats, int]:
    """(labels [N], scores [N] or [N, K], number of classes). Raises DataError."""
    labels_N, scores_N = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels_N.ndim != 1 or (labels_N.size and labels_N.dtype.kind not in "iub"):
        raise DataError(
            f"labels: need whole numbers of shape [N], got {labels_N.dtype} of shape "
            f"{list(labels_N.shape)}"
        )
    if scores_N.ndim not in (1, 2) or len(scores_N) != len(labels_N) or scores_N.shape[1:] == (1,):
        raise DataError(
            f"scores: need shape [N] or [N, K] with N = {len(labels_N)} like the labels and "
            f"K >= 2, got {list(scores_N.shape)}"
        )
    num_classes = 2 if scores_N.ndim == 1 else scores_N.shape[1]
    outside = np.flatnonzero((labels_N < 0) | (labels_N >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(f"labels: row {row} is {labels_N[row]}; need 0 to {num_classes - 1}")
    bad = np.flatnonzero(~np.isfinite(scores_N if scores_N.ndim == 1 else scores_N.sum(axis=1)))
    if len(bad):
        raise DataError(
            f"scores: {len(bad)} of {len(scores_N)} rows are not finite, the first is row "
            f"{bad[0]}; the model gave NaN or infinity, so evaluate an earlier checkpoint "
            "or in fp32"
        )
    return labels_N.astype(np.int64), scores_N, num_classes


def predict_classes(scores_N: Floats, threshold: float) -> Ints:
    """[N] predicted classes of scores [N] (positive = 1) or [N, K]."""
    predicted = scores_N >= threshold if scores_N.ndim == 1 else scores_N.argmax(axis=1)
    return predicted.astype(np.int64)


def _weighted_metrics(
    labels_N: Ints, scores_N: Floats, threshold: float, weights_RN: Floats
) -> tuple[Floats, dict[str, Floats]]:
    """Confusion matrices [R, K, K] and rates [R], NaN where undefined, of R weightings."""
    binary = scores_N.ndim == 1
    num_classes = 2 if binary else scores_N.shape[1]
    cells_NX = np.eye(num_classes**2)[labels_N * num_classes + predict_classes(scores_N, threshold)]
    confusion_RKK = (weights_RN @ cells_NX).reshape(-1, num_classes, num_classes)
    true_RK = np.diagonal(confusion_RKK, axis1=1, axis2=2)
    total_R = confusion_RKK.sum(axis=(1, 2))
    missed_RK = confusion_RKK.sum(axis=2) - true_RK
    false_RK = confusion_RKK.sum(axis=1) - true_RK
    rest_RK = total_R[:, None] - true_RK - missed_RK - false_RK
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = true_RK.sum(axis=1) / total_R
        per_class = {
            "sensitivity": true_RK / (true_RK + missed_RK),
            "specificity": rest_RK / (rest_RK + false_RK),
            "precision": true_RK / (true_RK + false_RK),
            "f1": 2 * true_RK / (2 * true_RK + false_RK + missed_RK),
        }
    rates = {k: value[:, 1] if binary else value.mean(axis=1) for k, value in per_class.items()}
    columns = {1: scores_N} if binary else dict(enumerate(scores_N.T))
    each = [_weighted_auc(labels_N == k, column, weights_RN) for k, column in columns.items()]
    auc = np.mean(each, axis=0)
    return confusion_RKK, {"accuracy": accuracy, **rates, "auc": auc}


def _weighted_auc(truth_N: NDArray[np.bool_], scores_N: Floats, weights_RN: Floats) -> Floats:
    """P(score of a positive > that of a negative) + half of the ties (Mann-Whitney), R weightings.

    Equals sklearn.metrics.roc_auc_score(truth, scores, sample_weight=weights) of each row, for all
    rows at once; NaN where a row has only one class.
    """
    order = np.argsort(scores_N, kind="stable")
    starts_U = np.flatnonzero(np.diff(scores_N[order], prepend=-np.inf))
    positive_RU = np.add.reduceat((weights_RN * truth_N)[:, order], starts_U, axis=1)
    negative_RU = np.add.reduceat((weights_RN * ~truth_N)[:, order], starts_U, axis=1)
    below_RU = negative_RU.cumsum(axis=1) - negative_RU
    pairs_R = positive_RU.sum(axis=1) * negative_RU.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray((positive_RU * (below_RU + 0.5 * negative_RU)).sum(axis=1) / pairs_R)


def _reason(name: str, confusion_KK: Ints, binary: bool) -> str:
    """Why a rate of this confusion matrix is undefined."""
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
    empty = np.flatnonzero((predictions_K if name == "precision" else images_K) == 0)
    if name == "specificity" or len(empty) == 0:
        return "all images are of one class"
    what = "was never predicted" if name == "precision" else "has no images"
    return f"class {', '.join(map(str, empty))} {what}"


def _interval(values_R: Floats, reason: str = "undefined in every resample") -> dict[str, Any]:
    """`used` resamples have a defined value, `skipped` have none; `reason` if all are skipped."""
    defined = values_R[~np.isnan(values_R)]
    counts = {"used": len(defined), "skipped": len(values_R) - len(defined)}
    if len(defined) == 0:
        return {"low": None, "high": None, **counts, "reason": reason}
    low, high = np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return {"low": float(low), "high": float(high), **counts, "reason": None}
