"""masked_reconstruction_loss and linear_reconstruction_loss against loops in float64 and
facebookresearch/mae's formula.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mae_kernels import (
    backend,
    linear_reconstruction_loss,
    masked_reconstruction_loss,
    random_masking,
)
from mae_kernels.linear_reconstruction import CHUNKS
from tests.kernels.calls import assert_equals_reference, run

MEAN, STD = [0.4, 0.5, 0.6, 0.1], [0.2, 0.3, 0.25, 1.5]


def by_hand(pred, images, ids, patch, norm, eps=1e-6, mean=None, std=None, dtype=torch.float64):
    """One patch at a time, by slicing; var by its definition with n - 1; differentiable in pred."""
    columns, channels = images.shape[3] // patch, images.shape[1]
    x = images.to(dtype) / (255 if images.dtype == torch.uint8 else 1)
    if mean is not None:
        x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(channels)], 1)
    total = torch.zeros((), dtype=dtype, device=pred.device)
    for b, row in enumerate(ids.tolist()):
        for m, i in enumerate(row):
            top, left = i // columns * patch, i % columns * patch
            # row, column, channel
            t = x[b, :, top : top + patch, left : left + patch].permute(1, 2, 0)
            if norm is not None:
                dims = (0, 1, 2) if norm == "patch" else (0, 1)
                n = patch * patch * (channels if norm == "patch" else 1)
                centre = t.sum(dims, keepdim=True) / n
                variance = ((t - centre) ** 2).sum(dims, keepdim=True) / (n - 1)
                if norm == "channel_std":
                    t = (t - centre) / (variance**0.5 + eps)
                else:
                    t = (t - centre) / (variance + eps) ** 0.5
            total = total + ((pred[b, m].to(dtype) - t.reshape(-1)) ** 2).mean()
    return total / max(ids.numel(), 1)


def make(
    batch, channels, height, width, patch, masked, image_dtype, pred_dtype, device, layout="nchw"
):
    images = torch.randint(0, 256, (batch, channels, height, width), device=device)
    images = images.byte() if image_dtype == torch.uint8 else (images / 100 - 1).to(image_dtype)
    if layout == "nhwc":
        images = images.to(memory_format=torch.channels_last)
    if layout == "expanded":
        images = images[:1].expand_as(images)
    patches = height // patch * (width // patch)
    with backend("reference"):
        masking = random_masking(torch.rand(batch, patches, device=device), patches - masked)
    pred = torch.randn(batch, masked, channels * patch * patch, device=device).to(pred_dtype)
    return pred, images, masking


CASES = [  # B, C, H, W, P, M, norm, image dtype, pred dtype, layout
    (2, 3, 16, 24, 8, 4, "patch", torch.uint8, torch.float32, "nchw"),
    (2, 3, 16, 24, 8, 4, "channel", torch.uint8, torch.float16, "nhwc"),
    (1, 3, 32, 32, 16, 3, "patch", torch.float32, torch.float16, "nhwc"),
    (3, 1, 28, 14, 14, 1, "patch", torch.uint8, torch.float32, "nchw"),
    (2, 1, 10, 15, 5, 5, "channel", torch.float16, torch.float32, "expanded"),
    (2, 4, 12, 12, 6, 2, None, torch.uint8, torch.float32, "nhwc"),
    (2, 4, 12, 12, 6, 2, "channel", torch.float32, torch.float16, "nchw"),
    (2, 3, 12, 12, 6, 2, "channel_std", torch.float32, torch.float32, "nchw"),
]


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaled", [False, True])
def test_masked_reconstruction_loss_equals_a_loop(case, scaled, device) -> None:
    *sizes, norm, image_dtype, pred_dtype, layout = case
    pred, images, masking = make(*sizes, image_dtype, pred_dtype, device, layout)
    ids, patch, channels = masking.ids_masked, sizes[4], sizes[1]
    stats = (MEAN[:channels], STD[:channels]) if scaled else (None, None)
    options = {"patch_size": patch, "norm": norm, "mean": stats[0], "std": stats[1]}
    if norm == "channel_std":
        # as large as the deviation, so that its place counts
        options["eps"] = 0.5

    def ours(p):
        return masked_reconstruction_loss(p, images, ids=ids, **options)

    def loop(p):
        dtype = torch.promote_types(p.dtype, torch.float32)
        return by_hand(p, images, ids, patch, norm, options.get("eps", 1e-6), *stats, dtype)

    got = assert_equals_reference(ours, loop, [pred])
    assert got[0].dtype == torch.float32


@pytest.mark.kernel
@pytest.mark.parametrize("norm", ["patch", None])
def test_mask_equals_ids_and_ignores_visible_predictions(norm, device) -> None:
    pred, images, masking = make(2, 3, 16, 24, 8, 4, torch.uint8, torch.float32, device)
    rows = masking.ids_masked[..., None].expand(-1, -1, 192)
    # the visible rows hold infinities: they must not matter
    full = torch.full((2, 6, 192), float("inf"), device=device).scatter(1, rows, pred)
    options = {"patch_size": 8, "norm": norm}
    ids, mask = {"ids": masking.ids_masked}, {"mask": masking.mask}
    by_ids = run(lambda p: masked_reconstruction_loss(p, images, **ids, **options), [pred])
    by_mask = run(lambda p: masked_reconstruction_loss(p, images, **mask, **options), [full])
    torch.testing.assert_close(by_ids[0], by_mask[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(by_mask[1].gather(1, rows), by_ids[1])
    assert (by_mask[1][~masking.mask] == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("select", ["ids", "mask", "weights"])
def test_weights_and_losses_of_patches_equal_loops(select, device) -> None:
    """sum(w * loss) / sum(w), and w * loss of each patch, with gradients to pred and weights."""
    pred, images, masking = make(2, 3, 16, 24, 8, 4, torch.uint8, torch.float32, device)
    weights = torch.rand(2, 4, device=device) - 0.2
    weights[0, 1] = 0
    upstream = torch.randn(2, 4, device=device)
    ids, rows = masking.ids_masked, masking.ids_masked[..., None].expand(-1, -1, 192)

    def losses(p, w, reduction):
        options = {"patch_size": 8, "reduction": reduction}
        if select == "ids":
            return masked_reconstruction_loss(p, images, ids=ids, weights=w, **options)
        full = p.new_zeros(2, 6, 192).scatter(1, rows, p)
        # a visible patch has another weight than 0 only where the mask excludes it
        w = w.new_full((2, 6), float(select == "mask")).scatter(1, ids, w)
        options["mask"] = masking.mask if select == "mask" else None
        out = masked_reconstruction_loss(full, images, weights=w, **options)
        return out if reduction == "mean" else out.gather(1, ids)

    def patches(p):
        pairs = [(b, m) for b in range(2) for m in range(4)]
        one = [by_hand(p[b : b + 1, m : m + 1], images[b : b + 1], ids[b : b + 1, m : m + 1], 8,
                       "patch", dtype=torch.float64) for b, m in pairs]  # fmt: skip
        return torch.stack(one).view(2, 4)

    mean = run(lambda p, w: losses(p, w, "mean"), [pred, weights])
    none = run(lambda p, w: (losses(p, w, "none") * upstream).sum(), [pred, weights])
    by_loop = run(lambda p, w: (patches(p) * w).sum() / w.sum(), [pred, weights])
    each = run(lambda p, w: (patches(p) * w * upstream).sum(), [pred, weights])
    for got, want in zip((*mean, *none), (*by_loop, *each), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("select", ["ids", "mask"])
def test_losses_of_valid_pixels_equal_loops(loss, select) -> None:
    """The last patch of the first image has no valid pixel: its loss is 0, and it counts."""
    pred, images, masking = make(2, 3, 16, 24, 8, 4, torch.float32, torch.float32, "cpu")
    ids, valid = masking.ids_masked, torch.rand(2, 1, 16, 24) < 0.7
    row, column = divmod(int(ids[0, 3]), 3)
    valid[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = False
    forms = {
        "mse": lambda d: d**2,
        "l1": lambda d: d.abs(),
        "smooth_l1": lambda d: torch.where(d.abs() < 1, 0.5 * d**2, d.abs() - 0.5),
    }

    def loop(p):
        total = 0.0
        for b in range(2):
            for m in range(4):
                row, column = divmod(int(ids[b, m]), 3)
                place = (slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8))
                t = images[b][:, place[0], place[1]].double().permute(1, 2, 0)
                t = (t - t.mean()) / (t.var() + 1e-6).sqrt()
                d = (p[b, m].double() - t.flatten()).view(64, 3)
                kept = forms[loss](d[valid[b, 0][place].flatten()])
                total = total + (kept.mean() if kept.numel() else 0)
        return total / 8

    def ours(p):
        options = {"patch_size": 8, "loss": loss, "valid": valid}
        if select == "ids":
            return masked_reconstruction_loss(p, images, ids=ids, **options)
        rows = ids[..., None].expand(-1, -1, 192)
        full = p.new_full((2, 6, 192), 7.0).scatter(1, rows, p)
        return masked_reconstruction_loss(full, images, mask=masking.mask, **options)

    for got, want in zip(run(ours, [pred]), run(loop, [pred]), strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-6)
    refused = pytest.raises(RuntimeError, match=r"the tensors are on the CPU|its kernels comp")
    with backend("triton"), refused:
        masked_reconstruction_loss(pred, images, ids=ids, patch_size=8, loss="l1", valid=valid)


@pytest.mark.kernel
@pytest.mark.parametrize("norm", ["patch", None])
def test_targets_that_are_patches_equal_images(norm, device) -> None:
    pred, images, masking = make(2, 3, 16, 24, 8, 4, torch.float32, torch.float32, device)
    x = images.reshape(2, 3, 2, 8, 3, 8)
    targets = torch.einsum("nchpwq->nhwpqc", x).reshape(2, 6, 192)
    ids = masking.ids_masked
    ours = run(lambda p: masked_reconstruction_loss(p, targets, ids=ids, norm=norm), [pred])
    want = run(lambda p: by_hand(p, images, ids, 8, norm), [pred])
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.kernel
def test_channels_more_than_two_to_the_31_elements_apart(device) -> None:
    """As of a crop of a set stored channel by channel. On the CPU the memory between is never
    touched.
    """
    pred, images, masking = make(1, 3, 8, 12, 4, 3, torch.uint8, torch.float32, device)
    apart = 2**30 + 7
    if device.type == "cpu":
        memory = torch.from_numpy(np.empty(2 * apart + 8 * 12, dtype=np.uint8))
    else:
        memory = torch.empty(2 * apart + 8 * 12, dtype=torch.uint8, device=device)
    far = memory.as_strided(images.shape, (0, apart, 12, 1))
    far.copy_(images)
    options = {"ids": masking.ids_masked, "patch_size": 4, "mean": MEAN[:3], "std": STD[:3]}
    results = [
        run(lambda p, x=x: masked_reconstruction_loss(p, x, **options), [pred])
        for x in (far, images)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.kernel
def test_masked_reconstruction_loss_of_nothing_is_zero(device) -> None:
    images = torch.zeros(2, 1, 8, 8, device=device)
    ids = torch.zeros(2, 0, dtype=torch.int64, device=device)
    mask = torch.zeros(2, 4, dtype=torch.bool, device=device)
    for length, listed in ((0, {"ids": ids}), (4, {"mask": mask})):
        pred = torch.ones(2, length, 16, device=device)
        loss, gradient = run(
            lambda p, o=listed: masked_reconstruction_loss(p, images, patch_size=4, **o), [pred]
        )
        assert loss.item() == 0
        assert not gradient.any()


@pytest.mark.kernel
def test_masked_reconstruction_loss_of_a_flat_patch_stays_finite(device) -> None:
    """A constant patch has variance 0: eps inside the root keeps the target at 0."""
    pred, ids = torch.ones(1, 4, 16, device=device), torch.arange(4, device=device)[None]
    images = torch.full((1, 1, 8, 8), 0.25, device=device)
    assert masked_reconstruction_loss(pred, images, ids=ids, patch_size=4).item() == 1.0


def test_masked_reconstruction_loss_is_facebookresearch_formula() -> None:
    """patchify einsum, norm_pix_loss and masked mean written as the public formula, on all
    patches with a float mask.
    """
    _, images, masking = make(2, 3, 32, 48, 16, 4, torch.float32, torch.float32, "cpu")
    full = torch.randn(2, 6, 768)
    x = images.reshape(2, 3, 2, 16, 3, 16)
    target = torch.einsum("nchpwq->nhwpqc", x).reshape(2, 6, 768)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = masking.mask.float()
    want = (((full - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    got = masked_reconstruction_loss(full, images, mask=masking.mask, patch_size=16)
    torch.testing.assert_close(got, want)


@pytest.mark.kernel
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("batch", [5, 11])
def test_linear_reconstruction_loss_equals_the_head_then_the_loss(with_bias, batch, device) -> None:
    _, images, masking = make(batch, 3, 16, 24, 8, 4, torch.uint8, torch.float32, device)
    leaves = [torch.randn(batch, 4, 20, device=device), torch.randn(192, 20, device=device) / 4]
    leaves += [torch.randn(192, device=device)] * with_bias
    ids = masking.ids_masked

    def ours(h, w, b=None):
        return linear_reconstruction_loss(h, w, b, images, ids, patch_size=8)

    def separate(h, w, b=None):
        pred = h @ w.t() + (0 if b is None else b)
        return by_hand(pred, images, ids, 8, "patch", dtype=h.dtype)

    assert_equals_reference(ours, separate, leaves, atol=2e-6)


@pytest.mark.parametrize("batch", [2, 19])
def test_linear_reconstruction_loss_adds_the_bias_inside_the_products(batch: int) -> None:
    """One matrix product per part for the predictions, and two for the gradients."""
    images, ids = torch.rand(batch, 3, 32, 32), torch.arange(16).expand(batch, 16)
    shapes = ((batch, 16, 20), (192, 20), (192,))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with backend("registered"), torch.autograd.profiler.profile() as profile:
        linear_reconstruction_loss(*leaves, images, ids, patch_size=8).backward()
    names = [event.name for event in profile.function_events or ()]
    counts = {op: names.count(f"aten::{op}") for op in ("addmm", "mm", "bmm")}
    assert counts == {"addmm": CHUNKS, "mm": 2 * CHUNKS, "bmm": 0}


PRED = torch.zeros(2, 3, 48)
IDS = torch.arange(3).expand(2, 3)
MASK = torch.ones(2, 4, dtype=torch.bool)
GOOD = {"pred": PRED, "images": torch.zeros(2, 3, 8, 8), "ids": IDS, "patch_size": 4}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ids": None}, ValueError, "ids, mask: got neither, needs exactly one"),
        ({"mask": MASK}, ValueError, "ids, mask: got both"),
        ({"ids": None, "mask": MASK}, ValueError, r"needs \[B, L, P\*P\*C\] = \(2, 4, 48\)"),
        ({"ids": None, "mask": MASK.float()}, TypeError, r"mask: got .* torch.bool .*bool\(\)"),
        ({"pred": PRED[..., 1:]}, ValueError, "pred: got shape"),
        ({"pred": PRED.long()}, TypeError, "pred: got dtype torch.int64"),
        ({"ids": IDS + 2}, ValueError, "ids: got ids from 2 to 4, needs ids from 0 to 3"),
        ({"norm": "pixel"}, ValueError, "norm: got 'pixel', needs one of 'patch', 'channel'"),
        ({"reduction": "sum"}, ValueError, "reduction: got 'sum', needs one of 'mean', 'none'"),
        ({"weights": torch.ones(2, 4)}, ValueError, r"weights: got shape \(2, 4\), needs \[B, M\]"),
        ({"images": torch.zeros(2, 4, 48)}, ValueError, "patch_size: got 4, needs None for targ"),
        ({"eps": 0}, ValueError, "eps: got 0, needs a positive number"),
        ({"patch_size": 1, "norm": "channel"}, ValueError, "norm: got 'channel' over 1 value"),
    ],
)
def test_masked_reconstruction_loss_names_a_bad_argument(change, error, text: str) -> None:
    with pytest.raises(error, match=text):
        masked_reconstruction_loss(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.zeros(48, 47)}, r"weight: got .*needs \[P\*P\*C, D\] = \(48, 48\)"),
        ({"hidden": PRED[:, :2]}, r"hidden: got shape \(2, 2, 48\)"),
        ({"bias": torch.zeros(3)}, r"bias: got shape \(3,\)"),
    ],
)
def test_linear_reconstruction_loss_names_a_bad_argument(change, text: str) -> None:
    good = {"hidden": PRED, "weight": torch.zeros(48, 48), "bias": None, **GOOD}
    del good["pred"]
    with pytest.raises(ValueError, match=text):
        linear_reconstruction_loss(**{**good, **change})
