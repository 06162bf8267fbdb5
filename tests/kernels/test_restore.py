"""restore_tokens: every token in its place, in a loop by hand, and the gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mae_kernels import restore_tokens


def by_hand(visible, ids_restore, mask_token, pos, prefix):
    """One token at a time; differentiable, in the inputs' dtype."""
    keep = visible.shape[1] - prefix
    rows = []
    for b, restore in enumerate(ids_restore.tolist()):
        tokens = [visible[b, j] for j in range(prefix)]
        tokens += [visible[b, prefix + r] if r < keep else mask_token for r in restore]
        rows.append(torch.stack([t + p for t, p in zip(tokens, pos, strict=True)]))
    return torch.stack(rows)


def make(batch, patches, keep, prefix, width, device, dtypes=(torch.float32,) * 3):
    visible = torch.randn(batch, prefix + keep, width, device=device).to(dtypes[0])
    ids = torch.stack([torch.randperm(patches) for _ in range(batch)]).to(device)
    mask_token = torch.randn(width, device=device).to(dtypes[1])
    pos = torch.randn(prefix + patches, width, device=device).to(dtypes[2])
    return visible, ids, mask_token, pos


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("batch", "patches", "keep", "prefix", "width"),
    [(2, 12, 3, 1, 24), (3, 7, 7, 0, 10), (1, 49, 1, 2, 33), (2, 9, 0, 1, 16), (5, 1, 1, 0, 192)],
)
@pytest.mark.parametrize("half", [False, True])
def test_restore_tokens_equals_a_loop(
    batch, patches, keep, prefix, width, half, device, close: Callable[..., None]
) -> None:
    dtypes = (torch.float16, torch.float32, torch.float32) if half else (torch.float32,) * 3
    visible, ids, mask_token, pos = make(batch, patches, keep, prefix, width, device, dtypes)
    upstream = torch.randn(batch, prefix + patches, width, device=device)

    def run(op, dtype=None):
        leaves = [
            (t if dtype is None else t.to(dtype)).detach().requires_grad_()
            for t in (visible, mask_token, pos)
        ]
        out = op(leaves[0], ids, leaves[1], leaves[2], prefix)
        return [
            out.detach(),
            *torch.autograd.grad(out, leaves, upstream.to(out.dtype), materialize_grads=True),
        ]

    got = run(lambda v, i, m, p, prefix: restore_tokens(v, i, m, p, prefix=prefix))
    again = run(lambda v, i, m, p, prefix: restore_tokens(v, i, m, p, prefix=prefix))
    close(got, run(by_hand, torch.float64), run(by_hand), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.kernel
def test_restore_tokens_of_views_with_nan_around_them(device: torch.device) -> None:
    visible, ids, mask_token, pos = make(2, 6, 2, 1, 8, device)
    wide = torch.full((2, 5, 20), float("nan"), device=device)
    wide[:, 1:4, 3:11] = visible
    around = torch.full((6, 2), 99, device=device).repeat(1, 1)[None].repeat(2, 1, 1)
    around[:, :, 0] = ids
    view, strided_ids = wide[:, 1:4, 3:11].requires_grad_(), around[:, :, 0]
    mask_token.requires_grad_()
    out = restore_tokens(view, strided_ids, mask_token[None, None], pos[None], prefix=1)
    assert torch.equal(out, by_hand(visible, ids, mask_token, pos, 1))
    gv, gm = torch.autograd.grad(out.sum(), (view, mask_token))
    assert torch.equal(gv, torch.ones_like(gv))
    assert torch.equal(gm, torch.full_like(gm, 8.0))


@pytest.mark.kernel
def test_restore_tokens_of_no_images(device: torch.device) -> None:
    visible, _, mask_token, pos = make(1, 6, 2, 1, 8, device)
    mask_token.requires_grad_()
    out = restore_tokens(
        visible[:0], torch.zeros(0, 6, dtype=torch.int64, device=device), mask_token, pos, prefix=1
    )
    out.sum().backward()
    assert out.shape == (0, 7, 8)
    assert torch.equal(mask_token.grad, torch.zeros(8, device=device))


def test_restore_tokens_under_autocast_keeps_the_widest_dtype() -> None:
    visible, ids, mask_token, pos = make(
        2, 5, 2, 1, 4, "cpu", (torch.bfloat16, torch.float32, torch.float32)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = restore_tokens(visible, ids, mask_token, pos, prefix=1)
    assert out.dtype == torch.float32
    assert torch.equal(out, by_hand(visible, ids, mask_token, pos, 1))
    assert (
        restore_tokens(visible, ids, mask_token.bfloat16(), pos.bfloat16(), prefix=1).dtype
        == torch.bfloat16
    )


IDS = torch.arange(6).expand(2, 6)
GOOD = {
    "visible": torch.zeros(2, 3, 8),
    "ids_restore": IDS,
    "mask_token": torch.zeros(8),
    "pos_embed": torch.zeros(7, 8),
    "prefix": 1,
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"visible": torch.zeros(2, 3, 8).int()}, TypeError, "visible: got dtype torch.int32"),
        ({"visible": torch.zeros(3, 8)}, ValueError, r"visible: got shape \(3, 8\), needs"),
        ({"ids_restore": IDS[:1]}, ValueError, r"ids_restore: got shape \(1, 6\)"),
        ({"ids_restore": IDS + 1}, ValueError, "ids_restore: got ids from 1 to 6, needs .* 0 to 5"),
        ({"ids_restore": None}, TypeError, "ids_restore: got NoneType, needs a torch.Tensor"),
        ({"mask_token": torch.zeros(7)}, ValueError, r"mask_token: got .*\[D\] = \(8\)"),
        ({"pos_embed": torch.zeros(6, 8)}, ValueError, r"pos_embed: got .*\[p\+L, D\] = \(7, 8\)"),
        ({"prefix": 4}, ValueError, "visible: got 3 tokens, needs between prefix = 4"),
        ({"prefix": -1}, ValueError, "prefix: got -1, needs at least 0"),
    ],
)
def test_restore_tokens_names_a_bad_argument(change, error, text: str) -> None:
    with pytest.raises(error, match=text):
        restore_tokens(**{**GOOD, **change})
