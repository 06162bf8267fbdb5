"""sssd_fast: pre-train, fine-tune and evaluate SSSD-COVID (masked autoencoder + self-distillation).

    import sssd_fast as sf

    sf.pretrain("ct/", out="runs/pre", config="8gb")
    sf.finetune("ct/", init="runs/pre", out="runs/fine")

The names below are loaded on first use: importing this package imports neither torch nor pydantic.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Predictions",
    "Result",
    "evaluate",
    "finetune",
    "load_encoder",
    "predict",
    "predict_volumes",
    "pretrain",
    "probe",
    "reproduce",
    "run",
]

if TYPE_CHECKING:
    from sssd_fast.api import (
        Predictions,
        Result,
        evaluate,
        finetune,
        load_encoder,
        predict,
        predict_volumes,
        pretrain,
        probe,
        reproduce,
        run,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sssd_fast' has no attribute {name!r}")
    return getattr(import_module("sssd_fast.api"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]


class _Package(ModuleType):
    """`sssd_fast.pretrain` stays the function when the module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
