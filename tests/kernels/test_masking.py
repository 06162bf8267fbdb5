"""random_masking: the same choice as argsort(argsort), ties by index, on every backend."""

from __future__ import annotations

import pytest
import torch

from mae_kernels import masking_from, random_masking


def by_hand(noise: torch.Tensor, keep: int) -> tuple[list[list[int]], ...]:
    """Python's sort is stable; torch's is not used."""
    shuffle = [sorted(range(len(row)), key=lambda i: row[i]) for row in noise.tolist()]
    restore = [[s.index(i) for i in range(len(s))] for s in shuffle]
    return (
        [s[:keep] for s in shuffle],
        restore,
        [s[keep:] for s in shuffle],
        [[r >= keep for r in x] for x in restore],
    )


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("batch", "patches", "keep"),
    [(3, 12, 3), (2, 49, 49), (1, 130, 1), (0, 16, 4), (2, 1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_masking_equals_a_stable_sort_by_hand(
    batch: int, patches: int, keep: int, dtype: torch.dtype, device: torch.device
) -> None:
    noise = torch.rand(batch, patches, device=device).to(dtype)
    got = random_masking(noise, keep)
    want = by_hand(noise, keep)
    for name, g, w in zip(got._fields, got, want, strict=True):
        assert g.tolist() == w, name
    assert [t.dtype for t in got] == [torch.int64] * 3 + [torch.bool]
    assert got.ids_masked.shape == (batch, patches - keep)


@pytest.mark.kernel
def test_random_masking_keeps_index_order_of_ties_zeros_and_infinities(device) -> None:
    inf = float("inf")
    noise = torch.tensor([[0.0, -0.0, 1.0, 0.0, inf, -inf, 1.0, -2.5, -0.0]], device=device)
    assert random_masking(noise, 4).ids_keep.tolist() == [[5, 7, 0, 1]]
    assert random_masking(noise, 4).ids_masked.tolist() == [[3, 8, 2, 6, 4]]


@pytest.mark.kernel
def test_random_masking_sorts_nan_last(device: torch.device) -> None:
    noise = torch.tensor([[float("nan"), 3.0, float("inf"), -1.0]], device=device)
    noise = torch.cat([noise, -noise[:, :1]], 1)
    assert random_masking(noise, 3).ids_keep.tolist() == [[3, 1, 2]]


NOISE = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("noise", "keep", "error", "text"),
    [
        (NOISE.long(), 1, TypeError, "noise: got dtype torch.int64, needs a floating"),
        (NOISE[0], 1, ValueError, r"noise: got shape \(4,\), needs \[B, L\]"),
        (NOISE, 0, ValueError, "num_keep: got 0, needs at least 1"),
        (NOISE, 5, ValueError, "num_keep: got 5, needs at most the number of patches L = 4"),
        (NOISE, 1.0, TypeError, "num_keep: got float, needs an int"),
        ([[0.0]], 1, TypeError, "noise: got list, needs a torch.Tensor"),
    ],
)
def test_random_masking_names_a_bad_argument(noise, keep, error, text: str) -> None:
    with pytest.raises(error, match=text):
        random_masking(noise, keep)


def test_masking_from_a_mask_lists_its_patches_in_order() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    masking = masking_from(mask, 2)
    assert masking.ids_keep.tolist() == [[1, 4], [0, 1]]
    assert masking.ids_masked.tolist() == [[0, 2, 3], [2, 3, 4]]
    assert masking.ids_restore.tolist() == [[2, 0, 3, 4, 1], [0, 1, 2, 3, 4]]
    assert torch.equal(masking.mask, mask)
    with pytest.raises(ValueError, match=r"mask: got rows with \[2\] visible .* num_keep = 3 in"):
        masking_from(mask, 3)
    with pytest.raises(TypeError, match=r"mask: got dtype torch\.float32, needs"):
        masking_from(mask.float(), 2)
