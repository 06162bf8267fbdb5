"""The ops as nn.Module, under the names of the modules of a masked autoencoder.

They hold parameters under the names that timm, facebookresearch/mae and transformers use, so that
state dicts fit, and nothing else: no buffers, no counters, no random numbers.

Shapes: B images, C channels, H x W pixels, P patch side, L patches, K visible, M masked, N tokens,
p prefix tokens, D width, F hidden width, V = P*P*C values per patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_int, check_positive
from ._pixels import Numbers
from .gelu_linear import gelu_linear
from .linear_reconstruction import linear_reconstruction_loss
from .patches import embed_patches
from .reconstruction import NORMS, Norm, masked_reconstruction_loss
from .restore import restore_tokens
from .short_attention import attention


def _settings(module: nn.Module, *names: str) -> str:
    """`name=value` of attributes, for a module's repr."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_int(name, value, 1)


class _PixelTarget:
    """The settings of a reconstruction loss as attributes of a module."""

    NAMES = ("patch_size", "norm", "eps", "mean", "std")

    def _set_target(
        self, patch_size: int, norm: Norm, eps: float, mean: Numbers, std: Numbers
    ) -> None:
        check_int("patch_size", patch_size, 1)
        check_choice("norm", norm, NORMS)
        check_positive("eps", eps)
        self.patch_size = patch_size
        self.norm = norm
        self.eps = eps
        self.mean = mean
        self.std = std

    def _target(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.NAMES}


class PatchEmbedVisible(nn.Module):
    """Embeds the visible patches only, positions included: timm's PatchEmbed, the addition and the
    gather in one op.

    Parameters: proj.weight [D,C,P,P], proj.bias [D]. The position table stays with the model, as it
        does there.

    Args:
        patch_size: P.
        in_chans: C.
        embed_dim: D.
        bias: whether proj has one.
        mean, std: pixel normalisation, as in embed_patches.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        bias: bool = True,
        mean: Numbers = None,
        std: Numbers = None,
    ) -> None:
        super().__init__()
        _check_sizes(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)
        self.mean = mean
        self.std = std

    def extra_repr(self) -> str:
        return _settings(self, "mean", "std")

    def forward(self, images: Tensor, ids_keep: Tensor, pos_embed: Tensor) -> Tensor:
        """images [B,C,H,W], ids_keep [B,K] int64, pos_embed [L,D] or [1,L,D] without prefix rows ->
        tokens [B,K,D].
        """
        conv = self.proj
        return embed_patches(
            images, ids_keep, conv.weight, conv.bias, pos_embed, mean=self.mean, std=self.std
        )


class RestoreTokens(nn.Module):
    """Decoder input: visible tokens in their places, mask tokens elsewhere, positions added.

    Parameters: mask_token [1,1,D], decoder_pos_embed [1,p+L,D], the names that both public projects
    use. The mask token starts as a normal of deviation 0.02, the positions at zero: load them, or
    fill them as the model does.

    Args:
        num_patches: L.
        dim: D, the decoder's width.
        prefix: p, 1 with a class token and 0 without.
        learn_positions: whether decoder_pos_embed requires a gradient.
    """

    def __init__(
        self, num_patches: int, dim: int, *, prefix: int = 1, learn_positions: bool = False
    ) -> None:
        super().__init__()
        _check_sizes(num_patches=num_patches, dim=dim)
        check_int("prefix", prefix, 0)
        self.num_patches = num_patches
        self.dim = dim
        self.prefix = prefix
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, prefix + num_patches, dim), requires_grad=learn_positions
        )

    def extra_repr(self) -> str:
        return _settings(self, "num_patches", "dim", "prefix")

    def forward(self, visible: Tensor, ids_restore: Tensor) -> Tensor:
        """visible [B,p+K,D] and ids_restore [B,L] int64 -> [B,p+L,D]."""
        return restore_tokens(
            visible, ids_restore, self.mask_token, self.decoder_pos_embed, prefix=self.prefix
        )


class ShortAttention(nn.Module):
    """Multi-head self-attention with timm's parameters, without dropout on the weights.

    Parameters: qkv.{weight [3D,D], bias [3D]}, proj.{weight [D,D], bias [D]}.

    Args:
        dim: D, divisible by num_heads.
        num_heads: H.
        qkv_bias: whether qkv has a bias.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, *, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        _check_sizes(num_heads=num_heads, dim=dim)
        if dim % num_heads != 0:
            raise ValueError(f"dim: got {dim}, needs a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return _settings(self, "num_heads")

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,D] -> [B,N,D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj_drop(self.proj(attention(qkv, scale=self.scale).flatten(2)))


class GeluMLP(nn.Module):
    """The MLP of a transformer block, fc2(gelu(fc1(x))) with the exact GELU, under timm's names and
    without dropout.

    Parameters: fc1.{weight [F,D], bias [F]}, fc2.{weight [D,F], bias [D]}. The two layers hold
    them; their forward, and hooks on it, are not called.

    Args:
        dim: D.
        hidden_dim: F.
        bias: whether the two layers have one.
        recompute: as in gelu_linear.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, bias: bool = True, recompute: bool = True
    ) -> None:
        super().__init__()
        _check_sizes(dim=dim, hidden_dim=hidden_dim)
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.recompute = recompute

    def extra_repr(self) -> str:
        return _settings(self, "recompute")

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        product = nn.functional.linear(x, self.fc1.weight)
        return gelu_linear(
            product, self.fc1.bias, self.fc2.weight, self.fc2.bias, recompute=self.recompute
        )


class MaskedReconstructionLoss(_PixelTarget, nn.Module):
    """masked_reconstruction_loss with its settings kept; no parameters.

    Args:
        patch_size, norm, eps, mean, std: as in masked_reconstruction_loss.
    """

    def __init__(
        self,
        patch_size: int = 16,
        *,
        norm: Norm = "patch",
        eps: float = 1e-6,
        mean: Numbers = None,
        std: Numbers = None,
    ) -> None:
        super().__init__()
        self._set_target(patch_size, norm, eps, mean, std)

    def extra_repr(self) -> str:
        return _settings(self, *self.NAMES)

    def forward(
        self,
        pred: Tensor,
        images: Tensor,
        *,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """pred [B,M,V] with ids [B,M], or [B,L,V] with mask or weights [B,L]; images [B,C,H,W] ->
        scalar.
        """
        return masked_reconstruction_loss(
            pred, images, ids=ids, mask=mask, weights=weights, **self._target()
        )


class ReconstructionHead(_PixelTarget, nn.Linear):
    """The decoder's prediction layer (decoder_pred), which can also give the loss without making
    the predictions.

    Parameters: weight [V,Dd], bias [V], those of nn.Linear. Calling it predicts; `loss` predicts
        and compares in parts.

    Args:
        decoder_dim: Dd.
        patch_size, in_chans: P and C; V = P*P*C.
        norm, eps, mean, std: as in masked_reconstruction_loss.
    """

    def __init__(
        self,
        decoder_dim: int = 512,
        patch_size: int = 16,
        in_chans: int = 3,
        *,
        norm: Norm = "patch",
        eps: float = 1e-6,
        mean: Numbers = None,
        std: Numbers = None,
    ) -> None:
        _check_sizes(decoder_dim=decoder_dim, patch_size=patch_size, in_chans=in_chans)
        super().__init__(decoder_dim, patch_size * patch_size * in_chans)
        self._set_target(patch_size, norm, eps, mean, std)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_settings(self, *self.NAMES)}"

    def loss(self, hidden: Tensor, images: Tensor, ids_masked: Tensor) -> Tensor:
        """hidden [B,M,Dd] of the masked patches, images [B,C,H,W], ids_masked [B,M] int64 ->
        scalar.
        """
        parameters = (self.weight, self.bias)
        return linear_reconstruction_loss(hidden, *parameters, images, ids_masked, **self._target())
