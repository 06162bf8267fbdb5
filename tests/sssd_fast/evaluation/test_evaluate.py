"""Metrics against scikit-learn and hand-computed cases, intervals, patients, runs, and the files of eval/."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from sklearn import metrics as sk

from sssd_fast.data.labels import positive_class
from sssd_fast.errors import DataError
from sssd_fast.evaluation.evaluate import result_rows, write_evaluation
from sssd_fast.evaluation.metrics import (
    aggregate_by_patient,
    aggregate_runs,
    bootstrap_intervals,
    classification_metrics,
)

RATES = ("accuracy", "sensitivity", "specificity", "precision", "f1", "auc")


def make_binary(n=300, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    scores = 1 / (1 + np.exp(-(1.2 * (labels - 0.5) + rng.normal(size=n))))
    return labels, np.round(scores, 1) if ties else scores


def from_confusion(tp, fn, fp, tn):
    labels = np.repeat([1, 1, 0, 0], [tp, fn, fp, tn])
    return labels, np.repeat([0.9, 0.1, 0.9, 0.1], [tp, fn, fp, tn])


@pytest.mark.parametrize("ties", [False, True])
def test_rates_of_two_classes_equal_scikit_learn(ties):
    """Every rate has the standard definition, with tied scores too (a wrong tie rule shifts AUC)."""
    labels, scores = make_binary(ties=ties)
    predicted = (scores >= 0.5).astype(int)
    got = classification_metrics(labels, scores)
    assert got.accuracy == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    assert got.sensitivity == pytest.approx(sk.recall_score(labels, predicted), abs=1e-12)
    assert got.specificity == pytest.approx(
        sk.recall_score(labels, predicted, pos_label=0), abs=1e-12
    )
    assert got.precision == pytest.approx(sk.precision_score(labels, predicted), abs=1e-12)
    assert got.f1 == pytest.approx(sk.f1_score(labels, predicted), abs=1e-12)
    assert got.auc == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert got.confusion == tuple(map(tuple, sk.confusion_matrix(labels, predicted)))
    assert got.prevalence == pytest.approx(labels.mean())


def test_published_confusion_gives_the_published_rates():
    """The COVID-CT result of the SSSD-COVID paper: 81.76 accuracy, 81.82 precision, 78.26 recall, 80.00 F1."""
    got = classification_metrics(*from_confusion(tp=54, fn=15, fp=12, tn=67))
    values = [
        round(100 * rate, 2) for rate in (got.accuracy, got.precision, got.sensitivity, got.f1)
    ]
    assert values == [81.76, 81.82, 78.26, 80.00]
    assert round(100 * got.specificity, 2) == 84.81
    assert got.confusion == ((67, 12), (15, 54))


def test_auc_by_hand():
    """Three of four positive-negative pairs are in order, and a tie counts a half."""
    assert classification_metrics([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).auc == 0.75
    assert classification_metrics([0, 1], [0.5, 0.5]).auc == 0.5
    assert classification_metrics([0, 1], [0.9, 0.1]).auc == 0.0


def test_a_score_equal_to_the_threshold_is_positive():
    assert classification_metrics([1, 0], [0.7, 0.69], threshold=0.7).confusion == ((1, 0), (0, 1))


@pytest.mark.parametrize(
    ("labels", "scores", "undefined"),
    [
        ([1, 1, 1], [0.9, 0.2, 0.6], {"specificity": "no negatives", "auc": "only positives"}),
        ([0, 0], [0.1, 0.9], {"sensitivity": "no positives", "auc": "only negatives"}),
        ([0, 1], [0.1, 0.2], {"precision": "nothing was predicted positive"}),
        (
            [0, 0],
            [0.1, 0.2],
            {
                "sensitivity": "no positives",
                "precision": "nothing was predicted positive",
                "f1": "no positives and none predicted positive",
                "auc": "only negatives",
            },
        ),
        ([], [], dict.fromkeys(RATES, "no images")),
    ],
)
def test_undefined_rates_are_none_with_a_reason(labels, scores, undefined):
    """A rate with denominator zero is neither a crash nor a 0 that looks like a result."""
    got = classification_metrics(np.array(labels, dtype=int), scores)
    assert got.undefined == undefined
    assert {name for name in RATES if getattr(got, name) is None} == set(undefined)


def test_multiclass_rates_equal_scikit_learn():
    """Macro averages and one-vs-rest AUC, with unequal class sizes so that micro and macro differ."""
    rng = np.random.default_rng(1)
    labels = rng.choice(3, size=200, p=[0.6, 0.3, 0.1])
    logits = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = scores.argmax(axis=1)
    got = classification_metrics(labels, scores)
    assert got.accuracy == pytest.approx(sk.accuracy_score(labels, predicted))
    assert got.sensitivity == pytest.approx(sk.recall_score(labels, predicted, average="macro"))
    assert got.precision == pytest.approx(sk.precision_score(labels, predicted, average="macro"))
    assert got.f1 == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert got.auc == pytest.approx(
        sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    )
    negatives = [sk.recall_score(labels != k, predicted != k) for k in range(3)]
    assert got.specificity == pytest.approx(np.mean(negatives))
    assert got.confusion == tuple(map(tuple, sk.confusion_matrix(labels, predicted)))


def test_multiclass_names_the_missing_class():
    got = classification_metrics([0, 0, 2], np.eye(3)[[0, 0, 2]])
    assert got.auc is None
    assert "class 1 has no images" in got.undefined["auc"]
    assert "class 1 was never predicted" in got.undefined["precision"]
    assert got.accuracy == 1.0


@pytest.mark.parametrize(
    ("labels", "scores", "text"),
    [
        ([0, 1], [0.1, float("nan")], "1 of 2 rows are not finite, the first is row 1"),
        ([0, 2], [0.1, 0.2], "row 1 is 2; need 0 to 1"),
        ([0, 1, 1], [0.1, 0.2], "N = 3"),
        ([0.5, 1.0], [0.1, 0.2], "whole numbers"),
        ([0, 1], [[0.1], [0.2]], "need shape [N] or [N, K]"),
    ],
)
def test_wrong_input_is_named(labels, scores, text):
    with pytest.raises(DataError) as caught:
        classification_metrics(labels, scores)
    assert text in str(caught.value)


def test_bootstrap_equals_a_plain_loop():
    """The vectorised resampling gives the percentiles of a loop over the same draws with scikit-learn's AUC."""
    labels, scores = make_binary(60, seed=3, ties=True)
    got = bootstrap_intervals(labels, scores, n=200, seed=5)
    draws = np.random.default_rng(5).integers(0, 60, size=(200, 60))
    aucs = [sk.roc_auc_score(labels[rows], scores[rows]) for rows in draws]
    specificities = [
        ((scores[rows] < 0.5) & (labels[rows] == 0)).sum() / (labels[rows] == 0).sum()
        for rows in draws
    ]
    for name, values in (("auc", aucs), ("specificity", specificities)):
        low, high = np.percentile(values, [2.5, 97.5])
        assert got[name].low == pytest.approx(low, abs=1e-12)
        assert got[name].high == pytest.approx(high, abs=1e-12)
        assert (got[name].used, got[name].skipped) == (200, 0)


def test_bootstrap_interval_covers_the_truth():
    """About 95 % of intervals hold the true accuracy; an interval of the wrong level or width fails."""
    rng = np.random.default_rng(0)
    hits, trials, truth = 0, 200, 0.8
    for trial in range(trials):
        labels = rng.integers(0, 2, 150)
        right = rng.random(150) < truth
        found = bootstrap_intervals(
            labels, np.where(right, labels, 1 - labels).astype(float), n=300, seed=trial
        )["accuracy"]
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / trials <= 0.985


def test_bootstrap_by_patient_is_wider():
    """Ten identical images per patient carry the information of one: the width must be that of the patients alone."""
    labels, scores = make_binary(40, seed=2)
    repeated = [np.repeat(values, 10) for values in (labels, scores)]
    patients = [str(p) for p in np.repeat(np.arange(40), 10)]
    by_image = bootstrap_intervals(*repeated, n=1000, seed=0)["auc"]
    by_patient = bootstrap_intervals(*repeated, n=1000, seed=0, groups=patients)["auc"]
    patients_alone = bootstrap_intervals(labels, scores, n=1000, seed=0)["auc"]
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)
    assert (by_patient.low, by_patient.high) == pytest.approx(
        (patients_alone.low, patients_alone.high), abs=1e-12
    )


def test_bootstrap_counts_resamples_without_auc():
    """Resamples of one class are left out of AUC, counted, and do not touch accuracy. P(one class) = 2 * 0.5^4 here."""
    got = bootstrap_intervals([0, 0, 1, 1], [0.2, 0.6, 0.4, 0.9], n=2000, seed=0)
    assert got["auc"].used + got["auc"].skipped == 2000
    assert got["auc"].skipped == pytest.approx(2000 / 8, abs=60)
    assert got["accuracy"].skipped == 0


def test_bootstrap_without_enough_units_gives_a_reason():
    one = bootstrap_intervals([0, 1], [0.1, 0.9], n=10, seed=0, groups=["a", "a"])["accuracy"]
    assert one.low is None
    assert one.reason == "resampling needs at least 2 patients, there is 1"
    assert bootstrap_intervals(np.zeros(0, int), [], n=10, seed=0)["auc"].reason == "no images"
    same = bootstrap_intervals([1, 1, 1], [0.9, 0.8, 0.1], n=10, seed=0)
    assert same["auc"].reason == "undefined in every resample"
    assert same["accuracy"].low is not None


def test_bootstrap_is_seeded():
    labels, scores = make_binary(500)
    first = bootstrap_intervals(labels, scores, seed=1)
    assert first == bootstrap_intervals(labels, scores, seed=1)
    assert first != bootstrap_intervals(labels, scores, seed=2)


def test_patients_are_averaged():
    """Mean score per patient in order of appearance; images without a patient are left out and counted."""
    got = aggregate_by_patient([1, 0, 1, 0, 1], [0.9, 0.2, 0.5, 0.4, 0.3], ["b", "a", "b", "a", ""])
    assert got.scores == pytest.approx([0.7, 0.3])
    assert got.labels.tolist() == [1, 0]
    assert (got.mixed, got.without_patient) == (0, 1)


def test_patient_with_mixed_labels():
    """Two classes: positive if any image is. More classes: the most frequent label."""
    got = aggregate_by_patient([0, 0, 1, 0], [0.1, 0.2, 0.9, 0.1], ["p", "p", "p", "q"])
    assert (got.labels.tolist(), got.mixed) == ([1, 0], 1)
    several = aggregate_by_patient([2, 2, 1], np.eye(3)[[2, 2, 1]], ["p", "p", "p"])
    assert (several.labels.tolist(), several.mixed) == ([2], 1)
    assert several.scores == pytest.approx(np.array([[0, 1 / 3, 2 / 3]]))


def test_runs_give_mean_and_sample_deviation():
    """n - 1 in the deviation; an undefined run is left out of its rate and not counted."""
    runs = [
        classification_metrics(*from_confusion(tp, 10 - tp, 5, 5)).as_dict() for tp in (6, 8, 10)
    ]
    got = aggregate_runs([*runs, classification_metrics([0], [0.1]).as_dict()])
    assert got["sensitivity"] == {
        "mean": pytest.approx(0.8),
        "deviation": pytest.approx(0.2),
        "n": 3,
    }
    assert got["accuracy"]["n"] == 4
    assert aggregate_runs(runs[:1])["auc"]["deviation"] is None


@pytest.mark.parametrize(
    ("classes", "index"),
    [
        (["CT_COVID", "CT_NonCOVID"], 0),
        (["COVID", "non-COVID"], 0),
        (["synthetic_covid", "synthetic_normal"], 0),
        (["Normal", "Abnormal"], 1),
        (["no_finding", "nodule"], 1),
        (["a", "b"], 1),
    ],
)
def test_positive_class_is_the_disease(classes, index):
    """Alphabetical folder order must not swap sensitivity and specificity."""
    assert positive_class(classes) == index


NAMES = [
    "a, b.png",
    'quo"te.png',
    "line\nbreak.png",
    "carriage\rreturn.png",
    "50%(1).png",
    "=1+1.png",
    "plain.png",
    "ünï.png",
]


def write(folder, labels=None, probabilities=None, probabilities_NK=None, **options):
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1]) if labels is None else labels
    first = (
        np.array([0.9, 0.8, 0.1, 1 / 3, 0.2, 0.3, 0.95, 0.4])
        if probabilities is None
        else probabilities
    )
    given = {
        "labels": labels,
        "probabilities": np.stack([first, 1 - first], axis=1)
        if probabilities_NK is None
        else probabilities_NK,
        "paths": NAMES,
        "classes": ["CT_COVID", "CT_NonCOVID"],
        "split": "test",
        "resamples": 100,
    }
    return write_evaluation(folder, **(given | options))


def test_written_files_agree(tmp_path):
    """metrics.json counts COVID (class 0) as positive; predictions.csv holds every odd name and every digit."""
    pictures = []

    def load(path):
        pictures.append(path)
        return np.full((300, 200), 90, dtype=np.uint8)

    result = write(tmp_path, load_image=load, patients=["p", "p", "q", "q", "r", "r", "s", ""])
    stored = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["positive_class"] == "CT_COVID"
    assert stored["image"]["confusion"] == [[3, 1], [2, 2]]  # negative first: NonCOVID, then COVID
    assert stored["image"]["sensitivity"] == 0.5
    assert stored["patient"]["n"] == 4
    assert stored["bootstrap"]["unit"] == "patient"
    assert any("1 images name no patient" in note for note in stored["notes"])
    with (tmp_path / "eval" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == NAMES
    assert list(rows[0]) == ["path", "label", "score", "prediction", "patient", "split"]
    assert float(rows[3]["score"]) == 1 / 3
    assert (rows[0]["label"], rows[0]["prediction"], rows[2]["prediction"]) == (
        "CT_COVID",
        "CT_COVID",
        "CT_NonCOVID",
    )
    worst = [(m["path"], m["score"]) for m in stored["mistakes"]]
    assert worst == [("plain.png", 0.95), (NAMES[2], 0.1), (NAMES[3], 1 / 3)]
    assert pictures == [name for name, _ in worst]
    assert all((tmp_path / m["thumbnail"]).stat().st_size for m in stored["mistakes"])
    assert (tmp_path / "eval" / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "eval" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".partial")]


def test_named_positive_class_turns_the_rates_around(tmp_path):
    both = [write(tmp_path, positive=index)["image"] for index in (0, 1)]
    assert both[0]["sensitivity"] == both[1]["specificity"] == 0.5
    assert both[0]["auc"] == pytest.approx(both[1]["auc"])


def test_one_class_split_leaves_a_note_and_no_stale_roc(tmp_path):
    write(tmp_path)
    result = write(tmp_path, labels=np.zeros(8, dtype=int))
    assert not (tmp_path / "eval" / "roc.png").exists()
    assert result["notes"] == ["No ROC curve: only positives."]
    assert {name: cell for name, cell, _ in result_rows(result)}[
        "AUC"
    ] == "undefined: only positives"
    assert (tmp_path / "eval" / "confusion.png").exists()


def test_unreadable_picture_does_not_cost_the_evaluation(tmp_path):
    def load(path):
        raise DataError(f"{path}: gone")

    result = write(tmp_path, load_image=load)
    assert {m["thumbnail"] for m in result["mistakes"]} == {None}
    assert "plain.png: gone" in result["mistakes"][0]["thumbnail_error"]


def test_three_classes_are_written(tmp_path):
    """One score column per class; the table says that rates are macro averages."""
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], 8)
    result = write(tmp_path, labels=labels, probabilities_NK=scores, classes=["a", "b", "c"])
    expected = classification_metrics(labels, scores)
    assert result["image"]["auc"] == expected.auc
    assert result["positive_class"] is None
    assert "F1, macro" in [row[0] for row in result_rows(result)]
    with (tmp_path / "eval" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score_c"]) for row in rows] == scores[:, 2].tolist()
    assert (tmp_path / "eval" / "roc.png").exists()


def test_split_without_images_is_rejected(tmp_path):
    with pytest.raises(DataError, match="has no images"):
        write(tmp_path, labels=np.zeros(0, int), probabilities=np.zeros(0), paths=[])
    assert not (tmp_path / "eval").exists()
