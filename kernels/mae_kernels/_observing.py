"""Whether a host's method computes what a Part computes, by running both under observation.

What could make a later call of the host's method differ from the observed one, and how each is
found:
    other values in tensors     operations that are not smooth, or that read a value (_Operations)
    other arguments             patching.py
    other attributes            each attribute that the method read is listed (_Attributes), and
                                compared again at each call (Settings)
    another number of calls     blocks are replaced by functions that record calls (_Probe)
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import inspect
import io
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ._runtime import backend
from .host_models import Part


class Differs(Exception):
    """The host keeps its own method; the message says why."""


# ------------------------------------------------------------------------------- settings
class Settings(NamedTuple):
    """The attributes that a host's method read, and their values when it was compared."""

    # "a.b" of plain values; "a.__class__" of modules, "a.shape" of tensors, "a.__func__" of methods
    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, read: set[str]) -> Settings:
        """Raises Differs for what may change unseen, such as a dict of tensors."""
        found: dict[str, Any] = {}
        missing = []
        # what the comparison made random
        random_tensors = {id(t) for t in (*module.parameters(), *module.buffers())}
        for name in sorted(read):
            value = _attribute(module, name)
            if value is _MISSING:
                missing.append(name)
            elif isinstance(value, Tensor) and id(value) not in random_tensors:
                raise Differs(f"it reads {name}, a tensor that is no parameter and no buffer")
            else:
                found |= _identity(name, value)
        return cls(tuple(found), tuple(found.values()), tuple(missing))

    def changed(self, module: nn.Module) -> str | None:
        """The first attribute that has another value now; None if none has."""
        if not torch.compiler.is_compiling():
            # one call for all names: a model calls this for each layer
            try:
                same = _getter(self.names)(module) == self.values
            except (AttributeError, RuntimeError, ValueError):
                # a name is missing, or a tensor is compared
                same = False
            if same and all(_attribute(module, name) is _MISSING for name in self.missing):
                return None
        for name, value in zip(self.names, self.values, strict=True):
            now = _attribute(module, name)
            if now is value or (name.endswith("_hooks") and not len(now)):
                continue
            if now is _MISSING or type(now) is not type(value) or now != value:
                return name.partition(".__")[0]
        for name in self.missing:
            if _attribute(module, name) is not _MISSING:
                return name
        return None


_MISSING = object()
# what a plain value may consist of
ATOMS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum)
ATOMS += (range, slice, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType)


@functools.lru_cache(maxsize=256)
def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    # of one name, attrgetter does not return a tuple
    return (
        operator.attrgetter(*names)
        if len(names) > 1
        else lambda x: tuple(operator.attrgetter(name)(x) for name in names)
    )


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        # in a form that torch.compile traces
        if part == "__class__":
            module = type(module)
        elif part == "__func__":
            module = module.__func__ if isinstance(module, types.MethodType) else _MISSING
        else:
            module = getattr(module, part, _MISSING)
    return module


def _identity(name: str, value: Any) -> dict[str, Any]:
    """What must stay equal for a method that reads this value."""
    if isinstance(value, Tensor):
        # random in the comparison, so any values will do
        if type(value) not in (nn.Parameter, Tensor) or not value.is_floating_point():
            raise Differs(f"it reads {name}, a {type(value).__name__} of {value.dtype}")
        return {f"{name}.__class__": type(value), f"{name}.shape": value.shape}
    if isinstance(value, types.MethodType):
        return {f"{name}.__func__": value.__func__}
    if name.endswith("_hooks") and value:
        raise Differs(f"there are hooks on {name.rpartition('.')[0]}")
    if _is_plain(value):
        return {name: copy.deepcopy(value)}
    if isinstance(value, nn.Module) or _may_be_watched(value):
        return {f"{name}.__class__": type(value)}
    raise Differs(f"it reads {name}, a {type(value).__name__}, whose changes would not be seen")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_plain(list(value)) and _is_plain(list(value.values()))
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, ATOMS)


def _may_be_watched(value: Any) -> bool:
    """Whether the attributes of this object, such as a configuration, can be observed."""
    kinds = (nn.Module, Tensor, types.MethodType, types.ModuleType, Mapping, list, tuple, set)
    return hasattr(value, "__dict__") and not isinstance(value, (*kinds, *ATOMS))


# ------------------------------------------------------------------------------ observe
# what every module has; hooks and `forward` decide what a call does
SKIPPED = set(dir(nn.Module())) - {"forward", "_forward_hooks", "_forward_pre_hooks"}
SKIPPED -= {"_backward_hooks", "_backward_pre_hooks"}


class _Attributes:
    """Names of the attributes that are read and set, of a module and all that is reached from it.

    Every observed object gets a subclass of its class, until the `with` block ends.
    """

    def __init__(self, module: nn.Module) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()
        # containers as they were when they were read first
        self.containers: dict[str, Any] = {}
        self._module = module
        self._classes: list[tuple[Any, type]] = []
        self._watched: dict[int, Any] = {}

    def __enter__(self) -> _Attributes:
        for name, module in self._module.named_modules():
            if not isinstance(module, _Probe):
                self._watch(module, f"{name}." if name else "")
        return self

    def __exit__(self, *_: Any) -> None:
        for value, cls in self._classes:
            object.__setattr__(value, "__class__", cls)

    def _watch(self, value: Any, prefix: str) -> None:
        cls: Any = type(value)
        log = self

        def get(this: Any, name: str) -> Any:
            # the class may make other objects
            if this is not value or name.startswith("__") or name in SKIPPED:
                return cls.__getattribute__(this, name)
            log.read.add(prefix + name)
            found = cls.__getattribute__(this, name)
            if _may_be_watched(found) and id(found) not in log._watched:
                log._watch(found, f"{prefix}{name}.")
            if isinstance(found, (dict, list, set)) and _is_plain(found):
                log.containers.setdefault(prefix + name, copy.deepcopy(found))
            return found

        def put(this: Any, name: str, new: Any) -> None:
            if this is value:
                log.written.add(prefix + name)
            cls.__setattr__(this, name, new)

        methods: dict[str, Any] = {"__getattribute__": get, "__setattr__": put}
        methods |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        watched = type(cls.__name__, (cls,), methods)
        try:
            object.__setattr__(value, "__class__", watched)
        except TypeError:
            raise Differs(
                f"it reads {prefix[:-1]}, a {cls.__name__}, which cannot be observed"
            ) from None
        self._classes.append((value, cls))
        self._watched[id(value)] = value


# Operations whose results are smooth in their floating point arguments, that only move them, or
# that draw random numbers, whose state is compared. `sort` gives the order of random numbers; what
# depends on the order of other values differs in numbers.
SMOOTH_NAMES = """
_index_put_impl_ bernoulli bernoulli_ index_add index_add_ native_dropout scatter_add scatter_add_
_log_softmax _reshape_alias _reshape_copy _safe_softmax _scaled_dot_product_attention_math
_scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_index _unsafe_view add add_
addmm addmv alias argsort as_strided baddbmm bmm cat chunk clone col2im constant_pad_nd convolution
copy_ cos cumsum detach diagonal div div_ dot empty_like erf exp expand expm1 fill fill_ flip
full_like gather gelu im2col index index_put index_put_ index_select lift_fresh log log1p logsumexp
masked_fill masked_fill_ mean mm mse_loss mul mul_ mv narrow native_group_norm native_layer_norm neg
new_empty new_empty_strided new_full new_ones new_zeros normal_ ones_like permute pow rand_like
randn_like reciprocal repeat reshape roll rsqrt rsub scatter scatter_ select sigmoid silu sin slice
softplus sort split split_with_sizes sqrt square squeeze stack std std_mean sub sub_ sum t tanh
transpose tril triu unbind unfold uniform_ unsqueeze upsample_bicubic2d upsample_bilinear2d var
var_mean view where zero_ zeros_like
"""
SMOOTH = frozenset(SMOOTH_NAMES.split())
READS = ("numpy", "__array__", "tolist", "data_ptr", "untyped_storage")


class _Operations(TorchDispatchMode):
    """The names of operations that are not smooth, in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        floating = any(t.is_floating_point() for t in _tensors([*args, *(kwargs or {}).values()]))
        known = name in SMOOTH or "_backward" in name
        rounded = func._overloadname.endswith("_mode") or (
            name in ("_to_copy", "copy_") and not result.is_floating_point()
        )
        if floating and (rounded or not known):
            self.found["values of tensors" if name == "_local_scalar_dense" else name] = None
        return result


class _Reads(TorchFunctionMode):
    """Reads of values that are no operations, in `found`."""

    def __init__(self, found: dict[str, None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.found["values of tensors"] = None
        return func(*args, **(kwargs or {}))


class _Probe(nn.Module):
    """Instead of a block: a smooth function that mixes all tokens, and records the call."""

    def __init__(self, index: int, calls: list[Any]) -> None:
        super().__init__()
        self.index = index
        self.calls = calls

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        extra = [*args, *kwargs.values()]
        self.calls.append((self.index, sum(value is not None for value in extra)))
        generator = torch.Generator().manual_seed(self.index)
        width = x.shape[-1]
        weight = torch.randn(width, width, generator=generator, dtype=x.dtype) / width**0.5
        return x + torch.tanh(x @ weight + x.mean(1, keepdim=True))


# --------------------------------------------------------------------------------- compare
class _Result(NamedTuple):
    outputs: Any
    # of inputs and parameters, for fixed upstream gradients
    gradients: list[Tensor]
    # (index, number of further arguments) of each call of a block
    calls: list[tuple[int, int]]
    read: set[str]
    written: set[str]
    random: Tensor


def compare(module: nn.Module, part: Part) -> tuple[Settings | None, str | None]:
    """(what the result depends on, None if that is unknown; why the host keeps its own method, None
    if the part gives the same).
    """
    try:
        signature = inspect.signature(getattr(module, part.method))
        named = [p for p in signature.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        unknown = [p.name for p in named[part.arguments :] if p.default is p.empty]
        if unknown or len(named) < part.arguments:
            raise Differs(f"{part.method} takes {', '.join(unknown) or signature}")
        with (
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            backend("reference"),
            torch.random.fork_rng(devices=[]),
        ):
            copied, calls = _random_copy(module, part.stacks)
            read = _compare(copied, calls, part)
        return Settings.of(module, read), None
    except Differs as difference:
        return None, str(difference)
    except Exception as error:  # noqa: BLE001 - the host's code may fail in any way here
        text = " ".join(str(error).split())
        kind = type(error).__name__
        return None, f"could not be compared on the CPU in float64 ({kind}: {text[:160]})"


def _compare(copied: nn.Module, calls: list[Any], part: Part) -> set[str]:
    """The attributes that the host's method read. Raises Differs."""
    read: set[str] = set()
    served = False
    with _Attributes(copied) as attributes:
        for training in (True, False):
            copied.train(training)
            torch.default_generator.manual_seed(0)
            for arguments in part.trials(copied):
                if not part.fits(copied, *arguments):
                    continue
                served = True
                run = functools.partial(_run, copied, calls, attributes, arguments)
                host = run(getattr(copied, part.method), observed=True)
                ours = run(functools.partial(part.own, copied), observed=False)
                _check_equal(host, ours, part)
                # a module that both call may change as it likes
                places = [name for name in ours.read if name.endswith(".forward")]
                called = tuple(name.removesuffix("forward") for name in places)
                if written := [n for n in host.written if not f"{n}.".startswith(called)]:
                    raise Differs(f"it sets {', '.join(sorted(written))}")
                read |= {
                    name
                    for name in host.read
                    if not (name in ours.read and f"{name}.".startswith(called))
                }
    if not served:
        raise Differs(part.never)
    for name, value in attributes.containers.items():
        if name in read and _attribute(copied, name) != value:
            raise Differs(f"it changes {name}")
    return read


def _run(
    copied: nn.Module,
    calls: list[Any],
    attributes: _Attributes,
    arguments: tuple[Any, ...],
    method: Callable[..., Any],
    *,
    observed: bool,
) -> _Result:
    """One call, forward and backward. `observed`: raises Differs for what could differ later."""
    for record in (calls, attributes.read, attributes.written):
        record.clear()
    torch.default_generator.manual_seed(1)
    versions = [t._version for t in _tensors(arguments)]
    python, numpy = random.getstate(), _numpy_state()
    operations, printed = _Operations(), io.StringIO()
    with contextlib.redirect_stdout(printed), operations, _Reads(operations.found):
        outputs = method(*arguments)
        gradients = _gradients(copied, arguments, outputs)
    if observed:
        if operations.found:
            raise Differs(f"its result may jump with values ({', '.join(operations.found)})")
        if versions != [t._version for t in _tensors(arguments)]:
            raise Differs("it changes its arguments")
        if printed.getvalue():
            raise Differs("it prints")
        if (python, numpy) != (random.getstate(), _numpy_state()):
            random.setstate(python)
            raise Differs("it draws random numbers of Python or NumPy")
    records = (list(calls), set(attributes.read), set(attributes.written))
    return _Result(outputs, gradients, *records, torch.default_generator.get_state())


def _numpy_state() -> str:
    numpy = sys.modules.get("numpy")
    return "" if numpy is None else str(numpy.random.get_state())


def _random_copy(module: nn.Module, stacks: tuple[str, ...]) -> tuple[nn.Module, list[Any]]:
    """A deep copy on the CPU in float64 without hooks, and the list of calls of its blocks.

    Its parameters and buffers are random: one that is initialised to zero would hide what it does.
    """
    calls: list[Any] = []
    memo: dict[int, Any] = {}
    inner: set[int] = set()
    for name in stacks:
        blocks = _attribute(module, name)
        listed = isinstance(blocks, (nn.ModuleList, nn.Sequential))
        for block in blocks if listed else () if blocks is _MISSING else (blocks,):
            memo[id(block)] = _Probe(len(memo), calls)
            inner |= {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
    for parameter in module.parameters():
        if id(parameter) not in inner:
            fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 4
            value = torch.randn(parameter.shape, dtype=torch.float64) / fan_in**0.5
            memo[id(parameter)] = nn.Parameter(value)
    for buffer in module.buffers():
        if id(buffer) not in inner and buffer.is_floating_point():
            memo[id(buffer)] = 0.5 + torch.rand(buffer.shape, dtype=torch.float64)
    copied = copy.deepcopy(module, memo).cpu()
    for child in copied.modules():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
        child._backward_hooks.clear()
        child._backward_pre_hooks.clear()
    return copied, calls


def _gradients(copied: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> list[Tensor]:
    leaves = [t for t in _tensors(arguments) if t.requires_grad]
    leaves += copied.parameters()
    generator = torch.Generator().manual_seed(1)
    # connects every leaf, also those that the method does not use
    total = torch.stack([leaf.sum() for leaf in leaves]).sum() * 0
    for output in _tensors(outputs):
        if output.requires_grad:
            upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output * upstream).sum()
    return list(torch.autograd.grad(total, leaves))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _check_equal(host: _Result, ours: _Result, part: Part) -> None:
    if host.calls != ours.calls:
        if any(extra for _, extra in host.calls):
            raise Differs("it calls its blocks with more arguments than the tokens")
        if host.calls[: len(ours.calls)] == ours.calls:
            raise Differs("it runs its blocks again in the backward (gradient checkpointing)")
        raise Differs("it does not call all its blocks one after another")
    _check_outputs("the result", host.outputs, ours.outputs, part.tolerance)
    for want, have in zip(host.gradients, ours.gradients, strict=True):
        _check_outputs("a gradient", want, have, part.tolerance)
    if not torch.equal(host.random, ours.random):
        raise Differs("it draws other random numbers")


def _check_outputs(name: str, want: Any, have: Any, tolerance: float) -> None:
    kinds = [type(want).__name__, type(have).__name__]
    if type(want) is not type(have):
        raise Differs(f"{name} is a {kinds[0]} where the op gives a {kinds[1]}")
    if isinstance(want, Tensor):
        kinds = [f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in (want, have)]
        if kinds[0] != kinds[1]:
            raise Differs(f"{name} is {kinds[0]} where the op gives {kinds[1]}")
        error = (want.detach().double() - have.detach().double()).abs().max().item()
        size = want.detach().double().abs().max().item()
        if not error <= tolerance * max(size, 1.0):
            raise Differs(f"{name} differs by {error:.2g} where the largest value is {size:.2g}")
    elif isinstance(want, (Mapping, tuple, list)):
        items = [
            list(v.items()) if isinstance(v, Mapping) else list(enumerate(v)) for v in (want, have)
        ]
        keys = [[key for key, _ in pairs] for pairs in items]
        if keys[0] != keys[1]:
            raise Differs(f"{name} has {len(keys[0])} entries where the op gives {len(keys[1])}")
        for (key, first), (_, second) in zip(*items, strict=True):
            _check_outputs(f"output {key}", first, second, tolerance)
    elif want != have:
        raise Differs(f"{name} is {want!r} where the op gives {have!r}")
