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
from numpy.typing import ArrayLike

from sssd_fast.data.images import decode_image
from sssd_fast.data.index import DataIndex
from sssd_fast.errors import DataError
from sssd_fast.evaluation import metrics, pictures
from sssd_fast.evaluation.baselines import NEAREST, baseline_scores
from sssd_fast.evaluation.metrics import Floats, Ints
from sssd_fast.evaluation.pictures import Bytes
from sssd_fast.evaluation.plots import PLOTS, write_plots
from sssd_fast.evaluation.predict import Trained, load_trained, predict
from sssd_fast.loaders.prepare import load_data, make_loader, positive_label, require_threshold
from sssd_fast.run.device import autocast
from sssd_fast.run.files import atomic_write_bytes, atomic_write_text
from sssd_fast.run.folder import Run

MAX_MISTAKES = 8
MAX_CORRECT = 4  # all classes together


def evaluate_run(run: Run, split: str = "test") -> dict[str, Any]:
    """Evaluate the best checkpoint on a split; writes eval/SPLIT/ and prints a table."""
    trained, config = load_trained(run.out, run.world.device), run.config
    index, splits = load_data(run)
    ids = splits.ids(split)
    if not ids:
        raise DataError(
            f"the data of {run.out} have no {split} images; choose a --split that data.json lists"
        )
    require_threshold(config, splits)
    classes, crops = trained.classes, config.evaluate.crops
    positive = positive_label(config, index) if len(classes) == 2 else None
    notes = [] if crops == 1 else [f"Scores are means over {crops} crops of each image."]
    threshold = config.evaluate.threshold
    if threshold == "auto":
        threshold, chosen = 0.5, "not used: more than two classes"
        if positive is not None:
            val_labels, val_scores = _predict(run, trained, index, splits.val)
            threshold = metrics.best_threshold(val_labels == positive, val_scores[:, positive])
            chosen = f"{threshold:.3g}, that of the highest sensitivity + specificity of the "
            chosen += f"{len(val_labels)} validation images"
        notes.append(f"Threshold {chosen} (evaluate.threshold is auto).")
    labels, scores = _predict(run, trained, index, ids)
    if not run.world.main:
        return {}
    records = [index.records[i] for i in ids]
    baselines: dict[str, Floats] = {}
    try:
        with run.console.doing("nearest neighbours"):
            baselines = baseline_scores(index, splits, split)
    except (OSError, DataError) as error:
        # an image that was deleted meanwhile must not cost the evaluation
        notes.append(f"No baselines: {error}.")

    def attend(rows: Sequence[int]) -> list[Bytes]:
        shown = [ids[row] for row in rows]
        first = make_loader(run, index, shown, batch_size=len(shown), shard=False)
        images, encoder = next(iter(first.epoch(0))).images, trained.model.encoder
        maps = encoder.attention_maps(images, cls=trained.model.pool == "cls")
        return pictures.overlays(images, maps.mean(1), encoder.grid)

    result = write_evaluation(
        run.out,
        labels=labels,
        probabilities=scores,
        paths=[r.path for r in records],
        classes=classes,
        split=split,
        load_image=lambda path: decode_image(index.root / path, index.grey_range),
        attend=attend,
        baselines=baselines,
        patients=[r.patient for r in records],
        positive=positive,
        threshold=threshold,
        seed=config.seed,
        resamples=config.evaluate.bootstrap,
        notes=notes,
    )
    header, rows = result_table(result)
    title = f"{len(ids)} {split} images, {trained.path.name}; 95 % intervals"
    run.console.table(title, header, rows)
    for note in result["notes"]:
        run.console.info(note)
    return result


def _predict(
    run: Run, trained: Trained, index: DataIndex, ids: Sequence[int]
) -> tuple[Ints, Floats]:
    """Labels [N] and scores [N, K] of the images `ids`."""
    settings = run.config.evaluate
    loader = make_loader(run, index, ids, batch_size=settings.batch_size, shard=True)
    context = autocast(run.precision, run.world.device)
    classes = len(trained.classes)
    return predict(trained.model, loader, ids, classes, run.world, context, settings.crops)


def write_evaluation(
    folder: Path,
    *,
    labels: ArrayLike,
    probabilities: ArrayLike,
    paths: Sequence[str],
    classes: Sequence[str],
    split: str,
    load_image: Callable[[str], Bytes],
    attend: Callable[[Sequence[int]], Sequence[Bytes]] | None = None,
    baselines: Mapping[str, Floats] | None = None,
    patients: Sequence[str | None] | None = None,
    positive: int | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    resamples: int = 2000,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the files of eval/SPLIT/ in the run folder; returns the content of metrics.json.

    Args:
        labels, probabilities: class indices [N], scores [N, K].
        positive: index of the positive class of two, else None.
        load_image: reads a path as [H, W] or [H, W, 3] uint8, for the pictures of examples.
        attend: rows of images -> the images with the attention of the last block, [h, w, 3] uint8.
        baselines: name -> scores [N, K] of the same images.

    Raises DataError for scores that are not finite.
    """
    labels_N, scores_NK = metrics.check_scores(labels, probabilities)
    names, out = list(classes), folder / "eval" / split
    binary = positive is not None
    if positive is not None:
        names = [classes[1 - positive], classes[positive]]
        labels_N = (labels_N == positive).astype(np.int64)

    def columns(scores_NK: Floats) -> Floats:
        return scores_NK if positive is None else scores_NK[:, positive]

    scores = columns(scores_NK)
    patients = list(patients or [None] * len(paths))
    grouped = any(patients)
    # an image without a patient is a group of one
    groups = [patient or row for row, patient in enumerate(patients)] if grouped else None

    def level(labels_N: Ints, scores_N: Floats, groups: list[Any] | None) -> dict[str, Any]:
        drawn = (resamples, seed, groups, threshold)
        intervals = metrics.bootstrap_intervals(labels_N, scores_N, *drawn)
        rates = metrics.classification_metrics(labels_N, scores_N, threshold)
        return {**rates, "intervals": intervals}

    image, patient_level = level(labels_N, scores, groups), None
    notes = list(notes)
    if grouped:
        patient_labels, patient_scores, mixed = metrics.aggregate_by_patient(
            labels_N, scores, patients
        )
        patient_level = level(patient_labels, patient_scores, None)
        if mixed:
            rule = "counted as positive" if binary else "given their most frequent label"
            notes.append(f"{mixed} patients have images of more than one class; they are {rule}.")
        if without := len(patients) - sum(map(bool, patients)):
            notes.append(f"{without} images name no patient; the per-patient results exclude them.")
    if image["auc"] is None:
        notes.append(f"No ROC curve: {image['undefined']['auc']}.")

    predicted_N = metrics.predict_classes(scores, threshold)
    worst, typical = _examples(labels_N, scores, predicted_N, threshold, len(names))
    unit = "patient" if grouped else "image"
    result: dict[str, Any] = {
        "split": split,
        "classes": names,
        "positive_class": names[1] if binary else None,
        "threshold": threshold if binary else None,
        "bootstrap": {"level": metrics.LEVEL, "resamples": resamples, "seed": seed, "unit": unit},
        "image": image,
        "patient": patient_level,
        "calibration": metrics.calibration(labels_N, scores),
        "baselines": {
            name: level(labels_N, columns(found_NK), groups)
            for name, found_NK in (baselines or {}).items()
        },
        "notes": notes,
        "num_mistakes": int((predicted_N != labels_N).sum()),
    }
    nearest = result["baselines"].get(NEAREST)
    if nearest is not None and image["accuracy"] < nearest["accuracy"]:
        notes.append(
            f"The accuracy, {100 * image['accuracy']:.1f} %, is below that of the {NEAREST} on 32 "
            f"x 32 pixels, {100 * nearest['accuracy']:.1f} %: this model has learned less than a "
            "comparison of pixels. Train longer, or see docs/recipes.md."
        )
    stale = [out / f"{name}.png" for name in PLOTS]
    for file in [*stale, *out.glob("mistakes/*.png"), *out.glob("correct/*.png")]:
        file.unlink(missing_ok=True)
    rows = [*worst, *typical]
    attention = dict(zip(rows, attend(rows), strict=True)) if attend and rows else {}
    for kind, chosen in (("mistakes", worst), ("correct", typical)):
        result[kind] = []
        for place, row in enumerate(chosen):
            picture = f"eval/{split}/{kind}/{place:02d}.png"
            example = {
                "path": paths[row].encode("utf-8", "replace").decode(),
                "label": names[labels_N[row]],
                "prediction": names[predicted_N[row]],
                "score": float(scores[row].max()),
                "thumbnail": picture,
            }
            try:
                shown = [load_image(paths[row]), *([attention[row]] if row in attention else [])]
                pictures.thumbnail(*shown, path=folder / picture)
            except (OSError, ValueError, DataError) as error:
                # an image that was deleted meanwhile must not cost the evaluation
                example |= {"thumbnail": None, "thumbnail_error": str(error)}
            result[kind].append(example)
    write_plots(out, labels_N, scores, result)
    _write_predictions(
        out / "predictions.csv", result, labels_N, scores, predicted_N, paths, patients
    )
    atomic_write_text(out / "metrics.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _examples(
    labels_N: Ints, scores: Floats, predicted_N: Ints, threshold: float, num_classes: int
) -> tuple[list[int], list[int]]:
    """Rows of the most confident mistakes, and of typical correct images: those of each class whose
    confidence is nearest to the median.
    """
    binary = scores.ndim == 1
    confidence_N = np.abs(scores - threshold) if binary else scores.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    worst = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:MAX_MISTAKES].tolist()
    typical: list[int] = []
    for label in range(num_classes):
        right = np.flatnonzero((predicted_N == labels_N) & (labels_N == label))
        distance = np.abs(confidence_N[right] - np.median(confidence_N[right])) if len(right) else 0
        order = np.argsort(distance, kind="stable") if len(right) else right
        typical += right[order][: max(1, MAX_CORRECT // num_classes)].tolist()
    return worst, typical[:MAX_CORRECT]


def _write_predictions(
    path: Path,
    result: Mapping[str, Any],
    labels_N: Ints,
    scores: Floats,
    predicted_N: Ints,
    paths: Sequence[str],
    patients: Sequence[str | None],
) -> None:
    names, binary, table = result["classes"], scores.ndim == 1, io.StringIO(newline="")
    # text is quoted (file names hold commas, quotes and line breaks); floats keep all digits
    writer = csv.writer(table, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    header = ["path", "label", "score", "prediction", "patient", "split"]
    writer.writerow(header + ([] if binary else [f"score_{name}" for name in names]))
    for row, name in enumerate(paths):
        label, prediction = names[labels_N[row]], names[predicted_N[row]]
        score, patient = float(scores[row].max()), patients[row] or ""
        cells = [name, label, score, prediction, patient, result["split"]]
        writer.writerow(cells + ([] if binary else scores[row].tolist()))
    atomic_write_bytes(path, table.getvalue().encode("utf-8", "surrogateescape"))


def result_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the metrics: per image, per patient if known, and of the baselines.

    A row is such as ["Accuracy", "81.8 % (75.0 to 87.8)", ...].
    """
    levels = {"per image": result["image"], "per patient": result["patient"]}
    # evaluations of earlier versions have no baselines
    levels |= result.get("baselines", {})
    known = {name: level for name, level in levels.items() if level is not None}
    rows = []
    for rate, name in metrics.RATES.items():
        macro = "" if result["positive_class"] or rate == "accuracy" else ", macro"
        rows.append([name + macro, *(rate_text(level, rate) for level in known.values())])
    return ["", *known], rows


def rate_text(level: Mapping[str, Any], rate: str) -> str:
    """A rate with its interval, such as "81.8 % (75.0 to 87.8)"."""
    if level[rate] is None:
        return f"undefined: {level['undefined'][rate]}"
    low, high = level["intervals"][rate]["low"], level["intervals"][rate]["high"]
    interval = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * level[rate]:.1f} %{interval}"
