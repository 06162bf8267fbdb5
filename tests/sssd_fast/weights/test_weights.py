"""Loading weights: every naming gives the same numbers, conversions are exact, what does not fit is
rejected as a whole with its reason, and no file can run code."""

from __future__ import annotations

import argparse
import os
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from sssd_fast.config import Config, ModelConfig, to_dict
from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier
from sssd_fast.objective import SSSD
from sssd_fast.run.checkpoint import CheckpointManager
from sssd_fast.weights.export import save_safetensors
from sssd_fast.weights.files import Norm, read_source
from sssd_fast.weights.formats import Model, export_state
from sssd_fast.weights.load import IMAGENET, load_into


def small(**overrides: object) -> ModelConfig:
    sizes = {"image_size": (64, 64), "width": 24, "depth": 3, "heads": 3}
    sizes |= {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
    return ModelConfig(**sizes | overrides)


def randomized(model: Any) -> Any:
    """Every parameter away from its initial value, so that what was not loaded shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def mae(**overrides: object) -> MAE:
    model: MAE = randomized(MAE(small(**overrides)))
    return model


def classifier(num_classes: int = 2, pool: str = "mean", **overrides: object) -> Classifier:
    model: Classifier = randomized(Classifier(small(**overrides), num_classes, pool))
    return model


def timm(model: Model, **options: bool) -> dict[str, Tensor]:
    return export_state(model, "timm", **options)


def snapshot(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_weights(path: Path) -> dict[str, Tensor]:
    return read_source(path).state


def grey_image() -> Tensor:
    return torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- names ----

# names in memory since transformers 5, from those in files
TRANSFORMERS_5 = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def named(model: MAE, naming: str) -> dict[str, Tensor]:
    """The model's state under the names of a file."""
    own = model.state_dict()
    if naming == "sssd_fast":
        return own
    if naming == "sssd":
        return {f"mae.{name}": t for name, t in own.items()} | {"center": torch.zeros(4)}
    if naming == "timm":
        return timm(model, decoder=True)
    state = export_state(model, "huggingface", decoder=True)
    for old, new in TRANSFORMERS_5.items() if naming == "huggingface_5" else ():
        state = {name.replace(old, new): t for name, t in state.items()}
    return state


@pytest.mark.parametrize("wrapper", ["", "module._orig_mod."])
@pytest.mark.parametrize("naming", ["sssd_fast", "sssd", "timm", "huggingface", "huggingface_5"])
def test_load_into_accepts_every_naming_of_an_autoencoder(naming: str, wrapper: str) -> None:
    source, target = mae(), mae()
    state = {wrapper + name: tensor for name, tensor in named(source, naming).items()}
    report = load_into(target, state)
    assert same(source.state_dict(), target.state_dict())
    formats = {"sssd": "sssd_fast", "huggingface_5": "huggingface"}
    assert report.format == formats.get(naming, naming)
    assert not report.rows("missing", "new", "unexpected")
    assert [row.name for row in report.rows("not used")] == ["center"] * (naming == "sssd")


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_save_safetensors_keeps_a_classifier_under_timm_names(tmp_path: Path, pool: str) -> None:
    source, target = classifier(3, pool), classifier(3, pool)
    path = tmp_path / "vit.safetensors"
    save_safetensors(path, source, "timm")
    load_into(target, path)
    assert same(source.state_dict(), target.state_dict())
    assert same(load_file(path), timm(source))
    # no temporary file is left
    assert list(tmp_path.iterdir()) == [path]


def test_export_state_has_the_names_of_timm() -> None:
    """The exact set that timm's VisionTransformer(global_pool="avg") and ("token") hold, with the
    position table's batch axis."""
    kinds = ("weight", "bias")
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    stems = {f"blocks.{i}.{layer}" for i in range(3) for layer in layers}
    stems |= {"patch_embed.proj", "head"}
    for pool, norm in (("mean", "fc_norm"), ("cls", "norm")):
        want = {f"{stem}.{kind}" for stem in stems | {norm} for kind in kinds}
        assert timm(classifier(pool=pool)).keys() == want | {"cls_token", "pos_embed"}
    assert timm(mae())["pos_embed"].shape == (1, 17, 24)


def test_export_state_for_hugging_face_needs_a_cls_token() -> None:
    with pytest.raises(WeightsError, match="this model has none; export it as 'timm'"):
        export_state(mae(cls_token=False), "huggingface")


@pytest.mark.parametrize("format_", ["timm", "huggingface"])
def test_export_state_shares_no_memory_with_the_model(format_: Any) -> None:
    model = classifier(pool="cls")
    before = snapshot(model)
    for tensor in export_state(model, format_).values():
        assert tensor.is_contiguous()
        tensor.zero_()
    assert same(before, model.state_dict())


# ---- what is loaded ----


def loaded_by_prefix(target: Model, source: Model, before: dict[str, Tensor], prefix: str) -> bool:
    """Whether the tensors with the prefix are the source's, and all others as before."""
    mixed = {n: source.state_dict()[n] if n.startswith(prefix) else t for n, t in before.items()}
    return same(target.state_dict(), mixed)


def test_load_into_accepts_a_released_mae_encoder() -> None:
    """mae_pretrain_vit_*.pth hold the encoder alone: the decoder keeps its initial values."""
    source, target = mae(), mae()
    before = snapshot(target)
    report = load_into(target, timm(source))
    assert loaded_by_prefix(target, source, before, "encoder.")
    assert {row.name for row in report.rows("new")} == {n for n in before if n[:8] == "decoder."}
    assert not report.rows("missing", "unexpected", "not used")


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("decoder", [True, False])
def test_load_into_gives_a_classifier_the_encoder_of_an_autoencoder(
    decoder: bool, pool: str
) -> None:
    """As facebookresearch/mae: with mean pooling the final norm is dropped, fc_norm and head start
    fresh; none of it is a problem."""
    source, target = mae(), classifier(pool=pool)
    before = snapshot(target)
    report = load_into(target, timm(source, decoder=decoder))
    fresh = {row.name for row in report.rows("new")}
    assert fresh == {name for name in before if name.startswith(("fc_norm.", "head."))}
    assert all(torch.equal(before[name], target.state_dict()[name]) for name in fresh)
    assert not report.rows("missing", "unexpected")
    reasons = {"a classifier has no decoder"} if decoder else set()
    reasons |= {"mean pooling has its own fc_norm after the pooling"} if pool == "mean" else set()
    assert {row.how for row in report.rows("not used")} == reasons
    images = torch.randn(2, 1, 64, 64)
    tokens = target.encoder(images)
    tokens = source.encoder.norm(tokens) if pool == "mean" else tokens
    torch.testing.assert_close(tokens, source.encoder(images))


def test_pretraining_checkpoint_loads_into_a_classifier(tmp_path: Path) -> None:
    sizes = {"prototypes": 8, "head_hidden": 8, "head_bottleneck": 4}
    config = Config.model_validate({"model": small().model_dump(), "objective": sizes})
    trained = SSSD(config.model, config.objective)
    state = {"task": "pretrain", "model": trained.state_dict(), "config": to_dict(config)}
    torch.save(state, tmp_path / "step-1.pt")
    target = classifier()
    report = load_into(target, tmp_path / "step-1.pt")
    encoder = trained.mae.encoder
    assert torch.equal(target.encoder.blocks[2].mlp.fc2.weight, encoder.blocks[2].mlp.fc2.weight)
    reasons = {"self-distillation of pre-training", "a classifier has no decoder"}
    assert {row.how for row in report.rows("not used")} >= reasons
    assert not [*report.rows("missing", "unexpected"), *report.notes]


def test_cls_token_may_be_missing_in_source_or_model() -> None:
    bare, with_cls = mae(cls_token=False), mae()
    report = load_into(bare, timm(with_cls, decoder=True))
    assert torch.equal(bare.encoder.pos_embed, with_cls.encoder.pos_embed[1:])
    assert torch.equal(bare.decoder.pos_embed, with_cls.decoder.pos_embed[1:])
    unused = [(row.name, row.how) for row in report.rows("not used")]
    assert unused == [("encoder.cls_token", "this model has no cls token")]
    fresh = mae()
    cls_token = fresh.encoder.cls_token.clone()
    report = load_into(fresh, timm(bare))
    assert [row.name for row in report.rows("missing")] == ["encoder.cls_token"]
    assert torch.equal(fresh.encoder.cls_token, cls_token)
    assert fresh.encoder.pos_embed[0].abs().max() == 0
    assert torch.equal(fresh.encoder.pos_embed[1:], bare.encoder.pos_embed)
    assert "0 -> 1 prefix rows" in report.table()


# ---- channels and pixel normalisation ----


@pytest.mark.parametrize("patch", [8, 16])
def test_three_to_one_channel_keeps_the_tokens_of_a_grey_image(patch: int) -> None:
    """Both models scale every channel by mean 0.5, std 0.25."""
    colour = mae(in_channels=3, patch_size=patch)
    grey = mae(patch_size=patch)
    report = load_into(grey, colour.state_dict())
    image = grey_image()
    image_3 = image.expand(-1, 3, -1, -1)
    assert_close(grey.encoder(image), colour.encoder(image_3))
    noise = torch.rand(2, grey.config.num_patches)
    want = colour.reconstruct(image_3, noise)[0].unflatten(-1, (patch, patch, 3)).mean(-1)
    assert_close(grey.reconstruct(image, noise)[0], want.flatten(2))
    assert "3 -> 1 channel: summed" in report.table()
    assert "3 -> 1 channel: averaged" in report.table()


@pytest.mark.parametrize(
    ("norm", "channels", "mean", "std"),
    [
        (IMAGENET, 1, (0.4,), (0.3,)),
        (IMAGENET, 3, (0.5,), (0.25,)),
        (IMAGENET, 3, (0.1, 0.2, 0.3), (0.4, 0.3, 0.2)),
        (((0.4,), (0.2,)), 1, (0.5,), (0.25,)),
    ],
)
def test_source_norm_makes_the_change_of_pixel_scale_exact(
    tmp_path: Path, norm: Norm, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """The released MAE weights expect ImageNet's mean and std; a CT model has its own."""
    source = mae(in_channels=len(norm[0]), mean=norm[0], std=norm[1])
    target = mae(in_channels=channels, mean=mean, std=std)
    report = load_into(target, timm(source), source_norm=norm)
    image = grey_image()
    want = source.encoder(image.expand(-1, len(norm[0]), -1, -1))
    assert_close(target.encoder(image.expand(-1, channels, -1, -1)), want)
    assert f"scaled for mean {mean}, std {std}" in report.table()
    save_safetensors(tmp_path / "a.safetensors", source, "timm")
    (note,) = load_into(target, tmp_path / "a.safetensors").notes
    assert note.startswith("pixels of the source were scaled with mean, std")
    unfolded = target.encoder(image.expand(-1, channels, -1, -1))
    assert (unfolded - want).abs().max() > 1e-2


# ---- positions ----


@pytest.mark.parametrize(
    ("source", "target"),
    [((64, 64), (96, 96)), ((96, 96), (64, 64)), ((64, 64), (48, 112)), ((96, 96), (32, 64))],
)
def test_positions_are_interpolated_and_prefix_rows_kept(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    old, new = mae(image_size=source), mae(image_size=target)
    report = load_into(new, timm(old, decoder=True))
    rows, columns = grid = new.encoder.grid
    for part in ("encoder", "decoder"):
        table, got = getattr(old, part).pos_embed, getattr(new, part).pos_embed
        image = table[1:].T.reshape(1, -1, *old.encoder.grid)
        want = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
        assert torch.equal(got[0], table[0])
        for r in range(rows):
            for c in range(columns):
                torch.testing.assert_close(got[1 + r * columns + c], want[0, :, r, c])
    was = "{} x {}".format(*old.encoder.grid)
    assert f"{was} -> {rows} x {columns} patches: bicubic" in report.table()


def test_positions_of_a_square_grid_are_not_read_as_a_flat_one(tmp_path: Path) -> None:
    """4 x 4 patches and 2 x 8 patches have tables of the same size."""
    square, flat = mae(), mae(image_size=(32, 128))
    report = load_into(flat, timm(square))
    assert not torch.equal(square.encoder.pos_embed, flat.encoder.pos_embed)
    assert "4 x 4 -> 2 x 8 patches: bicubic" in report.table()
    twin = mae(image_size=(32, 128))
    # under this package's names the table is of the model's grid
    load_into(twin, flat.state_dict())
    assert torch.equal(twin.encoder.pos_embed, flat.encoder.pos_embed)
    # and in a file with a configuration, of the grid in it
    save_safetensors(tmp_path / "flat.safetensors", flat, "timm")
    report = load_into(square, tmp_path / "flat.safetensors")
    assert "2 x 8 -> 4 x 4 patches: bicubic" in report.table()


def test_positions_may_lack_a_row_for_the_cls_token() -> None:
    """timm's no_embed_class."""
    old, new = mae(), mae()
    state = timm(old)
    load_into(new, {**state, "pos_embed": state["pos_embed"][:, 1:]})
    assert torch.equal(new.encoder.pos_embed[1:], old.encoder.pos_embed[1:])
    assert new.encoder.pos_embed[0].abs().max() == 0


def test_ambiguous_position_table_is_said_to_be_guessed() -> None:
    """25 rows: 5 x 5 patches, or 24 patches and a row for the cls token."""
    target = mae()
    state = timm(mae()) | {"pos_embed": torch.randn(1, 25, 24)}
    report = load_into(target, state)
    guess = "guessed: a grid of 5 x 5, without a row for the cls token"
    assert guess in report.summary
    assert guess not in load_into(target, timm(mae())).summary


# ---- encoders of other methods ----


@pytest.mark.parametrize(
    ("wrapper", "prefix", "more"),
    [
        ("teacher", "backbone.", ["head.mlp.0.weight"]),  # DINO
        ("state_dict", "module.momentum_encoder.", ["module.queue"]),
        ("model", "", ["mask_token"]),  # iBOT, DINOv2
        ("target_encoder", "module.", []),  # I-JEPA
    ],
)
def test_encoder_of_another_method_is_taken_out_of_its_file(
    tmp_path: Path, wrapper: str, prefix: str, more: list[str]
) -> None:
    source, target = mae(), mae()
    state = {prefix + name: t for name, t in timm(source).items()}
    state |= {name: torch.zeros(1, 24) for name in more}
    student = {name: -t for name, t in state.items()}
    torch.save({"student": student, wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    before = {n: t for n, t in snapshot(target).items() if n.startswith("decoder.")}
    report = load_into(target, tmp_path / "a.pth")
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(target.encoder.state_dict()[name], tensor), name
    after = {n: t for n, t in target.state_dict().items() if n.startswith("decoder.")}
    assert same(before, after)
    assert f"'{wrapper}' of the file is used, not student" in report.summary
    stripped = prefix.removeprefix("module.")
    assert (f"only the tensors named {stripped}* are used" in report.summary) is bool(stripped)


def test_file_of_several_encoders_names_the_command_that_takes_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = mae(), mae()
    state = {f"module.base_encoder.{n}": t for n, t in timm(source).items()}
    state |= {f"module.momentum_encoder.{n}": -t for n, t in timm(source).items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    with pytest.raises(WeightsError, match=r"base_encoder\., momentum_encoder\.") as error:
        load_into(target, tmp_path / "moco.pth")
    command = shlex.split(str(error.value).partition("such as base_encoder.: ")[2])
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    exec(command[2], {})
    load_into(target, tmp_path / "encoder.pth")
    assert torch.equal(target.encoder.norm.weight, source.encoder.norm.weight)


# ---- what is rejected ----

QK_NORMS = {
    f"blocks.{i}.attn.{x}_norm.{kind}": torch.ones(8)
    for i in range(3)
    for x in "qk"
    for kind in ("weight", "bias")
}
OWN = mae().state_dict()
UNKNOWN = {f"layer{i}.0.conv1.weight": torch.ones(3) for i in range(9)}


@pytest.mark.parametrize(
    ("state", "messages"),
    [
        (
            timm(mae(width=48)),
            [
                "does not fit the model; nothing was loaded",
                "encoder.cls_token is [1, 1, 48], needs [1, 1, 24]",
                " more\n",
                "Set model.width, patch_size and the others to the source's",
            ],
        ),
        (timm(mae(depth=2)), ["the source's encoder has 2 blocks, the model's 3"]),
        (timm(mae(depth=4)), ["the source's encoder has 4 blocks, the model's 3"]),
        # a random patch projection under a good encoder would be silent damage
        (
            timm(mae(patch_size=8, image_size=(32, 32))),
            ["1 tensors have shapes that cannot be converted: encoder.patch_embed.proj.weight is "],
        ),
        (
            mae(decoder_width=32).state_dict(),
            ["decoder.embed.weight is [32, 24], needs [16, 24]"],
        ),
        (mae(decoder_depth=4).state_dict(), ["source's decoder has 4 blocks, the model's 2"]),
        (
            {name: t for name, t in OWN.items() if name != "decoder.pred.bias"},
            ["1 decoder tensors are missing: decoder.pred.bias"],
        ),
        (
            {name: t for name, t in OWN.items() if ".attn." not in name},
            ["30 of the model's 42 encoder tensors fit, needs 90%; missing: encoder.blocks.0.attn"],
        ),
        # a model of another kind that shares names
        (timm(mae()) | QK_NORMS, ["12 tensors of the source are not in the model: blocks.0.attn"]),
        (UNKNOWN, ["the state dict: not the weights of a ViT", "the first are layer0.0.conv1.wei"]),
    ],
)
def test_load_into_rejects_what_does_not_fit_and_loads_nothing(
    state: dict[str, Tensor], messages: list[str]
) -> None:
    target = mae()
    before = snapshot(target)
    with pytest.raises(WeightsError) as error:
        load_into(target, state)
    assert same(before, target.state_dict())
    assert [text for text in messages if text not in str(error.value)] == []


def test_source_norm_of_the_wrong_length_is_rejected() -> None:
    with pytest.raises(WeightsError, match=r"needs \(mean, std\) with 1 or 3 values each and std"):
        load_into(mae(), timm(mae(in_channels=3)), source_norm=((0.5, 0.5), (0.2, 0.2)))


def test_table_groups_blocks_and_lists_conversions() -> None:
    state = timm(classifier(1000, in_channels=3)) | {"odd.weight": torch.ones(1)}
    del state["blocks.1.norm2.bias"]
    target = classifier()
    head = target.head.weight.clone()
    lines = load_into(target, state).table().splitlines()
    assert torch.equal(target.head.weight, head)
    assert lines[0].startswith(
        "41 tensors loaded from the state dict (timm), 1 of them converted; 1 missing, "
        "2 new by design, 1 unexpected, 0 not used"
    )
    assert set(lines) >= {
        "matched    encoder.blocks.*.attn.qkv.weight <- blocks.*.attn.qkv.weight (3 tensors)",
        "matched    encoder.blocks.*.norm2.bias <- blocks.*.norm2.bias (2 tensors)",
        "converted  encoder.patch_embed.proj.weight <- patch_embed.proj.weight "
        "[3 -> 1 channel: summed]",
        "missing    encoder.blocks.1.norm2.bias [not in the source: keeps its initial value]",
        "new        head.weight [head of 1000 classes, this model has 2]",
        "unexpected odd.weight",
    }
    state = export_state(mae(), "huggingface", decoder=True)
    lines = load_into(classifier(), state).table().splitlines()
    assert "not used   decoder.* (32 tensors) [a classifier has no decoder]" in lines
    # and the two of the final norm
    assert sum(line.startswith("not used") for line in lines) == 3


# ---- files ----


def test_read_weights_unwraps_states_and_namespaces(tmp_path: Path) -> None:
    """What facebookresearch/mae, DeepSpeed and PyTorch Lightning write."""
    state = timm(mae())
    options = argparse.Namespace(lr=1e-3, output_dir="x")
    contents: list[dict[str, Any]] = [
        state,
        {"model": state, "args": options, "epoch": 3, "optimizer": {"state": {}}},
        {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        {"module": {"model": state}},
    ]
    for content in contents:
        torch.save(content, tmp_path / "a.pth")
        assert same(read_weights(tmp_path / "a.pth"), state)


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    source, target = mae(), mae()
    half = {name: t.bfloat16() for name, t in timm(source).items()}
    save_file(half, tmp_path / "half.safetensors")
    report = load_into(target, tmp_path / "half.safetensors")
    assert torch.equal(target.encoder.norm.weight, source.encoder.norm.weight.bfloat16().float())
    assert {row.how for row in report.rows("converted")} == {"from bfloat16"}


def test_quantised_weights_are_not_taken_for_numbers(tmp_path: Path) -> None:
    state = timm(mae())
    state["norm.weight"] = state["norm.weight"].to(torch.int8)
    save_file(state, tmp_path / "int8.safetensors")
    with pytest.raises(WeightsError, match="int8 values; quantised weights"):
        load_into(mae(), tmp_path / "int8.safetensors")


class Evil:
    def __init__(self, function: Callable[..., object], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return self.call


EVIL = {
    Evil(os.mkdir, "evil"): "hold posix.mkdir, which cannot be read without running code",
    Evil(exec, "open('evil', 'w')"): "hold exec, which cannot be read without running code",
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", 2, 5])
@pytest.mark.parametrize("ending", ["pth", "bin"])
def test_read_weights_never_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | int, ending: str
) -> None:
    """Files of torch.save, and bare pickles of protocol 2 and 5."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights.{ending}"
    for evil, message in EVIL.items():
        if isinstance(kind, int):
            path.write_bytes(pickle.dumps({"model": evil}, protocol=kind))
            message = message if kind == 2 else "damaged or not what its name says"
        else:
            state = {"model": timm(mae()), "x": evil}
            torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
        with pytest.raises(WeightsError, match=message):
            read_weights(path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_read_weights_reports_truncated_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        save_safetensors(path, mae(), "timm")
    else:
        state = {"model": timm(mae())}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    size = len(content)
    message = r"cut\.\w+ is damaged or not what its name says: .*Copy or download it again"
    for length in (0, 1, 7, 8, 100, 1000, size // 2, size - 100, size - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=message):
            read_weights(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "do not exist"),
        ("", None, "holds no model.safetensors"),
        (
            "a.pth",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "pointer of Git LFS",
        ),
        ("a.pth", b"\n<!DOCTYPE html><p>404", "is an HTML page, not weights"),
        ("model-00001-of-00002.safetensors", b"x", "one file of several; give the folder"),
        ("a.npz", b"PK", "end in '.npz'; needs a .pth, .pt, .bin, .ckpt or .safetensors file"),
        ("a.pt", {"epoch": 3, "scores": [1.0]}, "hold epoch, scores, needs a state dict"),
        ("a.pt", [torch.ones(2)], "hold a list, needs a state dict"),
        (
            "a.pth",
            {"x.bias": torch.tensor([1, torch.nan])},
            "NaN or infinity in x.bias; use an earlier checkpoint",
        ),
    ],
)
def test_read_weights_rejects_other_paths_and_contents(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / name)


def test_torchscript_is_rejected_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    recwarn.clear()
    with pytest.raises(WeightsError, match=r"TorchScript .*torch.jit.load\('.*a.pt'\).state_dict"):
        read_weights(tmp_path / "a.pt")
    assert not recwarn.list


def test_weights_in_several_files_are_joined(tmp_path: Path) -> None:
    state = timm(mae())
    names = sorted(state)
    for i, part in enumerate((names[:20], names[20:]), 1):
        shard = {name: state[name] for name in part}
        save_file(shard, tmp_path / f"model-0000{i}-of-00002.safetensors")
    assert same(read_weights(tmp_path), state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds 1 of the 2 files of its weights"):
        read_weights(tmp_path)


def test_read_weights_accepts_a_run_folder_and_its_best(tmp_path: Path) -> None:
    """--init runs/ct and --init runs/ct/pretrain/checkpoints/best."""
    manager = CheckpointManager(tmp_path / "ct" / "pretrain" / "checkpoints")
    first, second = mae().state_dict(), mae().state_dict()
    manager.save({"model": first}, 1, best=True)
    manager.save({"model": second}, 2)
    assert same(read_weights(tmp_path / "ct"), second)
    assert same(read_weights(tmp_path / "ct" / "pretrain"), second)
    assert same(read_weights(manager.folder / "best"), first)
