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
# Why a rate is None; a class is the positive one of two, or any of several.
UNDEFINED = {
    "accuracy": "no images",
    "sensitivity": "no images of a class",
    "specificity": "no images outside a class",
    "precision": "a class was never predicted",
    "f1": "a class has no images and was never predicted",
    "auc": "images of one class only",
}
LEVEL = 0.95
# Limits the [R, N] weight matrix of the bootstrap to 32 MB.
_MAX_ELEMENTS = 4_000_000


def classification_metrics(
    labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5
) -> dict[str, Any]:
    """n, the RATES in [0, 1] or None, prevalence, threshold, confusion[true][predicted], undefined.

    `labels` [N] of class numbers; `scores` [N] of the positive class (label 1), or [N, K] of each
    class: then `threshold` is not used. Raises DataError for scores that are not finite.
    """
    labels_N, scores_N = check_scores(labels, scores)
    binary, n = scores_N.ndim == 1, len(labels_N)
    confusion_1KK, rates = _weighted_metrics(labels_N, scores_N, threshold, np.ones((1, n)))
    values = {name: float(value_1[0]) for name, value_1 in rates.items()}
    return {
        "n": n,
        **{name: None if np.isnan(value) else value for name, value in values.items()},
        "prevalence": float(labels_N.mean()) if binary and n else None,
        "threshold": threshold if binary else None,
        "confusion": confusion_1KK[0].astype(np.int64).tolist(),
        "undefined": {k: UNDEFINED[k] for k, value in values.items() if np.isnan(value)},
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

    Returns {rate: {low, high, skipped}}; bounds are None without two groups or any value. The `n`
    resamples are not stratified: prevalence varies as it would in a new sample, since accuracy,
    precision and F1 depend on it. With `groups` (patient per image) whole patients are drawn,
    because images of one patient are not independent. A resample in which a rate is undefined (AUC:
    only one class drawn) is skipped for that rate and counted.
    """
    labels_N, scores_N = check_scores(labels, scores)
    number_of: dict[Hashable, int] = {}
    names = range(len(labels_N)) if groups is None else groups
    group_N = np.array([number_of.setdefault(g, len(number_of)) for g in names], dtype=np.int64)
    num_groups = len(number_of)
    if num_groups < 2:
        return {name: {"low": None, "high": None, "skipped": n} for name in RATES}
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
    intervals = {}
    for name, parts in found.items():
        values_R = np.concatenate(parts)
        defined = values_R[~np.isnan(values_R)]
        ends = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
        low, high = np.percentile(defined, ends).tolist() if len(defined) else (None, None)
        intervals[name] = {"low": low, "high": high, "skipped": n - len(defined)}
    return intervals


def aggregate_by_patient(
    labels: ArrayLike, scores: ArrayLike, patients: Sequence[str | None]
) -> tuple[Ints, Floats, int]:
    """(label, mean score) per patient, sorted by name, and how many are mixed.

    A patient whose images have different labels is mixed, and labelled positive if any image is
    (two classes), else by the most frequent label, the lowest of equals. Images without a patient
    (None or "") are excluded.
    """
    labels_N, scores_N = check_scores(labels, scores)
    rows = [row for row, patient in enumerate(patients) if patient]
    num_classes = 2 if scores_N.ndim == 1 else scores_N.shape[1]
    names, patient_N = np.unique([str(patients[row]) for row in rows], return_inverse=True)
    counts_PK = np.zeros((len(names), num_classes), np.int64)
    np.add.at(counts_PK, (patient_N, labels_N[rows]), 1)
    sums = np.zeros((len(names), *scores_N.shape[1:]))
    np.add.at(sums, patient_N, scores_N[rows])
    means = (sums.T / counts_PK.sum(axis=1)).T
    mixed_P = (counts_PK > 0).sum(axis=1) > 1
    label_P = counts_PK.argmax(axis=1)
    if num_classes == 2:
        label_P[mixed_P] = 1
    return label_P, means, int(mixed_P.sum())


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


def calibration(labels: ArrayLike, scores: ArrayLike, num_bins: int = 10) -> dict[str, Any]:
    """How well scores agree with frequencies: {ece, brier, bins: [{n, score, frequency}]}.

    ECE (Guo et al. 2017, arXiv 1706.04599): mean over the images of |mean score - frequency| of
    their bin, of equal widths. Two classes: score of the positive class and its frequency; more:
    the highest score and the frequency of a correct prediction. Brier (1950): mean squared
    difference of score and label; more classes: summed over the classes.
    """
    labels_N, scores_N = check_scores(labels, scores)
    if scores_N.ndim == 1:
        score_N, hit_N = scores_N, (labels_N == 1).astype(np.float64)
        brier_N = (score_N - hit_N) ** 2
    else:
        score_N, hit_N = scores_N.max(1), (scores_N.argmax(1) == labels_N).astype(np.float64)
        brier_N = ((scores_N - np.eye(scores_N.shape[1])[labels_N]) ** 2).sum(1)
    bin_N = np.minimum((score_N * num_bins).astype(np.int64), num_bins - 1)
    counts_B, score_B, hit_B = (
        np.bincount(bin_N, weights, num_bins) for weights in (None, score_N, hit_N)
    )
    n = max(1, len(labels_N))
    bins = [
        {"n": int(count), "score": score / count, "frequency": hit / count}
        if count
        else {"n": 0, "score": None, "frequency": None}
        for count, score, hit in zip(counts_B, score_B.tolist(), hit_B.tolist(), strict=True)
    ]
    ece = float(np.abs(score_B - hit_B).sum() / n)
    return {"ece": ece, "brier": float(brier_N.sum() / n), "bins": bins}


def check_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats]:
    """(labels [N], scores [N] or [N, K]). Raises DataError for scores that are not finite."""
    labels_N, scores_N = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    if len(labels_N) != len(scores_N):
        raise DataError(f"{len(labels_N)} labels and {len(scores_N)} scores; need one for each")
    bad = np.flatnonzero(~np.isfinite(scores_N if scores_N.ndim == 1 else scores_N.sum(axis=1)))
    if len(bad):
        raise DataError(
            f"scores: {len(bad)} of {len(scores_N)} rows are not finite, the first is row "
            f"{bad[0]}; the model gave NaN or infinity, so evaluate an earlier checkpoint "
            "or in fp32"
        )
    return labels_N, scores_N


def predict_classes(scores_N: Floats, threshold: float) -> Ints:
    """[N] predicted classes of scores [N] (positive = 1) or [N, K]."""
    predicted = scores_N >= threshold if scores_N.ndim == 1 else scores_N.argmax(axis=1)
    return predicted.astype(np.int64)


def best_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold of the highest sensitivity + specificity, between two neighbouring scores.

    `labels` [N] of 0 and 1, `scores` [N] of the positive class, in [0, 1]. Of equal ones that
    nearest to 0.5; 0.5 without images of both classes. Raises DataError for scores that are not
    finite. Source: Youden, Cancer 3, 1950.
    """
    from sklearn.metrics import roc_curve

    labels_N, scores_N = check_scores(labels, scores)
    if len(np.unique(labels_N)) < 2:
        return 0.5
    false_T, true_T, score_T = roc_curve(labels_N, scores_N, drop_intermediate=False)
    # a point of the curve holds for the thresholds from the next lower score to its own
    between_T = (np.clip(score_T, 0, 1) + np.append(score_T[1:], 0)) / 2
    gain_T = np.round(true_T - false_T, 12)
    best = between_T[gain_T == gain_T.max()]
    return float(best[np.abs(best - 0.5).argmin()])


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
