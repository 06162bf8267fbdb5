"""Fused ops of masked autoencoders with self-distillation, for any PyTorch project.

Each op is one function, with Triton kernels on NVIDIA GPUs and plain PyTorch elsewhere.
kernels/README.md lists them.
"""

from __future__ import annotations

from ._checks import debug_checks
from ._runtime import as_on_gpu, backend, info
from ._samples import Draw, Sample, samples
from .cpu_attention import cpu_bf16_units
from .crop_resize import crop_resize
from .distillation import distillation_loss, sinkhorn_center
from .gelu_linear import gelu_linear
from .linear_reconstruction import linear_reconstruction_loss
from .masking import Masking, masking_from, random_masking
from .modules import (
    GeluMLP,
    MaskedReconstructionLoss,
    PatchEmbedVisible,
    ReconstructionHead,
    RestoreTokens,
    ShortAttention,
)
from .patches import embed_patches, gather_patches
from .patching import PatchReport, patch_attention, patch_model, unpatch_model
from .reconstruction import masked_reconstruction_loss
from .restore import restore_tokens
from .short_attention import attention, attention_refusal
from .sssd import SSSDLoss, sssd_loss

__all__ = [
    "Draw",
    "GeluMLP",
    "MaskedReconstructionLoss",
    "Masking",
    "PatchEmbedVisible",
    "PatchReport",
    "ReconstructionHead",
    "RestoreTokens",
    "SSSDLoss",
    "Sample",
    "ShortAttention",
    "as_on_gpu",
    "attention",
    "attention_refusal",
    "backend",
    "cpu_bf16_units",
    "crop_resize",
    "debug_checks",
    "distillation_loss",
    "embed_patches",
    "gather_patches",
    "gelu_linear",
    "info",
    "linear_reconstruction_loss",
    "masked_reconstruction_loss",
    "masking_from",
    "patch_attention",
    "patch_model",
    "random_masking",
    "restore_tokens",
    "samples",
    "sinkhorn_center",
    "sssd_loss",
    "unpatch_model",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
