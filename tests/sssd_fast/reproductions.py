"""A made-up results.json of `sssd-fast reproduce`, for tests of what reads it; never committed as a result."""

from __future__ import annotations

from typing import Any

from sssd_fast.reproduce.table import SCHEMA


def made_up(**changes: Any) -> dict[str, Any]:
    """Accuracies 90 and 80 (sssd), 70 and 80 (mae) of seeds 0 and 1."""
    rates = {"sensitivity": 0.5, "specificity": 0.5, "precision": 0.5, "f1": 0.5, "auc": 0.5}
    nearest = {**rates, "accuracy": 0.6, "confusion": [[3, 2], [2, 3]]}

    def cell(method: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {
            "protocol": "random", "seed": seed, "method": method, "variant": [], "part": "test", "departures": [],
            "pretrain_s": 60.0, "finetune_s": 30.0, "counts": {"train": 7, "val": 1, "test": 10},
            "image": {"accuracy": accuracy, **rates}, "nearest": nearest,
        }  # fmt: skip

    return {
        "dataset": "sars-cov-2-ct",
        "title": "SARS-CoV-2 CT",
        "part": "test",
        "planned": 5,
        "schema": SCHEMA,
        "settings": {"model": {"name": "small", "image_size": [64, 96]}},
        "commands": ["sssd-fast reproduce"],
        "published": {"paper, no external data": {"accuracy": 0.9778}},
        "machines": [
            {
                "type": "cuda",
                "device": "a card",
                "torch": "2",
                "python": "3",
                "commit": "c",
                "modified": True,
                "date": "d",
            }
        ],
        "cells": [
            cell("mae", 1, 0.8),
            cell("mae", 0, 0.7),
            cell("sssd", 0, 0.9),
            cell("sssd", 1, 0.8),
        ],
        **changes,
    }
