"""restore_tokens: every token in its place, in a loop by hand, and the gradients."""

from __future__ import annotations

import sys

import pytest
import torch

from mae_kernels import restore_tokens
from tests.kernels.calls import assert_equals_reference


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
def test_restore_tokens_equals_a_loop(batch, patches, keep, prefix, width, half, device) -> None:
    dtypes = (torch.float16 if half else torch.float32, torch.float32, torch.float32)
    visible, ids, mask_token, pos = make(batch, patches, keep, prefix, width, device, dtypes)
    upstream = torch.randn(batch, prefix + patches, width, device=device)

    def ours(v, m, p):
        return restore_tokens(v, ids, m, p, prefix=prefix)

    def loop(v, m, p):
        return by_hand(v, ids, m, p, prefix)

    assert_equals_reference(ours, loop, (visible, mask_token, pos), upstream)


@pytest.mark.kernel
@pytest.mark.parametrize("positions", ["none", "per image"])
def test_restore_tokens_without_positions_or_with_those_of_each_image(positions, device) -> None:
    visible, ids, mask_token, _ = make(2, 12, 3, 1, 24, device)
    pos, upstream = (torch.randn(2, 13, 24, device=device) for _ in range(2))

    def ours(v, m, p):
        given = None if positions == "none" else p
        return restore_tokens(v, ids, m, given, prefix=1) + 0 * p.sum()

    def loop(v, m, p):
        own = p * (positions != "none")
        return torch.cat([by_hand(v[b : b + 1], ids[b : b + 1], m, own[b], 1) for b in range(2)])

    assert_equals_reference(ours, loop, (visible, mask_token, pos), upstream)


@pytest.mark.kernel
def test_restore_tokens_in_several_steps_of_each_program(device, monkeypatch) -> None:
    # the function hides its module
    monkeypatch.setattr(sys.modules["mae_kernels.restore"], "BACKWARD_PROGRAMS", 2)
    test_restore_tokens_equals_a_loop(3, 12, 3, 1, 512, False, device)


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
