"""What a run folder holds, read so that nothing missing or damaged stops the reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = {
    "pretrain": "Pre-training",
    "finetune": "Fine-tuning",
    "probe": "Linear probe",
    "evaluate": "Evaluation",
}
EVALUATION_KEYS = {
    "split",
    "classes",
    "positive_class",
    "bootstrap",
    "image",
    "patient",
    "mistakes",
    "num_mistakes",
    "notes",
}


@dataclass
class RunFiles:
    """What was found in one run folder; `problems` names files that could not be read."""

    path: Path
    name: str
    stage: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    env: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def synthetic(self) -> bool:
        classes = self.data.get("classes") or self.evaluation.get("classes") or []
        named = bool(classes) and all(str(name).startswith("synthetic") for name in classes)
        named_source = section(self.config, "data").get("source") == "synthetic"
        return named_source or bool(self.data.get("synthetic")) or named

    @property
    def title(self) -> str:
        """Stage, and the folder's name where it says more than the stage: "Fine-tuning: seed-0"."""
        stage, names = STAGES.get(self.stage, "Run"), self.name.split("/")
        names = names[:-1] if names[-1] == self.stage else names
        return ": ".join(filter(None, (stage, "/".join(names))))

    def trained(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind") == "train"]


def read_run(folder: str | Path, name: str = "") -> RunFiles:
    """Everything a report needs from a run folder; unreadable files are listed in `problems`. `name` is what to call it."""
    import yaml

    run = RunFiles(Path(folder), name or Path(folder).resolve().name)
    run.config = _read(run, "config.yaml", yaml.safe_load, yaml.YAMLError)
    run.env = _read(run, "env.json", json.loads, ValueError)
    run.data = _read(run, "data.json", json.loads, ValueError)
    run.evaluation = _read(run, "eval/metrics.json", json.loads, ValueError)
    if run.evaluation and (lacking := EVALUATION_KEYS - run.evaluation.keys()):
        run.problems.append(f"eval/metrics.json lacks {', '.join(sorted(lacking))}; evaluate again")
        run.evaluation = {}
    command = run.path / "command.txt"
    run.command = (
        command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else ""
    )
    metrics, broken = run.path / "metrics.jsonl", 0
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                run.records.append(record)
            else:
                broken += bool(line.strip())
    if broken:
        run.problems.append(f"metrics.jsonl: {broken} unreadable line{'s' * (broken > 1)} left out")
    run.stage = _stage(run)
    return run


def _stage(run: RunFiles) -> str:
    """By the folder's name ("finetune", "finetune-seed1"), else by the command."""
    words = [re.split(r"[^a-z]", run.path.resolve().name.lower())[0], *run.command.split()[1:2]]
    return next((word for word in words if word in STAGES), "")


def _read(run: RunFiles, name: str, parse: Any, error: type[Exception]) -> dict[str, Any]:
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, error) as reason:
        run.problems.append(f"{name} could not be read: {reason}")
        return {}
    if not isinstance(content, dict):
        run.problems.append(
            f"{name} holds a {type(content).__name__}, not a table of names and values"
        )
        return {}
    return content


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
