"""The training step of every provider: one full optimizer step on one batch, from equal weights.

    "published", "published compiled"    published.py, eager and under torch.compile
    "ViTMAE", "ViTMAE compiled"          transformers' ViTMAEForPreTraining; task MAE only
    "plain", "plain compiled"            our model in plain torch with SDPA
    "ours"                               our model as the configuration selects on this device

The tasks are MAE, and SSSD, for which "published" is SD-MAE.

A step: forward under autocast, backward, AdamW with the same learning rate, betas and weight
decay, no clipping, gradients set to None; biases, norms and tokens are not decayed. Our model runs
in sssd_fast.step.Step, which also computes the norm of the gradients and skips a non-finite
update. The others have a bare loop and get normalised float32 images on the device, where ours
read uint8. "published" runs torch.optim.AdamW with its defaults, every other provider its fused
form.

Shapes: B images, C channels, H x W pixels, L patches. torch and the standard library suffice to
import this file; what needs pydantic or transformers is imported inside functions.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mae_kernels
from benchmarks import published
from benchmarks.results import NAMES
from benchmarks.shapes import Shape
from sssd_fast.errors import ConfigError

if TYPE_CHECKING:
    from sssd_fast.config import Config
    from sssd_fast.objective import SSSD

SEED = 0
NOISES = 32  # draws of the masking noise; step i uses number i modulo this
TASKS = ("SSSD", "MAE")


_PLAIN = {"attention": "sdpa", "decoder_attention": "sdpa", "mlp": "plain", "compile": False}
# settings of StepConfig; None = as configured
OWN: dict[str, dict[str, Any] | None] = {
    "plain": _PLAIN,
    "plain compiled": {**_PLAIN, "compile": True},
    "ours": None,
}
PUBLISHED = ("published", "published compiled")
VITMAE = ("ViTMAE", "ViTMAE compiled")
PROVIDERS = {"MAE": (*PUBLISHED, *VITMAE, *OWN), "SSSD": (*PUBLISHED, *OWN)}


# ---- what all providers share ----


@dataclass(frozen=True)
class Setup:
    """step: further settings of StepConfig for our model, such as {"cuda_graphs": False}."""

    config: Config  # of the task: objective.weight is 0 for "MAE"
    task: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    step: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """ "ViT-B/16, 224, 256 images" for known sizes, width and depth for others."""
        from sssd_fast.config import VIT_SIZES

        model = self.config.model
        size = "x".join(str(n) for n in dict.fromkeys(model.image_size))
        width, depth, _ = model.encoder_shape
        known = (width, depth) == VIT_SIZES[model.name][:2]
        name = f"ViT-{model.name[0].upper()}" if known else f"ViT {width}x{depth}"
        return f"{name}/{model.patch_size}, {size}, {self.batch} images"

    @property
    def sizes(self) -> dict[str, Any]:
        return {"batch": self.batch, **self.config.model.model_dump(mode="json")}

    def adamw(self) -> tuple[float, tuple[float, float], float]:
        """(learning rate, betas, weight decay)"""
        from sssd_fast.optim import scaled_lr

        p = self.config.pretrain
        return scaled_lr(p.base_lr, self.batch), (p.beta1, p.beta2), p.weight_decay


def for_task(config: Config, task: str) -> Config:
    """The distillation has no weight in "MAE"."""
    objective = config.objective.model_copy(update={"weight": 0.0})
    return config if task == "SSSD" else config.model_copy(update={"objective": objective})


def configuration(name: str | None, device: torch.device) -> Config:
    """A ViT by size with three channels as published, or a shipped configuration.

    name: None = base on CUDA, cpu_smoke elsewhere.
    """
    from sssd_fast.config import VIT_SIZES, from_dict, load_config

    name = name or ("base" if device.type == "cuda" else "cpu_smoke")
    sized = {"model": {"name": name, "in_channels": 3}}
    return from_dict(sized) if name in VIT_SIZES else load_config(name)


class Data:
    """One batch of smooth random images with noise, and the masking noise; equal on every machine.

    `images` [B, C, H, W] uint8 and `floats`, the same normalised in fp32, are created on the device
    when first used.
    """

    def __init__(self, setup: Setup) -> None:
        self._model = model = setup.config.model
        self._device = setup.device
        generator = torch.Generator().manual_seed(SEED)
        (height, width), B, C = model.image_size, setup.batch, model.in_channels
        coarse = (B, C, max(2, height // 16), max(2, width // 16))
        coarse_BCHW = torch.rand(coarse, generator=generator)
        images_BCHW = F.interpolate(coarse_BCHW, (height, width), mode="bilinear")
        images_BCHW += 0.1 * torch.rand(images_BCHW.shape, generator=generator)
        self._host_images = (images_BCHW / 1.1 * 255).to(torch.uint8)
        noises = torch.rand(NOISES, B, model.num_patches, generator=generator)
        self.noises = noises.to(setup.device)

    @cached_property
    def images(self) -> Tensor:
        return self._host_images.to(self._device)

    @cached_property
    def floats(self) -> Tensor:
        stats = (self._model.mean, self._model.std)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in stats)
        return ((self._host_images.float() / 255 - mean) / std).to(self._device)

    def bytes(self) -> int:
        """On the device."""
        used = [self.__dict__[n] for n in ("images", "floats", "noises") if n in self.__dict__]
        return sum(t.nbytes for t in used)

    def noise(self, step: int) -> Tensor:
        return self.noises[step % NOISES]


def initial_model(config: Config) -> SSSD:
    """On the CPU, from a fixed seed; no bias or norm is 0 or 1, so that a missing one changes the
    loss."""
    from sssd_fast.objective import SSSD

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SSSD(config.model, config.objective)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def reference_losses(
    setup: Setup, data: Data, source: SSSD, steps: int, images_at_once: int = 16
) -> list[float]:
    """Losses of the first steps of the plain model, in fp64 for fp32 and in fp32 for the others.

    The batch is split, so that it fits wherever the providers fit.
    """
    from sssd_fast.model import Attention
    from sssd_fast.objective import SSSD
    from sssd_fast.optim import parameter_groups

    wide = torch.float64 if setup.dtype == torch.float32 else torch.float32
    model = SSSD(setup.config.model, setup.config.objective)
    model.load_state_dict(source.state_dict())
    model.to(setup.device, wide)
    for module in model.modules():
        if isinstance(module, Attention):
            module.provider = "sdpa"
    lr, betas, weight_decay = setup.adamw()
    groups = parameter_groups(model, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas)
    losses = []
    with mae_kernels.backend("reference"):
        for step in range(steps):
            total = 0.0
            center = torch.zeros_like(model.center)
            noise_BL = data.noise(step).to(wide)
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, setup.batch, images_at_once):
                some = slice(start, start + images_at_once)
                out = model(data.images[some], noise_BL[some])
                share = len(data.images[some]) / setup.batch
                (out.total * share).backward()
                total += share * float(out.total.detach())
                if out.batch_center is not None:
                    center += share * out.batch_center
            optimizer.step()
            model.update_center(center, torch.ones((), dtype=torch.bool, device=setup.device))
            losses.append(total)
    return losses


# ---- providers ----


def missing(provider: str) -> str | None:
    """Why the provider is not available on this machine; None if it is."""
    needed = ["pydantic"] + ["transformers"] * (provider in VITMAE)
    absent = [name for name in needed if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


@dataclass
class Training:
    """A call is one step; it returns the loss before the update, on the device."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: Callable[[int], Tensor]  # from the number of the step
    how: str  # what was selected, and why
    count: int = 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self.run(self.count - 1)

    def held_bytes(self) -> int:
        """Bytes of weights, buffers and moments, which stay between steps."""
        state = [t for values in self.optimizer.state.values() for t in values.values()]
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [t for t in state if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors)


def build(provider: str, setup: Setup, data: Data, source: SSSD) -> Training:
    """Raises SssdError if this device, dtype or model cannot run it."""
    if provider in OWN:
        return own_step(setup, data, provider, source)
    if provider in VITMAE:
        return loop_step(setup, data, vitmae(setup, source), provider)
    return loop_step(setup, data, published_model(setup, source), provider)


def own_step(setup: Setup, data: Data, provider: str, source: SSSD) -> Training:
    """Our model in sssd_fast.step.Step."""
    import torch._functorch.config as functorch

    from sssd_fast.config import StepConfig
    from sssd_fast.objective import SSSD
    from sssd_fast.optim import build_optimizer, parameter_groups
    from sssd_fast.performance.execution import compiled, configure_model
    from sssd_fast.run.device import World
    from sssd_fast.step import Step, TaskLoss

    settings = OWN[provider] or setup.config.step.model_dump()
    step = StepConfig.model_validate({**settings, **setup.step})
    config = setup.config.model_copy(update={"step": step})
    model = SSSD(config.model, config.objective)
    model.load_state_dict(source.state_dict())
    model.to(setup.device)
    precision = NAMES[setup.dtype]

    @contextmanager
    def selected() -> Iterator[None]:
        """Limits to this provider the settings that `compiled` would leave in torch."""
        budget = {"activation_memory_budget": step.activation_budget}
        ops = mae_kernels.backend("auto" if provider == "ours" else "reference")
        with ops, functorch.patch({**budget, "is_non_builtin_to_include": True}):
            yield

    with selected():
        execution = configure_model(model, config, precision, setup.device, setup.batch)
        module: nn.Module = model
        if execution.compiled:
            _own_code(model)
            module = compiled(model, step, graphs=execution.graphs)
    lr, betas, weight_decay = setup.adamw()
    groups = parameter_groups(model, weight_decay=weight_decay)
    optimizer = build_optimizer(groups, betas, step.optimizer)

    def loss(module: nn.Module, images_BCHW: Tensor, step: int, micro: int) -> TaskLoss:
        out = module(images_BCHW, data.noise(step))
        return TaskLoss(out.total, {}, out.batch_center)

    train = Step(
        module,
        optimizer,
        loss,
        world=World(setup.device),
        precision=precision,
        update_state=model.update_center,
        compiled=execution.compiled,
        graphs=execution.graphs,
    )

    def run(number: int) -> Tensor:
        with selected():
            return train([data.images], number, lr).losses["loss"]

    ops = "auto" if provider == "ours" else "reference, plain torch"
    return Training(model, optimizer, run, "; ".join([f"ops: {ops}", *execution.lines]))


def _own_code(model: nn.Module) -> None:
    """Gives `model` a forward with its own code object.

    torch keeps compiled code by code object: providers of one class would search each other's at
    every call.
    """
    old: Any = type(model).forward
    new = types.FunctionType(
        old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__
    )
    model.forward = types.MethodType(new, model)


def loop_step(setup: Setup, data: Data, model: nn.Module, provider: str) -> Training:
    """The bare loop around a model that takes float images and noise."""
    from sssd_fast.optim import parameter_groups
    from sssd_fast.run.device import autocast

    model.to(setup.device)
    compile_it = provider.endswith("compiled")
    fused = provider != "published"
    lr, betas, weight_decay = setup.adamw()
    groups = parameter_groups(model, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.dtype == torch.float16)
    module: Any = torch.compile(model, dynamic=False) if compile_it else model
    images = data.floats

    def run(number: int) -> Tensor:
        with autocast(NAMES[setup.dtype], setup.device):
            if provider in VITMAE:
                loss, batch_center_S = module(images, noise=data.noise(number)).loss, None
            else:
                loss, batch_center_S = module(images, data.noise(number))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, published.SDMAE):
            assert batch_center_S is not None
            model.update_center(batch_center_S)
        result: Tensor = loss.detach()
        return result

    how = f"compile: {'on' if compile_it else 'off'}; AdamW: {'fused' if fused else 'default'}"
    return Training(model, optimizer, run, how)


def published_model(setup: Setup, source: SSSD) -> published.MaskedAutoencoderViT | published.SDMAE:
    """The published model of the task with the weights of `source`.

    Raises ConfigError for settings that it does not have.
    """
    from sssd_fast.weights.formats import export_state

    m, o = setup.config.model, setup.config.objective
    if not m.cls_token:
        raise ConfigError("model.cls_token is false; the published models need true")
    chosen = (o.kind, o.pooling, o.center, o.detach_teacher)
    if setup.task == "SSSD" and chosen != ("dino", "image", "prob", False):
        raise ConfigError(
            f"objective has kind, pooling, center, detach_teacher {chosen}; "
            "published SD-MAE has dino, image, prob, false"
        )
    width, depth, heads = m.encoder_shape
    s = Shape(
        *(m.name, 1, width, heads, m.decoder_width, m.decoder_heads),
        image=m.image_size,
        patch=m.patch_size,
        channels=m.in_channels,
        mask_ratio=m.mask_ratio,
    )
    mae = published.MaskedAutoencoderViT(s, depth, m.decoder_depth, o.norm, m.mlp_ratio, m.norm_eps)
    mae.load_state_dict(export_state(source.mae, "timm", decoder=True))
    if setup.task == "MAE":
        return mae
    sdmae = published.SDMAE(
        mae,
        weight=o.weight,
        head=(o.head_hidden, o.head_bottleneck, o.prototypes),
        temps=(o.student_temp, o.teacher_temp),
        momentum=o.center_momentum,
    )
    others = {n: t for n, t in source.state_dict().items() if not n.startswith("mae.")}
    sdmae.load_state_dict(others, strict=False)
    return sdmae


def vitmae(setup: Setup, source: SSSD) -> nn.Module:
    """transformers' model with the weights of `source`.

    Raises ConfigError for settings that it does not have.
    """
    norm = setup.config.objective.norm
    if norm == "channel":
        raise ConfigError("objective.norm is channel; ViTMAE needs patch or none")
    logging.disable()  # transformers loads torchao, which warns about other machines
    try:
        import transformers

        from sssd_fast.weights.formats import export_state, huggingface_config

        transformers.utils.logging.disable_progress_bar()  # it would overwrite ours
        tree = {**huggingface_config(source.mae, decoder=True), "norm_pix_loss": norm == "patch"}
        known = {n: v for n, v in tree.items() if n not in ("architectures", "model_type")}
        model, found = transformers.ViTMAEForPreTraining.from_pretrained(
            None,
            config=transformers.ViTMAEConfig(**known),
            state_dict=export_state(source.mae, "huggingface", decoder=True),
            output_loading_info=True,
        )
    finally:
        logging.disable(logging.NOTSET)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ConfigError(
            f"the weights of ViTMAE in transformers {transformers.__version__} have other names: "
            f"missing {sorted(found['missing_keys'])[:3]}, "
            f"unexpected {sorted(found['unexpected_keys'])[:3]}"
        )
    # fixed by design, but from_pretrained of transformers 5.23 makes them trainable
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    trained: nn.Module = model.train()
    return trained
