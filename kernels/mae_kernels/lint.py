"""Compile every kernel for every supported architecture, on any machine, and hold the machine code to rules.

`python -m mae_kernels --lint` prints the table; `lint(arch)` returns its rows. The ops run on meta tensors of real
sizes, so what is compiled is what they launch there. Rules: a cubin is built, no spills, no stack, shared memory within
the card's limit per block, no fp64 arithmetic, tensor-core instructions in every kernel with a dot from sm_80 on, no trap
that replaces a kernel, and 16-byte loads or stores where the layout allows them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._runtime import INTERPRET, Launch, backend, record_launches, triton_module
from ._samples import OPS

# KiB of shared memory that one block may use
SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ARCHITECTURES = tuple(SHARED_LIMITS)
# kernels that scatter small integers: no layout lets them use 16-byte accesses
SCATTERS = ("invert_kernel", "masking_kernel")


class Row(NamedTuple):
    """One kernel of one op, compiled for one architecture, and what it breaks (empty: nothing)."""

    op: str
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    widest: int
    problems: tuple[str, ...]


class LintCase(NamedTuple):
    """An op call on meta tensors; `wide` = its layout allows 16-byte accesses in every kernel."""

    op: str
    call: Callable[[torch.dtype], object]
    wide: bool = True
    architectures: tuple[int, ...] = ARCHITECTURES  # those where the op launches kernels


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(batch: int, listed: int) -> Tensor:
    return _meta(batch, listed, dtype=torch.int64)


def cases() -> Iterator[LintCase]:
    """The shapes of ViT-B/16 at 224, and odd ones: patch 14, one channel, channels-last."""
    ops = torch.ops.mae_kernels
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    rgb = _meta(64, 3, 224, 224, dtype=torch.uint8)
    nhwc = _meta(64, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    ct = _meta(64, 1, 224, 224, dtype=torch.uint8)
    fields = (_ids(64, 49),)
    yield LintCase(
        "gather_patches rgb", lambda t: ops.gather_patches(rgb, *fields, 16, mean, std, t)
    )
    yield LintCase(
        "gather_patches nhwc", lambda t: ops.gather_patches(nhwc, *fields, 16, mean, std, t)
    )
    yield LintCase(
        "gather_patches ct", lambda t: ops.gather_patches(ct, *fields, 16, [0.5], [0.2], t)
    )
    yield LintCase(
        "gather_patches p14",
        lambda t: ops.gather_patches(rgb, *fields, 14, mean, std, t),
        wide=False,
    )
    yield LintCase(
        "embed_patches",
        lambda t: ops.embed_patches(
            rgb,
            *fields,
            _meta(768, 3, 16, 16, dtype=t),
            None,
            _meta(196, 768, dtype=t),
            mean,
            std,
            t,
        ),
    )
    yield LintCase(
        "embed_patches_backward",
        lambda t: ops.embed_patches_backward(
            _meta(64, 49, 768, dtype=t),
            rgb,
            *fields,
            16,
            196,
            mean,
            std,
            t,
            t,
            t,
            t,
            True,
            True,
            True,
        ),
    )
    masked, mask = _ids(64, 147), _meta(64, 196, dtype=torch.bool)
    scalar = _meta(dtype=torch.float32)
    losses = (
        ("channel", rgb, "rgb"),
        ("patch", rgb, "rgb"),
        ("patch", ct, "ct"),
        ("none", nhwc, "nhwc mask"),
    )
    for norm, images, layout in losses:
        name = f"masked_reconstruction_loss {layout} {norm}"
        channels = images.shape[1]
        select = (None, mask) if norm == "none" else (masked, None)
        rest = (images, *select, 16, norm, 1e-6, mean[:channels], std[:channels])
        shape = (64, 196 if norm == "none" else 147, channels * 256)

        def forward(t: torch.dtype, rest: Any = rest, shape: Any = shape) -> object:
            return ops.masked_reconstruction_loss(_meta(*shape, dtype=t), *rest)

        def backward(t: torch.dtype, rest: Any = rest, shape: Any = shape) -> object:
            return ops.masked_reconstruction_loss_backward(
                scalar, scalar, _meta(*shape, dtype=t), *rest
            )

        yield LintCase(name, forward)
        yield LintCase(name, backward)
    for patches in (1024, 196):
        noise = _meta(64, patches, dtype=torch.float32)
        yield LintCase(
            f"random_masking {patches}",
            lambda t, noise=noise: ops.random_masking(noise, 49),  # type: ignore[misc]
        )
    for logits in (16384, 4096):
        yield from _distillation_cases(logits)
    tensor_cores = tuple(a for a in ARCHITECTURES if a >= OPS["attention"].oldest)
    yield from _attention_cases(
        197, 12, 64, torch.bfloat16, tuple(a for a in tensor_cores if a < 120)
    )
    yield from _attention_cases(197, 16, 32, torch.bfloat16, tensor_cores)
    yield from _attention_cases(50, 12, 64, torch.bfloat16, tensor_cores)
    yield from _attention_cases(
        197, 16, 32, torch.float16, (90,)
    )  # another type in the same instructions
    yield from _sssd_cases(rgb, "rgb")
    yield from _restore_cases(512)
    yield from _gelu_cases(3072)
    yield _crop_case(1, "grey")
    yield _crop_case(3, "rgb")


def _distillation_cases(logits: int) -> Iterator[LintCase]:
    ops = torch.ops.mae_kernels
    centre = _meta(logits, dtype=torch.float32)
    grad = _meta(dtype=torch.float32)

    def rows(t: torch.dtype) -> tuple[Tensor, Tensor]:
        return _meta(256, logits, dtype=t), _meta(256, logits, dtype=t)

    def backward(t: torch.dtype) -> object:
        return ops.distillation_loss_backward(grad, *rows(t), centre, 0.1, 0.04, True)

    yield LintCase(
        f"distillation_loss {logits}",
        lambda t: ops.distillation_loss(*rows(t), centre, False, 0.1, 0.04),
    )
    yield LintCase(f"distillation_loss {logits}", backward)


def _sssd_cases(images: Tensor, name: str) -> Iterator[LintCase]:
    ops = torch.ops.mae_kernels
    grad = _meta(dtype=torch.float32)
    centre = _meta(4096, dtype=torch.float32)
    channels = images.shape[1]
    options = (16, "patch", 1e-6, [0.5] * channels, [0.25] * channels, 0.2)

    def tensors(t: torch.dtype) -> tuple[Any, ...]:
        logits = _meta(64, 4096, dtype=t), _meta(64, 4096, dtype=t)
        return _meta(64, 147, channels * 256, dtype=t), images, *logits, _ids(64, 147), None, centre

    def backward(t: torch.dtype) -> object:
        return ops.sssd_loss_backward(*[grad] * 4, *tensors(t), *options, 0.1, 0.04, True)

    yield LintCase(
        f"sssd_loss {name}", lambda t: ops.sssd_loss(*tensors(t), *options, False, 0.1, 0.04)
    )
    yield LintCase(f"sssd_loss {name}", backward)


def _attention_cases(
    tokens: int, heads: int, width: int, half: torch.dtype, architectures: tuple[int, ...]
) -> Iterator[LintCase]:
    ops = torch.ops.mae_kernels
    qkv = _meta(8, tokens, 3, heads, width, dtype=half)
    out = _meta(8, tokens, heads, width, dtype=half)
    lse = _meta(8, heads, tokens, dtype=torch.float32)
    name = f"attention {tokens} x {heads} x {width}{' fp16' if half == torch.float16 else ''}"
    yield LintCase(name, lambda t: ops.attention(qkv, width**-0.5), True, architectures)
    yield LintCase(
        name, lambda t: ops.attention_backward(out, qkv, out, lse, width**-0.5), True, architectures
    )


def _restore_cases(width: int) -> Iterator[LintCase]:
    ops = torch.ops.mae_kernels
    ids = _ids(64, 196)
    pos = _meta(197, width, dtype=torch.float32)

    def forward(t: torch.dtype) -> object:
        return ops.restore_tokens(_meta(64, 50, width, dtype=t), ids, pos[0], pos, 1)

    def backward(t: torch.dtype) -> object:
        return ops.restore_tokens_backward(
            _meta(64, 197, width, dtype=t), ids, 50, 1, t, t, t, False
        )

    yield LintCase(f"restore_tokens {width}", forward)
    yield LintCase(f"restore_tokens {width}", backward)


def _gelu_cases(hidden: int) -> Iterator[LintCase]:
    """The backward with g made again, and with g kept."""
    ops, name = torch.ops.mae_kernels, f"gelu_linear {hidden}"

    def tensors(t: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return (
            _meta(64, 50, hidden, dtype=t),
            _meta(hidden, dtype=torch.float32),
            _meta(hidden // 4, hidden, dtype=t),
        )

    def backward(t: torch.dtype, keep: bool) -> object:
        dout = _meta(64, 50, hidden // 4, dtype=t)
        g = _meta(64 * 50, hidden, dtype=t) if keep else None
        return ops.gelu_linear_backward(dout, *tensors(t), g, t, True, False)

    yield LintCase(name, lambda t: ops.gelu_linear(*tensors(t), None, True))
    yield LintCase(name, lambda t: backward(t, False))
    yield LintCase(f"{name} g kept", lambda t: backward(t, True))


def _crop_case(channels: int, name: str) -> LintCase:
    """Its loads are single bytes, wherever the taps of a column fall."""
    index = _meta(64, 8, dtype=torch.int64)
    tensors = (
        _meta(10**8, dtype=torch.uint8),
        index[:, 0],
        index[:, 1:3],
        index[:, 3:7],
        _meta(64, dtype=torch.bool),
    )
    call = torch.ops.mae_kernels.crop_resize
    return LintCase(
        f"crop_resize {name}", lambda t: call(*tensors, [224, 224], channels), wide=False
    )


def lint(arch: int, only: Collection[str] | None = None) -> list[Row]:
    """Compile what every case launches on sm_<arch>; `only`: the cases of these names.

    Raises RuntimeError under the interpreter or without triton.
    """
    if INTERPRET:
        raise RuntimeError("lint: got TRITON_INTERPRET=1, needs the compiler (unset it)")
    dtype = torch.float16 if arch < 80 else torch.bfloat16
    rows, seen = [], set()
    for case in cases():
        if arch not in case.architectures or (only is not None and case.op not in only):
            continue
        with backend("triton"), record_launches(arch) as launches:
            case.call(dtype)
        if not launches:
            raise RuntimeError(f"lint: {case.op} launched no kernel for sm_{arch}")
        for launched in launches:
            key = repr(_specialise(launched)) + launched.kernel.fn.__name__
            if key not in seen:
                seen.add(key)
                rows.append(judge(case, launched, arch))
    return rows


def _specialise(
    launched: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, Any]]:
    """Signature, constants and attributes as the just-in-time compiler would derive them from these arguments."""
    names = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.uint8: "u8",
    }
    names |= {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}
    parameters = launched.kernel.arg_names
    options = {k: v for k, v in launched.constants.items() if k not in parameters}
    constants = {k: v for k, v in launched.constants.items() if k in parameters}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], Any] = {}
    for place, (name, value) in enumerate(zip(parameters, launched.args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = "*" + names[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    return {n: signature[n] for n in parameters}, constants, attributes, options


def judge(case: LintCase, launched: Launch, arch: int) -> Row:
    """Compile one launch for sm_<arch> and hold it to the rules."""
    triton = triton_module()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = _specialise(launched)
    source = ASTSource(launched.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, shared = built.asm["ptx"], built.metadata.shared
    registers, stack = _resources(built.asm["cubin"])
    spills = built.asm["ptx"].count("st.local") + stack
    dots = "tt.dot" in built.asm["ttir"]
    widest = max([4 * int(n) for n in re.findall(r"(?:ld|st)\.global\S*\.v(\d)\.b32", ptx)] or [4])
    problems = []
    if spills:
        problems.append(f"{stack} bytes of stack")
    if shared > SHARED_LIMITS[arch] * 1024:
        problems.append(f"{shared} bytes of shared memory, limit {SHARED_LIMITS[arch]} KiB")
    if re.search(r"\.f64\b", ptx):
        problems.append("fp64 arithmetic")
    if "trap;" in ptx:
        problems.append("a trap in place of the kernel")
    if dots and arch >= 80 and not re.search(r"mma\.sync|wgmma|tcgen05\.mma", ptx):
        problems.append("a dot without tensor cores")
    if case.wide and widest < 16 and launched.kernel.fn.__name__.strip("_") not in SCATTERS:
        problems.append(f"no access of 16 bytes, widest {widest}")
    name = launched.kernel.fn.__name__.strip("_")
    return Row(case.op, name, arch, registers, spills, shared, widest, tuple(problems))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, read with the cuobjdump that comes with triton."""
    folder = Path(triton_module().__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"lint: cuobjdump told no resources: {printed[-300:]}")
    return int(found[1]), int(found[2]) + int(found[3])


def table(architectures: tuple[int, ...] = ARCHITECTURES) -> str:
    """The lint of all kernels as a Markdown table, one line per kernel and architecture."""
    lines = [
        "| op | kernel | sm | registers | stack B | shared B | widest access B | problems |",
        "|---" * 8 + "|",
    ]
    for arch in architectures:
        lines += [
            f"| {r.op} | {r.kernel} | {r.arch} | {r.registers} | {r.spills} | {r.shared} | {r.widest} | "
            f"{'; '.join(r.problems) or 'none'} |"
            for r in lint(arch)
        ]
    return "\n".join(lines)
