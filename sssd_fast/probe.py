"""Linear probe: how well a frozen encoder separates the classes.

Features are computed once without augmentation and standardised. scikit-learn's logistic regression
is fitted on the training split, and the penalty with the lowest validation loss is taken. The
result is folded into a Classifier's head, so that `evaluate`, `predict` and `export` treat a probe
like a fine-tuned model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sssd_fast.config import to_dict
from sssd_fast.errors import ConfigError
from sssd_fast.evaluation.predict import outputs
from sssd_fast.loaders.prepare import make_loader, prepare_data
from sssd_fast.model import Classifier
from sssd_fast.run.device import autocast
from sssd_fast.run.folder import Run
from sssd_fast.weights.files import Norm
from sssd_fast.weights.load import load_into


def probe(run: Run, init: str, norm: Norm | None = None) -> dict[str, float]:
    """Fits the probe on the encoder in `init` and saves it; returns its validation metrics."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, log_loss

    if run.world.size > 1:
        raise ConfigError("probe runs in one process; start it without torchrun")
    index, split = prepare_data(run)
    config, settings = run.config, run.config.probe
    model = Classifier(config.model, len(index.classes), settings.pool).to(run.world.device)
    run.console.info(load_into(model, init, source_norm=norm).summary)
    run.accept()
    model.eval()
    width, context = model.head.in_features, autocast(run.precision, run.world.device)
    x, y = {}, {}
    for name in ("train", "val"):
        ids = split.ids(name)
        if ids:
            loader = make_loader(run, index, ids, batch_size=settings.batch_size)
            with run.console.announce(f"computing features of {len(ids)} {name} images"):
                labels, values = outputs(model.features, loader, ids, width, run.world, context)
            x[name], y[name] = values.numpy(), labels.numpy()
    mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
    x = {name: (values - mean) / std for name, values in x.items()}
    held_out = "val" if "val" in x else "train"
    rows, best = [], None
    for c in settings.inverse_penalties:
        regression = LogisticRegression(C=c, max_iter=5000, random_state=config.seed)
        fitted = regression.fit(x["train"], y["train"])
        p = fitted.predict_proba(x[held_out])
        loss = float(log_loss(y[held_out], p, labels=list(range(len(index.classes)))))
        accuracy = float(accuracy_score(y[held_out], p.argmax(1)))
        rows.append((f"{c:g}", f"{loss:.4f}", f"{accuracy:.4f}"))
        if best is None or loss < best[0]:
            best = loss, accuracy, c, fitted
    assert best is not None
    loss, accuracy, c, fitted = best
    run.console.table(
        f"linear probe, evaluated on the {held_out} split", ("C", "loss", "accuracy"), rows
    )
    _fold(model.head, fitted.coef_, fitted.intercept_, mean, std)
    state = {
        "task": "probe",
        "model": model.state_dict(),
        "config": to_dict(config),
        "classes": list(index.classes),
        "pool": settings.pool,
        "grey_range": index.grey_range,
        "inverse_penalty": c,
    }
    run.checkpoints.save(state, 1, best=True)
    metrics = {"loss": loss, "accuracy": accuracy}
    run.tracker.start(0)
    run.tracker.log("val", 1, epoch=1.0, **metrics)
    return metrics


def _fold(
    head: nn.Linear,
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
) -> None:
    """Sets the head so that softmax(head(f)) equals the regression's result for (f - mean) / std.

    For two classes scikit-learn has one row z; the head gets -z/2 and +z/2.
    """
    if len(bias) == 1:
        weight = np.concatenate([-weight, weight]) / 2
        bias = np.concatenate([-bias, bias]) / 2
    scaled = weight / std
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(scaled))
        head.bias.copy_(torch.from_numpy(bias - scaled @ mean))
