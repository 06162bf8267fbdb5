"""The ops as people write them in plain PyTorch, in two forms, with no code of mae_kernels.

published_*: as facebookresearch/mae (He et al., arXiv 2111.06377) and SD-MAE (arXiv 2203.16983) compute it: repeated indices, every
patch embedded before most are dropped, every patch predicted before most are ignored.
tuned_*: the same results by somebody who has looked at it: expanded indices, only the patches that are needed, library calls.

Shapes: B images, L patches, K visible, M masked, D width, V = P*P*C, S prototypes, F hidden width, p = 1 prefix token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Shape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS, STUDENT_TEMP, TEACHER_TEMP, WEIGHT = 1e-6, 0.1, 0.04, 0.2


def normalised(images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> (x / 255 - mean) / std."""
    C = images_BCHW.shape[1]
    mean, std = (
        torch.tensor(n[:C], dtype=dtype, device=images_BCHW.device).view(C, 1, 1)
        for n in (MEAN, STD)
    )
    return (images_BCHW.to(dtype) / 255 - mean) / std


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which pixels and statistics are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """[B,K,D]: the tokens `ids`, with an index that is expanded, not repeated."""
    return x_BLD.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BLD.shape[-1]))


# ---- masking ----


def published_masking(noise_BL: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sorts, and a float mask that is filled in shuffled order and then gathered."""
    order_BL = noise_BL.argsort(1)
    place_BL = order_BL.argsort(1)
    hidden_BL = torch.ones(noise_BL.shape, device=noise_BL.device)
    hidden_BL[:, :keep] = 0
    return order_BL[:, :keep], place_BL, order_BL[:, keep:], hidden_BL.gather(1, place_BL)


def tuned_masking(noise_BL: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second sort is a scatter, the mask a comparison."""
    ids_shuffle_BL = torch.argsort(noise_BL, dim=1, stable=True)
    places = torch.arange(noise_BL.shape[1], device=noise_BL.device).expand_as(ids_shuffle_BL)
    ids_restore_BL = torch.empty_like(ids_shuffle_BL).scatter_(1, ids_shuffle_BL, places)
    return (
        ids_shuffle_BL[:, :keep],
        ids_restore_BL,
        ids_shuffle_BL[:, keep:],
        ids_restore_BL >= keep,
    )


# ---- patches ----


def patchify(images_BCHW: Tensor, patch: int, order: str) -> Tensor:
    """[B,L,V], values as (channel, row, column) for order "crc", as (row, column, channel) for "rcc"."""
    B, C, H, W = images_BCHW.shape
    x = images_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    x = x.permute((0, 2, 4, 1, 3, 5) if order == "crc" else (0, 2, 4, 3, 5, 1))
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * C)


def listed_pixels(images_BCHW: Tensor, ids_BK: Tensor, s: Shape, order: str) -> Tensor:
    """[B,K,V] uint8 of the listed patches alone: one advanced index, nothing else of the images is read."""
    B, C, H, W = images_BCHW.shape
    across = W // s.patch
    x = images_BCHW.view(B, C, H // s.patch, s.patch, across, s.patch).permute(0, 2, 4, 1, 3, 5)
    image_B1 = torch.arange(B, device=ids_BK.device)[:, None]
    x_BKCPP = x[image_B1, ids_BK // across, ids_BK % across]
    x_BKCPP = x_BKCPP if order == "crc" else x_BKCPP.permute(0, 1, 3, 4, 2)
    return x_BKCPP.flatten(2)


def _channel_stats(like_V: Tensor, s: Shape, order: str) -> tuple[Tensor, Tensor]:
    """mean and std of each value of a patch vector, [V]."""
    area = s.patch**2
    numbers = (
        torch.tensor(n[: s.channels], dtype=like_V.dtype, device=like_V.device) for n in (MEAN, STD)
    )
    mean, std = (n.repeat_interleave(area) if order == "crc" else n.repeat(area) for n in numbers)
    return mean, std


def listed_values(
    images_BCHW: Tensor, ids_BK: Tensor, s: Shape, order: str, dtype: torch.dtype
) -> Tensor:
    """[B,K,V] normalised values of the listed patches."""
    x_BKV = listed_pixels(images_BCHW, ids_BK, s, order).to(wide(dtype)) / 255
    mean_V, std_V = _channel_stats(x_BKV, s, order)
    return (x_BKV - mean_V) / std_V


def published_gather(images_BCHW: Tensor, ids_BK: Tensor, s: Shape, dtype: torch.dtype) -> Tensor:
    x_BLV = patchify(normalised(images_BCHW, wide(dtype)), s.patch, "crc").to(dtype)
    return torch.gather(x_BLV, 1, ids_BK.unsqueeze(-1).repeat(1, 1, x_BLV.shape[-1]))


def tuned_gather(images_BCHW: Tensor, ids_BK: Tensor, s: Shape, dtype: torch.dtype) -> Tensor:
    return listed_values(images_BCHW, ids_BK, s, "crc", dtype).to(dtype)


def unfold_gather(images_BCHW: Tensor, ids_BK: Tensor, s: Shape, dtype: torch.dtype) -> Tensor:
    """F.unfold has the (channel, row, column) order of a convolution's weight."""
    x_BVL = F.unfold(normalised(images_BCHW, wide(dtype)), s.patch, stride=s.patch)
    return rows(x_BVL.transpose(1, 2), ids_BK).to(dtype)


def published_embed(
    images_BCHW: Tensor, ids_BK: Tensor, weight: Tensor, bias_D: Tensor, pos_LD: Tensor, s: Shape
) -> Tensor:
    pixels = normalised(images_BCHW, wide(weight.dtype)).to(weight.dtype)
    x_BLD = F.conv2d(pixels, weight, bias_D, stride=s.patch).flatten(2).transpose(1, 2) + pos_LD
    return torch.gather(x_BLD, 1, ids_BK.unsqueeze(-1).repeat(1, 1, x_BLD.shape[-1]))


def tuned_embed(
    images_BCHW: Tensor, ids_BK: Tensor, weight: Tensor, bias_D: Tensor, pos_LD: Tensor, s: Shape
) -> Tensor:
    return (
        F.linear(tuned_gather(images_BCHW, ids_BK, s, weight.dtype), weight.flatten(1), bias_D)
        + pos_LD[ids_BK]
    )


# ---- restore ----


def published_restore(
    visible_BND: Tensor, ids_restore_BL: Tensor, mask_D: Tensor, pos_ND: Tensor
) -> Tensor:
    """The mask token is repeated for every masked patch, and the index for every value of a token."""
    B, L = ids_restore_BL.shape
    fill_BMD = mask_D[None, None].repeat(B, L + 1 - visible_BND.shape[1], 1)
    shuffled_BLD = torch.cat((visible_BND[:, 1:], fill_BMD), 1)
    index_BLD = ids_restore_BL[..., None].repeat(1, 1, mask_D.numel())
    return torch.cat((visible_BND[:, :1], shuffled_BLD.gather(1, index_BLD)), 1) + pos_ND


def tuned_restore(
    visible_BND: Tensor, ids_restore_BL: Tensor, mask_D: Tensor, pos_ND: Tensor
) -> Tensor:
    """No mask token is repeated: rows that have no token read any and are replaced where they are added."""
    keep = visible_BND.shape[1] - 1
    x_BLD = rows(visible_BND, (ids_restore_BL + 1).clamp(max=keep))
    x_BLD = torch.where((ids_restore_BL < keep).unsqueeze(-1), x_BLD, mask_D)
    return torch.cat([visible_BND[:, :1], x_BLD], 1) + pos_ND


# ---- MLP ----


def gelu_linear(x: Tensor, bias_F: Tensor, weight_DF: Tensor, out_bias_D: Tensor) -> Tensor:
    return F.linear(F.gelu(x + bias_F), weight_DF, out_bias_D)


# ---- losses ----


def _unit(target: Tensor) -> Tensor:
    """Per patch: zero mean and unit (unbiased) variance."""
    center = target.mean(-1, keepdim=True)
    spread = (target.var(-1, keepdim=True) + EPS).sqrt()
    return (target - center) / spread


def published_reconstruction(
    pred_BLV: Tensor, images_BCHW: Tensor, mask_BL: Tensor, s: Shape
) -> Tensor:
    """Every patch is predicted and compared; the mask picks afterwards."""
    dtype = wide(pred_BLV.dtype)
    target_BLV = _unit(patchify(normalised(images_BCHW, dtype), s.patch, "rcc"))
    each_BL = (pred_BLV.to(dtype) - target_BLV).square().mean(-1)
    chosen_BL = mask_BL.to(dtype)
    loss: Tensor = (each_BL * chosen_BL).sum() / chosen_BL.sum()
    return loss


def tuned_reconstruction(pred_BMV: Tensor, images_BCHW: Tensor, ids_BM: Tensor, s: Shape) -> Tensor:
    target_BMV = _unit(listed_values(images_BCHW, ids_BM, s, "rcc", pred_BMV.dtype))
    return F.mse_loss(pred_BMV.to(target_BMV.dtype), target_BMV)


def distillation(student_BS: Tensor, teacher_BS: Tensor, center_S: Tensor) -> tuple[Tensor, Tensor]:
    """(cross entropy of teacher and student, mean of the teacher's probabilities); logits are averaged over tokens before."""
    dtype = wide(student_BS.dtype)
    p_BS = F.softmax((teacher_BS.to(dtype) - center_S.to(dtype)) / TEACHER_TEMP, -1)
    log_q_BS = F.log_softmax(student_BS.to(dtype) / STUDENT_TEMP, -1)
    return -(p_BS * log_q_BS).sum(-1).mean(), p_BS.detach().mean(0)


def tuned_distillation(
    student_BS: Tensor, teacher_BS: Tensor, center_S: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = wide(student_BS.dtype)
    teacher_BS = ((teacher_BS.to(dtype) - center_S.to(dtype)) / TEACHER_TEMP).softmax(-1)
    return F.cross_entropy(
        student_BS.to(dtype) / STUDENT_TEMP, teacher_BS
    ), teacher_BS.detach().mean(0)


# ---- crops ----


def crop_each(
    pixels_T: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    s: Shape,
    *,
    passes: bool,
) -> Tensor:
    """[B,C,h,w] uint8, image by image, as torchvision's RandomResizedCrop does with F.interpolate.

    passes: resize along rows first and round, then along columns, as Pillow does; else both at once.
    """
    out_BChw = []
    (height, width), C = s.image, s.channels
    of_images = (t.tolist() for t in (offsets, shapes, boxes, flips))
    for offset, (rows_, columns), (top, left, h, w), flip in zip(*of_images, strict=True):
        image_HWC = pixels_T[offset : offset + rows_ * columns * C].view(rows_, columns, C)
        crop = image_HWC[top : top + h, left : left + w].permute(2, 0, 1)[None].float()
        for size in ((h, width), (height, width)) if passes else ((height, width),):
            crop = (
                F.interpolate(crop, size=size, mode="bicubic", antialias=True).round().clamp(0, 255)
            )
        out_BChw.append((crop.flip(-1) if flip else crop).to(torch.uint8))
    return torch.cat(out_BChw)


# ---- attention ----


def attention(qkv_BN3Hd: Tensor) -> Tensor:
    """As timm 0.3.2's Attention, which facebookresearch/mae uses, under autocast: half precision, but an fp32 softmax."""
    q_BHNd, k_BHNd, v_BHNd = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    scores_BHNN = q_BHNd @ k_BHNd.transpose(-2, -1) * q_BHNd.shape[-1] ** -0.5
    weights_BHNN = scores_BHNN.softmax(dim=-1, dtype=wide(qkv_BN3Hd.dtype)).to(v_BHNd.dtype)
    out_BNHd: Tensor = (weights_BHNN @ v_BHNd).transpose(1, 2)
    return out_BNHd


def sdpa(qkv_BN3Hd: Tensor) -> Tensor:
    q_BHNd, k_BHNd, v_BHNd = qkv_BN3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd).transpose(1, 2)
