"""Try mae_kernels on a model of another project: what is replaced, and does it give the same?

    python tools/try_host.py path/to/mae models_mae:MaskedAutoencoderViT --then 0.75
    python tools/try_host.py timm timm.models.vision_transformer:VisionTransformer

The first argument is the folder of a checkout, or the name of an installed package. The second is
MODULE:NAME of a class or function that makes the model. `--options` are its arguments as JSON; an
argument {"new": "MODULE:NAME", ...} is made likewise; a class of transformers gets them as its
configuration. The model is called with images and the values of `--then`: numbers, or "mask" for a
bool mask [B, L] with a quarter of the patches visible.

The host's code runs with and without the ops: loss, largest output and all gradients in float64,
then a short training in float32 from the same start. An output that is a scalar is the loss; if
there is none, the loss is the mean square of the largest output. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import importlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mae_kernels as mk

# Largest relative difference that is rounding
FP64 = 1e-9
TRAINED = 1e-2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("source", help="folder of a checkout, or an installed package")
    parser.add_argument("model", help="MODULE:NAME of a class or function that makes the model")
    parser.add_argument("--options", default="{}", help="arguments of the model, as JSON")
    parser.add_argument("--then", nargs="*", default=[], help='further inputs: numbers, or "mask"')
    parser.add_argument("--images", default="4,3,32,32", help="batch, channels, height, width")
    parser.add_argument("--patch-size", type=int, default=8, help='for the input "mask"')
    parser.add_argument("--steps", type=int, default=30, help="steps of the training in float32")
    arguments = parser.parse_args()

    if Path(arguments.source).is_dir():
        sys.path.insert(0, arguments.source)
    else:
        package = importlib.import_module(arguments.source)
        print(f"{arguments.source} {getattr(package, '__version__', '')}")
    allow_old_names()
    shape = [int(n) for n in arguments.images.split(",")]
    torch.manual_seed(0)
    inputs = [torch.randn(shape), *further_inputs(arguments.then, shape, arguments.patch_size)]

    def build(dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with the same parameters each time; some cannot be copied."""
        torch.manual_seed(0)
        model: nn.Module = make({"new": arguments.model, **json.loads(arguments.options)})
        return model.to(dtype)

    print(patch(build()))
    same = compare_once(build(torch.float64), build(torch.float64), inputs)
    trained = compare_training(build(), build(), inputs, arguments.steps)
    return 0 if same and trained else 1


def patch_quietly(model: nn.Module) -> None:
    with contextlib.redirect_stdout(None):
        patch(model)


def patch(model: nn.Module) -> mk.PatchReport:
    """patch_model, or patch_attention for a model that is no masked autoencoder it knows."""
    try:
        return mk.patch_model(model)
    except ValueError as error:
        print(error)
        return mk.patch_attention(model)


def allow_old_names() -> None:
    """Names that NumPy and torch removed and that projects of their time import."""
    import numpy

    for name, kind in (("float", float), ("int", int), ("bool", bool)):
        if not hasattr(numpy, name):
            setattr(numpy, name, kind)
    if "torch._six" not in sys.modules:
        six = types.ModuleType("torch._six")
        vars(six).update(container_abcs=collections.abc, string_classes=str, inf=float("inf"))
        sys.modules["torch._six"] = six


def make(options: dict[str, Any]) -> Any:
    """The object that {"new": "MODULE:NAME", **arguments} describes."""
    module, _, name = options.pop("new").partition(":")
    maker = getattr(importlib.import_module(module), name)
    made = {k: make(v) if isinstance(v, dict) and "new" in v else v for k, v in options.items()}
    if hasattr(maker, "config_class"):
        return maker(maker.config_class(**made))
    return maker(**made)


def further_inputs(values: list[str], shape: list[int], patch_size: int) -> Iterator[Any]:
    patches = (shape[2] // patch_size) * (shape[3] // patch_size)
    for value in values:
        # the same number of visible patches in each image
        order = torch.rand(shape[0], patches).argsort(1)
        yield order >= patches // 4 if value == "mask" else float(value)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def run(model: nn.Module, inputs: list[Any]) -> tuple[Tensor, Tensor]:
    """(loss, largest output); the same random numbers each time."""
    torch.manual_seed(1)
    outputs = [t for t in tensors(model(*inputs)) if t.is_floating_point()]
    largest = max(outputs, key=Tensor.numel)
    scalars = [t for t in outputs if t.dim() == 0]
    return scalars[0] if scalars else largest.square().mean(), largest


def difference(want: Tensor, got: Tensor) -> float:
    return float((want - got).abs().max() / want.abs().max().clamp(min=1e-12))


def compare_once(model: nn.Module, patched: nn.Module, inputs: list[Any]) -> bool:
    """Prints the largest relative differences in float64."""
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    patch_quietly(patched)
    results = []
    for each in (model, patched):
        loss, largest = run(each, exact)
        loss.backward()
        gradients = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
        results.append((loss.detach(), largest.detach(), torch.cat(gradients)))
    found = [difference(want, got) for want, got in zip(*results, strict=True)]
    print("float64: loss {:.1e}, prediction {:.1e}, gradients {:.1e}".format(*found))
    return max(found) <= FP64


def compare_training(model: nn.Module, patched: nn.Module, inputs: list[Any], steps: int) -> bool:
    """Prints the losses of a training in float32, of the host and with the ops."""
    patch_quietly(patched)
    curves = []
    for each in (model, patched):
        optimizer = torch.optim.AdamW(each.parameters(), 1e-3)
        losses = []
        for _ in range(steps):
            loss, _ = run(each, inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    for name, curve in zip(("host", "ops"), curves, strict=True):
        print(f"{name:5}", " ".join(f"{x:.5f}" for x in curve[:: max(1, steps // 6)].tolist()))
    found = difference(*curves)
    print(f"{steps} steps: largest relative difference of the loss {found:.1e}")
    return found <= TRAINED


if __name__ == "__main__":
    sys.exit(main())
