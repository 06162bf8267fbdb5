"""The training step of every provider: one full optimizer step on a batch that lies on the device, from equal weights, masking alike.

    MAE     "published", "published compiled"    published.py, eager and under torch.compile
            "ViTMAE", "ViTMAE compiled"          transformers' ViTMAEForPreTraining, as installed
            "plain", "plain compiled"            our model with the reference ops in plain torch, SDPA, plain MLP
            "ours"                               what the configuration's settings choose on this device
            "ours lean"                          less memory: bf16 residual stream, fused MLP, activation budget 0.8
    SSSD    the same without ViTMAE; "published" is SD-MAE

A step: forward under autocast, backward, AdamW at the same learning rate, betas and weight decay, without clipping, gradients set to
None; biases, norms and tokens are not decayed. Ours and plain run sssd_fast.step.Step, which also takes the gradients' norm and
withholds an update that is not finite. The others have a bare loop and get their images normalised in float32, ready on the device,
where ours read uint8. "published" runs torch.optim.AdamW as it is by default, every other provider its fused form.

torch and the standard library suffice to import this file; what needs pydantic or transformers is imported inside functions.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import mae_kernels
from sssd_fast.errors import ConfigError

from . import published
from .machine import NAMES
from .step_data import Data, Setup

if TYPE_CHECKING:
    from sssd_fast.objective import SSSD

TASKS = ("SSSD", "MAE")
PROVIDERS = {
    "MAE": (
        "published", "published compiled", "ViTMAE", "ViTMAE compiled", "plain", "plain compiled", "ours", "ours lean",
    ),
    "SSSD": ("published", "published compiled", "plain", "plain compiled", "ours", "ours lean"),
}  # fmt: skip
CUDA_ONLY = ("ours lean",)


@dataclass(frozen=True)
class Recipe:
    """How our model is computed. kernels: None = the reference ops, False = what the device takes, True = kernels or nothing."""

    kernels: bool | None
    step: Mapping[str, Any] | None  # of StepConfig; None = as in the configuration


_PLAIN = {"attention": "sdpa", "decoder_attention": "sdpa", "mlp": "plain", "compile": False}
_OPS = {"mlp": "plain", "compile": True, "cuda_graphs": False}
RECIPES = {
    "plain": Recipe(None, _PLAIN),
    "plain compiled": Recipe(None, {**_PLAIN, "compile": True}),
    "ours": Recipe(False, None),
    "ours lean": Recipe(False, {"residual": "bf16", "mlp": "fused", "activation_budget": 0.8}),
    # further stages of the waterfall
    "eager attention": Recipe(None, {**_PLAIN, "attention": "eager", "decoder_attention": "eager"}),
    "ops": Recipe(True, {"mlp": "plain", "compile": False}),
    "ops compiled": Recipe(True, _OPS),
    "ops graphs": Recipe(True, {**_OPS, "cuda_graphs": True}),
    "ops bf16": Recipe(True, {**_OPS, "cuda_graphs": True, "residual": "bf16"}),
    "ops fused MLP": Recipe(
        True, {**_OPS, "cuda_graphs": True, "residual": "bf16", "mlp": "fused"}
    ),
}
# label and provider; each stage adds to the one before it
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


def missing(provider: str) -> str | None:
    """Which package the provider lacks on this machine; None when it can be built."""
    needed = ["pydantic"] + ["transformers"] * provider.startswith("ViTMAE")
    absent = [name for name in needed if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def kernels_refused(device: torch.device) -> str | None:
    """Why the ops' kernels do not run on the device; None when they do."""
    if device.type != "cuda":
        return f"the kernels of the ops need a CUDA device, this is {device}"
    return mae_kernels.info()["embed_patches"]


class TrainStep(Protocol):
    """One optimizer step per call; returns the loss before the update, a scalar on the device."""

    how: str  # what was chosen, and why
    graphs: bool  # CUDA graphs, which keep their memory between calls
    optimizer: torch.optim.Optimizer

    @property
    def model(self) -> nn.Module: ...

    def __call__(self) -> Tensor: ...


def held_bytes(step: TrainStep) -> int:
    """Of weights, fixed tables and moments, which stay between steps; moments are made by the first one."""
    state = [
        t
        for values in step.optimizer.state.values()
        for t in values.values()
        if isinstance(t, Tensor)
    ]
    return sum(
        t.numel() * t.element_size()
        for t in [*step.model.parameters(), *step.model.buffers(), *state]
    )


def build(provider: str, setup: Setup, data: Data, source: SSSD) -> TrainStep:
    """Raises SssdError where this device, dtype or model cannot run it."""
    if provider in RECIPES:
        return OwnStep(setup, data, RECIPES[provider], source)
    compile_it = provider.endswith(" compiled")
    if provider.startswith("ViTMAE"):
        return LoopStep(setup, data, vitmae(setup, source), _vitmae_loss, compile_it, fused=True)
    model = published_model(setup, source)
    return LoopStep(setup, data, model, _published_loss, compile_it, fused=compile_it)


# ---- ours and plain -----------------------------------------------------------------------------------------------------------


class OwnStep:
    def __init__(self, setup: Setup, data: Data, recipe: Recipe, source: SSSD) -> None:
        from sssd_fast.config import StepConfig
        from sssd_fast.objective import SSSD
        from sssd_fast.optim import build_optimizer, parameter_groups
        from sssd_fast.performance.execution import compiled, configure_model
        from sssd_fast.run.device import World
        from sssd_fast.step import Step

        refused = kernels_refused(setup.device)
        if recipe.kernels and refused:
            raise ConfigError(refused)
        self._data = data
        self._lr = setup.lr
        self._count = 0
        self._backend = "reference" if recipe.kernels is None else "auto"
        settings = setup.config.step.model_dump() if recipe.step is None else dict(recipe.step)
        config = setup.config.model_copy(
            update={"step": StepConfig.model_validate({**settings, **setup.step})}
        )
        self.model: SSSD = SSSD(config.model, config.objective)
        self.model.load_state_dict(source.state_dict())
        self.model.to(setup.device)
        precision = NAMES[setup.dtype]
        self._budget = config.step.activation_budget
        with mae_kernels.backend(self._backend), self._compiler():
            execution = configure_model(self.model, config, precision, setup.device, setup.batch)
            module: nn.Module = self.model
            if execution.compiled:
                _own_code(self.model)
                module = compiled(self.model, config.step, graphs=execution.graphs)
        pretrain = config.pretrain
        groups = parameter_groups(self.model, weight_decay=pretrain.weight_decay)
        self.optimizer = build_optimizer(groups, setup.betas, config.step.optimizer)
        self._step = Step(
            module, self.optimizer, self._loss,
            world=World(setup.device), precision=precision, update_state=self.model.update_center,
            compiled=execution.compiled, graphs=execution.graphs,
        )  # fmt: skip
        ops = (
            "reference, plain torch"
            if recipe.kernels is None
            else f"kernels off, {refused}"
            if refused
            else "kernels"
        )
        self.how = "; ".join([f"ops: {ops}", *execution.lines])
        self.graphs = execution.graphs

    def _loss(self, module: nn.Module, images_BCHW: Tensor, step: int, micro: int) -> Any:
        from sssd_fast.step import TaskLoss

        out = module(images_BCHW, self._data.noise(step))
        return TaskLoss(out.total, {}, out.batch_center)

    @contextmanager
    def _compiler(self) -> Iterator[None]:
        """The settings that `compiled` would leave in torch for good, for this provider only."""
        import torch._functorch.config as functorch

        with functorch.patch(activation_memory_budget=self._budget, is_non_builtin_to_include=True):
            yield

    def __call__(self) -> Tensor:
        count = self._count
        self._count = self._count + 1
        with mae_kernels.backend(self._backend), self._compiler():
            return self._step([self._data.images], count, self._lr).losses["loss"]


def _own_code(model: nn.Module) -> None:
    """Gives `model` a forward with a code object of its own: torch keeps what it compiled by code object, so that providers of one
    class would search each other's at every call."""
    forward: Any = type(model).forward
    code = forward.__code__.replace()
    own = types.FunctionType(
        code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    model.forward = types.MethodType(own, model)


# ---- the others ---------------------------------------------------------------------------------------------------------------


Loss = Callable[
    [Any, Tensor, Tensor], tuple[Tensor, "Tensor | None"]
]  # module, images, noise: loss, batch centre


def _published_loss(
    module: Any, images_BCHW: Tensor, noise_BL: Tensor
) -> tuple[Tensor, Tensor | None]:
    out = module(images_BCHW, noise_BL)
    return out[0], getattr(out, "batch_center_S", None)


def _vitmae_loss(
    module: Any, images_BCHW: Tensor, noise_BL: Tensor
) -> tuple[Tensor, Tensor | None]:
    return module(images_BCHW, noise=noise_BL).loss, None


class LoopStep:
    """The bare loop around a model that takes float images and noise."""

    def __init__(
        self, setup: Setup, data: Data, model: nn.Module, loss: Loss, compile_it: bool, *, fused: bool
    ) -> None:  # fmt: skip
        from sssd_fast.optim import parameter_groups
        from sssd_fast.run.device import autocast

        self.model = model.to(setup.device)
        self._loss = loss
        self._count = 0
        self.graphs = False
        self._images = data.floats
        self._noise = data.noise
        pretrain = setup.config.pretrain
        groups = parameter_groups(self.model, weight_decay=pretrain.weight_decay)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=setup.lr, betas=setup.betas, fused=fused or None
        )
        self._autocast = partial(autocast, NAMES[setup.dtype], setup.device)
        self._scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.dtype == torch.float16)
        self._module: Any = torch.compile(model, dynamic=False) if compile_it else model
        self.how = f"compile: {'on' if compile_it else 'off'}; AdamW: {'fused' if fused else 'as by default'}"

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


def published_model(setup: Setup, source: SSSD) -> published.MaskedAutoencoderViT | published.SDMAE:
    """The published model of the task with the weights of `source`. Raises ConfigError for settings that it does not know."""
    model, objective = setup.config.model, setup.config.objective
    if not model.cls_token:
        raise ConfigError(
            "model.cls_token is false; the published models have a cls token, set it to true"
        )
    width, depth, heads = model.encoder_shape
    sizes = published.Sizes(
        model.image_size, model.patch_size, model.in_channels, width, depth, heads, model.decoder_width,
        model.decoder_depth, model.decoder_heads, model.mlp_ratio, model.norm_eps, model.mask_ratio,
    )  # fmt: skip
    if setup.task == "MAE":
        mae = published.MaskedAutoencoderViT(sizes, objective.norm)
        mae.load_state_dict(to_published(source))
        return mae
    chosen = (objective.kind, objective.pooling, objective.center, objective.detach_teacher)
    if chosen != ("dino", "image", "prob", False):
        raise ConfigError(
            f"objective has kind, pooling, center, detach_teacher {chosen}; SD-MAE as published has dino, image, prob, false"
        )
    sdmae = published.SDMAE(
        sizes, objective.norm, weight=objective.weight, student_temp=objective.student_temp,
        head=(objective.head_hidden, objective.head_bottleneck, objective.prototypes),
        teacher_temp=objective.teacher_temp, momentum=objective.center_momentum,
    )  # fmt: skip
    sdmae.load_state_dict(to_published(source))
    return sdmae


_HEAD_NAMES = (
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
    ("fc3", "mlp.4"),
    ("prototypes", "last_layer.weight"),
)


def to_published(source: SSSD) -> dict[str, Tensor]:
    """The weights of `source` under the names of published.py, SD-MAE's where it has projection heads."""
    from sssd_fast.weights.formats import export_state

    mae = export_state(source.mae, "timm", decoder=True)
    if source.student_head is None:
        return mae
    named = {f"mae.{name}": tensor for name, tensor in mae.items()}
    for name, tensor in source.state_dict().items():
        if not name.startswith("mae."):
            for own, theirs in _HEAD_NAMES:
                name = name.replace(f"_head.{own}", f"_head.{theirs}")
            named[name] = tensor
    return named


def vitmae(setup: Setup, source: SSSD) -> nn.Module:
    """transformers' model with the weights of `source`. Raises ConfigError for settings that it does not know."""
    with _quiet():
        import transformers

    from sssd_fast.weights.formats import export_state, huggingface_config

    norm = setup.config.objective.norm
    if norm == "channel":
        raise ConfigError(
            "objective.norm is channel; ViTMAE normalises the whole patch or nothing, set patch or none"
        )
    tree = {**huggingface_config(source.mae, decoder=True), "norm_pix_loss": norm == "patch"}
    state = export_state(source.mae, "huggingface", decoder=True)
    transformers.utils.logging.disable_progress_bar()  # it would write through ours
    config = transformers.ViTMAEConfig(
        **{k: v for k, v in tree.items() if k not in ("architectures", "model_type")}
    )
    with _quiet():
        model, told = transformers.ViTMAEForPreTraining.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    if told["missing_keys"] or told["unexpected_keys"]:
        raise ConfigError(
            f"ViTMAE of transformers {transformers.__version__} names its weights otherwise: it misses "
            f"{sorted(told['missing_keys'])[:3]} and does not know {sorted(told['unexpected_keys'])[:3]}"
        )
    # fixed by its design, but from_pretrained of transformers 5.23 makes them trainable
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    trained: nn.Module = model.train()
    return trained


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers loads torchao, which warns of parts that are for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
