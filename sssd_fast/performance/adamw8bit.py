"""AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861) from torchao, with a state dict of
plain tensors. Moments of tensors with at least 4096 values are quantised in blocks of 256; the
others stay fp32. Its update is compiled once for each shape of parameter.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from sssd_fast.errors import DependencyError

# A quantised tensor in the state dict; the table of its 256 values follows from `signed`.
QUANTISED = {"codes", "scale", "signed"}


def build_adamw8bit(groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
    """torchao's optimizer. Raises DependencyError if torchao cannot be imported."""
    optimizer: Optimizer = _optimizer_class()(groups, lr=0.0, betas=betas)
    return optimizer


@functools.cache
def _optimizer_class() -> Any:
    # Its optimizers do not use its compiled kernels, which print errors if they cannot be loaded.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    warnings.filterwarnings(
        "ignore", message="OptimState8bit does not implement _stable_hash_for_caching"
    )
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except Exception as error:
        raise DependencyError(
            f"step.optimizer is adamw8bit, which needs torchao: {type(error).__name__}: {error}. "
            f"Install it with pip install 'sssd-fast[torchao]', or set step.optimizer=adamw"
        ) from error

    class PlainAdamW8bit(AdamW8bit):
        """Its state dict can be read without torchao."""

        def state_dict(self) -> dict[str, Any]:
            def plain(value: Any) -> Any:
                if not isinstance(value, OptimState8bit):
                    return value
                return {"codes": value.codes, "scale": value.scale, "signed": value.signed}

            return _mapped(super().state_dict(), plain)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            def quantised(value: Any) -> Any:
                if not isinstance(value, dict) or value.keys() != QUANTISED:
                    return value
                codes, scale = value["codes"], value["scale"]
                block_size = codes.numel() // scale.numel()
                options = {"device": codes.device, "dtype": torch.float32}
                out = OptimState8bit.zeros(codes.shape, value["signed"], block_size, **options)
                out.codes.copy_(codes)
                out.scale.copy_(scale)
                return out

            super().load_state_dict(_mapped(state_dict, quantised))

    return PlainAdamW8bit


def _mapped(state_dict: dict[str, Any], change: Any) -> dict[str, Any]:
    """A copy of the dict with `change` applied to the values of `state`."""
    states = state_dict["state"].items()
    state = {key: {n: change(value) for n, value in values.items()} for key, values in states}
    return {**state_dict, "state": state}
