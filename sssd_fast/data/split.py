"""The record of a split: which images are in the train, validation and test split."""

from __future__ import annotations

from dataclasses import dataclass, field

from sssd_fast.data.manifest import SPLIT_NAMES
from sssd_fast.errors import DataError


@dataclass(frozen=True)
class Split:
    """Record numbers of an index, in three parts without overlap. val and test may be empty; train never is."""

    name: str
    train: list[int]
    val: list[int]
    test: list[int]
    protocol: str  # one sentence for the report
    seed: int | None = None
    unused: list[int] = field(default_factory=list)  # records that the protocol leaves out

    def __post_init__(self) -> None:
        every = [*self.train, *self.val, *self.test, *self.unused]
        if len(every) != len(set(every)):
            raise DataError(
                f"split {self.name}: {len(every) - len(set(every))} images lie in two parts"
            )
        if not self.train:
            raise DataError(f"split {self.name}: the train part is empty")

    def ids(self, name: str) -> list[int]:
        if name not in SPLIT_NAMES:
            raise DataError(f"no part {name!r}; the parts are {', '.join(SPLIT_NAMES)}")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def split_of(self) -> dict[int, str | None]:
        """Record number -> the part that holds it."""
        return {i: name for name in SPLIT_NAMES for i in self.ids(name)}
