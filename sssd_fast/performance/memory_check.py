"""What a training step really keeps for its backward: measured on the real modules, and asked of torch's partitioner. On the CPU.

    python -m sssd_fast.performance.memory_check [--full-size]      predicted and measured bytes as a table, with ViT-B and ViT-L too

`measure` runs forward and backward and follows every storage. `measured_saved_bytes` runs nothing: torch.compile traces the full-size
model up to the partitioner of its backward, which says what it would keep. Parameters are allocated but never written there, which
takes address space only.

With options for CUDA the norms run in fp32, as CUDA's autocast has them and the CPU's has not. The ops of mae_kernels are plain torch
here, so such options need plain_ops; but fused_mlp takes the registered op, which keeps the same on every device.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sssd_fast.config import Config, ModelConfig, ObjectiveConfig, StepConfig
from sssd_fast.model import MLP, Classifier
from sssd_fast.objective import SSSD
from sssd_fast.performance.execution import prepare
from sssd_fast.performance.memory_model import (
    FP32,
    Options,
    Work,
    peak,
    saved_constant,
    saved_per_image,
)
from sssd_fast.run.device import autocast

CPU = torch.device("cpu")


class _Fp32Norm(nn.LayerNorm):
    """LayerNorm as CUDA's autocast runs it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class _OpMLP(MLP):
    """The MLP of CUDA devices: on the CPU mae_kernels.gelu_linear would be plain torch."""

    def forward(self, x: Tensor) -> Tensor:
        h, cpu = F.linear(x, self.fc1.weight), torch.is_autocast_enabled("cpu")
        weight = self.fc2.weight.to(torch.get_autocast_dtype("cpu") if cpu else x.dtype)
        out: Tensor = torch.ops.mae_kernels.gelu_linear(
            h, self.fc1.bias, weight, self.fc2.bias, True
        )[0]
        return out


class _Unwritten(TorchFunctionMode):
    """Parameters stay as they were allocated: what torch.nn.init would do to them is left out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")  # as torch.nn.init calls it
        name = getattr(func, "__name__", "")
        if (
            isinstance(filled, nn.Parameter)
            and name.endswith("_")
            and name[-2] != "_"
            and name != "requires_grad_"
        ):
            return filled
        return func(*args, **(kwargs or {}))


def _module(work: Work, o: Options) -> SSSD | Classifier:
    if o.device == "cuda" and not o.plain_ops:
        raise ValueError(
            "options: got the ops' kernels, which do not run on the CPU; needs plain_ops=True"
        )
    model: SSSD | Classifier
    if work.objective is not None:
        model = SSSD(work.model, work.objective)
    else:
        model = Classifier(work.model, work.classes, work.pool, work.drop_path)
    residual = o.residual if o.precision != "fp32" else "fp32"
    settings = {"compile": False, "mlp": "plain", "residual": residual, "checkpoint": o.checkpoint}
    step = StepConfig.model_validate(
        {**settings, "attention": o.attention, "decoder_attention": o.decoder_attention}
    )
    prepare(model, Config(model=work.model, step=step), o.precision, CPU, 1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and o.device == "cuda" and o.precision != "fp32":
            module.__class__ = _Fp32Norm
        elif isinstance(module, MLP) and o.fused_mlp:
            module.__class__ = _OpMLP
    return model


def _inputs(work: Work, images: int) -> list[Tensor]:
    pixels = torch.empty(
        (images, work.model.in_channels, *work.model.image_size), dtype=torch.uint8
    )
    return (
        [pixels]
        if work.objective is None
        else [pixels, torch.empty(images, work.model.num_patches)]
    )


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
        self.peak = max(self.peak, self.now() + _inside(func, args))
        return out

    def now(self) -> int:
        self.alive = {
            key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()
        }
        return sum(size for _, size in self.alive.values())


def _inside(op: Any, args: Any) -> int:
    """Bytes that an op has for a moment, and that no mode sees: gelu_linear's backward makes dh beside the gradient of g and g itself,
    then the gradient of weight, with the first of both gone."""
    if op is not torch.ops.mae_kernels.gelu_linear_backward.default:
        return 0
    x, weight = args[1], args[3]
    return int(weight.element_size() * max(2 * x.numel() - weight.numel(), x.numel()))


@dataclass(frozen=True)
class Measured:
    kept: float  # bytes alive when the forward has ended, beside parameters and inputs
    peak: float  # largest since then, gradients included


def _cross_entropy(logits_BC: Tensor) -> Tensor:
    """With soft targets and class weights, as FinetuneTask.loss."""
    targets_BC = torch.full_like(logits_BC, 1 / logits_BC.shape[1], dtype=torch.float32)
    weights_C = torch.ones(())
    return -(targets_BC * weights_C * F.log_softmax(logits_BC.float(), 1)).sum(1).mean()


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
            loss = out.total if work.objective is not None else _cross_entropy(out)
        del out
        kept = live.peak = live.now()
        loss.backward()
    return Measured(kept, live.peak)


@dataclass(frozen=True)
class Traced:
    """What the compiler would keep, in bytes."""

    per_image: float  # activations
    constant: float  # cast weights and what else does not depend on the images
    recomputed_flops: (
        float  # per image, of matrix products and attention that the backward would repeat
    )
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
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    started, graphs = time.perf_counter(), []

    def partition(joint: Any, inputs: Any, **kwargs: Any) -> Any:
        graphs.append((*partition_fn(joint, inputs, **kwargs), kwargs["num_fwd_outputs"]))
        raise _Partitioned

    def unreached(graph: Any, inputs: Any) -> Any:
        raise AssertionError("the partitioner has not been asked")

    def backend(graph: Any, inputs: Any) -> Any:
        settings = {"decompositions": select_decomp_table(), "partition_fn": partition}
        return aot_autograd(fw_compiler=unreached, bw_compiler=unreached, **settings)(graph, inputs)

    with _Unwritten():
        model = _module(work, o)
    budgeted = functorch.patch(activation_memory_budget=budget, is_non_builtin_to_include=True)
    with budgeted, inductor.patch(fallback_random=True), autocast(o.precision, CPU):
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(
                *_inputs(work, images)
            )
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Partitioned):
                raise
    forward, backward, outputs = graphs[0]
    (of_images, constant) = _kept(forward, outputs)
    flops = _repeated_flops(forward, backward)
    return Traced(of_images / images, constant, flops / images, time.perf_counter() - started)


def _kept(forward: Any, outputs: int) -> tuple[int, int]:
    """Bytes of the forward's outputs behind the first `outputs`, each storage once: (those made of images, the others).

    Integers and bools are indices and masks of images, which need not come from the pixels.
    """
    of_images: set[Any] = set()
    for node in forward.graph.nodes:
        value = node.meta.get("val")
        pixels = (
            node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.uint8
        )
        if pixels or any(parent in of_images for parent in node.all_input_nodes):
            of_images.add(node)
    sizes: dict[int, tuple[int, bool]] = {}
    for node in forward.graph.output_node().args[0][outputs:]:
        value = getattr(node, "meta", {}).get("val")
        if isinstance(value, Tensor) and node.op != "placeholder":
            storage = value.untyped_storage()
            sizes[storage._cdata] = (
                storage.nbytes(),
                node in of_images or not value.is_floating_point(),
            )
    return sum(n for n, image in sizes.values() if image), sum(
        n for n, image in sizes.values() if not image
    )


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
    weights = sum(sum(stage.weights) for stage in stages)
    inputs = FP32 * (weights + sum(stage.frozen for stage in stages)) + images * work.image_bytes
    kept = images * saved_per_image(stages) + saved_constant(stages, o)
    if o.precision == "fp32":  # what products read are the parameters themselves
        kept += FP32 * weights
    return kept <= inputs


PRECISIONS = (
    ("fp32", "fp32", "cpu"),
    *product(["bf16"], ["fp32", "bf16"], ["cuda", "cpu"]),
)  # and residual, device
BUDGETS = (1.0, 0.8, 0.5)


def small_works() -> dict[str, Work]:
    """Models of an odd shape or two that take no time."""
    plain = ModelConfig(
        image_size=(32, 48), patch_size=8, width=32, depth=3, heads=2, decoder_width=24, decoder_depth=2, decoder_heads=3
    )  # fmt: skip
    odd = ModelConfig(
        image_size=(56, 40), patch_size=8, width=40, depth=2, heads=5, decoder_width=48, decoder_depth=1, decoder_heads=2,
        cls_token=False, in_channels=3, mlp_ratio=2.7, mask_ratio=0.6,
    )  # fmt: skip
    dino = ObjectiveConfig(head_hidden=20, head_bottleneck=12, prototypes=50)
    return {
        "SSSD": Work(plain, dino),
        "MAE": Work(plain, dino.model_copy(update={"weight": 0.0})),
        "odd SSSD": Work(odd, dino.model_copy(update={"detach_teacher": True, "pooling": "token"})),
        "odd SSSD, cosine": Work(odd, dino.model_copy(update={"kind": "cosine"})),
        "classifier, mean": Work(plain, None, 3),
        "classifier, cls": Work(plain, None, 3, "cls", drop_path=0.2),
    }


def eager_options() -> Iterator[Options]:
    choices = product(PRECISIONS, ("none", "selective", "full"), ("sdpa", "eager"), (False, True))
    for (precision, residual, device), kept, provider, fused in choices:
        yield Options(
            precision,
            residual,
            kept,
            False,
            fused,
            provider,
            provider,
            device=device,
            plain_ops=True,
        )


def compiled_options() -> list[Options]:
    bf16 = Options(compiled=True, plain_ops=True)
    eager = replace(bf16, attention="eager", decoder_attention="eager")
    return [
        replace(bf16, precision="fp32"),
        bf16,
        replace(bf16, residual="bf16", fused_mlp=True),
        eager,
    ]


def _row(
    name: str,
    o: Options,
    how: str,
    kept: tuple[float, float],
    peaks: tuple[float, float] | None = None,
) -> str:
    """Pairs of (predicted, measured); predicted is nan where there is no formula."""
    mlp = "fused" if o.fused_mlp else "plain"
    texts = [
        f"{name}; {o.precision}, residual {o.residual}, {o.device}, {o.attention}, {mlp} MLP, {how}"
    ]
    for predicted, measured in (kept, peaks or (float("nan"), float("nan"))):
        pair = [f"{n:,.0f}" if n == n else "" for n in (predicted, measured)]
        texts += [
            *pair,
            f"{100 * (predicted / measured - 1):+.2f} %" if predicted == predicted else "",
        ]
    return f"| {' | '.join(texts)} |"


def _eager_row(name: str, work: Work, o: Options, images: tuple[int, int]) -> str:
    few, many = (measure(work, o, n) for n in images)
    stages = work.stages(o)
    per_image = (many.kept - few.kept) / (images[1] - images[0])
    kept = (saved_per_image(stages), per_image)
    peaks = (peak(stages, images[1], o), many.peak)
    return _row(name, o, f"checkpoint {o.checkpoint}", kept, peaks)


def _compiled_row(name: str, work: Work, o: Options, images: int, budget: float) -> str:
    predicted = saved_per_image(work.stages(o)) if budget == 1 else float("nan")
    traced = measured_saved_bytes(work, o, images, budget)
    return _row(
        name, o, f"compiled, {images} images, budget {budget:g}", (predicted, traced.per_image)
    )


def rows(full_size: bool) -> Iterator[str]:
    for name, work in small_works().items():
        yield from (_eager_row(name, work, o, (2, 5)) for o in eager_options())
    for (name, work), o, budget in product(small_works().items(), compiled_options(), BUDGETS):
        yield _compiled_row(name, work, o, 32, budget)
    if full_size:
        sizes = {
            "ViT-B": ModelConfig(in_channels=3),
            "ViT-L": ModelConfig(name="large", in_channels=3),
        }
        for (name, model), fused in product(sizes.items(), (False, True)):
            o = Options(residual="bf16" if fused else "fp32", fused_mlp=fused, plain_ops=True)
            for what, work in (
                ("SSSD", Work(model, ObjectiveConfig())),
                ("classifier", Work(model, None)),
            ):
                yield _eager_row(f"{name} {what}", work, o, (2, 3))
                for budget in BUDGETS:
                    yield _compiled_row(
                        f"{name} {what}", work, replace(o, compiled=True), 64, budget
                    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sssd_fast.performance.memory_check",
        description="Predicted and measured bytes.",
    )
    parser.add_argument(
        "--full-size",
        action="store_true",
        help="ViT-B and ViT-L at 224 x 224 too: minutes, some 6 GB",
    )
    print(
        "| case | predicted bytes per image | measured | difference | predicted peak, bytes | measured | difference |"
    )
    print("|---" * 7 + "|")
    for row in rows(parser.parse_args(argv).full_size):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
