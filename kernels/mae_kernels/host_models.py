"""Replacement methods for other people's masked autoencoders.

Each class below is a mixin that precedes the host's class and overrides one method, with the
host's signature and outputs. It uses the host's modules and parameters under their usual names and
adds none. Calls that the op cannot serve go to the host's method; `unless` of its Part lists them.

Hosts, by their public names:
    facebookresearch/mae    MaskedAutoencoderViT (He et al., arXiv 2111.06377)
    transformers 5          ViTMAEForPreTraining

After each mixin comes its trial: the call that patch_model runs on a copy of the host's module,
with and without the mixin, to compare them.

Shapes: B images, C channels, H x W pixels, P patch side, L patches, K visible, N tokens (with the
class token), D width, Dd decoder width, V = P*P*C values per patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masking import random_masking
from .patches import embed_patches
from .reconstruction import masked_reconstruction_loss
from .restore import restore_tokens
from .short_attention import attention

# base of the mixins; Any, because the attributes are those of the host's class
Host: Any = nn.Module
# (differentiable inputs, outputs)
Trial = tuple[list[Tensor], Any]


class Part(NamedTuple):
    """One method of one host module that an op can replace."""

    mixin: type[nn.Module]
    method: str
    op: str
    # calls that still run the host's method, for the report
    unless: str
    # (copy of the module, training) -> Trial
    trial: Callable[[Any, bool], Trial]


# -------------------------------------------------------------------------------- shared
def observed(*modules: nn.Module) -> bool:
    """True if a module has hooks or a replaced forward: its call must not be bypassed."""
    return any(
        bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        or "forward" in m.__dict__
        for m in modules
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling the module is `kind.forward` on its weight and bias and nothing else."""
    if type(module).forward is not kind.forward or observed(module):
        return False
    # quantised and sharded weights have other types
    return type(module.weight) in (nn.Parameter, Tensor)


def is_patch_convolution(conv: Any) -> bool:
    """True if the convolution is plain and cuts the image into square, non-overlapping patches."""
    return bool(
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding in ((0, 0), "valid")
    )


def visible_tokens(
    images_BCHW: Tensor,
    noise_BL: Tensor,
    keep: int,
    conv: nn.Conv2d,
    cls_token: Tensor,
    pos_embed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder input [B,1+K,D], mask [B,L] (1 = masked, default dtype) and ids_restore [B,L]."""
    masking = random_masking(noise_BL, keep)
    tokens = embed_patches(images_BCHW, masking.ids_keep, conv.weight, conv.bias, pos_embed[:, 1:])
    first = (cls_token + pos_embed[:, :1]).expand(images_BCHW.shape[0], -1, -1)
    mask = masking.mask.to(torch.get_default_dtype())
    return torch.cat((first, tokens), 1), mask, masking.ids_restore


def has_other_arguments(*values: Any) -> bool:
    """True if any argument is set to something other than None or False."""
    return any(value is not None and value is not False for value in values)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _mask_ratio(training: bool) -> float:
    """Two ratios for which int() and round() give different numbers of visible patches."""
    return 0.4 if training else 0.7


# ---------------------------------------------------------------- facebookresearch/mae
class MaeEncoder(Host):
    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B,C,H,W] -> (latent [B,1+K,D], mask [B,L] (1 = masked), ids_restore [B,L])."""
        conv = self.patch_embed.proj
        patches = self.pos_embed.shape[1] - 1
        keep = int(patches * (1 - mask_ratio))
        if (
            keep < 1
            or not image_fits(self.patch_embed, x, patches)
            or observed(self.patch_embed)
            or not is_patch_convolution(conv)
            or "random_masking" in self.__dict__
        ):
            return super().forward_encoder(x, mask_ratio)
        noise = torch.rand(x.shape[0], patches, device=x.device)
        x, mask, ids_restore = visible_tokens(x, noise, keep, conv, self.cls_token, self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore


def image_fits(patch_embed: Any, images: Tensor, patches: int) -> bool:
    """True if the images have the host's size; it rejects or resizes others by its own rule."""
    height, width = images.shape[2:]
    side = patch_embed.proj.kernel_size[0]
    if height % side or width % side or (height // side) * (width // side) != patches:
        return False
    size = getattr(patch_embed, "img_size", None)
    size = (size, size) if isinstance(size, int) else size
    return size is None or (height, width) == tuple(size)


def _mae_images(trial: Any) -> Tensor:
    conv, patches = trial.patch_embed.proj, trial.pos_embed.shape[1] - 1
    size = getattr(trial.patch_embed, "img_size", None)
    size = round(patches**0.5) * conv.kernel_size[0] if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(2, conv.in_channels, height, width, dtype=torch.float64)


def _try_mae_encoder(trial: Any, training: bool) -> Trial:
    return [], trial.forward_encoder(_mae_images(trial), _mask_ratio(training))


class MaeDecoder(Host):
    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent [B,1+K,D] -> predictions of all patches [B,L,V]."""
        x = self.decoder_embed(x)
        x = restore_tokens(x, ids_restore, self.mask_token, self.decoder_pos_embed, prefix=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def _try_mae_decoder(trial: Any, training: bool) -> Trial:
    patches = trial.pos_embed.shape[1] - 1
    latent = _leaf(2, 2 + patches // 3, trial.cls_token.shape[-1])
    return [latent], trial.forward_decoder(latent, torch.rand(2, patches).argsort(1))


class MaeLoss(Host):
    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Images [B,C,H,W], predictions [B,L,V], mask [B,L] of 0 and 1 (1 = masked) -> scalar."""
        if imgs.requires_grad:
            return super().forward_loss(imgs, pred, mask)
        side = self.patch_embed.proj.kernel_size[0]
        norm: Literal["patch"] | None = "patch" if self.norm_pix_loss else None
        return masked_reconstruction_loss(pred, imgs, mask=mask.bool(), patch_size=side, norm=norm)


def _try_mae_loss(trial: Any, training: bool) -> Trial:
    images, patches = _mae_images(trial), trial.pos_embed.shape[1] - 1
    trial.norm_pix_loss = training
    pred = _leaf(2, patches, trial.decoder_pred.weight.shape[0])
    mask = (torch.rand(2, patches, dtype=torch.float64) < 0.6).double()
    mask[0, 0] = 1
    return [pred], trial.forward_loss(images, pred, mask)


class PackedAttention(Host):
    """timm's attention: one qkv layer, heads packed as (3, heads, width)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B,N,D] -> [B,N,D]."""
        dropout: Any = getattr(self, "attn_drop", None)
        active = isinstance(dropout, nn.Dropout) and dropout.p > 0
        drops = active and (self.training or dropout.training)
        watched = isinstance(dropout, nn.Module) and observed(dropout)
        if drops or watched or has_other_arguments(*args, *kwargs.values()):
            return super().forward(x, *args, **kwargs)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        x = self.proj(attention(qkv, scale=self.scale).flatten(2))
        return self.proj_drop(x) if hasattr(self, "proj_drop") else x


def _try_mae_attention(trial: Any, training: bool) -> Trial:
    x = _leaf(2, 5, trial.qkv.weight.shape[1])
    return [x], trial(x)


MAE_NEEDS = (
    "patch_embed.proj.weight cls_token pos_embed blocks norm decoder_embed mask_token "
    "decoder_pos_embed decoder_blocks decoder_norm decoder_pred norm_pix_loss "
    "random_masking() forward_encoder() forward_decoder() forward_loss()"
)
MAE_ENCODER = Part(
    MaeEncoder,
    "forward_encoder",
    "random_masking + embed_patches",
    "another image size, no visible patch, hooks on patch_embed, or a random_masking set on the "
    "instance",
    _try_mae_encoder,
)
MAE_DECODER = Part(MaeDecoder, "forward_decoder", "restore_tokens", "", _try_mae_decoder)
MAE_LOSS = Part(
    MaeLoss,
    "forward_loss",
    "masked_reconstruction_loss",
    "images that require a gradient",
    _try_mae_loss,
)
MAE_ATTENTION = Part(
    PackedAttention,
    "forward",
    "attention",
    "attn_drop above 0 in training, hooks on attn_drop, or a mask or other arguments",
    _try_mae_attention,
)


# ------------------------------------------------------------------------ transformers
class HFEmbeddings(Host):
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B,C,H,W], noise [B,L] -> (tokens [B,1+K,D], mask [B,L], ids_restore [B,L])."""
        conv = self.patch_embeddings.projection
        patches = self.position_embeddings.shape[1] - 1
        keep = int(patches * (1 - self.config.mask_ratio))
        needed = (conv.weight.shape[1], *self.patch_embeddings.image_size)
        if (
            interpolate_pos_encoding
            or keep < 1
            or tuple(pixel_values.shape[1:]) != needed
            or observed(self.patch_embeddings)
            or not is_patch_convolution(conv)
            or "random_masking" in self.__dict__
        ):
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        if noise is None:
            noise = torch.rand(pixel_values.shape[0], patches, device=pixel_values.device)
        noise = noise.to(pixel_values.device)
        pos_embed = self.position_embeddings
        return visible_tokens(pixel_values, noise, keep, conv, self.cls_token, pos_embed)


def _hf_images(embeddings: Any) -> Tensor:
    channels = embeddings.patch_embeddings.projection.in_channels
    return torch.rand(2, channels, *embeddings.patch_embeddings.image_size, dtype=torch.float64)


def _try_hf_embeddings(trial: Any, training: bool) -> Trial:
    trial.config.mask_ratio = _mask_ratio(training)
    images = _hf_images(trial)
    noise = torch.rand(2, trial.position_embeddings.shape[1] - 1)
    return [], (trial(images), trial(images, noise=noise))


class HFDecoder(Host):
    # the class that the host returns; `_mae_output` of the patched class is that class
    _mae_output_name = "ViTMAEDecoderOutput"

    def forward(
        self, hidden_states: Tensor, ids_restore: Tensor, interpolate_pos_encoding: bool = False
    ) -> Any:
        """Latent [B,1+K,D] -> the host's ViTMAEDecoderOutput, logits of all patches [B,L,V]."""
        if interpolate_pos_encoding:
            return super().forward(hidden_states, ids_restore, interpolate_pos_encoding)
        x = self.decoder_embed(hidden_states)
        ids_restore = ids_restore.to(hidden_states.device)
        x = restore_tokens(x, ids_restore, self.mask_token, self.decoder_pos_embed, prefix=1)
        for layer in self.decoder_layers:
            x = layer(x)
        return self._mae_output(logits=self.decoder_pred(self.decoder_norm(x))[:, 1:])


def _try_hf_decoder(trial: Any, training: bool) -> Trial:
    patches = trial.decoder_pos_embed.shape[1] - 1
    latent = _leaf(2, 2 + patches // 3, trial.decoder_embed.weight.shape[1])
    return [latent], trial(latent, torch.rand(2, patches).argsort(1))


class HFLoss(Host):
    _mae_output_name = "ViTMAEForPreTrainingOutput"

    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Images [B,C,H,W] -> the host's ViTMAEForPreTrainingOutput; a tuple if not return_dict."""
        if (
            pixel_values is None
            or interpolate_pos_encoding
            or pixel_values.requires_grad
            or pixel_values.shape[1] != self.config.num_channels
            or pixel_values.shape[2] != pixel_values.shape[3]
            or "patchify" in self.__dict__
        ):
            arguments = (pixel_values, noise, interpolate_pos_encoding, attention_mask)
            return super().forward(*arguments, **kwargs)
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
        loss = masked_reconstruction_loss(
            logits,
            pixel_values,
            mask=encoded.mask.bool(),
            patch_size=self.config.patch_size,
            norm="patch" if self.config.norm_pix_loss else None,
        )
        output = self._mae_output(
            loss=loss,
            logits=logits,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if return_dict else output.to_tuple()


def _try_hf_loss(trial: Any, training: bool) -> Trial:
    trial.config.norm_pix_loss = training
    return [], trial(_hf_images(trial.vit.embeddings))


class SplitAttention(Host):
    """transformers' attention: three projections, computed as one product with a packed result."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B,N,D] -> ([B,N,D], None)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        others = [v for k, v in kwargs.items() if k != "output_hidden_states"]
        if (
            has_other_arguments(attention_mask, *others)
            or getattr(self.config, "output_attentions", False)
            or (self.training and self.attention_dropout > 0)
            or not all(is_plain(p, nn.Linear) for p in projections)
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        weight = torch.cat([p.weight for p in projections])
        bias = None if self.q_proj.bias is None else torch.cat([p.bias for p in projections])
        heads = (3, self.num_attention_heads, self.head_dim)
        qkv = F.linear(hidden_states, weight, bias).unflatten(-1, heads)
        return self.o_proj(attention(qkv, scale=self.scaling).flatten(2)), None


def _try_hf_attention(trial: Any, training: bool) -> Trial:
    x = _leaf(2, 5, trial.q_proj.weight.shape[1])
    return [x], trial(x)[0]


HF_NEEDS = (
    "vit.embeddings.patch_embeddings.projection.weight vit.embeddings.patch_embeddings.image_size "
    "vit.embeddings.cls_token vit.embeddings.position_embeddings vit.layers decoder.decoder_embed "
    "decoder.mask_token decoder.decoder_pos_embed decoder.decoder_layers decoder.decoder_norm "
    "decoder.decoder_pred config.norm_pix_loss config.mask_ratio config.patch_size "
    "config.num_channels forward()"
)
HF_EMBEDDINGS = Part(
    HFEmbeddings,
    "forward",
    "random_masking + embed_patches",
    "interpolate_pos_encoding, another image size, no visible patch, hooks on patch_embeddings, or "
    "a random_masking set on the instance",
    _try_hf_embeddings,
)
HF_DECODER = Part(
    HFDecoder, "forward", "restore_tokens", "interpolate_pos_encoding", _try_hf_decoder
)
HF_LOSS = Part(
    HFLoss,
    "forward",
    "masked_reconstruction_loss",
    "interpolate_pos_encoding, images that require a gradient, or images that the host rejects",
    _try_hf_loss,
)
HF_ATTENTION = Part(
    SplitAttention,
    "forward",
    "attention",
    "attention_probs_dropout_prob above 0 in training, an attention mask, output_attentions, or "
    "adapters or hooks on q_proj, k_proj or v_proj",
    _try_hf_attention,
)
