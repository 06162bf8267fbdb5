"""The record of a split: which images are used for training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass

from sssd_fast.data.manifest import SPLIT_NAMES
from sssd_fast.errors import DataError


@dataclass(frozen=True)
class Split:
    """Record numbers of an index, without overlap. val and test may be empty; train may not."""

    name: str
    train: list[int]
    val: list[int]
    test: list[int]
    protocol: str  # one sentence for the report

    def __post_init__(self) -> None:
        every = [*self.train, *self.val, *self.test]
        twice = len(every) - len(set(every))
        if twice:
            raise DataError(f"split {self.name}: {twice} images are listed twice")
        if not self.train:
            raise DataError(f"split {self.name}: train is empty")

    def ids(self, name: str) -> list[int]:
        """Record numbers of train, val or test."""
        if name not in SPLIT_NAMES:
            raise DataError(f"no split {name!r}; the splits are {', '.join(SPLIT_NAMES)}")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def split_of(self) -> dict[int, str]:
        """Record number -> train, val or test."""
        return {i: name for name in SPLIT_NAMES for i in self.ids(name)}
