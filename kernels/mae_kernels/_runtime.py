"""Which implementation of an op runs, and how a kernel is started.

Each op is a functional `triton_op` that branches on the device inside its function, because that
function is what torch.compile traces again, on any device. Its backward is a second op. Eager code
calls the function past torch's dispatcher, which would take longer on the host than a small kernel
on a GPU. Triton is optional: without it the kernels are plain functions that are never called.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import wrap_triton

from ._samples import OPS

Function = TypeVar("Function", bound=Callable[..., Any])

tl: Any
try:
    import triton
    import triton.language as tl  # type: ignore[no-redef]

    HAVE_TRITON = True
    jit: Callable[..., Any] = triton.jit
except ImportError:
    HAVE_TRITON = False
    tl = None

    def jit(kernel: Any = None, **options: Any) -> Any:
        return kernel or jit


# TRITON_INTERPRET=1 makes Triton run kernels in Python on CPU tensors: for tests, with the backend
# "triton"
INTERPRET = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
BACKENDS = ("auto", "triton", "reference", "registered")


def _checked(source: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, needs one of {', '.join(BACKENDS)}")
    return name


_backend = _checked("MAE_KERNELS_BACKEND", os.environ.get("MAE_KERNELS_BACKEND", "auto"))
_recording: tuple[int, list[Launch] | None] | None = None
_pretending = False  # inside `as_on_gpu`


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation inside a `with` block: "auto", "triton", "reference" or
    "registered".

    "reference" is plain torch with torch's own autograd. "auto" takes the kernels on a GPU where
    they can run, and plain torch elsewhere. "triton" raises RuntimeError, with the reason, where an
    op's kernels cannot run. "registered" is "auto", except that the registered op and its own
    backward run on the CPU too: for tests of what a compiler sees. The environment variable
    MAE_KERNELS_BACKEND sets the choice at import. A compiled function keeps the choice that was in
    force when it was traced. Raises ValueError for any other name.
    """
    global _backend
    before, _backend = _backend, _checked("backend", name)
    try:
        yield
    finally:
        _backend = before


def wants_reference(on: Tensor) -> bool:
    """Whether a public function takes the reference, past its registered op.

    On the CPU it does unless the backend is "triton": what an op saves in memory by computing twice
    costs time there.
    """
    return _backend == "reference" or (_backend == "auto" and not on.is_cuda and not _pretending)


def wants_cpu_ops(on: Tensor) -> bool:
    """Whether a public function may take an op written for the CPU."""
    return on.device.type == "cpu" and _backend == "auto" and not _pretending


def always_registered() -> bool:
    """Whether the registered op runs even where plain torch would do as well."""
    return _backend == "registered"


def constant_in_graphs(function: Function) -> Function:
    """torch.compiler.assume_constant_result without its import of the compiler: torch.compile calls
    the function when it traces and keeps the result.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_read_capability = functools.cache(torch.cuda.get_device_capability)


@constant_in_graphs
def _capability(index: int | None) -> tuple[int, int]:
    return _read_capability(index)


def architecture(device: torch.device) -> int:
    """75 for sm_75 and so on; 75 under the interpreter; the architecture of record_launches while
    it records.
    """
    if _recording is not None:
        return _recording[0]
    if device.type != "cuda":
        return 75
    major, minor = _capability(device.index)
    return 10 * major + minor


def why_not_triton(op: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """The reason why the op's kernels cannot run on this device with these dtypes; None when they
    can.
    """
    if not HAVE_TRITON:
        return "triton is not installed"
    if device.type == "cpu" and not INTERPRET and not _pretending:
        return "the tensors are on the CPU"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernels are checked for NVIDIA GPUs only"
    arch, oldest = architecture(device), OPS[op].oldest
    if device.type == "cuda" and arch < 75:
        return f"the GPU is sm_{arch}, older than sm_75"
    if device.type == "cuda" and arch < oldest:
        return f"Triton has no tensor cores on sm_{arch}, before sm_{oldest}"
    if device.type not in ("cpu", "cuda") and _recording is None:
        return f"the tensors are on a {device.type} device"
    wide = torch.float64 in dtypes
    return "the kernels compute in fp32 and the tensors are fp64" if wide else None


def use_triton(
    op: str, device: torch.device, *dtypes: torch.dtype, refused: str | None = None
) -> bool:
    """Whether the op's kernels run; `refused` is the op's reason against them, if any.

    Raises RuntimeError, with the reason, when the backend is "triton" and they cannot.
    """
    reason = why_not_triton(op, device, *dtypes) or refused
    if _backend == "triton" and reason is not None:
        raise RuntimeError(f"{op}: backend 'triton' was requested, but {reason}")
    if device.type == "cpu" and _backend != "triton" and not _pretending:
        return False  # the interpreter is for tests that request it
    return _backend != "reference" and reason is None


class Launch(NamedTuple):
    """A kernel launch that the lint compiles instead of running."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


@contextmanager
def record_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside the block, ops on meta tensors choose their kernels as for sm_<arch>, and launches are
    only recorded.
    """
    global _recording
    launches: list[Launch] = []
    _recording = (arch, launches)
    try:
        yield launches
    finally:
        _recording = None


@contextmanager
def as_on_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Inside the block, ops on fake tensors choose what they choose on a GPU of that compute
    capability.

    No kernel starts. With torch's FakeTensorMode on the CPU this shows what a step would allocate
    on a GPU that is not there.
    """
    global _recording, _pretending
    _recording, _pretending = (10 * capability[0] + capability[1], None), True
    try:
        yield
    finally:
        _recording, _pretending = None, False


# of the dispatcher: there while a mode sees calls before autograd does (torch.export)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_eager() -> bool:
    """False if a compiler, a dispatch mode or a transformation sees what the ops do."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **constants: Any) -> None:
    """Start a kernel on the device of `on`; an empty grid starts nothing."""
    if any(size == 0 for size in grid):
        return
    if _recording is not None:
        if _recording[1] is not None:
            _recording[1].append(Launch(kernel, args, constants))
    elif INTERPRET:
        kernel[grid](*args, **constants)
    else:
        here = not (on.is_cuda and torch.cuda.is_initialized())
        here = here or on.device.index == torch.cuda.current_device()
        start = kernel if is_eager() else wrap_triton(kernel)
        with nullcontext() if here else torch.cuda.device(on.device):
            start[grid](*args, **constants)


def triton_op(name: str, *, mutates_args: tuple[str, ...]) -> Callable[..., Any]:
    """torch.library.triton_op; eager code on plain tensors calls the function itself, with an
    autograd function made of the formula that `register_autograd` got.

    Compilers, dispatch modes, tensor subclasses, transformations and the profiler get the
    registered op.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        registered = _registered(name, function, mutates_args)
        overload = registered._opoverload
        # without a formula the registered op, whose backward raises
        with_gradients = [overload]

        def call(*args: Any) -> Any:
            if not is_eager() or torch._C._autograd._profiler_enabled():
                return overload(*args)
            needs_grad = False
            for x in args:
                if isinstance(x, Tensor):
                    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
                        return overload(*args)
                    needs_grad = needs_grad or x.requires_grad
            needs_grad = needs_grad and torch.is_grad_enabled()
            return with_gradients[0](*args) if needs_grad else function(*args)

        def register_autograd(backward: Any, *, setup_context: Any) -> None:
            registered.register_autograd(backward, setup_context=setup_context)

            def forward(ctx: Any, *args: Any) -> Any:
                output = function(*args)
                setup_context(ctx, args, output)
                return output

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            node: Any = type(name.partition("::")[2], (torch.autograd.Function,), methods)
            with_gradients[0] = node.apply

        call.register_autograd = register_autograd  # type: ignore[attr-defined]
        return call

    return decorate


def _registered(name: str, function: Callable[..., Any], mutates_args: tuple[str, ...]) -> Any:
    """torch.library.triton_op without its search for kernels in the source of the op.

    `launch` hides the kernels from the search, so it finds none. But it imports the compiler, which
    doubles the time of `import torch`, and warns at each op if triton is missing.
    """
    module: Any = importlib.import_module("torch._library.triton")
    search = getattr(module, "get_inner_triton_kernels", None)
    if search is None:
        return torch.library.triton_op(name, function, mutates_args=mutates_args)
    module.get_inner_triton_kernels = lambda _: []
    try:
        return torch.library.triton_op(name, function, mutates_args=mutates_args)
    finally:
        module.get_inner_triton_kernels = search


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with each NamedTuple among its parameters replaced by the fields of that tuple:
    torch.library registers functions of tensors and numbers only.
    """
    kinds = get_type_hints(function)
    returned = kinds.pop("return")
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters: list[inspect.Parameter] = []
    spans: list[tuple[Callable[..., Any] | None, int, int]] = []
    for name, kind in kinds.items():
        nested = hasattr(kind, "_fields")
        fields = get_type_hints(kind) if nested else {name: kind}
        first = len(parameters)
        parameters += [inspect.Parameter(n, either, annotation=t) for n, t in fields.items()]
        spans.append((kind if nested else None, first, len(parameters)))

    def flattened(*args: Any) -> Any:
        packed = [args[i] if make is None else make(*args[i:j]) for make, i, j in spans]
        return function(*packed)

    signature = inspect.Signature(parameters, return_annotation=returned)
    flattened.__signature__ = signature  # type: ignore[attr-defined]
    return flattened


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For matrix products whose dtype has been chosen already."""
    on = device.type in ("cpu", "cuda")
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def product_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of a matrix product: autocast's where autocast is on, else `otherwise`."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return otherwise
    return torch.get_autocast_dtype(device.type)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# Tiles of the memory-bound kernels: (widest tile row, elements per program, warps). The first line
# that fits holds. Chosen from the 16 bytes a thread loads at once; not tuned on any GPU yet.
TILES = ((1024, 2048, 4), (4096, 4096, 8), (16384, 16384, 16))
MAX_TILE_WIDTH = TILES[-1][0]


def rows_per_program(device: torch.device, width: int) -> tuple[int, int]:
    """Rows of `width` values (a power of two) that one program handles, and its warps."""
    for widest, elements, warps in TILES:
        if width <= widest:
            return max(1, min(elements // width, 64)), warps
    raise ValueError(f"width: got a tile row of {width} values, needs at most {MAX_TILE_WIDTH}")


def column_block(width: int) -> int:
    """The widest power of two up to 512 that divides the width, when it is at least 64; else one
    padded block.
    """
    divisor = width & -width
    return min(divisor, 512) if divisor >= 64 else min(next_power_of_2(width), 512)


def info() -> dict[str, str | None]:
    """For each op: None if its Triton kernels would run on this machine, else the reason why they
    would not.

    A single call can still be refused, because of its sizes or dtype; the backend "triton" raises
    the reason then.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    reasons = {op: why_not_triton(op, device) for op in OPS}
    if _backend == "reference":
        return dict.fromkeys(OPS, "the backend is set to 'reference'")
    if device.type == "cpu" and _backend != "triton":
        return {op: reason or "the tensors are on the CPU" for op, reason in reasons.items()}
    return reasons
