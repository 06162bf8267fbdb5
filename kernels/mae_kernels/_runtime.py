"""Which implementation of an op runs: its Triton kernels or the plain torch reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "triton", "reference")

# every op, and why it has no Triton kernel (None: it has one)
NO_KERNEL: dict[str, str | None] = dict.fromkeys(
    (
        "random_masking",
        "gather_patches",
        "embed_patches",
        "restore_tokens",
        "masked_reconstruction_loss",
        "linear_reconstruction_loss",
        "distillation_loss",
        "sssd_loss",
        "attention",
    ),
    "this version has no kernel for this op",
)


def _from_environment() -> str:
    name = os.environ.get("MAE_KERNELS_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"MAE_KERNELS_BACKEND: got {name!r}, needs one of {', '.join(BACKENDS)}")
    return name


_backend = _from_environment()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block: "auto", "triton" or "reference".

    "triton" raises RuntimeError, with the reason, where an op's kernel cannot run; "auto" takes the reference there.
    The environment variable MAE_KERNELS_BACKEND sets the choice at import. A compiled function keeps the choice that
    was in force when it was traced. Raises ValueError for any other name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, needs one of {', '.join(BACKENDS)}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def use_triton(op: str) -> bool:
    """Whether the op's kernels run. Raises RuntimeError when the backend is "triton" and they cannot."""
    reason = NO_KERNEL[op]
    if _backend == "triton" and reason is not None:
        raise RuntimeError(f"{op}: backend 'triton' was asked for, but {reason}")
    return _backend != "reference" and reason is None


def info() -> dict[str, str]:
    """For each op, the implementation that would run here and why others are refused."""
    return {op: f"reference ({reason})" for op, reason in NO_KERNEL.items()}
