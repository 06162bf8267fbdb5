"""What patch_model puts into other people's masked autoencoders: their own methods, with the ops of this package inside.

Each class below stands in front of the host's class and overrides one method, with the host's signature and outputs. It
reads the host's modules and parameters under their usual names and adds none. Where the op cannot do the same for one
call, it calls the host's own method; `unless` of its Part says when.

Hosts, by their public names:
    facebookresearch/mae    MaskedAutoencoderViT (He et al., arXiv 2111.06377)
    transformers 5          ViTMAEForPreTraining

Shapes: B images, C channels, H x W pixels, P patch side, L patches, K visible, N tokens (with the class token), D width,
Dd decoder width, V = P*P*C values per patch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masking import random_masking
from .patches import embed_patches
from .reconstruction import masked_reconstruction_loss
from .restore import restore_tokens
from .short_attention import attention


class Part(NamedTuple):
    """One method of one host module that an op takes over."""

    takes_over: type[nn.Module]
    method: str
    op: str
    unless: str


def observed(*modules: nn.Module) -> bool:
    """Whether somebody watches or replaced the call of a module, so that its weights must not be used behind its back."""
    return any(
        bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        or "forward" in m.__dict__
        for m in modules
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module is `kind.forward` on its weight and bias and nothing else."""
    if type(module).forward is not kind.forward or observed(module):
        return False
    return type(module.weight) in (nn.Parameter, Tensor)  # no quantised or sharded kind of tensor


def is_patch_convolution(conv: nn.Module) -> bool:
    """Whether the convolution cuts the image into square patches that do not overlap, and is plain."""
    if not is_plain(conv, nn.Conv2d):
        return False
    plain: Any = conv
    square = plain.kernel_size == plain.stride and plain.kernel_size[0] == plain.kernel_size[1]
    return bool(
        square
        and plain.groups == 1
        and plain.dilation == (1, 1)
        and plain.padding in ((0, 0), "valid")
    )


def visible_tokens(
    images_BCHW: Tensor,
    noise_BL: Tensor,
    keep: int,
    conv: nn.Conv2d,
    cls_token: Tensor,
    pos_embed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder input [B,1+K,D], mask [B,L] (1 = masked) in torch's default dtype, and ids_restore [B,L]."""
    masking = random_masking(noise_BL, keep)
    tokens = embed_patches(images_BCHW, masking.ids_keep, conv.weight, conv.bias, pos_embed[:, 1:])
    first = (cls_token + pos_embed[:, :1]).expand(images_BCHW.shape[0], -1, -1)
    return (
        torch.cat((first, tokens), 1),
        masking.mask.to(torch.get_default_dtype()),
        masking.ids_restore,
    )


# ------------------------------------------------------------------------------------------ facebookresearch/mae
class MaeEncoder(nn.Module):
    patch_embed: Any
    cls_token: Tensor
    pos_embed: Tensor
    blocks: nn.ModuleList
    norm: nn.Module

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B,C,H,W] -> (latent [B,1+K,D], mask [B,L] with 1 = masked, ids_restore [B,L])."""
        conv, patches = self.patch_embed.proj, self.pos_embed.shape[1] - 1
        keep = int(patches * (1 - mask_ratio))
        if (
            keep < 1
            or not image_fits(self.patch_embed, x, patches)
            or observed(self.patch_embed)
            or not is_patch_convolution(conv)
            or "random_masking" in self.__dict__
        ):
            return super().forward_encoder(x, mask_ratio)  # type: ignore[misc]
        noise = torch.rand(x.shape[0], patches, device=x.device)
        x, mask, ids_restore = visible_tokens(x, noise, keep, conv, self.cls_token, self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore


def image_fits(patch_embed: Any, images: Tensor, patches: int) -> bool:
    """Whether the images have the size that the host was built for; it refuses or resizes others in its own way."""
    height, width = images.shape[2:]
    side = patch_embed.proj.kernel_size[0]
    size = getattr(patch_embed, "img_size", None)
    size = (size, size) if isinstance(size, int) else size
    fits = (
        height % side == 0 and width % side == 0 and (height // side) * (width // side) == patches
    )
    return fits and (size is None or (height, width) == tuple(size))


class MaeDecoder(nn.Module):
    decoder_embed: nn.Module
    mask_token: Tensor
    decoder_pos_embed: Tensor
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.Module
    decoder_pred: nn.Module

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent [B,1+K,D] -> predictions of all patches [B,L,V]."""
        x = restore_tokens(
            self.decoder_embed(x), ids_restore, self.mask_token, self.decoder_pos_embed, prefix=1
        )
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class MaeLoss(nn.Module):
    patch_embed: Any
    norm_pix_loss: bool

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Images [B,C,H,W], predictions [B,L,V], mask [B,L] of zeros and ones (1 = masked) -> scalar."""
        if imgs.requires_grad:
            return super().forward_loss(imgs, pred, mask)  # type: ignore[misc]
        side = self.patch_embed.proj.kernel_size[0]
        norm = "patch" if self.norm_pix_loss else None
        return masked_reconstruction_loss(pred, imgs, mask=mask.bool(), patch_size=side, norm=norm)


class PackedAttention(nn.Module):
    """timm's attention: one qkv layer, heads packed as (3, heads, width)."""

    qkv: nn.Module
    proj: nn.Module
    proj_drop: Any
    num_heads: int
    scale: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B,N,D] -> [B,N,D]."""
        dropout = getattr(self, "attn_drop", None)
        asked = any(a is not None and a is not False for a in (*args, *kwargs.values()))
        drops = (
            isinstance(dropout, nn.Dropout)
            and dropout.p > 0
            and (self.training or dropout.training)
        )
        if asked or drops or (isinstance(dropout, nn.Module) and observed(dropout)):
            return super().forward(x, *args, **kwargs)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        x = self.proj(attention(qkv, scale=self.scale).flatten(2))
        return self.proj_drop(x) if hasattr(self, "proj_drop") else x


MAE_NEEDS = (
    "patch_embed.proj.weight", "cls_token", "pos_embed", "blocks", "norm", "decoder_embed", "mask_token",
    "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "norm_pix_loss",
    "random_masking()", "forward_encoder()", "forward_decoder()", "forward_loss()",
)  # fmt: skip
MAE_ENCODER = Part(
    MaeEncoder,
    "forward_encoder",
    "random_masking + embed_patches",
    "another image size, no visible patch, hooks on patch_embed, or a random_masking set on the instance",
)
MAE_DECODER = Part(MaeDecoder, "forward_decoder", "restore_tokens", "")
MAE_LOSS = Part(
    MaeLoss, "forward_loss", "masked_reconstruction_loss", "images that require a gradient"
)
MAE_ATTENTION = Part(
    PackedAttention,
    "forward",
    "attention",
    "attn_drop above 0 in training, hooks on attn_drop, or a mask or other arguments",
)


# -------------------------------------------------------------------------------------------------- transformers
class HFEmbeddings(nn.Module):
    patch_embeddings: Any
    cls_token: Tensor
    position_embeddings: Tensor
    config: Any

    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B,C,H,W] and noise [B,L] -> (encoder input [B,1+K,D], mask [B,L] with 1 = masked, ids_restore)."""
        conv = self.patch_embeddings.projection
        patches = self.position_embeddings.shape[1] - 1
        keep = int(patches * (1 - self.config.mask_ratio))
        if (
            interpolate_pos_encoding
            or keep < 1
            or tuple(pixel_values.shape[1:])
            != (conv.weight.shape[1], *self.patch_embeddings.image_size)
            or observed(self.patch_embeddings)
            or not is_patch_convolution(conv)
            or "random_masking" in self.__dict__
        ):
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        if noise is None:
            noise = torch.rand(pixel_values.shape[0], patches, device=pixel_values.device)
        noise = noise.to(pixel_values.device)
        return visible_tokens(
            pixel_values, noise, keep, conv, self.cls_token, self.position_embeddings
        )


class HFDecoder(nn.Module):
    decoder_embed: nn.Module
    mask_token: Tensor
    decoder_pos_embed: Tensor
    decoder_layers: nn.ModuleList
    decoder_norm: nn.Module
    decoder_pred: nn.Module
    _mae_output: type

    def forward(
        self, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False
    ) -> Any:
        """Latent [B,1+K,D] -> the host's ViTMAEDecoderOutput with logits of all patches [B,L,V]."""
        if interpolate_pos_encoding:
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding)
        x = self.decoder_embed(hidden_states)
        ids_restore = ids_restore.to(hidden_states.device)
        x = restore_tokens(x, ids_restore, self.mask_token, self.decoder_pos_embed, prefix=1)
        for layer in self.decoder_layers:
            x = layer(x)
        return self._mae_output(logits=self.decoder_pred(self.decoder_norm(x))[:, 1:])


class HFLoss(nn.Module):
    vit: Any
    decoder: nn.Module
    config: Any
    _mae_output: type

    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Images [B,C,H,W] -> the host's ViTMAEForPreTrainingOutput, or a tuple where return_dict is False."""
        side, channels = self.config.patch_size, self.config.num_channels
        if (
            pixel_values is None
            or interpolate_pos_encoding
            or pixel_values.requires_grad
            or pixel_values.shape[1] != channels
            or pixel_values.shape[2] != pixel_values.shape[3]
            or "patchify" in self.__dict__
        ):
            return super().forward(
                pixel_values, noise, interpolate_pos_encoding, attention_mask, **kwargs
            )
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        encoded = self.vit(
            pixel_values,
            noise=noise,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        logits = self.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        norm = "patch" if self.config.norm_pix_loss else None
        mask = encoded.mask.bool()
        output = self._mae_output(
            loss=masked_reconstruction_loss(
                logits, pixel_values, mask=mask, patch_size=side, norm=norm
            ),
            logits=logits,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if return_dict else output.to_tuple()


class SplitAttention(nn.Module):
    """transformers' attention: three projections, taken as one matrix product so that their result is packed."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    num_attention_heads: int
    head_dim: int
    scaling: float
    attention_dropout: float
    config: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B,N,D] -> ([B,N,D], None)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        asked = any(
            v is not None and v is not False
            for k, v in kwargs.items()
            if k != "output_hidden_states"
        )
        if (
            asked
            or attention_mask is not None
            or getattr(self.config, "output_attentions", False)
            or (self.training and self.attention_dropout > 0)
            or not all(is_plain(p, nn.Linear) for p in projections)
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        weight = torch.cat([p.weight for p in projections])
        bias = None if self.q_proj.bias is None else torch.cat([p.bias for p in projections])
        qkv = F.linear(hidden_states, weight, bias).unflatten(
            -1, (3, self.num_attention_heads, self.head_dim)
        )
        return self.o_proj(attention(qkv, scale=self.scaling).flatten(2)), None


HF_NEEDS = (
    "vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.patch_embeddings.image_size",
    "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.layers", "decoder.decoder_embed",
    "decoder.mask_token", "decoder.decoder_pos_embed", "decoder.decoder_layers", "decoder.decoder_norm",
    "decoder.decoder_pred", "config.norm_pix_loss", "config.mask_ratio", "config.patch_size", "config.num_channels",
    "forward()",
)  # fmt: skip
HF_EMBEDDINGS = Part(
    HFEmbeddings,
    "forward",
    "random_masking + embed_patches",
    "interpolate_pos_encoding, another image size, no visible patch, hooks on patch_embeddings, or a random_masking set on "
    "the instance",
)
HF_DECODER = Part(HFDecoder, "forward", "restore_tokens", "interpolate_pos_encoding")
HF_LOSS = Part(
    HFLoss,
    "forward",
    "masked_reconstruction_loss",
    "interpolate_pos_encoding, images that require a gradient, or images that the host refuses",
)
HF_ATTENTION = Part(
    SplitAttention,
    "forward",
    "attention",
    "attention_probs_dropout_prob above 0 in training, an attention mask, output_attentions, or adapters or hooks on q_proj, "
    "k_proj or v_proj",
)
# the outputs that the two hosts' methods return, found in the module that defines the host's class
HF_OUTPUTS = {HFDecoder: "ViTMAEDecoderOutput", HFLoss: "ViTMAEForPreTrainingOutput"}
