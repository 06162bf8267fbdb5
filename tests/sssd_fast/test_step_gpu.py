"""The step on a CUDA device: it never waits, gives the same losses compiled and captured, and needs
no more memory than expected. Few blocks of real width, so that every kernel runs at its real size.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sssd_fast.config import Config, load_config
from sssd_fast.finetune import FinetuneTask
from sssd_fast.loaders import Batch
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, parameter_groups
from sssd_fast.performance.execution import compiled, configure_model
from sssd_fast.performance.fake import random_inputs
from sssd_fast.run.device import World
from sssd_fast.step import Step, TaskLoss

pytestmark = pytest.mark.gpu

SMALL = ["model.depth=2", "model.decoder_depth=2"]
SMALL += ["objective.prototypes=512", "objective.head_hidden=256"]
BATCH, STEPS = 32, 20
PRECISIONS = ["fp32", "fp16", "bf16"]


@pytest.fixture
def cuda() -> torch.device:
    torch._dynamo.reset()
    return torch.device("cuda")


def _loss(module: nn.Module, batch: list[Tensor], step: int, micro: int) -> TaskLoss:
    out = module(*batch)
    return TaskLoss(out.total, {"reconstruction": out.losses["reconstruction"]}, out.batch_center)


def _train(
    config: Config,
    precision: str,
    device: torch.device,
    *,
    accumulate: int = 1,
    steps: int = STEPS,
    watch: bool = False,
    last: AbstractContextManager[None] | None = None,
) -> Tensor:
    """Losses of `steps` steps; `watch`: after the first two, a wait for the device is an error.
    The last step runs in the context `last`.
    """
    torch.manual_seed(0)
    model = SSSD(config.model, config.objective).to(device)
    batches = [
        [random_inputs(config, "pretrain", BATCH, device) for _ in range(accumulate)]
        for _ in range(steps)
    ]
    execution = configure_model(model, config, precision, device, BATCH)
    module = compiled(model, config.step, graphs=execution.graphs) if execution.compiled else model
    groups = parameter_groups(model, weight_decay=0.05)
    step = Step(
        module,
        build_optimizer(groups, (0.9, 0.95), config.step.optimizer),
        _loss,
        world=World(device),
        precision=precision,
        clip_grad=1.0,
        update_state=model.update_center,
        graphs=execution.graphs,
    )
    losses = []
    for i, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if watch and i >= 2 else "default")
        try:
            with last if last is not None and i == steps - 1 else nullcontext():
                losses.append(step(batch, i, 1e-4 * (i + 1)).losses["loss"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return torch.stack(losses).cpu()


def _same(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether the error is at most twice that of the plain step in the same precision."""
    largest = 2e-3 * exact.abs().max()
    return bool((found - exact).abs().max() <= 2 * (plain - exact).abs().max() + largest)


def _config(*settings: str) -> Config:
    return load_config(None, [*SMALL, *settings])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compile_it", ["true", "false"])
def test_step_never_waits_for_the_device_on_a_gpu(
    cuda: torch.device, precision: str, compile_it: str
) -> None:
    config = _config(f"step.compile={compile_it}", "step.cuda_graphs=false")
    _train(config, precision, cuda, accumulate=2, steps=5, watch=True)


def test_fine_tuning_loss_never_waits_for_the_device(cuda: torch.device) -> None:
    mixing = ["finetune.mixup=0.8", "finetune.cutmix=1.0", "finetune.random_erasing=0.5"]
    config = _config(*mixing)
    task = FinetuneTask.__new__(FinetuneTask)  # the loss alone: no run folder, no data
    task.settings = config.finetune
    task.num_classes = 2
    task.class_weights = torch.ones(2, device=cuda)
    task.run = type("Run", (), {"world": World(cuda), "config": config})()
    model = Classifier(config.model, 2, drop_path=0.1).to(cuda)
    images = torch.randint(0, 256, (8, 1, 224, 224), dtype=torch.uint8, device=cuda)
    labels = torch.zeros(8, dtype=torch.int64, device=cuda)
    batch = Batch(images, labels, labels, 8)
    task.loss(model, batch, 0, 0).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 8):  # with mixup, cutmix and erasing
            task.loss(model, batch, i, 0).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graphs", ["true", "false"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled_and_captured_steps_give_the_same_losses(
    cuda: torch.device, precision: str, graphs: str, accumulate: int
) -> None:
    options: dict[str, Any] = {"device": cuda, "accumulate": accumulate}
    exact = _train(_config("step.compile=false"), "fp32", **options)
    plain = _train(_config("step.compile=false"), precision, **options)
    settings = ["step.compile=true", f"step.cuda_graphs={graphs}"]
    fast = _train(_config(*settings), precision, **options)
    assert exact[-1] < exact[0]
    assert _same(fast, plain, exact)


@pytest.mark.parametrize("provider", ["fused", "sdpa", "eager"])
@pytest.mark.parametrize("mlp", ["fused", "plain"])
def test_attention_providers_give_the_same_losses(
    cuda: torch.device, provider: str, mlp: str
) -> None:
    def losses(provider: str, mlp: str, precision: str) -> Tensor:
        settings = {"attention": provider, "decoder_attention": provider, "mlp": mlp}
        words = [f"step.{name}={value}" for name, value in settings.items()]
        return _train(_config("step.compile=false", *words), precision, cuda)

    exact, plain = (losses("eager", "plain", precision) for precision in ("fp32", "bf16"))
    assert _same(losses(provider, mlp, "bf16"), plain, exact)


@pytest.mark.parametrize(
    "setting", ["step.checkpoint=selective", "step.checkpoint=full", "step.activation_budget=0.5"]
)
def test_recomputation_needs_less_memory_and_gives_the_same_losses(
    cuda: torch.device, setting: str
) -> None:
    base = "step.compile=false" if "checkpoint" in setting else "step.compile=true"
    losses, peaks = [], []
    for settings in ([base], [base, setting]):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.append(_train(_config(*settings, "step.cuda_graphs=false"), "bf16", cuda))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=5e-3)


def test_adamw8bit_gives_the_same_losses(cuda: torch.device) -> None:
    exact = _train(_config("step.compile=false"), "fp32", cuda)
    small = _train(_config("step.compile=false", "step.optimizer=adamw8bit"), "fp32", cuda)
    torch.testing.assert_close(small, exact, rtol=2e-2, atol=2e-2)


def test_compiled_and_plain_steps_exchange_optimizer_states(cuda: torch.device) -> None:
    """The optimizer's state dict can be exchanged in both directions on the device too."""
    config = _config()
    model = SSSD(config.model, config.objective).to(cuda)
    twin = copy.deepcopy(model)
    groups, others = (parameter_groups(m, weight_decay=0.05) for m in (model, twin))
    ours = build_optimizer(groups, (0.9, 0.95))
    theirs = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
    theirs.step()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    state = ours.state_dict()["state"]
    assert state.keys() == theirs.state_dict()["state"].keys()
    assert all(value["step"].is_cuda for value in state.values())
