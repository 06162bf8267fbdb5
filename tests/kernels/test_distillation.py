"""distillation_loss and sssd_loss: the written formula, both gradients, the centre."""

from __future__ import annotations

import functools

import pytest
import torch

from mae_kernels import (
    _loss_kernels,
    backend,
    distillation_loss,
    masked_reconstruction_loss,
    sinkhorn_center,
    sssd_loss,
)
from tests.kernels.calls import assert_close, assert_equals_reference, run


def by_hand(student, teacher, kind, center=None, ts=0.1, tt=0.04):
    """Row by row, from exp and log; returns (loss, mean of P, mean of the teacher)."""
    width = student.shape[-1]
    s, t = student.reshape(-1, width), teacher.reshape(-1, width)
    rows, losses, probs = max(len(s), 1), [], []
    for a, b in zip(s, t, strict=True):
        if kind == "dino":
            z = (b - (0 if center is None else center)) / tt
            p = (z - z.max().detach()).exp()
            p = p / p.sum()
            y = a / ts - (a / ts).max().detach()
            losses.append(-(p * (y - y.exp().sum().log())).sum())
            probs.append(p.detach())
        elif kind == "cosine":
            losses.append(1 - (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())
        elif kind == "mse":
            losses.append(((a - b) ** 2).sum() / width)
        else:
            d = (a - b).abs()
            losses.append(sum(0.5 * x * x if x < 1 else x - 0.5 for x in d) / width)
    loss = sum(losses, start=(student.sum() + teacher.sum()) * 0) / rows
    mean_p = torch.stack(probs).sum(0) / rows if probs else None
    return loss, mean_p, t.detach().sum(0) / rows


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(4, 37), (2, 3, 64), (1, 1000), (19,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("centred", "mode"), [(True, "prob"), (False, "prob"), (True, "logit")])
def test_dino_equals_a_loop(shape, dtype, centred, mode, device) -> None:
    student, teacher = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    center = torch.randn(shape[-1], device=device) if centred else None

    options = {"center_mode": mode, "student_temp": 0.2, "teacher_temp": 0.07}

    def ours(s, t):
        return distillation_loss(s, t, center=center, **options)

    def loop(s, t):
        s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, t))
        c = None if center is None else center.to(s.dtype)
        loss, mean_p, mean_t = by_hand(s, t, "dino", c, 0.2, 0.07)
        return loss, mean_p if mode == "prob" else mean_t

    # logits / temperature reach 50, where one fp32 rounding is 4e-6: the relative error of P and Q
    got = assert_equals_reference(ours, loop, (student, teacher), atol=1e-5)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert not ours(student.requires_grad_(), teacher)[1].requires_grad


@pytest.mark.kernel
def test_dino_with_several_rows_of_each_program(device, monkeypatch) -> None:
    monkeypatch.setattr(_loss_kernels, "FORWARD_GROUPS", 2)
    test_dino_equals_a_loop((5, 37), torch.float32, True, "logit", device)


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_other_kinds_equal_a_loop(kind) -> None:
    student, teacher = (torch.randn(2, 3, 12, dtype=torch.float64) for _ in range(2))
    got = run(lambda s, t: distillation_loss(s * 2, t, kind=kind), (student, teacher))
    # no statistic
    torch.testing.assert_close(
        got, run(lambda s, t: by_hand(s * 2, t, kind)[0], (student, teacher))
    )


@pytest.mark.kernel
def test_detach_teacher_stops_only_its_gradient(device) -> None:
    student, teacher = (torch.randn(3, 24, device=device, requires_grad=True) for _ in range(2))
    free, _ = distillation_loss(student, teacher)
    held, _ = distillation_loss(student, teacher, detach_teacher=True)
    assert torch.equal(free, held)
    of_free = torch.autograd.grad(free, (student, teacher))
    of_held = torch.autograd.grad(held, (student, teacher), allow_unused=True)
    assert torch.equal(of_free[0], of_held[0])
    assert of_held[1] is None and of_free[1].abs().sum() > 0


def test_sinkhorn_center_gives_the_assignment_of_sinkhorn_knopp() -> None:
    teacher = torch.randn(3, 4, 9, dtype=torch.float64)
    rows = teacher.reshape(12, 9)
    p = (rows / 0.3).exp()
    for _ in range(3):
        p = p / p.sum(0)
        p = p / p.sum(1, keepdim=True)
    center = sinkhorn_center(teacher, 0.3)
    torch.testing.assert_close(((rows - center) / 0.3).softmax(-1), p)
    # the mean of P that distillation_loss returns
    _, mean_p = distillation_loss(teacher, teacher, center=center, teacher_temp=0.3)
    torch.testing.assert_close(mean_p, p.mean(0))
    # equal use of all columns in the limit
    many = sinkhorn_center(teacher, 0.3, iterations=200)
    used = ((rows - many) / 0.3).softmax(-1).sum(0)
    torch.testing.assert_close(used, torch.full((9,), 12 / 9, dtype=torch.float64))


def test_sinkhorn_center_of_two_processes_is_that_of_all_rows() -> None:
    """The sums of the other process are added by `reduce`, iteration by iteration."""
    teacher = torch.randn(10, 6, dtype=torch.float64)
    halves = teacher[:7], teacher[7:]
    sums: list[list[torch.Tensor]] = [[], []]

    def record(half: int):
        def reduce(x: torch.Tensor) -> torch.Tensor:
            step = len(sums[half])
            sums[half].append(x)
            other = sums[1 - half]
            return x + other[step] if step < len(other) else x

        return reduce

    # repeated until both have seen the other's sums of every iteration
    for _ in range(4):
        found = []
        for half in (0, 1):
            sums[half] = []
            found.append(sinkhorn_center(halves[half], 0.5, reduce=record(half)))
    for center in found:
        torch.testing.assert_close(center, sinkhorn_center(teacher, 0.5))


@pytest.mark.kernel
def test_distillation_loss_of_large_logits_is_finite(device) -> None:
    student, teacher = (torch.randn(4, 40, device=device) * 1e4 for _ in range(2))
    want = by_hand(student.double(), teacher.double(), "dino")[0]
    torch.testing.assert_close(distillation_loss(student, teacher)[0].double(), want)


@pytest.mark.kernel
@pytest.mark.parametrize("use_mask", [False, True])
def test_sssd_loss_is_the_weighted_sum(use_mask, device) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, device=device)
    ids = torch.tensor([[0, 3, 5], [4, 1, 2]], device=device)
    mask = torch.zeros(2, 6, dtype=torch.bool, device=device).scatter_(1, ids, True)
    pred = torch.randn(2, 6 if use_mask else 3, 48, device=device, requires_grad=True)
    student, teacher = (torch.randn(2, 21, device=device, requires_grad=True) for _ in range(2))
    center = torch.randn(21, device=device)
    which = {"mask": mask} if use_mask else {"ids": ids}
    which |= {"patch_size": 4, "norm": "channel", "std": 0.3}
    out = sssd_loss(pred, images, student, teacher, weight=0.3, center=center, **which)

    def apart(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with backend("reference"):
            rec = masked_reconstruction_loss(pred.to(dtype), images, **which)
            return rec, *distillation_loss(student.to(dtype), teacher.to(dtype), center=center)

    def with_gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        leaves = (pred, student, teacher)
        options = {"retain_graph": True, "materialize_grads": True}
        return [loss.detach(), *torch.autograd.grad(loss, leaves, **options)]

    (rec, dis, statistic) = apart(torch.float64)
    (rec32, dis32, _) = apart(torch.float32)
    for got, want, eager in (
        (out.total, 0.3 * dis + 0.7 * rec, 0.3 * dis32 + 0.7 * rec32),
        (out.reconstruction * 2 + out.distillation, 2 * rec + dis, 2 * rec32 + dis32),
        (out.reconstruction, rec, rec32),
        (out.distillation, dis, dis32),
    ):
        assert_close(*map(with_gradients, (got, want, eager)), atol=2e-6)
    torch.testing.assert_close(out.batch_center.double(), statistic, rtol=1e-5, atol=1e-7)


@pytest.mark.kernel
def test_sssd_loss_adds_up_many_patches_and_rows(device) -> None:
    """More than the kernel that adds up holds at a time."""
    images, mask = torch.rand(4, 1, 96, 96, device=device), torch.rand(4, 2304, device=device) > 0.3
    pred = torch.randn(4, 2304, 4, device=device)
    student, teacher = (torch.randn(300, 21, device=device) for _ in range(2))
    which = {"mask": mask, "patch_size": 2, "norm": None}
    found = sssd_loss(pred, images, student, teacher, **which)
    with backend("reference"):
        wide = (x.double() for x in (pred, images, student, teacher))
        expected = sssd_loss(*wide, **which)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


S = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"teacher": S[:, 1:]}, ValueError, r"teacher: got .* needs the student's .* \(2, 5\)"),
        ({"student": S.int()}, TypeError, "student: got dtype torch.int32"),
        ({"student": S[0, 0]}, ValueError, r"student: got shape \(\), needs \[..., K\]"),
        ({"kind": "kl"}, ValueError, "kind: got 'kl', needs one of 'dino', 'cosine', 'mse', 'smoo"),
        ({"center": torch.zeros(4)}, ValueError, r"center: got shape \(4,\), needs K = 5 numbers"),
        ({"kind": "mse", "center": S[0]}, ValueError, "center: got a tensor with kind 'mse'"),
        ({"teacher_temp": 0.0}, ValueError, "teacher_temp: got 0.0, needs a positive number"),
        ({"center_mode": "mean"}, ValueError, "center_mode: got 'mean', needs one of 'prob', 'log"),
    ],
)
def test_distillation_loss_names_a_bad_argument(change, error, text: str) -> None:
    with pytest.raises(error, match=text):
        distillation_loss(**{"student": S, "teacher": S, **change})


def test_sssd_loss_names_a_bad_weight() -> None:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    call = functools.partial(
        sssd_loss, torch.zeros(2, 1, 16), torch.zeros(2, 1, 4, 4), S, S, ids=ids, patch_size=4
    )
    with pytest.raises(ValueError, match=r"weight: got 1\.5, needs a number between 0"):
        call(weight=1.5)
    with pytest.raises(TypeError, match="weight: got str, needs a Python number"):
        call(weight="0.2")
