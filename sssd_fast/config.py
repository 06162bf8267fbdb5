"""Configuration: one tree of typed sections, read from YAML, overridden by key=value, refused as a whole when wrong.

    config = load_config("cpu_smoke", ["data.source=ct/", "pretrain.epochs=400"])

A name is looked up among the shipped files (sssd_fast/configs), anything with a slash or a .yaml ending is a path. Every problem
(unknown key, wrong type, value out of range, keys that contradict each other) is collected and raised in one ConfigError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from sssd_fast.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Area = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

CONFIG_DIR = Path(__file__).parent / "configs"
# name: (width, depth, heads), Dosovitskiy et al. 2021 (arXiv 2010.11929) and Touvron et al. 2021 (arXiv 2012.12877)
VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )


class DataConfig(Section):
    """Which images, which labels, which split."""

    source: str = "synthetic"  # "synthetic" = the seeded synthetic slices; else a folder with one folder per class, or the images' root
    manifest: str | None = None  # CSV path,label[,split][,patient], paths relative to `source`
    synthetic_images: Annotated[int, Field(ge=40)] = 1600
    synthetic_seed: Annotated[int, Field(ge=0)] = 0
    split: str = (
        "random"  # random | block | patient | kfold | manifest (its split column) | a CSV file
    )
    test_fraction: OpenFraction = 0.2
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = (
        0.1  # of all images, cut from the training part; 0 = no validation
    )
    folds: Annotated[int, Field(ge=2)] = 5
    fold: Annotated[int, Field(ge=0)] = 0
    split_seed: Annotated[int, Field(ge=0)] = 0
    positive: str | None = (
        None  # class whose score counts in sensitivity and AUC; None = see `positive_class`
    )
    max_bad_fraction: Fraction = 0.01  # more unusable files than this is an error
    accept_wrong_extension: bool = (
        False  # keep good images whose file name ends in another format's extension
    )
    fit: Literal["crop", "stretch"] = (
        "crop"  # evaluation view: largest centred part of the model's aspect, or the whole image
    )
    loader: Literal["auto", "resident", "dali", "torch"] = (
        "auto"  # auto = images decoded once and kept where they fit, else DALI, else torch
    )
    workers: Annotated[int, Field(ge=0)] = 0  # processes of the torch loader, threads of the others
    cache: str = "auto"  # file of decoded images: auto = in the user's cache folder, none = no file, or a folder
    resident_gib: Positive | None = (
        None  # most that decoded images may take; None = a tenth of the GPU, half of the free host memory
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.fold >= self.folds:
            raise ValueError(
                f"fold is {self.fold}, needs to be below folds ({self.folds}); folds count from 0"
            )
        if self.split not in (
            "random",
            "block",
            "patient",
            "kfold",
            "manifest",
        ) and not self.split.endswith(".csv"):
            raise ValueError(
                f"split is {self.split!r}, needs random, block, patient, kfold, manifest (the manifest's split column) or a .csv file"
            )
        if (
            self.cache not in ("auto", "none") and "/" not in self.cache
        ):  # a mistyped word is not to become a folder
            raise ValueError(
                f"cache is {self.cache!r}, needs auto, none, or a folder with a slash in it, such as ./pixels"
            )
        if self.split == "manifest" and self.manifest is None:
            raise ValueError(
                "split is 'manifest', which needs data.manifest=FILE.csv with a split column"
            )
        return self


class ModelConfig(Section):
    """Vision transformer encoder and the masked autoencoder's decoder. Sizes in pixels, height before width."""

    name: Literal["tiny", "small", "base", "large"] = "base"
    image_size: tuple[Count, Count] = (224, 224)
    patch_size: Literal[8, 14, 16] = 16
    in_channels: Literal[1, 3] = 1
    width: Count | None = None  # None = by name
    depth: Count | None = None
    heads: Count | None = None
    mlp_ratio: Positive = 4.0
    norm_eps: Positive = 1e-6
    cls_token: bool = True
    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16
    mask_ratio: OpenFraction = 0.75
    mean: tuple[float, ...] = (0.5,)  # of pixel / 255, per channel or one for all
    std: tuple[Positive, ...] = (0.25,)

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (
            (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        )

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
        """K = int(L * (1 - mask_ratio)), as facebookresearch/mae rounds it."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        problems = []
        for side, size in zip(("height", "width"), self.image_size, strict=True):
            if size % self.patch_size:
                near = max(1, round(size / self.patch_size)) * self.patch_size
                problems.append(
                    f"image_size {side} is {size}, needs a multiple of patch_size {self.patch_size} (nearest: {near})"
                )
        width, _, heads = self.encoder_shape
        for what, w, h in (
            ("", width, heads),
            ("decoder_", self.decoder_width, self.decoder_heads),
        ):
            if w % h:
                problems.append(f"{what}width is {w}, needs a multiple of {what}heads ({h})")
            if w % 4:
                problems.append(
                    f"{what}width is {w}, needs a multiple of 4 for 2-D sin-cos positions"
                )
        if not problems and not 0 < self.num_visible < self.num_patches:
            problems.append(
                f"mask_ratio is {self.mask_ratio} with {self.num_patches} patches, which leaves {self.num_visible} visible; "
                f"needs at least 1 visible and 1 masked"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.in_channels):
                problems.append(
                    f"{name} has {len(values)} values, needs 1 or one per channel (in_channels is {self.in_channels})"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ObjectiveConfig(Section):
    """Reconstruction plus self-distillation; defaults are SD-MAE's (arXiv 2203.16983)."""

    weight: Fraction = 0.2  # total = weight * distillation + (1 - weight) * reconstruction
    norm: Literal["patch", "channel", "none"] = (
        "patch"  # normalisation of the reconstruction target
    )
    kind: Literal["dino", "cosine", "mse", "smooth_l1"] = "dino"
    detach_teacher: bool = False
    pooling: Literal["image", "token"] = "image"
    center: Literal["prob", "logit"] = "prob"
    center_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    student_temp: Positive = 0.1
    teacher_temp: Positive = 0.04
    head_hidden: Count = 2048
    head_bottleneck: Count = 256
    prototypes: Annotated[int, Field(ge=2)] = 4096


class AugmentConfig(Section):
    """Per image, on uint8 pixels; all off means resize + centre crop."""

    crop_scale: tuple[Area, Area] = (0.2, 1.0)  # area of the random crop
    crop_ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    hflip: Fraction = 0.5  # probability
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    brightness: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} is ({low}, {high}), needs the smaller number first")
        return self


class TrainConfig(Section):
    """What every training command shares. Effective batch = batch_size * accumulate * processes."""

    epochs: Count = 100
    max_steps: Count | None = None  # stop after this many optimizer steps whatever `epochs` says
    batch_size: Count = 64  # per process and micro-step
    accumulate: Count = 1
    batch: Literal["auto"] | None = (
        None  # auto = the largest micro-batch that fits; effective batch as the two lines above give it
    )
    base_lr: Positive = 1.5e-4  # lr = base_lr * effective batch / 256
    min_lr: NonNegative = 0.0
    warmup_epochs: NonNegative = 5.0
    weight_decay: NonNegative = 0.05
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    clip_grad: Positive | None = None  # largest norm of all gradients together
    augment: AugmentConfig = AugmentConfig()
    validate_epochs: Count = 1  # validation every so many epochs, and at the end
    checkpoint_epochs: Count = 1  # a checkpoint every so many epochs, and at the end
    checkpoint_steps: Count | None = None  # and every so many optimizer steps
    keep_last: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _check_train(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs and self.max_steps is None:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, needs to be below epochs ({self.epochs})"
            )
        return self


class PretrainConfig(TrainConfig):
    extra: str | None = None  # a folder of further images to pre-train on, without their labels
    image_epochs: Annotated[int, Field(ge=0)] = (
        20  # a reconstruction picture every so many epochs; 0 = only at the end
    )
    num_images: Count = 8  # images in a picture


class FinetuneConfig(TrainConfig):
    base_lr: Positive = 5e-4
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    mixup: NonNegative = 0.0  # alpha of the beta distribution; 0 = off
    cutmix: NonNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    random_erasing: Fraction = 0.0  # probability per image
    pool: Literal["mean", "cls"] = "mean"
    class_weights: Literal["none", "balanced"] = "none"
    select: Literal["auc", "accuracy", "loss", "last"] = (
        "auc"  # which validation figure picks the best checkpoint
    )


class ProbeConfig(Section):
    """Linear probe: the encoder frozen, logistic regression on its standardised features."""

    pool: Literal["mean", "cls"] = "mean"
    batch_size: Count = 64
    inverse_penalties: tuple[Positive, ...] = (
        1e-3,
        1e-2,
        1e-1,
        1.0,
        10.0,
    )  # scikit-learn's C; validation chooses


class EvaluateConfig(Section):
    batch_size: Count = 64
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    threshold: Fraction = 0.5


class StepConfig(Section):
    """How a training step is computed: speed and memory. Except for `residual` and `optimizer` a run may be resumed with other values."""

    compile: Literal["auto", True, False] = (
        "auto"  # torch.compile; auto = on a CUDA GPU, see `pick_compile`
    )
    cuda_graphs: Literal["auto", True, False] = (
        "auto"  # replay a step as one launch; auto = for small batches, compiled only
    )
    attention: Literal["auto", "fused", "xformers", "sdpa", "eager"] = "auto"  # of the encoder
    decoder_attention: Literal["auto", "fused", "xformers", "sdpa", "eager"] = "auto"
    mlp: Literal["auto", "fused", "plain"] = (
        "auto"  # fused = mae_kernels.gelu_linear; auto = where its kernels run
    )
    residual: Literal["fp32", "bf16"] = (
        "fp32"  # dtype between the blocks with precision bf16; statistics stay fp32
    )
    activation_budget: Area = (
        1.0  # compiled only: share of activations to keep for the backward, the rest is recomputed
    )
    checkpoint: Literal["none", "selective", "full"] = (
        "none"  # not compiled only: recompute norms and GELU, or whole blocks
    )
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8-bit moments through torchao

    @model_validator(mode="after")
    def _check(self) -> StepConfig:
        problems = []
        if self.compile is False and self.cuda_graphs is True:
            problems.append("cuda_graphs is true with compile false; needs compile true or auto")
        if self.compile is False and self.activation_budget < 1:
            problems.append(
                f"activation_budget is {self.activation_budget:g} with compile false, which nothing would read; set checkpoint "
                f"to selective or full instead"
            )
        if self.compile is True and self.checkpoint != "none":
            problems.append(
                f"checkpoint is {self.checkpoint!r} with compile true; lower activation_budget instead"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Config(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"  # auto = cuda where there is one, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto = bf16 on sm_80 and newer, fp16 on older GPUs, fp32 on the CPU
    )
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads for torch; 0 = torch's own choice
    log_seconds: Positive = 10.0  # a plain log line at least this often
    tensorboard: bool = True
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    step: StepConfig = StepConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    probe: ProbeConfig = ProbeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check_pool(self) -> Config:
        for section in ("finetune", "probe"):
            if getattr(self, section).pool == "cls" and not self.model.cls_token:
                raise ValueError(f"{section}.pool is 'cls', which needs model.cls_token=true")
        return self


def shipped_configs() -> list[str]:
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a shipped config by name or a YAML file by path (None = defaults), applies key=value overrides, validates.

    Raises ConfigError naming every unknown key (with the nearest known one), wrong type and value out of range at once.
    """
    tree = _read_yaml(_find(str(source))) if source is not None else {}
    problems: list[str] = []
    for text in overrides:
        _apply(tree, text, problems)
    return _validate(tree, problems, "" if source is None else f" in {source}")


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with key=value overrides. Raises ConfigError like `load_config`."""
    tree, problems = to_dict(config), list[str]()
    for text in overrides:
        _apply(tree, text, problems)
    return _validate(tree, problems, "")


def from_dict(tree: dict[str, Any]) -> Config:
    """A Config from plain containers, such as those of a checkpoint."""
    return _validate(tree, [], "")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain containers (weights_only-safe, YAML-safe)."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    import yaml

    return str(yaml.safe_dump(to_dict(config), sort_keys=False))


def _validate(tree: dict[str, Any], problems: list[str], where: str) -> Config:
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors()]
        config = None
    if problems or config is None:
        raise ConfigError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in the configuration{where}:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return config


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(
                f"configuration file {name!r} does not exist; give a path to a YAML file or one of: {_names()}"
            )
        return path
    if (CONFIG_DIR / f"{name}.yaml").is_file():
        return CONFIG_DIR / f"{name}.yaml"
    raise ConfigError(
        f"no configuration is called {name!r}{_suggest(name, shipped_configs())}; shipped: {_names()}"
    )


def _names() -> str:
    return ", ".join(shipped_configs())


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def unique(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:  # plain YAML silently keeps the last one
            raise ConfigError(
                f"{path}: key {twice[0]!r} stands twice (line {node.start_mark.line + 1}); keep one"
            )
        return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds a {type(tree).__name__}, needs sections such as 'model:' with keys below them"
        )
    return tree


def _apply(tree: dict[str, Any], text: str, problems: list[str]) -> None:
    """Puts one dotted key=value into the tree; the value is read as YAML."""
    import yaml

    key, equals, raw = text.partition("=")
    if not equals or not key:
        problems.append(f"override {text!r} needs the form key=value, such as pretrain.epochs=100")
        return
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        value = raw  # a path or a name with YAML's special characters
    if isinstance(value, dict) and not raw.lstrip().startswith("{"):
        value = raw  # a path with ': ' in it
    *sections, leaf = key.split(".")
    node = tree
    for i, name in enumerate(sections):
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            problems.append(
                f"override {text!r}: {'.'.join(sections[: i + 1])} is a single value and holds no keys"
            )
            return
        node = child
    node[leaf] = value


def _fields(loc: Iterable[int | str]) -> list[str]:
    """Names known at the section that `loc` points into; empty where the section itself is unknown."""
    model: Any = Config
    for part in loc:
        field = model.model_fields.get(part)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return []
        model = field.annotation
    return list(model.model_fields)


def _all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _explain(detail: ErrorDetails) -> str:
    loc = detail["loc"]
    key = ".".join(str(part) for part in loc)
    if detail["type"] == "extra_forbidden":
        siblings = _fields(loc[:-1])
        hint = _suggest(str(loc[-1]), siblings)
        if not hint:  # right name, wrong section
            hint = _suggest(str(loc[-1]), [k.rsplit(".", 1)[-1] for k in _all_keys()])
            full = [k for k in _all_keys() if hint and k.rsplit(".", 1)[-1] == hint.split("'")[1]]
            hint = (
                f"; did you mean {' or '.join(full[:3])}?"
                if full
                else f"; known here: {', '.join(siblings)}"
            )
        return f"{key}: unknown key{hint}"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"])
    text = (
        detail["msg"]
        .replace("Input should be", "needs to be")
        .replace("Value should be", "needs to be")
    )
    return f"{key}: got {detail['input']!r}, {text[0].lower()}{text[1:]}"
