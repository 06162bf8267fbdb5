"""What a training step has to compute and to move, by formula: FLOPs and bytes. ceilings.py measures what a machine can do.

FLOPs are those of matrix products, 2 per multiply-add; attention has two products forward and four backward (what a kernel
recomputes is its own affair). Norms, GELU, softmax and the losses count as bytes only. Bytes: each operation reads each large input
once and writes each output once, and nothing survives in a cache between two operations; row statistics, indices in the backward,
copies and casts that a better program would not need are left out. Weights move once per micro-batch, not per image.

The model is the one of model.py: only visible patches are embedded and encoded, only masked ones predicted, and behind the last
attention of the decoder only rows that somebody reads go on. Published figures for masked autoencoders, such as 58.1 GFLOP per image
for ViT-B/16 at 224, follow another convention, which `standard_flops` computes.

Shapes: L patches, K visible, M = L - K masked, p prefix tokens, D encoder width, E decoder width, V = P*P*C values of a patch,
S prototypes, F bottleneck features. Rows are tokens of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sssd_fast.config import ModelConfig, ObjectiveConfig

FP32 = 4  # bytes: parameters and their gradients, whatever the precision
IDS = 8  # bytes of an index


@dataclass(frozen=True)
class Part:
    """One part of the step. Everything adds: parts of equal kind are summed with `+` and repeated with `times`."""

    name: str = ""
    forward_flops: float = 0.0  # per image
    backward_flops: float = 0.0
    forward_bytes: float = 0.0  # per image: activations, pixels, indices
    backward_bytes: float = 0.0
    forward_weight_bytes: float = 0.0  # per micro-batch
    backward_weight_bytes: float = 0.0  # weights read and gradients written
    update_bytes: float = 0.0  # per optimizer step
    parameters: int = 0  # trained ones

    def __add__(self, other: Part) -> Part:
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name != "name"
        }
        return replace(self, **sums)

    def times(self, n: int) -> Part:
        return replace(
            self, **{f.name: n * getattr(self, f.name) for f in fields(self) if f.name != "name"}
        )

    def named(self, name: str) -> Part:
        return replace(self, name=name)

    def step_flops(self, images: int) -> tuple[float, float]:
        """(forward, backward) FLOPs of a step over `images`, all micro-batches together."""
        return images * self.forward_flops, images * self.backward_flops

    def step_bytes(self, images: int, micro_batches: int = 1) -> tuple[float, float]:
        """(forward, backward) bytes of a step; those of the update count as forward."""
        forward = (
            images * self.forward_bytes
            + micro_batches * self.forward_weight_bytes
            + self.update_bytes
        )
        return forward, images * self.backward_bytes + micro_batches * self.backward_weight_bytes


# ---- pre-training and classification ----------------------------------------------------------------------------------------


def parts(
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    dtype_bytes: int = 2,
    residual_bytes: int = 4,
    moment_bytes: int = 4,
) -> list[Part]:
    """The SSSD pre-training step in the order of its forward pass, the optimizer last.

    dtype_bytes: activations and the weights that products read; residual_bytes: the stream between the blocks; moment_bytes: each of
    AdamW's two moments (4, or 1 with 8-bit moments).
    """
    b, r, p = dtype_bytes, residual_bytes, int(model.cls_token)
    L = model.num_patches
    K = model.num_visible
    M = model.num_patches - model.num_visible
    V = _values(model)
    D, depth, _ = model.encoder_shape
    E, teacher = model.decoder_width, objective.weight > 0
    read = L if teacher else M  # rows that leave the decoder's last attention
    masking = Part(
        forward_bytes=FP32 * L + IDS * (K + M + L) + L
    )  # noise; ids_keep, ids_masked, ids_restore, mask
    pick = Part(forward_bytes=2 * read * E * r, backward_bytes=(read + p + L) * E * r)
    restore = Part(
        forward_bytes=(p + K) * E * b + IDS * L + (p + L) * E * r,
        backward_bytes=(p + L) * E * r + (p + K) * E * b,
        forward_weight_bytes=(p + L) * E * FP32,  # positions
        backward_weight_bytes=E * FP32,
        parameters=E,  # the mask token
    )
    decoder = _blocks(model.decoder_depth, p + L, E, model.mlp_ratio, b, r, last_rows=read)
    out = [
        (masking + _embed(model, K, b, r)).named("masking + embed"),
        *_blocks(depth, p + K, D, model.mlp_ratio, b, r).named("encoder", _norm(p + K, D, b, r)),
        (_linear(p + K, D, E, b) + restore).named("decoder embed + restore"),
        *decoder.named("decoder", pick + _norm(read, E, b, r)),
        _linear(M, E, V, b).named("prediction head"),
    ]
    if teacher:
        teacher_head = _head(objective, K, E, b)
        if objective.detach_teacher:
            teacher_head = replace(
                teacher_head,
                backward_flops=0.0,
                backward_bytes=0.0,
                backward_weight_bytes=0.0,
                parameters=0,
            )
        out.append((_head(objective, K, D, b) + teacher_head).named("projection heads"))
    out += [
        _loss(model, objective, M * V, b),
        _optimizer(sum(part.parameters for part in out), moment_bytes),
    ]
    return out


def classifier_parts(
    model: ModelConfig,
    classes: int,
    *,
    pool: str = "mean",
    dtype_bytes: int = 2,
    residual_bytes: int = 4,
    moment_bytes: int = 4,
) -> list[Part]:
    """The fine-tuning step of `Classifier`: every patch is encoded, positions are trained, the last MLP sees the rows pooled."""
    b = dtype_bytes
    r = residual_bytes
    p = int(model.cls_token)
    L = model.num_patches
    D, depth, _ = model.encoder_shape
    positions = Part(backward_weight_bytes=(p + L) * D * FP32, parameters=(p + L) * D)
    rows = 1 if pool == "cls" else L
    pooled = (
        Part(forward_bytes=(rows + 1) * D * r, backward_bytes=(rows + 1) * D * r)
        if pool == "mean"
        else Part()
    )
    encoder = _blocks(depth, p + L, D, model.mlp_ratio, b, r, last_rows=rows)
    out = [
        (positions + _embed(model, L, b, r)).named("embed"),
        *encoder.named("encoder", pooled + _norm(1, D, b, r)),
        _linear(1, D, classes, b).named("head"),
    ]
    return [*out, _optimizer(sum(part.parameters for part in out), moment_bytes)]


def train_flops(model: ModelConfig, objective: ObjectiveConfig) -> float:
    """FLOPs per image that the pre-training step of model.py needs: forward and backward, projection heads included."""
    return sum(part.forward_flops + part.backward_flops for part in parts(model, objective))


def standard_flops(model: ModelConfig) -> float:
    """FLOPs per image by the convention in which masked autoencoders are compared: 58.1e9 for ViT-B/16, 224 x 224 x 3, 75 % masked.

    Three times a forward pass (the images' gradient, which nobody needs, included) of a plain MAE: visible patches embedded, all
    decoder rows through every block, all patches predicted, no projection heads. Using it for MFU counts no extra work as useful.
    """
    p = int(model.cls_token)
    L = model.num_patches
    K = model.num_visible
    V = _values(model)
    (D, depth, _), E = model.encoder_shape, model.decoder_width
    encoder, decoder = (
        sum(_blocks(n, rows, width, model.mlp_ratio, 0, 0).named("", Part()), Part()).forward_flops
        for n, rows, width in ((depth, p + K, D), (model.decoder_depth, p + L, E))
    )
    ends = _linear(K, V, D, 0) + _linear(p + K, D, E, 0) + _linear(L, E, V, 0)
    return 3 * (encoder + decoder + ends.forward_flops)


def parameter_counts(model: ModelConfig, objective: ObjectiveConfig) -> dict[str, int]:
    """Trained parameters by the names of `parts`; positions are fixed and count nowhere."""
    everything = objective.model_copy(
        update={"detach_teacher": False}
    )  # a detached head is there all the same
    return {
        part.name: part.parameters
        for part in parts(model, everything)
        if part.parameters and part.name != "optimizer"
    }


# ---- building blocks: one image -----------------------------------------------------------------------------------------------


def _values(model: ModelConfig) -> int:
    return model.patch_size**2 * model.in_channels


def _linear(
    rows: int, fan_in: int, fan_out: int, b: int, *, grad_input: bool = True, bias: bool = True
) -> Part:
    """y = x W^T + bias; backward: dx = dy W, dW = dy^T x, dbias = sum(dy), each reading what it needs."""
    flops, weights = 2.0 * rows * fan_in * fan_out, fan_in * fan_out
    trained = weights + bias * fan_out
    return Part(
        forward_flops=flops,
        backward_flops=flops * (1 + grad_input),
        forward_bytes=rows * (fan_in + fan_out) * b,
        backward_bytes=rows * ((1 + grad_input) * (fan_in + fan_out) + bias * fan_out) * b,
        forward_weight_bytes=trained * b,
        backward_weight_bytes=grad_input * weights * b + trained * FP32,
        parameters=trained,
    )


def _attention(rows: int, width: int, b: int) -> Part:
    """Forward q k^T and (probabilities) v from packed qkv; backward reads qkv, output and its gradient, writes the gradient of qkv."""
    flops = 4.0 * rows * rows * width
    core = Part(
        forward_flops=flops,
        backward_flops=2 * flops,
        forward_bytes=4 * rows * width * b,
        backward_bytes=8 * rows * width * b,
    )
    return _linear(rows, width, 3 * width, b) + core + _linear(rows, width, width, b)


def _mlp(rows: int, width: int, hidden: int, b: int) -> Part:
    gelu = Part(forward_bytes=2 * rows * hidden * b, backward_bytes=3 * rows * hidden * b)
    return _linear(rows, width, hidden, b) + gelu + _linear(rows, hidden, width, b)


def _norm(rows: int, width: int, b: int, r: int) -> Part:
    """LayerNorm from the residual stream (r bytes) to what a product reads (b bytes)."""
    weights = {
        "forward_weight_bytes": 2 * width * FP32,
        "backward_weight_bytes": 3 * width * FP32,
        "parameters": 2 * width,
    }
    return Part("", 0.0, 0.0, rows * width * (r + b), rows * width * (2 * r + b), **weights)


def _residual(rows: int, width: int, b: int, r: int) -> Part:
    """x + branch; backward: the gradient of the stream plus the one that comes back through the branch."""
    return Part(forward_bytes=rows * width * (2 * r + b), backward_bytes=rows * width * 3 * r)


@dataclass(frozen=True)
class _Blocks:
    attention: Part
    mlp: Part
    norms: Part

    def named(self, where: str, end: Part) -> list[Part]:
        """`end` is what follows the last block and counts among the norms."""
        norms = self.norms + end
        return [
            self.attention.named(f"{where} attention"),
            self.mlp.named(f"{where} MLP"),
            norms.named(f"{where} norms + residual"),
        ]


def _blocks(
    depth: int,
    rows: int,
    width: int,
    mlp_ratio: float,
    b: int,
    r: int,
    *,
    last_rows: int | None = None,
) -> _Blocks:
    """Pre-norm blocks; behind the last attention only `last_rows` go on."""
    hidden = int(width * mlp_ratio)
    last = rows if last_rows is None else last_rows
    add = _norm(rows, width, b, r) + _residual(rows, width, b, r)
    last_add = _norm(last, width, b, r) + _residual(last, width, b, r)
    return _Blocks(
        attention=_attention(rows, width, b).times(depth),
        mlp=_mlp(rows, width, hidden, b).times(depth - 1) + _mlp(last, width, hidden, b),
        norms=add.times(2 * depth - 1) + last_add,
    )


def _embed(model: ModelConfig, listed: int, b: int, r: int) -> Part:
    """Listed patches (uint8) -> vectors -> tokens with positions; no gradient flows to the images."""
    (D, _, _), p, V = model.encoder_shape, int(model.cls_token), _values(model)
    gather = Part(
        forward_bytes=listed * V * (1 + b), forward_weight_bytes=(p + listed) * D * FP32
    )  # and positions
    cls = Part(
        forward_bytes=p * D * r,
        backward_bytes=p * D * r,
        backward_weight_bytes=p * D * FP32,
        parameters=p * D,
    )
    stream = Part(forward_bytes=listed * D * (r - b))  # the projection writes the residual stream
    return gather + _linear(listed, V, D, b, grad_input=False) + stream + cls


def _head(objective: ObjectiveConfig, rows: int, width: int, b: int) -> Part:
    """ProjectionHead: three linear layers per visible patch, L2 norm in fp32, then prototypes on the pooled features."""
    hidden = objective.head_hidden
    F = objective.head_bottleneck
    S = objective.prototypes
    gelu = Part(forward_bytes=2 * rows * hidden * b, backward_bytes=3 * rows * hidden * b)
    layers = (
        _linear(rows, width, hidden, b)
        + _linear(rows, hidden, hidden, b)
        + _linear(rows, hidden, F, b)
    )
    normal = Part(forward_bytes=rows * F * (b + FP32), backward_bytes=rows * F * (2 * FP32 + b))
    head = layers + gelu.times(2) + normal
    pooled = 1 if objective.pooling == "image" else rows
    if objective.pooling == "image":
        head += Part(forward_bytes=(rows + 1) * F * FP32, backward_bytes=(rows + 1) * F * FP32)
    if objective.kind != "dino":
        return head
    products = _linear(pooled, F, S, FP32, bias=False)
    unit = Part(
        forward_weight_bytes=2 * F * S * FP32, backward_weight_bytes=3 * F * S * FP32
    )  # rows to length 1
    return head + products + unit


def _loss(model: ModelConfig, objective: ObjectiveConfig, values: int, b: int) -> Part:
    """Both losses in one pass: predictions and pixels of masked patches, logits of student and teacher (fp32)."""
    S = objective.prototypes if objective.kind == "dino" else objective.head_bottleneck
    rows = 1 if objective.pooling == "image" else model.num_visible
    logits = (2 if objective.weight > 0 else 0) * rows * S * FP32
    return Part("loss", 0.0, 0.0, values * (b + 1) + logits, values * (2 * b + 1) + 2 * logits)


def _optimizer(parameters: int, moment_bytes: int) -> Part:
    """Norm of the gradients (read), AdamW (gradient read, weight and two moments read and written); clipping is a factor in it."""
    return Part("optimizer", update_bytes=parameters * (4 * FP32 + 4 * moment_bytes))
