"""patch_model: this package's ops inside another project's masked autoencoder, without changing its code or its state dict.

A module is patched by giving it a subclass of its own class that overrides one method (host_models.py). No parameter,
buffer or attribute is added or moved; unpatching gives the module its own class back.

Whether an op does the same as the method it takes over is not guessed from names. Before anything is patched, a copy of
each module with random parameters, in float64 on the CPU, runs the host's method and the op on random input, forward and
backward, in training and in evaluation mode. Where they differ, or where the host's method cannot run there, the host
keeps its own code and the report says so.
"""

from __future__ import annotations

import copy
import copyreg
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import host_models as hosts
from ._runtime import backend
from .host_models import Part

TOLERANCE = (
    1e-5  # transformers' "eager" attention takes the softmax in fp32 whatever the model's dtype
)


class Replaced(NamedTuple):
    """`op` works in module `where`, unless the call is one of those that `unless` names: these get the host's code."""

    where: str
    op: str
    unless: str


class Left(NamedTuple):
    """Module `where` keeps the host's own code in place of `op`, and why."""

    where: str
    op: str
    why: str


class PatchReport(NamedTuple):
    """What patch_model did: the host it recognised, what an op took over, and what was left to the host and why."""

    host: str
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.host}: {len(self.replaced)} parts replaced, {len(self.left)} left to the host"
        ]
        for label, parts, word in (
            ("replaced", self.replaced, "; host's own code for"),
            ("left", self.left, ":"),
        ):
            grouped: dict[tuple[str, str], list[str]] = {}
            for where, op, note in parts:
                grouped.setdefault((op, note), []).append(where)
            for (op, note), places in grouped.items():
                spelled = (
                    places[0]
                    if len(places) == 1
                    else f"{places[0]} to {places[-1]} ({len(places)})"
                )
                lines.append(f"  {label:9}{op} in {spelled}" + (f"{word} {note}" if note else ""))
        return "\n".join(lines)


Trial = tuple[list[Tensor], Any]  # differentiable inputs, outputs


class _Site(NamedTuple):
    """A module of the model, the part that may take it over, and how to run that part's method on a copy."""

    where: str
    module: nn.Module
    part: Part
    emptied: tuple[str, ...]  # children that the copy goes without
    run: Callable[[Any, bool], Trial]


# ------------------------------------------------------------------------------------------------------- public
def patch_model(model: nn.Module) -> PatchReport:
    """Put this package's ops into a masked autoencoder written for another project.

    Recognised, by attributes and never by import: facebookresearch/mae's MaskedAutoencoderViT and models with its names,
    and ViTMAEForPreTraining of transformers 5. Loss, predictions and gradients stay the same up to rounding, the outputs
    keep their meaning (predictions of all patches), state dict keys and parameter objects stay as they are. The mask that
    reaches the loss must hold zeros and ones; with nothing masked the loss is 0 where the host's is NaN.

    Patch the bare model, on any device and before it is wrapped (DistributedDataParallel, torch.compile), in either
    mode. Patching again starts over. torch.save(model) then needs this package to load; a state dict does not.

    Args:
        model: the model, changed in place.

    Returns: PatchReport; print it. `left` names every part that keeps the host's own code and the reason.

    Raises: TypeError when `model` is no nn.Module; ValueError, naming what is missing, when it is no model it recognises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    unpatch_model(model)
    name, sites = _recognise(model)
    replaced, left = [], []
    chosen: dict[int, tuple[nn.Module, list[type[nn.Module]]]] = {}
    reasons: dict[Any, str | None] = {}
    for site in sites:
        kind = _kind(site)
        if kind not in reasons:
            reasons[kind] = _why_not(site)
        reason = reasons[kind]
        if reason is None:
            replaced.append(Replaced(site.where, site.part.op, site.part.unless))
            chosen.setdefault(id(site.module), (site.module, []))[1].append(site.part.takes_over)
        else:
            left.append(Left(site.where, site.part.op, reason))
    for module, parts in chosen.values():
        module.__class__ = _patched_class(
            type(module), tuple(dict.fromkeys(parts))
        )  # a module may sit in two places
    return PatchReport(name, tuple(replaced), tuple(left))


def unpatch_model(model: nn.Module) -> None:
    """Give every module that patch_model changed its own class, and so its own methods, back. Harmless when there is none.

    Raises: TypeError when `model` is no nn.Module; ValueError when something else changed a module's class after
    patch_model did (a parametrization of the module, FSDP): undo that first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    patched = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(type(module), "_mae_host")
    ]
    for name, module in patched:
        if "_mae_host" not in vars(type(module)):
            raise ValueError(
                f"model: the class of {name or 'the model'} was changed after patch_model; undo that first"
            )
    for _, module in patched:
        module.__class__ = type(module)._mae_host


# -------------------------------------------------------------------------------------------------- patched class
_classes: dict[tuple[type[nn.Module], tuple[type[nn.Module], ...]], type[nn.Module]] = {}


def _patched_class(host: type[nn.Module], parts: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    """One subclass per host class and parts, with the host's name, so that repr and saved configurations do not change."""
    if (host, parts) in _classes:
        return _classes[host, parts]
    attributes: dict[str, Any] = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": _reduce,
        "_mae_host": host,
        "_mae_parts": parts,
    }
    for part in parts:
        if part in hosts.HF_OUTPUTS:
            attributes["_mae_output"] = _defined_with(host, hosts.HF_OUTPUTS[part])
    _classes[host, parts] = type(host.__name__, (*parts, host), attributes)
    return _classes[host, parts]


def _defined_with(host: type, name: str) -> type:
    """The class of that name from the module that defines the host's class or one of its bases."""
    modules = (sys.modules.get(base.__module__) for base in host.__mro__)
    found = [getattr(module, name) for module in modules if hasattr(module, name)]
    if not found:
        raise AttributeError(f"{name} is not defined next to {host.__name__}")
    return found[0]


def _reduce(self: Any, protocol: int) -> Any:
    """Pickle and deepcopy: the patched class has no place that pickle could import it from, so it is made again."""
    cls: Any = next(base for base in type(self).__mro__ if "_mae_host" in vars(base))
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    plain = isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__  # type: ignore[attr-defined]
    if cls is not type(self) or not plain:
        raise TypeError(
            f"{cls.__name__} is pickled in its own way; call unpatch_model before pickling or copying it"
        )
    return _make_again, (cls._mae_host, cls._mae_parts), *reduced[2:]


def _make_again(host: type[nn.Module], parts: tuple[type[nn.Module], ...]) -> nn.Module:
    cls = _patched_class(host, parts)
    return cls.__new__(cls)


# -------------------------------------------------------------------------------------------------- what is there
def _recognise(model: nn.Module) -> tuple[str, list[_Site]]:
    missing: dict[str, list[str]] = {}
    for name, needs, sites in (
        ("facebookresearch/mae", hosts.MAE_NEEDS, _mae_sites),
        ("transformers", hosts.HF_NEEDS, _hf_sites),
    ):
        missing[name] = [need for need in needs if not _has(model, need)]
        if not missing[name]:
            return name, list(sites(model))
    wrapped = any(
        isinstance(getattr(model, name, None), nn.Module) for name in ("module", "_orig_mod")
    )
    advice = " It wraps another module: patch that one, before wrapping it." if wrapped else ""
    mae, hf = (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        for names in missing.values()
    )
    raise ValueError(
        f"model: got {type(model).__name__}, needs a MaskedAutoencoderViT as in facebookresearch/mae (it lacks {mae}) "
        f"or ViTMAEForPreTraining of transformers 5 (it lacks {hf}).{advice} "
        "Other models can use the ops and modules of mae_kernels."
    )


def _has(model: nn.Module, need: str) -> bool:
    if need.endswith("()"):
        return callable(getattr(type(model), need[:-2], None))
    owner: Any = model
    for name in need.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True


def _mae_sites(model: Any) -> Iterator[_Site]:
    blocks = ("blocks", "decoder_blocks")
    yield _Site("forward_encoder", model, hosts.MAE_ENCODER, blocks, _run_mae_encoder)
    yield _Site("forward_decoder", model, hosts.MAE_DECODER, blocks, _run_mae_decoder)
    yield _Site("forward_loss", model, hosts.MAE_LOSS, blocks, _run_mae_loss)
    for name in blocks:
        for i, block in enumerate(getattr(model, name)):
            attention = getattr(block, "attn", nn.Identity())
            yield _Site(f"{name}.{i}.attn", attention, hosts.MAE_ATTENTION, (), _run_mae_attention)


def _hf_sites(model: Any) -> Iterator[_Site]:
    yield _Site("vit.embeddings", model.vit.embeddings, hosts.HF_EMBEDDINGS, (), _run_hf_embeddings)
    yield _Site("decoder", model.decoder, hosts.HF_DECODER, ("decoder_layers",), _run_hf_decoder)
    yield _Site(
        "forward", model, hosts.HF_LOSS, ("vit.layers", "decoder.decoder_layers"), _run_hf_loss
    )
    for name, layers in (
        ("vit.layers", model.vit.layers),
        ("decoder.decoder_layers", model.decoder.decoder_layers),
    ):
        for i, layer in enumerate(layers):
            attention = getattr(layer, "attention", nn.Identity())
            yield _Site(
                f"{name}.{i}.attention", attention, hosts.HF_ATTENTION, (), _run_hf_attention
            )


# ---------------------------------------------------------------------------------------------- does it do the same
def _kind(site: _Site) -> Any:
    """Equal for modules of the same classes, settings and shapes: layers of a transformer need one comparison."""
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


def _why_not(site: _Site) -> str | None:
    """Why the host keeps its own method; None when the part gives the same numbers."""
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
            trial = _random_copy(site.module, site.emptied)
            host = type(trial)
            for training in (True, False):
                results = []
                for cls in (host, _patched_class(host, (site.part.takes_over,))):
                    trial.__class__ = cls
                    torch.default_generator.manual_seed(0)
                    results.append(_outcome(trial, *site.run(trial.train(training), training)))
                if (difference := _difference(*results)) is not None:
                    return f"its own code computes something else ({difference})"
    except Exception as error:  # noqa: BLE001 - someone else's code, in a situation it may not have been written for
        text = " ".join(str(error).split())
        return f"could not be compared on the CPU in float64 ({type(error).__name__}: {text[:160]})"
    return None


def _random_copy(module: nn.Module, emptied: tuple[str, ...]) -> Any:
    """A deep copy on the CPU in float64 with random parameters and no hooks. Random, because what starts at zero hides."""
    memo: dict[int, Any] = {id(module.get_submodule(name)): nn.ModuleList() for name in emptied}
    dropped = {id(p) for name in emptied for p in module.get_submodule(name).parameters()}
    for parameter in module.parameters():
        if id(parameter) not in dropped:
            fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 4
            random = torch.randn(parameter.shape, dtype=torch.float64) / fan_in**0.5
            memo[id(parameter)] = nn.Parameter(random)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to(
            "cpu", torch.float64 if buffer.is_floating_point() else None, copy=True
        )
    trial = copy.deepcopy(module, memo)
    for child in trial.modules():
        for hooks in (
            child._forward_hooks,
            child._forward_pre_hooks,
            child._backward_hooks,
            child._backward_pre_hooks,
        ):
            hooks.clear()
    return trial


def _outcome(trial: nn.Module, inputs: list[Tensor], outputs: Any) -> list[Tensor]:
    """The outputs, and the gradients of inputs and parameters for fixed random gradients of the outputs."""
    found, generator = list(_tensors(outputs)), torch.Generator().manual_seed(1)
    leaves = [*inputs, *trial.parameters()]
    total = torch.stack([leaf.sum() for leaf in leaves]).sum() * 0
    for output in found:
        if output.requires_grad:
            total = (
                total
                + (
                    output * torch.randn(output.shape, generator=generator, dtype=torch.float64)
                ).sum()
            )
    return [*(t.detach() for t in found), *torch.autograd.grad(total, leaves)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _difference(expected: list[Tensor], got: list[Tensor]) -> str | None:
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        shapes = [[f"{tuple(t.shape)} {t.dtype}" for t in side] for side in (expected, got)]
        return f"outputs {', '.join(shapes[0])} where the op gives {', '.join(shapes[1])}"
    for want, have in zip(expected, got, strict=True):
        error = (want.double() - have.double()).abs().max().item()
        size = want.double().abs().max().item()
        if not error <= TOLERANCE * max(size, 1.0):
            return f"values differ by {error:.2g} where the largest is {size:.2g}"
    return None


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _mae_images(trial: Any) -> Tensor:
    conv, patches = trial.patch_embed.proj, trial.pos_embed.shape[1] - 1
    size = getattr(trial.patch_embed, "img_size", None)
    size = round(patches**0.5) * conv.kernel_size[0] if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(2, conv.in_channels, height, width, dtype=torch.float64)


def _run_mae_encoder(trial: Any, training: bool) -> Trial:
    # ratios whose number of visible patches shows how it is rounded
    return [], trial.forward_encoder(_mae_images(trial), 0.4 if training else 0.7)


def _run_mae_decoder(trial: Any, training: bool) -> Trial:
    patches = trial.pos_embed.shape[1] - 1
    latent = _leaf(2, 2 + patches // 3, trial.cls_token.shape[-1])
    return [latent], trial.forward_decoder(latent, torch.rand(2, patches).argsort(1))


def _run_mae_loss(trial: Any, training: bool) -> Trial:
    images, patches = _mae_images(trial), trial.pos_embed.shape[1] - 1
    trial.norm_pix_loss = training
    pred = _leaf(2, patches, trial.decoder_pred.weight.shape[0])
    mask = (torch.rand(2, patches, dtype=torch.float64) < 0.6).double()
    mask[0, 0] = 1
    return [pred], trial.forward_loss(images, pred, mask)


def _run_mae_attention(trial: Any, training: bool) -> Trial:
    x = _leaf(2, 5, trial.qkv.weight.shape[1])
    return [x], trial(x)


def _hf_images(embeddings: Any) -> Tensor:
    channels = embeddings.patch_embeddings.projection.in_channels
    return torch.rand(2, channels, *embeddings.patch_embeddings.image_size, dtype=torch.float64)


def _run_hf_embeddings(trial: Any, training: bool) -> Trial:
    trial.config.mask_ratio = 0.4 if training else 0.7
    images = _hf_images(trial)
    noise = torch.rand(2, trial.position_embeddings.shape[1] - 1)
    return [], (trial(images), trial(images, noise=noise))


def _run_hf_decoder(trial: Any, training: bool) -> Trial:
    patches = trial.decoder_pos_embed.shape[1] - 1
    latent = _leaf(2, 2 + patches // 3, trial.decoder_embed.weight.shape[1])
    return [latent], trial(latent, torch.rand(2, patches).argsort(1))


def _run_hf_loss(trial: Any, training: bool) -> Trial:
    trial.config.norm_pix_loss = training
    return [], trial(_hf_images(trial.vit.embeddings))


def _run_hf_attention(trial: Any, training: bool) -> Trial:
    x = _leaf(2, 5, trial.q_proj.weight.shape[1])
    return [x], trial(x)[0]
