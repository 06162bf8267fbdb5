"""An invented results.json of `sssd-fast reproduce`, for tests that read it; not a measurement."""

from __future__ import annotations

from typing import Any

from sssd_fast.reproduce.table import SCHEMA

MACHINE = {
    "type": "cuda",
    "device": "a card",
    "torch": "2",
    "python": "3",
    "commit": "c",
    "modified": True,
    "date": "d",
}


def made_up(**changes: Any) -> dict[str, Any]:
    """Accuracies 90 and 80 (sssd), 70 and 80 (mae) of seeds 0 and 1."""
    rates = dict.fromkeys(("sensitivity", "specificity", "precision", "f1", "auc"), 0.5)

    def cell(method: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {
            "protocol": "random",
            "seed": seed,
            "method": method,
            "variant": [],
            "split": "test",
            "departures": [],
            "pretrain_s": 60.0,
            "finetune_s": 30.0,
            "counts": {"train": 7, "val": 1, "test": 10},
            "image": {"accuracy": accuracy, **rates},
            "nearest": {**rates, "accuracy": 0.6, "confusion": [[3, 2], [2, 3]]},
        }

    cells = [cell("mae", 1, 0.8), cell("mae", 0, 0.7), cell("sssd", 0, 0.9), cell("sssd", 1, 0.8)]
    return {
        "dataset": "sars-cov-2-ct",
        "title": "SARS-CoV-2 CT",
        "split": "test",
        "planned": 5,
        "schema": SCHEMA,
        "settings": {"model": {"name": "small", "image_size": [64, 96]}},
        "commands": ["sssd-fast reproduce"],
        "published": {"paper, no external data": {"accuracy": 0.9778}},
        "machines": [MACHINE],
        "cells": cells,
        **changes,
    }
