"""The ops in plain PyTorch, in two forms, without code of mae_kernels.

published_*: as facebookresearch/mae (He et al., arXiv 2111.06377) and SD-MAE (arXiv 2203.16983)
compute it: repeated indices; every patch is embedded before most are dropped, and predicted
before most are ignored. tuned_*: the same results with expanded indices, only the patches that
are needed, and library calls.

Shapes: B images, L patches, K visible, M masked, D width, V = P*P*C, S prototypes, F hidden
width, p = 1 prefix token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Shape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS, STUDENT_TEMP, TEACHER_TEMP, WEIGHT = 1e-6, 0.1, 0.04, 0.2


def normalised(images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> (x / 255 - mean) / std."""
    C = images_BCHW.shape[1]
    mean, std = (_per_channel(n, C, dtype, images_BCHW.device) for n in (MEAN, STD))
    return (images_BCHW.to(dtype) / 255 - mean) / std


def _per_channel(
    numbers: tuple[float, ...], channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[C, 1, 1]"""
    return torch.tensor(numbers[:channels], dtype=dtype, device=device).view(-1, 1, 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of pixels and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """[B,K,D]: the tokens `ids`, with an index that is expanded, not repeated."""
    return x_BLD.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1]))


# ---- masking ----


def published_masking(noise_BL: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sorts, and a float mask that is filled in shuffled order and then gathered."""
    order_BL = noise_BL.argsort(1)
    place_BL = order_BL.argsort(1)
    hidden_BL = torch.ones(noise_BL.shape, device=noise_BL.device)
    hidden_BL[:, : s.keep] = 0
    return order_BL[:, : s.keep], place_BL, order_BL[:, s.keep :], hidden_BL.gather(1, place_BL)


def tuned_masking(noise_BL: Tensor, s: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second sort is a scatter, the mask a comparison."""
    ids_BL = torch.argsort(noise_BL, dim=1, stable=True)
    places = torch.arange(noise_BL.shape[1], device=noise_BL.device).expand_as(ids_BL)
    ids_restore_BL = torch.empty_like(ids_BL).scatter_(1, ids_BL, places)
    return ids_BL[:, : s.keep], ids_restore_BL, ids_BL[:, s.keep :], ids_restore_BL >= s.keep


# ---- patches ----


def patchify(images_BCHW: Tensor, patch: int, order: str) -> Tensor:
    """[B,L,V]; order "crc": values as (channel, row, column), "rcc": (row, column, channel)."""
    B, C, H, W = images_BCHW.shape
    x = images_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute((0, 2, 4, 1, 3, 5) if order == "crc" else (0, 2, 4, 3, 5, 1))
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def listed_values(
    images_BCHW: Tensor, ids_BK: Tensor, s: Shape, order: str, dtype: torch.dtype
) -> Tensor:
    """[B,K,V] normalised values of the listed patches."""
    B, C, H, W = images_BCHW.shape
    across = W // s.patch
    x = images_BCHW.view(B, C, H // s.patch, s.patch, across, s.patch).permute(0, 2, 4, 1, 3, 5)
    image_B1 = torch.arange(B, device=ids_BK.device)[:, None]
    # one advanced index reads only the listed patches
    x_BKCPP = x[image_B1, ids_BK // across, ids_BK % across]
    shift, scale = (_per_channel(n, C, wide(dtype), ids_BK.device) for n in (MEAN, STD))
    x_BKCPP = (x_BKCPP.to(wide(dtype)) / 255 - shift) / scale
    x_BKCPP = x_BKCPP if order == "crc" else x_BKCPP.permute(0, 1, 3, 4, 2)
    return x_BKCPP.flatten(2)


def published_gather(images_BCHW: Tensor, ids_BK: Tensor, like: Tensor, s: Shape) -> Tensor:
    x_BLV = patchify(normalised(images_BCHW, wide(like.dtype)), s.patch, "crc").to(like.dtype)
    return torch.gather(x_BLV, 1, ids_BK.unsqueeze(-1).repeat(1, 1, x_BLV.shape[-1]))


def tuned_gather(images_BCHW: Tensor, ids_BK: Tensor, like: Tensor, s: Shape) -> Tensor:
    return listed_values(images_BCHW, ids_BK, s, "crc", like.dtype).to(like.dtype)


def unfold_gather(images_BCHW: Tensor, ids_BK: Tensor, like: Tensor, s: Shape) -> Tensor:
    """F.unfold has the (channel, row, column) order of a convolution's weight."""
    x_BVL = F.unfold(normalised(images_BCHW, wide(like.dtype)), s.patch, stride=s.patch)
    return rows(x_BVL.transpose(1, 2), ids_BK).to(like.dtype)


def published_embed(
    images_BCHW: Tensor, ids_BK: Tensor, weight: Tensor, bias_D: Tensor, pos_LD: Tensor, s: Shape
) -> Tensor:
    pixels = normalised(images_BCHW, wide(weight.dtype)).to(weight.dtype)
    x_BLD = F.conv2d(pixels, weight, bias_D, stride=s.patch).flatten(2).transpose(1, 2) + pos_LD
    return torch.gather(x_BLD, 1, ids_BK.unsqueeze(-1).repeat(1, 1, x_BLD.shape[-1]))


def tuned_embed(
    images_BCHW: Tensor, ids_BK: Tensor, weight: Tensor, bias_D: Tensor, pos_LD: Tensor, s: Shape
) -> Tensor:
    x_BKV = tuned_gather(images_BCHW, ids_BK, weight, s)
    return F.linear(x_BKV, weight.flatten(1), bias_D) + pos_LD[ids_BK]


# ---- restore ----


def published_restore(
    visible_BND: Tensor, ids_restore_BL: Tensor, mask_D: Tensor, pos_ND: Tensor
) -> Tensor:
    """The mask token and the index are repeated for every value that is written."""
    B, L = ids_restore_BL.shape
    fill_BMD = mask_D[None, None].repeat(B, L + 1 - visible_BND.shape[1], 1)
    shuffled_BLD = torch.cat((visible_BND[:, 1:], fill_BMD), 1)
    index_BLD = ids_restore_BL[..., None].repeat(1, 1, mask_D.numel())
    return torch.cat((visible_BND[:, :1], shuffled_BLD.gather(1, index_BLD)), 1) + pos_ND


def tuned_restore(
    visible_BND: Tensor, ids_restore_BL: Tensor, mask_D: Tensor, pos_ND: Tensor
) -> Tensor:
    """Nothing is repeated: masked rows read any token, which `where` replaces."""
    keep = visible_BND.shape[1] - 1
    x_BLD = rows(visible_BND, (ids_restore_BL + 1).clamp(max=keep))
    x_BLD = torch.where((ids_restore_BL < keep).unsqueeze(-1), x_BLD, mask_D)
    return torch.cat([visible_BND[:, :1], x_BLD], 1) + pos_ND


# ---- MLP ----


def gelu_linear(x: Tensor, bias_F: Tensor, weight_DF: Tensor, out_bias_D: Tensor) -> Tensor:
    return F.linear(F.gelu(x + bias_F), weight_DF, out_bias_D)


# ---- losses ----


def unit(target: Tensor) -> Tensor:
    """Per patch: zero mean and unit (unbiased) variance."""
    center = target.mean(-1, keepdim=True)
    spread = (target.var(-1, keepdim=True) + EPS).sqrt()
    return (target - center) / spread


def published_reconstruction(
    pred_BLV: Tensor, images_BCHW: Tensor, mask_BL: Tensor, s: Shape
) -> Tensor:
    """Every patch is compared; the mask selects afterwards."""
    dtype = wide(pred_BLV.dtype)
    target_BLV = unit(patchify(normalised(images_BCHW, dtype), s.patch, "rcc"))
    each_BL = (pred_BLV.to(dtype) - target_BLV).square().mean(-1)
    chosen_BL = mask_BL.to(dtype)
    loss: Tensor = (each_BL * chosen_BL).sum() / chosen_BL.sum()
    return loss


def tuned_reconstruction(pred_BMV: Tensor, images_BCHW: Tensor, ids_BM: Tensor, s: Shape) -> Tensor:
    target_BMV = unit(listed_values(images_BCHW, ids_BM, s, "rcc", pred_BMV.dtype))
    return F.mse_loss(pred_BMV.to(target_BMV.dtype), target_BMV)


def distillation(student_BS: Tensor, teacher_BS: Tensor, center_S: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy of teacher and student, mean of the teacher's probabilities)."""
    dtype = wide(student_BS.dtype)
    p_BS = F.softmax((teacher_BS.to(dtype) - center_S.to(dtype)) / TEACHER_TEMP, -1)
    log_q_BS = F.log_softmax(student_BS.to(dtype) / STUDENT_TEMP, -1)
    return -(p_BS * log_q_BS).sum(-1).mean(), p_BS.detach().mean(0)


def tuned_distillation(
    student_BS: Tensor, teacher_BS: Tensor, center_S: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = wide(student_BS.dtype)
    p_BS = ((teacher_BS.to(dtype) - center_S.to(dtype)) / TEACHER_TEMP).softmax(-1)
    loss = F.cross_entropy(student_BS.to(dtype) / STUDENT_TEMP, p_BS)
    return loss, p_BS.detach().mean(0)


# ---- crops ----


# Arguments: pixels of all images in one tensor, offsets, shapes, boxes, flips, and the Shape.


def crop_two_passes(*given: Any) -> Tensor:
    """Along rows first, rounded, then along columns, as Pillow does."""
    height, width = given[-1].image
    rows = (_resized(x, (x.shape[2], width)) for x in _crops(*given))
    return torch.cat([_resized(x, (height, width)) for x in rows])


def crop_one_pass(*given: Any) -> Tensor:
    """As torchvision's RandomResizedCrop on tensors."""
    return torch.cat([_resized(x, given[-1].image) for x in _crops(*given)])


def _resized(crop_1CHW: Tensor, size: tuple[int, int]) -> Tensor:
    x = F.interpolate(crop_1CHW.float(), size=size, mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _crops(pixels_T: Tensor, *given: Any) -> Iterator[Tensor]:
    """[1,C,h,w] of each image; flipped before resizing, which is symmetric."""
    *tensors, s = given
    of_images = (t.tolist() for t in tensors)
    for offset, (height, width), (top, left, h, w), flip in zip(*of_images, strict=True):
        size = height * width * s.channels
        image_HWC = pixels_T[offset : offset + size].view(height, width, s.channels)
        crop_1CHW = image_HWC[top : top + h, left : left + w].permute(2, 0, 1)[None]
        yield crop_1CHW.flip(-1) if flip else crop_1CHW


# ---- attention ----


def attention(qkv_BN3Hd: Tensor) -> Tensor:
    """As timm 0.3.2 (used by facebookresearch/mae) under autocast: softmax in fp32."""
    q_BHNd, k_BHNd, v_BHNd = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    scores_BHNN = q_BHNd @ k_BHNd.transpose(-2, -1) * q_BHNd.shape[-1] ** -0.5
    weights_BHNN = scores_BHNN.softmax(dim=-1, dtype=wide(qkv_BN3Hd.dtype)).to(v_BHNd.dtype)
    out_BNHd: Tensor = (weights_BHNN @ v_BHNd).transpose(1, 2)
    return out_BNHd


def sdpa(qkv_BN3Hd: Tensor) -> Tensor:
    q_BHNd, k_BHNd, v_BHNd = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd).transpose(1, 2)
