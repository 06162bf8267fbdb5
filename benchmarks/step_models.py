"""The training step of every provider: one full optimizer step on one batch, from equal weights.

    "published"       published.py: MAE, SD-MAE (task SSSD) or MAE's classifier
    "transformers"    ViTMAEForPreTraining or ViTForImageClassification; not for SSSD
    "plain"           our model in plain torch with SDPA, not compiled
    "ours"            our model as the configuration selects on this device

The first three exist in fp32 and bf16, eager and under torch.compile ("compiled"); transformers
also with its eager attention ("eager"). "2 processes" trains on the same batch in two processes.

A step: forward under autocast, backward, AdamW with equal settings, no clipping. Our model runs in
sssd_fast.step.Step, which also computes the norm of the gradients and skips a non-finite update;
the others have a bare loop and get normalised float32 images, where ours read uint8. "published"
runs AdamW with its defaults, the others its fused form. Fine-tuning classifies from the cls token,
without stochastic depth and weight decay, which the providers implement differently.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mae_kernels
from benchmarks import published
from benchmarks.results import NAMES
from sssd_fast.errors import ConfigError

if TYPE_CHECKING:
    from sssd_fast.config import Config
    from sssd_fast.model import Classifier
    from sssd_fast.objective import SSSD
    from sssd_fast.run.device import World

SEED = 0
NOISES = 32  # draws of the masking noise; step i uses number i modulo this
CLASSES = 2
TASKS = ("MAE", "SSSD", "finetune")
PLAIN = {"attention": "sdpa", "decoder_attention": "sdpa", "mlp": "plain"}


@dataclass(frozen=True)
class Provider:
    family: str  # "ours", "plain", "published", "transformers"
    dtype: torch.dtype
    compile: bool = False  # of ours: True, else the configuration decides
    attention: str = "sdpa"  # of transformers: "sdpa" is its default
    processes: int = 1

    @property
    def name(self) -> str:
        words = [self.family]
        words += ["eager"] * (self.attention == "eager") + ["compiled"] * self.compile
        words += [f"{self.processes} processes"] * (self.processes > 1)
        return ", ".join(words)


# ---- what all providers share ----

# Of one channel with small decoders for a CPU, and of three channels with MAE's decoder.
_DECODER = ("decoder_width", "decoder_depth", "decoder_heads")
_TINY = {"name": "tiny", "in_channels": 1, **dict(zip(_DECODER, (96, 2, 3), strict=True))}
_SMALL = {"name": "small", "in_channels": 1, **dict(zip(_DECODER, (192, 4, 3), strict=True))}
MODELS: dict[str, dict[str, Any]] = {
    "ViT-T-128": {**_TINY, "image_size": 128},
    "ViT-T-224": {**_TINY, "image_size": 224},
    "ViT-S-224": {**_SMALL, "image_size": 224},
    "ViT-B-224": {"name": "base", "in_channels": 3},
}


@dataclass(frozen=True)
class Setup:
    model: str
    config: Config  # of the task: see `configuration`
    task: str
    device: torch.device
    batch: int

    @property
    def shape(self) -> str:
        return f"{self.model}, {self.batch} images"

    @property
    def sizes(self) -> dict[str, Any]:
        return {"batch": self.batch, **self.config.model.model_dump(mode="json")}

    def adamw(self) -> tuple[float, tuple[float, float], float]:
        """(learning rate, betas, weight decay)"""
        from sssd_fast.optim import scaled_lr

        p = self.config.finetune if self.task == "finetune" else self.config.pretrain
        # position tables, which have other names in other libraries, are trained in fine-tuning
        decay = 0.0 if self.task == "finetune" else p.weight_decay
        return scaled_lr(p.base_lr, self.batch), (p.beta1, p.beta2), decay

    def flops(self) -> int:
        """Of matrix products per image, by the convention in which MAEs are compared."""
        from sssd_fast.performance.fake import FakeStep, standard_flops

        if self.task == "finetune":
            return FakeStep(self.config, "finetune").flops()
        return standard_flops(self.config)


def configuration(name: str, task: str) -> Config:
    """A key of MODELS or a shipped configuration. "SSSD": the published form, which the published
    models have too; "MAE": without distillation; "finetune": from the cls token, without
    stochastic depth.
    """
    from sssd_fast.config import from_dict, load_config

    return for_task(
        from_dict({"model": MODELS[name]}) if name in MODELS else load_config(name), task
    )


def for_task(config: Config, task: str) -> Config:
    from sssd_fast.config import FORM_KEYS, ObjectiveConfig

    published = ObjectiveConfig(name="published")
    form = {key: getattr(published, key) for key in ("name", *FORM_KEYS)}
    weight = {} if task == "SSSD" else {"weight": 0.0}
    objective = config.objective.model_copy(update={**form, **weight})
    tuning = config.finetune.model_copy(update={"pool": "cls", "drop_path": 0.0})
    return config.model_copy(update={"objective": objective, "finetune": tuning})


class Data:
    """One batch of smooth random images with noise, and the masking noise; equal on every machine.

    `images` [B, C, H, W] uint8 and `floats`, the same normalised in fp32, are created on the device
    when first used. rank, size: only the images of one of `size` processes.
    """

    def __init__(self, setup: Setup, rank: int = 0, size: int = 1) -> None:
        self._model = model = setup.config.model
        self._device = setup.device
        mine = slice(rank, None, size)
        generator = torch.Generator().manual_seed(SEED)
        (height, width), B, C = model.image_size, setup.batch, model.in_channels
        coarse = (B, C, max(2, height // 16), max(2, width // 16))
        coarse_BCHW = torch.rand(coarse, generator=generator)
        images_BCHW = F.interpolate(coarse_BCHW, (height, width), mode="bilinear")
        images_BCHW += 0.1 * torch.rand(images_BCHW.shape, generator=generator)
        self._host_images = (images_BCHW / 1.1 * 255).to(torch.uint8)[mine]
        noises = torch.rand(NOISES, B, model.num_patches, generator=generator)
        self.noises = noises[:, mine].to(setup.device)
        self.labels = torch.randint(CLASSES, (B,), generator=generator)[mine].to(setup.device)

    @cached_property
    def images(self) -> Tensor:
        return self._host_images.to(self._device)

    @cached_property
    def floats(self) -> Tensor:
        stats = (self._model.mean, self._model.std)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in stats)
        return ((self._host_images.float() / 255 - mean) / std).to(self._device)

    def noise(self, step: int) -> Tensor:
        return self.noises[step % NOISES]


def new_model(setup: Setup) -> SSSD | Classifier:
    from sssd_fast.model import Classifier
    from sssd_fast.objective import SSSD

    if setup.task == "finetune":
        return Classifier(setup.config.model, CLASSES, setup.config.finetune.pool)
    return SSSD(setup.config.model, setup.config.objective)


def initial_model(setup: Setup) -> SSSD | Classifier:
    """On the CPU, from a fixed seed; no bias or norm is 0 or 1, and no logit, so that a missing
    one changes the loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = new_model(setup)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and (parameter.ndim == 1 or name == "head.weight"):
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def reference_losses(
    setup: Setup, source: nn.Module, dtype: torch.dtype, steps: int
) -> list[float]:
    """Losses of the first steps of the published model: fp64 is exact, another dtype shows the
    error of eager PyTorch. The batch is split, so that it fits wherever the providers fit.
    """
    step = build(Provider("published", dtype), setup, Data(setup), source, at_once=16)
    return [float(step()) for _ in range(steps)]


# ---- providers ----


def missing(family: str) -> str | None:
    """Why providers of the family are not available on this machine; None if they are."""
    needed = ["pydantic", "omegaconf"] + ["transformers"] * (family == "transformers")
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

    def close(self) -> None:
        """Here there is nothing to end; see processes.Processes."""


def build(
    provider: Provider,
    setup: Setup,
    data: Data,
    source: nn.Module,
    world: World | None = None,
    at_once: int | None = None,
) -> Training:
    """world: of which this process is a part. at_once: images of a micro-batch, not for our model.
    Raises SssdError if this device, dtype or model cannot run the provider.
    """
    from sssd_fast.run.device import World

    world = world or World(setup.device)
    if provider.family in ("ours", "plain"):
        return own_step(provider, setup, data, source, world)
    make = vitmae if provider.family == "transformers" else published_model
    return loop_step(provider, setup, data, make(setup, source), world, at_once or setup.batch)


def isolated(model: nn.Module) -> nn.Module:
    """Gives `model` a forward with its own code object.

    torch keeps compiled code by code object: providers of one class would search each other's at
    every call.
    """
    old: Any = type(model).forward
    new = types.FunctionType(
        old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__
    )
    model.forward = types.MethodType(new, model)
    return model


def own_step(
    provider: Provider, setup: Setup, data: Data, source: nn.Module, world: World
) -> Training:
    """Our model in sssd_fast.step.Step."""
    import torch._functorch.config as functorch

    from sssd_fast.config import StepConfig
    from sssd_fast.optim import build_optimizer, parameter_groups
    from sssd_fast.performance.execution import compiled, configure_model
    from sssd_fast.run.device import data_parallel
    from sssd_fast.step import Step, TaskLoss

    ours = provider.family == "ours"
    plain = {**PLAIN, "compile": provider.compile}
    # compiled: what a run long enough to win back the compilation does
    settings = setup.config.step.model_dump() | {"compile": provider.compile or "auto"}
    step = StepConfig.model_validate(settings if ours else plain)
    config = setup.config.model_copy(update={"step": step})
    model: Any = new_model(setup)
    model.load_state_dict(source.state_dict())
    model.to(setup.device)
    precision = NAMES[provider.dtype]

    @contextmanager
    def selected() -> Iterator[None]:
        """Limits to this provider the settings that `compiled` would leave in torch."""
        budget = {"activation_memory_budget": step.activation_budget}
        ops = mae_kernels.backend("auto" if ours else "reference")
        with ops, functorch.patch({**budget, "is_non_builtin_to_include": True}):
            yield

    with selected():
        images = len(data.images)
        execution = configure_model(model, config, precision, setup.device, images)
        module: nn.Module = model
        if execution.compiled:
            module = compiled(isolated(model), step, graphs=execution.graphs)
    lr, betas, weight_decay = setup.adamw()
    groups = parameter_groups(model, weight_decay=weight_decay)
    optimizer = build_optimizer(groups, betas, step.optimizer)

    def loss(module: nn.Module, images_BCHW: Tensor, step: int, micro: int) -> TaskLoss:
        if setup.task == "finetune":
            return TaskLoss(F.cross_entropy(module(images_BCHW).float(), data.labels), {})
        out = module(images_BCHW, data.noise(step))
        return TaskLoss(out.total, {}, out.batch_center)

    train = Step(
        data_parallel(module, world),
        optimizer,
        loss,
        world=world,
        precision=precision,
        update_state=getattr(model, "update_center", None),
        graphs=execution.graphs,
    )

    def run(number: int) -> Tensor:
        with selected():
            return train([data.images], number, lr).losses["loss"]

    ops = "auto" if ours else "reference, plain torch"
    how = [f"ops: {ops}", f"precision: {precision}", *execution.lines]
    return Training(model, optimizer, run, "; ".join(how))


def loop_step(
    provider: Provider, setup: Setup, data: Data, model: nn.Module, world: World, at_once: int
) -> Training:
    """The bare loop around a model that takes float images and, in pre-training, noise."""
    from sssd_fast.optim import parameter_groups
    from sssd_fast.run.device import autocast, data_parallel

    hugging = provider.family == "transformers"
    wide = torch.promote_types(provider.dtype, torch.float32)
    model.to(setup.device, wide)
    if hugging:
        model.set_attn_implementation(provider.attention)  # type: ignore[operator]
    fused = provider.family != "published" or provider.compile
    lr, betas, weight_decay = setup.adamw()
    groups = parameter_groups(model, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)
    scaler = torch.amp.GradScaler(setup.device.type, enabled=provider.dtype == torch.float16)
    module: Any = torch.compile(isolated(model), dynamic=False) if provider.compile else model
    module = data_parallel(module, world)
    images = data.floats.to(wide)
    parts = [slice(n, n + at_once) for n in range(0, len(images), at_once)]

    def loss_of(number: int, some: slice) -> tuple[Tensor, Tensor | None]:
        if setup.task == "finetune":
            logits_BC = module(images[some]).logits if hugging else module(images[some])
            return F.cross_entropy(logits_BC.to(wide), data.labels[some]), None
        noise_BL = data.noise(number)[some]
        if hugging:
            return module(images[some], noise=noise_BL).loss, None
        loss, center_S = module(images[some], noise_BL)
        return loss, center_S

    def run(number: int) -> Tensor:
        losses, centers = [], []
        for some in parts:
            share = len(images[some]) / len(images)
            with autocast(NAMES.get(provider.dtype, ""), setup.device):
                loss, center_S = loss_of(number, some)
            scaler.scale(loss if share == 1 else loss * share).backward()
            losses.append(loss.detach() * share)
            centers += [] if center_S is None else [center_S * share]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, published.SDMAE):
            model.update_center(world.mean_(torch.stack(centers).sum(0)))
        return torch.stack(losses).sum()

    adamw = "fused" if fused else "default"
    how = f"attention: {provider.attention}; compile: {provider.compile}; AdamW: {adamw}"
    return Training(model, optimizer, run, how)


def published_model(setup: Setup, source: Any) -> nn.Module:
    """The published model of the task with the weights of `source`.

    Raises ConfigError for settings that it does not have.
    """
    from sssd_fast.weights.formats import export_state

    m, o = setup.config.model, setup.config.objective
    chosen = (m.cls_token, o.kind, o.pooling, o.center, o.stop_gradient)
    if chosen != (True, "dino", "image", "prob", "none"):
        raise ConfigError(
            f"cls_token, kind, pooling, center and stop_gradient are {chosen}; the published "
            "models have true, dino, image, prob and none (objective.name=published)"
        )
    if setup.task == "finetune":
        classifier = published.Classifier(m, CLASSES)
        classifier.load_state_dict(export_state(source, "timm"))
        return classifier
    mae = published.MaskedAutoencoderViT(m, o.norm)
    mae.load_state_dict(export_state(source.mae, "timm", decoder=True))
    if setup.task == "MAE":
        return mae
    sdmae = published.SDMAE(mae, o)
    others = {n: t for n, t in source.state_dict().items() if not n.startswith("mae.")}
    sdmae.load_state_dict(others, strict=False)
    return sdmae


def vitmae(setup: Setup, source: Any) -> nn.Module:
    """transformers' model of the task with the weights of `source`.

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
        pretrain = setup.task == "MAE"
        given = source.mae if pretrain else source
        tree = huggingface_config(given, decoder=pretrain)
        tree |= {"norm_pix_loss": norm == "patch"} if pretrain else {}
        known = {n: v for n, v in tree.items() if n not in ("architectures", "model_type")}
        kind = "ViTMAE" if pretrain else "ViT"
        head = "ForPreTraining" if pretrain else "ForImageClassification"
        model = getattr(transformers, kind + head).from_pretrained(
            None,
            config=getattr(transformers, f"{kind}Config")(**known),
            state_dict=export_state(given, "huggingface", decoder=pretrain),
        )
    finally:
        logging.disable(logging.NOTSET)
    if pretrain:  # fixed by design, but from_pretrained of transformers 5.23 makes them trainable
        model.vit.embeddings.position_embeddings.requires_grad_(False)
        model.decoder.decoder_pos_embed.requires_grad_(False)
    trained: nn.Module = model.train()
    return trained
