"""How a model is computed on this machine: what config.step decides, each decision with its reason. None changes more than rounding.

`prepare` sets attention providers, the residual stream's dtype and recomputation on the model, and decides about torch.compile and
CUDA graphs; `compiled` makes the compiled module. A setting that cannot be carried out is a ConfigError, and "auto" says what it took.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mae_kernels
from sssd_fast.attention import Site, choose
from sssd_fast.config import Config, ModelConfig, StepConfig
from sssd_fast.errors import ConfigError
from sssd_fast.model import MLP, Attention, Blocks, Classifier
from sssd_fast.objective import SSSD
from sssd_fast.performance.costs import train_flops
from sssd_fast.run.device import AUTOCAST

# Launches of a compiled step, counted in Inductor's code for ViT-B (docs/compiled-step.md); 5 us for each on the CPU are assumed.
LAUNCHES_PER_BLOCK, OTHER_LAUNCHES, LAUNCH_S = 36, 120, 5e-6


@dataclass(frozen=True)
class Execution:
    compiled: bool
    graphs: bool  # CUDA graphs
    lines: tuple[str, ...]  # for the start of a run


def prepare(
    model: SSSD | Classifier, config: Config, precision: str, device: torch.device, batch_size: int
) -> Execution:
    """Sets `model` up for `config.step`; `batch_size` counts the images of a micro-batch. Raises ConfigError."""
    step, dtype = config.step, AUTOCAST.get(precision, torch.float32)
    compile_it, why = pick_compile(step, device)
    _check(step, compile_it, why, precision)
    lines = [f"compile: {'on' if compile_it else 'off'}, {why}"]
    lines += _set_attention(model, step, dtype, device, compile_it)
    fused, why_fused = pick_mlp(step.mlp, device)
    lines.append(f"MLP: {'fused' if fused else 'plain'}, {why_fused}")
    residual = (
        None
        if precision == "fp32"
        else torch.bfloat16
        if step.residual == "bf16"
        else torch.float32
    )
    recompute = {"none": None, "selective": _selective, "full": _full}[step.checkpoint]
    for module in model.modules():
        if isinstance(module, Blocks):
            module.residual = residual
            module.recompute = recompute
        elif isinstance(module, MLP):
            module.fused = fused
    if step.activation_budget < 1:
        _check_budget(model, config, precision, device, batch_size)
    graphs, why_graphs = pick_graphs(model, config, device, batch_size, dtype, compile_it)
    if compile_it:
        lines.append(f"CUDA graphs: {'on' if graphs else 'off'}, {why_graphs}")
    return Execution(compile_it, graphs, tuple(lines))


def compiled(model: nn.Module, step: StepConfig, *, graphs: bool) -> nn.Module:
    """`model` under torch.compile: one graph, static shapes, the random numbers of eager. Parameters and state dict stay `model`'s.

    What the compiler made is kept in $TORCHINDUCTOR_CACHE_DIR (the command line sets it to the user's cache folder), and found
    by the next run.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    inductor.fx_graph_cache = True
    functorch.enable_autograd_cache = True
    functorch.activation_memory_budget = step.activation_budget
    # else a budget would recompute Triton ops, whose cost it takes for nothing
    functorch.is_non_builtin_to_include = True
    options: dict[str, Any] = {"triton.cudagraphs": graphs, "fallback_random": True}
    wrapped = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compile_summary() -> str:
    """What this process had to compile, and what it found in the cache of earlier runs."""
    from torch._dynamo.utils import counters
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    new = sum(counters["inductor"][f"fxgraph_cache_{how}"] for how in ("miss", "bypass"))
    if new == 0:
        return f"every graph was found in {cache_dir()}"
    return f"{new} graph{'s' * (new > 1)} compiled, kept in {cache_dir()} for later runs"


# ---- compile and CUDA graphs -------------------------------------------------------------------------------------------------


def pick_compile(step: StepConfig, device: torch.device) -> tuple[bool, str]:
    """(whether to compile, why). auto: on a CUDA GPU, unless recomputation of blocks was asked for."""
    if step.compile != "auto":
        return step.compile, f"step.compile is {str(step.compile).lower()}"
    if step.checkpoint != "none":
        return False, f"step.checkpoint is {step.checkpoint}"
    if device.type != "cuda":
        return False, f"on the {device.type} compiling takes longer than it saves"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return False, "Triton needs sm_70 or newer"
    compiler = next(
        (name for name in (os.environ.get("CC", "gcc"), "gcc", "clang") if shutil.which(name)), None
    )
    if compiler is None:
        return (
            False,
            "Triton needs a C compiler and finds none (on Debian or Ubuntu: apt install gcc python3-dev)",
        )
    return True, "on a GPU Inductor fuses norms, GELU, additions and casts"


def pick_graphs(
    model: SSSD | Classifier,
    config: Config,
    device: torch.device,
    batch_size: int,
    dtype: torch.dtype,
    compile_it: bool,
) -> tuple[bool, str]:
    """(whether to replay the compiled module as CUDA graphs, why).

    auto: where starting the kernels one by one would take longer than running them: FLOPs of the micro-batch at half of the matrix
    product rate measured on this device, against 5 us a launch.
    """
    asked = config.step.cuda_graphs
    if not compile_it:
        if asked is True:
            raise ConfigError(
                "step.cuda_graphs is true, which needs step.compile=true: here the step is not compiled"
            )
        return False, "the step is not compiled"
    if device.type != "cuda":
        if asked is True:
            raise ConfigError(
                f"step.cuda_graphs is true, which needs a CUDA device; the device is {device}"
            )
        return False, f"the device is {device}"
    if asked != "auto":
        return asked, f"step.cuda_graphs is {str(asked).lower()}"
    from sssd_fast.performance.ceilings import measure_ceilings
    from sssd_fast.performance.costs import classifier_parts

    if isinstance(model, SSSD):
        flops = train_flops(config.model, config.objective)
    else:
        flops = sum(
            p.forward_flops + p.backward_flops
            for p in classifier_parts(config.model, model.num_classes)
        )
    busy_s = batch_size * flops / (0.5 * measure_ceilings(device, dtype).matmul_flops)
    launches = expected_launches(config.model, decoder=isinstance(model, SSSD))
    launch_s = launches * LAUNCH_S
    compared = f"{launches} launches are expected to take {launch_s * 1e3:.1f} ms, the kernels {busy_s * 1e3:.1f} ms"
    return busy_s < launch_s, compared


def expected_launches(model: ModelConfig, *, decoder: bool) -> int:
    blocks = model.encoder_shape[1] + (model.decoder_depth if decoder else 0)
    return OTHER_LAUNCHES + LAUNCHES_PER_BLOCK * blocks


def pick_mlp(setting: str, device: torch.device) -> tuple[bool, str]:
    """(whether the second half of an MLP is mae_kernels.gelu_linear, why)."""
    reason = mae_kernels.info()["gelu_linear"]
    if device.type != "cuda":
        reason = f"the kernels of gelu_linear need a CUDA device, this is {device}"
    if setting == "fused" and reason is not None:
        raise ConfigError(
            f"step.mlp is fused, which cannot run here: {reason}. Set step.mlp to auto or plain"
        )
    if setting != "auto":
        return setting == "fused", f"step.mlp is {setting}"
    if reason is not None:
        return False, reason
    return (
        True,
        "by count of bytes it moves and keeps less than what the compiler makes (not measured)",
    )


def _check(step: StepConfig, compile_it: bool, why: str, precision: str) -> None:
    if step.residual == "bf16" and precision != "bf16":
        raise ConfigError(
            f"step.residual is bf16, which needs precision=bf16; the precision here is {precision}"
        )
    if step.activation_budget < 1 and not compile_it:
        raise ConfigError(
            f"step.activation_budget is {step.activation_budget:g}, which only a compiled step reads, and compile is off: {why}. "
            f"Set step.compile=true, or step.checkpoint=selective in its place"
        )


def _check_budget(
    model: SSSD | Classifier, config: Config, precision: str, device: torch.device, batch_size: int
) -> None:
    """torch ignores a budget without a word where activations are no larger than parameters."""
    from sssd_fast.performance.memory_check import budget_is_ignored
    from sssd_fast.performance.plan import options_of, work_of

    task, classes = ("pretrain", 2) if isinstance(model, SSSD) else ("finetune", model.num_classes)
    work = work_of(config, task, classes)
    if budget_is_ignored(work, options_of(config, work, precision, device, True), batch_size):
        raise ConfigError(
            f"step.activation_budget is {config.step.activation_budget:g}, which torch.compile ignores here: a micro-batch of "
            f"{batch_size} images keeps less than the parameters take. Raise the micro-batch, or set step.activation_budget=1; "
            f"for less memory at small batches: step.compile=false step.checkpoint=full"
        )


# ---- attention ---------------------------------------------------------------------------------------------------------------


def _set_attention(
    model: SSSD | Classifier,
    step: StepConfig,
    dtype: torch.dtype,
    device: torch.device,
    compile_it: bool,
) -> list[str]:
    """Chooses the provider of each kind of block; returns the lines that say which and why."""
    lines = []
    for setting, name, blocks, tokens in _sites(model, step):
        first = blocks[0].attn
        assert isinstance(first, Attention)
        site = Site(
            device,
            dtype,
            tokens,
            first.heads,
            first.qkv.in_features // first.heads,
            compiled=compile_it,
        )
        choice = choose(name, site, setting)
        lines.append(choice.line())
        for block in blocks:
            block.attn.provider = choice.provider  # type: ignore[union-attr] # a block's attention is a module
    return lines


def _sites(model: SSSD | Classifier, step: StepConfig) -> list[tuple[str, str, Blocks, int]]:
    """(setting, its value, blocks, tokens) of the encoder, and of the decoder where there is one."""
    if isinstance(model, Classifier):
        config = model.config
        return [
            (
                "step.attention",
                step.attention,
                model.encoder.blocks,
                config.num_patches + model.encoder.num_prefix,
            )
        ]
    config, prefix = model.mae.config, model.mae.encoder.num_prefix
    return [
        ("step.attention", step.attention, model.mae.encoder.blocks, config.num_visible + prefix),
        (
            "step.decoder_attention",
            step.decoder_attention,
            model.mae.decoder.blocks,
            config.num_patches + prefix,
        ),
    ]


# ---- recomputation without the compiler --------------------------------------------------------------------------------------


def _full(block: nn.Module, x_BND: Tensor, read: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Keeps the input of a block only (Chen et al., arXiv 1604.06174)."""
    out: Tensor = checkpoint(block, x_BND, read, use_reentrant=False)
    return out


def _selective(block: nn.Module, x_BND: Tensor, read: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Keeps the results of matrix products and attention, recomputes norms, GELU and additions: a few percent more time."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    out: Tensor = checkpoint(block, x_BND, read, use_reentrant=False, context_fn=contexts)
    return out


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if str(op).startswith(PRODUCTS)
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


PRODUCTS = (
    "aten.mm.",
    "aten.addmm.",
    "aten.bmm.",
    "aten._scaled_dot_product",
    "mae_kernels.",
    "xformers",
    "aten._cudnn_attention",
)
