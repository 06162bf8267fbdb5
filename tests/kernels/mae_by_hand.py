"""A test double: a masked autoencoder with the attribute names and call signatures of
facebookresearch/mae, written from those.

It gathers by index arithmetic, attends with einsum and measures the loss patch by patch: nothing
here shares code with the ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[2:]) == self.img_size, "the image has another size than the model"
        y = self.proj(x)
        return y.reshape(*y.shape[:2], -1).permute(0, 2, 1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bnhd,bmhd->bhnm", q, k) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).unbind(2)
        weights = self.attn_drop(self.scores(q, k).softmax(-1))
        return self.proj_drop(
            self.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(x.shape))
        )


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskedAutoencoderViT(nn.Module):
    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 8,
        in_chans: int = 3,
        embed_dim: int = 24,
        depth: int = 2,
        num_heads: int = 3,
        decoder_embed_dim: int = 16,
        decoder_depth: int = 2,
        decoder_num_heads: int = 2,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + patches, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            torch.randn(1, 1 + patches, decoder_embed_dim), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size * patch_size * in_chans)
        self.norm_pix_loss = norm_pix_loss

    def patchify(self, imgs: Tensor) -> Tensor:
        side = self.patch_embed.patch_size[0]
        columns = F.unfold(imgs, side, stride=side)  # [B, C*P*P, L], channels first
        return columns.unflatten(1, (imgs.shape[1], side * side)).permute(0, 3, 2, 1).flatten(2)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        batch, patches, _ = x.shape
        keep = int(patches * (1 - mask_ratio))
        noise = torch.rand(batch, patches, device=x.device)
        order = noise.argsort(1)
        # the inverse permutation
        ids_restore = torch.zeros_like(order)
        ids_restore[torch.arange(batch, device=x.device)[:, None], order] = torch.arange(
            patches, device=x.device
        )
        kept = x[torch.arange(batch, device=x.device)[:, None], order[:, :keep]]
        return kept, (ids_restore >= keep).float(), ids_restore

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        first = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([first.repeat(len(x), 1, 1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        batch, keep = x.shape[0], x.shape[1] - 1
        table = torch.cat(
            [x[:, 1:], self.mask_token.expand(batch, ids_restore.shape[1] - keep, -1).to(x.dtype)],
            1,
        )
        tokens = table[torch.arange(batch, device=x.device)[:, None], ids_restore]
        x = torch.cat([x[:, :1], tokens], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return (
            F.mse_loss(pred, target.to(pred.dtype), reduction="none").mean(2) * mask
        ).sum() / mask.sum()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask
