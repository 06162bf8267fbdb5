"""The ops that `bench kernels` measures, by name: most of them read pixels and tokens (ops_tokens.py), four are losses (ops_losses.py)."""

from __future__ import annotations

from .op import Op
from .ops_losses import distillation_op, linear_op, reconstruction_op, sssd_op
from .ops_tokens import crop_op, embed_op, gather_op, gelu_op, masking_op, restore_op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        masking_op(), gather_op(), embed_op(), restore_op(), gelu_op(), reconstruction_op(), linear_op(),
        distillation_op(), sssd_op(), crop_op(),
    )
}  # fmt: skip
