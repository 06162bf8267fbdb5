"""attention: softmax(q k^T * scale) v on packed qkv, and its gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import mae_kernels
from mae_kernels import _runtime, attention, attention_refusal, backend, short_attention
from mae_kernels.short_attention import BACKWARD, FORWARD, ROWS_KERNEL_TOKENS, refusal, sizes_for
from tests.kernels.calls import assert_close, assert_equals_reference, fake_cuda, run

OPS = torch.ops.mae_kernels
# what the kernels take: fp32 only where no tensor core rounds it, bf16 where the interpreter does
# not get it wrong
ON_GPU = os.environ.get("MAE_KERNELS_TEST_DEVICE") == "cuda"
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]


def by_hand(qkv, scale=None):
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (
        qkv.shape[-1] ** -0.5 if scale is None else scale
    )
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """x with the same values, contiguous, and NaN right before and after it."""
    flat = torch.full((x.numel() + 512,), float("nan"), dtype=x.dtype, device=x.device)
    flat[256:-256] = x.flatten()
    return flat[256:-256].view(x.shape)


@pytest.fixture
def on_architecture(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda arch: monkeypatch.setattr(short_attention, "_architecture", lambda device: arch)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tokens", "width", "dtype"),
    [  # every number of tokens at every width, the two dtypes taking turns
        (tokens, width, DTYPES[(i + j) % 2])
        for i, tokens in enumerate([1, 5, 37, 50, 64, 130, 197, 256])
        for j, width in enumerate([16, 32, 64])
    ],
)
def test_attention_equals_einsum(tokens, width, dtype, device) -> None:
    if refusal(torch.empty(1, tokens, 3, 1, width, device=device, dtype=DTYPES[0])) is not None:
        tokens = 224  # the longest for which this GPU has a kernel of this width
    batch, heads = (2, 2) if tokens < 60 else (1, 1)
    qkv = inside_nan(torch.randn(batch, tokens, 3, heads, width, device=device).to(dtype))
    upstream = inside_nan(torch.randn(batch, tokens, heads, width, device=device).to(dtype))
    before = upstream.clone()
    got = assert_equals_reference(attention, by_hand, [qkv], upstream, atol=2e-6)
    assert got[0].is_contiguous()
    assert torch.equal(upstream, before)


# every line of both tables: architecture, tokens with and without padding, head width
LINES = [(80, 100, 64), (80, 128, 128), (80, 224, 32), (80, 250, 32), (80, 200, 64)]
LINES += [(90, 128, 64), (90, 70, 128), (90, 197, 32), (90, 197, 64)]
LINES += [(120, 100, 32), (120, 128, 128), (120, 197, 32)]


def test_lines_are_the_whole_tables() -> None:
    taken = set()
    for arch, tokens, width in LINES:
        taken |= {sizes_for(backward, arch, tokens, width)[0] for backward in (False, True)}
    assert taken == {*FORWARD, *BACKWARD}


@pytest.mark.kernel
@pytest.mark.parametrize(("arch", "tokens", "width"), LINES)
def test_attention_with_every_line_of_the_tables(
    arch, tokens, width, device, on_architecture
) -> None:
    on_architecture(arch)

    def scaled(op):
        return lambda qkv: op(qkv, scale=0.1)

    for dtype in DTYPES:
        qkv = torch.randn(1, tokens, 3, 2, width, device=device).to(dtype)
        upstream = torch.randn(1, tokens, 2, width, device=device).to(dtype)
        assert_equals_reference(scaled(attention), scaled(by_hand), [qkv], upstream, atol=2e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [37, 130, 197])
@pytest.mark.parametrize("sign", [-1, 1])
def test_padding_adds_nothing_to_scores_far_from_zero(tokens, sign, device) -> None:
    """Padded keys have score 0: e^900 times any real one when all of these are very negative."""
    qkv = torch.randn(1, tokens, 3, 1, 32, device=device) * 0.1
    qkv[:, :, 0] += 13
    qkv[:, :, 1] += 13 * sign
    qkv = qkv.to(DTYPES[0])
    upstream = torch.randn(1, tokens, 1, 32, device=device).to(DTYPES[0])
    got = assert_equals_reference(attention, by_hand, [qkv], upstream, atol=1e-4)
    assert got[0].isfinite().all() and got[1].isfinite().all()


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [9, 70])
def test_attention_keeps_nan_inside_its_head(tokens, device) -> None:
    qkv = torch.randn(2, tokens, 3, 2, 16, device=device).to(DTYPES[0])
    qkv[1, tokens - 1, 1, 0, 3] = float("nan")
    out, gradient = run(attention, [qkv], torch.randn(2, tokens, 2, 16, device=device))
    assert out[1, :, 0].isnan().all() and gradient[1, :, :, 0].isnan().all()
    assert out[0].isfinite().all() and out[1, :, 1].isfinite().all()
    assert gradient[0].isfinite().all() and gradient[1, :, :, 1].isfinite().all()


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [9, 70])
def test_attention_gradient_can_be_differentiated(tokens, device) -> None:
    qkv = torch.randn(1, tokens, 3, 2, 16, device=device).to(DTYPES[0])

    def twice(op, dtype):
        leaf = qkv.to(dtype).requires_grad_()
        gradient = torch.autograd.grad(op(leaf).square().sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    got = twice(lambda x: OPS.attention(x, 16**-0.5)[0], qkv.dtype)
    assert_close([got], [twice(by_hand, torch.float64)], [twice(by_hand, qkv.dtype)], atol=5e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("tokens", [9, 70])
def test_attention_keeps_for_the_backward_what_it_states(tokens, device) -> None:
    """Up to 64 tokens only qkv; beyond, out and one fp32 per row."""
    if device.type == "cpu" and not _runtime.INTERPRET:
        return  # torch's own backward
    qkv = torch.randn(2, tokens, 3, 2, 16, device=device).to(DTYPES[0]).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)), lambda t: t
    ):
        attention(qkv)
    beyond = [(2, tokens, 2, 16), (2, 2, tokens)] if tokens > ROWS_KERNEL_TOKENS else []
    assert kept == [tuple(qkv.shape), *beyond]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 257, 3, 2, 16), DTYPES[1], "hold 1 to .* tokens with heads of"),
        ((1, 129, 3, 2, 128), DTYPES[1], "hold 1 to .* tokens with heads of"),
        ((1, 0, 3, 2, 16), DTYPES[1], "hold 1 to 256 tokens .* not 0"),
        ((1, 9, 3, 2, 24), DTYPES[1], "take heads of 16, 32, 64, 128 values, not of 24"),
        ((1, 9, 3, 2, 16), torch.float64, "the tensors are fp64"),
    ],
)
def test_attention_of_other_sizes_is_sdpa(shape, dtype, reason, device) -> None:
    qkv = torch.randn(shape, device=device).to(dtype)
    if device.type == "cuda" or _runtime.INTERPRET:
        with pytest.raises(
            RuntimeError, match=f"attention: backend 'triton' was requested, but .*{reason}"
        ):
            attention(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with backend("auto"):
        assert torch.equal(attention(qkv), F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


@pytest.mark.parametrize(
    ("archs", "limits"),
    [
        ((75,), {16: 0, 32: 0, 64: 0, 128: 0}),
        ((80, 86, 89), {16: 256, 32: 256, 64: 224, 128: 128, 24: 0, 256: 0}),
        ((90, 100, 103), {16: 256, 32: 256, 64: 256, 128: 128, 8: 0}),
        ((120, 121), {16: 256, 32: 256, 64: 128, 128: 128, 96: 0}),
    ],
)
def test_attention_refusal_names_the_longest_sequence(archs, limits) -> None:
    for arch in archs:
        for width, most in limits.items():
            for tokens in (0, 1, 128, 129, 224, 225, 256, 257):
                reason = attention_refusal(tokens, width, torch.bfloat16, divmod(arch, 10))
                assert (reason is None) == (1 <= tokens <= most), (arch, width, tokens, reason)
    assert "not float32" in str(attention_refusal(9, 16, torch.float32, (9, 0)))


def test_info_names_a_gpu_without_tensor_cores_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "architecture", lambda device: 75)
    reason = _runtime.why_not_triton("attention", torch.device("cuda"))
    assert reason == "Triton has no tensor cores on sm_75, before sm_80"
    assert _runtime.why_not_triton("restore_tokens", torch.device("cuda")) is None
    assert mae_kernels.info()["attention"] == reason or not torch.cuda.is_available()


def test_gradgradcheck_of_the_registered_op() -> None:
    qkv = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: OPS.attention(x, 0.7)[0], qkv)


@pytest.mark.parametrize(("tokens", "written"), [(50, ["OUT"]), (197, ["LSE", "OUT"])])
def test_attention_compiled_for_a_gpu_is_one_launch(tokens, written) -> None:
    """Traced with a fake CUDA tensor and dynamic sizes: the choice of kernel needs no graph
    break.
    """
    pytest.importorskip("triton", reason="the kernels need it")
    torch._dynamo.reset()
    launches = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        launches.extend(sorted(n.kwargs["tensors_to_clone"]) for n in nodes)
        return graph.forward

    with fake_cuda():
        qkv = torch.empty(8, tokens, 3, 4, 32, device="cuda", dtype=torch.bfloat16)
        torch.compile(
            attention, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=look)
        )(qkv)
    assert launches == [written]


def test_attention_under_autocast_keeps_the_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        qkv = [torch.randn(2, 9, 3, 2, 16).to(dtype)]
        want = run(attention, qkv)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(attention, qkv)
            registered = run(lambda x: OPS.attention(x, 0.25)[0], qkv)
        assert got[0].dtype == registered[0].dtype == dtype
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        if dtype == torch.float32:
            torch.testing.assert_close(registered, want)


QKV = torch.zeros(2, 4, 3, 3, 8)


@pytest.mark.parametrize(
    ("args", "scale", "error", "text"),
    [
        ([QKV[:, :, :2]], None, ValueError, r"qkv: got shape .* needs \[B, N, 3, H, d\]"),
        ([QKV.transpose(1, 2)], None, ValueError, r"torch.stack\(\(q, k, v\), 2\)"),
        ([*QKV.unbind(2)], None, TypeError, r"got 3 positional .*torch.stack\(\(q, k, v\), 2\)"),
        ([QKV[..., :0]], None, ValueError, "qkv: got shape .* needs H and d of at least 1"),
        ([QKV.long()], None, TypeError, "qkv: got dtype torch.int64"),
        ([[1.0]], None, TypeError, "qkv: got list, needs a torch.Tensor"),
        ([QKV], -1.0, ValueError, "scale: got -1.0, needs a positive number"),
    ],
)
def test_attention_names_a_bad_argument(args, scale, error, text: str) -> None:
    with pytest.raises(error, match=text):
        attention(*args, scale=scale)


# ------------------------------------------------------------ GPU
@pytest.fixture
def triton_backend() -> Iterator[None]:
    with backend("triton"):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("tokens", [64, 128])
def test_attention_offsets_beyond_two_to_the_31_on_a_gpu(tokens) -> None:
    free, need = torch.cuda.mem_get_info()[0], 20 * 2**30
    if free < need:
        pytest.skip(
            f"{free / 2**30:.1f} GiB of GPU memory are free and {need / 2**30:.0f} are needed"
        )
    images = 2**31 // (tokens * 3 * 16 * 64) + 2
    qkv = torch.zeros(images, tokens, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    upstream = torch.zeros(images, tokens, 16, 64, device="cuda", dtype=torch.bfloat16)
    qkv[-1:] = torch.randn_like(qkv[-1:])
    upstream[-1:] = torch.randn_like(upstream[-1:])
    got = run(attention, [qkv], upstream)
    alone = run(attention, [qkv[-1:].clone()], upstream[-1:].clone())
    for many, one in zip(got, alone, strict=True):
        assert torch.equal(many[-1:], one) and not many[0].any()


def test_flop_counter_counts_attention_like_sdpa() -> None:
    qkv = torch.randn(2, 9, 3, 4, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.mae_kernels.attention(qkv, 0.2)[0].sum().backward()
    q = (2, 4, 9, 32)
    expected = sdpa_flop_count(q, q, q) + sdpa_backward_flop_count(q, q, q, q)
    assert counter.get_total_flops() == expected == 2 * (2 + 5) * 2 * 4 * 9 * 9 * 32
