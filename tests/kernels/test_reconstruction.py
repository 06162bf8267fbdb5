"""masked_reconstruction_loss and linear_reconstruction_loss against loops in float64 and facebookresearch/mae's formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mae_kernels import (
    backend,
    linear_reconstruction_loss,
    masked_reconstruction_loss,
    random_masking,
)

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
            t = x[b, :, top : top + patch, left : left + patch].permute(
                1, 2, 0
            )  # row, column, channel
            if norm is not None:
                dims = (0, 1, 2) if norm == "patch" else (0, 1)
                n = patch * patch * (channels if norm == "patch" else 1)
                centre = t.sum(dims, keepdim=True) / n
                variance = ((t - centre) ** 2).sum(dims, keepdim=True) / (n - 1)
                t = (t - centre) / (variance + eps) ** 0.5
            total = total + ((pred[b, m].to(dtype) - t.reshape(-1)) ** 2).mean()
    return total / max(ids.numel(), 1)


def make(
    batch, channels, height, width, patch, masked, image_dtype, pred_dtype, device, layout="nchw"
):
    images = torch.randint(0, 256, (batch, channels, height, width), device=device)
    images = (
        images.to(torch.uint8) if image_dtype == torch.uint8 else (images / 100 - 1).to(image_dtype)
    )
    if layout == "nhwc":
        images = images.to(memory_format=torch.channels_last)
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
    (2, 1, 10, 15, 5, 5, "channel", torch.float16, torch.float32, "nchw"),
    (2, 4, 12, 12, 6, 2, None, torch.uint8, torch.float32, "nhwc"),
    (2, 4, 12, 12, 6, 2, "channel", torch.float32, torch.float16, "nchw"),
]


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_a_loop(case, scaled, device, close: Callable[..., None]) -> None:
    *sizes, norm, image_dtype, pred_dtype, layout = case
    pred, images, masking = make(*sizes, image_dtype, pred_dtype, device, layout)
    patch, channels = sizes[4], sizes[1]
    mean, std = (MEAN[:channels], STD[:channels]) if scaled else (None, None)
    before = pred.clone(), images.clone()

    def run(op):
        leaf = pred.detach().clone().requires_grad_()
        loss = op(leaf)
        return [loss.detach(), torch.autograd.grad(loss * 3, leaf)[0]]

    got = run(
        lambda p: masked_reconstruction_loss(
            p, images, ids=masking.ids_masked, patch_size=patch, norm=norm, mean=mean, std=std
        )
    )
    exact = run(lambda p: by_hand(p, images, masking.ids_masked, patch, norm, 1e-6, mean, std))
    eager = run(
        lambda p: by_hand(
            p, images, masking.ids_masked, patch, norm, 1e-6, mean, std, torch.float32
        )
    )
    assert got[0].dtype == torch.float32
    assert got[0].shape == ()
    close(got, exact, eager, atol=1e-6)
    assert torch.equal(before[0], pred)
    assert torch.equal(before[1], images)


@pytest.mark.kernel
@pytest.mark.parametrize("norm", ["patch", None])
def test_mask_equals_ids_and_ignores_visible_predictions(norm, device) -> None:
    pred, images, masking = make(2, 3, 16, 24, 8, 4, torch.uint8, torch.float32, device)
    full = torch.full(
        (2, 6, 192), float("inf"), device=device
    )  # visible rows hold infinities: they must not matter
    full.scatter_(1, masking.ids_masked[..., None].expand(-1, -1, 192), pred)
    full.requires_grad_()
    pred.requires_grad_()
    by_ids = masked_reconstruction_loss(
        pred, images, ids=masking.ids_masked, patch_size=8, norm=norm
    )
    by_mask = masked_reconstruction_loss(full, images, mask=masking.mask, patch_size=8, norm=norm)
    torch.testing.assert_close(by_ids, by_mask, rtol=1e-6, atol=0)
    (g_ids,) = torch.autograd.grad(by_ids, pred)
    (g_mask,) = torch.autograd.grad(by_mask, full)
    torch.testing.assert_close(
        g_mask.gather(1, masking.ids_masked[..., None].expand(-1, -1, 192)), g_ids
    )
    assert (g_mask[~masking.mask] == 0).all()


@pytest.mark.kernel
def test_strided_predictions_expanded_images_and_reruns(device) -> None:
    pred, images, masking = make(3, 1, 16, 16, 8, 2, torch.float32, torch.float32, device)
    images = images[:1].expand(3, -1, -1, -1)
    wide = torch.full((3, 2, 70), float("nan"), device=device)
    wide[..., 3:67] = pred
    view = wide[..., 3:67].requires_grad_()
    runs = []
    for p in (view, view, pred.requires_grad_()):
        loss = masked_reconstruction_loss(p, images, ids=masking.ids_masked, patch_size=8)
        runs.append(
            (
                loss,
                torch.autograd.grad(loss, p, retain_graph=True)[0],
                torch.autograd.grad(2 * loss, p)[0],
            )
        )
    for loss, once, twice in runs:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(once, runs[0][1])
        assert torch.equal(twice, 2 * once)


@pytest.mark.kernel
def test_channels_more_than_two_to_the_31_elements_apart(device) -> None:
    """As of a crop of a set stored channel by channel. On the CPU the memory between is never touched."""
    pred, images, masking = make(1, 3, 8, 12, 4, 3, torch.uint8, torch.float32, device)
    apart = 2**30 + 7
    if device.type == "cpu":
        memory = torch.from_numpy(np.empty(2 * apart + 8 * 12, dtype=np.uint8))
    else:
        memory = torch.empty(2 * apart + 8 * 12, dtype=torch.uint8, device=device)
    far = memory.as_strided(images.shape, (0, apart, 12, 1))
    far.copy_(images)
    options = {"ids": masking.ids_masked, "patch_size": 4, "mean": MEAN[:3], "std": STD[:3]}
    pred.requires_grad_()

    def run(pixels: torch.Tensor) -> list[torch.Tensor]:
        loss = masked_reconstruction_loss(pred, pixels, **options)
        return [loss.detach(), *torch.autograd.grad(loss, pred)]

    for got, want in zip(run(far), run(images), strict=True):
        assert torch.equal(got, want)


@pytest.mark.kernel
def test_nothing_masked_is_zero(device) -> None:
    for shape in ((0, 1, 8, 8), (2, 1, 8, 8)):
        none = torch.zeros(shape[0], 0, dtype=torch.int64, device=device)
        pred = torch.zeros(shape[0], 0, 16, device=device, requires_grad=True)
        loss = masked_reconstruction_loss(
            pred, torch.zeros(shape, device=device), ids=none, patch_size=4
        )
        loss.backward()
        assert loss.item() == 0
        assert pred.grad.shape == pred.shape
    full = torch.ones(2, 4, 16, device=device, requires_grad=True)
    mask = torch.zeros(2, 4, dtype=torch.bool, device=device)
    loss = masked_reconstruction_loss(
        full, torch.zeros(2, 1, 8, 8, device=device), mask=mask, patch_size=4
    )
    loss.backward()
    assert loss.item() == 0
    assert (full.grad == 0).all()


@pytest.mark.kernel
def test_flat_patch_stays_finite(device) -> None:
    """A constant patch has variance 0: eps inside the root keeps the target at 0."""
    pred = torch.ones(1, 4, 16, device=device)
    ids = torch.arange(4, device=device)[None]
    loss = masked_reconstruction_loss(
        pred, torch.full((1, 1, 8, 8), 0.25, device=device), ids=ids, patch_size=4
    )
    assert loss.item() == 1.0


def test_facebookresearch_formula() -> None:
    """patchify einsum, norm_pix_loss and masked mean written as the public formula, on all patches with a float mask."""
    _, images, masking = make(2, 3, 32, 48, 16, 4, torch.float32, torch.float32, "cpu")
    full = torch.randn(2, 6, 768)
    x = images.reshape(2, 3, 2, 16, 3, 16)
    target = torch.einsum("nchpwq->nhwpqc", x).reshape(2, 6, 768)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = masking.mask.float()
    want = (((full - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(
        masked_reconstruction_loss(full, images, mask=masking.mask, patch_size=16), want
    )


@pytest.mark.parametrize("norm", ["patch", "channel", None])
def test_gradcheck(norm) -> None:
    pred, images, masking = make(2, 3, 4, 6, 2, 3, torch.float64, torch.float64, "cpu")
    hidden, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (12, 4), (12,))
    )
    pred.requires_grad_()
    for name in ("auto", "reference"):
        with backend(name):
            assert torch.autograd.gradcheck(
                lambda p: masked_reconstruction_loss(
                    p, images, ids=masking.ids_masked, patch_size=2, norm=norm
                ),
                pred,
            )
            assert torch.autograd.gradcheck(
                lambda h, w, b: linear_reconstruction_loss(
                    h, w, b, images, masking.ids_masked, patch_size=2, norm=norm, std=0.5
                ),
                (hidden, weight, bias),
            )


@pytest.mark.kernel
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equals_the_head_then_the_loss(
    with_bias, device, close: Callable[..., None]
) -> None:
    _, images, masking = make(5, 3, 16, 24, 8, 4, torch.uint8, torch.float32, device)
    hidden = torch.randn(5, 4, 20, device=device)
    weight = torch.randn(192, 20, device=device) / 4
    bias = torch.randn(192, device=device) if with_bias else None

    def run(op, dtype):
        leaves = [
            t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias) if t is not None
        ]
        loss = op(*leaves, *([] if with_bias else [None]))
        return [loss.detach(), *torch.autograd.grad(loss * 2, leaves)]

    def separate(h, w, b):
        return by_hand(
            h @ w.t() + (0 if b is None else b),
            images,
            masking.ids_masked,
            8,
            "patch",
            dtype=h.dtype,
        )

    got = run(
        lambda h, w, b: linear_reconstruction_loss(
            h, w, b, images, masking.ids_masked, patch_size=8
        ),
        torch.float32,
    )
    close(got, run(separate, torch.float64), run(separate, torch.float32), atol=2e-6)


def test_linear_under_autocast_multiplies_in_bf16_and_returns_full_gradients() -> None:
    _, images, masking = make(2, 1, 16, 24, 8, 4, torch.uint8, torch.float32, "cpu")
    hidden = torch.randn(2, 4, 20, requires_grad=True)
    weight = torch.randn(64, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_reconstruction_loss(
            hidden, weight, None, images, masking.ids_masked, patch_size=8
        )
    loss.backward()
    rounded = hidden.detach().bfloat16().double() @ weight.detach().bfloat16().double().t()
    want = by_hand(rounded, images, masking.ids_masked, 8, "patch").item()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - want) < 5e-3 * want
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


PRED = torch.zeros(2, 3, 48)
IMG = torch.zeros(2, 3, 8, 8)
IDS = torch.arange(3).expand(2, 3)
MASK = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: masked_reconstruction_loss(PRED, IMG, patch_size=4),
            ValueError,
            "ids, mask: got neither, needs exactly one",
        ),
        (
            lambda: masked_reconstruction_loss(PRED, IMG, ids=IDS, mask=MASK, patch_size=4),
            ValueError,
            "ids, mask: got both",
        ),
        (
            lambda: masked_reconstruction_loss(PRED, IMG, mask=MASK, patch_size=4),
            ValueError,
            r"pred: got shape \(2, 3, 48\), needs \[B, L, P\*P\*C\] = \(2, 4, 48\)",
        ),
        (
            lambda: masked_reconstruction_loss(PRED[..., 1:], IMG, ids=IDS, patch_size=4),
            ValueError,
            "pred: got shape",
        ),
        (
            lambda: masked_reconstruction_loss(PRED, IMG, mask=MASK.float(), patch_size=4),
            TypeError,
            r"mask: got dtype torch.float32, needs torch.bool .*mask.bool\(\)",
        ),
        (
            lambda: masked_reconstruction_loss(PRED.long(), IMG, ids=IDS, patch_size=4),
            TypeError,
            "pred: got dtype torch.int64",
        ),
        (
            lambda: masked_reconstruction_loss(PRED, IMG, ids=IDS + 2, patch_size=4),
            ValueError,
            "ids: got ids from 2 to 4, needs ids from 0 to 3",
        ),
        (
            lambda: masked_reconstruction_loss(PRED, IMG, ids=IDS, patch_size=4, norm="pixel"),
            ValueError,
            "norm: got 'pixel', needs one of 'patch', 'channel', None",
        ),
        (
            lambda: masked_reconstruction_loss(PRED, IMG, ids=IDS, patch_size=4, eps=0),
            ValueError,
            "eps: got 0, needs a positive number",
        ),
        (
            lambda: masked_reconstruction_loss(
                PRED[..., :3], IMG, ids=IDS, patch_size=1, norm="channel"
            ),
            ValueError,
            "norm: got 'channel' over 1 value",
        ),
        (
            lambda: linear_reconstruction_loss(
                PRED, torch.zeros(48, 47), None, IMG, IDS, patch_size=4
            ),
            ValueError,
            r"weight: got shape \(48, 47\), needs \[P\*P\*C, D\] = \(48, 48\)",
        ),
        (
            lambda: linear_reconstruction_loss(
                PRED[:, :2], torch.zeros(48, 48), None, IMG, IDS, patch_size=4
            ),
            ValueError,
            r"hidden: got shape \(2, 2, 48\)",
        ),
        (
            lambda: linear_reconstruction_loss(
                PRED, torch.zeros(48, 48), torch.zeros(3), IMG, IDS, patch_size=4
            ),
            ValueError,
            r"bias: got shape \(3,\)",
        ),
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
