"""How a model is computed: what each setting does, that none changes the result, and that what
cannot be done is an error.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sssd_fast.config import Config, load_config
from sssd_fast.errors import ConfigError
from sssd_fast.model import MLP, Blocks, Classifier, pick_patches
from sssd_fast.objective import SSSD
from sssd_fast.performance import ceilings
from sssd_fast.performance import execution as compute
from sssd_fast.performance.execution import configure_model, pick_compile, pick_graphs, pick_mlp
from sssd_fast.performance.fake import FakeStep

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Inputs = tuple[Tensor, ...]


def _config(tiny: list[str], *settings: str) -> Config:
    return load_config(None, [*tiny, *settings])


def _sssd(config: Config) -> tuple[SSSD, Inputs]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    return SSSD(config.model, config.objective), (images, torch.rand(4, config.model.num_patches))


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _gradients(
    module: nn.Module, model: nn.Module, inputs: Inputs, *, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = module(*inputs)
        loss = out.total if isinstance(model, SSSD) else out.float().square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), {name: g.clone() for name, g in grads.items() if g is not None}


# ---- recomputation ----


@pytest.mark.parametrize(
    ("checkpoint", "norms", "products"), [("none", 0, 0), ("selective", 1, 0), ("full", 1, 3)]
)
def test_recomputation_repeats_what_it_says_and_changes_nothing(
    tiny: list[str], checkpoint: str, norms: int, products: int
) -> None:
    config = _config(tiny, f"step.checkpoint={checkpoint}")
    model, inputs = _sssd(config)
    expected_loss, expected = _gradients(model, model, inputs)
    blocks = len(model.mae.encoder.blocks) + len(model.mae.decoder.blocks)
    configure_model(model, config, "fp32", CPU, 4)
    loss, found = _gradients(model, model, inputs)
    torch.testing.assert_close((loss, found), (expected_loss, expected), rtol=0, atol=0)
    loss = model(*inputs).total
    with OpCounter() as counter:
        loss.backward()
    assert counter.calls["aten.native_layer_norm.default"] == 2 * blocks * norms
    # of 4: no gradient needs the result of the last one
    assert counter.calls["aten.addmm.default"] == blocks * products
    forward = {name: n for name, n in counter.calls.items() if "backward" not in name}
    attention = [n for name, n in forward.items() if "scaled_dot_product" in name]
    assert sum(attention) == (blocks if products else 0)


# ---- what is not read is not computed ----


def test_picked_patches_have_the_gradient_of_a_gather() -> None:
    B, L, p, D = 3, 7, 2, 4
    order = torch.stack([torch.randperm(L) for _ in range(B)])
    x = torch.randn(B, p + L, D, dtype=torch.float64, requires_grad=True)
    for picked in (order, order[:, :3], order[:, 3:]):
        first = 0 if picked.shape[1] == L or torch.equal(picked, order[:, :3]) else 3
        rank = order.argsort(1) - first
        rows = torch.arange(B)[:, None]
        assert torch.equal(pick_patches(x, picked, rank), x[rows, p + picked])
        assert torch.autograd.gradcheck(partial(pick_patches, ids_BM=picked, rank_BL=rank), (x,))


def _rows(blocks: Blocks) -> list[int]:
    """Filled with the number of rows of each call of the last MLP."""
    rows: list[int] = []
    blocks[-1].mlp.register_forward_hook(lambda _m, args, out: rows.append(args[0].shape[1]))
    return rows


@pytest.mark.parametrize("cls_token", [True, False])
def test_without_distillation_the_last_mlp_sees_masked_patches_only(
    tiny: list[str], cls_token: bool
) -> None:
    config = _config(tiny, f"model.cls_token={str(cls_token).lower()}")
    model, (images, noise) = _sssd(config)
    rows = _rows(model.mae.decoder.blocks)
    full = model.mae(images, noise)
    alone = model.mae(images, noise, teacher=False)
    masked = config.model.num_patches - config.model.num_visible
    assert rows == [config.model.num_patches, masked]
    assert alone.teacher_BKE is None
    torch.testing.assert_close(alone.pred_BMV, full.pred_BMV)
    everything, masking = model.mae.reconstruct(images, noise)
    at = torch.arange(len(images))[:, None], masking.ids_masked
    torch.testing.assert_close(full.pred_BMV, everything[at])


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_classifiers_last_mlp_sees_pooled_rows_only(tiny: list[str], pool: str) -> None:
    config = _config(tiny)
    torch.manual_seed(0)
    model = Classifier(config.model, 3, pool)
    rows = _rows(model.encoder.blocks)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    features = model.features(images)
    assert rows == [1 if pool == "cls" else config.model.num_patches]
    tokens = model.encoder(images)  # every row
    pooled = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(features, model.fc_norm(pooled))


# ---- one graph with all gradients ----


@pytest.mark.parametrize(
    ("kind", "bf16"),
    [
        ("sssd", False),
        ("sssd", True),
        ("reconstruction only", False),
        ("token pooling", True),
        ("detached teacher", False),
        ("classifier", False),
        ("classifier", True),
    ],
)
def test_the_compiled_module_is_one_graph_with_every_gradient(
    tiny: list[str], kind: str, bf16: bool
) -> None:
    """Mask token, cls token, positions and heads included; the same gradients as without the
    compiler.
    """
    settings = {
        "reconstruction only": ["objective.weight=0"],
        "token pooling": ["objective.pooling=token", "objective.kind=cosine"],
        "detached teacher": ["objective.stop_gradient=teacher"],
    }
    config = _config(tiny, *settings.get(kind, []))
    model: SSSD | Classifier
    model, inputs = _sssd(config)
    if kind == "classifier":
        model, inputs = Classifier(config.model, 2), inputs[:1]
        # starts near zero, where no gradient would reach the encoder
        nn.init.normal_(model.head.weight)
    with torch.no_grad():
        for p in model.parameters():
            # no parameter at a value where its gradient vanishes
            p.add_(0.02 * torch.randn_like(p))
    loss, expected = _gradients(model, model, inputs, bf16=bf16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    found_loss, found = _gradients(compiled, model, inputs, bf16=bf16)  # type: ignore[arg-type]
    # in bf16 the attention rounds at other places under a compiler
    torch.testing.assert_close(found_loss, loss, rtol=1e-3 if bf16 else 1e-5, atol=1e-6)
    if bf16:
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    if kind == "detached teacher":
        wanted = {name for name in wanted if not name.startswith("teacher_head.")}
    assert {name for name, grad in found.items() if grad.abs().max() > 0} == wanted


# ---- residual stream and MLP ----


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_residual_stream_has_the_configured_dtype(tiny: list[str], residual: str) -> None:
    config = _config(tiny, "precision=bf16", f"step.residual={residual}")
    model, inputs = _sssd(config)
    exact, _ = _gradients(model, model, inputs)
    configure_model(model, config, "bf16", CPU, 4)
    dtypes: list[torch.dtype] = []
    for block in [*model.mae.encoder.blocks, *model.mae.decoder.blocks]:
        block.register_forward_hook(lambda _m, x, out: dtypes.extend([x[0].dtype, out.dtype]))
    loss, _ = _gradients(model, model, inputs, bf16=True)
    assert set(dtypes) == {torch.float32 if residual == "fp32" else torch.bfloat16}
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=1e-2)


def test_the_fused_mlp_is_the_plain_one(tiny: list[str]) -> None:
    config = _config(tiny)
    model, inputs = _sssd(config)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, MLP):
            module.fused = True
    loss, expected = _gradients(model, model, inputs)
    found_loss, found = _gradients(twin, twin, inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# ---- decisions ----


def test_auto_compiles_on_a_gpu_with_a_compiler_only(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _config(tiny).step
    monkeypatch.setattr(compute.shutil, "which", lambda name: None)
    assert "C++ compiler" in pick_compile(step, CPU, 1e6)[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(compute.shutil, "which", lambda name: f"/bin/{name}")
    assert pick_compile(step, GPU)[0]
    assert not pick_compile(step, CPU)[0]
    break_even = compute.CPU_COMPILE_S / compute.CPU_SAVING
    assert not pick_compile(step, CPU, 0.99 * break_even)[0]
    compiled, why = pick_compile(step, CPU, 1.01 * break_even)
    assert compiled and "takes about 60 s and saves about 61 s of an expected 606 s" in why
    assert not pick_compile(step.model_copy(update={"checkpoint": "full"}), GPU)[0]
    monkeypatch.setattr(compute.shutil, "which", lambda name: None)
    compiled, why = pick_compile(step, GPU)
    assert not compiled
    assert "C compiler" in why
    assert pick_compile(step.model_copy(update={"compile": True}), CPU)[0]


def test_cuda_graphs_pay_below_a_batch_that_the_rule_computes(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny)
    model, _ = _sssd(config)
    measured = ceilings.Ceilings(1e12, 1e12, "bfloat16")
    monkeypatch.setattr(compute, "measure_ceilings", lambda device, dtype: measured)
    blocks = len(model.mae.encoder.blocks) + len(model.mae.decoder.blocks)
    launch_s = 5e-6 * (120 + 36 * blocks)
    even = int(launch_s * 0.5e12 / FakeStep(config, "pretrain").flops())
    for batch, expected in ((even // 2, True), (2 * even, False)):
        graphs, why = pick_graphs(model, config, GPU, batch, torch.bfloat16, compile_it=True)
        assert graphs is expected
        assert "launches are expected to take" in why
    found = pick_graphs(model, config, CPU, 1, torch.float32, compile_it=True)
    assert found == (False, "the device is cpu")


@pytest.mark.parametrize(
    ("dtype", "compile_it", "expected"),
    [
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
    ],
)
def test_a_cpu_fuses_the_mlp_in_compiled_bf16(dtype, compile_it, expected) -> None:
    assert pick_mlp("auto", CPU, dtype, compile_it)[0] is expected
    assert pick_mlp("plain", CPU, dtype, compile_it)[0] is False
    if expected:
        assert pick_mlp("fused", CPU, dtype, compile_it)[0] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("step.residual=bf16", r"needs precision=bf16; the precision here is fp32"),
        ("step.activation_budget=0.5", r"is 0\.5, which needs a compiled step.*=selective"),
        ("step.cuda_graphs=true", r"cuda_graphs is true, but the step is not compiled"),
        ("step.compile=true step.cuda_graphs=true", r"graphs is true, but the device is cpu"),
        ("step.attention=fused", r"step\.attention is 'fused', which cannot run here.*auto"),
        ("step.mlp=fused", r"step\.mlp is fused, which cannot run here.*to auto or plain"),
    ],
)
def test_settings_that_cannot_be_carried_out_are_errors(
    tiny: list[str], settings: str, message: str
) -> None:
    config = _config(tiny, *settings.split())
    with pytest.raises(ConfigError, match=message):
        configure_model(SSSD(config.model, config.objective), config, "fp32", CPU, 4)


@pytest.mark.parametrize(
    "settings",
    [
        "step.compile=false step.cuda_graphs=true",
        "step.compile=false step.activation_budget=0.5",
        "step.compile=true step.checkpoint=full",
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny: list[str], settings: str) -> None:
    with pytest.raises(ConfigError, match="step: "):
        _config(tiny, *settings.split())


def test_configure_model_reports_each_decision(tiny: list[str]) -> None:
    lines = []
    for settings in ([], ["step.compile=true", "step.activation_budget=0.5"]):
        config = _config(tiny, *settings)
        model, _ = _sssd(config)
        lines.append(configure_model(model, config, "fp32", CPU, 4).lines)
    starts = [[line.split(" ")[0] for line in found] for found in lines]
    assert starts[0] == ["precision:", "compile:", "encoder", "decoder", "MLP:"]
    assert starts[1] == [*starts[0], "CUDA", "activation"]
    assert lines[1][-1].startswith("activation budget: 0.5; torch.compile ignores it if")
