"""patch_model, patch_attention: use this package's ops in other people's models.

Neither the code nor the state dict of the host changes. A patched module gets a subclass of its
own class that overrides one method (host_models.py). No parameter, buffer or attribute is added or
moved; unpatching restores the module's own class.

A method is replaced only if it does the same. A copy of the module with random parameters, in
float64 on the CPU, runs the host's method and the op, forward and backward, in training and in
evaluation mode, and is observed (_observing.py):
- Outputs and gradients agree, in values, containers and types; so do the calls of blocks, which
  are replaced by functions that mix tokens, and the use of random numbers.
- Every operation on floating point numbers is smooth. So numbers that agree at random points agree
  everywhere: a clamp, a comparison or a branch on values keeps the host's code.
- Every attribute that the method read has the same value at each later call; else that call runs
  the host's code, with a warning. The same for arguments that the op does not know.
Not followed are variables of the host's Python modules that change after patching.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._observing import Settings, compare
from .host_models import ATTENTION_PARTS, BLOCK_PART, HF_PARTS, MAE_PARTS, Part


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
    """What was replaced in a model, and what was not and why."""

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
    # tried if `part` is not the same as the host's
    block: _Site | None = None


# ------------------------------------------------------------------------------- public
def patch_model(model: nn.Module) -> PatchReport:
    """Put this package's ops into a masked autoencoder written for another project.

    Recognised by attributes, without importing the host: facebookresearch/mae's
    MaskedAutoencoderViT and models with its names, ViTMAEForPreTraining of transformers 5, and
    attention as in patch_attention. A part whose names are missing is left to the host. Loss,
    predictions and gradients stay the same up to rounding, outputs keep their meaning (predictions
    of all patches), state dict keys and parameter objects stay. If nothing is masked the loss is 0
    where the host's is NaN.

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
    hosts = {
        "facebookresearch/mae": [_Site(part.method, model, part) for part in MAE_PARTS],
        "transformers": list(_hf_sites(model)),
    }
    found = {name: sum(map(_count_found, sites)) for name, sites in hosts.items()}
    nearest = max(found, key=lambda name: found[name])
    if all(_missing(site) for site in hosts[nearest]):
        missing = [need for site in hosts[nearest] for need in _missing(site)]
        raise ValueError(_not_recognised(model, nearest, missing))
    return _patch(nearest, [*hosts[nearest], *_attention_sites(model)])


def patch_attention(model: nn.Module) -> PatchReport:
    """Replace the attention in any model: pre-training, fine-tuning and other methods.

    Recognised by attributes: modules with one qkv layer and proj as in timm, also with q_bias and
    v_bias as in BEiT, and modules with q_proj, k_proj, v_proj and o_proj as in transformers 5. Each
    is compared and replaced as in patch_model; unpatch_model reverts it.

    Args:
        model: the model, changed in place.

    Returns: PatchReport; print it. `left` lists every attention that keeps the host's code.

    Raises: TypeError if `model` is not an nn.Module; ValueError if it has no such module.
    """
    unpatch_model(model)
    sites = list(_attention_sites(model))
    if not sites:
        needs = " or ".join(part.needs.replace(".weight", "") for part in ATTENTION_PARTS)
        raise ValueError(f"model: got {type(model).__name__}, needs modules with {needs}")
    return _patch(type(model).__name__, sites)


def unpatch_model(model: nn.Module) -> None:
    """Restore the class, and so the methods, of every module that was patched.

    Does nothing to a model that is not patched.

    Raises: TypeError if `model` is not an nn.Module; ValueError if other code changed a module's
    class after patching (a parametrization of the module, FSDP): undo that first.
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


# ------------------------------------------------------------------------------- recognise
def _hf_sites(model: nn.Module) -> Iterator[_Site]:
    for where, part in HF_PARTS.items():
        module: Any = model
        for name in where.split(".") if where else ():
            module = getattr(module, name, None)
        yield _Site(where or "forward", module, part)


def _attention_sites(model: nn.Module) -> Iterator[_Site]:
    for name, module in model.named_modules():
        owner = name.rpartition(".")[0]
        block = _Site(owner, model.get_submodule(owner), BLOCK_PART)
        for part in ATTENTION_PARTS:
            own = not _missing(block) and block.module.attn is module
            site = _Site(name, module, part, block if own else None)
            if not _missing(site):
                yield site


def _missing(site: _Site) -> list[str]:
    """The names that the part needs and the module lacks; for a missing module its own name."""
    if site.module is None:
        return [site.where]
    return [need for need in site.part.needs.split() if not _has(site.module, need)]


def _count_found(site: _Site) -> int:
    if site.module is None:
        return 0
    return sum(_has(site.module, need) for need in site.part.needs.split())


def _has(module: nn.Module, need: str) -> bool:
    """Whether the module has the attribute "a.b.c", or its class the method "a()"."""
    if need.endswith("()"):
        return callable(getattr(type(module), need[:-2], None))
    owner: Any = module
    for name in need.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True


def _not_recognised(model: nn.Module, nearest: str, missing: list[str]) -> str:
    names = list(dict.fromkeys(missing))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    inner = (getattr(model, name, None) for name in ("module", "_orig_mod"))
    if any(isinstance(module, nn.Module) for module in inner):
        advice = "It wraps another module: patch that one, before wrapping it."
    elif next(_attention_sites(model), None) is not None:
        advice = "patch_attention(model) replaces its attention."
    else:
        advice = "Other models can use the ops and modules of mae_kernels."
    return (
        f"model: got {type(model).__name__}, needs a masked autoencoder as in {nearest}; it lacks "
        f"{', '.join(names[:5])}{more}. {advice}"
    )


# ----------------------------------------------------------------------------------- patch
def _patch(host: str, sites: list[_Site]) -> PatchReport:
    replaced, left = [], []
    methods: dict[nn.Module, list[tuple[Part, Settings]]] = {}
    # the layers of a transformer are alike: where a module's class and all that the comparison
    # read are equal, its result holds for the next module too
    known: list[tuple[type, Part, Settings, str | None]] = []
    for site in sites:
        settings, why = _compare_once(site, known)
        if why is not None and site.block is not None:
            settings, other = _compare_once(site.block, known)
            if other is None:
                site, why = site.block, None
        if why is None:
            unless = site.part.unless + ", or after a change of what it reads"
            replaced.append(Replaced(site.where, site.part.op, unless))
            methods.setdefault(site.module, []).append((site.part, settings))
        else:
            left.append(Left(site.where, site.part.op, why))
    for module, parts in methods.items():
        module.__class__ = _patched_class(type(module), tuple(parts))
    return PatchReport(host, tuple(replaced), tuple(left))


def _compare_once(
    site: _Site, known: list[tuple[type, Part, Settings, str | None]]
) -> tuple[Settings, str | None]:
    """What the comparison depends on, and why the host keeps its method; None if it does not."""
    _, module, part, _ = site
    if names := _missing(site):
        return Settings(), f"it lacks {', '.join(names)}"
    if part.method in vars(module):
        return Settings(), f"{part.method} was replaced on the instance"
    for kind, known_part, settings, why in known:
        if (kind, known_part) == (type(module), part) and settings.changed(module) is None:
            return settings, why
    found, why = compare(module, part)
    if found is not None:
        known.append((type(module), part, found, why))
    return found or Settings(), why


Parts = tuple[tuple[Part, Settings], ...]
_classes: list[tuple[type[nn.Module], Parts, type[nn.Module]]] = []


def _patched_class(host: type[nn.Module], parts: Parts) -> type[nn.Module]:
    """One subclass per host class, parts and settings.

    It has the host's name, so that repr and saved configurations do not change.
    """
    for known_host, known_parts, known in _classes:
        if known_host is host and known_parts == parts:
            return known
    attributes: dict[str, Any] = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": _reduce,
        "_mae_host": host,
        "_mae_parts": parts,
    }
    for part, settings in parts:
        attributes[part.method] = _replacement(host, part, settings)
    _classes.append((host, parts, type(host.__name__, (host,), attributes)))
    return _classes[-1][2]


def _replacement(host: type[nn.Module], part: Part, settings: Settings) -> Any:
    """The method that runs the op where it is known to do the same, else the host's method."""
    compared = getattr(host, part.method)
    parameters = list(inspect.signature(compared).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def known_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The values of the arguments that the op takes; None if the host's method must decide."""
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return None
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        known = names[: part.arguments]
        for name, value in given.items():
            default = defaults.get(name)
            if name not in known and not (value is default or _equal(value, default)):
                return None
        return [given[name] for name in known] if all(n in given for n in known) else None

    @functools.wraps(compared)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = known_arguments(args, kwargs)
        if (
            known is not None
            and getattr(host, part.method) is compared
            and not _is_transformed(known)
            and part.fits(self, *known)
        ):
            changed = settings.changed(self)
            if changed is None:
                return part.own(self, *known)
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"{host.__name__}.{part.method} runs its own code instead of {part.op}, "
                    f"because {changed} changed after patching; patch the model again",
                    stacklevel=2,
                )
        return getattr(host, part.method)(self, *args, **kwargs)

    return method


def _equal(value: Any, default: Any) -> bool:
    plain = isinstance(value, (bool, int, float, str))
    return plain and type(value) is type(default) and bool(value == default)


def _is_transformed(values: list[Any]) -> bool:
    """torch.jit.trace and torch.func.vmap run the host's own code: the ops cannot be traced so."""
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or any(  # type: ignore[attr-defined]
        isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
        for value in values
    )


def _reduce(self: Any, protocol: int) -> Any:
    """Pickle and deepcopy: pickle cannot import the patched class, so loading creates it again."""
    cls: Any = next(base for base in type(self).__mro__ if "_mae_host" in vars(base))
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    newobj: Any = copyreg.__newobj__  # type: ignore[attr-defined]
    if cls is not type(self) or not isinstance(reduced, tuple) or reduced[0] is not newobj:
        raise TypeError(
            f"{cls.__name__} defines its own pickling; call unpatch_model before copying it"
        )
    return _new_instance, (cls._mae_host, cls._mae_parts), *reduced[2:]


def _new_instance(host: type[nn.Module], parts: Parts) -> nn.Module:
    cls = _patched_class(host, parts)
    return cls.__new__(cls)
