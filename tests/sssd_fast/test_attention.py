"""Attention providers: each equals softmax(q k^T * scale) v in fp64, forward and backward; none
that cannot run is chosen.
"""

from __future__ import annotations

import logging
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
from sssd_fast.attention import PROVIDERS, AttentionShape, attend, choose, refusal
from sssd_fast.errors import ConfigError, DependencyError
from sssd_fast.run.device import AUTOCAST, pick_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# on a CPU; `fused` computes its reference there, which tests how it is called
HERE = ("fused", "sdpa", "eager")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_CPU = AttentionShape(CPU, torch.float32, 50, 12, 64)


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


ON_GPU = [pytest.param(CUDA, provider, marks=pytest.mark.gpu) for provider in PROVIDERS]
everywhere = pytest.mark.parametrize(
    ("device", "provider"), [*((CPU, provider) for provider in HERE), *ON_GPU], ids=str
)


def skip_if_refused(provider: str, shape: AttentionShape) -> None:
    if shape.device.type == "cuda" and (reason := refusal(provider, shape)) is not None:
        pytest.skip(f"{provider} refuses: {reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 50, 3, 12, 64), (2, 197, 3, 2, 32), (2, 1, 3, 1, 8)], ids=str
)
@everywhere
def test_provider_equals_the_formula(
    device: torch.device, provider: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    skip_if_refused(provider, AttentionShape(device, dtype, shape[1], shape[3], shape[4]))
    qkv = torch.randn(shape, device=device).to(dtype)
    agree(lambda x: attend(x, provider), by_hand, qkv)
    agree(lambda x: attend(x, provider, 0.3), lambda x: by_hand(x, 0.3), strided(qkv))


@everywhere
def test_provider_compiles_as_one_graph(device: torch.device, provider: str) -> None:
    cuda = device.type == "cuda"
    dtype = AUTOCAST[pick_precision("auto", CUDA)] if cuda else torch.float32
    skip_if_refused(provider, AttentionShape(device, dtype, 50, 12, 64, compiled=True))
    torch._dynamo.reset()

    def layer(x: Tensor) -> Tensor:
        return attend(x.sin(), provider, 0.2) * 2

    qkv = torch.randn(4, 50, 3, 12, 64, device=device).to(dtype)
    upstream = torch.randn_like(qkv[:, :, 0])
    backend = "inductor" if cuda else "aot_eager"
    compiled = results(torch.compile(layer, fullgraph=True, backend=backend), qkv, upstream)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if cuda else {"rtol": 0, "atol": 1e-6}
    for one, other in zip(compiled, results(layer, qkv, upstream), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


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


def on(capability: tuple[int, int], tokens: int = 50) -> AttentionShape:
    return AttentionShape(CUDA, torch.bfloat16, tokens, 12, 64, True, capability)


@pytest.mark.parametrize(
    ("shape", "not_fused"),
    [
        (on((8, 0)), None),
        (on((8, 6), tokens=225), "1 to 224 tokens with heads of 64 on sm_86"),
        (ON_CPU, "on a CPU its products take bf16, not float32"),
    ],
)
def test_auto_takes_fused_else_sdpa(
    shape: AttentionShape, not_fused: str | None, no_gpu_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "load_xformers", lambda: pytest.fail("it was imported"))
    provider, line = choose("auto", shape, "step.decoder_attention")
    assert provider == ("sdpa" if not_fused else "fused")
    assert line.startswith(f"decoder attention ({shape}): {provider}, because ")
    assert ("; not fused: " in line) is (not_fused is not None)
    assert (not_fused or "") in line


def test_fused_is_refused_with_the_reason_of_mae_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with mae_kernels.backend("reference"):
        reasons = mae_kernels.info()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mae_kernels, "info", lambda: reasons)
    assert refusal("fused", on((9, 0))) == "the backend is set to 'reference'"


def test_choose_names_the_reason_and_the_providers_that_can_run() -> None:
    with pytest.raises(ConfigError) as raised:
        choose("fused", ON_CPU, "step.decoder_attention")
    assert str(raised.value) == (
        "step.decoder_attention is 'fused', which cannot run here (50 tokens, 12 heads of 64, "
        "fp32): on a CPU its products take bf16, not float32; set it to auto, sdpa, eager"
    )
    with pytest.raises(ConfigError, match=r"step\.attention is 'flash', needs auto or one of"):
        choose("flash", ON_CPU)
    assert choose("eager", ON_CPU)[0] == "eager"


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
        (NOISY + "    raise SystemExit(3)", None, "its import fails: SystemExit(3)"),
        ("", "memory_efficient_attention = None", "it has no memory_efficient_attention"),
        (OTHER_CUDA, WORKS, "no GPU can be used: OSError('libcudart.so.12: cannot open')"),
        (ABSENT, None, "not installed (pip install 'sssd-fast[xformers]')"),
    ],
)
def test_broken_xformers_is_reported_and_prints_nothing(
    package: str,
    ops: str | None,
    reason: str,
    fake_xformers: Callable[..., None],
    no_gpu_here: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_xformers(package, ops)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert reason in str(refusal("xformers", on((9, 0))))
    assert (warned, caplog.records, capfd.readouterr()) == ([], [], ("", ""))
    logging.getLogger("xformers").warning("logging works again")
    assert len(caplog.records) == 1
    with pytest.raises(ConfigError) as raised:
        choose("xformers", on((9, 0)))
    assert reason in str(raised.value)
    assert str(raised.value).endswith("set it to auto, fused, sdpa, eager")
    with pytest.raises(DependencyError):
        attend(torch.zeros(1, 2, 3, 1, 8), "xformers")


SDPA = """
    import torch
    seen = []

    def memory_efficient_attention(query, key, value, scale=None):
        if query.dtype == torch.float64:
            raise NotImplementedError("No operator found\\nfor float64")
        if not torch.compiler.is_compiling():
            seen.append((query, key, value))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if query.shape[-1] > 64:
            q = q.detach().requires_grad_() * torch.tensor(q.sum().item())
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2)
"""


def test_xformers_gets_views_of_qkv_and_the_scale(fake_xformers: Callable[..., None]) -> None:
    fake_xformers("", SDPA)
    qkv = torch.randn(2, 7, 3, 2, 16)
    ops = attention.load_xformers()[0]
    attend(qkv, "xformers")
    assert all(x.shape == (2, 7, 2, 16) and x.stride() == (672, 96, 16, 1) for x in ops.seen[0])
    agree(lambda x: attend(x, "xformers", 0.3), lambda x: by_hand(x, 0.3), qkv)


def test_xformers_problem_is_the_error_of_a_test_run(fake_xformers: Callable[..., None]) -> None:
    """A missing operator; compiled, a function that cannot be traced as one graph."""
    fake_xformers("", SDPA)
    attention.load_xformers()
    eager = AttentionShape(CPU, torch.float32, 7, 2, 16)
    assert attention.xformers_problem(eager) is None
    assert attention.xformers_problem(replace(eager, compiled=True)) is None
    assert attention.xformers_problem(replace(eager, head_width=128)) is None
    wide = attention.xformers_problem(replace(eager, head_width=128, compiled=True))
    assert str(wide).startswith("a test run fails: Unsupported")
    double = attention.xformers_problem(replace(eager, dtype=torch.float64))
    assert double == "a test run fails: NotImplementedError: No operator found"
