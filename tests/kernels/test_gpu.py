"""Every op at the sizes of ViT-S, B and L on a CUDA device: accuracy, compiled and captured runs, memory, offsets, devices.

One table of calls, and properties that hold for each. `test_the_table_runs_small_on_the_cpu` takes the same table and checks at
small sizes with the reference, so that a mistake here is found on machines without a GPU.

Shapes: L = 196 patches of 16 x 16 x 3, K = 49 visible, M = 147 masked, D encoder and E decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mae_kernels as mk
from mae_kernels import backend
from mae_kernels._runtime import INTERPRET

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
GIB = 2**30


class Sizes(NamedTuple):
    batch: int
    width: int  # of the encoder
    heads: int
    decoder: int = 512
    decoder_heads: int = 16
    side: int = 224
    patch: int = 16
    logits: int = 4096

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def keep(self) -> int:
        return self.patches // 4


SMALL = Sizes(3, 32, 2, 64, 2, 32, 8, 40)
VIT = {"S": Sizes(64, 384, 6), "B": Sizes(256, 768, 12), "L": Sizes(64, 1024, 16)}


class Inputs(NamedTuple):
    """Leaves get gradients and change their dtype; the others stay as they are."""

    leaves: tuple[Tensor, ...]
    others: tuple[Tensor, ...]


Op = Callable[
    ..., "Tensor | tuple[Tensor, ...]"
]  # (leaves, others) -> results; gradients are taken of the first


class Case(NamedTuple):
    make: Callable[[Sizes, torch.device], Inputs]
    call: Callable[[Sizes, tuple[Tensor, ...], tuple[Tensor, ...]], Any]
    half_only: bool = False  # the kernel is for fp16 and bf16


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device)


def pixels(s: Sizes, device: torch.device, layout: str = "nchw") -> Tensor:
    images = torch.randint(0, 256, (s.batch, 3, s.side, s.side), dtype=torch.uint8, device=device)
    return images.to(memory_format=torch.channels_last) if "nhwc" in layout else images


def ids(s: Sizes, device: torch.device) -> mk.Masking:
    return mk.random_masking(torch.rand(s.batch, s.patches, device=device), s.keep)


def embed_case(layout: str) -> Case:
    def make(s: Sizes, device: torch.device) -> Inputs:
        images = pixels(s, device, layout)
        values = 3 * s.patch**2
        leaves = (
            normal(s.width, 3, s.patch, s.patch, device=device) / math.sqrt(values),
            normal(s.width, device=device),
            normal(s.patches, s.width, device=device),
        )
        images = images / 255 if "float" in layout else images
        return Inputs(leaves, (images, ids(s, device).ids_keep))

    return Case(make, lambda s, x, o: mk.embed_patches(*o, *x, mean=MEAN, std=STD))


def make_restore(s: Sizes, device: torch.device) -> Inputs:
    tokens = normal(s.batch, 1 + s.keep, s.decoder, device=device)
    return Inputs(
        (tokens, normal(s.decoder, device=device), normal(1 + s.patches, s.decoder, device=device)),
        (ids(s, device).ids_restore,),
    )


def loss_case(norm: str | None, layout: str, use_mask: bool = False) -> Case:
    def make(s: Sizes, device: torch.device) -> Inputs:
        masking, images = ids(s, device), pixels(s, device, layout)
        listed = s.patches if use_mask else s.patches - s.keep
        images = images / 255 if "float" in layout else images
        select = masking.mask if use_mask else masking.ids_masked
        return Inputs((normal(s.batch, listed, 3 * s.patch**2, device=device),), (images, select))

    def call(s: Sizes, x: tuple[Tensor, ...], o: tuple[Tensor, ...]) -> Tensor:
        select = {"mask" if use_mask else "ids": o[1]}
        return mk.masked_reconstruction_loss(
            x[0], o[0], patch_size=s.patch, norm=norm, mean=MEAN, std=STD, **select
        )

    return Case(make, call)


def make_linear(s: Sizes, device: torch.device) -> Inputs:
    values = 3 * s.patch**2
    leaves = (
        normal(s.batch, s.patches - s.keep, s.decoder, device=device),
        normal(values, s.decoder, device=device) / math.sqrt(s.decoder),
        normal(values, device=device),
    )
    return Inputs(leaves, (pixels(s, device), ids(s, device).ids_masked))


def make_gelu(s: Sizes, device: torch.device, decoder: bool) -> Inputs:
    width, tokens = (s.decoder, 1 + s.patches) if decoder else (s.width, 1 + s.keep)
    x = normal(s.batch, tokens, 4 * width, device=device)
    bias = normal(4 * width, device=device)
    weight = normal(width, 4 * width, device=device) / math.sqrt(4 * width)
    return Inputs((x, bias, weight, normal(width, device=device)), ())


def make_logits(s: Sizes, device: torch.device) -> Inputs:
    rows = (s.batch, s.logits)
    return Inputs(
        (normal(*rows, device=device), normal(*rows, device=device)),
        (normal(s.logits, device=device),),
    )


def make_sssd(s: Sizes, device: torch.device) -> Inputs:
    pred = normal(s.batch, s.patches - s.keep, 3 * s.patch**2, device=device)
    logits = make_logits(s, device)
    return Inputs(
        (pred, *logits.leaves), (pixels(s, device), ids(s, device).ids_masked, *logits.others)
    )


def make_attention(s: Sizes, device: torch.device, decoder: bool) -> Inputs:
    width, heads = (s.decoder, s.decoder_heads) if decoder else (s.width, s.heads)
    tokens = 1 + (s.patches if decoder else s.keep)
    return Inputs((normal(s.batch, tokens, 3, heads, width // heads, device=device),), ())


CASES: dict[str, Case] = {
    "embed_patches nchw uint8": embed_case("nchw"),
    "embed_patches nhwc uint8": embed_case("nhwc"),
    "embed_patches nhwc float": embed_case("nhwc float"),
    "restore_tokens": Case(
        make_restore, lambda s, x, o: mk.restore_tokens(x[0], o[0], x[1], x[2], prefix=1)
    ),
    "gelu_linear encoder": Case(
        lambda s, d: make_gelu(s, d, False), lambda s, x, o: mk.gelu_linear(*x)
    ),
    "gelu_linear decoder, g kept": Case(
        lambda s, d: make_gelu(s, d, True), lambda s, x, o: mk.gelu_linear(*x, recompute=False)
    ),
    "masked_reconstruction_loss": loss_case("patch", "nchw"),
    "masked_reconstruction_loss channel nhwc": loss_case("channel", "nhwc"),
    "masked_reconstruction_loss mask float": loss_case(None, "nchw float", use_mask=True),
    "linear_reconstruction_loss": Case(
        make_linear,
        lambda s, x, o: mk.linear_reconstruction_loss(
            *x, *o, patch_size=s.patch, mean=MEAN, std=STD
        ),
    ),
    "distillation_loss": Case(make_logits, lambda s, x, o: mk.distillation_loss(*x, center=o[0])),
    "sssd_loss": Case(
        make_sssd,
        lambda s, x, o: mk.sssd_loss(
            x[0], o[0], x[1], x[2], ids=o[1], center=o[2], patch_size=s.patch, mean=MEAN, std=STD
        ),
    ),
    "attention encoder": Case(
        lambda s, d: make_attention(s, d, False), lambda s, x, o: mk.attention(*x), True
    ),
    "attention decoder": Case(
        lambda s, d: make_attention(s, d, True), lambda s, x, o: mk.attention(*x), True
    ),
}
NAMES = pytest.mark.parametrize("name", CASES)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def results(
    call: Callable[..., Any],
    leaves: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    upstream: Tensor | None = None,
) -> list[Tensor]:
    """All results and the gradients of the first, with every leaf a fresh one."""
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    out = call(leaves, others)
    out = [out] if isinstance(out, Tensor) else list(out)
    upstream = torch.ones_like(out[0]) if upstream is None else upstream.to(out[0].dtype)
    return [*(t.detach() for t in out), *torch.autograd.grad(out[0], leaves, upstream)]


def upstream_of(case: Case, s: Sizes, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out = case.call(s, inputs.leaves, inputs.others)
    first = out if isinstance(out, Tensor) else out[0]
    return (
        torch.randn_like(first, dtype=torch.float32)
        if first.dim()
        else torch.full_like(first, 1024.0)
    )


def backward_again(call: Callable[..., Any], leaves: tuple[Tensor, ...], upstream: Tensor) -> None:
    """A second and third backward through one graph: an in-place update of a kept or returned gradient would show."""
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    out = call(leaves)
    first = out if isinstance(out, Tensor) else out[0]
    upstream = upstream.to(first.dtype)
    gradients = torch.autograd.grad(first, leaves, upstream, retain_graph=True)
    copies = [g.clone() for g in gradients]
    torch.autograd.grad(first, leaves, upstream * -0.5, retain_graph=True)
    again = torch.autograd.grad(first, leaves, upstream)
    for returned, copy, repeated in zip(gradients, copies, again, strict=True):
        assert torch.equal(returned, copy), (
            "a later backward changed a gradient that was already returned"
        )
        assert torch.equal(repeated, copy), (
            "a backward through the same graph differs from the first one"
        )


# ----------------------------------------------------------------------------------------------- the properties
def check_accuracy(
    name: str, s: Sizes, dtype: torch.dtype, device: torch.device, kernels: str
) -> None:
    """Error against fp64 at most twice that of the eager reference in the same dtype, plus a small absolute term."""
    case = CASES[name]
    inputs = case.make(s, device)
    leaves, others = tuple(t.to(dtype) for t in inputs.leaves), inputs.others
    upstream = upstream_of(case, s, inputs)
    before = [t.clone() for t in (*leaves, *others)]

    def run(chosen: str, *which: Tensor) -> list[Tensor]:
        with backend(chosen):
            return results(lambda x, o: case.call(s, x, o), which, others, upstream)

    got, again = run(kernels, *leaves), run(kernels, *leaves)
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, *others), strict=True)), (
        "an input was changed"
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    with backend(kernels):
        backward_again(lambda x: case.call(s, x, others), leaves, upstream)
    eager = run("reference", *leaves)
    exact = run("reference", *(t.double() for t in leaves))
    for i, (g, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        assert (g.shape, g.dtype) == (e.shape, e.dtype), f"result {i}"
        atol = 4e-6 * x.abs().max().item()
        if name.startswith(("distillation", "sssd")):
            # logits / temperature reach 100, where one fp32 rounding is 4e-6 and becomes the relative error of a softmax;
            # the teacher's gradient is P (-log Q - loss) / temperature: a difference of numbers as large as the loss
            atol = 5 * atol + 2**-23 * upstream.item() * exact[0].item() / (0.04 * s.batch)
        error, allowed = ((t.double() - x).abs().max().item() for t in (g, e))
        assert error <= 2 * allowed + atol, (
            f"result {i}: error {error:.3e}, eager {allowed:.3e}, atol {atol:.3e}"
        )


def check_autocast(name: str, s: Sizes, device: torch.device, kernels: str) -> None:
    """fp32 leaves under bf16 autocast: the reference's dtypes, values as near to fp64 as the reference's."""
    case = CASES[name]
    inputs = case.make(s, device)

    def run(chosen: str, autocast: bool, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        with backend(chosen), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return results(lambda x, o: case.call(s, x, o), leaves, inputs.others)

    got = run(kernels, True, inputs.leaves)
    eager = run("reference", True, inputs.leaves)
    exact = run("reference", False, tuple(t.double() for t in inputs.leaves))
    for i, (g, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        assert (g.shape, g.dtype) == (e.shape, e.dtype), f"result {i}"
        error, allowed = ((t.double() - x).abs().max().item() for t in (g, e))
        assert error <= 2 * allowed + 2e-5 * x.abs().max().item(), (
            f"result {i}: {error:.3e}, {allowed:.3e}"
        )


def check_compiled(
    name: str, s: Sizes, dtype: torch.dtype, device: torch.device, kernels: str, compiler: str
) -> None:
    """torch.compile(fullgraph=True), forward and backward, gives what eager gives."""
    case = CASES[name]
    inputs = case.make(s, device)
    leaves = tuple(t.to(dtype) for t in inputs.leaves)
    upstream = upstream_of(case, s, inputs)
    torch._dynamo.reset()
    with backend(kernels):
        want = results(lambda x, o: case.call(s, x, o), leaves, inputs.others, upstream)
        compiled = torch.compile(lambda x, o: case.call(s, x, o), fullgraph=True, backend=compiler)
        got = results(compiled, leaves, inputs.others, upstream)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        # sums and matrix products around the kernels may be ordered otherwise
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        scale = 1e-6 + torch.finfo(w.dtype).eps
        assert (g.double() - w.double()).abs().max() <= 4 * scale * w.abs().max().double(), (
            f"result {i}"
        )


def measured(device: torch.device, call: Callable[[], object]) -> int:
    """Peak bytes allocated by a call above what was there before."""
    call()  # the first call compiles and makes cuBLAS workspaces
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


class Decoded(NamedTuple):
    """A set of decoded images on the device and the boxes of one batch."""

    pixels: Tensor
    offsets: Tensor
    shapes: Tensor
    boxes: Tensor
    flips: Tensor


def decoded(
    batch: int, channels: int, device: torch.device, sides: tuple[int, int] = (150, 500)
) -> Decoded:
    shapes = torch.randint(*sides, (batch, 2))
    sizes = shapes.prod(1) * channels
    extent = (shapes * (0.4 + 0.6 * torch.rand(batch, 2))).long()
    corner = ((shapes - extent + 1) * torch.rand(batch, 2)).long()
    pixels_T = torch.randint(0, 256, (int(sizes.sum()),), dtype=torch.uint8)
    tensors = (
        pixels_T,
        sizes.cumsum(0) - sizes,
        shapes,
        torch.cat([corner, extent], 1),
        torch.rand(batch) < 0.5,
    )
    return Decoded(*(t.to(device) for t in tensors))


def check_crops(
    batch: int, channels: int, size: int, device: torch.device, kernels: str, **sides: Any
) -> None:
    """The kernel against torch's own resize on the CPU, whose weights are 16-bit numbers: seldom another grey level."""
    made = decoded(batch, channels, device, **sides)
    with backend(kernels):
        got, again = (mk.crop_resize(*made, (size, size), channels=channels) for _ in range(2))
    with backend("reference"):
        want = mk.crop_resize(*(t.cpu() for t in made), (size, size), channels=channels)
        same_device = mk.crop_resize(*made, (size, size), channels=channels)
    assert torch.equal(got, again), "two runs differ"
    for other in (want, same_device.cpu()):
        difference = (got.cpu().short() - other.short()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.02


# -------------------------------------------------------------------------------------------- without a GPU, small
CPU = torch.device("cpu")


@pytest.mark.kernel
@NAMES
def test_the_table_runs_small_on_the_cpu(name: str) -> None:
    """Protects this file: calls, comparisons and dtypes as on a GPU, with the reference on both sides or the interpreter."""
    for dtype in (torch.float32, torch.float16):
        check_accuracy(name, SMALL, dtype, CPU, "triton" if INTERPRET else "reference")
    if not INTERPRET:  # it has no bf16
        check_autocast(name, SMALL, CPU, "reference")


@pytest.mark.parametrize("name", ["sssd_loss", "attention decoder"])
def test_the_compiled_check_runs_small_on_the_cpu(name: str) -> None:
    check_compiled(name, SMALL, torch.float32, CPU, "reference", "eager")


@pytest.mark.kernel
def test_the_check_of_crops_runs_small_on_the_cpu() -> None:
    check_crops(3, 3, 12, CPU, "triton" if INTERPRET else "reference", sides=(15, 30))


# ------------------------------------------------------------------------------------------------------------ GPU
@pytest.fixture
def cuda() -> Iterator[torch.device]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.cuda.empty_cache()


def kernels_for(name: str, dtype: torch.dtype) -> str:
    """ "triton", which raises where a kernel cannot run; fp32 attention goes to SDPA by its own rule."""
    return "auto" if CASES[name].half_only and dtype == torch.float32 else "triton"


@pytest.mark.gpu
@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vit", VIT)
def test_accuracy(name: str, dtype: str, vit: str, cuda: torch.device) -> None:
    check_accuracy(name, VIT[vit], DTYPES[dtype], cuda, kernels_for(name, DTYPES[dtype]))


@pytest.mark.gpu
@NAMES
def test_autocast(name: str, cuda: torch.device) -> None:
    check_autocast(name, VIT["B"]._replace(batch=64), cuda, kernels_for(name, torch.float32))


@pytest.mark.gpu
@NAMES
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiled(name: str, dtype: str, cuda: torch.device) -> None:
    size = VIT["B"]._replace(batch=64)
    check_compiled(name, size, DTYPES[dtype], cuda, kernels_for(name, DTYPES[dtype]), "inductor")


@pytest.mark.gpu
@NAMES
def test_captured_graph(name: str, cuda: torch.device) -> None:
    """Forward and backward inside one CUDA graph, replayed with new inputs, equal the eager run bit by bit."""
    case, s = CASES[name], VIT["B"]._replace(batch=64)
    static, fresh = case.make(s, cuda), case.make(s, cuda)
    leaves = tuple(t.bfloat16().requires_grad_() for t in static.leaves)

    def step() -> list[Tensor]:
        out = case.call(s, leaves, static.others)
        out = [out] if isinstance(out, Tensor) else list(out)
        return [*out, *torch.autograd.grad(out[0], leaves, torch.ones_like(out[0]))]

    with backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for kept, new in zip(
                (*leaves, *static.others), (*fresh.leaves, *fresh.others), strict=True
            ):
                kept.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        want = results(lambda x, o: case.call(s, x, o), leaves, static.others)
    for got, eager in zip(captured, want, strict=True):
        if name.startswith(
            ("embed", "linear", "gelu")
        ):  # cuBLAS has another workspace while a graph is captured
            assert (got.double() - eager.double()).abs().max() <= 4 * torch.finfo(
                got.dtype
            ).eps * eager.abs().max()
        else:
            assert torch.equal(got.detach(), eager)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("patches", [196, 4096])
def test_masking_and_gather(batch: int, patches: int, cuda: torch.device) -> None:
    noise = torch.rand(batch, patches, device=cuda)
    noise[:, 5] = noise[:, 3]  # a tie
    images = torch.randint(
        0, 256, (batch, 4, 4 * patches // 64, 256), dtype=torch.uint8, device=cuda
    )
    images = images.to(memory_format=torch.channels_last)
    if patches == 196:
        images = pixels(VIT["B"]._replace(batch=batch), cuda, "nhwc")
    side = 16 if patches == 196 else 4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with backend("triton"):
            got = mk.random_masking(noise.to(dtype), patches // 4)
            vectors = mk.gather_patches(images, got.ids_keep, side, dtype=dtype)
        with backend("reference"):
            want = mk.random_masking(noise.to(dtype), patches // 4)
            exact = mk.gather_patches(images, want.ids_keep, side, dtype=torch.float64)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert (vectors.double() - exact).abs().max() <= torch.finfo(
            dtype
        ).eps  # values up to 1: one rounding


@pytest.mark.gpu
def test_memory_of_the_losses(cuda: torch.device) -> None:
    """Above the inputs: one gradient of the masked predictions; with the head inside, no predictions at full size."""
    s = VIT["B"]
    slack = 8 * 2**20  # per-patch losses, partial sums, allocator rounding

    def peak(name: str) -> tuple[int, Inputs]:
        case = CASES[name]
        made = case.make(s, cuda)
        inputs = Inputs(tuple(t.bfloat16().requires_grad_() for t in made.leaves), made.others)

        def step() -> object:
            out = case.call(s, *inputs)
            return torch.autograd.grad(out if isinstance(out, Tensor) else out[0], inputs.leaves)

        with backend("triton"):
            return measured(cuda, step), inputs

    for name in (
        "masked_reconstruction_loss",
        "masked_reconstruction_loss channel nhwc",
        "sssd_loss",
    ):
        got, inputs = peak(name)
        gradients = sum(t.numel() * t.element_size() for t in inputs.leaves)
        assert got <= gradients + slack, f"{name}: {got} bytes, its gradients are {gradients}"
    got, inputs = peak("linear_reconstruction_loss")
    hidden, weight, _ = inputs.leaves
    predictions = hidden.shape[0] * hidden.shape[1] * weight.shape[0] * 2
    # hidden's gradient, as kept and as returned; an eighth of predictions, their gradient, and copies of that part of hidden
    stated = (
        2 * hidden.numel() * 2
        + (2 * predictions + 2 * hidden.numel() * 2) // 8
        + 16 * weight.numel()
        + slack
    )
    assert got <= stated, f"{got} bytes, stated {stated}"
    kept: list[int] = []
    with (
        backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
    ):
        CASES["linear_reconstruction_loss"].call(s, *inputs)
    assert max(kept) <= hidden.numel() < predictions // 2, (
        "what is kept for the backward is no prediction"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_gelu_linear(recompute: bool, cuda: torch.device) -> None:
    """Three tensors of x's size at the peak, forward and backward; between the two g, or nothing of that size."""
    leaves = tuple(t.bfloat16().requires_grad_() for t in make_gelu(VIT["B"], cuda, True).leaves)
    x, _, weight, _ = leaves
    out_bytes = x.nbytes * weight.shape[0] // weight.shape[1]
    slack = 16 * 2**20  # partial sums, gradients of the parameters, workspaces, allocator rounding

    def step() -> object:
        out = mk.gelu_linear(*leaves, recompute=recompute)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    def forward() -> object:
        return mk.gelu_linear(*leaves, recompute=recompute)

    with backend("triton"):
        assert measured(cuda, step) <= 3 * x.nbytes + 2 * out_bytes + slack
        before = torch.cuda.memory_allocated(cuda)
        out = forward()
        kept = torch.cuda.memory_allocated(cuda) - before
    assert kept <= (0 if recompute else x.nbytes) + out_bytes + slack
    del out


def free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["gather_patches", "embed_patches", "restore_tokens", "masked_reconstruction_loss"]
)
def test_offsets_beyond_two_to_the_31(name: str, cuda: torch.device) -> None:
    """The last image of a batch of more than 2^31 elements gives what it gives alone."""
    need, free = 26 * GIB, free_bytes()
    if free < need:
        pytest.skip(f"{free / GIB:.1f} GiB of GPU memory are free and {need / GIB:.0f} are needed")
    if name in ("gather_patches", "embed_patches"):
        side, images = 224, 2**31 // (3 * 224 * 224) + 3
        x = torch.zeros(images, 3, side, side, dtype=torch.uint8, device=cuda)
        x[-1] = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, device=cuda)
        listed = torch.randint(0, 196, (images, 2), device=cuda)
        weight = torch.randn(64, 3, 16, 16, device=cuda, dtype=torch.bfloat16)
        pos = torch.randn(196, 64, device=cuda, dtype=torch.bfloat16)

        def call(x: Tensor, listed: Tensor) -> Tensor:
            if name == "gather_patches":
                return mk.gather_patches(x, listed, 16, mean=MEAN, std=STD, dtype=torch.bfloat16)
            return mk.embed_patches(x, listed, weight, None, pos, mean=MEAN, std=STD)

        with backend("triton"):
            last, alone = call(x, listed)[-1:], call(x[-1:].clone(), listed[-1:])
        # cuBLAS orders the sums of a small product in another way
        atol = (
            0.0
            if name == "gather_patches"
            else 4 * torch.finfo(torch.bfloat16).eps * alone.abs().max().item()
        )
        torch.testing.assert_close(last, alone, rtol=0, atol=atol)
        return
    width, patches = (512, 196) if name == "restore_tokens" else (768, 147)
    images = 2**31 // (width * patches) + 3
    if name == "restore_tokens":
        order = torch.randperm(196, device=cuda).expand(images, -1)
        token, pos = (torch.randn(n, 512, device=cuda, dtype=torch.bfloat16) for n in (1, 197))
        visible = torch.zeros(images, 50, 512, device=cuda, dtype=torch.bfloat16)
        visible[-1] = torch.randn(50, 512, device=cuda)
        upstream = torch.zeros(images, 197, 512, device=cuda, dtype=torch.bfloat16)
        upstream[-1] = torch.randn(197, 512, device=cuda)

        def restore(visible: Tensor, order: Tensor, upstream: Tensor) -> list[Tensor]:
            leaf = visible.detach().requires_grad_()
            out = mk.restore_tokens(leaf, order, token[0], pos, prefix=1)
            return [
                out.detach()[-1:].clone(),
                torch.autograd.grad(out, leaf, upstream)[0][-1:].clone(),
            ]

        with backend("triton"):
            many = restore(visible, order, upstream)
            alone = restore(visible[-1:].clone(), order[-1:], upstream[-1:].clone())
        assert all(torch.equal(a, b) for a, b in zip(many, alone, strict=True))
        return
    pred = torch.zeros(images, 147, 768, device=cuda, dtype=torch.bfloat16)
    pred[-1] = torch.randn(147, 768, device=cuda)
    pred.requires_grad_()
    x = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, device=cuda).expand(
        images, -1, -1, -1
    )
    listed = torch.randperm(196, device=cuda)[:147].expand(images, -1)
    with backend("triton"):
        loss = mk.masked_reconstruction_loss(pred, x, ids=listed, patch_size=16)
        (gradient,) = torch.autograd.grad(loss, pred, torch.full_like(loss, float(images)))
        last = pred.detach()[-1:].clone().requires_grad_()
        alone = mk.masked_reconstruction_loss(last, x[-1:], ids=listed[-1:], patch_size=16)
        (want,) = torch.autograd.grad(alone, last)
    difference = (gradient[-1:].double() - want.double()).abs().max()
    assert difference <= 2 * torch.finfo(torch.bfloat16).eps * want.abs().max().double()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_linear_beyond_two_to_the_31(recompute: bool, cuda: torch.device) -> None:
    """The last row of more than 2^31 elements gives what it gives alone, and the sums are its gradients."""
    need, free = 26 * GIB, free_bytes()
    if free < need:
        pytest.skip(f"{free / GIB:.1f} GiB of GPU memory are free and {need / GIB:.0f} are needed")
    rows = 2**31 // 2048 + 3
    x, upstream = (torch.zeros(rows, n, device=cuda, dtype=torch.bfloat16) for n in (2048, 64))
    x[-1] = torch.randn(2048, device=cuda)
    upstream[-1] = torch.randn(64, device=cuda)
    parameters = [
        torch.randn(n, device=cuda, dtype=torch.bfloat16) for n in ((2048,), (64, 2048), (64,))
    ]

    def call(x: Tensor, upstream: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        out = mk.gelu_linear(*leaves, recompute=recompute)
        dx, *sums = torch.autograd.grad(out, leaves, upstream)
        return [out.detach()[-1:].clone(), dx[-1:].clone(), *sums]

    with backend("triton"):
        many, alone = call(x, upstream), call(x[-1:].clone(), upstream[-1:].clone())
    for got, want in zip(
        many, alone, strict=True
    ):  # cuBLAS orders the sums of a small product in another way
        atol = 4 * torch.finfo(torch.bfloat16).eps * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.gpu
@NAMES
def test_tensors_on_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device here and 2 are needed")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    check_accuracy(name, SMALL, torch.bfloat16, other, "triton")


@pytest.mark.gpu
def test_attention_takes_sdpa_for_fp32(cuda: torch.device) -> None:
    qkv = torch.randn(4, 50, 3, 12, 64, device=cuda)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert torch.equal(mk.attention(qkv), F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_resize(channels: int, cuda: torch.device) -> None:
    for size in (96, 224):
        check_crops(64, channels, size, cuda, "triton")
    made = decoded(64, channels, cuda)
    torch._dynamo.reset()
    with backend("triton"):
        want = mk.crop_resize(*made, (224, 224), channels=channels)
        compiled = torch.compile(
            lambda *a: mk.crop_resize(*a, (224, 224), channels=channels), fullgraph=True
        )
        assert torch.equal(compiled(*made), want)


@pytest.mark.gpu
def test_crop_resize_in_a_captured_graph(cuda: torch.device) -> None:
    """Replayed with other boxes of the same pixels, as a loader does."""
    made = decoded(64, 1, cuda)
    other = made._replace(
        boxes=made.boxes.flip(0), shapes=made.shapes.flip(0), offsets=made.offsets.flip(0)
    )
    with backend("triton"):
        want = mk.crop_resize(*other, (224, 224))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = mk.crop_resize(*made, (224, 224))
        for kept, new in zip(made[1:], (t.clone() for t in other[1:]), strict=True):
            kept.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_crop_resize_beyond_two_to_the_31(cuda: torch.device) -> None:
    """The last image of more than 2^31 pixels, as the last of a batch of more than 2^31, gives what it gives alone."""
    need, free = 6 * GIB, free_bytes()
    if free < need:
        pytest.skip(f"{free / GIB:.1f} GiB of GPU memory are free and {need / GIB:.0f} are needed")
    image = torch.randint(0, 256, (200 * 300,), dtype=torch.uint8, device=cuda)
    pixels_T = torch.zeros(2**31 + len(image), dtype=torch.uint8, device=cuda)
    pixels_T[-len(image) :] = image
    place = torch.tensor([[2**31, 200, 300, 5, 7, 180, 240]], device=cuda)

    def call(pixels_T: Tensor, place: Tensor) -> Tensor:
        flips = torch.ones(len(place), dtype=torch.bool, device=cuda)
        return mk.crop_resize(
            pixels_T, place[:, 0], place[:, 1:3], place[:, 3:7], flips, (224, 224)
        )

    with backend("triton"):
        many = call(pixels_T, place.expand(2**31 // 224**2 + 2, -1))
        place[:, 0] = 0
        alone = call(image, place)
    assert torch.equal(many[-1:], alone) and torch.equal(many[:1], alone)


@pytest.mark.gpu
def test_crop_resize_out_of_range(cuda: torch.device) -> None:
    """Zeros, or an error with debug_checks."""
    made = decoded(8, 1, cuda)
    made.boxes[3, 1] = 10**6
    with backend("triton"):
        got = mk.crop_resize(*made, (32, 32))
        assert not got[3].any() and got[2].any() and got[4].any()
        mk.debug_checks(True)
        try:
            with pytest.raises(
                ValueError, match=r"boxes: got \(top, left, height, width\) = .* for image 3"
            ):
                mk.crop_resize(*made, (32, 32))
        finally:
            mk.debug_checks(False)
