"""Estimates on fake tensors against real runs, formulas written by hand and real optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import mae_kernels
from sssd_fast.config import Config, load_config
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.optim import FusedAdamW, build_optimizer, clipped_update, parameter_groups
from sssd_fast.performance.estimate import Estimate, LiveBytes, estimate, optimizer_bytes
from sssd_fast.performance.execution import attention_choices, set_execution
from sssd_fast.performance.fake import FakeStep, make_model, random_inputs, standard_flops
from sssd_fast.run.device import AUTOCAST, autocast

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = "image_size=[56,40] patch_size=8 width=40 heads=5 decoder_heads=1 in_channels=3"
ODD = [f"model.{size}" for size in [*SIZES.split(), "cls_token=false", "mlp_ratio=2.7"]]
CASES = {
    "plain MAE": ["objective.weight=0"],
    "odd shapes": ODD,
    "cosine per token": ["objective.kind=cosine", "objective.pooling=token"],
    "detached teacher": ["objective.stop_gradient=teacher"],
    "eager attention": ["step.attention=eager", "step.decoder_attention=eager"],
}


def config_of(tiny: list[str], *settings: str) -> Config:
    return load_config(None, [*tiny, *settings])


def built(config: Config, task: str) -> tuple[SSSD | Classifier, list[Tensor]]:
    """The real model on the CPU with three images."""
    return make_model(config, task, 2), random_inputs(config, task, 3, CPU)


def loss_of(module: nn.Module, inputs: list[Tensor], precision: str) -> Tensor:
    with autocast(precision, CPU):
        out = module(*inputs)
        if isinstance(module, SSSD):
            total: Tensor = out.total
            return total
        return -out.float().log_softmax(1).mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "task"),
    [
        *((case, "pretrain") for case in CASES),
        ("odd shapes", "finetune"),
        ("eager attention", "finetune"),
    ],
)
def test_estimate_equals_what_a_real_run_saves_and_allocates(
    tiny: list[str], case: str, task: str, precision: str
) -> None:
    """Saved tensors are collected by autograd's own hooks, which know nothing of LiveBytes."""
    config = config_of(tiny, *CASES[case])
    found = estimate(config, task, precision, CPU, compiled=False)
    model, inputs = built(config, task)
    dtype = AUTOCAST.get(precision, torch.float32)
    choices = attention_choices(model, config.step, dtype, CPU, compile_it=False)
    providers = [provider for provider, _ in choices]
    set_execution(model, config.step, precision, providers, fused_mlp=False)
    given = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *inputs]}
    saved: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in given:
            saved[storage._cdata] = weakref.ref(storage), storage.nbytes()
        # without the graph, which a detached loss frees
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, inputs, precision)
    expected = sum(size for storage, size in saved.values() if storage() is not None)
    kept = found.kept_constant + 3 * found.kept_per_image
    # alive as well: the loss, its terms and the statistics for the centre
    scalars = 4 * (8 + config.objective.prototypes)
    assert 0 <= kept - expected <= scalars
    del loss
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
        loss_of(model, inputs, precision).backward()
    # A real run keeps the pixel statistics (4 numbers of 8 bytes per channel) in a cache.
    cached = 4 * 8 * config.model.in_channels
    assert max(live.timeline) - found.step_peak(3) in (0, cached)


def test_live_bytes_counts_storages_once_until_they_are_freed() -> None:
    given = torch.ones(100)
    with LiveBytes([given]) as live:
        a = given + 1
        view = a[10:]
        b = a * 2
        del a
        assert live.alive == 800  # the view keeps the storage
        del view
        assert live.alive == 400
        given.add_(b)
    assert max(live.timeline) == 800


def test_a_block_on_a_gpu_keeps_what_the_formula_says(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more block of a classifier: N tokens, width D, MLP 4 D, H heads; bf16, fp32 residual,
    fused MLP.

    LayerNorm keeps its fp32 input and two numbers a row, matrix products their bf16 inputs, the MLP
    h alone, sdpa the log-sum-exp. Up to 64 tokens the fused attention keeps nothing but qkv and the
    output.
    """

    def block(*settings: str, precision: str = "bf16", compiled: bool = False) -> float:
        found = []
        for depth in (2, 3):
            config = config_of(tiny, f"model.depth={depth}", "finetune.drop_path=0", *settings)
            found.append(estimate(config, "finetune", precision, GPU, compiled=compiled))
        return found[1].kept_per_image - found[0].kept_per_image

    N, D, H = 17, 32, 2
    norms = 2 * N * (4 * D + 8)
    products = 2 * N * (D + 3 * D + D + D + 4 * D)
    lse = 4 * N * H
    assert block("step.attention=sdpa") == norms + products + lse
    plain = block("step.attention=sdpa", "step.mlp=plain")
    assert plain == norms + products + lse + 2 * N * 4 * D  # and gelu(h)
    narrow = block("step.attention=sdpa", "step.residual=bf16", compiled=True)
    assert narrow == 2 * N * (2 * D + 4) + products + lse
    fp32 = block("step.attention=sdpa", "step.mlp=plain", precision="fp32")
    assert fp32 == norms + 2 * products + lse + 4 * N * 4 * D
    scores = 2 * N * N * H + 4 * N * N * H  # bf16 and fp32 probabilities
    assert block("step.attention=eager") == norms + products + scores
    assert block("step.attention=sdpa", "step.checkpoint=full") == 4 * N * D
    monkeypatch.setattr(mae_kernels, "info", lambda: {"attention": None})
    assert block("step.attention=fused") == norms + products


def test_fixed_bytes_are_those_of_a_real_step(tiny: list[str]) -> None:
    """The head of a detached teacher gets no gradient and no optimizer state."""
    config = config_of(tiny, *ODD, "objective.stop_gradient=teacher")
    model, inputs = built(config, "pretrain")
    loss_of(model, inputs, "fp32").backward()
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05), (0.9, 0.95), "adamw")
    assert isinstance(optimizer, FusedAdamW)
    clipped_update(optimizer.filled_groups(), None, [])
    found = estimate(config, "pretrain", "fp32", CPU, compiled=False)
    assert found.parameters == state_bytes(model.state_dict())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.optimizer == state_bytes(dict(optimizer.state))
    assert found.fixed == found.parameters + found.gradients + found.optimizer
    assert 3 * found.input_per_image == sum(t.nbytes for t in inputs)


def state_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(state_bytes(v) for v in value.values())
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        return sum(state_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes if isinstance(value, Tensor) else 0


def test_optimizer_bytes_of_8bit_moments_are_those_of_torchao(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torchao")
    # 6144 values: 8 bit; 4128, not a multiple of 256: fp32
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 43))
    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = build_optimizer(groups, (0.9, 0.95), "adamw8bit")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    # the state is the same without waiting for the compiler
    monkeypatch.setattr(torch, "compile", lambda update, **_: update)
    optimizer.step()
    found = {p.numel(): state_bytes(dict(optimizer.state[p])) for p in model.parameters()}
    assert found == {n: optimizer_bytes(n, "adamw8bit") for n in found}
    assert found[6144] < found[4128]


def test_peak_adds_batch_gradients_and_copies() -> None:
    found = Estimate(
        parameters=1000,
        gradients=400,
        trained=(100,),
        optimizer_name="adamw",
        input_per_image=10,
        kept_constant=0,
        kept_per_image=50,
        timeline_constant_T=torch.tensor([0.0, 500.0]),
        timeline_per_image_T=torch.tensor([60.0, 10.0]),
    )
    rest = 1000 + 4 + 2 * 4 * 100
    assert [found.step_peak(n) for n in (1, 10, 20)] == [510, 600, 1200]
    assert found.peak(10) == rest + 10 * 10 + 600
    assert found.peak(10, accumulate=3) == rest + 3 * 10 * 10 + 400 + 600
    assert found.peak(10, gradient_copies=1) == rest + 10 * 10 + 400 + 600
    small = replace(found, optimizer_name="adamw8bit", trained=(6144,))
    assert small.optimizer == 4 + 2 * (6144 + 4 * 24 + 4 * 256)


# ---- FLOPs ---------------------------------------------------------------------------------------


def test_standard_flops_are_the_published_numbers() -> None:
    config = load_config(None, ["model.name=base", "model.in_channels=3"])
    assert standard_flops(config) / 1e9 == pytest.approx(58.1, rel=2e-3)


def products(shapes: Iterable[tuple[int, int, int]]) -> int:
    """FLOPs of forward and backward of [rows, fan_in] @ [fan_in, fan_out]."""
    return sum(3 * 2 * rows * fan_in * fan_out for rows, fan_in, fan_out in shapes)


def test_flops_are_those_of_the_matrix_products(tiny: list[str]) -> None:
    """A classifier of two blocks: 17 tokens of width 32, after the last attention the 16 patches
    only."""
    attention = [(17, 32, 96), (17, 32, 32)] * 2
    scores = 2 * 2 * products([(17, 16, 17)]) * 2  # q k^T and P v, two heads, two blocks
    mlp = [(17, 32, 128), (17, 128, 32), (16, 32, 128), (16, 128, 32)]
    patches = 2 * 2 * 16 * 64 * 32  # the images need no gradient
    head = [(1, 32, 2)]
    expected = products([*attention, *mlp, *head]) + scores + patches
    assert FakeStep(config_of(tiny, "finetune.drop_path=0"), "finetune").flops() == expected
