"""Metrics against scikit-learn and cases by hand, intervals, patients, runs, files of eval/."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier

from sssd_fast.data.index import check_data, positive_class
from sssd_fast.data.split import split_random
from sssd_fast.errors import DataError
from sssd_fast.evaluation.baselines import MAJORITY, NEAREST, baseline_scores
from sssd_fast.evaluation.evaluate import result_table, write_evaluation
from sssd_fast.evaluation.metrics import (
    RATES,
    UNDEFINED,
    aggregate_by_patient,
    aggregate_runs,
    best_threshold,
    bootstrap_intervals,
    calibration,
    classification_metrics,
)
from sssd_fast.evaluation.plots import PLOTS, rates_over_thresholds
from sssd_fast.reproduce.public_sets import COVID_CT


def make_binary(n=300, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    scores = 1 / (1 + np.exp(-(1.2 * (labels - 0.5) + rng.normal(size=n))))
    return labels, np.round(scores, 1) if ties else scores


def from_confusion(tp, fn, fp, tn):
    labels = np.repeat([1, 1, 0, 0], [tp, fn, fp, tn])
    return labels, np.repeat([0.9, 0.1, 0.9, 0.1], [tp, fn, fp, tn])


@pytest.mark.parametrize("ties", [False, True])
def test_rates_of_two_classes_equal_their_definitions(ties):
    """scikit-learn's rates; AUC by all pairs, a tie counts a half (a wrong tie rule shifts it)."""
    labels, scores = make_binary(ties=ties)
    predicted = (scores >= 0.5).astype(int)
    gaps = scores[labels == 1][:, None] - scores[labels == 0][None]
    expected = {
        "n": 300,
        "accuracy": sk.accuracy_score(labels, predicted),
        "sensitivity": sk.recall_score(labels, predicted),
        "specificity": sk.recall_score(labels, predicted, pos_label=0),
        "precision": sk.precision_score(labels, predicted),
        "f1": sk.f1_score(labels, predicted),
        "auc": ((gaps > 0) + 0.5 * (gaps == 0)).mean(),
        "prevalence": labels.mean(),
        "threshold": 0.5,
    }
    got = classification_metrics(labels, scores)
    assert got.pop("confusion") == sk.confusion_matrix(labels, predicted).tolist()
    assert got.pop("undefined") == {}
    assert got == pytest.approx(expected, abs=1e-12)


def test_rates_of_three_classes_equal_scikit_learn():
    """Macro averages and one-vs-rest AUC; unequal class sizes, so that micro and macro differ."""
    rng = np.random.default_rng(1)
    labels = rng.choice(3, size=200, p=[0.6, 0.3, 0.1])
    logits = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[labels]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = scores.argmax(axis=1)
    got = classification_metrics(labels, scores)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "sensitivity": sk.recall_score(labels, predicted, average="macro"),
        "specificity": np.mean([sk.recall_score(labels != k, predicted != k) for k in range(3)]),
        "precision": sk.precision_score(labels, predicted, average="macro"),
        "f1": sk.f1_score(labels, predicted, average="macro"),
        "auc": sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro"),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert got["confusion"] == sk.confusion_matrix(labels, predicted).tolist()


def test_published_confusion_gives_the_published_rates():
    """COVID-CT in the SSSD-COVID paper: 81.76 accuracy, 81.82 precision, 78.26 recall, 80.00 F1."""
    got = classification_metrics(*from_confusion(tp=54, fn=15, fp=12, tn=67))
    published = COVID_CT.published["paper, no external data"]
    rates = {name: rate for name, rate in published.items() if name != "auc"}
    assert len(rates) == 4
    assert {name: round(got[name], 4) for name in rates} == rates
    assert got["confusion"] == [[67, 12], [15, 54]]


@pytest.mark.parametrize(
    ("labels", "scores", "undefined"),
    [
        ([1, 1, 1], [0.9, 0.2, 0.6], "specificity auc"),
        ([0, 0], [0.1, 0.9], "sensitivity auc"),
        ([0, 1], [0.1, 0.2], "precision"),
        ([0, 0], [0.1, 0.2], "sensitivity precision f1 auc"),
        ([], [], " ".join(RATES)),
        ([0, 0, 2], np.eye(3)[[0, 0, 2]], "sensitivity precision f1 auc"),
    ],
)
def test_undefined_rates_are_none_with_a_reason(labels, scores, undefined):
    """A rate with denominator zero is neither a crash nor a 0 that looks like a result."""
    got = classification_metrics(np.array(labels, dtype=int), scores)
    assert got["undefined"] == {name: UNDEFINED[name] for name in undefined.split()}
    assert {name for name in RATES if got[name] is None} == set(undefined.split())


def test_metrics_reject_scores_that_are_not_finite():
    for scores in ([0.1, float("nan")], [[0.1, 0.9], [float("inf"), 0.2]]):
        with pytest.raises(DataError, match="1 of 2 rows are not finite, the first is row 1"):
            classification_metrics([0, 1], scores)


def bounds(interval):
    return interval["low"], interval["high"]


def test_bootstrap_equals_a_loop_over_the_draws():
    """The vectorised resampling gives the percentiles of scikit-learn's values of each resample."""
    labels, scores = make_binary(60, seed=3, ties=True)
    got = bootstrap_intervals(labels, scores, n=200, seed=5)
    draws = np.random.default_rng(5).integers(0, 60, size=(200, 60))
    aucs = [sk.roc_auc_score(labels[rows], scores[rows]) for rows in draws]
    negative = [(labels[rows] == 0, scores[rows] < 0.5) for rows in draws]
    specificities = [(truth & found).sum() / truth.sum() for truth, found in negative]
    for name, values in (("auc", aucs), ("specificity", specificities)):
        low, high = np.percentile(values, [2.5, 97.5])
        wanted = {"low": low, "high": high, "skipped": 0}
        assert got[name] == pytest.approx(wanted, abs=1e-12)
    assert got == bootstrap_intervals(labels, scores, n=200, seed=5)
    assert got != bootstrap_intervals(labels, scores, n=200, seed=6)


def test_bootstrap_by_patient_is_wider():
    """Ten equal images per patient hold the information of one: the patients' width is right."""
    labels, scores = make_binary(40, seed=2)
    repeated = [np.repeat(values, 10) for values in (labels, scores)]
    patients = [str(p) for p in np.repeat(np.arange(40), 10)]
    low, high = bounds(bootstrap_intervals(*repeated, n=1000, seed=0)["auc"])
    grouped = bounds(bootstrap_intervals(*repeated, n=1000, seed=0, groups=patients)["auc"])
    assert grouped[1] - grouped[0] > 2 * (high - low)
    alone = bounds(bootstrap_intervals(labels, scores, n=1000, seed=0)["auc"])
    assert grouped == pytest.approx(alone, abs=1e-12)


def test_bootstrap_counts_resamples_without_auc():
    """Resamples of one class (probability 2 * 0.5^4) are skipped for AUC, not for accuracy."""
    got = bootstrap_intervals([0, 0, 1, 1], [0.2, 0.6, 0.4, 0.9], n=2000, seed=0)
    assert got["auc"]["skipped"] == pytest.approx(2000 / 8, abs=60)
    assert got["accuracy"]["skipped"] == 0


def test_bootstrap_without_two_groups_or_a_value_has_no_interval():
    none = {"low": None, "high": None, "skipped": 10}
    for labels, groups in (([0, 1], ["a", "a"]), ([], None), ([1, 1, 1], None)):
        got = bootstrap_intervals(labels, [0.9] * len(labels), n=10, seed=0, groups=groups)
        assert got["auc"] == none
        assert (got["accuracy"] == none) == (len(labels) != 3)


def test_patient_scores_are_means_and_mixed_labels_are_counted():
    """Mixed labels: positive if any image is; with more classes the most frequent label."""
    binary, three = [0.9, 0.2, 0.5, 0.4, 0.3], np.eye(3)[[2, 2, 1]]
    for labels, scores, patients, wanted, means, mixed in (
        ([1, 0, 1, 0, 1], binary, ["b", "a", "b", "a", ""], [0, 1], [0.3, 0.7], 0),
        ([0, 0, 1, 0], [0.1, 0.2, 0.9, 0.1], ["p", "p", "p", "q"], [1, 0], [0.4, 0.1], 1),
        ([2, 2, 1], three, ["p", "p", "p"], [2], [[0, 1 / 3, 2 / 3]], 1),
    ):
        got = aggregate_by_patient(labels, scores, patients)
        assert (got[0].tolist(), got[2]) == (wanted, mixed)
        assert got[1] == pytest.approx(np.array(means))


def test_runs_give_mean_and_sample_deviation():
    """n - 1 in the deviation; a run with an undefined rate is not counted for that rate."""
    inputs = [from_confusion(tp, 10 - tp, 5, 5) for tp in (6, 8, 10)]
    runs = [classification_metrics(*one) for one in [*inputs, ([0], [0.1])]]
    got = aggregate_runs(runs)
    assert got["sensitivity"] == pytest.approx({"mean": 0.8, "deviation": 0.2, "n": 3})
    assert got["accuracy"]["n"] == 4
    assert aggregate_runs(runs[:1])["auc"]["deviation"] is None


def test_positive_class_is_the_disease():
    """Alphabetical folder order must not swap sensitivity and specificity."""
    first = ["CT_COVID CT_NonCOVID", "COVID non-COVID", "synthetic_covid synthetic_normal"]
    second = ["Normal Abnormal", "no_finding nodule", "a b"]
    found = [positive_class(names.split()) for names in (*first, *second)]
    assert found == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("classes", [2, 3])
def test_calibration_equals_its_definition(classes):
    """Bins by a loop, Brier score by scikit-learn; a perfect score of 1 is in the last bin."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, classes, 200)
    scores = rng.dirichlet(np.ones(classes), 200)
    scores[0] = np.eye(classes)[labels[0]]
    given = scores[:, 1] if classes == 2 else scores
    got = calibration(labels, given)
    score = scores[:, 1] if classes == 2 else scores.max(1)
    hit = labels == (1 if classes == 2 else scores.argmax(1))
    ece = 0.0
    for low in np.arange(10) / 10:
        inside = (score >= low) & ((score < low + 0.1) | ((low == 0.9) & (score == 1)))
        ece += abs(score[inside].sum() - hit[inside].sum()) / 200
    assert got["ece"] == pytest.approx(ece)
    brier = sk.brier_score_loss(labels, scores, scale_by_half=False) if classes == 3 else None
    brier = sk.brier_score_loss(labels, given) if classes == 2 else brier
    assert got["brier"] == pytest.approx(brier)
    assert sum(entry["n"] for entry in got["bins"]) == 200


def test_rates_over_thresholds_equal_those_of_each_threshold():
    labels, scores = make_binary(80, ties=True)
    grid, rates = rates_over_thresholds(labels, scores)
    for place in (0, 57, 100, 120, 200):
        wanted = classification_metrics(labels, scores, grid[place])
        assert rates["sensitivity"][place] == pytest.approx(wanted["sensitivity"])
        assert rates["specificity"][place] == pytest.approx(wanted["specificity"])
        assert rates["F1"][place] == pytest.approx(wanted["f1"])


@pytest.mark.parametrize("seed", range(8))
def test_best_threshold_maximizes_sensitivity_plus_specificity(seed):
    """Against every threshold of a fine grid; scores with ties, and scores that all are low."""
    random = np.random.default_rng(seed)
    labels = np.arange(40) % 2
    scores = np.round(random.random(40) * 0.3 + 0.1 * labels * (seed % 3), seed % 4 + 1)

    def gain(threshold):
        rates = classification_metrics(labels, scores, threshold)
        return rates["sensitivity"] + rates["specificity"]

    found = best_threshold(labels, scores)
    best = max(gain(threshold) for threshold in np.linspace(0, 1, 20001))
    assert gain(found) == pytest.approx(best)
    assert found not in scores


def test_best_threshold_of_scores_without_errors_is_between_the_classes():
    assert best_threshold([0, 1, 0, 1], [0.1, 0.3, 0.2, 0.9]) == pytest.approx(0.25)
    assert best_threshold([1, 1], [0.1, 0.3]) == 0.5


@pytest.mark.parametrize(("right", "said"), [(7, True), (8, False)])
def test_accuracy_below_the_nearest_neighbour_is_a_note(tmp_path, right, said):
    """The nearest neighbour is right for 8 of 10 images."""

    def scores(correct):
        return np.array([[0.9, 0.1] if i < correct else [0.1, 0.9] for i in range(10)])

    result = write_evaluation(
        tmp_path,
        labels=np.zeros(10, dtype=int),
        probabilities=scores(right),
        paths=[f"{i}.png" for i in range(10)],
        classes=["negative", "positive"],
        split="test",
        load_image=lambda path: np.zeros((8, 8), dtype=np.uint8),
        baselines={NEAREST: scores(8)},
        positive=1,
        resamples=100,
    )
    below = [note for note in result["notes"] if "70.0 %, is below" in note and "80.0 %" in note]
    assert len(below) == said


def test_baselines_of_a_split(slices):
    """Nearest neighbour as scikit-learn's; validation images are known only to the test split."""
    index = check_data(slices)
    split = split_random(index, 0.34, 1, val=0.25)
    pixels = np.stack([np.asarray(Image.open(index.file(i))).ravel() / 255 for i in range(48)])
    labels = np.array(index.labels)
    for name, known in (("test", split.train + split.val), ("val", split.train)):
        found = baseline_scores(index, split, name)
        model = KNeighborsClassifier(1, algorithm="brute").fit(pixels[known], labels[known])
        assert found[NEAREST].argmax(1).tolist() == model.predict(pixels[split.ids(name)]).tolist()
        most = np.bincount(labels[known]).argmax()
        assert found[MAJORITY].argmax(1).tolist() == [most] * len(split.ids(name))
    assert baseline_scores(index, split, "train") == {}


NAMES = ["a, b.png", 'quo"te.png', "line\nbreak.png", "carriage\rreturn.png"]
NAMES += ["50%(1).png", "=1+1.png", "plain.png", "ünï.png"]


def write(folder, **options):
    first = np.array([0.9, 0.8, 0.1, 1 / 3, 0.2, 0.3, 0.95, 0.4])
    given = {
        "labels": np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        "probabilities": np.stack([first, 1 - first], axis=1),
        "paths": NAMES,
        "classes": ["CT_COVID", "CT_NonCOVID"],
        "positive": 0,
        "split": "test",
        "resamples": 100,
        "load_image": lambda path: np.full((300, 200), 90, dtype=np.uint8),
    }
    return write_evaluation(folder, **(given | options))


def predictions(folder):
    with (folder / "eval/test/predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_written_files_agree(tmp_path):
    """COVID (class 0) is positive; predictions.csv holds every odd name and every digit."""
    result = write(tmp_path, patients=["p", "p", "q", "q", "r", "r", "s", ""])
    stored = json.loads((tmp_path / "eval/test/metrics.json").read_text())
    assert stored == result
    assert stored["positive_class"] == "CT_COVID"
    assert stored["image"]["confusion"] == [[3, 1], [2, 2]]  # negative first: NonCOVID, then COVID
    assert stored["image"]["sensitivity"] == 0.5
    assert stored["patient"]["n"] == 4
    assert stored["bootstrap"]["unit"] == "patient"
    assert any("1 images name no patient" in note for note in stored["notes"])
    rows = predictions(tmp_path)
    assert [row["path"] for row in rows] == NAMES
    assert list(rows[0]) == ["path", "label", "score", "prediction", "patient", "split"]
    assert float(rows[3]["score"]) == 1 / 3
    assert [row["prediction"] for row in rows[1:3]] == ["CT_COVID", "CT_NonCOVID"]
    worst = [(m["path"], m["score"]) for m in stored["mistakes"]]
    assert worst == [("plain.png", 0.95), (NAMES[2], 0.1), (NAMES[3], 1 / 3)]
    # two of each class, nearest to the median confidence: of NonCOVID 0.2, which scores 0.3 has
    right = [(m["path"], m["label"]) for m in stored["correct"]]
    assert right[0] == (NAMES[5], "CT_NonCOVID")
    assert right[2:] == [(NAMES[0], "CT_COVID"), (NAMES[1], "CT_COVID")]
    pictures = [m["thumbnail"] for m in stored["mistakes"] + stored["correct"]]
    plots = [f"eval/test/{name}.png" for name in PLOTS]
    for name in (*pictures, *plots):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_evaluations_of_two_splits_are_kept(tmp_path):
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write(tmp_path, split="val", labels=np.arange(8) % 2)
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((tmp_path / "eval/val/metrics.json").read_text())["split"] == "val"


def test_one_class_split_leaves_a_note_and_no_stale_roc(tmp_path):
    write(tmp_path)
    result = write(tmp_path, labels=np.zeros(8, dtype=int))
    found = {path.stem for path in (tmp_path / "eval/test").glob("*.png")}
    assert found == {"confusion", "scores", "calibration"}
    assert result["notes"] == ["No ROC curve: images of one class only."]
    assert ["AUC", "undefined: images of one class only"] in result_table(result)[1]


def test_evaluation_survives_an_unreadable_image(tmp_path):
    def load(path):
        raise DataError(f"{path}: gone")

    result = write(tmp_path, load_image=load)
    assert {m["thumbnail"] for m in result["mistakes"]} == {None}
    assert "plain.png: gone" in result["mistakes"][0]["thumbnail_error"]


def test_three_classes_are_written(tmp_path):
    """One score column per class; the table says that rates are macro averages."""
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    scores = np.random.default_rng(0).dirichlet([1, 1, 1], 8)
    changes = {"labels": labels, "probabilities": scores, "classes": ["a", "b", "c"]}
    result = write(tmp_path, positive=None, **changes)
    assert result["image"]["auc"] == classification_metrics(labels, scores)["auc"]
    assert result["positive_class"] is None
    assert "F1, macro" in [row[0] for row in result_table(result)[1]]
    assert [float(row["score_c"]) for row in predictions(tmp_path)] == scores[:, 2].tolist()
    assert (tmp_path / "eval/test/roc.png").exists()
