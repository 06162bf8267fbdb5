"""Every op at the sizes of ViT-S, B and L on a CUDA device.

Accuracy, autocast, compiled and captured runs for each model sample; then memory, offsets beyond
2^31 elements and devices. test_interpreted.py runs the small samples on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mae_kernels as mk
from mae_kernels import Sample, backend
from tests.kernels import calls
from tests.kernels.calls import MODEL, made

pytestmark = pytest.mark.gpu
EACH = pytest.mark.parametrize("sample", MODEL, ids=str)
DIFFERENTIABLE = pytest.mark.parametrize("sample", [s for s in MODEL if s.gradients], ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
BATCH = 64
BF16 = torch.bfloat16
# images of a batch with more than 2^31 elements, and the memory that these tests need
MANY = 2**31 // (3 * 224 * 224) + 3
GIB = 2**30
# partial sums, gradients of parameters, workspaces, rounding of the allocator
SLACK = 16 * 2**20


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.cuda.empty_cache()


@pytest.fixture
def much_memory() -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < 26:
        pytest.skip(f"{free:.1f} GiB of GPU memory are free and 26 are needed")


# ------------------------------------------------------------------------- every sample
@EACH
@DTYPES
def test_accuracy(sample: Sample, dtype: torch.dtype, cuda: torch.device) -> None:
    calls.check_accuracy(sample, dtype, cuda, BATCH)


@DIFFERENTIABLE
def test_autocast(sample: Sample, cuda: torch.device) -> None:
    calls.check_autocast(sample, cuda, BATCH)


@EACH
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_compiled(sample: Sample, dtype: torch.dtype, cuda: torch.device) -> None:
    calls.check_compiled(sample, dtype, cuda, BATCH, "inductor")


@EACH
def test_captured_graph(sample: Sample, cuda: torch.device) -> None:
    """Forward and backward in one CUDA graph, replayed with new inputs, equal the eager run."""
    static, options = made(sample, cuda, BF16, BATCH)
    fresh, _ = made(sample, cuda, BF16, BATCH, seed=1)
    with backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                calls.results(sample, static, options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = calls.results(sample, static, options)
        for name, t in static.items():
            if t is not None:
                t.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        eager = calls.results(sample, static, options)
    for got, want in zip(captured, eager, strict=True):
        # cuBLAS has another workspace while a graph is captured
        products = sample.op.startswith(("embed", "linear", "gelu"))
        eps = 4 * torch.finfo(want.dtype).eps if products and want.is_floating_point() else 0
        difference = (got.double() - want.double()).abs().max()
        assert difference <= eps * want.abs().max().double()


@pytest.mark.parametrize("sample", calls.FIRST, ids=str)
def test_tensors_on_a_device_that_is_not_the_current_one(sample: Sample) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"{count} CUDA device is available and 2 are needed")
    calls.check_accuracy(sample, BF16, f"cuda:{(torch.cuda.current_device() + 1) % count}")


# ------------------------------------------------------------------------------- memory
def peak(sample: Sample, device: torch.device) -> tuple[int, dict[str, Any]]:
    """Peak bytes of forward and backward in bf16 above the tensors, which are returned too."""
    tensors, options = made(sample, device, BF16, 256)
    with backend("triton"):
        for _ in range(2):  # the first one compiles, and allocates the workspaces of cuBLAS
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = calls.results(sample, tensors, options)
            torch.cuda.synchronize()
            del kept
    return torch.cuda.max_memory_allocated() - before, tensors


def of(*ops: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sample", [s for s in MODEL if s.op in ops], ids=str)


@of("masked_reconstruction_loss", "sssd_loss")
def test_loss_allocates_its_gradients_only(sample: Sample, cuda: torch.device) -> None:
    got, tensors = peak(sample, cuda)
    assert got <= sum(tensors[name].nbytes for name in sample.gradients) + SLACK


@of("linear_reconstruction_loss")
def test_linear_loss_never_holds_all_predictions(sample: Sample, cuda: torch.device) -> None:
    got, tensors = peak(sample, cuda)
    hidden, weight = tensors["hidden"], tensors["weight"]
    predictions = hidden.nbytes // hidden.shape[2] * weight.shape[0]
    # the gradient of hidden, as kept and as returned; of an eighth of the patches the predictions,
    # their gradient and copies of hidden; copies of the weight and its gradients
    eighth = (2 * predictions + 2 * hidden.nbytes) // 8
    assert got <= 2 * hidden.nbytes + eighth + 8 * weight.nbytes + SLACK


@of("gelu_linear")
def test_gelu_linear_allocates_three_hidden_tensors(sample: Sample, cuda: torch.device) -> None:
    """Forward and backward; in between it keeps gelu(x + bias), or nothing of that size."""
    got, tensors = peak(sample, cuda)
    x, weight = tensors["x"], tensors["weight"]
    out_bytes = x.nbytes * weight.shape[0] // weight.shape[1]
    assert got <= 3 * x.nbytes + 2 * out_bytes + 2 * weight.nbytes + SLACK
    options = sample.make(mk.Draw("meta"))[1]
    tensors, _ = calls.with_leaves(sample, tensors)
    with backend("triton"):
        before = torch.cuda.memory_allocated()
        out = sample.function(**tensors, **options)
        kept = torch.cuda.memory_allocated() - before
    assert kept <= (0 if options["recompute"] else x.nbytes) + out_bytes + SLACK
    del out


# ------------------------------------------------------------ more than 2^31 elements
MUCH = pytest.mark.usefixtures("much_memory", "cuda")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def zeros_but_last(count: int, *shape: int) -> Tensor:
    x = torch.zeros(count, *shape, dtype=BF16, device="cuda")
    x[-1] = torch.randn(shape, device="cuda")
    return x


def assert_last_as_alone(call: Callable[..., list[Tensor]], *many: Tensor, eps: float) -> None:
    """The results of the last image: cuBLAS orders the sums of a small product in another way, so
    eps is 0 only without products.
    """
    with backend("triton"):
        found = call(*many), call(*(t[-1:].clone() for t in many))
    for got, want in zip(*found, strict=True):
        atol = eps * torch.finfo(want.dtype).eps * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@MUCH
@pytest.mark.parametrize("embed", [False, True])
def test_images_beyond_two_to_the_31(embed: bool) -> None:
    images = torch.zeros(MANY, 3, 224, 224, dtype=torch.uint8, device="cuda")
    images[-1] = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    weight, pos = normal(64, 3, 16, 16), normal(196, 64)

    def call(images: Tensor, ids: Tensor) -> list[Tensor]:
        if embed:
            return [mk.embed_patches(images, ids, weight, None, pos)[-1:]]
        return [mk.gather_patches(images, ids, 16, mean=[0.5], std=[0.2], dtype=BF16)[-1:]]

    ids = torch.randint(0, 196, (MANY, 2), device="cuda")
    assert_last_as_alone(call, images, ids, eps=4 if embed else 0)


@MUCH
def test_restore_tokens_beyond_two_to_the_31() -> None:
    count = 2**31 // (196 * 512) + 3
    ids = torch.randperm(196, device="cuda").expand(count, -1)
    token, pos = normal(512), normal(197, 512)

    def call(tokens: Tensor, ids: Tensor, upstream: Tensor) -> list[Tensor]:
        leaf = tokens.detach().requires_grad_()
        out = mk.restore_tokens(leaf, ids, token, pos, prefix=1)
        gradient = torch.autograd.grad(out, leaf, upstream)[0]
        return [out.detach()[-1:].clone(), gradient[-1:].clone()]

    tokens, upstream = zeros_but_last(count, 50, 512), zeros_but_last(count, 197, 512)
    assert_last_as_alone(call, tokens, ids, upstream, eps=0)


@MUCH
def test_masked_reconstruction_loss_beyond_two_to_the_31() -> None:
    count = 2**31 // (147 * 768) + 3
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, device="cuda")
    ids = torch.randperm(196, device="cuda")[:147].expand(1, -1)

    def call(pred: Tensor) -> list[Tensor]:
        leaf, batch = pred.detach().requires_grad_(), len(pred)
        images = image.expand(batch, -1, -1, -1)
        loss = mk.masked_reconstruction_loss(leaf, images, ids=ids.expand(batch, -1), patch_size=16)
        return [torch.autograd.grad(loss, leaf, torch.full_like(loss, float(batch)))[0][-1:]]

    assert_last_as_alone(call, zeros_but_last(count, 147, 768), eps=2)


@MUCH
@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_linear_beyond_two_to_the_31(recompute: bool) -> None:
    """All other rows of the upstream gradient are zero, so the sums are those of the last row."""
    rows = 2**31 // 2048 + 3
    parameters = [normal(2048), normal(64, 2048), normal(64)]

    def call(x: Tensor, upstream: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        out = mk.gelu_linear(*leaves, recompute=recompute)
        dx, *sums = torch.autograd.grad(out, leaves, upstream)
        return [out.detach()[-1:].clone(), dx[-1:].clone(), *sums]

    assert_last_as_alone(call, zeros_but_last(rows, 2048), zeros_but_last(rows, 64), eps=4)


@MUCH
def test_crop_resize_beyond_two_to_the_31() -> None:
    """The last image of more than 2^31 pixels, in a batch of more than 2^31 results."""
    image = torch.randint(0, 256, (200 * 300,), dtype=torch.uint8, device="cuda")
    pixels = torch.zeros(2**31 + len(image), dtype=torch.uint8, device="cuda")
    pixels[-len(image) :] = image
    place = torch.tensor([[2**31, 200, 300, 5, 7, 180, 240]], device="cuda")

    def call(pixels: Tensor, place: Tensor) -> Tensor:
        flips = torch.ones(len(place), dtype=torch.bool, device="cuda")
        columns = place[:, 0], place[:, 1:3], place[:, 3:7]
        return mk.crop_resize(pixels, *columns, flips, (224, 224))

    with backend("triton"):
        many = call(pixels, place.expand(2**31 // 224**2 + 2, -1))
        place[:, 0] = 0
        alone = call(image, place)
    assert torch.equal(many[-1:], alone)
    assert torch.equal(many[:1], alone)


# --------------------------------------------------------------------------------- rest
def test_attention_takes_sdpa_for_fp32(cuda: torch.device) -> None:
    qkv = torch.randn(4, 50, 3, 12, 64, device=cuda)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert torch.equal(mk.attention(qkv), F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_debug_checks_report_a_box_out_of_range(cuda: torch.device) -> None:
    sample = next(s for s in MODEL if s.op == "crop_resize")
    tensors, options = made(sample, cuda)
    tensors["boxes"] = tensors["boxes"].clone()
    tensors["boxes"][2, 1] = 10**6
    mk.debug_checks(True)
    try:
        with pytest.raises(ValueError, match=r"boxes: got \(top, left, .* image 2"):
            mk.crop_resize(**tensors, **options)
    finally:
        mk.debug_checks(False)
