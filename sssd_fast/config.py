"""Settings: one tree of typed sections, read from YAML, changed by key=value, checked as a whole.

    config = load_config("cpu_smoke", ["data.source=ct/", "pretrain.epochs=400"])

OmegaConf reads and merges, pydantic checks. Every problem (unknown key, wrong type, value out of
range, keys that contradict each other) is collected and raised in one ConfigError. `sssd-fast
configs NAME` prints the descriptions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from yaml import YAMLError, safe_dump

from sssd_fast.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Area = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
AttentionProvider = Literal["auto", "fused", "xformers", "sdpa", "eager"]

CONFIG_DIR = Path(__file__).parent / "configs"
# (width, depth, heads): Dosovitskiy et al. 2021 (arXiv 2010.11929), Touvron et al. 2021
# (arXiv 2012.12877)
VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
SPLITS = ("auto", "random", "block", "patient", "kfold", "manifest")
# Keys of earlier versions, with what to do instead.
REMOVED = {
    "log_seconds": "remove it; a plain log line is written at least every 10 s",
    "data.phantom_images": "rename it to data.synthetic_images",
    "data.phantom_seed": "rename it to data.synthetic_seed",
    "pretrain.num_images": "remove it; a picture shows 8 images",
    "objective.detach_teacher": "use objective.stop_gradient=teacher",
    "pretrain.augment.crop_ratio": "remove it; random crops have a ratio of 3/4 to 4/3",
    "finetune.augment.crop_ratio": "remove it; random crops have a ratio of 3/4 to 4/3",
}


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )

    def _problems(self) -> Iterator[str]:
        """What contradicts each other."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Section:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))
        return self


class DataConfig(Section):
    """Images, labels, split and loader."""

    source: str = Field("synthetic", description="Folder of images; synthetic = generated slices.")
    manifest: str | None = Field(None, description="CSV path,label[,split][,patient] below source.")
    synthetic_images: int = Field(1600, ge=40, description="Number of synthetic slices.")
    synthetic_seed: Index = Field(0, description="Seed of the synthetic slices.")
    split: str = Field(
        "auto",
        description="auto (as listed with the data, else random), random, block, patient, kfold, "
        "manifest or FILE.csv.",
    )
    test_fraction: OpenFraction = Field(0.2, description="Fraction of all images for testing.")
    val_fraction: BelowOne = Field(0.1, description="Fraction of all images for validation.")
    folds: int = Field(5, ge=2, description="Number of folds of split=kfold.")
    fold: Index = Field(0, description="Fold to test on, from 0.")
    split_seed: Index = Field(0, description="Seed of the split.")
    positive: str | None = Field(None, description="Class that counts as positive; null = by name.")
    max_bad_fraction: Fraction = Field(0.01, description="Allowed fraction of unusable files.")
    accept_wrong_extension: bool = Field(
        True, description="Keep images named as another format; false = they are unusable."
    )
    grey_range: tuple[Index, Count] | None = Field(
        None, description="Values of 16-bit images that become black, white; null = by the set."
    )
    fit: Literal["crop", "stretch"] = Field("crop", description="Centred crop, or all stretched.")
    loader: Literal["auto", "resident", "dali", "torch"] = Field(
        "auto", description="auto = resident (decoded once and kept) if it fits, else dali, torch."
    )
    workers: Index = Field(0, description="Threads that decode images.")
    cache: str = Field("auto", description="Folder for decoded images; auto = the user's, none.")
    resident_gib: Positive | None = Field(None, description="Limit of decoded images; null = auto.")

    def _problems(self) -> Iterator[str]:
        if self.fold >= self.folds:
            yield f"fold is {self.fold}, needs to be below folds ({self.folds})"
        if self.split not in SPLITS and not self.split.endswith(".csv"):
            yield f"split is {self.split!r}, needs {', '.join(SPLITS)} or a .csv file"
        if self.grey_range and self.grey_range[0] >= self.grey_range[1]:
            yield f"grey_range is {self.grey_range}, needs the smaller value first"
        # A mistyped word must not become a folder.
        if self.cache not in ("auto", "none") and "/" not in self.cache:
            yield f"cache is {self.cache!r}, needs auto, none or a folder like ./pixels"
        if self.split == "manifest" and self.manifest is None:
            yield "split is 'manifest', which needs data.manifest=FILE.csv with splits"


class ModelConfig(Section):
    """Encoder (vision transformer) and decoder of the masked autoencoder."""

    name: Literal["tiny", "small", "base", "large"] = Field("base", description="Size of the ViT.")
    image_size: tuple[Count, Count] = Field((224, 224), description="Height, width; or one number.")
    patch_size: Literal[8, 14, 16] = Field(16, description="Side of a patch in pixels.")
    in_channels: Literal[1, 3] = Field(1, description="Image channels: 1 = grey, 3 = RGB.")
    width: Count | None = Field(None, description="Encoder width; null = by name.")
    depth: Count | None = Field(None, description="Encoder blocks; null = by name.")
    heads: Count | None = Field(None, description="Encoder attention heads; null = by name.")
    mlp_ratio: Positive = Field(4.0, description="Hidden width of an MLP / width of its block.")
    norm_eps: Positive = Field(1e-6, description="Epsilon of the layer norms.")
    cls_token: bool = Field(True, description="Whether the encoder has a cls token.")
    decoder_width: Count = Field(512, description="Decoder width.")
    decoder_depth: Count = Field(8, description="Decoder blocks.")
    decoder_heads: Count = Field(16, description="Decoder attention heads.")
    mask_ratio: OpenFraction = Field(0.75, description="Fraction of the patches to mask.")
    mean: tuple[float, ...] = Field((0.5,), description="Mean of pixel / 255, by channel.")
    std: tuple[Positive, ...] = Field((0.25,), description="Deviation of pixel / 255, by channel.")

    @field_validator("image_size", "mean", "std", mode="before")
    @classmethod
    def _one_number(cls, value: Any, info: ValidationInfo) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (value,) * (2 if info.field_name == "image_size" else 1) if number else value

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """(width, depth, heads) with the named size filled in."""
        width, depth, heads = VIT_SIZES[self.name]
        return self.width or width, self.depth or depth, self.heads or heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_visible(self) -> int:
        """K = int(L * (1 - mask_ratio)), rounded as in facebookresearch/mae."""
        return int(self.num_patches * (1 - self.mask_ratio))

    def _problems(self) -> Iterator[str]:
        patch, channels = self.patch_size, self.in_channels
        for size in dict.fromkeys(self.image_size):
            if size % patch:
                near = max(1, round(size / patch)) * patch
                what = f"needs a multiple of patch_size {patch} (nearest: {near})"
                yield f"image_size is {size}, {what}"
        width, _, heads = self.encoder_shape
        decoder = ("decoder_", self.decoder_width, self.decoder_heads)
        for what, w, h in (("", width, heads), decoder):
            if w % h:
                yield f"{what}width is {w}, needs a multiple of {what}heads ({h})"
            if w % 4:
                yield f"{what}width is {w}, needs a multiple of 4 for 2-D positions"
        visible, patches = self.num_visible, self.num_patches
        if not 0 < visible < patches:
            what = f"mask_ratio is {self.mask_ratio}, which leaves {visible} of {patches} patches"
            yield f"{what} visible; needs at least 1 visible and 1 masked"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                what = f"needs 1 or one per channel (in_channels is {channels})"
                yield f"{name} has {len(values)} values, {what}"


# Forms of the distillation: the keys that objective.name sets. Keys that are given take precedence.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "published": {"center": "prob", "stop_gradient": "none"},
    "centred": {"pooling": "token", "center": "logit", "stop_gradient": "teacher"},
    "sinkhorn": {"pooling": "token", "center": "sinkhorn", "stop_gradient": "decoder"},
    "predictor": {
        "kind": "mse",
        "heads": "student",
        "pooling": "token",
        "stop_gradient": "teacher",
    },
}
FORM_KEYS = ("kind", "heads", "pooling", "center", "stop_gradient")


class ObjectiveConfig(Section):
    """Pre-training loss: reconstruction and self-distillation (docs/self-distillation.md)."""

    name: Literal["published", "centred", "sinkhorn", "predictor"] = Field(
        "predictor", description="Form of the distillation; sets the five keys that follow it."
    )
    kind: Literal["dino", "cosine", "mse", "smooth_l1"] = Field("dino", description="Distance.")
    heads: Literal["both", "student"] = Field(
        "both", description="Projection heads, or a predictor from encoder to decoder features."
    )
    pooling: Literal["image", "token"] = Field("image", description="image = mean of its tokens.")
    center: Literal["prob", "logit", "sinkhorn"] = Field(
        "prob", description="Centre: running mean of probabilities or logits, or Sinkhorn-Knopp."
    )
    stop_gradient: Literal["none", "decoder", "teacher"] = Field(
        "none", description="decoder = it reaches the teacher's head only; teacher = neither."
    )
    weight: Fraction = Field(0.2, description="w: w * distillation + (1 - w) * reconstruction.")
    norm: Literal["patch", "channel", "none"] = Field("patch", description="Scaling of the target.")
    center_momentum: BelowOne = Field(0.9, description="Momentum of the centre per step.")
    student_temp: Positive = Field(0.1, description="Temperature of the student's softmax.")
    teacher_temp: Positive = Field(0.04, description="Temperature of the teacher's softmax.")
    head_hidden: Count = Field(2048, description="Hidden width of the heads.")
    head_bottleneck: Count = Field(256, description="Width before the prototypes.")
    prototypes: int = Field(4096, ge=2, description="Number of prototypes (outputs of a head).")

    @model_validator(mode="before")
    @classmethod
    def _form(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        form = tree.get("name", cls.model_fields["name"].default)
        return {**OBJECTIVES.get(form, {}), **tree} if isinstance(form, str) else tree

    def _problems(self) -> Iterator[str]:
        if self.heads == "student" and self.kind == "dino":
            yield (
                "kind is 'dino', which needs heads 'both' (as in name 'published'); a predictor "
                "needs another kind"
            )
        if self.heads == "student" and self.stop_gradient == "none":
            yield "heads is 'student', which needs stop_gradient=teacher (or decoder)"


class AugmentConfig(Section):
    """Augmentation per image, on uint8 pixels; with everything off, resize and centre crop."""

    crop_scale: tuple[Area, Area] = Field((0.2, 1.0), description="Area of the crop, from, to.")
    hflip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    rotation_deg: float = Field(0.0, ge=0, le=180, description="Largest rotation in degrees.")
    brightness: BelowOne = Field(0.0, description="Largest relative change of the brightness.")
    contrast: BelowOne = Field(0.0, description="Largest relative change of the contrast.")

    def _problems(self) -> Iterator[str]:
        if self.crop_scale[0] > self.crop_scale[1]:
            yield f"crop_scale is {self.crop_scale}, needs the smaller number first"


class TrainConfig(Section):
    """Training. Effective batch = batch_size * accumulate * processes of torchrun."""

    epochs: Count = Field(100, description="Passes over the training images.")
    max_steps: Count | None = Field(None, description="Stop after N steps; null = the epochs.")
    batch_size: Count = Field(64, description="Images per process and micro-step.")
    accumulate: Count = Field(1, description="Micro-steps per optimizer step.")
    batch: Literal["auto"] | None = Field(None, description="auto = largest batch_size that fits.")
    base_lr: Positive = Field(1.5e-4, description="lr = base_lr * effective batch / 256.")
    min_lr: NonNegative = Field(0.0, description="Final learning rate for 256 images.")
    warmup_epochs: NonNegative = Field(5.0, description="Epochs of linear warm-up.")
    weight_decay: NonNegative = Field(0.05, description="Weight decay of AdamW.")
    beta1: BelowOne = Field(0.9, description="First momentum of AdamW.")
    beta2: BelowOne = Field(0.95, description="Second momentum of AdamW.")
    clip_grad: Positive | None = Field(None, description="Largest gradient norm; null = no limit.")
    augment: AugmentConfig = AugmentConfig()
    validate_epochs: Count = Field(1, description="Epochs between validations.")
    checkpoint_epochs: Count = Field(1, description="Epochs between checkpoints.")
    checkpoint_steps: Count | None = Field(None, description="Additional ones every N steps.")
    keep_last: Count = Field(2, description="Number of newest checkpoints to keep.")

    def _problems(self) -> Iterator[str]:
        if self.warmup_epochs >= self.epochs and self.max_steps is None:
            needed = f"needs to be below epochs ({self.epochs}); set both"
            yield f"warmup_epochs is {self.warmup_epochs:g}, {needed}"


class PretrainConfig(TrainConfig):
    """Pre-training without labels."""

    extra: str | None = Field(None, description="Folder of additional unlabelled images.")
    image_epochs: Index = Field(20, description="Epochs between pictures; 0 = only at the end.")


class FinetuneConfig(TrainConfig):
    """Fine-tuning of the encoder with a classifier."""

    base_lr: Positive = Field(5e-4, description="lr = base_lr * effective batch / 256.")
    beta2: BelowOne = Field(0.999, description="Second momentum of AdamW.")
    layer_decay: Area = Field(0.65, description="Learning rate of a block / of the next one.")
    drop_path: BelowOne = Field(0.1, description="Largest drop rate of stochastic depth.")
    patch_drop: BelowOne = Field(
        0.0, description="Fraction of the patches that a training step leaves out."
    )
    mixup: NonNegative = Field(0.0, description="Alpha of mixup; 0 = off (MAE's recipe: 0.8).")
    cutmix: NonNegative = Field(0.0, description="Alpha of cutmix; 0 = off (MAE's recipe: 1.0).")
    label_smoothing: BelowOne = Field(0.1, description="Label smoothing.")
    random_erasing: Fraction = Field(0.0, description="Probability per image (MAE: 0.25).")
    pool: Literal["mean", "cls"] = Field("mean", description="Mean of patch tokens, or cls.")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced = by class.")
    select: Literal["auc", "accuracy", "loss", "last"] = Field("auc", description="What is best.")


class ProbeConfig(Section):
    """Linear probe: logistic regression on the standardised features of the frozen encoder."""

    pool: Literal["mean", "cls"] = Field("mean", description="Mean of patch tokens, or cls.")
    batch_size: Count = Field(64, description="Images per batch of the encoder.")
    inverse_penalties: tuple[Positive, ...] = Field(
        (1e-3, 1e-2, 1e-1, 1.0, 10.0), description="scikit-learn's C, selected by validation."
    )


class EvaluateConfig(Section):
    """Evaluation on a split."""

    batch_size: Count = Field(64, description="Images per batch.")
    bootstrap: int = Field(2000, ge=100, description="Resamples for the confidence intervals.")
    threshold: Literal["auto"] | Fraction = Field(
        0.5,
        description="Score from which an image counts as positive; auto = that of the highest "
        "sensitivity + specificity of the validation images.",
    )
    crops: Literal[1, 5] = Field(
        1,
        description="5 = mean of the scores of an image and of its four corners, in the evaluation "
        "and in predictions; validation during training takes 1.",
    )


class StepConfig(Section):
    """Execution of a step. All but residual and optimizer may change when resuming."""

    compile: Literal["auto", True, False] = Field(
        "auto", description="auto = on a GPU, and on a CPU for long runs."
    )
    cuda_graphs: Literal["auto", True, False] = Field(
        "auto", description="Replay a compiled step as one launch; auto = for small batches."
    )
    attention: AttentionProvider = Field("auto", description="Attention of the encoder.")
    decoder_attention: AttentionProvider = Field("auto", description="Attention of the decoder.")
    mlp: Literal["auto", "fused", "plain"] = Field(
        "auto", description="fused = mae_kernels.gelu_linear; auto = fused where it is faster."
    )
    residual: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype between the blocks with precision bf16; statistics stay fp32."
    )
    activation_budget: Area = Field(
        1.0, description="Compiled only: fraction of the activations to keep, not to recompute."
    )
    checkpoint: Literal["none", "selective", "full"] = Field(
        "none", description="Not compiled only: recompute norms and GELU, or whole blocks."
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="8-bit needs torchao.")

    def _problems(self) -> Iterator[str]:
        if self.compile is False and self.cuda_graphs is True:
            yield "cuda_graphs is true with compile false; needs compile true or auto"
        if self.compile is False and self.activation_budget < 1:
            yield "activation_budget is below 1 with compile false; use checkpoint"
        if self.compile is True and self.checkpoint != "none":
            yield "checkpoint is set with compile true; lower activation_budget instead"


class Config(Section):
    """All settings of a run."""

    seed: Index = Field(0, description="Seed of weights, image order, augmentation and masks.")
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto = cuda if available.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = bf16 if the device has bf16 units; else fp16 (GPU), fp32 (CPU)."
    )
    threads: Index = Field(0, description="CPU threads of torch; 0 = torch's default.")
    processes: Literal["auto"] | Count = Field(
        "auto", description="Processes that share each batch; auto = one per core on a CPU."
    )
    tensorboard: bool = Field(True, description="Write metrics for TensorBoard.")
    logger: Literal["none", "wandb", "mlflow"] = Field(
        "none", description="Also send the metrics to Weights & Biases or MLflow."
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    step: StepConfig = StepConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    probe: ProbeConfig = ProbeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def _problems(self) -> Iterator[str]:
        for section in ("finetune", "probe"):
            if getattr(self, section).pool == "cls" and not self.model.cls_token:
                yield f"{section}.pool is 'cls', which needs model.cls_token=true"


def shipped_configs() -> dict[str, str]:
    """Name and purpose (the first comment) of each configuration in sssd_fast/configs."""
    paths = sorted(CONFIG_DIR.glob("*.yaml"))
    return {path.stem: path.read_text("utf-8").partition("\n")[0].lstrip("# ") for path in paths}


Log = Callable[[str], object]


def load_config(
    source: str | Path | None = None, overrides: Sequence[str] = (), log: Log = lambda line: None
) -> Config:
    """Reads and checks settings.

    A run that is shortened below its warm-up (`epochs` is given, `warmup_epochs` is not) keeps the
    fraction of the warm-up.

    Args:
        source: name of a shipped configuration, or path of a YAML file; None = the defaults.
        overrides: settings as "key=value" with dotted keys; the value is read as YAML.
        log: receives one line for each warm-up that was scaled.

    Raises:
        ConfigError: names every unknown key, with the nearest known one, and every bad value.
    """
    tree = {} if source is None else _read(_find(str(source)))
    return _validate(tree, overrides, "" if source is None else f" in {source}", log)


def changed(config: Config, overrides: Sequence[str], log: Log = lambda line: None) -> Config:
    """`config` with settings as "key=value"; arguments and errors as in `load_config`."""
    return _validate(to_dict(config), overrides, log=log)


def from_dict(tree: dict[str, Any]) -> Config:
    """A Config from plain containers, such as those in a checkpoint."""
    return _validate(tree)


def to_dict(config: Section) -> dict[str, Any]:
    """Plain containers, as YAML and torch.load(weights_only=True) can read them."""
    return config.model_dump(mode="json")


def to_yaml(section: Section, indent: str = "") -> str:
    """YAML with the description of each setting as a comment."""
    lines = []
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            about = (type(value).__doc__ or "").splitlines()[0]
            lines.append(f"\n{indent}# {about}\n{indent}{name}:\n{to_yaml(value, indent + '  ')}")
        else:
            text = safe_dump(plain[name], default_flow_style=True, width=10**6)
            text = text.removesuffix("\n").removesuffix("\n...")  # the marker after a single value
            lines.append(f"{indent}# {field.description}\n{indent}{name}: {text}\n")
    return "".join(lines)


def _validate(
    tree: Any, overrides: Sequence[str] = (), where: str = "", log: Log = lambda line: None
) -> Config:
    problems: list[str] = []
    if overrides:
        given = _parse(overrides, problems)
        _rename_objective(tree, given)
        _scale_warmup(tree, given, log)
        tree = OmegaConf.to_container(OmegaConf.merge(tree, given))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found: dict[str, list[ErrorDetails]] = {}
        for detail in error.errors():
            found.setdefault(_key_of(detail["loc"]), []).append(detail)
        problems += [_explain(key, details) for key, details in found.items()]
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{count} in the configuration{where}:{lines}")
    return config


def _rename_objective(tree: Any, given: Any) -> None:
    """Removes the keys of the former form from `tree` if `given` names another form."""
    section = tree.get("objective") if isinstance(tree, dict) else None
    new = given.get("objective")
    if isinstance(section, dict) and OmegaConf.is_dict(new) and "name" in new:
        for key in FORM_KEYS:
            section.pop(key, None)


def _scale_warmup(tree: Any, given: Any, log: Log) -> None:
    """Adds warm-ups to `given` where its epochs are not more than the warm-up of `tree`."""
    for stage, defaults in (("pretrain", PretrainConfig()), ("finetune", FinetuneConfig())):
        new = given.get(stage)
        if not OmegaConf.is_dict(new) or "epochs" not in new or "warmup_epochs" in new:
            continue
        section = tree.get(stage) if isinstance(tree, dict) else None
        before = to_dict(defaults) | (section if isinstance(section, dict) else {})
        epochs, warmup, old = new["epochs"], before["warmup_epochs"], before["epochs"]
        # other values are reported by the validation
        known = all(isinstance(value, int | float) for value in (epochs, warmup, old))
        if known and 0 < epochs <= warmup < old:
            fraction = warmup / old
            new["warmup_epochs"] = fraction * epochs
            log(
                f"{stage}.warmup_epochs is {fraction * epochs:g} instead of {warmup:g}: "
                f"{fraction:.0%} of {epochs} epochs"
            )


def _find(name: str) -> Path:
    path, shipped = Path(name), shipped_configs()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(f"configuration file {name!r} does not exist")
        return path
    if name not in shipped:
        near = "".join(f"; did you mean {word!r}?" for word in _nearest(name, shipped))
        known = f"shipped: {', '.join(shipped)}; or give the path of a YAML file"
        raise ConfigError(f"no configuration is called {name!r}{near}; {known}")
    return CONFIG_DIR / f"{name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a list, needs sections such as 'model:' with keys below")
    return {str(key): value for key, value in tree.items()}


def _parse(overrides: Sequence[str], problems: list[str]) -> Any:
    """The tree of settings given as key=value."""
    tree = OmegaConf.create()
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or "" in key.split("."):
            problems.append(f"{text!r} needs the form key=value, such as pretrain.epochs=100")
            continue
        try:
            value = OmegaConf.from_dotlist([f"value={raw}"])["value"]
        except (YAMLError, OmegaConfBaseException):
            value = raw  # a path or a name with YAML's special characters
        if OmegaConf.is_dict(value) and not raw.lstrip().startswith("{"):
            value = raw  # a path with ': ' in it
        try:
            OmegaConf.update(tree, key, value)
        except OmegaConfBaseException as error:
            problems.append(f"{text!r}: {str(error).splitlines()[0]}")
    return tree


def _keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all settings."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    starts = [word for word in known if word.startswith(name)]
    return starts[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)


def _key_of(place: Sequence[int | str]) -> str:
    """Dotted key of the place of an error of pydantic, which ends in a type if a setting has
    several.
    """
    section: Any = Config
    parts = []
    for part in place:
        if section is None and isinstance(part, str):
            continue
        parts.append(str(part))
        field = None if section is None else section.model_fields.get(part)
        kind = None if field is None else field.annotation
        section = kind if isinstance(kind, type) and issubclass(kind, Section) else None
    return ".".join(parts)


def _explain(key: str, details: Sequence[ErrorDetails]) -> str:
    """One line for the errors of pydantic for one key: several if it has several types."""
    detail = details[0]
    if key in REMOVED:
        return f"{key}: a setting of an earlier version; {REMOVED[key]}"
    if detail["type"] == "extra_forbidden":
        section, _, leaf = key.rpartition(".")
        # of two keys with the same last word, the one in this section
        known = sorted(_keys(), key=lambda k: k.rpartition(".")[0] == section)
        names = {k: k for k in Config.model_fields} | {k.rpartition(".")[2]: k for k in known}
        near = [f"did you mean {names[name]!r}?" for name in _nearest(leaf, names)]
        return f"{key}: unknown key; {near[0] if near else '`sssd-fast configs NAME` lists all'}"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    texts = [re.sub("^(Input|Value) should ", "needs to ", each["msg"]) for each in details]
    text = " or ".join([texts[0], *(each.removeprefix("needs to ") for each in texts[1:])])
    return f"{key}: got {detail['input']!r}, {text[0].lower()}{text[1:]}"
