"""The training step of every provider: one full optimizer step on one batch, from equal weights.

    "published", "published compiled"    published.py, eager and under torch.compile
    "ViTMAE", "ViTMAE compiled"          transformers' ViTMAEForPreTraining; task MAE only
    "plain", "plain compiled"            our model with the reference ops in plain torch and SDPA
    "ours"                               what the configuration selects on this device
    "ours lean"                          bf16 residual, fused MLP, activation budget 0.8

The tasks are MAE, and SSSD, for which "published" is SD-MAE.

A step: forward under autocast, backward, AdamW with the same learning rate, betas and weight
decay, no clipping, gradients set to None; biases, norms and tokens are not decayed. Ours and
plain run sssd_fast.step.Step, which also computes the norm of the gradients and skips a non-
finite update. The others have a bare loop and get normalised float32 images on the device, where
ours read uint8. "published" runs torch.optim.AdamW with its defaults, every other provider its
fused form.

Shapes: B images, C channels, H x W pixels, L patches. torch and the standard library suffice to
import this file; what needs pydantic or transformers is imported inside functions.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
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
VITMAE = ("ViTMAE", "ViTMAE compiled")
SSSD_PROVIDERS = ("published", "published compiled", "plain", "plain compiled", "ours", "ours lean")
PROVIDERS = {"MAE": (*SSSD_PROVIDERS[:2], *VITMAE, *SSSD_PROVIDERS[2:]), "SSSD": SSSD_PROVIDERS}


@dataclass(frozen=True)
class Recipe:
    """How our model is computed."""

    kernels: bool | None  # None = reference ops, False = as available, True = required
    step: Mapping[str, Any] | None  # settings of StepConfig; None = as configured


_PLAIN = {"attention": "sdpa", "decoder_attention": "sdpa", "mlp": "plain", "compile": False}
_EAGER = {**_PLAIN, "attention": "eager", "decoder_attention": "eager"}
_OPS = {"mlp": "plain", "compile": True, "cuda_graphs": False}
_GRAPHS = {**_OPS, "cuda_graphs": True}
RECIPES = {
    "plain": Recipe(None, _PLAIN),
    "plain compiled": Recipe(None, {**_PLAIN, "compile": True}),
    "ours": Recipe(False, None),
    "ours lean": Recipe(False, {"residual": "bf16", "mlp": "fused", "activation_budget": 0.8}),
    # further stages of the waterfall
    "eager attention": Recipe(None, _EAGER),
    "ops": Recipe(True, {"mlp": "plain", "compile": False}),
    "ops compiled": Recipe(True, _OPS),
    "ops graphs": Recipe(True, _GRAPHS),
    "ops bf16": Recipe(True, {**_GRAPHS, "residual": "bf16"}),
    "ops fused MLP": Recipe(True, {**_GRAPHS, "residual": "bf16", "mlp": "fused"}),
}
# label and provider; each stage adds something to the one before it
WATERFALL = (
    ("published", "published"),
    ("masked rows only, eager attention", "eager attention"),
    ("+ SDPA", "plain"),
    ("+ our ops", "ops"),
    ("+ torch.compile", "ops compiled"),
    ("+ CUDA graphs", "ops graphs"),
    ("+ bf16 residual", "ops bf16"),
    ("+ fused MLP", "ops fused MLP"),
)


# ---- what all providers share ----


@dataclass(frozen=True)
class Setup:
    """step: further settings of StepConfig for our recipes, such as {"cuda_graphs": False}."""

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
        model = self.config.model
        width, depth, heads = model.encoder_shape
        names = ("mask_ratio", "decoder_width", "decoder_depth", "decoder_heads")
        return {
            "batch": self.batch,
            "image": list(model.image_size),
            "patch": model.patch_size,
            "channels": model.in_channels,
            "width": width,
            "depth": depth,
            "heads": heads,
            **{name: getattr(model, name) for name in names},
        }

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

    `images` and `floats` are created on the device when first used.
    """

    def __init__(self, setup: Setup) -> None:
        model = setup.config.model
        self._setup = setup
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
        """[B, C, H, W] uint8."""
        return self._host_images.to(self._setup.device)

    @cached_property
    def floats(self) -> Tensor:
        """[B, C, H, W] the images normalised, fp32."""
        model = self._setup.config.model
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
        return ((self._host_images.float() / 255 - mean) / std).to(self._setup.device)

    def bytes(self) -> int:
        """On the device."""
        tensors = [self.__dict__[n] for n in ("images", "floats", "noises") if n in self.__dict__]
        return sum(t.numel() * t.element_size() for t in tensors)

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


def missing(provider: str, device: torch.device) -> str | None:
    """Why the provider is not available on this machine; None if it is."""
    needed = ["pydantic"] + ["transformers"] * provider.startswith("ViTMAE")
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    return "needs a CUDA device" if provider == "ours lean" and device.type != "cuda" else None


def kernels_reason(device: torch.device) -> str | None:
    """Why the kernels of the ops do not run on the device; None if they do."""
    if device.type != "cuda":
        return f"the kernels need a CUDA device, this is {device}"
    return mae_kernels.info()["embed_patches"]


def held_bytes(step: OwnStep | LoopStep) -> int:
    """Bytes of weights, buffers and moments, which stay between steps."""
    state = [t for values in step.optimizer.state.values() for t in values.values()]
    tensors = [*step.model.parameters(), *step.model.buffers()]
    tensors += [t for t in state if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def build(provider: str, setup: Setup, data: Data, source: SSSD) -> OwnStep | LoopStep:
    """Raises SssdError if this device, dtype or model cannot run it."""
    if provider in RECIPES:
        return OwnStep(setup, data, RECIPES[provider], source)
    compile_it = provider.endswith(" compiled")
    if provider.startswith("ViTMAE"):
        return LoopStep(setup, data, vitmae(setup, source), _vitmae_loss, compile_it, fused=True)
    model = published_model(setup, source)
    return LoopStep(setup, data, model, _published_loss, compile_it, fused=compile_it)


class OwnStep:
    """Our model in sssd_fast.step.Step. A call returns the loss before the update, on the device.

    how: what was selected, and why.
    """

    def __init__(self, setup: Setup, data: Data, recipe: Recipe, source: SSSD) -> None:
        from sssd_fast.config import StepConfig
        from sssd_fast.objective import SSSD
        from sssd_fast.optim import build_optimizer, parameter_groups
        from sssd_fast.performance.execution import compiled, configure_model
        from sssd_fast.run.device import World
        from sssd_fast.step import Step

        problem = kernels_reason(setup.device)
        if recipe.kernels and problem:
            raise ConfigError(problem)
        self._data = data
        self._count = 0
        self._backend = "reference" if recipe.kernels is None else "auto"
        settings = setup.config.step.model_dump() if recipe.step is None else dict(recipe.step)
        step = StepConfig.model_validate({**settings, **setup.step})
        config = setup.config.model_copy(update={"step": step})
        self.model: SSSD = SSSD(config.model, config.objective)
        self.model.load_state_dict(source.state_dict())
        self.model.to(setup.device)
        precision = NAMES[setup.dtype]
        self._budget = step.activation_budget
        with mae_kernels.backend(self._backend), self._compiler():
            execution = configure_model(self.model, config, precision, setup.device, setup.batch)
            module: nn.Module = self.model
            if execution.compiled:
                _own_code(self.model)
                module = compiled(self.model, step, graphs=execution.graphs)
        self._lr, betas, weight_decay = setup.adamw()
        groups = parameter_groups(self.model, weight_decay=weight_decay)
        self.optimizer = build_optimizer(groups, betas, step.optimizer)
        self._step = Step(
            module,
            self.optimizer,
            self._loss,
            world=World(setup.device),
            precision=precision,
            update_state=self.model.update_center,
            compiled=execution.compiled,
            graphs=execution.graphs,
        )
        ops = f"kernels off, {problem}" if problem else "kernels"
        ops = "reference, plain torch" if recipe.kernels is None else ops
        self.how = "; ".join([f"ops: {ops}", *execution.lines])

    def _loss(self, module: nn.Module, images_BCHW: Tensor, step: int, micro: int) -> Any:
        from sssd_fast.step import TaskLoss

        out = module(images_BCHW, self._data.noise(step))
        return TaskLoss(out.total, {}, out.batch_center)

    @contextmanager
    def _compiler(self) -> Iterator[None]:
        """Limits to this provider the settings that `compiled` would leave in torch."""
        import torch._functorch.config as functorch

        with functorch.patch(activation_memory_budget=self._budget, is_non_builtin_to_include=True):
            yield

    def __call__(self) -> Tensor:
        count = self._count
        self._count = count + 1
        with mae_kernels.backend(self._backend), self._compiler():
            return self._step([self._data.images], count, self._lr).losses["loss"]


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


# module, images, noise -> loss, batch centre
Loss = Callable[[Any, Tensor, Tensor], tuple[Tensor, "Tensor | None"]]


def _published_loss(
    module: Any, images_BCHW: Tensor, noise_BL: Tensor
) -> tuple[Tensor, Tensor | None]:
    loss, batch_center_S = module(images_BCHW, noise_BL)
    return loss, batch_center_S


def _vitmae_loss(module: Any, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, None]:
    return module(images_BCHW, noise=noise_BL).loss, None


class LoopStep:
    """The bare loop around a model that takes float images and noise."""

    def __init__(
        self,
        setup: Setup,
        data: Data,
        model: nn.Module,
        loss: Loss,
        compile_it: bool,
        *,
        fused: bool,
    ) -> None:
        from sssd_fast.optim import parameter_groups
        from sssd_fast.run.device import autocast

        self.model = model.to(setup.device)
        self._loss = loss
        self._count = 0
        self._images = data.floats
        self._noise = data.noise
        lr, betas, weight_decay = setup.adamw()
        groups = parameter_groups(self.model, weight_decay=weight_decay)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=lr, betas=betas, fused=fused or None
        )
        self._autocast = partial(autocast, NAMES[setup.dtype], setup.device)
        self._scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.dtype == torch.float16)
        self._module: Any = torch.compile(model, dynamic=False) if compile_it else model
        compile_text = "on" if compile_it else "off"
        self.how = f"compile: {compile_text}; AdamW: {'fused' if fused else 'default'}"

    def __call__(self) -> Tensor:
        noise_BL = self._noise(self._count)
        self._count = self._count + 1
        with self._autocast():
            loss, batch_center_S = self._loss(self._module, self._images, noise_BL)
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if batch_center_S is not None:
            assert isinstance(self.model, published.SDMAE)
            self.model.update_center(batch_center_S)
        return loss.detach()


def published_mae(config: Config) -> published.MaskedAutoencoderViT:
    """The published autoencoder of these sizes, not initialised."""
    m = config.model
    width, depth, heads = m.encoder_shape
    s = Shape(
        *(m.name, 1, width, heads, m.decoder_width, m.decoder_heads),
        image=m.image_size,
        patch=m.patch_size,
        channels=m.in_channels,
        mask_ratio=m.mask_ratio,
    )
    norm = config.objective.norm
    return published.MaskedAutoencoderViT(s, depth, m.decoder_depth, norm, m.mlp_ratio, m.norm_eps)


def published_model(setup: Setup, source: SSSD) -> published.MaskedAutoencoderViT | published.SDMAE:
    """The published model of the task with the weights of `source`.

    Raises ConfigError for settings that it does not have.
    """
    o = setup.config.objective
    if not setup.config.model.cls_token:
        raise ConfigError("model.cls_token is false; the published models need true")
    mae = published_mae(setup.config)
    if setup.task == "MAE":
        mae.load_state_dict(to_published(source))
        return mae
    chosen = (o.kind, o.pooling, o.center, o.detach_teacher)
    if chosen != ("dino", "image", "prob", False):
        raise ConfigError(
            f"objective has kind, pooling, center, detach_teacher {chosen}; "
            "published SD-MAE has dino, image, prob, false"
        )
    sdmae = published.SDMAE(
        mae,
        weight=o.weight,
        head=(o.head_hidden, o.head_bottleneck, o.prototypes),
        temps=(o.student_temp, o.teacher_temp),
        momentum=o.center_momentum,
    )
    sdmae.load_state_dict(to_published(source))
    return sdmae


HEAD_NAMES = {
    "_head.fc1": "_head.mlp.0",
    "_head.fc2": "_head.mlp.2",
    "_head.fc3": "_head.mlp.4",
    "_head.prototypes": "_head.last_layer.weight",
}


def to_published(source: SSSD) -> dict[str, Tensor]:
    """The weights of `source` under the names of published.py."""
    from sssd_fast.weights.formats import export_state

    mae = export_state(source.mae, "timm", decoder=True)
    if source.student_head is None:
        return mae
    named = {f"mae.{name}": tensor for name, tensor in mae.items()}
    for name, tensor in source.state_dict().items():
        if not name.startswith("mae."):
            for own, theirs in HEAD_NAMES.items():
                name = name.replace(own, theirs)
            named[name] = tensor
    return named


def vitmae(setup: Setup, source: SSSD) -> nn.Module:
    """transformers' model with the weights of `source`.

    Raises ConfigError for settings that it does not have.
    """
    norm = setup.config.objective.norm
    if norm == "channel":
        raise ConfigError("objective.norm is channel; ViTMAE needs patch or none")
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers loads torchao, which warns about other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
