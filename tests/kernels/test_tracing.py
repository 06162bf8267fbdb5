"""What torch.compile sees of the ops on a GPU, traced with fake CUDA tensors on a machine that has none.

Every launch must be captured, and the buffers that its kernel writes must be known exactly: an unknown one would be taken
for an input that nobody changes, and results would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

from mae_kernels import _runtime

triton = pytest.importorskip("triton", reason="the kernels need it")
OPS = torch.ops.mae_kernels
BF16, F32, I64, U8 = torch.bfloat16, torch.float32, torch.int64, torch.uint8
STATS = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
LOSS = (16, "patch", 1e-6, *STATS)


class StubDriver:
    """Enough of a Triton driver to analyse kernels for an H200."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_runtime, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", StubDriver())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def cuda(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def images() -> Tensor:
    return cuda(8, 3, 224, 224, dtype=U8)


def scalars(n: int) -> list[Tensor]:
    return [cuda(dtype=F32) for _ in range(n)]


def logits() -> list[Tensor]:
    return [cuda(8, 4096), cuda(8, 4096)]


# call, arguments, the buffers written by each launch in turn
CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]], list[list[str]]]] = {
    "random_masking": (
        lambda n: OPS.random_masking(n, 49),
        lambda: [cuda(8, 196, dtype=F32)],
        [["KEEP", "MASK", "MASKED", "RESTORE"]],
    ),
    "gather_patches": (
        lambda a, i: OPS.gather_patches(a, i, 16, *STATS, BF16),
        lambda: [images(), cuda(8, 49, dtype=I64)],
        [["OUT"]],
    ),
    "embed_patches": (
        lambda a, i, w, b, p: OPS.embed_patches(a, i, w, b, p, *STATS, BF16),
        lambda: [images(), cuda(8, 49, dtype=I64), cuda(768, 3, 16, 16), cuda(768), cuda(196, 768)],
        [["OUT"], ["OUT"]],
    ),
    "embed_patches_backward": (
        lambda g, a, i: OPS.embed_patches_backward(
            g, a, i, 16, 196, *STATS, BF16, F32, F32, F32, True, True, True
        ),
        lambda: [cuda(8, 49, 768), images(), cuda(8, 49, dtype=I64)],
        [["OUT"], ["FIRST", "NEXT"], ["DPOS"]],
    ),
    "restore_tokens": (
        lambda v, i, t, p: OPS.restore_tokens(v, i, t, p, 1),
        lambda: [cuda(8, 50, 512), cuda(8, 196, dtype=I64), cuda(512), cuda(197, 512)],
        [["OUT"]],
    ),
    "restore_tokens_backward": (
        lambda g, i: OPS.restore_tokens_backward(g, i, 50, 1, F32, F32, F32, False),
        lambda: [cuda(8, 197, 512), cuda(8, 196, dtype=I64)],
        [["DVISIBLE", "PARTIAL"]],
    ),
    "gelu_linear": (
        lambda x, b, w, c: OPS.gelu_linear(x, b, w, c, True)[0],
        lambda: [cuda(8, 50, 3072), cuda(3072, dtype=F32), cuda(768, 3072), cuda(768, dtype=F32)],
        [["G"]],
    ),
    "gelu_linear_backward": (
        lambda g, x, b, w: OPS.gelu_linear_backward(g, x, b, w, None, F32, True, True),
        lambda: [cuda(8, 50, 768), cuda(8, 50, 3072), cuda(3072, dtype=F32), cuda(768, 3072)],
        [["DH", "G", "PARTIAL"]],
    ),
    "gelu_linear_backward with g kept": (
        lambda g, x, b, w, k: OPS.gelu_linear_backward(g, x, b, w, k, F32, True, True),
        lambda: [
            cuda(8, 50, 768),
            cuda(8, 50, 3072),
            cuda(3072, dtype=F32),
            cuda(768, 3072),
            cuda(400, 3072),
        ],
        [["DH", "PARTIAL"]],
    ),
    "gelu_linear_backward without a bias": (
        lambda g, x, w: OPS.gelu_linear_backward(g, x, None, w, None, F32, True, False),
        lambda: [cuda(8, 50, 768), cuda(8, 50, 3072), cuda(768, 3072)],
        [["DH", "G"]],
    ),
    "masked_reconstruction_loss": (
        lambda p, a, i: OPS.masked_reconstruction_loss(p, a, i, None, *LOSS),
        lambda: [cuda(8, 147, 768), images(), cuda(8, 147, dtype=I64)],
        [["LOSSES"]],
    ),
    "masked_reconstruction_loss_backward": (
        lambda g, n, p, a, i: OPS.masked_reconstruction_loss_backward(g, n, p, a, i, None, *LOSS),
        lambda: [*scalars(2), cuda(8, 147, 768), images(), cuda(8, 147, dtype=I64)],
        [["DPRED"]],
    ),
    # linear_reconstruction_loss launches the two kernels above; a build of torch without CUDA cannot trace its slices
    "distillation_loss": (
        lambda s, t, c: OPS.distillation_loss(s, t, c, False, 0.1, 0.04),
        lambda: [*logits(), cuda(4096, dtype=F32)],
        [["LOSSES", "PARTIAL"]],
    ),
    "distillation_loss_backward": (
        lambda g, s, t, c: OPS.distillation_loss_backward(g, s, t, c, 0.1, 0.04, True),
        lambda: [*scalars(1), *logits(), cuda(4096, dtype=F32)],
        [["DSTUDENT", "DTEACHER"]],
    ),
    "sssd_loss": (  # both terms: one launch
        lambda p, a, s, t, i, c: OPS.sssd_loss(
            p, a, s, t, i, None, c, *LOSS, 0.2, False, 0.1, 0.04
        ),
        lambda: [
            cuda(8, 147, 768),
            images(),
            *logits(),
            cuda(8, 147, dtype=I64),
            cuda(4096, dtype=F32),
        ],
        [["LOGIT_LOSSES", "PARTIAL", "PATCH_LOSSES"]],
    ),
    "sssd_loss_backward": (
        lambda x, y, z, n, p, a, s, t, i, c: OPS.sssd_loss_backward(
            x, y, z, n, p, a, s, t, i, None, c, *LOSS, 0.2, 0.1, 0.04, True
        ),
        lambda: [
            *scalars(4),
            cuda(8, 147, 768),
            images(),
            *logits(),
            cuda(8, 147, dtype=I64),
            cuda(4096, dtype=F32),
        ],
        [["DPRED", "DSTUDENT", "DTEACHER"]],
    ),
    "attention up to 64 tokens": (
        lambda q: OPS.attention(q, 0.125),
        lambda: [cuda(8, 50, 3, 12, 64)],
        [["OUT"]],
    ),
    "attention_backward up to 64 tokens": (
        lambda g, q: OPS.attention_backward(g, q, None, None, 0.125),
        lambda: [cuda(8, 50, 12, 64), cuda(8, 50, 3, 12, 64)],
        [["DQKV"]],
    ),
    "attention": (
        lambda q: OPS.attention(q, 0.125),
        lambda: [cuda(8, 197, 3, 16, 32)],
        [["LSE", "OUT"]],
    ),
    "crop_resize": (
        lambda *tensors: OPS.crop_resize(*tensors, [224, 224], 3),
        lambda: [
            cuda(10**6, dtype=U8),
            *(cuda(8, *n, dtype=I64) for n in ((), (2,), (4,))),
            cuda(8, dtype=torch.bool),
        ],
        [["OUT"]],
    ),
    "attention_backward": (
        lambda g, q, o, n: OPS.attention_backward(g, q, o, n, 0.125),
        lambda: [
            cuda(8, 197, 16, 32),
            cuda(8, 197, 3, 16, 32),
            cuda(8, 197, 16, 32),
            cuda(8, 16, 197, dtype=F32),
        ],
        [["DQKV"]],
    ),
}


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("name", CASES)
def test_launches_are_captured_with_what_they_write(name: str) -> None:
    call, make, written = CASES[name]

    def as_tuple(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = call(*tensors)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    graph = aot_export_joint_simple(as_tuple, make(), trace_joint=False).graph
    launches = [
        n
        for n in graph.nodes
        if n.op == "call_function" and "triton_kernel_wrapper" in str(n.target)
    ]
    assert [sorted(n.kwargs["tensors_to_clone"]) for n in launches] == written


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize(
    ("name", "products", "sizes"),
    [
        ("attention up to 64 tokens", 2, (8, 50, 12, 64)),
        ("attention_backward up to 64 tokens", 5, (8, 50, 12, 64)),
        ("attention", 2, (8, 197, 16, 32)),
        ("attention_backward", 5, (8, 197, 16, 32)),
    ],
)
def test_the_compiler_knows_what_an_attention_kernel_costs(
    name: str, products: int, sizes: tuple[int, int, int, int]
) -> None:
    """What torch's partitioner asks when a memory budget makes it choose what to compute again."""
    from torch._functorch.partitioners import estimate_runtime

    call, make, _ = CASES[name]

    def as_tuple(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = call(*tensors)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    graph = aot_export_joint_simple(as_tuple, make(), trace_joint=False).graph
    (launch,) = (
        n
        for n in graph.nodes
        if n.op == "call_function" and "triton_kernel_wrapper" in str(n.target)
    )
    batch, tokens, heads, width = sizes
    assert estimate_runtime(launch) == 2 * products * batch * heads * tokens * tokens * width
