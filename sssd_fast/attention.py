"""Self-attention behind one function, and which implementation ("provider") of it runs where.

    out = softmax(q k^T * scale) v   per head; q, k, v = qkv.unbind(2); scale = d ** -0.5 by default

    fused     mae_kernels.attention: on a GPU a program holds all keys of a head and reads qkv
              packed; on a CPU batched matrix products in bf16
    xformers  xformers.ops.memory_efficient_attention
    sdpa      scaled_dot_product_attention, which chooses among PyTorch's own kernels
    eager     the matrix products of facebookresearch/mae, with the scores in memory: the baseline

`choose` decides once per stack of blocks, before the model is compiled; `attend` then runs the
chosen provider.
There is no fallback: a requested provider that cannot run raises ConfigError with the reason.

Shapes: B images, N tokens of an image, H heads, d head width.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mae_kernels
from sssd_fast.errors import ConfigError, DependencyError

PROVIDERS = ("fused", "xformers", "sdpa", "eager")
# `auto` takes the first that can run. On a GPU this order has not been measured yet.
AUTO = {
    "fused": "for short sequences it moves the fewest bytes (counted, not measured)",
    "sdpa": "PyTorch picks among its own kernels and reads qkv without a copy",
}
AUTO_ON_CPU = {
    "fused": "batched matrix products in bf16 take less time (measured); without gradients, sdpa",
    "sdpa": AUTO["sdpa"],
}
BLOCKS = {"step.attention": "encoder", "step.decoder_attention": "decoder"}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def attend(qkv_BN3Hd: Tensor, provider: str, scale: float | None = None) -> Tensor:
    """Self-attention of every image.

    Args:
        qkv_BN3Hd: floating point, any strides; a contiguous one is read without a copy.
        provider: one of PROVIDERS, chosen by `choose`; whether it can run here is not checked
            again.
        scale: of the scores; default d ** -0.5.

    Returns: [B, N, H, d], contiguous, in qkv's dtype under autocast too. Raises ValueError for a
    wrong shape or provider.
    """
    if qkv_BN3Hd.dim() != 5 or qkv_BN3Hd.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv_BN3Hd.shape)}, needs [B, N, 3, H, d]")
    if provider == "fused":
        return mae_kernels.attention(qkv_BN3Hd, scale=scale)
    if provider == "xformers":
        q_BNHd, k_BNHd, v_BNHd = qkv_BN3Hd.unbind(2)
        attention = _loaded_xformers().memory_efficient_attention
        out_BNHd: Tensor = attention(q_BNHd, k_BNHd, v_BNHd, scale=scale)
        return out_BNHd.contiguous()
    if provider not in ("sdpa", "eager"):
        raise ValueError(f"provider: got {provider!r}, needs one of {', '.join(PROVIDERS)}")
    # unbind(2) first: its backward then stacks the three gradients in the order that the qkv
    # layer's backward reads
    q_BHNd, k_BHNd, v_BHNd = (x_BNHd.transpose(1, 2) for x_BNHd in qkv_BN3Hd.unbind(2))
    with torch.autocast(qkv_BN3Hd.device.type, enabled=False):  # qkv has the right dtype already
        if provider == "sdpa":
            out_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, scale=scale)
        else:
            out_BHNd = _eager(q_BHNd, k_BHNd, v_BHNd, scale)
    return out_BHNd.transpose(1, 2).contiguous()


def _eager(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, scale: float | None) -> Tensor:
    """timm 0.3.2's Attention, which facebookresearch/mae uses, under autocast: half precision
    with an fp32 softmax.
    """
    scale = q_BHNd.shape[-1] ** -0.5 if scale is None else scale
    scores_BHNN = q_BHNd @ k_BHNd.transpose(-2, -1) * scale
    half = q_BHNd.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if half else q_BHNd.dtype
    return scores_BHNN.softmax(-1, dtype=wide).to(v_BHNd.dtype) @ v_BHNd


# ---- choosing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """What attention has to compute, and where. If a CUDA device has no `capability`, the device
    is asked.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: int
    heads: int
    head_width: int
    compiled: bool = False  # inside torch.compile(fullgraph=True)
    capability: tuple[int, int] = (0, 0)  # (8, 6) for sm_86; stays (0, 0) without a GPU

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.capability == (0, 0):
            object.__setattr__(self, "capability", torch.cuda.get_device_capability(self.device))

    def __str__(self) -> str:
        precision = DTYPES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{self.tokens} tokens, {self.heads} heads of {self.head_width}, {precision}"


def choose(name: str, shape: AttentionShape, setting: str = "step.attention") -> tuple[str, str]:
    """(provider for `name`, line for the start of a run with the reason).

    name: one of PROVIDERS or "auto", the value of the key `setting` of the configuration. Raises
    ConfigError if the requested provider cannot run, with the reason and the providers that can.
    """
    if name != "auto" and name not in PROVIDERS:
        raise ConfigError(f"{setting} is {name!r}, needs auto or one of {', '.join(PROVIDERS)}")
    where = f"{BLOCKS[setting]} attention ({shape})"
    refused = ""
    # sdpa, the last one, always runs
    order = AUTO_ON_CPU if shape.device.type == "cpu" else AUTO
    wanted = order if name == "auto" else {name: f"{setting} requests it"}
    for provider, why in wanted.items():
        reason = refusal(provider, shape)
        if reason is None:
            return provider, f"{where}: {provider}, because {why}{refused}"
        refused += f"; not {provider}: {reason}"
    able = ", ".join(other for other in PROVIDERS if refusal(other, shape) is None)
    raise ConfigError(
        f"{setting} is {name!r}, which cannot run here ({shape}): {reason}; set it to auto, {able}"
    )


def refusal(provider: str, shape: AttentionShape) -> str | None:
    """Why the provider cannot run; None if it can.

    Where mae_kernels.attention would compute scaled_dot_product_attention, `fused` is refused.
    """
    if provider == "fused":
        size = (shape.tokens, shape.head_width, shape.dtype)
        if shape.device.type != "cuda":
            return mae_kernels.attention_refusal(*size, None)
        # info() describes this machine: no Triton, another vendor, another backend requested
        reason = mae_kernels.info()["attention"] if torch.cuda.is_available() else None
        return reason or mae_kernels.attention_refusal(*size, shape.capability)
    if provider == "xformers":
        if shape.device.type != "cuda" or torch.version.hip is not None:
            return "its attention needs an NVIDIA GPU"
        problem = load_xformers()[1]
        return problem or (xformers_problem(shape) if torch.cuda.is_available() else None)
    if provider not in PROVIDERS:
        raise ValueError(f"provider: got {provider!r}, needs one of {', '.join(PROVIDERS)}")
    return None  # sdpa and eager support every device, dtype and shape, and trace as one graph


# ---- xformers ------------------------------------------------------------------------------------


@functools.cache
def xformers_problem(shape: AttentionShape) -> str | None:
    """Runs xformers forward and backward on one head of `shape`; the error, None if there is none.

    Which dtypes, widths and GPUs it supports differs between its versions, and PyTorch cannot trace
    the backward of all its kernels.
    """
    attention: Any = attend
    if shape.compiled:
        attention = torch.compile(attend, fullgraph=True, backend="aot_eager")
    size = (1, shape.tokens, 3, 1, shape.head_width)
    qkv = torch.zeros(size, dtype=shape.dtype, device=shape.device, requires_grad=True)
    try:
        with torch.enable_grad():
            attention(qkv, "xformers").sum().backward()
    except Exception as error:  # noqa: BLE001 - each version raises others
        first = next(iter(str(error).splitlines()), "")
        return f"a test run fails: {type(error).__name__}: {first}"
    return None


# (module, problem); not functools.cache: torch.compile would trace the import again
_xformers: tuple[Any, str | None] | None = None


def load_xformers() -> tuple[Any, str | None]:
    """(the module xformers.ops, None), or (None, why it cannot be used). Imports it once, and
    prints nothing.
    """
    global _xformers
    if _xformers is None:
        _xformers = _import_xformers()
    return _xformers


def _loaded_xformers() -> Any:
    ops, problem = load_xformers()
    if ops is None:
        hint = "set step.attention to auto or another provider"
        raise DependencyError(f"xformers cannot be used: {problem}; {hint}")
    return ops


def _import_xformers() -> tuple[Any, str | None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    quiet = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), quiet[0], quiet[1]:
            warnings.simplefilter("ignore")
            import xformers
            import xformers.ops as ops
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken package must not stop a run
        if isinstance(error, ModuleNotFoundError) and error.name == "xformers":
            return None, "not installed (pip install 'sssd-fast[xformers]')"
        return None, f"its import fails: {error!r}"
    finally:
        logging.disable(disabled)
    if not callable(getattr(ops, "memory_efficient_attention", None)):
        return None, "it has no memory_efficient_attention"
    problem = getattr(getattr(xformers, "_cpp_lib", None), "_cpp_library_load_exception", None)
    if problem is None:
        return ops, None
    while problem.__cause__ is not None:  # the innermost names the file, such as libcudart.so.12
        problem = problem.__cause__
    return None, f"its compiled part does not load, so no GPU can be used: {problem!r}"
