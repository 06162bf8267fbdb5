"""restore_tokens: every token in its place, in a loop by hand, and the gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mae_kernels import backend, restore_tokens


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
def test_equals_a_loop(
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
def test_views_with_nan_around_them_and_an_expanded_gradient(device: torch.device) -> None:
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
def test_no_images(device: torch.device) -> None:
    visible, _, mask_token, pos = make(1, 6, 2, 1, 8, device)
    mask_token.requires_grad_()
    out = restore_tokens(
        visible[:0], torch.zeros(0, 6, dtype=torch.int64, device=device), mask_token, pos, prefix=1
    )
    out.sum().backward()
    assert out.shape == (0, 7, 8)
    assert torch.equal(mask_token.grad, torch.zeros(8, device=device))


def test_gradcheck() -> None:
    visible, ids, mask_token, pos = make(2, 5, 2, 1, 3, "cpu", (torch.float64,) * 3)
    leaves = [t.requires_grad_() for t in (visible, mask_token, pos)]
    for name in ("auto", "reference"):
        with backend(name):
            assert torch.autograd.gradcheck(
                lambda v, m, p: restore_tokens(v, ids, m, p, prefix=1), leaves
            )


def test_autocast_keeps_the_widest_dtype() -> None:
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


V = torch.zeros(2, 3, 8)
IDS = torch.arange(6).expand(2, 6)
M = torch.zeros(8)
POS = torch.zeros(7, 8)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: restore_tokens(V.int(), IDS, M, POS, prefix=1),
            TypeError,
            "visible: got dtype torch.int32",
        ),
        (
            lambda: restore_tokens(V[0], IDS, M, POS, prefix=1),
            ValueError,
            r"visible: got shape \(3, 8\), needs",
        ),
        (
            lambda: restore_tokens(V, IDS[:1], M, POS, prefix=1),
            ValueError,
            r"ids_restore: got shape \(1, 6\)",
        ),
        (
            lambda: restore_tokens(V, IDS + 1, M, POS, prefix=1),
            ValueError,
            "ids_restore: got ids from 1 to 6, needs ids from 0 to 5",
        ),
        (
            lambda: restore_tokens(V, IDS, M[:7], POS, prefix=1),
            ValueError,
            r"mask_token: got shape \(7,\), needs \[D\] = \(8\)",
        ),
        (
            lambda: restore_tokens(V, IDS, M, POS[1:], prefix=1),
            ValueError,
            r"pos_embed: got shape \(6, 8\), needs \[p\+L, D\] = \(7, 8\)",
        ),
        (
            lambda: restore_tokens(V, IDS, M, POS, prefix=4),
            ValueError,
            "visible: got 3 tokens, needs between prefix = 4",
        ),
        (
            lambda: restore_tokens(V, IDS, M, POS, prefix=-1),
            ValueError,
            "prefix: got -1, needs at least 0",
        ),
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
