"""Attention providers: each equals softmax(q k^T * scale) v in fp64, forward and backward, and none that cannot run is taken.

What needs xformers itself and not a GPU runs in a process of its own, in which its flash kernels are replaced by the formula on the
CPU: its dispatch, its masks, its autograd function and its rules about devices are the real ones.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mae_kernels
from sssd_fast import attention
from sssd_fast.attention import (
    PROVIDERS,
    Choice,
    Site,
    attend,
    attend_packed,
    choose,
    refusal,
)
from sssd_fast.errors import ConfigError, DependencyError
from sssd_fast.run.device import AUTOCAST, pick_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = (
    "fused",
    "sdpa",
    "eager",
)  # on a CPU; `fused` is its reference there, which tests the way to it
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
has_xformers = pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xformers is not installed"
)


# ---------------------------------------------------------------------------------------------------- reference
def by_hand(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The formula, in the dtype of qkv, but sums of exponentials in at least fp32."""
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (
        qkv.shape[-1] ** -0.5 if scale is None else scale
    )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum(
        "bhnm,bmhd->bnhd", (weights / weights.sum(-1, keepdim=True)).to(qkv.dtype), v
    )


def packed_by_hand(qkv: Tensor, lengths: Sequence[int], scale: float | None = None) -> Tensor:
    parts = [
        by_hand(qkv[None, sum(lengths[:i]) :][:, :n], scale)[0] for i, n in enumerate(lengths) if n
    ]
    return torch.cat([*parts, qkv[:0, 0]])


def results(op: Callable[[Tensor], Tensor], qkv: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = op(leaf)
    return [out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]]


def agree(
    op: Callable[[Tensor], Tensor],
    hand: Callable[[Tensor], Tensor],
    qkv: Tensor,
    atol: float = 1e-6,
) -> None:
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
    wide = torch.full(
        (*qkv.shape[:-1], qkv.shape[-1] + 8), float("nan"), dtype=qkv.dtype, device=qkv.device
    )
    wide[..., : qkv.shape[-1]] = qkv
    return wide[..., : qkv.shape[-1]]


# ---------------------------------------------------------------------------------------------------- computing
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 50, 3, 3, 64), (2, 37, 3, 2, 32), (1, 197, 3, 2, 32), (2, 1, 3, 1, 8)], ids=str
)
@pytest.mark.parametrize("provider", HERE)
def test_every_provider_equals_the_formula(
    provider: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    qkv = torch.randn(shape).to(dtype)
    agree(lambda x: attend(x, provider), by_hand, qkv)
    agree(lambda x: attend(x, provider, 0.3), lambda x: by_hand(x, 0.3), strided(qkv))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(8, 50, 3, 12, 64), (4, 197, 3, 16, 32), (2, 197, 3, 12, 64)], ids=str
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_provider_equals_the_formula_on_a_gpu(
    provider: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    reason = refusal(provider, Site(CUDA, dtype, shape[1], shape[3], shape[4]))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    qkv = torch.randn(shape, device="cuda").to(dtype)
    agree(lambda x: attend(x, provider), by_hand, qkv)
    agree(lambda x: attend(x, provider, 0.3), lambda x: by_hand(x, 0.3), strided(qkv))


def _compiled_equals_plain(provider: str, qkv: Tensor, backend: str) -> None:
    torch._dynamo.reset()

    def layer(x: Tensor) -> Tensor:
        return attend(x.sin(), provider, 0.2) * 2

    upstream = torch.randn(qkv[:, :, 0].shape, device=qkv.device).to(qkv.dtype)
    plain = results(layer, qkv, upstream)
    for one, other in zip(
        results(torch.compile(layer, fullgraph=True, backend=backend), qkv, upstream),
        plain,
        strict=True,
    ):
        torch.testing.assert_close(
            one, other, rtol=1e-2 if qkv.is_cuda else 0, atol=1e-2 if qkv.is_cuda else 1e-6
        )


@pytest.mark.parametrize("provider", HERE)
def test_it_traces_as_one_graph(provider: str) -> None:
    _compiled_equals_plain(provider, torch.randn(2, 20, 3, 2, 16), "aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_compiles_as_one_graph_on_a_gpu(provider: str) -> None:
    dtype = AUTOCAST[pick_precision("auto", CUDA)]
    reason = refusal(provider, Site(CUDA, dtype, 50, 12, 64, compiled=True))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    _compiled_equals_plain(
        provider, torch.randn(4, 50, 3, 12, 64, device="cuda").to(dtype), "inductor"
    )


class Recorded(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_sdpa_copies_nothing_forward_and_writes_the_gradient_once_in_the_order_of_qkv() -> None:
    qkv = torch.randn(2, 20, 3, 2, 16, requires_grad=True)
    with Recorded() as forward:
        out = attend(qkv * 1, "sdpa")
    assert {"clone", "copy_", "_to_copy", "stack", "cat"} & set(forward.names) == set()
    upstream = torch.randn(out.shape)
    with Recorded() as backward:
        (gradient,) = torch.autograd.grad(out, qkv, upstream)
    assert (
        sum(name in ("clone", "copy_", "_to_copy", "stack", "cat") for name in backward.names) == 1
    )
    assert gradient.is_contiguous()


@pytest.mark.parametrize("provider", HERE)
def test_autocast_does_not_change_what_was_chosen(provider: str) -> None:
    qkv = torch.randn(2, 20, 3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(qkv, provider)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, attend(qkv, provider))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eager_is_what_autocast_makes_of_the_published_code(dtype: torch.dtype) -> None:
    """Bit for bit, forward and backward: the softmax is fp32, its gradient too."""

    def published(qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return (((q @ k.transpose(-2, -1)) * 16**-0.5).float().softmax(dim=-1) @ v).transpose(
                1, 2
            )

    qkv = torch.randn(2, 20, 3, 2, 16).to(dtype)
    upstream = torch.randn(2, 20, 2, 16).to(dtype)
    for got, expected in zip(
        results(lambda x: attend(x, "eager"), qkv, upstream),
        results(published, qkv, upstream),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"qkv: got shape \(2, 5, 2, 2, 8\), needs \[B, N, 3, H, d\]"
    ):
        attend(torch.zeros(2, 5, 2, 2, 8), "sdpa")
    with pytest.raises(
        ValueError, match="provider: got 'flash', needs one of fused, xformers, sdpa, eager"
    ):
        attend(torch.zeros(2, 5, 3, 2, 8), "flash")
    with pytest.raises(ValueError, match=r"qkv: got shape \(1, 5, 3, 2, 8\), needs \[T, 3, H, d\]"):
        attend_packed(torch.zeros(1, 5, 3, 2, 8), [5], "sdpa")
    for lengths in ([2, 2], [6, -1], []):
        with pytest.raises(ValueError, match="needs numbers of tokens that add up to 5"):
            attend_packed(torch.zeros(5, 3, 2, 8), lengths, "sdpa")
    with pytest.raises(ValueError, match="provider: got 'flash'"):
        refusal("flash", Site(CPU, torch.float32, 5, 2, 8))


# ------------------------------------------------------------------------------------------------------- packed
LENGTHS = [[5, 3, 5, 1, 0, 7], [6, 6, 6], [9], [0, 4]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("provider", HERE)
def test_packed_sequences_equal_the_formula_in_each(
    provider: str, lengths: list[int], dtype: torch.dtype
) -> None:
    qkv = torch.randn(sum(lengths), 3, 2, 16).to(dtype)
    agree(lambda x: attend_packed(x, lengths, provider), lambda x: packed_by_hand(x, lengths), qkv)
    agree(
        lambda x: attend_packed(x, lengths, provider, 0.3),
        lambda x: packed_by_hand(x, lengths, 0.3),
        strided(qkv),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[50, 37, 50, 1, 0, 197], [50, 50]], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_packed_sequences_on_a_gpu(provider: str, lengths: list[int], dtype: torch.dtype) -> None:
    reason = refusal(provider, Site(CUDA, dtype, max(lengths), 12, 64, packed=True))
    if reason is not None:
        pytest.skip(f"{provider} refuses: {reason}")
    qkv = torch.randn(sum(lengths), 3, 12, 64, device="cuda").to(dtype)
    agree(lambda x: attend_packed(x, lengths, provider), lambda x: packed_by_hand(x, lengths), qkv)
    _nan_stays_in_its_sequence(provider, lengths, qkv)


def _nan_stays_in_its_sequence(provider: str, lengths: list[int], qkv: Tensor) -> None:
    upstream = torch.randn(qkv[:, 0].shape, device=qkv.device).to(qkv.dtype)
    clean = results(lambda x: attend_packed(x, lengths, provider), qkv, upstream)
    for place in range(3):
        spoiled = qkv.clone()
        spoiled[lengths[0], place] = float(
            "nan"
        )  # a token of the second sequence: in q, in k, in v
        rest = torch.ones(len(qkv), dtype=torch.bool)
        rest[lengths[0] : lengths[0] + lengths[1]] = False
        for got, expected in zip(
            results(lambda x: attend_packed(x, lengths, provider), spoiled, upstream),
            clean,
            strict=True,
        ):
            tolerance = 1e-2 if qkv.is_cuda else 0.0  # some kernels there add in no fixed order
            torch.testing.assert_close(got[rest], expected[rest], rtol=tolerance, atol=tolerance)
            # PyTorch's kernel for the CPU makes zeros of a row of scores that is NaN, so q and k tell nothing there
            assert place < 2 or got[~rest].isnan().any()


@pytest.mark.parametrize("lengths", [[5, 3, 5, 1], [4, 4, 4]], ids=str)
@pytest.mark.parametrize("provider", HERE)
def test_nan_in_one_sequence_reaches_no_other(provider: str, lengths: list[int]) -> None:
    _nan_stays_in_its_sequence(provider, lengths, torch.randn(sum(lengths), 3, 2, 16))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_sequence_at_all(provider: str, lengths: list[int]) -> None:
    qkv = torch.zeros(0, 3, 2, 16, requires_grad=True)
    out = attend_packed(qkv, lengths, provider)
    assert out.shape == (0, 2, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_packed_sdpa_traces_as_one_graph() -> None:
    torch._dynamo.reset()
    qkv = torch.randn(9, 3, 2, 16)
    upstream = torch.randn(9, 2, 16)
    plain = results(lambda x: attend_packed(x, [3, 5, 1], "sdpa"), qkv, upstream)
    compiled = torch.compile(
        lambda x: attend_packed(x, [3, 5, 1], "sdpa"), fullgraph=True, backend="aot_eager"
    )
    for one, other in zip(results(compiled, qkv, upstream), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- choosing
@pytest.fixture
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up sites are judged alone, also on a machine whose GPU mae_kernels has something to say about."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def on(
    capability: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 50,
    width: int = 64,
) -> Site:
    return Site(CUDA, dtype, tokens, 12, width, compiled=True, capability=capability)


@pytest.mark.parametrize(
    ("site", "provider", "not_fused"),
    [
        (on((7, 5), torch.float16), "sdpa", "tensor cores of sm_80 or newer, this is sm_75"),
        (on((8, 0), torch.float16), "fused", None),
        (on((9, 0)), "fused", None),
        (on((9, 0), tokens=197, width=32), "fused", None),
        (on((9, 0), tokens=197), "fused", None),
        (on((8, 6), tokens=224), "fused", None),
        (on((8, 6), tokens=225), "sdpa", "1 to 224 tokens with heads of 64 on sm_86"),
        (on((12, 0), tokens=197, width=32), "fused", None),
        (on((12, 0), tokens=197), "sdpa", "1 to 128 tokens with heads of 64 on sm_120"),
        (on((9, 0), torch.float32), "sdpa", "fp16 and bf16, not float32"),
        (on((9, 0), torch.float64), "sdpa", "fp16 and bf16, not float64"),
        (on((9, 0), tokens=577), "sdpa", "1 to 256 tokens"),
        (on((9, 0), width=80), "sdpa", "heads of 16, 32, 64, 128 values, not of 80"),
        (
            Site(CPU, torch.float32, 50, 12, 64),
            "sdpa",
            "no kernel for the cpu, where it would be computed by sdpa",
        ),
        (Site(CPU, torch.bfloat16, 50, 12, 64), "sdpa", "no kernel for the cpu"),
    ],
)
def test_what_auto_takes(
    site: Site, provider: str, not_fused: str | None, no_gpu_here: None
) -> None:
    choice = choose("auto", site)
    assert choice.provider == provider
    assert choice.refused.keys() == ({"fused"} if not_fused else set())
    if not_fused:
        assert not_fused in choice.refused["fused"]


def test_auto_at_one_length_never_imports_xformers(
    no_gpu_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "load_xformers", lambda: pytest.fail("it was asked"))
    for site in (on((9, 0)), on((7, 5), torch.float16), Site(CPU, torch.float32, 50, 12, 64)):
        choose("auto", site)


def test_auto_takes_xformers_for_different_lengths_where_it_works(
    no_gpu_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = replace(on((9, 0)), packed=True, compiled=False)
    monkeypatch.setattr(attention, "_xformers", (object(), None))
    assert choose("auto", packed).provider == "xformers"
    assert (
        choose("auto", replace(packed, compiled=True)).provider == "fused"
    )  # its mask does not trace
    monkeypatch.setattr(attention, "_xformers", (None, "it is broken"))
    assert choose("auto", packed).refused == {"xformers": "it is broken"}
    assert choose("auto", replace(packed, dtype=torch.float32)).provider == "sdpa"


def test_xformers_compiled_needs_its_flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch cannot trace the backward of the memory-efficient kernels as xformers calls it."""
    monkeypatch.setattr(attention, "_xformers", (object(), None))
    assert refusal("xformers", on((8, 0))) is None
    for site in (on((7, 5), torch.float16), on((8, 0), torch.float32), on((8, 0), width=264)):
        assert "compiled it takes only fp16 and bf16 on sm_80 or newer" in str(
            refusal("xformers", site)
        )
        assert refusal("xformers", replace(site, compiled=False)) is None
        assert refusal("xformers", replace(site, training=False)) is None


def test_fused_is_refused_with_the_reason_of_mae_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with mae_kernels.backend("reference"):
        told = mae_kernels.info()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mae_kernels, "info", lambda: told)
    assert refusal("fused", on((9, 0))) == "the backend is set to 'reference'"


def test_a_named_provider_that_cannot_run_is_an_error() -> None:
    site = Site(CPU, torch.float32, 197, 16, 32)
    with pytest.raises(ConfigError) as raised:
        choose("fused", site, "step.decoder_attention")
    assert str(raised.value) == (
        "step.decoder_attention is 'fused', which cannot run here (197 tokens, 16 heads of 32, fp32): it has no kernel for the "
        "cpu, where it would be computed by sdpa; set it to auto, sdpa, eager"
    )
    with pytest.raises(
        ConfigError,
        match=r"step\.attention is 'flash', needs auto or one of fused, xformers, sdpa, eager",
    ):
        choose("flash", site)
    assert choose("eager", site).provider == "eager"


def test_the_line_for_the_start_of_a_run(no_gpu_here: None) -> None:
    choice = choose("auto", on((9, 0)))
    assert choice.line() == (
        "encoder attention (50 tokens, 12 heads of 64, bf16): fused, because one program per head moves the fewest bytes for "
        "short sequences (by count of bytes, not measured)"
    )
    line = Choice(
        "sdpa", "it can", on((9, 0)), "step.decoder_attention", {"fused": "it cannot"}
    ).line()
    assert (
        line
        == "decoder attention (50 tokens, 12 heads of 64, bf16): sdpa, because it can; not fused: it cannot"
    )
    named = choose("eager", on((9, 0)), "step.decoder_attention")
    assert named.line().endswith("eager, because step.decoder_attention names it")


@pytest.mark.gpu
def test_a_site_on_a_gpu_asks_the_gpu() -> None:
    assert Site(CUDA, torch.float16, 50, 12, 64).capability == torch.cuda.get_device_capability()
    with mae_kernels.backend("reference"):
        assert (
            refusal("fused", Site(CUDA, torch.float16, 50, 12, 64))
            == "the backend is set to 'reference'"
        )


# ----------------------------------------------------------------------------------------------------- xformers
@pytest.fixture
def fake_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """fake_xformers(code of xformers, code of xformers.ops or None): what `import xformers` finds."""
    real = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] == "xformers"
    }
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attention, "_xformers", None)
    attention._block_diagonal.cache_clear()

    def write(package: str, ops: str | None = None) -> None:
        (tmp_path / "xformers").mkdir()
        (tmp_path / "xformers" / "__init__.py").write_text(textwrap.dedent(package))
        if ops is not None:
            (tmp_path / "xformers" / "ops.py").write_text(textwrap.dedent(ops))

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]
    sys.modules.update(real)
    attention._block_diagonal.cache_clear()


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
        _cpp_library_load_exception.__cause__ = OSError("Could not load this library")
        _cpp_library_load_exception.__cause__.__cause__ = OSError("libcudart.so.12: cannot open shared object file")
"""
WORKS = "def memory_efficient_attention(): pass"


@pytest.mark.parametrize(
    ("package", "ops", "reason"),
    [
        (
            "raise OSError('libcudart.so.12: missing')",
            None,
            "its import fails: OSError('libcudart.so.12: missing')",
        ),
        ("raise ValueError('two\\nlines')", None, r"its import fails: ValueError('two\nlines')"),
        (
            "import a_module_nobody_has",
            None,
            "its import fails: ModuleNotFoundError(\"No module named 'a_module_nobody_has'\")",
        ),
        ("raise SystemExit(3)", None, "its import fails: SystemExit(3)"),
        (
            NOISY + "    raise RuntimeError('after all that')",
            None,
            "its import fails: RuntimeError('after all that')",
        ),
        ("", None, "its import fails: ModuleNotFoundError(\"No module named 'xformers.ops'\")"),
        ("", "", "it has no memory_efficient_attention"),
        ("", "memory_efficient_attention = None", "it has no memory_efficient_attention"),
        (
            OTHER_CUDA,
            WORKS,
            "without it every GPU is refused: OSError('libcudart.so.12: cannot open shared object file')",
        ),
        (
            "raise ModuleNotFoundError(\"No module named 'xformers'\", name='xformers')",
            None,
            "not installed (pip install 'sssd-fast[xformers]')",
        ),
        (NOISY, WORKS, None),
    ],
)
def test_a_broken_xformers_harms_nothing_and_says_why(
    package: str,
    ops: str | None,
    reason: str | None,
    fake_xformers: Callable[..., None],
    no_gpu_here: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_xformers(package, ops)
    packed = replace(on((9, 0)), packed=True, compiled=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        choice = choose("auto", packed)
        found = refusal("xformers", on((9, 0)))
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")
    assert choice.provider == ("xformers" if reason is None else "fused")
    assert choice.refused == ({} if found is None else {"xformers": found})
    assert warned == []
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    logging.getLogger("xformers").warning("logging works again")
    assert len(caplog.records) == 1
    if reason is not None:
        with pytest.raises(ConfigError) as raised:
            choose("xformers", packed)
        assert found is not None
        assert found in str(raised.value)
        assert str(raised.value).endswith("set it to auto, fused, sdpa, eager")
        with pytest.raises(DependencyError):
            attend(torch.zeros(1, 2, 3, 1, 8), "xformers")


def test_xformers_is_imported_late_and_once(
    fake_xformers: Callable[..., None], no_gpu_here: None, tmp_path: Path
) -> None:
    fake_xformers(f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\nraise OSError('broken')")
    choose("auto", on((9, 0)))
    assert (
        refusal("xformers", Site(CPU, torch.float32, 50, 12, 64))
        == "its attention needs an NVIDIA GPU"
    )
    assert not (tmp_path / "imports").exists()
    for _ in range(3):
        assert "OSError('broken')" in str(refusal("xformers", on((9, 0))))
    assert (tmp_path / "imports").read_text() == "x"


def test_importing_the_trainer_imports_no_xformers() -> None:
    code = "import sys, sssd_fast.attention, sssd_fast.run.environment as d; d.collect_environment(); print('xformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_xformers_gets_views_of_qkv_the_scale_and_the_lengths(
    fake_xformers: Callable[..., None],
) -> None:
    ops = """
        from types import SimpleNamespace
        import torch

        seen = []

        def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
            seen.append((query, key, value))
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            mask = attn_bias and attn_bias(query.shape[1])
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            return out.transpose(1, 2)

        def from_seqlens(lengths, device):
            of = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=device)
            return lambda total: of[:, None] == of[None, :]

        BlockDiagonalMask = SimpleNamespace(from_seqlens=from_seqlens)
        fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask))
    """
    fake_xformers("", ops)
    qkv = torch.randn(2, 7, 3, 2, 16)
    agree(lambda x: attend(x, "xformers", 0.3), lambda x: by_hand(x, 0.3), qkv)
    seen = attention.load_xformers()[0].seen
    assert all(x.shape == (2, 7, 2, 16) and x.stride() == (672, 96, 16, 1) for x in seen[0])
    for lengths in LENGTHS:
        packed = torch.randn(sum(lengths), 3, 2, 16)
        agree(
            lambda x, n=lengths: attend_packed(x, n, "xformers"),
            lambda x, n=lengths: packed_by_hand(x, n),
            packed,
        )
    assert len({x.untyped_storage().data_ptr() for x in seen[-1]}) == 1


PRETEND = """
import logging
logging.disable(logging.WARNING)
import torch
torch.version.cuda = "12.8"
torch.backends.cuda.is_flash_attention_available = lambda: True
import xformers.ops
from xformers.ops import fmha
fmha.common._built_with_cuda = True  # the compiled part serves other things than attention
"""


def _run(code: str) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PRETEND + code], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@has_xformers
def test_the_rules_about_xformers_are_its_own() -> None:
    """Every capability, dtype and head width: it has a forward and a backward exactly where it is not refused."""
    code = """
from torch._subclasses.fake_tensor import FakeTensorMode
from sssd_fast.attention import Site, refusal
torch.version.hip = None
wrong, counts = [], [0, 0]
for capability in [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]:
    torch.cuda.get_device_capability = lambda device=None: capability
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for width in (8, 12, 30, 32, 64, 80, 100, 128, 256, 264):
            site = Site(torch.device("cuda"), dtype, 50, 2, width, capability=capability)
            with FakeTensorMode():
                q = torch.empty(2, 50, 3, 2, width, device="cuda", dtype=dtype)
                inputs = fmha.Inputs(*q.unbind(2))
                try:
                    fmha._dispatch_fw(inputs, True), fmha._dispatch_bw(inputs, None)
                    can = True
                except (NotImplementedError, KeyError):  # KeyError: it has no alignment for fp64
                    can = False
            refused = refusal("xformers", site, xformers_problem=lambda: None)
            counts[can] += 1
            if can == (refused is not None):
                wrong.append((capability, dtype, width, can, refused))
print(wrong, min(counts) > 20)
"""
    assert _run(code).strip() == "[] True"


@has_xformers
def test_xformers_itself_equals_the_formula_and_traces_as_one_graph() -> None:
    code = """
import math
for cls in (fmha.flash.FwOp, fmha.flash.BwOp):
    cls.SUPPORTED_DEVICES = {"cpu"}

def probabilities(q, k, cu, scale):
    s = torch.einsum("...nhd,...mhd->...hnm", q.double(), k.double()) * scale
    if cu is not None:
        of = torch.bucketize(torch.arange(len(q)), cu[1:], right=True)
        s = s.masked_fill(of[:, None] != of[None, :], -math.inf)
    return s.softmax(-1), s.logsumexp(-1).float()

@torch.library.register_kernel("xformers_flash::flash_fwd", "cpu")
def forward(q, k, v, cu, cu_k, seqused_k, max_q, max_k, p, scale, *rest):
    P, lse = probabilities(q, k, cu, scale)
    out = torch.einsum("...hnm,...mhd->...nhd", P, v.double()).to(q.dtype).contiguous()
    return out, lse.contiguous(), torch.zeros(2, dtype=torch.int64)

@torch.library.register_kernel("xformers_flash::flash_bwd", "cpu")
def backward(share, grad, q, k, v, out, lse, cu, cu_k, max_q, max_k, p, scale, *rest):
    P, _ = probabilities(q, k, cu, scale)
    g = grad.double()
    dP = torch.einsum("...nhd,...mhd->...hnm", g, v.double())
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * scale
    parts = (
        torch.einsum("...hnm,...mhd->...nhd", dS, k.double()),
        torch.einsum("...hnm,...nhd->...mhd", dS, q.double()),
        torch.einsum("...hnm,...nhd->...mhd", P, g),
    )
    return tuple(x.to(q.dtype).contiguous() for x in parts)

from sssd_fast import attention
from sssd_fast.attention import attend, attend_packed
attention._xformers = (xformers.ops, None)
torch.manual_seed(0)
qkv = torch.randn(2, 21, 3, 2, 16).half()
compiled = torch.compile(lambda x: attend(x, "xformers", 0.3), fullgraph=True, backend="aot_eager")
lengths = [9, 0, 21, 12]

def results(op, x):
    x = x.clone().requires_grad_()
    out = op(x)
    (out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
    return out.detach(), x.grad

def worst(one, other):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(one, other))

exact = results(lambda x: attend(x, "eager", 0.3), qkv.double())
flat, flat_double = qkv.flatten(0, 1), qkv.double().flatten(0, 1)
packed = results(lambda x: attend_packed(x, lengths, "eager"), flat_double)
print(worst(results(lambda x: attend(x, "xformers", 0.3), qkv), exact) < 3e-3)
print(worst(results(compiled, qkv), exact) < 3e-3)
print(worst(results(lambda x: attend_packed(x, lengths, "xformers"), flat), packed) < 3e-3)
"""
    assert _run(code).split() == ["True"] * 3
