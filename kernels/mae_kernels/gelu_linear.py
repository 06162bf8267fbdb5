"""The second half of a transformer's MLP: bias of the first layer, exact GELU, second layer.

    h = x + bias                      x: the first layer's product, without its bias
    g = gelu(h) = h cdf(h)            cdf(h) = (1 + erf(h / sqrt 2)) / 2
    out = g weight^T + out_bias

    dg = dout weight
    dx = dh = dg * (cdf(h) + h pdf(h))          pdf(h) = exp(-h^2 / 2) / sqrt(2 pi)
    dbias = sum of dh over the rows
    dweight = dout^T g,  dout_bias = sum of dout over the rows

Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2 (the exact form, torch's
approximate="none").

The matrix products are torch's. On a GPU one kernel makes g, and one makes dh, the sums for dbias
and, when the forward did not keep it, g again. Both read x once, the backward reads dg once. A
compiler that sees the pieces writes dh, then reads it again for dbias, because a sum over rows
cannot join an element-wise kernel that tiles rows. Each program sums its own rows in fp32, and the
programs' sums are added in a fixed order: no atomics, equal reruns. Kept for the backward are x,
bias and weight (in the dtype of the product), and g too with recompute=False; plain torch keeps h
and g. On a CPU a compiled call in bf16 uses rational functions instead of erf and exp; other calls
are plain torch.

Shapes: N rows (all leading dimensions together), F hidden width, D width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton types the arguments of kernels)

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_floating, check_same_device, check_shape, check_vector
from ._pixels import accumulate_dtype
from ._runtime import (
    column_block,
    jit,
    launch,
    no_autocast,
    product_dtype,
    rows_per_program,
    tl,
    triton_op,
    use_triton,
    wants_cpu_ops,
    wants_reference,
)
from ._samples import Draw, Made, Sample, Size, declares


# ---- reference ----
def reference(
    x: Tensor, bias_F: Tensor | None, weight_DF: Tensor, out_bias_D: Tensor | None
) -> Tensor:
    h = x if bias_F is None else x + bias_F.to(x.dtype)
    return _project(torch.nn.functional.gelu(h).to(weight_DF.dtype), weight_DF, out_bias_D)


def _project(g: Tensor, weight_DF: Tensor, out_bias_D: Tensor | None) -> Tensor:
    with no_autocast(g.device):
        bias_D = None if out_bias_D is None else out_bias_D.to(g.dtype)
        return torch.nn.functional.linear(g, weight_DF, bias_D)


def _hidden(x_NF: Tensor, bias_F: Tensor | None) -> Tensor:
    """h [N,F] in fp32, or fp64."""
    acc = accumulate_dtype(x_NF) if bias_F is None else accumulate_dtype(x_NF, bias_F)
    return x_NF.to(acc) if bias_F is None else x_NF.to(acc) + bias_F.to(acc)


# ---- bf16 on a CPU ----
# cdf(h) - 1/2 and gelu'(h) - 1/2 are odd: h P(h^2) / Q(h^2) for |h| < limit. As (limit, P, Q), the
# lowest power first: least squares, its weights moved to the largest errors (Lawson's algorithm).
# The error in fp32 is at most 3e-7; a compiled pass takes half the time of one with erf and exp.
CDF = (
    5.3,
    (0.398941828, 0.052057486, 0.00569848273, 0.000341465924, 6.26175697e-06),
    (1.0, 0.297148132, 0.0388220269, 0.00286263335, 0.000122471871, 5.29584443e-07),
)
SLOPE = (
    5.8,
    (0.79788536, -0.0309944624, 0.0142301723, 1.92488589e-05, 3.59548365e-05, 1.92913273e-07),
    (1.0, 0.294495776, 0.0409806421, 0.00352306651, 0.000192042616, 8.95188897e-06),
)


def _rational(h: Tensor, limit: float, p: tuple[float, ...], q: tuple[float, ...]) -> Tensor:
    """0 and 1 beyond the limit; NaN for h that is not finite."""
    square = h * h
    above, below = (_polynomial(square, c) for c in (p, q))
    beyond = (h > 0).to(h.dtype) + 0 * h
    return torch.where(h.abs() < limit, 0.5 + h * above / below, beyond)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def _in_bf16_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _is_compiled_on_cpu(x: Tensor) -> bool:
    compiler = torch.compiler
    compiled = compiler.is_compiling() and not compiler.is_exporting()
    return compiled and wants_cpu_ops(x) and _in_bf16_on_cpu(x)


def _gelu(x: Tensor, h: Tensor) -> Tensor:
    return h * _rational(h, *CDF) if _in_bf16_on_cpu(x) else torch.nn.functional.gelu(h)


def _gelu_slope(x: Tensor, h: Tensor) -> Tensor:
    if _in_bf16_on_cpu(x):
        return _rational(h, *SLOPE)
    cdf = 0.5 + 0.5 * torch.erf(h * math.sqrt(0.5))
    return cdf + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)


# ---- kernels ----
@jit
def _normal(h, EXACT: tl.constexpr):
    """Standard normal distribution and density at h, fp32.

    A finite h gives no NaN: pdf is 0 long before h overflows. Without EXACT the relative error of
    cdf is at most 6e-6, a hundredth of a rounding to half precision.
    """
    # exp2 with log2(e) / 2 in the factor: exp takes four instructions more
    bell = tl.exp2(-0.7213475204444817 * h * h)
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    else:
        # Form of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: a
        # polynomial times the exponential that pdf needs anyway. They bound the absolute error;
        # these numbers are a least squares fit of the relative one, for |h| up to 14
        t = 1.0 / (1.0 + 0.3111269837220809 * tl.abs(h))
        tail = (-0.0730556649 * t + 0.1753342766) * t + 0.0203571292
        tail = (((tail * t + 0.1317971660) * t + 0.1212839427) * t + 0.1242805669) * t * bell
        cdf = tl.where(h < 0, tail, 1.0 - tail)
    return cdf, 0.3989422804014327 * bell


@jit
def _gelu_kernel(
    X, BIAS, G, num_rows, stride_n, F: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    wanted = (row < num_rows)[:, None] & (col < F)[None, :]
    h = tl.load(X + (row[:, None] * stride_n + col[None, :]), mask=wanted, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(BIAS + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    cdf, _ = _normal(h, X.dtype.element_ty == tl.float32)
    tl.store(G + (row[:, None] * F + col[None, :]), (h * cdf).to(G.dtype.element_ty), mask=wanted)


@jit
def _gelu_backward_kernel(
    X, BIAS, DG, DH, G, PARTIAL, num_rows, stride_n, steps, F: tl.constexpr, BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE_G: tl.constexpr,
):  # fmt: skip
    """One pass over x and dg: writes dh and, with WRITE_G, g; with HAS_BIAS this program's sums of
    dh as well.
    """
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    if HAS_BIAS:
        bias = tl.load(BIAS + col, mask=col < F, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        wanted = (row < num_rows)[:, None] & (col < F)[None, :]
        at = row[:, None] * F + col[None, :]
        h = tl.load(X + (row[:, None] * stride_n + col[None, :]), mask=wanted, other=0.0).to(
            tl.float32
        )
        dg = tl.load(DG + at, mask=wanted, other=0.0).to(tl.float32)
        if HAS_BIAS:
            h += bias[None, :]
        cdf, pdf = _normal(h, X.dtype.element_ty == tl.float32)
        dh = dg * (cdf + h * pdf)
        tl.store(DH + at, dh.to(DH.dtype.element_ty), mask=wanted)
        if WRITE_G:
            tl.store(G + at, (h * cdf).to(G.dtype.element_ty), mask=wanted)
        if HAS_BIAS:
            total += dh
    if HAS_BIAS:
        tl.store(PARTIAL + tl.program_id(0) * F + col, tl.sum(total, 0), mask=col < F)


# ---- launchers ----
# Programs of the backward: enough to fill every GPU in the table, few enough that their
# sums cost little
BACKWARD_PROGRAMS = 512


def _rows_of(x_NF: Tensor) -> Tensor:
    return x_NF if x_NF.stride(1) == 1 else x_NF.contiguous()


def _launch_gelu(x_NF: Tensor, bias_F: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_NF = _rows_of(x_NF)
    num_rows, width = x_NF.shape
    g_NF = torch.empty((num_rows, width), dtype=dtype, device=x_NF.device)
    block = column_block(width)
    rows, warps = rows_per_program(x_NF.device, block)
    grid = (-(-num_rows // rows), -(-width // block))
    # without a bias the kernel does not read it
    bias = x_NF if bias_F is None else bias_F.contiguous()
    constants = {"F": width, "BLOCK_F": block, "ROWS": rows, "HAS_BIAS": bias_F is not None}
    constants |= {"num_warps": warps}
    launch(_gelu_kernel, grid, x_NF, x_NF, bias, g_NF, num_rows, x_NF.stride(0), **constants)
    return g_NF


def _launch_gelu_backward(
    x_NF: Tensor, bias_F: Tensor | None, dg_NF: Tensor, g_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N,F] in x's dtype; the sums of dh in fp32 [F], empty without a bias; g [N,F], empty
    without g_dtype.
    """
    x_NF, dg_NF = _rows_of(x_NF), dg_NF.contiguous()
    num_rows, width = x_NF.shape
    block = column_block(width)
    rows, warps = rows_per_program(x_NF.device, block)
    warps *= 2  # half as many values per thread: its part of the sums stays in registers
    columns = -(-width // block)
    steps = -(-num_rows // (rows * max(BACKWARD_PROGRAMS // columns, 1)))
    programs = -(-num_rows // (rows * max(steps, 1)))
    dh_NF = torch.empty((num_rows, width), dtype=x_NF.dtype, device=x_NF.device)
    g_shape = (0,) if g_dtype is None else (num_rows, width)
    g_NF = torch.empty(g_shape, dtype=g_dtype, device=x_NF.device)
    sums = (programs, 0 if bias_F is None else width)
    partial_SF = torch.empty(sums, dtype=torch.float32, device=x_NF.device)
    bias = x_NF if bias_F is None else bias_F.contiguous()
    constants = {"F": width, "BLOCK_F": block, "ROWS": rows, "HAS_BIAS": bias_F is not None}
    constants |= {"WRITE_G": g_dtype is not None, "num_warps": warps}
    arguments = (x_NF, bias, dg_NF, dh_NF, g_NF, partial_SF, num_rows, x_NF.stride(0), steps)
    launch(_gelu_backward_kernel, (programs, columns), x_NF, *arguments, **constants)
    return dh_NF, partial_SF.sum(0), g_NF


# ---- registration ----
def _use_triton(x: Tensor, bias: Tensor | None, weight: Tensor) -> bool:
    bias_dtype = x.dtype if bias is None else bias.dtype
    return use_triton("gelu_linear", x.device, x.dtype, weight.dtype, bias_dtype)


@triton_op("mae_kernels::gelu_linear", mutates_args=())
def _gelu_linear_op(
    x: Tensor, bias: Tensor | None, weight: Tensor, out_bias: Tensor | None, recompute: bool
) -> tuple[Tensor, Tensor]:
    """out [..., D], and g [N, F] for the backward (empty with recompute), both in the dtype of
    weight.
    """
    x_NF = x.reshape(-1, x.shape[-1])
    if _use_triton(x, bias, weight):
        g_NF = _launch_gelu(x_NF, bias, weight.dtype)
    else:
        g_NF = _gelu(x, _hidden(x_NF, bias)).to(weight.dtype)
    out = _project(g_NF, weight, out_bias).view(*x.shape[:-1], weight.shape[0])
    return out, g_NF.new_empty(0) if recompute else g_NF


@triton_op("mae_kernels::gelu_linear_backward", mutates_args=())
def _gelu_linear_backward_op(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    g: Tensor | None,
    out_bias_dtype: torch.dtype,
    needs_weight: bool,
    needs_out_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [..., F], bias [F], weight [D, F] and out_bias [D]; empty for one that is not
    needed.
    """
    dout_ND, x_NF = dout.reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
    dweight = weight.new_empty(0)
    dout_bias = weight.new_empty(0, dtype=out_bias_dtype)
    make_g = needs_weight and g is None
    with no_autocast(x.device):
        dg_NF = dout_ND @ weight
    if _use_triton(x, bias, weight):
        dh_NF, dbias, g_made = _launch_gelu_backward(
            x_NF, bias, dg_NF, weight.dtype if make_g else None
        )
    else:
        h_NF = _hidden(x_NF, bias)
        dh_NF = dg_NF * _gelu_slope(x, h_NF)
        dbias = dh_NF.sum(0)
        g_made = _gelu(x, h_NF).to(weight.dtype) if make_g else weight.new_empty(0)
    del dg_NF  # before the gradient of weight is made
    if needs_weight:
        with no_autocast(x.device):
            dweight = dout_ND.t() @ (g_made if g is None else g)
    if needs_out_bias:  # torch's sum: a compiler may join it to what makes dout
        dout_bias = dout_ND.sum(0, dtype=accumulate_dtype(dout)).to(out_bias_dtype)
    return (
        dh_NF.to(x.dtype).view(x.shape),
        dbias.to(x.dtype if bias is None else bias.dtype),
        dweight,
        dout_bias,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, weight, out_bias, recompute = inputs
    ctx.save_for_backward(x, bias, weight, None if recompute else output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for an output that has no gradient
    ctx.out_bias_dtype = weight.dtype if out_bias is None else out_bias.dtype


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 5
    needs = ctx.needs_input_grad
    saved = (*ctx.saved_tensors, ctx.out_bias_dtype)
    found = _gelu_linear_backward_op(dout, *saved, needs[2], needs[3])
    dbias, *others = (x if need else None for x, need in zip(found[1:], needs[1:4], strict=True))
    return found[0], dbias, *others, None


_gelu_linear_op.register_autograd(_backward, setup_context=_setup)


# ---- public ----
def gelu_linear(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    out_bias: Tensor | None,
    *,
    recompute: bool = True,
) -> Tensor:
    """gelu(x + bias) weight^T + out_bias: the second half of a transformer's MLP, with the exact
    GELU.

    Args:
        x: [..., F] the first linear layer's product without its bias, `F.linear(tokens,
        fc1.weight)`; any strides.
        bias: [F] the first layer's bias, or None.
        weight: [D, F] and out_bias: [D] or None, the second layer.
        recompute: True keeps x only and makes gelu(x + bias) again in the backward, in the pass
            that reads x anyway; False keeps it, as many values as x has, and the backward writes as
            many less.

    Returns: [..., D] in the autocast dtype under autocast, else in x's dtype; weight and out_bias
    are cast to it. Gradients reach x, bias, weight and out_bias, each in its own dtype. Large
    finite x + bias give the limits of gelu and its derivative; infinite ones stay visible, as
    values that are not finite.

    Raises: TypeError or ValueError naming the argument.

    Example:
        >>> tokens, fc1 = torch.rand(8, 5, 16), torch.nn.Linear(16, 64)
        >>> fc2 = torch.nn.Linear(64, 16)
        >>> x = torch.nn.functional.linear(tokens, fc1.weight)
        >>> out = gelu_linear(x, fc1.bias, fc2.weight, fc2.bias)
        >>> torch.allclose(out, fc2(torch.nn.functional.gelu(fc1(tokens))), atol=1e-6)
        True
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, needs [..., F] with F of at least 1")
    width = x.shape[-1]
    check_shape("weight", weight, (None, width), "[D, F]")
    if weight.shape[0] < 1:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, needs [D, F] with D of at least 1"
        )
    check_same_device("weight", weight, "x", x)
    check_vector("bias", bias, width, "[F]", "x", x)
    check_vector("out_bias", out_bias, weight.shape[0], "[D]", "x", x)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute: got {type(recompute).__name__}, needs a bool")
    # cast once: the copy serves the forward and the backward, and torch casts its gradient back
    weight = weight.to(product_dtype(x.device, x.dtype))
    if wants_reference(x) and not _is_compiled_on_cpu(x):
        return reference(x, bias, weight, out_bias)
    return _gelu_linear_op(x, bias, weight, out_bias, recompute)[0]


# ---- samples ----
def _sample(
    size: Size,
    name: str,
    tokens: int,
    hidden: int,
    width: int,
    keep: bool = False,
    bias: bool = True,
) -> Sample:
    def make(draw: Draw) -> Made:
        tensors = {
            "x": draw.normal(draw.batch, tokens, hidden),
            "bias": draw.normal(hidden) if bias else None,
            "weight": draw.normal(width, hidden, scale=hidden**-0.5),
            "out_bias": draw.normal(width) if bias else None,
        }
        return tensors, {"recompute": not keep}

    gradients = ("x", "bias", "weight", "out_bias") if bias else ("x", "weight")
    return Sample("gelu_linear", name, gelu_linear, make, gradients, size)


@declares("gelu_linear")
def samples() -> list[Sample]:
    """Padded and whole blocks, with and without biases, g kept and made again; encoders and decoder
    of MAE's ViTs.
    """
    return [
        _sample("small", "37", 7, 37, 19),
        _sample("small", "192 kept without bias", 7, 192, 48, keep=True, bias=False),
        _sample("small", "two steps", 240, 1536, 40),
        _sample("model", "encoder S/16", 50, 1536, 384),
        _sample("model", "encoder B/16", 50, 3072, 768),
        _sample("model", "encoder L/16", 50, 4096, 1024),
        _sample("model", "decoder kept", 197, 2048, 512, keep=True),
    ]
