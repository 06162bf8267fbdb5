"""What a training step really keeps for its backward: measured on the real modules, and asked of torch's partitioner. On the CPU.

    python -m sssd_fast.memory_check [--full-size]      predicted and measured bytes as a table, with ViT-B and ViT-L too

`measure` runs forward and backward and follows every storage. `measured_saved_bytes` runs nothing: torch.compile traces the full-size
model up to the partitioner of its backward, which says what it would keep. Parameters are allocated but never written there, which
takes address space only.

With options for CUDA the norms run in fp32, as CUDA's autocast has them and the CPU's has not. The ops of mae_kernels are plain torch
here, so such options need plain_ops; but fused_mlp takes the registered op, which keeps the same on every device.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .compute import prepare
from .config import Config, StepConfig
from .memory_model import FP32, Options, Work, saved_constant, saved_per_image
from .model import MLP, Classifier
from .objective import SSSD
from .step import autocast

CPU = torch.device("cpu")


# ---- the modules as a run has them ---------------------------------------------------------------------------------------------


class _Fp32Norm(nn.LayerNorm):
    """LayerNorm as CUDA's autocast runs it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class _OpMLP(MLP):
    """The MLP of CUDA devices: on the CPU mae_kernels.gelu_linear would be plain torch."""

    def forward(self, x: Tensor) -> Tensor:
        h, cpu = F.linear(x, self.fc1.weight), torch.is_autocast_enabled("cpu")
        weight = self.fc2.weight.to(torch.get_autocast_dtype("cpu") if cpu else x.dtype)
        out: Tensor = torch.ops.mae_kernels.gelu_linear(h, self.fc1.bias, weight, self.fc2.bias, True)[0]
        return out


class _Unwritten(TorchFunctionMode):
    """torch.nn.init leaves its tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _module(work: Work, o: Options) -> SSSD | Classifier:
    if o.device == "cuda" and not o.plain_ops:
        raise ValueError("options: got the ops' kernels, which do not run on the CPU; needs plain_ops=True")
    model: SSSD | Classifier
    if work.objective is not None:
        model = SSSD(work.model, work.objective)
    else:
        model = Classifier(work.model, work.classes, work.pool, work.drop_path)
    step = StepConfig.model_validate(
        {
            "compile": False,
            "attention": o.attention,
            "decoder_attention": o.decoder_attention,
            "mlp": "plain",
            "residual": o.residual if o.precision != "fp32" else "fp32",
            "checkpoint": o.checkpoint,
        }
    )
    prepare(model, Config(model=work.model, step=step), o.precision, CPU, 1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and o.device == "cuda" and o.precision != "fp32":
            module.__class__ = _Fp32Norm
        elif isinstance(module, MLP) and o.fused_mlp:
            module.__class__ = _OpMLP
    return model


def _inputs(work: Work, images: int) -> list[Tensor]:
    pixels = torch.empty((images, work.model.in_channels, *work.model.image_size), dtype=torch.uint8)
    return [pixels] if work.objective is None else [pixels, torch.empty(images, work.model.num_patches)]


# ---- measuring -----------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside the block and are alive, but of `given`; `peak` since it was last set to 0."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        return sum(size for _, size in self.alive.values())


@dataclass(frozen=True)
class Measured:
    kept: float  # bytes alive when the forward has ended, beside parameters and inputs
    peak: float  # largest since then, gradients included


def measure(work: Work, o: Options, images: int) -> Measured:
    """One forward and backward of a step that is not compiled. The model is made for it, so it has to fit this machine's memory."""
    torch.manual_seed(0)
    model, inputs = _module(work, o), _inputs(work, images)
    inputs[0].random_(0, 256)
    for noise in inputs[1:]:
        noise.uniform_()
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
        with autocast(o.precision, CPU):
            out = model(*inputs)
            loss = out.total if work.objective is not None else -F.log_softmax(out.float(), 1).sum(1).mean()
        del out
        kept = live.peak = live.now()
        loss.backward()
    return Measured(kept, live.peak)


def measure_per_image(work: Work, o: Options, images: tuple[int, int] = (2, 5)) -> tuple[float, float]:
    """(bytes kept per image, bytes whatever their number), from two batch sizes."""
    few, many = (measure(work, o, n).kept for n in images)
    slope = (many - few) / (images[1] - images[0])
    return slope, few - images[0] * slope


# ---- asking the partitioner ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """What the compiler would keep, in bytes."""

    per_image: float  # activations
    constant: float  # cast weights and what else does not depend on the images
    recomputed_flops: float  # per image, of matrix products and attention that the backward would repeat
    seconds: float  # the tracing took


class _Partitioned(Exception):
    """Ends the compilation where everything is known."""


@functools.lru_cache(maxsize=64)
def measured_saved_bytes(work: Work, o: Options, images: int, budget: float = 1.0) -> Traced:
    """What torch.compile keeps of a micro-batch of `images` at step.activation_budget `budget`, by its own partitioner.

    Takes some 15 s for ViT-B and needs no GPU and next to no memory. A budget counts sizes against those of the graph's inputs,
    parameters included, so that per_image depends on `images`. Raises what torch.compile raises.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.compile_fx import partition_fn, select_decomp_table

    started, graphs = time.perf_counter(), []

    def partition(joint: Any, inputs: Any, **kwargs: Any) -> Any:
        graphs.append((*partition_fn(joint, inputs, **kwargs), kwargs["num_fwd_outputs"]))
        raise _Partitioned

    def backend(graph: Any, inputs: Any) -> Any:
        make = aot_autograd(fw_compiler=_nothing, bw_compiler=_nothing, decompositions=select_decomp_table(), partition_fn=partition)
        return make(graph, inputs)

    with _Unwritten():
        model = _module(work, o)
    budgeted = functorch.patch(activation_memory_budget=budget, is_non_builtin_to_include=True)
    with budgeted, inductor.patch(fallback_random=True), autocast(o.precision, CPU):
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*_inputs(work, images))
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Partitioned):
                raise
    forward, backward, outputs = graphs[0]
    per_image, constant = _kept(forward, outputs)
    flops = _repeated_flops(forward, backward)
    return Traced(per_image / images, constant, flops / images, time.perf_counter() - started)


def _nothing(graph: Any, inputs: Any) -> Any:
    return graph


def _kept(forward: Any, outputs: int) -> tuple[int, int]:
    """Bytes of the forward's outputs behind the first `outputs`, each storage once: (those made of images, the others).

    Integers and bools are indices and masks of images, which need not come from the pixels.
    """
    of_images: set[Any] = set()
    for node in forward.graph.nodes:
        value = node.meta.get("val")
        pixels = node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.uint8
        if pixels or any(parent in of_images for parent in node.all_input_nodes):
            of_images.add(node)
    sizes: dict[int, tuple[int, bool]] = {}
    for node in forward.graph.output_node().args[0][outputs:]:
        value = getattr(node, "meta", {}).get("val")
        if isinstance(value, Tensor) and node.op != "placeholder":
            storage = value.untyped_storage()
            sizes[storage._cdata] = storage.nbytes(), node in of_images or not value.is_floating_point()
    return sum(n for n, image in sizes.values() if image), sum(n for n, image in sizes.values() if not image)


def _repeated_flops(forward: Any, backward: Any) -> float:
    """FLOPs of the forward's products that stand in the backward again; there they keep their names."""
    from torch.utils.flop_counter import flop_registry

    names, total = {node.name for node in forward.graph.nodes}, 0.0
    for node in backward.graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if node.op == "call_function" and node.name in names and count is not None:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            total += count(*args, **kwargs, out_val=node.meta["val"])
    return total


def budget_is_ignored(work: Work, o: Options, images: int) -> bool:
    """Whether torch takes any step.activation_budget between 0 and 1 for 1, without a word, with micro-batches of `images`.

    Its partitioner does (torch/_functorch/partitioners.py, choose_saved_values_set) where what it would keep at budget 1 is no larger
    than the graph's inputs, parameters included. By formula, so near equality it may be wrong.
    """
    stages = work.stages(o)
    weights, frozen = [n for stage in stages for n in stage.weights], sum(stage.frozen for stage in stages)
    inputs = FP32 * (sum(weights) + frozen) + images * work.image_bytes
    kept = images * saved_per_image(stages) + saved_constant(stages, o)
    if o.precision == "fp32":  # what products read are the parameters themselves
        kept += FP32 * sum(weights)
    return kept <= inputs
