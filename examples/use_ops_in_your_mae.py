"""Use the fused ops in your own masked autoencoder: the same loss before and after.

    PYTHONPATH=kernels python examples/use_ops_in_your_mae.py

`loss_before` is a typical hand-written MAE. `loss_after` calls the ops instead: no full sequence of
patch embeddings, no unshuffled copy, and no predictions of visible patches, which the loss ignores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mae_kernels as mk


def loss_before(model: Any, images: Tensor, mask_ratio: float = 0.75) -> Tensor:
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    batch, patches, width = x.shape
    keep = int(patches * (1 - mask_ratio))
    order = torch.rand(batch, patches, device=x.device).argsort(1)
    ids_restore = order.argsort(1)
    x = x.gather(1, order[:, :keep, None].expand(-1, -1, width))
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    x = model.decoder_embed(model.norm(x))
    tokens = torch.cat([x[:, 1:], model.mask_token.expand(batch, patches - keep, -1)], 1)
    tokens = tokens.gather(1, ids_restore[..., None].expand(-1, -1, tokens.shape[2]))
    x = torch.cat([x[:, :1], tokens], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    target = model.patchify(images)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    mask = (ids_restore >= keep).float()
    return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


def loss_after(model: Any, images: Tensor, mask_ratio: float = 0.75) -> Tensor:
    conv, batch, patches = model.patch_embed.proj, len(images), model.pos_embed.shape[1] - 1
    noise = torch.rand(batch, patches, device=images.device)
    masking = mk.random_masking(noise, int(patches * (1 - mask_ratio)))
    positions = model.pos_embed[:, 1:]
    x = mk.embed_patches(images, masking.ids_keep, conv.weight, conv.bias, positions)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    x, positions = model.decoder_embed(model.norm(x)), model.decoder_pos_embed
    x = mk.restore_tokens(x, masking.ids_restore, model.mask_token, positions, prefix=1)
    for block in model.decoder_blocks:
        x = block(x)
    # Only masked patches are predicted, and their predictions are never stored as a whole.
    masked = masking.ids_masked[..., None].expand(-1, -1, x.shape[2])
    hidden, head = model.decoder_norm(x[:, 1:].gather(1, masked)), model.decoder_pred
    patch = conv.kernel_size[0]
    return mk.linear_reconstruction_loss(
        hidden, head.weight, head.bias, images, masking.ids_masked, patch_size=patch
    )


class TinyMAE(nn.Module):
    """A masked autoencoder with the names of facebookresearch/mae, for 32 x 32 images."""

    def __init__(self, width: int = 48, side: int = 32, patch: int = 8) -> None:
        super().__init__()
        tokens, self.patch = 1 + (side // patch) ** 2, patch
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token, self.mask_token = (nn.Parameter(torch.randn(1, 1, width)) for _ in "ab")
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, tokens, width))
        blocks = [
            nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, batch_first=True) for _ in range(4)
        ]
        self.blocks, self.decoder_blocks = nn.ModuleList(blocks[:2]), nn.ModuleList(blocks[2:])
        self.norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_pred = nn.Linear(width, 3 * patch * patch)

    def patchify(self, images: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,L,P*P*3], ordered (row, column, channel)."""
        columns = nn.functional.unfold(images, self.patch, stride=self.patch)
        return columns.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)


def main() -> None:
    torch.manual_seed(0)
    model, images = TinyMAE(), torch.rand(4, 3, 32, 32)
    for loss in (loss_before, loss_after):
        torch.manual_seed(1)
        print(f"{loss.__name__:12} {loss(model, images).item():.6f}")


if __name__ == "__main__":
    main()
