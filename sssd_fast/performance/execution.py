"""How a model runs on this machine: what the section `step` of the settings decides, each decision
with its reason.

`configure_model` sets attention providers, the residual dtype and recomputation on the model and
decides about torch.compile and CUDA graphs; `compiled` returns the compiled module. No setting
changes more than rounding. A setting that cannot be carried out raises ConfigError; "auto" reports
what was chosen.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import mae_kernels
from sssd_fast.attention import AttentionShape, choose
from sssd_fast.config import Config, StepConfig
from sssd_fast.errors import ConfigError
from sssd_fast.model import MLP, Attention, Blocks, Classifier
from sssd_fast.objective import SSSD
from sssd_fast.performance.ceilings import measure_ceilings
from sssd_fast.performance.fake import FakeStep
from sssd_fast.run.device import AUTOCAST, precision_reason

# Launches of a compiled step, counted in Inductor's code for ViT-B (docs/compiled-step.md). 5 us of
# CPU time per launch are assumed.
LAUNCHES_PER_BLOCK = 36
OTHER_LAUNCHES = 120
LAUNCH_S = 5e-6
# FLOP/s of a training step per core in bf16 and in fp32; seconds to compile it, and the fraction of
# its time that compiling saves. Of ViT-T on an Intel Xeon with AMX (docs/benchmarks.md): 32 to 34 s
# in one process, 78 to 107 s in two; 18 % (pre-training, 128 pixels), 16 % (224 pixels) and 2 %
# (fine-tuning) in one process, 8 to 0 % in two.
CORE_FLOPS = 120e9, 50e9
CPU_COMPILE_S = 60
CPU_SAVING = 0.1
# The partitioner of torch.compile: torch/_functorch/partitioners.py, choose_saved_values_set.
BUDGET_RULE = (
    "torch.compile ignores it if the micro-batch keeps fewer bytes than the parameters take: then "
    "raise the micro-batch, or set step.compile=false step.checkpoint=full"
)


@dataclass(frozen=True)
class ExecutionPlan:
    compiled: bool
    graphs: bool  # CUDA graphs
    lines: tuple[str, ...]  # printed at the start of a run


def configure_model(
    model: SSSD | Classifier,
    config: Config,
    precision: str,
    device: torch.device,
    batch_size: int,
    run_images: int = 0,
) -> ExecutionPlan:
    """Sets `model` up as `config.step` requests.

    batch_size: images of a micro-batch. run_images: images that this process trains on in the
    whole run, 0 for a few steps. Raises ConfigError.
    """
    step, dtype = config.step, AUTOCAST.get(precision, torch.float32)
    expected_s = 0.0
    # counting FLOPs takes a second; no model is so slow that fewer images last for minutes
    if device.type == "cpu" and run_images >= 1000 and step.compile == "auto":
        expected_s = cpu_seconds(_flops(model, config) * run_images, precision)
    compile_it, why = pick_compile(step, device, expected_s)
    _check(step, compile_it, why, precision)
    choices = attention_choices(model, step, dtype, device, compile_it)
    fused, why_fused = pick_mlp(step.mlp, device, dtype, compile_it)
    providers = [name for name, _ in choices]
    keep_gelu = device.type == "cpu"  # where memory is not what limits training
    set_execution(model, step, precision, providers, fused_mlp=fused, keep_gelu=keep_gelu)
    lines = [f"precision: {precision}, {precision_reason(config.precision, device)}"]
    lines.append(f"compile: {'on' if compile_it else 'off'}, {why}")
    lines += [line for _, line in choices]
    lines.append(f"MLP: {'fused' if fused else 'plain'}, {why_fused}")
    graphs, why_graphs = pick_graphs(model, config, device, batch_size, dtype, compile_it)
    if compile_it:
        lines.append(f"CUDA graphs: {'on' if graphs else 'off'}, {why_graphs}")
    if step.activation_budget < 1:
        lines.append(f"activation budget: {step.activation_budget:g}; {BUDGET_RULE}")
    return ExecutionPlan(compile_it, graphs, tuple(lines))


def set_execution(
    model: SSSD | Classifier,
    step: StepConfig,
    precision: str,
    providers: Sequence[str],
    *,
    fused_mlp: bool,
    keep_gelu: bool = False,
) -> None:
    """The only place that sets how the modules of `model` compute.

    providers: of attention, one for each of `block_stacks(model)`. keep_gelu: the fused MLP keeps
    GELU for the backward instead of computing it again. The residual dtype and recomputation follow
    from `step` and `precision`.
    """
    residual = None
    if precision != "fp32":
        residual = torch.bfloat16 if step.residual == "bf16" else torch.float32
    recompute = {"none": None, "selective": _selective, "full": _full}[step.checkpoint]
    for blocks, provider in zip(block_stacks(model), providers, strict=True):
        blocks.residual = residual
        blocks.recompute = recompute
        for module in blocks.modules():
            if isinstance(module, Attention):
                module.provider = provider
            elif isinstance(module, MLP):
                module.fused, module.keep_gelu = fused_mlp, keep_gelu


def block_stacks(model: SSSD | Classifier) -> list[Blocks]:
    """The blocks of the encoder and, for pre-training, of the decoder."""
    if isinstance(model, Classifier):
        return [model.encoder.blocks]
    return [model.mae.encoder.blocks, model.mae.decoder.blocks]


def compiled(model: nn.Module, step: StepConfig, *, graphs: bool) -> nn.Module:
    """`model` under torch.compile: one graph, static shapes, the random numbers of eager mode.

    Parameters and state dict stay those of `model`. Compiled code is cached in
    $TORCHINDUCTOR_CACHE_DIR (the command line sets it to the user's cache folder) and found by the
    next run.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    inductor.fx_graph_cache = True
    functorch.enable_autograd_cache = True
    functorch.activation_memory_budget = step.activation_budget
    # Without this a budget recomputes Triton ops, whose cost the partitioner takes for zero.
    functorch.is_non_builtin_to_include = True
    options: dict[str, Any] = {"triton.cudagraphs": graphs, "fallback_random": True}
    wrapped = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compile_summary() -> str:
    """How many graphs this process compiled, or that all were found in the cache."""
    from torch._dynamo.utils import counters
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    new = sum(counters["inductor"][f"fxgraph_cache_{how}"] for how in ("miss", "bypass"))
    if new == 0:
        return f"every graph was found in {cache_dir()}"
    return f"{new} graph{'s' * (new > 1)} compiled, kept in {cache_dir()} for later runs"


# ---- decisions -----------------------------------------------------------------------------------


def _flops(model: SSSD | Classifier, config: Config) -> float:
    """FLOPs of a training step per image."""
    return FakeStep(config, "pretrain" if isinstance(model, SSSD) else "finetune").flops()


def cpu_seconds(flops: float, precision: str) -> float:
    """Roughly how long a run with so many FLOPs takes on the threads of this process.

    Not measured here, so that a run and its continuation decide alike.
    """
    return flops / (CORE_FLOPS[precision == "fp32"] * torch.get_num_threads())


def pick_compile(
    step: StepConfig, device: torch.device, expected_s: float = 0.0
) -> tuple[bool, str]:
    """(whether to compile, why).

    auto, unless block recomputation is enabled: on a CUDA GPU, and on a CPU if the run is expected
    to last so long (`expected_s`) that the time saved exceeds the time of compiling.
    """
    if step.compile != "auto":
        return step.compile, f"step.compile is {str(step.compile).lower()}"
    if step.checkpoint != "none":
        return False, f"step.checkpoint is {step.checkpoint}"
    if device.type == "cpu":
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
            return False, "Inductor needs a C++ compiler and finds none"
        if expected_s == 0:
            return False, "the run is short"
        saved = f"about {CPU_SAVING * expected_s:.0f} s of an expected {expected_s:.0f} s"
        takes = f"compiling takes about {CPU_COMPILE_S} s and saves {saved}"
        return CPU_SAVING * expected_s > CPU_COMPILE_S, takes
    if torch.cuda.get_device_capability(device) < (7, 0):
        return False, "Triton needs sm_70 or newer"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        hint = "on Debian or Ubuntu: apt install gcc python3-dev"
        return False, f"Triton needs a C compiler and finds none ({hint})"
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

    auto: if launching the kernels one by one takes longer than running them: FLOPs of the
    micro-batch at half of the matrix product rate measured on this device, against 5 us a launch.
    """
    requested = config.step.cuda_graphs
    if not compile_it or device.type != "cuda":
        problem = f"the device is {device}" if compile_it else "the step is not compiled"
        if requested is True:
            needed = "it needs step.compile=true and a CUDA device"
            raise ConfigError(f"step.cuda_graphs is true, but {problem}; {needed}")
        return False, problem
    if requested != "auto":
        return requested, f"step.cuda_graphs is {str(requested).lower()}"
    busy_s = (
        batch_size * _flops(model, config) / (0.5 * measure_ceilings(device, dtype).matmul_flops)
    )
    launches = OTHER_LAUNCHES + LAUNCHES_PER_BLOCK * sum(map(len, block_stacks(model)))
    launch_s = launches * LAUNCH_S
    expected = f"{launches} launches are expected to take {launch_s * 1e3:.1f} ms"
    return busy_s < launch_s, f"{expected}, the kernels {busy_s * 1e3:.1f} ms"


def pick_mlp(
    setting: str, device: torch.device, dtype: torch.dtype, compile_it: bool
) -> tuple[bool, str]:
    """(whether the second half of an MLP is mae_kernels.gelu_linear, why)."""
    if device.type == "cuda":
        reason = mae_kernels.info()["gelu_linear"]
        better = "it moves and keeps fewer bytes than compiled code (counted, not measured)"
    else:
        needs = "a CUDA device, or a CPU with step.compile and precision bf16"
        compiled_bf16 = device.type == "cpu" and compile_it and dtype == torch.bfloat16
        reason = None if compiled_bf16 else f"gelu_linear needs {needs}; this is {device}"
        better = "compiled in bf16 it computes GELU faster (measured)"
    if setting == "fused" and reason is not None:
        raise ConfigError(
            f"step.mlp is fused, which cannot run here: {reason}. Set step.mlp to auto or plain"
        )
    if setting != "auto":
        return setting == "fused", f"step.mlp is {setting}"
    return reason is None, reason or better


def attention_choices(
    model: SSSD | Classifier,
    step: StepConfig,
    dtype: torch.dtype,
    device: torch.device,
    compile_it: bool,
    capability: tuple[int, int] = (0, 0),
) -> list[tuple[str, str]]:
    """(provider, line with the reason) for each of `block_stacks(model)`. capability: of a CUDA
    device; (0, 0) = ask the device.
    """
    mae = model if isinstance(model, Classifier) else model.mae
    kept = model.kept if isinstance(model, Classifier) else mae.config.num_patches
    tokens = [mae.encoder.num_prefix + kept]
    if isinstance(model, SSSD):
        tokens.insert(0, mae.encoder.num_prefix + mae.config.num_visible)
    choices = []
    settings = ("attention", "decoder_attention")
    for setting, count, blocks in zip(settings, tokens, block_stacks(model), strict=False):
        attention = blocks[0].attn
        assert isinstance(attention, Attention)
        heads = attention.heads
        width = attention.qkv.in_features // heads
        shape = AttentionShape(device, dtype, count, heads, width, compile_it, capability)
        choices.append(choose(getattr(step, setting), shape, f"step.{setting}"))
    return choices


def _check(step: StepConfig, compile_it: bool, why: str, precision: str) -> None:
    if step.residual == "bf16" and precision != "bf16":
        raise ConfigError(
            f"step.residual is bf16, which needs precision=bf16; the precision here is {precision}"
        )
    if step.activation_budget < 1 and not compile_it:
        raise ConfigError(
            f"step.activation_budget is {step.activation_budget:g}, which needs a compiled step, "
            f"and compile is off: {why}. Set step.compile=true, or use step.checkpoint=selective"
        )


# ---- recomputation without the compiler ----------------------------------------------------------


# Keeps only the input of a block (Chen et al., arXiv 1604.06174).
_full = functools.partial(checkpoint, use_reentrant=False)


def _selective(block: nn.Module, *inputs: Any) -> Any:
    """Keeps the results of matrix products and attention; recomputes norms, GELU and additions."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = str(op).startswith(PRODUCTS)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


PRODUCTS = (
    "aten.mm.",
    "aten.addmm.",
    "aten.bmm.",
    "aten._scaled_dot_product",
    "mae_kernels.",
    "xformers",
    "aten._cudnn_attention",
)
