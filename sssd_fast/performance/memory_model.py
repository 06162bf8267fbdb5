"""How much memory a training step takes, by formula: parameters and what belongs to them, activations kept for the backward, the peak.

    peak = parameters + gradients + optimizer state + batch + worst moment of (what is kept and not yet used + temporary + cast weights)

A step is a list of stages in the order of the forward pass. Each says what autograd keeps of it, what its backward computes again and
what that needs besides for a moment. `memory_check.py` measures the same on the real modules; tests hold the two against each other.
Bytes are those of tensors: what an allocator rounds up, fragments or reserves is not in them (see `plan.Reserve`).

What is kept (b: bytes of a value in the matrix products, r: bytes of a value in the residual stream):
    LayerNorm  its input and two fp32 numbers a row. CUDA's autocast runs it in fp32, so that not compiled it keeps 4 bytes a value
               whatever r is; compiled, the stream itself or in its place the normalised values, as large.
    linear     its input in b, and under autocast the cast weight, once for all images
    attention  qkv and its output, which is the projection's input; with `eager` the probabilities, fp32 and cast; with the others,
               but not `fused` up to 64 tokens, the log-sum-exp
    MLP        h and gelu(h); with mae_kernels.gelu_linear h alone
    losses     predictions and logits as they come; with plain ops the difference, and the logits in fp32
Compiled with a budget below 1 the compiler decides: `memory_check.measured_saved_bytes` asks it.

Shapes: L patches, K visible, M masked, p prefix tokens, D width, F hidden width of an MLP or features of a head, H heads, E decoder
width, V values of a patch, S prototypes. Rows are tokens of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sssd_fast.config import ModelConfig, ObjectiveConfig

FP32, INDEX = 4, 8  # bytes
FUSED_KEEPS_NOTHING = 64  # tokens up to which mae_kernels.attention keeps no log-sum-exp
BLOCK_8BIT, SMALLEST_8BIT = (
    256,
    4096,
)  # torchao: moments of fewer values, or of no multiple of 256, stay fp32
# Values that the distillation losses other than dino keep for each side and row of F features
OTHER_KINDS = {"cosine": lambda F: 2 * F + 2, "mse": lambda F: F / 2, "smooth_l1": lambda F: F}


@dataclass(frozen=True)
class Options:
    """How the step is computed, with the configuration's names; nothing is `auto`."""

    precision: str = "bf16"  # fp32 | bf16 | fp16
    residual: str = "fp32"  # fp32 | bf16
    checkpoint: str = "none"  # none | selective | full
    compiled: bool = False
    fused_mlp: bool = False
    attention: str = "sdpa"  # fused | xformers | sdpa | eager
    decoder_attention: str = "sdpa"
    optimizer: str = "adamw"  # adamw | adamw8bit
    device: str = "cuda"  # whose autocast rules hold: cuda | cpu
    plain_ops: bool = False  # mae_kernels as plain torch, as always on the CPU

    @property
    def b(self) -> int:
        return FP32 if self.precision == "fp32" else 2

    @property
    def r(self) -> int:
        return 2 if self.precision != "fp32" and self.residual == "bf16" else FP32

    @property
    def norm_input(self) -> int:
        """Bytes a value of what a LayerNorm keeps of its input."""
        return FP32 if self.device == "cuda" and not self.compiled else self.r

    @property
    def norm_row(self) -> int:
        """Bytes a row: mean and 1 / deviation, the latter alone beside normalised values."""
        return FP32 if self.compiled and self.r == FP32 else 2 * FP32

    @property
    def plain(self) -> bool:
        return self.plain_ops or self.device == "cpu"


@dataclass(frozen=True)
class Stage:
    """A stretch of the forward pass. Bytes per image, but for `copies` and `constant`, which do not depend on the images."""

    name: str
    kept: float = 0.0  # from its forward to its backward
    again: float = 0.0  # computed again at the start of its backward
    temporary: float = 0.0  # the most that its backward needs besides
    copies: float = 0.0  # cast weights
    constant: float = 0.0  # other kept bytes
    weights: tuple[
        int, ...
    ] = ()  # values of each trained tensor; their gradients appear in its backward
    frozen: int = 0  # values of tensors that are not trained, or that no gradient reaches


@dataclass(frozen=True)
class Work:
    """What is trained: SSSD with an objective, a classifier without one."""

    model: ModelConfig
    objective: ObjectiveConfig | None
    classes: int = 2
    pool: str = "mean"
    drop_path: float = 0.0

    def stages(self, o: Options) -> list[Stage]:
        if self.objective is not None:
            return pretrain_stages(self.model, self.objective, o)
        return classifier_stages(
            self.model, self.classes, o, pool=self.pool, drop_path=self.drop_path
        )

    @property
    def image_bytes(self) -> int:
        """Of one image of a batch: uint8 pixels, label, index, valid, and the noise that chooses the masked patches."""
        height, width = self.model.image_size
        noise = 0 if self.objective is None else FP32 * self.model.num_patches
        return self.model.in_channels * height * width + 2 * INDEX + 1 + noise


def _linear(fan_in: int, fan_out: int) -> tuple[int, int]:
    return fan_in * fan_out, fan_out


def _copies(o: Options, weights: Sequence[int]) -> float:
    """Cast copies of the matrices among `weights`, given as pairs of matrix and bias."""
    return 0.0 if o.precision == "fp32" else o.b * sum(weights[::2])


def _norm(o: Options, rows: int, width: int, stored_rows: int | None = None) -> float:
    """stored_rows: of the tensor that the input is a view of, which is kept whole unless it is cast first."""
    whole = rows if stored_rows is None or o.norm_input != o.r or o.compiled else stored_rows
    return whole * width * o.norm_input + rows * o.norm_row


def _attention(o: Options, provider: str, rows: int, heads: int) -> float:
    """What the provider keeps beside qkv and the output."""
    if provider == "eager":
        probabilities = rows * (FP32 + (o.b if o.b < FP32 else 0))
        if (
            o.compiled and o.b < FP32
        ):  # or the scores, two maxima, whether finite, a sum, and the cast probabilities
            probabilities = min(probabilities, rows * 2 * o.b + 3 * FP32 + 1)
        return float(heads * rows * probabilities)
    return (
        0.0 if provider == "fused" and rows <= FUSED_KEEPS_NOTHING else float(heads * rows * FP32)
    )


def _block(
    o: Options, name: str, provider: str, rows: int, width: int, heads: int, mlp_ratio: float, *, last: int | None = None,
    view: bool = False, drop_path: bool = False, first: str = "",
) -> Stage:  # fmt: skip
    """last: rows that go on behind the attention, as a view of the stream or gathered into a tensor of their own.

    first: a compiled stack's first block reads a stream that is "kept" anyway, so that the projection in b stands for the second
    norm's input; or one that is made "again" from what the indices' stage keeps.
    """
    b = o.b
    D = width
    F = int(width * mlp_ratio)
    rows2 = rows if last is None else last
    values = rows * D
    softmax = _attention(o, provider, rows, heads)
    norm1, norm2 = _norm(o, rows, D), _norm(o, rows2, D, rows if view else None)
    if o.compiled and first:
        norm1 = rows * ((D * o.r if first == "kept" else 0) + 2.0 * FP32)
    if o.compiled and first == "kept" and rows2 == rows:
        norm2 = rows * (D * min(o.r, b) + 2.0 * FP32)
    attention = norm1 + 5 * values * b + softmax  # what the products read, qkv, and the output
    mlp = norm2 + rows2 * (D + F * (1 if o.fused_mlp else 2)) * b
    everything = attention + mlp + (2 if drop_path else 0)  # which images skip each branch
    # Temporary beside the stream's gradient: in the MLP, where it is widest, the branch's gradient and that of gelu(h), with the fused
    # op that of h and gelu(h) too; in the attention, with the MLP's activations gone, gradients of qkv and of what the norm wrote, or
    # before them those of the output, of v and of the scores, twice, in place of the cast probabilities.
    scores = heads * rows * rows * (FP32 if b < FP32 else 2 * FP32) if provider == "eager" else 0
    wide_mlp = rows2 * (D + F * (3 if o.fused_mlp else 1)) * b
    temporary = values * o.r + max(wide_mlp, max(5 * values * b, 2 * values * b + scores) - mlp)
    matrices = (*_linear(D, 3 * D), *_linear(D, D), *_linear(D, F), *_linear(F, D))
    weights = (D, D, *matrices[:4], D, D, *matrices[4:])
    stage = Stage(name, everything, 0.0, temporary, _copies(o, matrices), 0.0, weights)
    if o.checkpoint == "none":
        return stage
    kept = float(values * o.r)  # the block's input, which may be what the norm keeps
    # once computed again, the block holds everything, its input where the norm cast it, and the last product, which nothing reads
    held = everything if o.norm_input == o.r else everything + kept
    if o.checkpoint == "selective":
        kept += (
            5 * values + rows2 * (F + D)
        ) * b  # qkv, attention, projection, both products of the MLP
        kept += heads * rows * rows * b if provider == "eager" else softmax
        held += rows2 * D * b
    return replace(stage, kept=kept, again=held - kept)


def _head(
    o: Options, objective: ObjectiveConfig, rows: int, width: int, *, shared: bool, detached: bool
) -> Stage:
    """A projection head with what the loss keeps of it. shared: its input is kept by the norm before it, which writes it.

    detached: no gradient reaches it, and only the loss keeps something.
    """
    b = o.b
    hidden = objective.head_hidden
    F = objective.head_bottleneck
    S = objective.prototypes
    dino = objective.kind == "dino"
    pooled = rows if objective.pooling == "token" else 1
    layers = (*_linear(width, hidden), *_linear(hidden, hidden), *_linear(hidden, F))
    weights = (*layers, S * F) if dino else layers
    wide = FP32 if o.plain and not o.compiled else b
    logits = pooled * (S * wide if dino else FP32 * OTHER_KINDS[objective.kind](F))
    if detached:
        return Stage("projection head", logits, frozen=sum(weights))
    kept = (0 if shared else rows * width * b) + 4 * rows * hidden * b + logits
    # the L2 norm: its input, and the norm before and after it is bounded from below
    kept += rows * F * b + rows * FP32 if o.compiled else rows * F * FP32 + rows * 2 * FP32
    softmaxes = (
        6 * FP32 + 2 if o.compiled and o.plain else 0
    )  # of both: maxima, whether finite, sums
    kept += pooled * (F * b + softmaxes) if dino else 0
    constant = (
        (1 if o.compiled else 2) * S * FP32 + (S * F * FP32 if o.precision == "fp32" else 0)
        if dino
        else 0
    )
    copies = _copies(o, layers) + (S * F * b if dino and o.precision != "fp32" else 0)
    return Stage("projection head", kept, 0.0, 2 * rows * hidden * b, copies, constant, weights)


def _patch_embed(o: Options, model: ModelConfig, listed: int, *, positions: bool) -> Stage:
    """positions: trained."""
    (D, _, _) = model.encoder_shape
    p = int(model.cls_token)
    V = model.patch_size**2 * model.in_channels
    table = (p + model.num_patches) * D
    weights = (*_linear(V, D), *([D] if p else []), *([table] if positions else []))
    kept = listed * V * o.b if o.plain else 0
    ids = INDEX * listed if positions else 0.0  # all patches in order, the same for every image
    return Stage(
        "embedding", kept, 0.0, listed * V * o.b, 0.0, ids, weights, 0 if positions else table
    )


def _indices(o: Options, model: ModelConfig, *, teacher: bool) -> float:
    """Bytes of indices, and of what the plain op that restores the sequence keeps."""
    p, L, K = int(model.cls_token), model.num_patches, model.num_visible
    kept = INDEX * L  # ids_restore
    if not o.plain or o.checkpoint != "none":
        kept += (
            INDEX * L
        )  # ids_keep and ids_masked; a block that is computed again holds what its rows are picked by
    if o.checkpoint != "none":
        kept += L  # the mask comes along
    elif not teacher and not o.plain:
        kept += INDEX * L  # the ranks of the masked patches
    if o.plain:
        kept += INDEX * (p + L) + (p + K + 1) * model.decoder_width * FP32
    return float(kept)


def pretrain_stages(model: ModelConfig, objective: ObjectiveConfig, o: Options) -> list[Stage]:
    """The SSSD step of objective.py."""
    b, p, L, K = o.b, int(model.cls_token), model.num_patches, model.num_visible
    M = L - K
    V = model.patch_size**2 * model.in_channels
    E = model.decoder_width
    D, depth, heads = model.encoder_shape
    teacher = objective.weight > 0
    detached = objective.detach_teacher
    ratio = model.mlp_ratio
    encoder = [
        _block(o, f"encoder block {i}", o.attention, p + K, D, heads, ratio, first="" if i else "kept") for i in range(depth)
    ]  # fmt: skip
    read, decoder = L if teacher else M, model.decoder_depth
    blocks = [
        _block(
            o, f"decoder block {i}", o.decoder_attention, p + L, E, model.decoder_heads, ratio,
            last=read if i == decoder - 1 else None, first="" if i else "again" if o.plain else "kept",
        )
        for i in range(decoder)
    ]  # fmt: skip
    embed, pred = _linear(D, E), _linear(E, V)
    between = Stage(
        "encoder norm, decoder embedding", kept=_norm(o, p + K, D) + (p + K) * D * b, temporary=(p + K) * D * (o.r + FP32 + b),
        copies=_copies(o, embed), weights=(D, D, *embed, E), frozen=(p + L) * E,
    )  # fmt: skip
    normed = L if teacher and not detached else M  # rows that the last norm keeps something of
    difference = M * V * (FP32 if o.plain else b)
    if (
        o.plain and o.compiled and not teacher and b < FP32
    ):  # prediction, pixels, their mean and deviation
        difference = M * V * (b + 1) + 2 * FP32 * M
    prediction = Stage(
        "decoder norm, prediction, loss", kept=_norm(o, normed, E, read) + M * E * b + difference,
        temporary=M * V * (b + (2 * FP32 if o.plain else 0)) + M * E * (b + FP32), copies=_copies(o, pred), weights=(E, E, *pred),
    )  # fmt: skip
    start = (
        Stage("indices", _indices(o, model, teacher=teacher)),
        _patch_embed(o, model, K, positions=False),
    )
    stages = [*start, *encoder, between, *blocks, prediction]
    if teacher:
        shares = p == 0 and (
            o.precision == "fp32" or (o.device == "cpu" and o.r == 2)
        )  # the norm's own output, whole
        stages.append(_head(o, objective, K, D, shared=shares, detached=False))
        stages.append(_head(o, objective, K, E, shared=False, detached=detached))
    return stages


def classifier_stages(
    model: ModelConfig, classes: int, o: Options, *, pool: str = "mean", drop_path: float = 0.0
) -> list[Stage]:
    """The fine-tuning step: all patches, no decoder, trained positions."""
    p = int(model.cls_token)
    L = model.num_patches
    (D, depth, heads) = model.encoder_shape
    last = 1 if pool == "cls" else L
    blocks = [
        _block(
            o, f"encoder block {i}", o.attention, p + L, D, heads, model.mlp_ratio, drop_path=drop_path > 0 and i > 0,
            last=last if i == depth - 1 else None, view=i == depth - 1, first="" if i else "kept",
        )
        for i in range(depth)
    ]  # fmt: skip
    end = Stage(
        "norm, head, loss", kept=_norm(o, 1, D) + D * o.b + 2 * classes * FP32, temporary=(last + 1) * D * o.r + 2 * classes * FP32,
        copies=_copies(o, _linear(D, classes)), weights=(D, D, *_linear(D, classes)),
    )  # fmt: skip
    return [_patch_embed(o, model, L, positions=True), *blocks, end]


def saved_per_image(stages: Sequence[Stage]) -> float:
    """Bytes of activations at the end of the forward, per image."""
    return sum(stage.kept for stage in stages)


def saved_constant(stages: Sequence[Stage], o: Options) -> float:
    """Bytes kept at the end of the forward whatever the number of images: cast weights, but of blocks that are computed again."""
    blocks = o.checkpoint != "none"
    return sum(
        stage.constant + (0 if blocks and " block " in stage.name else stage.copies)
        for stage in stages
    )


def keeping(stages: Sequence[Stage], per_image: float) -> list[Stage]:
    """The stages where only `per_image` bytes are kept, evenly less everywhere, and the rest is computed again."""
    share = min(1.0, per_image / saved_per_image(stages))
    return [
        replace(stage, kept=share * stage.kept, again=(1 - share) * stage.kept) for stage in stages
    ]


def optimizer_bytes(weights: Sequence[int], optimizer: str) -> float:
    """Two moments of 4 bytes; adamw8bit: of 1 byte, with an fp32 scale for 256 values and a table of 256 numbers. And the step."""
    total = 0.0
    for n in weights:
        wide = optimizer == "adamw" or n < SMALLEST_8BIT or n % BLOCK_8BIT
        total += FP32 + 2 * (FP32 * n if wide else n + FP32 * (n // BLOCK_8BIT) + FP32 * 256)
    return total


def fixed_bytes(stages: Sequence[Stage], o: Options) -> float:
    """Parameters, gradients and optimizer state."""
    weights = [n for stage in stages for n in stage.weights]
    return FP32 * (2 * sum(weights) + sum(stage.frozen for stage in stages)) + optimizer_bytes(
        weights, o.optimizer
    )


def peak(
    stages: Sequence[Stage],
    images: int,
    o: Options,
    *,
    accumulate: int = 1,
    gradient_copies: int = 0,
) -> float:
    """Bytes of forward and backward at the worst moment, beside parameters, optimizer state and batch.

    Walks the backward: what earlier stages keep is still there, what later ones kept is gone, and their weights have gradients.
    accumulate: micro-batches; from the second on the gradients of the first are there, and a compiled backward returns new ones
    beside them. gradient_copies: of all gradients, such as those that several processes exchange.
    """
    all_gradients = FP32 * sum(n for stage in stages for n in stage.weights)
    gradients, grow = float(gradient_copies * all_gradients), 1.0
    if accumulate > 1:
        gradients, grow = gradients + all_gradients, float(o.compiled)
    again, gradient = (
        o.checkpoint != "none",
        FP32 + (o.b if o.b < FP32 else 0),
    )  # of a weight, and before it is cast
    kept = images * saved_per_image(stages) + sum(stage.constant for stage in stages)
    copies = sum(stage.copies for stage in stages)
    worst = gradients + kept + copies  # autocast drops its casts when the forward ends
    copies = 0.0 if again else copies
    for stage in reversed(stages):
        own = images * (stage.again + stage.temporary) + (stage.copies if again else 0)
        worst = max(
            worst, gradients + kept + copies + own + gradient * max(stage.weights, default=0)
        )
        kept -= images * stage.kept + stage.constant
        copies -= 0 if again else stage.copies
        gradients += grow * FP32 * sum(stage.weights)
    return max(worst, gradients)


def total_peak(
    work: Work,
    stages: Sequence[Stage],
    images: int,
    o: Options,
    *,
    accumulate: int = 1,
    gradient_copies: int = 0,
) -> float:
    """Bytes of everything at the worst moment. The loop fetches all micro-batches of a step before it."""
    batch = images * accumulate * work.image_bytes
    moving = peak(stages, images, o, accumulate=accumulate, gradient_copies=gradient_copies)
    return (
        fixed_bytes(stages, o) - FP32 * sum(sum(stage.weights) for stage in stages) + batch + moving
    )
