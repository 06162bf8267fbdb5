"""Self-attention behind one function, and which implementation ("provider") of it runs where.

    out = softmax(q k^T * scale) v      per head; q, k, v = qkv.unbind(2); scale = d ** -0.5 by default

    fused     mae_kernels.attention: one program holds all keys of a head, reads qkv and writes its gradient as they lie
    xformers  xformers.ops.memory_efficient_attention; takes sequences of different lengths in one launch
    sdpa      torch.nn.functional.scaled_dot_product_attention, which picks among PyTorch's own kernels
    eager     the matrix products of facebookresearch/mae, with the scores in memory: what the others are compared with

`choose` decides once per kind of block, before the model is compiled; `attend` and `attend_packed` then do as they are told.
Nothing falls back: a provider that is named and cannot run is a ConfigError with the reason.

Shapes: B images, N tokens of an image, T tokens of all sequences together, H heads, d head width.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mae_kernels
from sssd_fast.errors import ConfigError, DependencyError

PROVIDERS = ("fused", "xformers", "sdpa", "eager")
# What `auto` takes: the first that can run. None of these orders has been measured yet.
AUTO = (
    (
        "fused",
        "one program per head moves the fewest bytes for short sequences (by count of bytes, not measured)",
    ),
    ("sdpa", "PyTorch picks among its own kernels and reads qkv without a copy"),
)
AUTO_PACKED = (
    (
        "xformers",
        "all lengths go into one launch, elsewhere each length takes its own (by count, not measured)",
    ),
    *AUTO,
)
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
BLOCKS = {"step.attention": "encoder", "step.decoder_attention": "decoder"}


# ---------------------------------------------------------------------------------------------------- computing
def attend(qkv_BN3Hd: Tensor, provider: str, scale: float | None = None) -> Tensor:
    """Self-attention of every image.

    Args:
        qkv_BN3Hd: floating point, any strides; a contiguous one is read without a copy.
        provider: one of PROVIDERS, chosen by `choose`. Whether it can run here is not asked again.
        scale: of the scores; default d ** -0.5.

    Returns: [B, N, H, d], contiguous, in qkv's dtype under autocast too. Raises ValueError for a wrong shape or provider.

    What sdpa runs on a GPU (torch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): fp16 and bf16 from sm_80 on its
    flash kernels with d <= 256, or before them cuDNN's on sm_9x and sm_10x where cuDNN is newer than 9.15.0 and d a multiple
    of 8 up to 128; fp32, and fp16 before sm_80, its memory-efficient ones with d a multiple of 8 (fp32 from sm_80 on: of 4,
    before: any); all else plain matrix products. On the CPU: a flash kernel of its own.
    """
    if qkv_BN3Hd.dim() != 5 or qkv_BN3Hd.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv_BN3Hd.shape)}, needs [B, N, 3, H, d]")
    if provider == "fused":
        return mae_kernels.attention(qkv_BN3Hd, scale=scale)
    if provider == "xformers":
        q_BNHd, k_BNHd, v_BNHd = qkv_BN3Hd.unbind(2)
        out_BNHd: Tensor = _loaded_xformers().memory_efficient_attention(
            q_BNHd, k_BNHd, v_BNHd, scale=scale
        )
        return out_BNHd.contiguous()
    if provider not in ("sdpa", "eager"):
        raise ValueError(f"provider: got {provider!r}, needs one of {', '.join(PROVIDERS)}")
    # unbind(2) first: its backward then stacks the three gradients in the order in which the qkv layer's backward reads them
    q_BHNd, k_BHNd, v_BHNd = (x_BNHd.transpose(1, 2) for x_BNHd in qkv_BN3Hd.unbind(2))
    with torch.autocast(qkv_BN3Hd.device.type, enabled=False):  # the dtype has been chosen already
        if provider == "sdpa":
            out_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, scale=scale)
        else:
            out_BHNd = _eager(q_BHNd, k_BHNd, v_BHNd, scale)
    return out_BHNd.transpose(1, 2).contiguous()


def _eager(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, scale: float | None) -> Tensor:
    """As timm 0.3.2's Attention, which facebookresearch/mae uses, does under autocast: half precision, but an fp32 softmax."""
    scores_BHNN = (
        q_BHNd @ k_BHNd.transpose(-2, -1) * (q_BHNd.shape[-1] ** -0.5 if scale is None else scale)
    )
    wide = torch.float32 if q_BHNd.dtype in (torch.float16, torch.bfloat16) else q_BHNd.dtype
    return scores_BHNN.softmax(-1, dtype=wide).to(v_BHNd.dtype) @ v_BHNd


def attend_packed(
    qkv_T3Hd: Tensor, lengths: Sequence[int], provider: str, scale: float | None = None
) -> Tensor:
    """Self-attention inside each of `len(lengths)` sequences that lie one after another without padding.

    xformers takes all of them in one launch; the others one launch for each distinct length, with a copy of qkv where there
    is more than one. Returns [T, H, d], contiguous, in qkv's dtype. Raises ValueError where shape and lengths disagree.
    """
    if qkv_T3Hd.dim() != 4 or qkv_T3Hd.shape[1] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv_T3Hd.shape)}, needs [T, 3, H, d]")
    if any(n < 0 for n in lengths) or sum(lengths) != qkv_T3Hd.shape[0]:
        raise ValueError(
            f"lengths: got {list(lengths)}, needs numbers of tokens that add up to {qkv_T3Hd.shape[0]}"
        )
    lengths = [n for n in lengths if n]  # an empty sequence has no row in the result
    if not lengths:
        return qkv_T3Hd[:, 0].contiguous()
    if provider == "xformers":
        mask = _block_diagonal(tuple(lengths), qkv_T3Hd.device)
        q_1THd, k_1THd, v_1THd = qkv_T3Hd[None].unbind(2)
        out_1THd: Tensor = _loaded_xformers().memory_efficient_attention(
            q_1THd, k_1THd, v_1THd, mask, scale=scale
        )
        return out_1THd[0].contiguous()
    if len(set(lengths)) == 1:
        return attend(qkv_T3Hd.unflatten(0, (-1, lengths[0])), provider, scale).flatten(0, 1)
    parts_n3Hd = qkv_T3Hd.split(lengths)
    outs_nHd: dict[int, Tensor] = {}
    for n in dict.fromkeys(lengths):  # each length once
        members = [i for i, length in enumerate(lengths) if length == n]
        out_BnHd = attend(torch.stack([parts_n3Hd[i] for i in members]), provider, scale)
        outs_nHd.update(zip(members, out_BnHd.unbind(), strict=True))
    return torch.cat([outs_nHd[i] for i in range(len(lengths))])


@functools.lru_cache(
    maxsize=8
)  # every layer of a step asks for the same one, and making it copies to the GPU
def _block_diagonal(lengths: tuple[int, ...], device: torch.device) -> Any:
    return _loaded_xformers().fmha.attn_bias.BlockDiagonalMask.from_seqlens(
        list(lengths), device=device
    )


# ----------------------------------------------------------------------------------------------------- choosing
@dataclass(frozen=True)
class Site:
    """Where attention is to run. For a CUDA device without `capability`, the device is asked."""

    device: torch.device
    dtype: torch.dtype
    tokens: int  # of a sequence, the longest one where they differ
    heads: int
    head_width: int
    compiled: bool = False  # inside torch.compile(fullgraph=True)
    training: bool = True  # a backward follows
    packed: bool = False  # `attend_packed`
    capability: tuple[int, int] = (0, 0)  # (8, 6) for sm_86; stays (0, 0) without a GPU

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.capability == (0, 0):
            object.__setattr__(self, "capability", torch.cuda.get_device_capability(self.device))

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.heads} heads of {self.head_width}, {self.precision}"

    @property
    def precision(self) -> str:
        return DTYPES.get(self.dtype, str(self.dtype))

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Choice:
    """What runs at a site, and why not what would have come before it."""

    provider: str
    reason: str
    site: Site
    setting: str  # a key of BLOCKS
    refused: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """For the start of a run: encoder attention (50 tokens, 12 heads of 64, bf16): fused, because ..."""
        others = "".join(f"; not {name}: {reason}" for name, reason in self.refused.items())
        return f"{BLOCKS[self.setting]} attention ({self.site}): {self.provider}, because {self.reason}{others}"


def choose(name: str, site: Site, setting: str = "step.attention") -> Choice:
    """The provider for `name`, one of PROVIDERS or "auto", which the key `setting` of the configuration held.

    Raises ConfigError when the named one cannot run; it says why, and which can.
    """
    if name == "auto":
        refused: dict[str, str] = {}
        for provider, why in (
            AUTO_PACKED if site.packed else AUTO
        ):  # ends at sdpa, which can always run
            reason = refusal(provider, site)
            if reason is None:
                return Choice(provider, why, site, setting, refused)
            refused[provider] = reason
    if name not in PROVIDERS:
        raise ConfigError(f"{setting} is {name!r}, needs auto or one of {', '.join(PROVIDERS)}")
    reason = refusal(name, site)
    if reason is None:
        return Choice(name, f"{setting} names it", site, setting)
    able = ", ".join(other for other in PROVIDERS if other != name and refusal(other, site) is None)
    raise ConfigError(
        f"{setting} is {name!r}, which cannot run here ({site}): {reason}; set it to auto, {able}"
    )


def refusal(
    provider: str, site: Site, *, xformers_problem: Callable[[], str | None] | None = None
) -> str | None:
    """Why the provider cannot run at the site; None when it can.

    On the CPU `fused` is refused, although the function works there: what it computes there is sdpa under another name.
    xformers_problem: what is wrong with the package itself, where that is known; by default it is imported, once.
    """
    if provider == "fused":
        return _fused_refusal(site)
    if provider == "xformers":
        return _xformers_refusal(site) or (xformers_problem or (lambda: load_xformers()[1]))()
    if provider not in PROVIDERS:
        raise ValueError(f"provider: got {provider!r}, needs one of {', '.join(PROVIDERS)}")
    return None  # both have a way for every device, dtype and shape, and trace as one graph


def _fused_refusal(site: Site) -> str | None:
    if site.device.type != "cuda":
        return f"it has no kernel for the {site.device.type}, where it would be computed by sdpa"
    # of this machine: no Triton, another vendor, another backend requested
    reason = mae_kernels.info()["attention"]
    if torch.cuda.is_available() and reason is not None:
        return reason
    return mae_kernels.attention_refusal(site.tokens, site.head_width, site.dtype, site.capability)


def _xformers_refusal(site: Site) -> str | None:
    """By the rules of xformers 0.0.34 and 0.0.35 (ops/fmha: flash.py, cutlass.py, common.py), without importing it.

    It calls PyTorch's flash kernels, else PyTorch's memory-efficient ones. The former trace under fullgraph, forward and
    backward; of the latter PyTorch cannot trace the backward (its meta function lacks an argument that xformers passes).
    """
    if site.device.type != "cuda" or torch.version.hip is not None:
        return "its attention needs an NVIDIA GPU"
    half = site.dtype in (torch.float16, torch.bfloat16)
    step = 8 if half else 4 if site.capability >= (8, 0) else 1
    if not half and site.dtype != torch.float32:
        return f"it takes fp16, bf16 and fp32, not {site.precision}"
    if site.dtype == torch.bfloat16 and site.capability < (8, 0):
        return f"it takes bf16 from sm_80 on, this is {site.architecture}"
    if site.head_width % step:
        return f"the head width is {site.head_width}, it needs a multiple of {step}"
    if site.compiled and site.packed:
        return "the mask of the lengths is made on the host and does not trace"
    if half and site.capability >= (8, 0) and site.head_width <= 256:
        return None
    if site.capability > (9, 0):
        return (
            f"on {site.architecture} it takes only fp16 and bf16, with heads of at most 256 values"
        )
    if site.compiled and site.training:
        return "compiled it takes only fp16 and bf16 on sm_80 or newer, with heads of at most 256 values"
    return None


# ----------------------------------------------------------------------------------------------------- xformers
_xformers: tuple[Any, str | None] | None = (
    None  # not functools.cache: torch.compile would trace the import again
)


def load_xformers() -> tuple[Any, str | None]:
    """(the module xformers.ops, None), or (None, why it cannot be used). Imports it at the first call, and prints nothing."""
    global _xformers
    if _xformers is None:
        _xformers = _import_xformers()
    return _xformers


def _loaded_xformers() -> Any:
    ops, problem = load_xformers()
    if ops is None:
        raise DependencyError(
            f"xformers cannot be used: {problem}; set step.attention to auto or another provider"
        )
    return ops


def _import_xformers() -> tuple[Any, str | None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            import xformers
            import xformers.ops as ops
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever is wrong with it, the run works without it
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
    while (
        problem.__cause__ is not None
    ):  # the innermost one names the file, such as libcudart.so.12
        problem = problem.__cause__
    return (
        None,
        f"its compiled part does not load, and without it every GPU is refused: {problem!r}",
    )
