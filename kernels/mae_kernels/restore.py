"""Restore the full sequence from visible tokens: unshuffle, mask tokens and positions in one write.

    out[b, j]     = visible[b, j] + pos_embed[j]                            prefix tokens (a class token), j < p
    out[b, p + l] = visible[b, p + r] + pos_embed[p + l]  where r = ids_restore[b, l] < K
                  = mask_token + pos_embed[p + l]         otherwise

Source: He et al., arXiv 2111.06377, section 3 (decoder input); the same numbers as the concatenate, gather and add of
facebookresearch/mae.

Shapes: B images, L patches, K visible, p prefix tokens, D decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, check_ids, check_int, check_same_device, check_shape
from ._runtime import use_triton


def restore_tokens(
    visible: Tensor, ids_restore: Tensor, mask_token: Tensor, pos_embed: Tensor, *, prefix: int
) -> Tensor:
    """Put visible tokens back in their places, mask tokens elsewhere, and add the positions.

    Args:
        visible: [B, p+K, D], prefix tokens first, then the visible tokens in the order of ids_keep.
        ids_restore: [B, L] int64, a permutation of 0..L-1 per image (Masking.ids_restore).
        mask_token: [D] or [1, 1, D].
        pos_embed: [p+L, D] or [1, p+L, D].
        prefix: p, the number of prefix tokens (0 or more).

    Returns: [B, p+L, D] in the widest of the three floating dtypes. Gradients reach visible, mask_token and pos_embed.

    Raises: TypeError or ValueError naming the argument.
    """
    for name, tensor in (("visible", visible), ("mask_token", mask_token), ("pos_embed", pos_embed)):
        check_floating(name, tensor)
        check_same_device(name, tensor, "visible", visible)
    check_shape("visible", visible, (None, None, None), "[B, p+K, D]")
    check_int("prefix", prefix, 0)
    batch, tokens, width = visible.shape
    check_ids("ids_restore", ids_restore, batch, ids_restore.shape[-1] if isinstance(ids_restore, Tensor) else 0)
    check_same_device("ids_restore", ids_restore, "visible", visible)
    patches = ids_restore.shape[1]
    if not prefix <= tokens <= prefix + patches:
        raise ValueError(
            f"visible: got {tokens} tokens, needs between prefix = {prefix} and prefix + L = {prefix + patches}"
        )
    if mask_token.dim() == 3 and mask_token.shape[:2] == (1, 1):
        mask_token = mask_token[0, 0]
    check_shape("mask_token", mask_token, (width,), "[D]")
    if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed[0]
    check_shape("pos_embed", pos_embed, (prefix + patches, width), "[p+L, D]")
    use_triton("restore_tokens", visible.device)
    return _reference(visible, ids_restore, mask_token, pos_embed, prefix)


def _reference(
    visible_BTD: Tensor, ids_restore_BL: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor, prefix: int
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(visible_BTD.dtype, mask_token_D.dtype), pos_embed_ND.dtype)
    num_visible = visible_BTD.shape[1] - prefix
    # one extra row, the mask token, stands for every masked patch
    table = torch.cat([visible_BTD.to(dtype), mask_token_D.to(dtype).expand(visible_BTD.shape[0], 1, -1)], 1)
    rows_BL = ids_restore_BL.clamp(max=num_visible) + prefix
    rows_BN = torch.cat([torch.arange(prefix, device=rows_BL.device).expand(rows_BL.shape[0], -1), rows_BL], 1)
    return table.gather(1, rows_BN[..., None].expand(-1, -1, table.shape[2])) + pos_embed_ND
