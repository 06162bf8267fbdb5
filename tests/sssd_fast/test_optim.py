"""Learning rates and parameter groups, against the published formulas computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sssd_fast.config import load_config
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, layer_of, lr_at, parameter_groups, scaled_lr, set_lr

TINY = ["model.depth=3", "model.image_size=32", "model.width=24", "model.decoder_width=24"]


def test_lr_scales_with_the_effective_batch() -> None:
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)  # MAE: 1.5e-4 * 4096 / 256


def test_lr_is_linear_warm_up_then_half_a_cosine() -> None:
    at = lambda step: lr_at(step, total_steps=110, warmup_steps=10, peak=1.0, minimum=0.1)  # noqa: E731
    assert [at(0), at(4), at(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert at(10) == pytest.approx(1.0)
    assert at(60) == pytest.approx(0.55)  # the middle of the cosine
    assert at(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert at(110) == pytest.approx(0.1)
    rates = [at(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_layer_decay_follows_depth() -> None:
    config = load_config("cpu_smoke", TINY)
    model = Classifier(config.model, 2)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5, depth=3)
    scale = {name: g["lr_scale"] for g in groups for name in g["names"]}
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.cls_token"] == 0.5**4
    assert [scale[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scale["fc_norm.weight"] == scale["head.weight"] == 1.0
    assert layer_of("encoder.blocks.11.attn.qkv.weight", 12) == 12
    assert layer_of("encoder.norm.weight", 12) == 13


def test_weight_decay_excludes_biases_norms_and_tokens() -> None:
    config = load_config("cpu_smoke", TINY)
    model = SSSD(config.model, config.objective)
    groups = parameter_groups(model, weight_decay=0.05)
    decay = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert decay["mae.encoder.blocks.0.mlp.fc1.weight"] == decay["student_head.fc1.weight"] == 0.05
    for name in (
        "mae.encoder.cls_token",
        "mae.decoder.mask_token",
        "mae.encoder.blocks.0.norm1.weight",
        "mae.decoder.pred.bias",
    ):
        assert decay[name] == 0.0
    assert "mae.encoder.pos_embed" not in decay  # fixed positions are no parameters of pre-training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == trained


def test_set_lr_scales_each_group() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    bias = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        [
            {"params": [weight], "lr_scale": 1.0, "weight_decay": 0.0},
            {"params": [bias], "lr_scale": 0.25, "weight_decay": 0.0},
        ],
        (0.9, 0.95),
    )
    set_lr(optimizer, 0.2)
    for p in (weight, bias):
        p.grad = torch.ones(2)
    optimizer.step()
    # the first Adam step moves by the learning rate against the gradient's sign
    assert weight.detach().tolist() == pytest.approx([0.8, 0.8])
    assert bias.detach().tolist() == pytest.approx([0.95, 0.95])
