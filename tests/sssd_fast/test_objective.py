"""The SSSD loss against a float64 computation that stores everything, and the centre's rules."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sssd_fast.config import load_config
from sssd_fast.objective import SSSD, ProjectionHead

SIZES = "image_size=[32,48] patch_size=8 width=24 depth=2 heads=2"
DECODER = "decoder_width=16 decoder_depth=1 decoder_heads=2"
SMALL = [f"model.{size}" for size in f"{SIZES} {DECODER}".split()]
SMALL += ["objective.head_hidden=20", "objective.head_bottleneck=12", "objective.prototypes=30"]


def _build(*overrides: str, channels: int = 1) -> tuple[SSSD, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    form = ["objective.name=published", f"model.in_channels={channels}"]
    config = load_config(None, [*SMALL, *form, *overrides])
    module = SSSD(config.model, config.objective)
    images = torch.randint(0, 256, (3, channels, 32, 48), dtype=torch.uint8)
    return module, images, torch.rand(3, 24)


def _head(head: ProjectionHead, x: torch.Tensor) -> torch.Tensor:
    """Logits of every token in float64, stored at full size: [B, K, S]."""
    for layer, last in ((head.fc1, False), (head.fc2, False), (head.fc3, True)):
        x = x @ layer.weight.double().T + layer.bias.double()
        x = x if last else F.gelu(x)
    x = x / x.norm(dim=-1, keepdim=True)
    if head.prototypes is None:
        return x
    w = head.prototypes.double()
    return x @ (w / w.norm(dim=1, keepdim=True)).T


def _reference(module: SSSD, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything after the transformer, by the formulas of SD-MAE, image by image."""
    cfg, mae = module.objective, module.mae
    out = mae(images, noise)
    P, C = 8, images.shape[1]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mae.encoder.mean, mae.encoder.std))
    x = (images.double() / 255 - mean) / std
    losses = []
    for b in range(len(images)):
        for row, patch in enumerate(out.masking.ids_masked[b].tolist()):
            r, c = divmod(patch, 6)
            pixels = x[b, :, r * P : (r + 1) * P, c * P : (c + 1) * P]
            target = pixels.permute(1, 2, 0).reshape(-1, C)  # (row, col), channel
            if cfg.norm == "patch":
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            elif cfg.norm == "channel":
                target = (target - target.mean(0)) / (target.var(0, unbiased=True) + 1e-6).sqrt()
            losses.append((out.pred_BMV[b, row].double() - target.flatten()).square().mean())
    reconstruction = torch.stack(losses).mean()
    student, teacher = out.student_BKD.double(), out.teacher_BKE.double()
    teacher = teacher if cfg.stop_gradient == "none" else teacher.detach()
    if cfg.heads == "both":
        s = _head(module.student_head, student)  # type: ignore[arg-type]
        t = _head(module.teacher_head, teacher)  # type: ignore[arg-type]
    else:
        fc1, fc2 = module.student_head.fc1, module.student_head.fc2  # type: ignore[union-attr]
        hidden = F.gelu(student @ fc1.weight.double().T + fc1.bias)
        s = hidden @ fc2.weight.double().T + fc2.bias
        rows = teacher.flatten(0, 1)
        t = (teacher - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()
    s, t = (s.mean(1), t.mean(1)) if cfg.pooling == "image" else (s.flatten(0, 1), t.flatten(0, 1))
    t_loss = t.detach() if cfg.stop_gradient == "teacher" else t
    center = None
    if cfg.kind == "dino":
        if cfg.center == "sinkhorn":
            scores = (t.detach() / cfg.teacher_temp).exp()
            columns = torch.ones(t.shape[1], dtype=torch.float64)
            assigned = scores
            for _ in range(3):
                columns = columns / assigned.sum(0)
                assigned = scores * columns
                assigned = assigned / assigned.sum(1, keepdim=True)
            # the column scales are constants of the loss
            p = (t_loss / cfg.teacher_temp).exp() * columns
            p = p / p.sum(1, keepdim=True)
        else:
            p = ((t_loss - module.center.double()) / cfg.teacher_temp).softmax(-1)
            center = (p if cfg.center == "prob" else t).mean(0).detach()
        log_q = (s / cfg.student_temp).log_softmax(-1)
        distillation = -(p * log_q).sum(-1).mean()
    elif cfg.kind == "cosine":
        distillation = (1 - (s * t_loss).sum(-1) / (s.norm(dim=-1) * t_loss.norm(dim=-1))).mean()
    elif cfg.kind == "mse":
        distillation = (s - t_loss).square().mean()
    else:
        d = (s - t_loss).abs()
        distillation = torch.where(d < 1, 0.5 * d * d, d - 0.5).mean()
    total = cfg.weight * distillation + (1 - cfg.weight) * reconstruction
    losses = {"reconstruction": reconstruction, "distillation": distillation}
    return {"total": total, **losses, "center": center}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("channels", "overrides"),
    [
        (1, []),
        (3, ["objective.norm=channel", "objective.weight=0.5"]),
        (3, ["objective.norm=none", "objective.pooling=token"]),
        (1, ["objective.center=logit", "objective.stop_gradient=teacher"]),
        (1, ["objective.name=centred"]),
        (1, ["objective.name=sinkhorn"]),
        (1, ["objective.name=predictor"]),
        (1, ["objective.name=sinkhorn", "objective.pooling=image", "objective.weight=0.5"]),
        (1, ["objective.kind=cosine"]),
        (1, ["objective.kind=mse", "objective.pooling=token"]),
        (
            1,
            [
                "objective.kind=smooth_l1",
                "objective.stop_gradient=teacher",
                "model.cls_token=false",
            ],
        ),
    ],
)
def test_sssd_loss_and_gradients_equal_the_formula(channels: int, overrides: list[str]) -> None:
    module, images, noise = _build(*overrides, channels=channels)
    module.center.uniform_(-0.1, 0.1)
    out = module(images, noise)
    want = _reference(module, images, noise)
    for name in ("total", "reconstruction", "distillation"):
        got = {"total": out.total, **out.losses}[name].double()
        torch.testing.assert_close(got, want[name], rtol=2e-5, atol=1e-6)
    if want["center"] is None:
        assert out.batch_center is None
    else:
        torch.testing.assert_close(out.batch_center.double(), want["center"], rtol=1e-4, atol=1e-6)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(out.total, [*parameters.values()], allow_unused=True)
    expected = torch.autograd.grad(want["total"], [*parameters.values()], allow_unused=True)
    for name, g, e in zip(parameters, got, expected, strict=True):
        assert (g is None) == (e is None), name
        if g is not None and e is not None:
            error = float((g.double() - e.double()).norm() / e.double().norm().clamp_min(1e-6))
            assert error < 1e-3, (name, error)


def test_evaluation_returns_what_the_distillation_compares() -> None:
    module, images, noise = _build("objective.name=centred")
    assert module(images, noise).compared is None
    student, teacher, assigned = module.eval()(images, noise).compared
    assert student.shape == teacher.shape == (3 * 6, 30)
    want = ((teacher - module.center) / 0.04).softmax(-1)
    torch.testing.assert_close(assigned, want)


def test_weight_zero_has_no_heads_and_only_the_reconstruction_loss() -> None:
    module, images, noise = _build("objective.weight=0")
    assert not [name for name, _ in module.named_parameters() if "head" in name]
    out = module(images, noise)
    assert float(out.total.detach()) == float(out.losses["reconstruction"])
    assert float(out.losses["distillation"]) == 0.0
    assert out.batch_center is None


def test_centre_moves_by_its_momentum_and_is_saved() -> None:
    module, images, noise = _build("objective.center_momentum=0.75")
    before = module.center.clone()
    batch = module(images, noise).batch_center
    assert batch is not None
    module.update_center(batch, torch.tensor(True))
    after = module.center.clone()
    torch.testing.assert_close(after, 0.75 * before + 0.25 * batch)
    module.update_center(batch * float("nan"), torch.tensor(False))
    assert torch.equal(module.center, after)
    assert "center" in module.state_dict()  # missing in SD-MAE's released code
