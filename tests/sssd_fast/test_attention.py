"""Attention providers: each equals softmax(q k^T * scale) v in fp64, forward and backward; none
that cannot run is chosen.

What needs xformers but no GPU runs in a separate process, in which its flash kernels are replaced
by the formula on
the CPU: its dispatch, its autograd function and its rules about devices are the real ones.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mae_kernels
from sssd_fast import attention
from sssd_fast.attention import PROVIDERS, AttentionChoice, AttentionShape, attend, choose, refusal
from sssd_fast.errors import ConfigError, DependencyError
from sssd_fast.run.device import AUTOCAST, pick_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# on a CPU; `fused` computes its reference there, which tests how it is called
HERE = ("fused", "sdpa", "eager")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_CPU = AttentionShape(CPU, torch.float32, 50, 12, 64)
has_xformers = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xformers is not installed"
)


def by_hand(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The formula, in the dtype of qkv, but with sums of exponentials in at least fp32."""
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = (weights / weights.sum(-1, keepdim=True)).to(qkv.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


Op = Callable[[Tensor], Tensor]


def results(op: Op, qkv: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = op(leaf)
    return [out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]]


def agree(op: Op, hand: Op, qkv: Tensor, atol: float = 1e-6) -> None:
    """Output and gradient are at most twice as far from fp64 as the formula in qkv's dtype is."""
    upstream = torch.randn(hand(qkv).shape, device=qkv.device).to(qkv.dtype)
    got, eager = results(op, qkv, upstream), results(hand, qkv, upstream)
    exact = results(hand, qkv.double(), upstream.double())
    assert got[0].is_contiguous()
    for what, g, x, e in zip(("output", "gradient"), got, exact, eager, strict=True):
        assert (g.shape, g.dtype) == (x.shape, qkv.dtype)
        error = (g - x).abs().max()
        allowed = 2 * (e - x).abs().max() + atol * max(1.0, x.abs().max())
        assert error <= allowed, f"{what}: error {error:.2e} against fp64, allowed {allowed:.2e}"


def strided(qkv: Tensor) -> Tensor:
    """The same values, with gaps of NaN between the heads' values."""
    shape = (*qkv.shape[:-1], qkv.shape[-1] + 8)
    wide = torch.full(shape, float("nan"), dtype=qkv.dtype, device=qkv.device)
    wide[..., : qkv.shape[-1]] = qkv
    return wide[..., : qkv.shape[-1]]


def check_provider(provider: str, qkv: Tensor) -> None:
    agree(lambda x: attend(x, provider), by_hand, qkv)
    agree(lambda x: attend(x, provider, 0.3), lambda x: by_hand(x, 0.3), strided(qkv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 3, 3, 64), (2, 37, 3, 2, 32), (2, 1, 3, 1, 8)], ids=str)
@pytest.mark.parametrize("provider", HERE)
def test_provider_equals_the_formula(
    provider: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_provider(provider, torch.randn(shape).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 50, 3, 12, 64), (4, 197, 3, 16, 32), (2, 197, 3, 12, 64)], ids=str
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_provider_equals_the_formula_on_a_gpu(
    provider: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    reason = refusal(provider, AttentionShape(CUDA, dtype, shape[1], shape[3], shape[4]))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    check_provider(provider, torch.randn(shape, device="cuda").to(dtype))


def check_compiled(provider: str, qkv: Tensor, backend: str, tolerance: dict[str, float]) -> None:
    torch._dynamo.reset()

    def layer(x: Tensor) -> Tensor:
        return attend(x.sin(), provider, 0.2) * 2

    upstream = torch.randn(qkv[:, :, 0].shape, device=qkv.device).to(qkv.dtype)
    compiled = results(torch.compile(layer, fullgraph=True, backend=backend), qkv, upstream)
    for one, other in zip(compiled, results(layer, qkv, upstream), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("provider", HERE)
def test_provider_traces_as_one_graph(provider: str) -> None:
    exact = {"rtol": 0, "atol": 1e-6}
    check_compiled(provider, torch.randn(2, 20, 3, 2, 16), "aot_eager", exact)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS)
def test_provider_compiles_as_one_graph_on_a_gpu(provider: str) -> None:
    dtype = AUTOCAST[pick_precision("auto", CUDA)]
    reason = refusal(provider, AttentionShape(CUDA, dtype, 50, 12, 64, compiled=True))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    qkv = torch.randn(4, 50, 3, 12, 64, device="cuda").to(dtype)
    check_compiled(provider, qkv, "inductor", {"rtol": 1e-2, "atol": 1e-2})


class Recorded(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def copies(self) -> int:
        return sum(name in ("clone", "copy_", "_to_copy", "stack", "cat") for name in self.names)


def test_sdpa_copies_nothing_forward_and_writes_the_gradient_once_in_the_order_of_qkv() -> None:
    qkv = torch.randn(2, 20, 3, 2, 16, requires_grad=True)
    with Recorded() as forward:
        out = attend(qkv * 1, "sdpa")
    upstream = torch.randn(out.shape)
    with Recorded() as backward:
        (gradient,) = torch.autograd.grad(out, qkv, upstream)
    assert (forward.copies, backward.copies) == (0, 1)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("provider", HERE)
def test_attend_ignores_autocast(provider: str) -> None:
    qkv = torch.randn(2, 20, 3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(qkv, provider)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, attend(qkv, provider))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eager_equals_the_published_code_under_autocast(dtype: torch.dtype) -> None:
    """Bit for bit, forward and backward: the softmax is fp32, its gradient too."""

    def published(qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            weights = ((q @ k.transpose(-2, -1)) * 16**-0.5).float().softmax(dim=-1)
            return (weights @ v).transpose(1, 2)

    qkv = torch.randn(2, 20, 3, 2, 16).to(dtype)
    upstream = torch.randn(2, 20, 2, 16).to(dtype)
    found = results(lambda x: attend(x, "eager"), qkv, upstream)
    for got, expected in zip(found, results(published, qkv, upstream), strict=True):
        assert torch.equal(got, expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"qkv: got shape \(2, 5, 2, 2, 8\), needs \[B, N, 3, H"):
        attend(torch.zeros(2, 5, 2, 2, 8), "sdpa")
    wrong = "provider: got 'flash', needs one of fused, xformers, sdpa, eager"
    with pytest.raises(ValueError, match=wrong):
        attend(torch.zeros(2, 5, 3, 2, 8), "flash")
    with pytest.raises(ValueError, match=wrong):
        refusal("flash", ON_CPU)


# ---- choosing ------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes for other GPUs are judged alone, also on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def on(
    capability: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 50,
    width: int = 64,
) -> AttentionShape:
    return AttentionShape(CUDA, dtype, tokens, 12, width, compiled=True, capability=capability)


@pytest.mark.parametrize(
    ("shape", "not_fused"),
    [
        (on((8, 0), torch.float16), None),
        (on((9, 0), tokens=197, width=32), None),
        (on((8, 6), tokens=224), None),
        (on((12, 0), tokens=197, width=32), None),
        (on((7, 5), torch.float16), "tensor cores of sm_80 or newer, this is sm_75"),
        (on((8, 6), tokens=225), "1 to 224 tokens with heads of 64 on sm_86"),
        (on((12, 0), tokens=197), "1 to 128 tokens with heads of 64 on sm_120"),
        (on((9, 0), torch.float32), "fp16 and bf16, not float32"),
        (on((9, 0), width=80), "heads of 16, 32, 64, 128 values, not of 80"),
        (ON_CPU, "no kernel for the cpu"),
    ],
)
def test_auto_takes_fused_else_sdpa(
    shape: AttentionShape, not_fused: str | None, no_gpu_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "load_xformers", lambda: pytest.fail("it was imported"))
    choice = choose("auto", shape)
    assert choice.provider == ("sdpa" if not_fused else "fused")
    assert choice.unavailable.keys() == ({"fused"} if not_fused else set())
    assert (not_fused or "") in choice.unavailable.get("fused", "")


def test_xformers_compiled_needs_its_flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch cannot trace the backward of the memory-efficient kernels as xformers calls it."""
    monkeypatch.setattr(attention, "_xformers", (object(), None))
    assert refusal("xformers", on((8, 0))) is None
    for shape in (on((7, 5), torch.float16), on((8, 0), torch.float32), on((8, 0), width=264)):
        reason = refusal("xformers", shape)
        assert "compiled it takes only fp16 and bf16 on sm_80 or newer" in str(reason)
        assert refusal("xformers", replace(shape, compiled=False)) is None
        assert refusal("xformers", replace(shape, training=False)) is None


def test_fused_is_refused_with_the_reason_of_mae_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with mae_kernels.backend("reference"):
        reasons = mae_kernels.info()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mae_kernels, "info", lambda: reasons)
    assert (
        refusal("fused", on((9, 0))) == reasons["attention"] == "the backend is set to 'reference'"
    )


def test_choose_names_the_reason_and_the_providers_that_can_run() -> None:
    with pytest.raises(ConfigError) as raised:
        choose("fused", ON_CPU, "step.decoder_attention")
    assert str(raised.value) == (
        "step.decoder_attention is 'fused', which cannot run here (50 tokens, 12 heads of 64, "
        "fp32): "
        "it has no kernel for the cpu, where sdpa would compute it; set it to auto, sdpa, eager"
    )
    with pytest.raises(
        ConfigError, match=r"step\.attention is 'flash', needs auto or one of fused"
    ):
        choose("flash", ON_CPU)
    assert choose("eager", ON_CPU).provider == "eager"


def test_choice_line_gives_provider_and_reasons() -> None:
    refused = {"fused": "it cannot"}
    choice = AttentionChoice("sdpa", "it can", on((9, 0)), "step.decoder_attention", refused)
    where = "decoder attention (50 tokens, 12 heads of 64, bf16)"
    assert choice.line() == f"{where}: sdpa, because it can; not fused: it cannot"


@pytest.mark.gpu
def test_shape_asks_the_gpu_for_its_capability() -> None:
    shape = AttentionShape(CUDA, torch.float16, 50, 12, 64)
    assert shape.capability == torch.cuda.get_device_capability()


# ---- xformers ------------------------------------------------------------------------------------


@pytest.fixture
def fake_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """fake_xformers(code of xformers, code of xformers.ops or None): what `import xformers`
    finds.
    """

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "xformers"]

    real = {name: sys.modules.pop(name) for name in loaded()}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attention, "_xformers", None)

    def write(package: str, ops: str | None = None) -> None:
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").write_text(textwrap.dedent(package))
        if ops is not None:
            (tmp_path / "xformers" / "ops.py").write_text(textwrap.dedent(ops))

    yield write
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(real)


NOISY = """
    import logging, sys, warnings
    print("to stdout")
    print("to stderr", file=sys.stderr)
    warnings.warn("a warning")
    logging.getLogger("xformers").warning("WARNING[XFORMERS]: cannot load")
"""
OTHER_CUDA = """
    class _cpp_lib:
        _cpp_library_load_exception = RuntimeError("xFormers can't load C++/CUDA extensions")
        _cpp_library_load_exception.__cause__ = OSError("libcudart.so.12: cannot open")
"""
WORKS = "def memory_efficient_attention(): pass"
ABSENT = "raise ModuleNotFoundError(\"No module named 'xformers'\", name='xformers')"


@pytest.mark.parametrize(
    ("package", "ops", "reason"),
    [
        (
            "raise OSError('libcudart: missing')",
            None,
            "import fails: OSError('libcudart: missing')",
        ),
        ("raise SystemExit(3)", None, "its import fails: SystemExit(3)"),
        (NOISY + "    raise RuntimeError('late')", None, "its import fails: RuntimeError('late')"),
        ("", "memory_efficient_attention = None", "it has no memory_efficient_attention"),
        (OTHER_CUDA, WORKS, "no GPU can be used: OSError('libcudart.so.12: cannot open')"),
        (ABSENT, None, "not installed (pip install 'sssd-fast[xformers]')"),
        (NOISY, WORKS, None),
    ],
)
def test_broken_xformers_is_reported_and_prints_nothing(
    package: str,
    ops: str | None,
    reason: str | None,
    fake_xformers: Callable[..., None],
    no_gpu_here: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_xformers(package, ops)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = refusal("xformers", on((9, 0)))
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
    assert warned == []
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    logging.getLogger("xformers").warning("logging works again")
    assert len(caplog.records) == 1
    if reason is not None:
        with pytest.raises(ConfigError) as raised:
            choose("xformers", on((9, 0)))
        assert str(found) in str(raised.value)
        assert str(raised.value).endswith("set it to auto, fused, sdpa, eager")
        with pytest.raises(DependencyError):
            attend(torch.zeros(1, 2, 3, 1, 8), "xformers")


def test_xformers_is_imported_late_and_once(
    fake_xformers: Callable[..., None], no_gpu_here: None, tmp_path: Path
) -> None:
    fake_xformers(f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\nraise OSError('broken')")
    choose("auto", on((9, 0)))
    assert refusal("xformers", ON_CPU) == "its attention needs an NVIDIA GPU"
    assert not (tmp_path / "imports").exists()
    for _ in range(3):
        assert "OSError('broken')" in str(refusal("xformers", on((9, 0))))
    assert (tmp_path / "imports").read_text() == "x"


def test_xformers_gets_views_of_qkv_and_the_scale(fake_xformers: Callable[..., None]) -> None:
    ops = """
        import torch
        seen = []

        def memory_efficient_attention(query, key, value, scale=None):
            seen.append((query, key, value))
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
            return out.transpose(1, 2)
    """
    fake_xformers("", ops)
    qkv = torch.randn(2, 7, 3, 2, 16)
    agree(lambda x: attend(x, "xformers", 0.3), lambda x: by_hand(x, 0.3), qkv)
    seen = attention.load_xformers()[0].seen
    assert all(x.shape == (2, 7, 2, 16) and x.stride() == (672, 96, 16, 1) for x in seen[0])


# Every capability, dtype and head width has a forward and a backward exactly if it is not refused;
# then, with the flash kernels replaced on the CPU, xformers equals the formula, compiled as one
# graph too.
REAL_XFORMERS = """
import logging
logging.disable(logging.WARNING)
import torch
torch.version.cuda = "12.8"
torch.backends.cuda.is_flash_attention_available = lambda: True
import xformers.ops
from xformers.ops import fmha
fmha.common._built_with_cuda = True  # the compiled part is not used for attention
from torch._subclasses.fake_tensor import FakeTensorMode
from sssd_fast import attention
from sssd_fast.attention import AttentionShape, attend, refusal
torch.version.hip = None
wrong, counts = [], [0, 0]
real = torch.cuda.get_device_capability
for capability in [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]:
    torch.cuda.get_device_capability = lambda device=None: capability
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for width in (8, 12, 30, 32, 64, 80, 100, 128, 256, 264):
            shape = AttentionShape(torch.device("cuda"), dtype, 50, 2, width, capability=capability)
            with FakeTensorMode():
                q = torch.empty(2, 50, 3, 2, width, device="cuda", dtype=dtype)
                inputs = fmha.Inputs(*q.unbind(2))
                try:
                    fmha._dispatch_fw(inputs, True), fmha._dispatch_bw(inputs, None)
                    can = True
                except (NotImplementedError, KeyError):  # KeyError: it has no alignment for fp64
                    can = False
            refused = refusal("xformers", shape, xformers_problem=lambda: None)
            counts[can] += 1
            if can == (refused is not None):
                wrong.append((capability, dtype, width, can, refused))
torch.cuda.get_device_capability = real
print(wrong, min(counts) > 20)

for cls in (fmha.flash.FwOp, fmha.flash.BwOp):
    cls.SUPPORTED_DEVICES = {"cpu"}

def probabilities(q, k, scale):
    s = torch.einsum("...nhd,...mhd->...hnm", q.double(), k.double()) * scale
    return s.softmax(-1), s.logsumexp(-1).float()

@torch.library.register_kernel("xformers_flash::flash_fwd", "cpu")
def forward(q, k, v, cu, cu_k, seqused_k, max_q, max_k, p, scale, *rest):
    P, lse = probabilities(q, k, scale)
    out = torch.einsum("...hnm,...mhd->...nhd", P, v.double()).to(q.dtype).contiguous()
    return out, lse.contiguous(), torch.zeros(2, dtype=torch.int64)

@torch.library.register_kernel("xformers_flash::flash_bwd", "cpu")
def backward(share, grad, q, k, v, out, lse, cu, cu_k, max_q, max_k, p, scale, *rest):
    P, _ = probabilities(q, k, scale)
    g = grad.double()
    dP = torch.einsum("...nhd,...mhd->...hnm", g, v.double())
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * scale
    parts = (
        torch.einsum("...hnm,...mhd->...nhd", dS, k.double()),
        torch.einsum("...hnm,...nhd->...mhd", dS, q.double()),
        torch.einsum("...hnm,...nhd->...mhd", P, g),
    )
    return tuple(x.to(q.dtype).contiguous() for x in parts)

attention._xformers = (xformers.ops, None)
torch.manual_seed(0)
qkv = torch.randn(2, 21, 3, 2, 16).half()
plain = lambda x: attend(x, "xformers", 0.3)

def results(op, x):
    x = x.clone().requires_grad_()
    out = op(x)
    (out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
    return out.detach(), x.grad

exact = results(lambda x: attend(x, "eager", 0.3), qkv.double())
for op in (plain, torch.compile(plain, fullgraph=True, backend="aot_eager")):
    errors = [(a.double() - b.double()).abs().max() for a, b in zip(results(op, qkv), exact)]
    print(max(errors).item() < 3e-3)
"""


@has_xformers
def test_xformers_follows_its_own_rules_and_equals_the_formula() -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", REAL_XFORMERS]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:3] == ["[] True", "True", "True"]
