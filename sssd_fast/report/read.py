"""Read a run folder for a report. Missing or damaged files are listed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sssd_fast.run.metrics_log import read_metrics

STAGES = {
    "pretrain": "Pre-training",
    "finetune": "Fine-tuning",
    "probe": "Linear probe",
    "evaluate": "Evaluation",
}
# the first that exists is shown
EVALUATIONS = ("eval/test", "eval/val", "eval/train")
# keys of metrics.json that the report needs
NEEDED = [
    "split",
    "classes",
    "positive_class",
    "bootstrap",
    "image",
    "patient",
    "notes",
    "mistakes",
    "num_mistakes",
]


@dataclass
class RunFiles:
    """Content of one run folder; `problems` names files that could not be read."""

    path: Path
    name: str
    stage: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    env: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluation_folder: Path = Path()
    problems: list[str] = field(default_factory=list)

    @property
    def synthetic(self) -> bool:
        """Any sign is enough: data.json, the source in the configuration, or the class names."""
        classes = self.data.get("classes") or self.evaluation.get("classes") or []
        named = bool(classes) and all(str(name).startswith("synthetic") for name in classes)
        source = section(self.config, "data").get("source")
        return named or bool(self.data.get("synthetic")) or source == "synthetic"

    @property
    def title(self) -> str:
        """Stage, and the folder's name if it adds something: "Fine-tuning: seed-0"."""
        names = self.name.split("/")
        names = names[:-1] if names[-1] == self.stage else names
        return ": ".join(filter(None, (STAGES.get(self.stage, "Run"), "/".join(names))))

    def values(self, key: str) -> list[float]:
        """The numbers recorded under `key` while training."""
        found = [record.get(key) for record in self.records if record.get("kind") == "train"]
        return [float(value) for value in found if isinstance(value, (int, float))]


def read_run(folder: Path, name: str) -> RunFiles:
    """Everything that a report needs; `name` is the folder's name in the report."""
    run = RunFiles(folder, name)
    run.config = _read(run, "config.yaml")
    run.env = _read(run, "env.json")
    run.data = _read(run, "data.json")
    for place in EVALUATIONS:
        if not run.evaluation:
            run.evaluation = _read(run, f"{place}/metrics.json")
            run.evaluation_folder = folder / place
            missing = [key for key in NEEDED if key not in run.evaluation]
            if run.evaluation and missing:
                again = f"write it again with: sssd-fast evaluate {shlex.quote(str(folder))}"
                what = f"{place}/metrics.json lacks {', '.join(missing)}; {again}"
                run.problems.append(f"{what} --split {Path(place).name}")
                run.evaluation = {}
    command, records = folder / "command.txt", folder / "metrics.jsonl"
    if command.is_file():
        run.command = command.read_text(encoding="utf-8", errors="replace").strip()
    run.records = read_metrics(folder) if records.is_file() else []
    # by the folder's name ("finetune", "finetune-seed1"), else by the command
    words = [re.split(r"[^a-z]", folder.resolve().name.lower())[0], *run.command.split()[1:2]]
    run.stage = next((word for word in words if word in STAGES), "")
    return run


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a configuration, empty if it is missing or damaged."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _read(run: RunFiles, name: str) -> dict[str, Any]:
    import yaml

    path = run.path / name
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as reason:
        run.problems.append(f"{name} could not be read: {reason}")
        return {}
    if isinstance(content, dict):
        return content
    run.problems.append(f"{name} holds a {type(content).__name__}, not a table of names and values")
    return {}
