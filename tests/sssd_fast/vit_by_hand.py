"""A vision transformer written from the papers in plain tensor operations, without this package:
the reference of the model tests.

Weights come as a dict under timm's names. Shapes: B images, L patches, N tokens, D width, H heads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# output, attention probabilities
Maps = tuple[Tensor, Tensor]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, weights: dict[str, Tensor], name: str, heads: int) -> Maps:
    """(output [B, N, D], probabilities [B, H, N, N]), one image and one head at a time."""
    d = x.shape[-1] // heads
    outs, maps = [], []
    for image in linear(x, weights, f"{name}.qkv"):
        columns, rows = [], []
        for h in range(heads):
            q, k, v = (part[:, h * d : (h + 1) * d] for part in image.chunk(3, 1))
            scores = torch.exp(q @ k.T / math.sqrt(d))
            p = scores / scores.sum(1, keepdim=True)
            rows.append(p)
            columns.append(p @ v)
        outs.append(torch.cat(columns, 1))
        maps.append(torch.stack(rows))
    return linear(torch.stack(outs), weights, f"{name}.proj"), torch.stack(maps)


def block(x: Tensor, weights: dict[str, Tensor], name: str, heads: int, eps: float) -> Maps:
    norm = layer_norm(x, weights, f"{name}.norm1", eps)
    mixed, maps = attention(norm, weights, f"{name}.attn", heads)
    x = x + mixed
    hidden = gelu(linear(layer_norm(x, weights, f"{name}.norm2", eps), weights, f"{name}.mlp.fc1"))
    return x + linear(hidden, weights, f"{name}.mlp.fc2"), maps


def patch_tokens(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """[B, L, D] by a sum over pixels of each patch, row by row of the image."""
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    side = kernel.shape[-1]
    tokens = []
    for top in range(0, images.shape[2], side):
        for left in range(0, images.shape[3], side):
            patch = images[:, :, top : top + side, left : left + side]
            tokens.append(torch.einsum("bcij,dcij->bd", patch, kernel) + bias)
    return torch.stack(tokens, 1)


def encode(
    images: Tensor, weights: dict[str, Tensor], heads: int, eps: float, keep: Tensor | None = None
) -> Maps:
    """(tokens before the final norm, attention of the last block); `keep` [B, K] are the visible
    patches."""
    x = patch_tokens(images, weights)
    prefix = 1 if "cls_token" in weights else 0
    positions = weights["pos_embed"].reshape(-1, x.shape[-1])
    x = x + positions[prefix:]
    if keep is not None:
        x = torch.stack([tokens[ids] for tokens, ids in zip(x, keep, strict=True)])
    if prefix:
        cls = weights["cls_token"].reshape(1, 1, -1) + positions[:1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    maps = torch.empty(0)
    for i in range(depth):
        x, maps = block(x, weights, f"blocks.{i}", heads, eps)
    return x, maps


def classify(images: Tensor, weights: dict[str, Tensor], heads: int, eps: float) -> Tensor:
    """Logits as timm's VisionTransformer: global_pool "avg" with fc_norm, else "token"."""
    x, _ = encode(images, weights, heads, eps)
    if "fc_norm.weight" in weights:
        first = 1 if "cls_token" in weights else 0
        pooled = layer_norm(x[:, first:].mean(1), weights, "fc_norm", eps)
    else:
        pooled = layer_norm(x, weights, "norm", eps)[:, 0]
    return linear(pooled, weights, "head")


def sincos_table(width: int, rows: int, columns: int) -> np.ndarray:
    """[rows * columns, width]: sin and cos of the column, then of the row (the layout of
    facebookresearch/mae), by loops."""
    table = np.zeros((rows * columns, width))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                x, y = column * frequency, row * frequency
                values = np.sin(x), np.cos(x), np.sin(y), np.cos(y)
                table[row * columns + column, i::quarter] = values
    return table
