"""The cost formulas against what torch counts on the real modules: FLOPs per module, bytes per operation, parameters."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sssd_fast.config import Config, load_config
from sssd_fast.model import MLP, Classifier
from sssd_fast.objective import SSSD
from sssd_fast.performance import ceilings
from sssd_fast.performance.ceilings import measure_ceilings, median_seconds
from sssd_fast.performance.costs import (
    Part,
    classifier_parts,
    parameter_counts,
    parts,
    standard_flops,
    train_flops,
)

VARIANTS = {
    "default": [],
    "plain MAE": ["objective.weight=0"],
    "token pooling": ["objective.pooling=token"],
    "no prototypes": ["objective.kind=mse"],
    "detached teacher": ["objective.detach_teacher=true"],
    "no cls token, colour, wide": [
        "model.cls_token=false",
        "model.in_channels=3",
        "model.decoder_width=48",
        "model.depth=3",
    ],
    "deep decoder, oblong": [
        "model.decoder_depth=3",
        "model.image_size=[32,48]",
        "model.mask_ratio=0.6",
    ],
}
PLACES = {
    "encoder attention": "mae.encoder.blocks.*.attn",
    "encoder MLP": "mae.encoder.blocks.*.mlp",
    "decoder attention": "mae.decoder.blocks.*.attn",
    "decoder MLP": "mae.decoder.blocks.*.mlp",
    "decoder embed + restore": "mae.decoder.embed",
    "prediction head": "mae.decoder.pred",
    "projection heads": "*_head",
}


Make = Callable[..., Config]


@pytest.fixture
def make(tiny: list[str]) -> Make:
    """A small configuration with overrides."""
    return lambda *overrides: load_config(None, [*tiny, *overrides])


def _matches(name: str, pattern: str) -> bool:
    got, wanted = name.split("."), pattern.split(".")
    return len(got) == len(wanted) and all(
        a == b or b == "*" or (b[0] == "*" and a.endswith(b[1:]))
        for a, b in zip(got, wanted, strict=True)
    )


def _counted(
    model: nn.Module, *inputs: Tensor, backward: bool, loss: Callable[[Any], Tensor]
) -> dict[str, int]:
    """FLOPs per module as torch counts them. Attention runs as plain products, which torch knows to count."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        total = loss(model(*inputs))
        if backward:
            total.backward()
    counts = {name: sum(per_op.values()) for name, per_op in counter.get_flop_counts().items()}
    root = type(model).__name__
    return {name.removeprefix(f"{root}."): n for name, n in counts.items()}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_torch_counts_on_the_real_model(
    make: Make, variant: str, backward: bool
) -> None:
    config = make(*VARIANTS[variant])
    images = torch.randint(
        0, 256, (2, config.model.in_channels, *config.model.image_size), dtype=torch.uint8
    )
    noise = torch.rand(2, config.model.num_patches)
    counted = _counted(
        SSSD(config.model, config.objective),
        images,
        noise,
        backward=backward,
        loss=lambda out: out.total,
    )
    by_formula = {
        part.name: part.forward_flops + (part.backward_flops if backward else 0)
        for part in parts(config.model, config.objective)
    }
    for name, pattern in PLACES.items():
        found = sum(n for place, n in counted.items() if _matches(place, pattern))
        if not (
            backward and name == "projection heads"
        ):  # torch's tracker puts other modules' backward there; see the sum
            assert found == 2 * by_formula.get(name, 0), name
    assert counted["Global"] == 2 * sum(by_formula.values())
    if backward:
        assert counted["Global"] == 2 * train_flops(config.model, config.objective)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_flops_of_the_classifier(make: Make, pool: str) -> None:
    config = make()
    model = Classifier(config.model, 3, pool)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    for backward in (False, True):
        counted = _counted(model, images, backward=backward, loss=lambda logits: logits.sum())
        cost = sum(classifier_parts(config.model, 3, pool=pool), Part())
        assert counted["Global"] == 2 * (cost.forward_flops + backward * cost.backward_flops)


@pytest.mark.parametrize(("name", "gigaflops"), [("base", 58.1), ("large", 123.8)])
def test_the_standard_convention_gives_the_published_figures(name: str, gigaflops: float) -> None:
    config = load_config(None, [f"model.name={name}", "model.in_channels=3"])
    assert standard_flops(config.model) / 1e9 == pytest.approx(gigaflops, rel=2e-3)
    plain = config.objective.model_copy(update={"weight": 0.0})
    assert (
        0.97 < train_flops(config.model, plain) / standard_flops(config.model) < 1
    )  # fewer rows and predictions


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_real_modules(make: Make, variant: str) -> None:
    config = make(*VARIANTS[variant])
    model = SSSD(config.model, config.objective)
    expected: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected[_part_of(name)] += parameter.numel()
    assert parameter_counts(config.model, config.objective) == dict(expected)


def _part_of(name: str) -> str:
    where, _, rest = name.removeprefix("mae.").partition(".")
    if where.endswith("_head"):
        return "projection heads"
    for key, part in (("attn", "attention"), ("mlp", "MLP"), ("norm", "norms + residual")):
        if key in rest:
            return f"{where} {part}"
    if where == "encoder":
        return "masking + embed"
    return "prediction head" if rest.startswith("pred") else "decoder embed + restore"


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_parameters_of_the_classifier(make: Make, pool: str) -> None:
    config = make()
    trained = sum(
        p.numel() for p in Classifier(config.model, 3, pool).parameters() if p.requires_grad
    )
    assert sum(part.parameters for part in classifier_parts(config.model, 3, pool=pool)) == trained


class Traffic(TorchDispatchMode):
    """Bytes of every operation's tensors: each input read once, each output and each changed input written once."""

    VIEWS = (
        "t",
        "view",
        "_unsafe_view",
        "detach",
        "expand",
        "transpose",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
    )

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self.VIEWS:
            schema = zip(func._schema.arguments, args, strict=False)
            written = [
                value
                for argument, value in schema
                if argument.alias_info and argument.alias_info.is_write
            ]
            fresh = [] if written else [out]
            self.bytes += sum(
                t.nbytes for t in _tensors([*args, *(kwargs or {}).values(), *fresh, *written])
            )
        return out


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _traffic(run: nn.Module, images: int, rows: int, width: int) -> tuple[int, int]:
    """(forward, backward) bytes of `run` on [images, rows, width], as dispatched."""
    x = torch.randn(images, rows, width, requires_grad=True)
    with Traffic() as forward:
        y = run(x)
    dy = torch.randn_like(y)
    with Traffic() as backward:
        torch.autograd.grad(y, [x, *run.parameters()], dy)
    return forward.bytes, backward.bytes


def _one_block(make: Make, name: str, rows: int, width: int) -> Part:
    """What one more encoder block adds to a part, in fp32."""
    sizes = [
        f"model.width={width}",
        "model.cls_token=false",
        "model.image_size=32",
        "model.patch_size=8",
    ]
    cost = []
    for depth in (2, 3):
        model = make(*sizes, f"model.depth={depth}", f"model.mask_ratio={1 - rows / 16}").model
        found = parts(model, make().objective, dtype_bytes=4, residual_bytes=4)
        cost.append(next(part for part in found if part.name == name))
    return cost[1] + cost[0].times(-1)


def test_bytes_of_an_mlp_are_those_of_its_operations(make: Make) -> None:
    rows, width = 8, 64
    module = MLP(width, 4 * width)
    few, many = (_traffic(module, images, rows, width) for images in (2, 6))
    cost = _one_block(make, "encoder MLP", rows, width)
    per_image = [(b - a) / 4 for a, b in zip(few, many, strict=True)]
    assert per_image == [cost.forward_bytes, cost.backward_bytes]
    per_batch = [a - 2 * image for a, image in zip(few, per_image, strict=True)]
    assert per_batch == [cost.forward_weight_bytes, cost.backward_weight_bytes]


def test_bytes_of_norms_and_residual_are_those_of_their_operations(make: Make) -> None:
    rows, width = 8, 1024

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.norm(x)
            return out

    few, many = (_traffic(Residual(), images, rows, width) for images in (2, 6))
    cost = _one_block(make, "encoder norms + residual", rows, width)
    per_image = [(b - a) / 4 for a, b in zip(few, many, strict=True)]
    # a block has two; the rows' mean and deviation are left out of the formula
    assert [2 * n for n in per_image] == pytest.approx(
        [cost.forward_bytes, cost.backward_bytes], rel=2e-3
    )


def test_bytes_of_the_update_are_those_of_the_norm_and_adamw(make: Make) -> None:
    config = make()
    model = SSSD(config.model, config.objective)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for _ in range(2):  # the first step makes the moments
        for p in trained:
            p.grad = torch.ones_like(p)
        with Traffic() as traffic:
            nn.utils.get_total_norm([p.grad for p in trained])
            optimizer.step()
    update = parts(config.model, config.objective)[-1]
    count, scalars = sum(p.numel() for p in trained), 64 * len(trained)  # norms, step counts
    moved = (
        traffic.bytes - 4 * count
    )  # the schema lists gradients as written, which happens with a grad_scale only
    assert update.name == "optimizer" and moved == pytest.approx(update.update_bytes, abs=scalars)
    eight_bit = parts(config.model, config.objective, moment_bytes=1)[-1]
    assert update.update_bytes - eight_bit.update_bytes == 12 * count


def test_narrow_types_move_fewer_bytes_and_the_same_flops(make: Make) -> None:
    config = make()
    wide, narrow = (
        parts(config.model, config.objective, dtype_bytes=b, residual_bytes=b) for b in (4, 2)
    )
    for a, b in zip(wide, narrow, strict=True):
        assert (a.forward_flops, a.backward_flops) == (b.forward_flops, b.backward_flops)
        if a.name in ("encoder MLP", "decoder attention", "encoder norms + residual"):
            assert a.step_bytes(3)[0] - a.forward_weight_bytes == 2 * (
                b.step_bytes(3)[0] - b.forward_weight_bytes
            )


def test_step_totals_count_images_micro_batches_and_the_update() -> None:
    part = Part("x", 2, 3, 5, 7, 11, 13, 17)
    assert part.step_flops(10) == (20, 30)
    assert part.step_bytes(10, 4) == (50 + 44 + 17, 70 + 52)


def test_median_is_of_single_calls_and_warm_up_is_left_out() -> None:
    calls = [0.3, 0.3, 0.01, 0.05, 0.01]  # the first two are not counted
    pauses = iter(calls)
    measured = median_seconds(lambda: time.sleep(next(pauses)), torch.device("cpu"), 0.0)
    assert measured == pytest.approx(0.01, abs=0.015) and list(pauses) == []


def test_ceilings_are_counted_work_over_measured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = defaultdict(float)

    def timed(work: Callable[[], object], device: torch.device, seconds: float) -> float:
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            work()
        seen["flops"] += flops.get_total_flops()
        seen["bytes"] = traffic.bytes
        return 2.0

    monkeypatch.setattr(ceilings, "median_seconds", timed)
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert seen["flops"] > 0 and found.matmul_flops == seen["flops"] / 2
    assert found.copy_bytes == pytest.approx(
        2 * seen["bytes"] / 3 / 2
    )  # copy_ names its target twice: as input and as output
    assert found.dtype == "float32"
