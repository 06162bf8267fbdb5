"""The ops as facebookresearch/mae (He et al., arXiv 2111.06377) and SD-MAE (arXiv 2203.16983)
compute them, without code of mae_kernels: repeated indices; every patch is embedded before most are
dropped, and every target is computed before most are ignored. Arguments as those of the ops.

Shapes: B images, L patches, K visible, M masked, D width, V = P*P*C, S prototypes, F hidden
width, p prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, STUDENT_TEMP, TEACHER_TEMP, WEIGHT = 1e-6, 0.1, 0.04, 0.2
Numbers = Sequence[float]


def normalised(images_BCHW: Tensor, mean: Numbers, std: Numbers, dtype: torch.dtype) -> Tensor:
    """(x - mean) / std of images in [0, 1], or of uint8 images / 255."""
    shift, scale = (images_BCHW.new_tensor(n, dtype=dtype).view(-1, 1, 1) for n in (mean, std))
    unit = 255 if images_BCHW.dtype == torch.uint8 else 1
    return (images_BCHW.to(dtype) / unit - shift) / scale


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of pixels and statistics."""
    return torch.promote_types(dtype, torch.float32)


def repeated(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """[B,K,D]: the rows `ids`, with an index that is written for every value."""
    return torch.gather(x_BLD, 1, ids_BK.unsqueeze(-1).repeat(1, 1, x_BLD.shape[-1]))


# ---- masking and patches ----


def random_masking(noise: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids_keep, ids_restore, ids_masked, float mask): two sorts, and a gathered mask."""
    order_BL = noise.argsort(dim=1, stable=True)
    place_BL = order_BL.argsort(1)
    hidden_BL = torch.ones(noise.shape, device=noise.device)
    hidden_BL[:, :num_keep] = 0
    return order_BL[:, :num_keep], place_BL, order_BL[:, num_keep:], hidden_BL.gather(1, place_BL)


def patchify(images_BCHW: Tensor, patch: int, order: str) -> Tensor:
    """[B,L,V]; order "crc": values as (channel, row, column), "rcc": (row, column, channel)."""
    B, C, H, W = images_BCHW.shape
    x = images_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute((0, 2, 4, 1, 3, 5) if order == "crc" else (0, 2, 4, 3, 5, 1))
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, **stats: Any
) -> Tensor:
    x_BLV = patchify(normalised(images, dtype=wide(dtype), **stats), patch_size, "crc").to(dtype)
    return repeated(x_BLV, ids)


def embed_patches(
    images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, **stats: Any
) -> Tensor:
    pixels = normalised(images, dtype=wide(weight.dtype), **stats).to(weight.dtype)
    x_BDHW = F.conv2d(pixels, weight, bias, stride=weight.shape[-1])
    return repeated(x_BDHW.flatten(2).transpose(1, 2) + pos_embed, ids)


def restore_tokens(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, prefix: int
) -> Tensor:
    """The mask token and the index are repeated for every value that is written."""
    B, L = ids_restore.shape
    fill_BMD = mask_token.view(1, 1, -1).repeat(B, L + prefix - visible.shape[1], 1)
    x_BLD = repeated(torch.cat((visible[:, prefix:], fill_BMD), 1), ids_restore)
    return torch.cat((visible[:, :prefix], x_BLD), 1) + pos_embed


def gelu_linear(x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor, **_: Any) -> Tensor:
    return F.linear(F.gelu(x + bias), weight, out_bias)


def target(images_BCHW: Tensor, patch: int, norm: str | None) -> Tensor:
    """[B,L,V] of normalised images: mean 0, variance 1 of a patch, or of each of its channels."""
    x_BLV = patchify(images_BCHW, patch, "rcc")
    if norm == "patch":
        return _unit(x_BLV)
    if norm in ("channel", "channel_std"):
        x_BLCA = x_BLV.unflatten(-1, (patch**2, -1)).transpose(-1, -2)
        return _unit(x_BLCA, norm == "channel_std").transpose(-1, -2).flatten(-2)
    return x_BLV


def _unit(x: Tensor, eps_outside: bool = False) -> Tensor:
    var = x.var(-1, keepdim=True)
    scale = var.sqrt() + EPS if eps_outside else (var + EPS).sqrt()
    return (x - x.mean(-1, keepdim=True)) / scale


def masked_reconstruction_loss(
    pred: Tensor,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    patch_size: int,
    norm: str | None = "patch",
    reduction: str = "mean",
    **stats: Any,
) -> Tensor:
    dtype = wide(pred.dtype)
    target_BLV = target(normalised(images, dtype=dtype, **stats), patch_size, norm)
    if ids is not None:
        each_BM = (pred.to(dtype) - repeated(target_BLV, ids)).square().mean(-1)
        return each_BM if reduction == "none" else each_BM.mean()
    assert mask is not None
    each_BL = (pred.to(dtype) - target_BLV).square().mean(-1)
    return torch.div((each_BL * mask.to(dtype)).sum(), mask.to(dtype).sum())


def linear_reconstruction_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, images: Tensor, ids: Tensor, **more: Any
) -> Tensor:
    return masked_reconstruction_loss(F.linear(hidden, weight, bias), images, ids=ids, **more)


def distillation_loss(student: Tensor, teacher: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy of teacher and student, mean of the teacher's probabilities)."""
    dtype = wide(student.dtype)
    p_BS = F.softmax((teacher.to(dtype) - center.to(dtype)) / TEACHER_TEMP, -1)
    log_q_BS = F.log_softmax(student.to(dtype) / STUDENT_TEMP, -1)
    return -(p_BS * log_q_BS).sum(-1).mean(), p_BS.detach().flatten(0, -2).mean(0)


def sssd_loss(
    pred: Tensor, images: Tensor, student: Tensor, teacher: Tensor, center: Tensor, **more: Any
) -> tuple[Tensor, ...]:
    """(total, reconstruction, distillation, mean of the teacher's probabilities)"""
    restored = masked_reconstruction_loss(pred, images, **more)
    distilled, mean_S = distillation_loss(student, teacher, center)
    return WEIGHT * distilled + (1 - WEIGHT) * restored, restored, distilled, mean_S


def crop_resize(pixels: Tensor, size: Sequence[int], channels: int, **of_images: Tensor) -> Tensor:
    """Along rows first, rounded, then along columns, as Pillow does. Flipped before resizing, which
    is symmetric.
    """
    found = []
    listed = (of_images[name].tolist() for name in ("offsets", "shapes", "boxes", "flips"))
    for offset, (height, width), (top, left, h, w), flip in zip(*listed, strict=True):
        image_HWC = pixels[offset : offset + height * width * channels].view(height, width, -1)
        x_1CHW = image_HWC[top : top + h, left : left + w].permute(2, 0, 1)[None].float()
        x_1CHW = x_1CHW.flip(-1) if flip else x_1CHW
        for shape in ((h, size[1]), tuple(size)):
            x_1CHW = F.interpolate(x_1CHW, size=shape, mode="bicubic", antialias=True)
            x_1CHW = x_1CHW.round().clamp(0, 255)
        found.append(x_1CHW.to(torch.uint8))
    return torch.cat(found)


def attention(qkv: Tensor) -> Tensor:
    """As timm 0.3.2 (used by facebookresearch/mae) under autocast: softmax in fp32."""
    q_BHNd, k_BHNd, v_BHNd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores_BHNN = q_BHNd @ k_BHNd.transpose(-2, -1) * q_BHNd.shape[-1] ** -0.5
    weights_BHNN = scores_BHNN.softmax(dim=-1, dtype=wide(qkv.dtype)).to(v_BHNd.dtype)
    out_BNHd: Tensor = (weights_BHNN @ v_BHNd).transpose(1, 2)
    return out_BNHd


def sdpa(qkv: Tensor) -> Tensor:
    q_BHNd, k_BHNd, v_BHNd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd).transpose(1, 2)
