"""What the ops replace in other people's models: one Part per method.

A Part is a function with the host method's arguments and outputs. It uses the host's modules and
parameters under their usual names and adds none. `fits` is False for calls that it cannot serve,
`trials` are the calls on which patching.py compares it with the host's method.

Hosts, by their public names:
    facebookresearch/mae    MaskedAutoencoderViT (He et al., arXiv 2111.06377)
    transformers 5          ViTMAEForPreTraining
    timm, BEiT              Attention with one qkv layer, with or without q_bias and v_bias
    transformers 5          attention with q_proj, k_proj, v_proj and o_proj

Shapes: B images, C channels, H x W pixels, P patch side, L patches, K visible, N tokens (with the
class token), D width, Dd decoder width, V = P*P*C values per patch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masking import random_masking
from .patches import embed_patches
from .reconstruction import masked_reconstruction_loss
from .restore import restore_tokens
from .short_attention import attention

# a module of the host: its attributes are known by name only
Host = Any


class Part(NamedTuple):
    """One method of a host's module that an op can replace."""

    op: str
    method: str
    # attributes that the module needs ("a.b"), and methods ("a()")
    needs: str
    # (module, *arguments) -> what the method returns
    own: Callable[..., Any]
    # (module, *arguments) -> whether `own` can serve this call
    fits: Callable[..., bool]
    # calls that do not fit, for the report
    unless: str
    # module -> the arguments of each call of the comparison
    trials: Callable[[Host], Iterator[tuple[Any, ...]]]
    # how many of the method's arguments are understood; the others must have their defaults
    arguments: int
    # modules, or lists of them, that `own` and the host call alike: the comparison replaces them
    stacks: tuple[str, ...] = ()
    # largest relative difference of outputs and gradients in fp64 (some hosts compute the softmax
    # in fp32 always)
    tolerance: float = 1e-10
    # why no call fits
    never: str = "no call of the comparison fits"


# -------------------------------------------------------------------------------- shared
NO_CONVOLUTION = "it has no plain convolution of square patches that do not overlap"


def is_patch_convolution(conv: Any) -> bool:
    """True if the convolution cuts the image into square patches that do not overlap."""
    return bool(
        isinstance(conv, nn.Conv2d)
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


def are_images(images: Any, shape: tuple[int, ...], weight: Tensor | None = None) -> bool:
    """Floating point [B, *shape]; in the dtype of `weight`, as its layer needs without autocast."""
    if not isinstance(images, Tensor) or images.shape[1:] != shape:
        return False
    if weight is None or torch.is_autocast_enabled(images.device.type):
        return images.is_floating_point()
    return images.dtype == weight.dtype


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _some_images(shape: tuple[int, ...]) -> Tensor:
    """Values beyond (0, 1); patches of large and of small variance, where an epsilon counts."""
    images = 3 * torch.randn(3, *shape, dtype=torch.float64)
    images[..., : shape[-1] // 2] *= 1e-3
    return images


# ---------------------------------------------------------------- facebookresearch/mae
def mae_image_shape(host: Host) -> tuple[int, ...]:
    """(C, H, W) of the images that the model was made for; it rejects or resizes others."""
    conv = host.patch_embed.proj
    size = getattr(host.patch_embed, "img_size", None)
    if size is None:
        size = round((host.pos_embed.shape[1] - 1) ** 0.5) * conv.kernel_size[0]
    return (conv.in_channels, *((size, size) if isinstance(size, int) else size))


def mae_patch_side(host: Host) -> int:
    """P of the patches that the loss compares."""
    size = getattr(host.patch_embed, "patch_size", host.patch_embed.proj.kernel_size)
    return int(size if isinstance(size, int) else size[0])


def mae_encoder(host: Host, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B,C,H,W] -> (latent [B,1+K,D], mask [B,L] (1 = masked), ids_restore [B,L])."""
    patches = host.pos_embed.shape[1] - 1
    noise = torch.rand(images.shape[0], patches, device=images.device)
    keep, conv = int(patches * (1 - mask_ratio)), host.patch_embed.proj
    tokens = visible_tokens(images, noise, keep, conv, host.cls_token, host.pos_embed)
    x, mask, ids_restore = tokens
    for block in host.blocks:
        x = block(x)
    return host.norm(x), mask, ids_restore


def _fits_mae_encoder(host: Host, images: Any, mask_ratio: Any) -> bool:
    conv, patches = host.patch_embed.proj, host.pos_embed.shape[1] - 1
    return (
        is_patch_convolution(conv)
        and are_images(images, mae_image_shape(host), conv.weight)
        and isinstance(mask_ratio, float)
        and 1 <= int(patches * (1 - mask_ratio)) < patches
    )


def _try_mae_encoder(host: Host) -> Iterator[tuple[Any, ...]]:
    # ratios for which int() and round() give different numbers of visible patches
    for mask_ratio in (0.4, 0.7, 0.75):
        yield _some_images(mae_image_shape(host)), mask_ratio


def mae_decoder(host: Host, x: Tensor, ids_restore: Tensor) -> Tensor:
    """Latent [B,1+K,D] -> predictions of all patches [B,L,V]."""
    x = host.decoder_embed(x)
    x = restore_tokens(x, ids_restore, host.mask_token, host.decoder_pos_embed, prefix=1)
    for block in host.decoder_blocks:
        x = block(x)
    return host.decoder_pred(host.decoder_norm(x))[:, 1:]


def _fits_decoder(host: Host, x: Any, ids_restore: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(ids_restore, Tensor)
        and ids_restore.dtype == torch.int64
        and x.dim() == 3
        and ids_restore.shape == (x.shape[0], host.decoder_pos_embed.shape[1] - 1)
        and 1 <= x.shape[1] <= host.decoder_pos_embed.shape[1]
    )


def _try_decoder(host: Host) -> Iterator[tuple[Any, ...]]:
    patches = host.decoder_pos_embed.shape[1] - 1
    latent = _leaf(3, 2 + patches // 3, host.decoder_embed.weight.shape[1])
    yield latent, torch.rand(3, patches).argsort(1)


def mae_loss(host: Host, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    """Images [B,C,H,W], predictions [B,L,V], mask [B,L] of 0 and 1, or of weights -> scalar."""
    side = mae_patch_side(host)
    norm: Literal["patch"] | None = "patch" if host.norm_pix_loss else None
    return masked_reconstruction_loss(pred, images, weights=mask, patch_size=side, norm=norm)


def _fits_mae_loss(host: Host, images: Any, pred: Any, mask: Any) -> bool:
    shape, side = mae_image_shape(host), mae_patch_side(host)
    patches, values = (shape[1] // side) * (shape[2] // side), side * side * shape[0]
    return (
        are_images(images, shape)
        and isinstance(pred, Tensor)
        and pred.is_floating_point()
        and pred.shape == (images.shape[0], patches, values)
        and isinstance(mask, Tensor)
        and mask.is_floating_point()
        and mask.shape == (images.shape[0], patches)
        and not images.requires_grad
        and not mask.requires_grad
    )


def _try_mae_loss(host: Host) -> Iterator[tuple[Any, ...]]:
    (channels, height, width), side = mae_image_shape(host), mae_patch_side(host)
    patches = (height // side) * (width // side)
    pred = _leaf(3, patches, side * side * channels)
    # any weights: a mask of zeros and ones is a special case
    yield _some_images((channels, height, width)), pred, torch.rand(pred.shape[:2]).double()


MAE_PARTS = (
    Part(
        "random_masking + embed_patches",
        "forward_encoder",
        "patch_embed.proj.weight cls_token pos_embed blocks norm random_masking() "
        "forward_encoder()",
        mae_encoder,
        _fits_mae_encoder,
        "images of another size or dtype, no visible or no masked patch",
        _try_mae_encoder,
        arguments=2,
        stacks=("blocks", "decoder_blocks"),
        never=NO_CONVOLUTION,
    ),
    Part(
        "restore_tokens",
        "forward_decoder",
        "decoder_embed.weight mask_token decoder_pos_embed decoder_blocks decoder_norm "
        "decoder_pred forward_decoder()",
        mae_decoder,
        _fits_decoder,
        "another number of patches",
        _try_decoder,
        arguments=2,
        stacks=("blocks", "decoder_blocks"),
    ),
    Part(
        "masked_reconstruction_loss",
        "forward_loss",
        "patch_embed.proj.weight pos_embed norm_pix_loss forward_loss()",
        mae_loss,
        _fits_mae_loss,
        "images of another size, images or a mask that require a gradient",
        _try_mae_loss,
        arguments=3,
        stacks=("blocks", "decoder_blocks"),
    ),
)


# --------------------------------------------------------------------------- attention
def packed_attention(host: Host, x: Tensor) -> Tensor:
    """[B,N,D] -> [B,N,D]; heads packed as (3, heads, width) in one qkv layer, as in timm."""
    q_bias = getattr(host, "q_bias", None)
    if q_bias is None:
        qkv = host.qkv(x)
    else:
        # BEiT: no bias for the keys
        bias = torch.cat((q_bias, torch.zeros_like(host.v_bias), host.v_bias))
        qkv = F.linear(x, host.qkv.weight, bias)
    qkv = qkv.unflatten(-1, (3, host.num_heads, -1))
    x = host.proj(attention(qkv, scale=host.scale).flatten(2))
    return host.proj_drop(x) if hasattr(host, "proj_drop") else x


def _fits_packed(host: Host, x: Any) -> bool:
    drop = getattr(host, "attn_drop", 0.0)
    training = host.training or getattr(drop, "training", False)
    return isinstance(x, Tensor) and x.dim() == 3 and not (training and getattr(drop, "p", drop))


def _try_packed(host: Host) -> Iterator[tuple[Any, ...]]:
    yield (_leaf(3, 5, host.qkv.weight.shape[1]),)


def block_with_attention(host: Host, x: Tensor) -> Tensor:
    """[B,N,D] -> [B,N,D]: a block whose attention also returns its weights, which it drops."""
    scale_1, scale_2 = getattr(host, "gamma_1", None), getattr(host, "gamma_2", None)
    y = packed_attention(host.attn, host.norm1(x))
    x = x + host.drop_path(y if scale_1 is None else scale_1 * y)
    y = host.mlp(host.norm2(x))
    return x + host.drop_path(y if scale_2 is None else scale_2 * y)


def _fits_block(host: Host, x: Any) -> bool:
    return _fits_packed(host.attn, x)


def _try_block(host: Host) -> Iterator[tuple[Any, ...]]:
    yield from _try_packed(host.attn)


def split_attention(host: Host, x: Tensor) -> tuple[Tensor, None]:
    """[B,N,D] -> ([B,N,D], None); three layers, one product with a packed result."""
    layers = (host.q_proj, host.k_proj, host.v_proj)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if host.q_proj.bias is None else torch.cat([layer.bias for layer in layers])
    qkv = F.linear(x, weight, bias).unflatten(-1, (3, host.num_attention_heads, host.head_dim))
    return host.o_proj(attention(qkv, scale=host.scaling).flatten(2)), None


def _fits_split(host: Host, x: Any) -> bool:
    drops = host.training and getattr(host, "attention_dropout", 0.0)
    return isinstance(x, Tensor) and x.dim() == 3 and not drops


def _try_split(host: Host) -> Iterator[tuple[Any, ...]]:
    yield (_leaf(3, 5, host.q_proj.weight.shape[1]),)


ATTENTION_PARTS = (
    Part(
        "attention",
        "forward",
        "qkv.weight proj.weight num_heads scale",
        packed_attention,
        _fits_packed,
        "dropout of the attention weights in training, a mask or other arguments",
        _try_packed,
        arguments=1,
        tolerance=1e-5,
    ),
    Part(
        "attention",
        "forward",
        "q_proj.weight k_proj.weight v_proj.weight o_proj.weight num_attention_heads head_dim "
        "scaling",
        split_attention,
        _fits_split,
        "dropout of the attention weights in training, a mask or other arguments",
        _try_split,
        arguments=1,
        tolerance=1e-5,
    ),
)
# for attention that returns its weights always (SD-MAE, DINO), where its block does not
BLOCK_PART = Part(
    "attention",
    "forward",
    "attn.qkv.weight attn.proj.weight attn.num_heads attn.scale norm1 norm2 mlp drop_path",
    block_with_attention,
    _fits_block,
    "dropout of the attention weights in training, weights that are requested, other arguments",
    _try_block,
    arguments=1,
    stacks=("mlp", "drop_path"),
    tolerance=1e-5,
)


# ---------------------------------------------------------------------- transformers
def hf_embeddings(
    host: Host, images: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B,C,H,W] -> (encoder input [B,1+K,D], mask [B,L], ids_restore [B,L])."""
    positions, conv = host.position_embeddings, host.patch_embeddings.projection
    patches = positions.shape[1] - 1
    if noise is None:
        noise = torch.rand(images.shape[0], patches, device=images.device)
    keep = int(patches * (1 - host.config.mask_ratio))
    return visible_tokens(images, noise, keep, conv, host.cls_token, positions)


def _hf_image_shape(host: Host) -> tuple[int, ...]:
    embeddings = host.patch_embeddings
    return (embeddings.projection.in_channels, *embeddings.image_size)


def _fits_hf_embeddings(host: Host, images: Any, noise: Any) -> bool:
    conv, patches = host.patch_embeddings.projection, host.position_embeddings.shape[1] - 1
    return (
        is_patch_convolution(conv)
        and are_images(images, _hf_image_shape(host), conv.weight)
        and (noise is None or (isinstance(noise, Tensor) and noise.is_floating_point()))
        and (noise is None or noise.shape == (images.shape[0], patches))
        and 1 <= int(patches * (1 - host.config.mask_ratio)) < patches
    )


def _try_hf_embeddings(host: Host) -> Iterator[tuple[Any, ...]]:
    images = _some_images(_hf_image_shape(host))
    yield images, None
    yield images, torch.rand(3, host.position_embeddings.shape[1] - 1)


def output_class(host: Host, name: str) -> Any:
    """The class of that name in the module that defines the host's class or one of its bases."""
    modules = (sys.modules.get(base.__module__) for base in type(host).__mro__)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def hf_decoder(host: Host, x: Tensor, ids_restore: Tensor) -> Any:
    """Latent [B,1+K,D] -> the host's ViTMAEDecoderOutput, logits of all patches [B,L,V]."""
    x = host.decoder_embed(x)
    x = restore_tokens(x, ids_restore, host.mask_token, host.decoder_pos_embed, prefix=1)
    for layer in host.decoder_layers:
        x = layer(x)
    logits = host.decoder_pred(host.decoder_norm(x))[:, 1:]
    return output_class(host, "ViTMAEDecoderOutput")(logits=logits)


def hf_loss(host: Host, images: Tensor, noise: Tensor | None) -> Any:
    """Images [B,C,H,W] -> the host's ViTMAEForPreTrainingOutput."""
    encoded = host.vit(images, noise=noise)
    logits = host.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
    norm: Literal["patch"] | None = "patch" if host.config.norm_pix_loss else None
    side, mask = host.config.patch_size, encoded.mask
    loss = masked_reconstruction_loss(logits, images, weights=mask, patch_size=side, norm=norm)
    return output_class(host, "ViTMAEForPreTrainingOutput")(
        loss=loss,
        logits=logits,
        mask=mask,
        ids_restore=encoded.ids_restore,
        hidden_states=encoded.hidden_states,
        attentions=encoded.attentions,
    )


def _fits_hf_loss(host: Host, images: Any, noise: Any) -> bool:
    shape = _hf_image_shape(host.vit.embeddings)
    return are_images(images, shape) and not images.requires_grad


def _try_hf_loss(host: Host) -> Iterator[tuple[Any, ...]]:
    yield from _try_hf_embeddings(host.vit.embeddings)


HF_STACKS = ("vit.layers", "vit.encoder.layer", "decoder.decoder_layers")
# module of the model -> its part
HF_PARTS = {
    "vit.embeddings": Part(
        "random_masking + embed_patches",
        "forward",
        "patch_embeddings.projection.weight patch_embeddings.image_size cls_token "
        "position_embeddings config.mask_ratio random_masking()",
        hf_embeddings,
        _fits_hf_embeddings,
        "images of another size or dtype, interpolate_pos_encoding",
        _try_hf_embeddings,
        arguments=2,
        never=NO_CONVOLUTION,
    ),
    "decoder": Part(
        "restore_tokens",
        "forward",
        "decoder_embed.weight mask_token decoder_pos_embed decoder_layers decoder_norm "
        "decoder_pred",
        hf_decoder,
        _fits_decoder,
        "another number of patches, interpolate_pos_encoding",
        _try_decoder,
        arguments=2,
        stacks=("decoder_layers",),
    ),
    "": Part(
        "masked_reconstruction_loss",
        "forward",
        "vit.embeddings.patch_embeddings.image_size decoder config.norm_pix_loss config.patch_size",
        hf_loss,
        _fits_hf_loss,
        "images of another size or that require a gradient, other arguments than noise",
        _try_hf_loss,
        arguments=2,
        stacks=HF_STACKS,
    ),
}
