"""patch_model: use this package's ops in another project's masked autoencoder.

Neither the code nor the state dict of the host changes. A patched module gets a subclass of its
own class that overrides one method (host_models.py). No parameter, buffer or attribute is added or
moved; unpatching restores the module's own class.

Names do not prove that an op computes what the host's method does, so the results are compared
before anything is patched. A copy of each module with random parameters, in float64 on the CPU,
runs the host's method and the op on random input, forward and backward, in training and in
evaluation mode. If they differ, or if the host's method cannot run there, the host keeps its own
code and the report gives the reason.
"""

from __future__ import annotations

import copy
import copyreg
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import host_models as hosts
from ._runtime import backend
from .host_models import Part

# transformers' "eager" attention computes the softmax in fp32 for every dtype of the model
TOLERANCE = 1e-5


class Replaced(NamedTuple):
    """`op` runs in module `where`; the calls named in `unless` still run the host's code."""

    where: str
    op: str
    unless: str


class Left(NamedTuple):
    """Module `where` keeps the host's own code instead of `op`, for the reason `why`."""

    where: str
    op: str
    why: str


class PatchReport(NamedTuple):
    """What patch_model did: the recognised host, what was replaced, and what was not and why."""

    host: str
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        counts = f"{len(self.replaced)} parts replaced, {len(self.left)} left to the host"
        lines = [f"{self.host}: {counts}"]
        lines += _grouped("replaced", self.replaced, "; host's own code for ")
        lines += _grouped("left", self.left, ": ")
        return "\n".join(lines)


def _grouped(label: str, parts: tuple[Any, ...], joined: str) -> Iterator[str]:
    """One line per op and note, with the first and last module and their number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for where, op, note in parts:
        groups.setdefault((op, note), []).append(where)
    for (op, note), places in groups.items():
        several = f"{places[0]} to {places[-1]} ({len(places)})"
        place = places[0] if len(places) == 1 else several
        yield f"  {label:9}{op} in {place}" + (joined + note if note else "")


class _Site(NamedTuple):
    """A module of the model and the part that may replace one of its methods."""

    where: str
    module: nn.Module
    part: Part
    # children that the compared copy omits, because its method is compared without them
    emptied: tuple[str, ...] = ()


# ------------------------------------------------------------------------------- public
def patch_model(model: nn.Module) -> PatchReport:
    """Put this package's ops into a masked autoencoder written for another project.

    Recognised by attributes, without importing the host: facebookresearch/mae's
    MaskedAutoencoderViT and models with its names, and ViTMAEForPreTraining of transformers 5.
    Loss, predictions and gradients stay the same up to rounding, outputs keep their meaning
    (predictions of all patches), state dict keys and parameter objects stay. The mask passed to
    the loss must hold zeros and ones; if nothing is masked the loss is 0 where the host's is NaN.

    Patch the bare model, on any device and in either mode, before it is wrapped
    (DistributedDataParallel, torch.compile). Patching twice equals patching once. Loading a
    torch.save(model) of a patched model needs this package; loading its state dict does not.

    Args:
        model: the model, changed in place.

    Returns: PatchReport; print it. `left` lists every part that keeps the host's code, and why.

    Raises: TypeError if `model` is not an nn.Module; ValueError, naming the missing attributes,
    if it is not a recognised model.
    """
    unpatch_model(model)
    name, sites = _recognise(model)
    replaced, left = [], []
    mixins: dict[nn.Module, list[type[nn.Module]]] = {}
    # the layers of a transformer are alike: one comparison per kind of module
    reasons: dict[Any, str | None] = {}
    for site in sites:
        kind = _kind(site)
        if kind not in reasons:
            reasons[kind] = _reason_to_keep(site)
        reason = reasons[kind]
        if reason is None:
            replaced.append(Replaced(site.where, site.part.op, site.part.unless))
            mixins.setdefault(site.module, []).append(site.part.mixin)
        else:
            left.append(Left(site.where, site.part.op, reason))
    for module, parts in mixins.items():
        # a module that the model uses twice appears twice in the sites
        module.__class__ = _patched_class(type(module), tuple(dict.fromkeys(parts)))
    return PatchReport(name, tuple(replaced), tuple(left))


def unpatch_model(model: nn.Module) -> None:
    """Restore the class, and so the methods, of every module that patch_model changed.

    Does nothing to a model that is not patched.

    Raises: TypeError if `model` is not an nn.Module; ValueError if other code changed a module's
    class after patch_model (a parametrization of the module, FSDP): undo that first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    patched = {n: m for n, m in model.named_modules() if hasattr(type(m), "_mae_host")}
    for name, module in patched.items():
        if "_mae_host" not in vars(type(module)):
            raise ValueError(
                f"model: the class of {name or 'the model'} was changed after patch_model; "
                "undo that first"
            )
    for module in patched.values():
        module.__class__ = type(module)._mae_host


# ------------------------------------------------------------------------ patched class
Mixins = tuple[type[nn.Module], ...]
_classes: dict[tuple[type[nn.Module], Mixins], type[nn.Module]] = {}


def _patched_class(host: type[nn.Module], mixins: Mixins) -> type[nn.Module]:
    """One subclass per host class and mixins.

    It has the host's name, so that repr and saved configurations do not change.
    """
    if (host, mixins) in _classes:
        return _classes[host, mixins]
    attributes: dict[str, Any] = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": _reduce,
        "_mae_host": host,
        "_mae_mixins": mixins,
    }
    for mixin in mixins:
        if hasattr(mixin, "_mae_output_name"):
            attributes["_mae_output"] = _defined_with(host, str(mixin._mae_output_name))
    _classes[host, mixins] = type(host.__name__, (*mixins, host), attributes)
    return _classes[host, mixins]


def _defined_with(host: type, name: str) -> type:
    """The class of that name in the module that defines the host's class or one of its bases."""
    modules = (sys.modules.get(base.__module__) for base in host.__mro__)
    found = [getattr(module, name) for module in modules if hasattr(module, name)]
    if not found:
        raise AttributeError(f"{name} is not defined next to {host.__name__}")
    return found[0]


def _reduce(self: Any, protocol: int) -> Any:
    """Pickle and deepcopy: pickle cannot import the patched class, so loading creates it again."""
    cls: Any = next(base for base in type(self).__mro__ if "_mae_host" in vars(base))
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    newobj: Any = copyreg.__newobj__  # type: ignore[attr-defined]
    if cls is not type(self) or not isinstance(reduced, tuple) or reduced[0] is not newobj:
        raise TypeError(
            f"{cls.__name__} defines its own pickling; call unpatch_model before copying it"
        )
    return _new_instance, (cls._mae_host, cls._mae_mixins), *reduced[2:]


def _new_instance(host: type[nn.Module], mixins: Mixins) -> nn.Module:
    cls = _patched_class(host, mixins)
    return cls.__new__(cls)


# -------------------------------------------------------------------- recognise a model
def _recognise(model: nn.Module) -> tuple[str, list[_Site]]:
    missing: list[list[str]] = []
    for name, needs, sites in (
        ("facebookresearch/mae", hosts.MAE_NEEDS, _mae_sites),
        ("transformers", hosts.HF_NEEDS, _hf_sites),
    ):
        missing.append([need for need in needs.split() if not _has(model, need)])
        if not missing[-1]:
            return name, list(sites(model))
    inner = (getattr(model, name, None) for name in ("module", "_orig_mod"))
    wrapped = any(isinstance(module, nn.Module) for module in inner)
    advice = " It wraps another module: patch that one, before wrapping it." if wrapped else ""
    mae, hf = map(_first_five, missing)
    raise ValueError(
        f"model: got {type(model).__name__}, needs a MaskedAutoencoderViT as in "
        f"facebookresearch/mae (it lacks {mae}) or ViTMAEForPreTraining of transformers 5 "
        f"(it lacks {hf}).{advice} Other models can use the ops and modules of mae_kernels."
    )


def _first_five(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _has(model: nn.Module, need: str) -> bool:
    """Whether the model has the attribute "a.b.c", or its class the method "a()"."""
    if need.endswith("()"):
        return callable(getattr(type(model), need[:-2], None))
    owner: Any = model
    for name in need.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True


def _mae_sites(model: Any) -> Iterator[_Site]:
    stacks = ("blocks", "decoder_blocks")
    for part in (hosts.MAE_ENCODER, hosts.MAE_DECODER, hosts.MAE_LOSS):
        yield _Site(part.method, model, part, stacks)
    for name in stacks:
        for i, block in enumerate(getattr(model, name)):
            attention = getattr(block, "attn", nn.Identity())
            yield _Site(f"{name}.{i}.attn", attention, hosts.MAE_ATTENTION)


def _hf_sites(model: Any) -> Iterator[_Site]:
    stacks = ("vit.layers", "decoder.decoder_layers")
    yield _Site("vit.embeddings", model.vit.embeddings, hosts.HF_EMBEDDINGS)
    yield _Site("decoder", model.decoder, hosts.HF_DECODER, ("decoder_layers",))
    yield _Site("forward", model, hosts.HF_LOSS, stacks)
    for name in stacks:
        layers: Any = model.get_submodule(name)
        for i, layer in enumerate(layers):
            attention = getattr(layer, "attention", nn.Identity())
            yield _Site(f"{name}.{i}.attention", attention, hosts.HF_ATTENTION)


# --------------------------------------------------------------------- compare with the op
def _kind(site: _Site) -> Any:
    """Equal for modules of the same classes, settings and shapes."""
    if site.emptied:
        return site.where
    settings: list[Any] = []
    for module in site.module.modules():
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
            if not name.startswith("_"):
                settings.append((name, repr(value) if plain else id(value)))
        settings.append((type(module), len(module._forward_hooks), "forward" in vars(module)))
    shapes = tuple((name, p.shape) for name, p in site.module.named_parameters())
    return site.part, tuple(settings), shapes, tuple(id(b) for b in site.module.buffers())


def _reason_to_keep(site: _Site) -> str | None:
    """Why the host keeps its own method; None if the op gives the same numbers."""
    if site.part.method in vars(site.module):
        return f"{site.part.method} was replaced on the instance"
    try:
        with (
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            backend("reference"),
            torch.random.fork_rng(devices=[]),
        ):
            copied = _random_copy(site.module, site.emptied)
            host = type(copied)
            for training in (True, False):
                results = []
                for cls in (host, _patched_class(host, (site.part.mixin,))):
                    copied.__class__ = cls
                    torch.default_generator.manual_seed(0)
                    trial = site.part.trial(copied.train(training), training)
                    results.append(_outputs_and_gradients(copied, *trial))
                if (difference := _difference(*results)) is not None:
                    return f"its own code computes something else ({difference})"
    except Exception as error:  # noqa: BLE001 - the host's code may fail in any way here
        text = " ".join(str(error).split())
        return f"could not be compared on the CPU in float64 ({type(error).__name__}: {text[:160]})"
    return None


def _random_copy(module: nn.Module, emptied: tuple[str, ...]) -> Any:
    """A deep copy on the CPU in float64, without hooks.

    Its parameters are random: one that is initialised to zero would hide what it does.
    """
    memo: dict[int, Any] = {id(module.get_submodule(name)): nn.ModuleList() for name in emptied}
    dropped = {id(p) for name in emptied for p in module.get_submodule(name).parameters()}
    for parameter in module.parameters():
        if id(parameter) not in dropped:
            fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 4
            random = torch.randn(parameter.shape, dtype=torch.float64) / fan_in**0.5
            memo[id(parameter)] = nn.Parameter(random)
    for buffer in module.buffers():
        dtype = torch.float64 if buffer.is_floating_point() else None
        memo[id(buffer)] = buffer.detach().to("cpu", dtype, copy=True)
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
        child._backward_hooks.clear()
        child._backward_pre_hooks.clear()
    return copied


def _outputs_and_gradients(copied: nn.Module, inputs: list[Tensor], outputs: Any) -> list[Tensor]:
    """The outputs, and the gradients of inputs and parameters for fixed upstream gradients."""
    tensors = list(_tensors(outputs))
    leaves = [*inputs, *copied.parameters()]
    generator = torch.Generator().manual_seed(1)
    # connects every leaf, also those that the method does not use
    total = torch.stack([leaf.sum() for leaf in leaves]).sum() * 0
    for output in tensors:
        if output.requires_grad:
            upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output * upstream).sum()
    return [*(t.detach() for t in tensors), *torch.autograd.grad(total, leaves)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _difference(expected: list[Tensor], got: list[Tensor]) -> str | None:
    """What differs between the host's results and the op's; None if only rounding does."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        host, ours = (", ".join(f"{tuple(t.shape)} {t.dtype}" for t in x) for x in (expected, got))
        return f"outputs {host} where the op gives {ours}"
    for want, have in zip(expected, got, strict=True):
        error = (want.double() - have.double()).abs().max().item()
        size = want.double().abs().max().item()
        if not error <= TOLERANCE * max(size, 1.0):
            return f"values differ by {error:.2g} where the largest is {size:.2g}"
    return None
