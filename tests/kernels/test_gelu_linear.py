"""gelu_linear: every product by hand in float64 with the scalar error function, its gradients,
and where they could break.
"""

from __future__ import annotations

import copy
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mae_kernels import GeluMLP, backend, gelu_linear
from tests.kernels.calls import assert_close, run

# the name in the package is the function's
MODULE = importlib.import_module("mae_kernels.gelu_linear")


def gelu_by_hand(h: float) -> tuple[float, float]:
    """gelu(h) and its derivative; erfc, because 1 + erf loses the left tail."""
    cdf = 0.5 * math.erfc(-h / math.sqrt(2))
    return h * cdf, cdf + h * math.exp(-h * h / 2) / math.sqrt(2 * math.pi)


def by_hand(x, bias, weight, out_bias, upstream):
    """out and the gradients of x, bias, weight and out_bias, one number at a time, in float64."""
    lead, hidden, width = x.shape[:-1], x.shape[-1], weight.shape[0]
    x, w, up = (t.double().cpu().reshape(-1, t.shape[-1]).tolist() for t in (x, weight, upstream))
    b = [0.0] * hidden if bias is None else bias.tolist()
    c = [0.0] * width if out_bias is None else out_bias.tolist()
    rows = range(len(x))
    pairs = [[gelu_by_hand(x[n][f] + b[f]) for f in range(hidden)] for n in rows]
    out = [
        [sum(pairs[n][f][0] * w[d][f] for f in range(hidden)) + c[d] for d in range(width)]
        for n in rows
    ]
    dx = [
        [sum(up[n][d] * w[d][f] for d in range(width)) * pairs[n][f][1] for f in range(hidden)]
        for n in rows
    ]
    dbias = [sum(dx[n][f] for n in rows) for f in range(hidden)]
    dweight = [
        [sum(up[n][d] * pairs[n][f][0] for n in rows) for f in range(hidden)] for d in range(width)
    ]
    dout_bias = [sum(up[n][d] for n in rows) for d in range(width)]
    gradients = (
        dx,
        dbias if bias is not None else None,
        dweight,
        dout_bias if out_bias is not None else None,
    )
    made = [torch.tensor(t, dtype=torch.float64) for t in (out, *gradients) if t is not None]
    return [made[0].view(*lead, width), made[1].view(*lead, hidden), *made[2:]]


@pytest.mark.parametrize(
    ("dtype", "most", "error"), [(torch.float64, 14, 6e-6), (torch.float32, 8, 2e-5)]
)
def test_normal_distribution_for_half_precision(monkeypatch, dtype, most, error) -> None:
    """The relative error, in the left tail too; bf16 rounds with 4e-3, fp16 with 5e-4."""
    language = SimpleNamespace(exp2=torch.exp2, abs=torch.abs, where=torch.where)
    monkeypatch.setattr(MODULE, "tl", language)
    h = torch.linspace(-most, most, 4001, dtype=torch.float64)
    cdf, pdf = getattr(MODULE._normal, "fn", MODULE._normal)(h.to(dtype), False)
    exact = 0.5 * torch.erfc(-h / math.sqrt(2))
    torch.testing.assert_close(cdf.double(), exact, rtol=error, atol=0)
    density = torch.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(pdf.double(), density, rtol=error, atol=0)


@pytest.mark.parametrize(("name", "column"), [("CDF", 0), ("SLOPE", 1)])
def test_rational_functions_for_bf16_on_a_cpu(name, column) -> None:
    h = torch.cat([torch.linspace(-14, 14, 40001), torch.tensor([1e-30, -1e-30, 1e30, -1e30])])
    exact = torch.tensor([gelu_by_hand(v) for v in h.tolist()], dtype=torch.float64)
    exact[:, 0] = 0.5 * torch.erfc(-h.double() / math.sqrt(2))
    got = MODULE._rational(h, *getattr(MODULE, name))
    assert (got - exact[:, column]).abs().max() <= 3e-7
    beyond = torch.tensor([6.0, 1e30, -6.0, -1e30])
    assert MODULE._rational(beyond, *getattr(MODULE, name)).tolist() == [1, 1, 0, 0]
    for value in (math.inf, -math.inf, math.nan):
        assert MODULE._rational(torch.tensor(value), *getattr(MODULE, name)).isnan()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("dtype", "name", "expected"),
    [
        (torch.bfloat16, "auto", True),
        (torch.bfloat16, "reference", False),
        (torch.float32, "auto", False),
    ],
)
def test_compiled_bf16_on_a_cpu_takes_the_rational_functions(
    dtype, name, expected, recompute, monkeypatch
) -> None:
    used = []
    rational = MODULE._rational
    monkeypatch.setattr(MODULE, "_rational", lambda *a: used.append(1) or rational(*a))
    torch._dynamo.reset()
    call = torch.compile(
        lambda *t: gelu_linear(*t, recompute=recompute), backend="aot_eager", fullgraph=True
    )
    tensors = make((7, 3), 24, 6, dtype=dtype)
    upstream = torch.randn(7, 3, 6).to(dtype)
    with backend(name):
        got = run(call, tensors, upstream)
    assert bool(used) == expected
    assert_close(got, by_hand(*tensors, upstream), run(in_torch, tensors, upstream))


def in_torch(x, bias, weight, out_bias):
    """What a model writes, in x's dtype."""
    bias, weight, out_bias = (
        None if t is None else t.to(x.dtype) for t in (bias, weight, out_bias)
    )
    return F.linear(F.gelu(x if bias is None else x + bias), weight, out_bias)


def make(lead, hidden, width, device="cpu", dtype=torch.float32, biases="both"):
    x = (2 * torch.randn(*lead, hidden, device=device)).to(dtype)
    weight = (torch.randn(width, hidden, device=device) / math.sqrt(hidden)).to(dtype)
    bias = (
        torch.randn(hidden, device=device) if biases in ("both", "bias") else None
    )  # fp32, as parameters are
    out_bias = torch.randn(width, device=device) if biases in ("both", "out_bias") else None
    return x, bias, weight, out_bias


CASES = [  # leading sizes, F, D, biases
    ((2, 5), 24, 10, "both"),
    ((7,), 33, 5, "bias"),
    ((), 12, 4, "both"),
    ((1, 3, 2), 64, 16, "out_bias"),
    ((3, 2), 100, 3, "none"),
    ((70,), 192, 2, "both"),  # three blocks of columns, more rows than a tile has
]


@pytest.mark.kernel
@pytest.mark.parametrize(("lead", "hidden", "width", "biases"), CASES)
@pytest.mark.parametrize("half", [False, True])
def test_gelu_linear_equals_a_loop(lead, hidden, width, biases, half, device) -> None:
    dtype = torch.float16 if half else torch.float32
    tensors = make(lead, hidden, width, device, dtype, biases)
    upstream = torch.randn(*lead, width, device=device).to(dtype)
    before = [None if t is None else t.clone() for t in (*tensors, upstream)]
    runs = [
        run(lambda *t, r=r: gelu_linear(*t, recompute=r), tensors, upstream)
        for r in (True, True, False)
    ]
    assert_close(runs[0], by_hand(*tensors, upstream), run(in_torch, tensors, upstream))
    for other in runs[1:]:  # a rerun, and the same with g kept
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    for old, now in zip(before, (*tensors, upstream), strict=True):
        assert old is None or torch.equal(old, now), "an input was changed"


LARGE = [0.0, -0.0, 1e-30, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 14.0, 20.0, 100.0, 6e4]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_linear_of_large_values_is_finite(dtype, recompute, device) -> None:
    """Neither an overflow of h * h nor infinity times zero: far right the identity, far left 0."""
    values = [*LARGE, 1e25] if dtype == torch.float32 else LARGE
    x = torch.tensor([*values, *[-v for v in values]], device=device).to(dtype)[:, None]
    one = torch.ones(1, 1, device=device, dtype=dtype)
    got = run(
        lambda x, w: gelu_linear(x, None, w, None, recompute=recompute),
        (x, one),
        torch.ones(len(x), 1, device=device),
    )
    assert all(t.isfinite().all() for t in got[:2])
    h = x.double().cpu().flatten()
    exact = torch.tensor([gelu_by_hand(v) for v in h.tolist()], dtype=torch.float64)
    rounding = 2**-22 * h.abs().clamp(1, 8)  # of 1 + erf, times h; beyond 8 it is 0 or 2 exactly
    for result, want in zip(got[:2], exact.T, strict=True):
        error = (result.double().cpu().flatten() - want).abs()
        assert (error <= torch.finfo(dtype).eps * want.abs() + rounding).all(), error
    assert (got[1][len(values) - 4 : len(values)] == 1).all() and (got[1][-4:] == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_gelu_linear_keeps_an_overflow_visible(value, device) -> None:
    """The guards of a training run look for values that are not finite: the left tail must not
    turn one into 0.
    """
    x = torch.tensor([[value], [1.0]], device=device)
    one = torch.ones(1, 1, device=device)
    out, dx, _ = run(
        lambda x, w: gelu_linear(x, None, w, None), (x, one), torch.ones(2, 1, device=device)
    )
    assert not out[0].isfinite() and not dx[0].isfinite()
    assert out[1].isfinite() and dx[1].isfinite()


@pytest.mark.parametrize("name", ["reference", "registered"])
def test_parameters_take_the_dtype_of_x(name) -> None:
    x, *parameters = make((3,), 24, 6)
    with backend(name):
        got = run(gelu_linear, (x.bfloat16(), *parameters))
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 3]
    for result, want in zip(got, run(in_torch, (x, *parameters)), strict=True):
        assert (result - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("recompute", [True, False])
def test_autograd_keeps_only_x_and_one_cast_of_the_weight(recompute) -> None:
    x, bias, weight, out_bias = (t.requires_grad_() for t in make((50,), 24, 6))
    kept: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    )
    with torch.autocast("cpu", torch.bfloat16), backend("registered"):
        product = x.bfloat16()
        with hooks:
            gelu_linear(product, bias, weight, out_bias, recompute=recompute)
    assert sorted(kept) == [(6, 24), (24,), *[(50, 24)] * (1 if recompute else 2)]


@pytest.mark.kernel
@pytest.mark.parametrize("bias", [False, True])
def test_gelu_mlp_is_the_two_layers(bias, device) -> None:
    mlp = GeluMLP(6, 24, bias=bias).to(device)
    layers = nn.Sequential()
    layers.fc1 = nn.Linear(6, 24, bias=bias)
    layers.act = nn.GELU()
    layers.fc2 = nn.Linear(24, 6, bias=bias)
    layers.to(device).load_state_dict(mlp.state_dict())
    x = torch.randn(2, 5, 6, device=device)
    upstream = torch.randn(2, 5, 6, device=device)
    for model in (mlp, copy.deepcopy(mlp)):
        got = torch.autograd.grad(model(x), model.parameters(), upstream)
        for g, w in zip(
            got, torch.autograd.grad(layers(x), layers.parameters(), upstream), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp(x), layers(x), rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 3, 8)
W = torch.zeros(4, 8)
GOOD = {"x": X, "bias": torch.zeros(8), "weight": W, "out_bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, needs a torch.Tensor"),
        ({"x": X.int()}, TypeError, "x: got dtype torch.int32"),
        ({"x": X[0, 0, 0]}, ValueError, r"x: got shape \(\), needs \[..., F\] with F of"),
        ({"x": X[..., :0]}, ValueError, r"x: got shape \(2, 3, 0\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: got shape \(7,\), needs \[F\] = \(8\)"),
        ({"bias": torch.zeros(8).long()}, TypeError, "bias: got dtype torch.int64"),
        ({"weight": None}, TypeError, "weight: got NoneType"),
        ({"weight": W.t()}, ValueError, r"weight: got .* needs \[D, F\] = \(any, 8\)"),
        ({"weight": W[:0]}, ValueError, r"weight: got shape \(0, 8\), needs \[D, F\] with D of"),
        ({"weight": W.to("meta")}, ValueError, "weight: got device meta, needs the device of x"),
        ({"out_bias": torch.zeros(8)}, ValueError, r"out_bias: got .* needs \[D\] = \(4\)"),
        ({"recompute": 1}, TypeError, "recompute: got int, needs a bool"),
    ],
)
def test_gelu_linear_names_a_bad_argument(change, error, text: str) -> None:
    with pytest.raises(error, match=text):
        gelu_linear(**{**GOOD, **change})
