"""The positive class."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sssd_fast.errors import DataError


def positive_class(classes: Sequence[str]) -> int:
    """Index of the class that sensitivity is about, for two classes.

    If exactly one name is a negation (non..., no..., normal, negative, healthy, control), the other
    class, else index 1. "CT_COVID" sorts before "CT_NonCOVID", so index 1 alone would swap
    sensitivity and specificity.
    """
    if len(classes) != 2:
        raise DataError(f"a positive class needs 2 classes, got {len(classes)}: {list(classes)}")
    negative = [
        re.search(
            r"(?i)(^|[^a-z])(non?($|[^a-z]|covid)|normal|neg|healthy|control|benign|uninfected)",
            name,
        )
        for name in classes
    ]
    return 0 if negative[1] and not negative[0] else 1
