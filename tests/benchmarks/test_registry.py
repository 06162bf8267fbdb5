"""What is measured: every provider of every op computes the same, bytes and FLOPs are those of the real tensors and products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, kernels
from benchmarks.measure import error_of, tensors
from benchmarks.op import Cost, Op, Provider
from benchmarks.registry import OPS
from benchmarks.shapes import MODELS, Shape, shapes

CPU = torch.device("cpu")
# No two sizes alike, so that a transposed one is seen
SMALL = Shape("small", 3, 24, 2, 16, 2, image=(24, 40), patch=8, channels=3, logits=20)
GREY = Shape(
    "grey", 2, 20, 5, 12, 3, image=(21, 35), patch=7, channels=1, mask_ratio=0.6, logits=11
)
SITE = replace(attention.SITES["odd decoder"], batch=2, tokens=9, heads=3, head_width=8)
CASES: dict[str, tuple[Op, Shape]] = {
    **{f"{name}, {s.model}": (op, s) for name, op in OPS.items() for s in (SMALL, GREY)},
    "attention": (attention.attention_op(SITE, CPU, torch.float32), SITE),
}
EAGER = [
    (case, name) for case, (op, _) in CASES.items() for name, p in op.providers.items() if not p.compiled
]  # fmt: skip


def made(op: Op, s: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return kernels.cast(op, op.make(s, CPU), dtype)


def results(op: Op, s: Shape, provider: Provider, inputs: dict[str, Tensor]) -> list[Tensor]:
    return kernels.results_of(op, s, inputs, provider, provider.call)


@pytest.mark.parametrize(("case", "provider"), EAGER)
def test_every_provider_computes_the_same(case: str, provider: str) -> None:
    """In fp64 to rounding, gradients included: the published form, the tuned form, library calls and the op itself."""
    op, s = CASES[case]
    inputs = made(op, s, torch.float64)
    exact = results(op, s, op.providers[op.exact], inputs)
    got = results(op, s, op.providers[provider], inputs)
    assert error_of(got, exact) <= (op.tolerance or 1e-12)
    assert any(bool(t.abs().max() > 0) for t in got)
    # random_masking and crops have no gradient; everything else has one for each leaf
    assert len(got) >= len(op.leaves) + 1


@pytest.mark.parametrize("case", CASES)
def test_the_op_passes_its_own_gate_in_bf16(case: str) -> None:
    op, s = CASES[case]
    inputs = made(op, s, torch.bfloat16)
    exact, eager = kernels.truth(op, s, inputs)
    assert eager == 0 or 1e-6 < eager < 0.1, "plain eager PyTorch in bf16"
    error = error_of(results(op, s, op.providers["ours"], inputs), exact)
    assert error <= (op.tolerance or kernels.allowed_error(eager, torch.bfloat16))


def test_all_masked_rows_are_what_published_code_gets() -> None:
    """It predicts every patch: the masked rows must be those that the others get, the visible ones must not matter."""
    op = OPS["masked_reconstruction_loss"]
    inputs = made(op, SMALL)
    picked = inputs["pred_all"].gather(
        1, inputs["ids_masked"].unsqueeze(-1).expand_as(inputs["pred"])
    )
    assert torch.equal(picked, inputs["pred"])
    published = op.providers["published"]
    (gradient,) = torch.autograd.grad(published.call(SMALL, inputs), inputs["pred_all"])
    visible = gradient.gather(1, inputs["ids_keep"].unsqueeze(-1).expand(-1, -1, SMALL.values))
    assert not visible.any() and gradient.any()


# ---- bytes and FLOPs ----


def nbytes(*given: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in given)


READ: dict[str, tuple[str, ...]] = {
    "random_masking": ("noise",),
    "restore_tokens": ("visible", "ids_restore", "mask_token", "pos"),
    "gelu_linear": ("x", "bias", "weight", "out_bias"),
    "attention": ("qkv",),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_bytes_are_inputs_and_results(name: str, dtype: torch.dtype) -> None:
    op, s = CASES.get(name) or CASES[f"{name}, small"]
    inputs = made(op, s, dtype)
    out = tensors(op.providers["ours"].call(s, inputs))
    assert op.cost(s, dtype.itemsize, inputs).forward_bytes == nbytes(
        *(inputs[n] for n in READ[name]), *out
    )


def test_bytes_of_losses_count_masked_pixels_once_as_uint8() -> None:
    values = SMALL.batch * SMALL.masked * SMALL.values
    for b, name in ((4, "masked_reconstruction_loss"), (2, "masked_reconstruction_loss")):
        cost = OPS[name].cost(SMALL, b, {})
        ids = SMALL.batch * SMALL.masked * 8
        assert (cost.forward_bytes, cost.backward_bytes) == (
            values * b + values + ids,
            2 * values * b + values + ids,
        )
    logits = SMALL.batch * SMALL.logits * 4
    both = OPS["sssd_loss"].cost(SMALL, 4, {})
    alone = OPS["masked_reconstruction_loss"].cost(SMALL, 4, {})
    assert both.backward_bytes - alone.backward_bytes == 4 * logits + SMALL.logits * 4


def test_bytes_of_crops_are_boxes_and_results() -> None:
    op = OPS["crop_resize"]
    inputs = made(op, SMALL)
    boxes = sum(h * w * 3 for _, _, h, w in inputs["boxes"].tolist())
    assert op.cost(SMALL, 4, inputs).forward_bytes == boxes + nbytes(
        op.providers["ours"].call(SMALL, inputs)
    )


@pytest.mark.parametrize(
    "case",
    ["embed_patches, small", "gelu_linear, grey", "linear_reconstruction_loss, small", "attention"],
)
def test_flops_are_those_that_torch_counts(case: str) -> None:
    op, s = CASES[case]
    inputs = made(op, s)
    cost: Cost = op.cost(s, 4, inputs)
    provider = op.providers.get("tuned") or op.providers["eager"]
    with FlopCounterMode(display=False) as counter:
        out = provider.call(s, inputs)
    assert cost.forward_flops == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, [inputs[n] for n in op.leaves], torch.ones_like(out))
    assert cost.backward_flops == counter.get_total_flops()


def test_both_passes_add_up() -> None:
    found = kernels.costs_of(Cost(1.0, 2.0, 4.0, 8.0), [kernels.FORWARD, kernels.BOTH])
    assert found == {"forward": (1.0, 4.0), "forward+backward": (3.0, 12.0)}


# ---- shapes ----


def test_shapes_are_those_of_the_models() -> None:
    base = MODELS["ViT-B"]
    assert (base.patches, base.keep, base.masked, base.values) == (196, 49, 147, 768)
    odd = MODELS["odd"]
    assert (odd.patches, odd.keep, odd.values) == (187, 74, 196)
    gpu = shapes(torch.device("cuda"))
    assert {s.batch for s in gpu if s.model == "ViT-B"} == {8, 64, 256, 1024}
    assert {s.batch for s in gpu if s.model == "odd"} == {5, 61, 251, 1021}
    assert gpu[0].name == "ViT-B, 256 images"
    assert {s.model for s in gpu} == set(MODELS)


def test_sites_of_attention_are_the_lengths_of_the_models() -> None:
    found = {name: (s.tokens, s.heads, s.head_width) for name, s in attention.SITES.items()}
    assert found["ViT-B encoder"] == (50, 12, 64) and found["ViT-B decoder"] == (197, 16, 32)
    assert found["ViT-L encoder"] == (50, 16, 64) and found["ViT-B classifier"] == (197, 12, 64)
    assert attention.SITES["ViT-B encoder"].at(256).name == "ViT-B encoder [256, 50, 12x64]"


@pytest.mark.parametrize("name", list(OPS))
def test_a_provider_is_there_or_it_is_said_why_not(name: str) -> None:
    op = OPS[name]
    everybody = {"published", "tuned", "tuned compiled", "library", "ours", "ours compiled"}
    assert set(op.providers) | set(op.absent) == everybody
    assert not set(op.providers) & set(op.absent)
    assert all(len(why) > 10 for why in op.absent.values())


Swap = Callable[[str, Provider], None]


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Swap:
    """Puts another provider under a name of restore_tokens."""

    def put(name: str, provider: Provider) -> None:
        op = OPS["restore_tokens"]
        monkeypatch.setitem(OPS, op.name, replace(op, providers={**op.providers, name: provider}))

    return put


def test_swapping_is_seen(swap: Swap) -> None:
    def wrong(s: Shape, x: dict[str, Tensor]) -> Any:
        return -OPS["restore_tokens"].providers["tuned"].call(s, x)

    swap("ours", Provider(wrong))
    op = OPS["restore_tokens"]
    inputs = made(op, SMALL)
    exact, _ = kernels.truth(op, SMALL, inputs)
    assert error_of(results(op, SMALL, op.providers["ours"], inputs), exact) > 1
