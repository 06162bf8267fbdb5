"""Loading weights: every naming gives the same numbers, conversions are exact, what does not fit is
rejected as a whole with its reason, and no file can run code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sssd_fast.config import Config, ModelConfig, to_dict
from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier
from sssd_fast.objective import SSSD
from sssd_fast.run.checkpoint import CheckpointManager
from sssd_fast.weights.files import read_weights, save_safetensors
from sssd_fast.weights.formats import export_state
from sssd_fast.weights.load import IMAGENET, load_into
from tests.sssd_fast import vit_by_hand


def small(**overrides: object) -> ModelConfig:
    sizes = {"image_size": (64, 64), "width": 24, "depth": 3, "heads": 3}
    sizes |= {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
    return ModelConfig(**sizes | overrides)


def randomized(model: MAE | Classifier) -> MAE | Classifier:
    """Every parameter away from its initial value, so that what was not loaded shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def mae(**overrides: object) -> MAE:
    model = randomized(MAE(small(**overrides)))
    assert isinstance(model, MAE)
    return model


def classifier(num_classes: int = 2, pool: str = "mean", **overrides: object) -> Classifier:
    model = randomized(Classifier(small(**overrides), num_classes, pool))
    assert isinstance(model, Classifier)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- round trips ----


def new_names_of_transformers_5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names in memory since transformers 5, from those in files."""
    rules = [
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ]
    renamed = {}
    for name, tensor in state.items():
        for old, new in rules:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("naming", ["sssd_fast", "sssd", "mae", "huggingface", "huggingface_5"])
def test_load_into_accepts_every_naming_of_an_autoencoder(naming: str, wrapper: str) -> None:
    source, target = mae(), mae()
    state = {
        "sssd_fast": source.state_dict,
        "sssd": lambda: (
            {f"mae.{n}": t for n, t in source.state_dict().items()} | {"center": torch.zeros(4)}
        ),
        "mae": lambda: export_state(source, "timm", decoder=True),
        "huggingface": lambda: export_state(source, "huggingface", decoder=True),
        "huggingface_5": lambda: new_names_of_transformers_5(
            export_state(source, "huggingface", decoder=True)
        ),
    }[naming]()
    report = load_into(target, {wrapper + name: tensor for name, tensor in state.items()})
    assert same(source.state_dict(), target.state_dict())
    assert report.format == {"sssd": "sssd_fast", "huggingface_5": "huggingface"}.get(
        naming, naming
    )
    assert not report.rows("missing") + report.rows("new") + report.rows("unexpected")
    assert [row.name for row in report.rows("not used")] == ["center"] * (naming == "sssd")


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_save_safetensors_keeps_a_classifier_under_timm_names(tmp_path: Path, pool: str) -> None:
    source, target = classifier(3, pool), classifier(3, pool)
    save_safetensors(tmp_path / "vit.safetensors", source, "timm")
    load_into(target, tmp_path / "vit.safetensors")
    assert same(source.state_dict(), target.state_dict())
    with safe_open(tmp_path / "vit.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["names"]) == ("pt", "timm")
    assert ModelConfig.model_validate_json(metadata["config"]) == source.config
    # no temporary file is left
    assert list(tmp_path.iterdir()) == [tmp_path / "vit.safetensors"]


def test_export_state_has_the_names_of_timm() -> None:
    """The exact set that timm's VisionTransformer(global_pool="avg") and ("token") hold, with the position table's batch axis."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    common = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "head.weight",
        "head.bias",
    }
    common |= {f"blocks.{i}.{name}" for i in range(3) for name in block}
    assert export_state(classifier(), "timm").keys() == common | {"fc_norm.weight", "fc_norm.bias"}
    assert export_state(classifier(pool="cls"), "timm").keys() == common | {
        "norm.weight",
        "norm.bias",
    }
    assert export_state(mae(), "timm")["pos_embed"].shape == (1, 17, 24)


def test_export_state_rejects_what_would_change_the_model() -> None:
    with pytest.raises(
        WeightsError, match="always has a cls token, this model has none; export it as 'timm'"
    ):
        export_state(mae(cls_token=False), "huggingface")
    with pytest.raises(WeightsError, match="has no decoder"):
        export_state(classifier(), "timm", decoder=True)
    with pytest.raises(WeightsError, match="'onnx', needs 'timm' or 'huggingface'"):
        export_state(mae(), "onnx")


# ---- what goes where ----


def test_load_into_accepts_a_released_mae_encoder() -> None:
    """mae_pretrain_vit_*.pth hold the encoder alone: the decoder stays as initialised, and the report says so."""
    source, target = mae(), mae()
    before = snapshot(target)
    report = load_into(target, export_state(source, "timm"))
    for name, tensor in target.state_dict().items():
        assert torch.equal(
            tensor, (source.state_dict() if name.startswith("encoder.") else before)[name]
        ), name
    assert {row.name for row in report.rows("new")} == {
        name for name in before if name.startswith("decoder.")
    }
    assert not report.rows("missing") + report.rows("unexpected") + report.rows("not used")


@pytest.mark.parametrize("decoder", [True, False])
def test_load_into_gives_a_classifier_the_encoder_of_an_autoencoder(decoder: bool) -> None:
    """As facebookresearch/mae: with mean pooling the final norm is dropped, fc_norm and head start fresh; none of it is a problem."""
    source = mae()
    state = export_state(source, "timm", decoder=decoder)
    for pool in ("mean", "cls"):
        target = classifier(pool=pool)
        before = snapshot(target)
        report = load_into(target, state)
        fresh = {row.name for row in report.rows("new")}
        assert fresh == {n for n in before if n.startswith(("fc_norm.", "head."))}
        assert all(torch.equal(before[name], target.state_dict()[name]) for name in fresh)
        assert not report.rows("missing") + report.rows("unexpected")
        reasons = {row.how for row in report.rows("not used")}
        want = {"a classifier has no decoder"} if decoder else set()
        assert reasons == want | (
            {"mean pooling has its own fc_norm after the pooling"} if pool == "mean" else set()
        )
        images = torch.randn(2, 1, 64, 64)
        tokens = target.encoder(images)
        torch.testing.assert_close(
            source.encoder.norm(tokens) if pool == "mean" else tokens, source.encoder(images)
        )


def test_part_encoder_keeps_decoder_norm_and_head() -> None:
    for source, target in ((mae(), mae()), (classifier(), classifier())):
        before = snapshot(target)
        report = load_into(target, source.state_dict(), part="encoder")
        for name, tensor in target.state_dict().items():
            assert torch.equal(
                tensor, (source.state_dict() if name.startswith("encoder.") else before)[name]
            ), name
        assert {row.how for row in report.rows("not used") + report.rows("new")} == {
            "part='encoder'"
        }


def test_head_of_other_classes_is_not_used() -> None:
    target = classifier(2)
    before = snapshot(target)
    report = load_into(target, export_state(classifier(1000), "timm"))
    assert torch.equal(target.head.weight, before["head.weight"])
    assert [(row.name, row.how) for row in report.rows("not used")] == [
        ("head.weight", "head of 1000 classes, this model has 2"),
        ("head.bias", "head of 1000 classes, this model has 2"),
    ]
    assert {row.name for row in report.rows("new")} == {"head.weight", "head.bias"}


def test_pretraining_checkpoint_loads_into_a_classifier(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": small().model_dump(),
            "objective": {"prototypes": 8, "head_hidden": 8, "head_bottleneck": 4},
        }
    )
    trained = SSSD(config.model, config.objective)
    torch.save(
        {"task": "pretrain", "model": trained.state_dict(), "config": to_dict(config)},
        tmp_path / "step-1.pt",
    )
    target = classifier()
    report = load_into(target, tmp_path / "step-1.pt")
    assert torch.equal(
        target.encoder.blocks[2].mlp.fc2.weight, trained.mae.encoder.blocks[2].mlp.fc2.weight
    )
    assert {row.how for row in report.rows("not used")} >= {
        "self-distillation of pre-training",
        "a classifier has no decoder",
    }
    assert (
        not report.rows("missing")
        + report.rows("unexpected")
        + [note for note in report.notes if note]
    )


def test_cls_token_may_be_missing_in_source_or_model() -> None:
    bare, with_cls = mae(cls_token=False), mae()
    report = load_into(bare, export_state(with_cls, "timm", decoder=True))
    assert torch.equal(bare.encoder.pos_embed, with_cls.encoder.pos_embed[1:])
    assert torch.equal(bare.decoder.pos_embed, with_cls.decoder.pos_embed[1:])
    assert [(row.name, row.how) for row in report.rows("not used")] == [
        ("encoder.cls_token", "this model has no cls token")
    ]
    fresh = mae()
    cls_token = fresh.encoder.cls_token.clone()
    report = load_into(fresh, export_state(bare, "timm"))
    assert [row.name for row in report.rows("missing")] == ["encoder.cls_token"]
    assert torch.equal(fresh.encoder.cls_token, cls_token)
    assert fresh.encoder.pos_embed[0].abs().max() == 0
    assert torch.equal(fresh.encoder.pos_embed[1:], bare.encoder.pos_embed)
    assert "0 -> 1 prefix rows" in report.table()


def test_layer_scale_and_missing_qkv_bias_are_folded_exactly() -> None:
    source, target = classifier(), classifier()
    state = export_state(source, "timm")
    for i in range(3):
        state[f"blocks.{i}.ls1.gamma"] = torch.randn(24)
        state[f"blocks.{i}.ls2.gamma"] = torch.randn(24)
        del state[f"blocks.{i}.attn.qkv.bias"]
    report = load_into(target, state)
    assert not report.rows("missing") + report.rows("unexpected")
    plain = {n: t for n, t in state.items() if ".ls" not in n} | {
        f"blocks.{i}.attn.qkv.bias": torch.zeros(72) for i in range(3)
    }
    x = torch.randn(1, 5, 24)
    got, want = x, x
    for i, block in enumerate(target.encoder.blocks):
        got = block(got)
        norm = vit_by_hand.layer_norm(want, plain, f"blocks.{i}.norm1", 1e-6)
        want = (
            want
            + state[f"blocks.{i}.ls1.gamma"]
            * vit_by_hand.attention(norm, plain, f"blocks.{i}.attn", 3)[0]
        )
        norm = vit_by_hand.layer_norm(want, plain, f"blocks.{i}.norm2", 1e-6)
        hidden = vit_by_hand.gelu(vit_by_hand.linear(norm, plain, f"blocks.{i}.mlp.fc1"))
        want = want + state[f"blocks.{i}.ls2.gamma"] * vit_by_hand.linear(
            hidden, plain, f"blocks.{i}.mlp.fc2"
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- channels and pixel normalisation ----


@pytest.mark.parametrize("patch", [8, 16])
def test_three_to_one_channel_keeps_the_tokens_of_a_grey_image(patch: int) -> None:
    colour = mae(in_channels=3, patch_size=patch)
    grey = mae(patch_size=patch)
    report = load_into(grey, colour.state_dict())
    image = torch.randint(
        0,
        256,
        (2, 1, 64, 64),
        dtype=torch.uint8,
        # both models: mean 0.5, std 0.25 in every channel
    )
    torch.testing.assert_close(
        grey.encoder(image), colour.encoder(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
    )
    noise = torch.rand(2, grey.config.num_patches)
    want = (
        colour.reconstruct(image.expand(-1, 3, -1, -1), noise)[0]
        .unflatten(-1, (patch, patch, 3))
        .mean(-1)
        .flatten(2)
    )
    torch.testing.assert_close(grey.reconstruct(image, noise)[0], want, rtol=1e-4, atol=1e-4)
    assert "3 -> 1 channel: summed" in report.table()
    assert "3 -> 1 channel: averaged" in report.table()


def test_one_to_three_channels_keeps_the_tokens_of_a_grey_image() -> None:
    grey, colour = mae(), mae(in_channels=3)
    load_into(colour, export_state(grey, "huggingface", decoder=True))
    image = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(
        colour.encoder(image.expand(-1, 3, -1, -1)), grey.encoder(image), rtol=1e-4, atol=1e-4
    )
    noise = torch.rand(2, 16)
    want = grey.reconstruct(image, noise)[0].repeat_interleave(
        3,
        -1,
        # (row, column, channel): each pixel three times
    )
    torch.testing.assert_close(
        colour.reconstruct(image.expand(-1, 3, -1, -1), noise)[0], want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(1, (0.4,), (0.3,)), (3, (0.5,), (0.25,)), (3, (0.1, 0.2, 0.3), (0.4, 0.3, 0.2))],
)
def test_source_norm_makes_the_change_of_pixel_scale_exact(
    channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """The released MAE weights expect ImageNet's mean and std per channel; a CT model uses its own."""
    imagenet = mae(in_channels=3, mean=IMAGENET[0], std=IMAGENET[1])
    target = mae(in_channels=channels, mean=mean, std=std)
    report = load_into(target, export_state(imagenet, "timm"), source_norm=IMAGENET)
    image = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    want = imagenet.encoder(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(
        target.encoder(image.expand(-1, channels, -1, -1)), want, rtol=1e-4, atol=1e-4
    )
    assert f"scaled for mean {mean}, std {std}" in report.table()
    load_into(target, export_state(imagenet, "timm"))
    assert (
        target.encoder(image.expand(-1, channels, -1, -1)) - want
        # what the fold is for
    ).abs().max() > 1e-2


def test_source_norm_from_one_channel_to_three() -> None:
    grey = mae(mean=(0.4,), std=(0.2,))
    colour = mae(in_channels=3, mean=IMAGENET[0], std=IMAGENET[1])
    load_into(colour, export_state(grey, "timm"), source_norm=((0.4,), (0.2,)))
    image = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(
        colour.encoder(image.expand(-1, 3, -1, -1)), grey.encoder(image), rtol=1e-4, atol=1e-4
    )


def test_source_norm_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(
        WeightsError, match="needs \\(mean, std\\) with 1 or 3 values each and std above 0"
    ):
        load_into(
            mae(), export_state(mae(in_channels=3), "timm"), source_norm=((0.5, 0.5), (0.2, 0.2))
        )


def test_load_into_notes_another_pixel_scale(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", mae(mean=(0.3,), norm_eps=1e-5), "timm")
    report = load_into(mae(), tmp_path / "a.safetensors")
    assert len(report.notes) == 2
    assert "scaled with mean, std ((0.3,), (0.25,)), here with ((0.5,), (0.25,))" in report.notes[0]
    assert report.notes[1] == "norm_eps of the source is 1e-05, this model's is 1e-06"


# ---- positions ----


@pytest.mark.parametrize(
    ("source", "target"),
    [((64, 64), (96, 96)), ((96, 96), (64, 64)), ((64, 64), (48, 112)), ((96, 96), (32, 64))],
)
def test_positions_are_interpolated_and_prefix_rows_kept(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    old, new = mae(image_size=source), mae(image_size=target)
    report = load_into(new, export_state(old, "timm", decoder=True))
    rows, columns = new.encoder.grid
    for part in ("encoder", "decoder"):
        table, got = getattr(old, part).pos_embed, getattr(new, part).pos_embed
        image = table[1:].T.reshape(1, -1, *old.encoder.grid)
        want = F.interpolate(
            image, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False
        )
        assert torch.equal(got[0], table[0])
        for r in range(rows):
            for c in range(columns):
                torch.testing.assert_close(got[1 + r * columns + c], want[0, :, r, c])
    assert (
        f"{old.encoder.grid[0]} x {old.encoder.grid[1]} -> {rows} x {columns} patches: bicubic"
        in report.table()
    )


def test_interpolated_positions_stay_in_place() -> None:
    """A table whose value is the row number keeps growing downwards, and is constant along a row: axes are not swapped."""
    old, new = mae(), mae(image_size=(96, 128))
    with torch.no_grad():
        old.encoder.pos_embed[1:] = torch.arange(4.0).repeat_interleave(4)[:, None]
    load_into(new, export_state(old, "timm"))
    image = new.encoder.pos_embed[1:].view(6, 8, 24)
    assert bool((image[1:] > image[:-1]).all())
    torch.testing.assert_close(image, image[:, :1].expand_as(image))


def test_positions_of_a_square_grid_are_not_read_as_a_flat_one() -> None:
    """4 x 4 patches and 2 x 8 patches have tables of the same size."""
    old, new = mae(), mae(image_size=(32, 128))
    report = load_into(new, export_state(old, "timm"))
    assert not torch.equal(old.encoder.pos_embed, new.encoder.pos_embed)
    assert "4 x 4 -> 2 x 8 patches: bicubic" in report.table()
    twin = mae(image_size=(32, 128))
    # our own names: taken as it is
    load_into(twin, new.state_dict())
    assert torch.equal(twin.encoder.pos_embed, new.encoder.pos_embed)


def test_positions_use_the_grid_of_the_files_configuration(tmp_path: Path) -> None:
    old, new = mae(image_size=(32, 128)), mae()
    save_safetensors(tmp_path / "flat.safetensors", old, "timm")
    report = load_into(new, tmp_path / "flat.safetensors")
    assert "2 x 8 -> 4 x 4 patches: bicubic" in report.table()


def test_positions_may_lack_rows_for_prefix_tokens() -> None:
    """timm's no_embed_class, and its register and distillation tokens, whose rows are dropped."""
    old = mae()
    state = export_state(old, "timm")
    state["pos_embed"] = state["pos_embed"][:, 1:]
    new = mae()
    load_into(new, state)
    assert torch.equal(new.encoder.pos_embed[1:], old.encoder.pos_embed[1:])
    assert new.encoder.pos_embed[0].abs().max() == 0
    state = export_state(old, "timm") | {"reg_token": torch.randn(1, 4, 24)}
    state["pos_embed"] = torch.cat(
        [state["pos_embed"][:, :1], torch.randn(1, 4, 24), state["pos_embed"][:, 1:]], 1
    )
    report = load_into(new, state)
    assert torch.equal(new.encoder.pos_embed, old.encoder.pos_embed)
    assert [row.name for row in report.rows("unexpected")] == ["reg_token"]


# ---- refusals ----


def refused(target: MAE | Classifier, state: dict[str, Tensor] | Path, **options: object) -> str:
    """The message, after checking that nothing was loaded."""
    before = snapshot(target)
    with pytest.raises(WeightsError) as error:
        load_into(target, state, **options)
    assert same(before, target.state_dict())
    return str(error.value)


def test_load_into_rejects_another_width_with_both_sizes() -> None:
    message = refused(mae(), export_state(mae(width=48), "timm"))
    assert "does not fit the model; nothing was loaded" in message
    assert "encoder.cls_token is [1, 1, 48], needs [1, 1, 24]" in message
    assert "and 30 more" not in message
    assert re.search(r"and \d+ more", message)
    assert (
        "The source has width 48, patch 16, 1 channels; the model has width 24, patch 16, 1 channels"
        in message
    )
    assert "Set model.* to the source's sizes" in message


@pytest.mark.parametrize("depth", [2, 4, 12])
def test_load_into_rejects_another_depth(depth: int) -> None:
    assert f"the source's encoder has {depth} blocks, the model's 3" in refused(
        mae(), export_state(mae(depth=depth), "timm")
    )


def test_load_into_rejects_a_single_wrong_shape() -> None:
    """A random patch projection under a good encoder would be silent damage."""
    message = refused(
        mae(), mae(patch_size=8, image_size=(32, 32)).state_dict(), part="encoder", min_matched=0.0
    )
    assert (
        "1 tensors have shapes that cannot be converted: encoder.patch_embed.proj.weight is [24, 1, 8, 8]"
        in message
    )


def test_load_into_with_another_decoder_names_part_encoder() -> None:
    source = mae(decoder_width=32)
    message = refused(mae(), source.state_dict())
    assert "decoder.embed.weight is [32, 24], needs [16, 24]" in message
    assert "decoder width 32; the model has" in message
    assert "part='encoder' leaves the decoder at its initial values" in message
    target = mae()
    load_into(target, source.state_dict(), part="encoder")
    assert torch.equal(target.encoder.norm.weight, source.encoder.norm.weight)
    assert "the source's decoder has 4 blocks, the model's 2" in refused(
        mae(), mae(decoder_depth=4).state_dict()
    )
    partial = {
        name: tensor for name, tensor in mae().state_dict().items() if name != "decoder.pred.bias"
    }
    assert "1 decoder tensors are missing: decoder.pred.bias" in refused(mae(), partial)


def test_load_into_lists_missing_tensors() -> None:
    state = {name: t for name, t in mae().state_dict().items() if ".attn." not in name}
    message = refused(mae(), state)
    assert (
        "30 of the model's 42 encoder tensors fit, needs 90%; missing: encoder.blocks.0.attn.qkv.weight"
        in message
    )
    report = load_into(
        mae(), {n: t for n, t in state.items() if not n.startswith("decoder.")}, min_matched=0.7
    )
    assert len(report.rows("missing")) == 12


def test_load_into_rejects_a_source_with_many_more_tensors() -> None:
    """Gated MLPs, query and key norms: a model of another kind that shares names."""
    state = export_state(mae(), "timm")
    state |= {
        f"blocks.{i}.attn.{x}_norm.{kind}": torch.ones(8)
        for i in range(3)
        for x in "qk"
        for kind in ("weight", "bias")
    }
    message = refused(mae(), state)
    assert "12 tensors of the source are not in the model: blocks.0.attn.q_norm.weight" in message


def test_load_into_rejects_unknown_names() -> None:
    message = refused(mae(), {f"layer{i}.0.conv1.weight": torch.ones(3) for i in range(9)})
    assert message.startswith("the state dict: not the weights of a ViT under known names")
    assert "the first are layer0.0.conv1.weight, layer1.0.conv1.weight" in message


# ---- files ----


def test_read_weights_unwraps_states_and_namespaces(tmp_path: Path) -> None:
    """What facebookresearch/mae, DeepSpeed and PyTorch Lightning write; the arguments of a run are plain data."""
    state = export_state(mae(), "timm")
    for i, content in enumerate(
        (
            state,
            {"model": state},
            {
                "model": state,
                "args": argparse.Namespace(lr=1e-3, output_dir="x"),
                "epoch": 3,
                "optimizer": {"state": {}},
            },
            {"state_dict": {f"module.{n}": t for n, t in state.items()}},
            {"module": {"model": state}},
        )
    ):
        torch.save(content, tmp_path / f"{i}.pth")
        assert same(read_weights(tmp_path / f"{i}.pth"), state)


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    source, target = mae(), mae()
    save_file(
        {n: t.bfloat16() for n, t in export_state(source, "timm").items()},
        tmp_path / "half.safetensors",
    )
    report = load_into(target, tmp_path / "half.safetensors")
    assert torch.equal(target.encoder.norm.weight, source.encoder.norm.weight.bfloat16().float())
    assert {row.how for row in report.rows("converted")} == {"from bfloat16"}


def test_read_weights_reads_all_shards_or_none(tmp_path: Path) -> None:
    state = export_state(mae(), "huggingface")
    names = sorted(state)
    shards = {
        "model-00001-of-00002.safetensors": names[:20],
        "model-00002-of-00002.safetensors": names[20:],
    }
    for shard, members in shards.items():
        save_file({name: state[name] for name in members}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(read_weights(tmp_path), state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        WeightsError,
        match=r"names the shard 'model-00002-of-00002.safetensors', which is missing; copy all 2",
    ):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../outside.safetensors"}})
    )
    with pytest.raises(WeightsError, match="is outside its folder: refused"):
        read_weights(tmp_path)


class _Evil:
    def __init__(self, function: Callable[..., object], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "ckpt"])
def test_read_weights_never_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    state = export_state(mae(), "timm")
    path = tmp_path / f"weights.{ending}"
    torch.save(
        {"model": state, "x": _Evil(os.mkdir, "evil")}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        WeightsError, match=r"call (posix|nt).mkdir when read, which no weights need: refused"
    ):
        read_weights(path)
    torch.save(
        {"model": state, "x": _Evil(exec, "open('evil', 'w')")},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert "hold exec, which cannot be read without running code from the file: refused" in str(
        error.value
    )
    assert "convert it once (this does run that code)" in str(error.value)
    assert "weights_only=False" in str(error.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 5])
def test_read_weights_rejects_a_bare_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(
        pickle.dumps({"model": _Evil(os.mkdir, "evil")}, protocol=protocol)
    )
    with pytest.raises(WeightsError) as error:
        read_weights(tmp_path / "a.pt")
    assert "a.pt" in str(error.value)
    assert "weights_only" not in str(
        error.value
        # torch's own message advises to switch the protection off
    )
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_read_weights_reports_truncated_files(tmp_path: Path, kind: str) -> None:
    whole = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pth")
    if kind == "safetensors":
        save_safetensors(whole, mae(), "timm")
    else:
        torch.save(
            {"model": export_state(mae(), "timm")},
            whole,
            _use_new_zipfile_serialization=kind == "zip",
        )
    content = whole.read_bytes()
    cut = tmp_path / f"cut{whole.suffix}"
    for length in (0, 1, 7, 8, 100, 1000, len(content) // 2, len(content) - 100, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(
            WeightsError,
            match=r"cut\.\w+ is damaged or not what its name says: .*Copy or download it again",
        ):
            read_weights(cut)


def test_read_weights_names_the_tensor_with_nan(tmp_path: Path) -> None:
    state = export_state(mae(), "timm")
    state["blocks.1.mlp.fc1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(
        WeightsError, match=r"NaN or infinity in blocks.1.mlp.fc1.bias; use an earlier checkpoint"
    ):
        read_weights(tmp_path / "nan.pth")


def test_read_weights_rejects_other_paths_and_contents(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do not exist"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(
        WeightsError, match=r"end in '.npz'; needs a .pth, .pt, .bin, .ckpt or .safetensors file"
    ):
        read_weights(tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=r"holds no model.safetensors"):
        read_weights(tmp_path)
    torch.save({"epoch": 3, "scores": [1.0]}, tmp_path / "log.pt")
    with pytest.raises(WeightsError, match="hold no tensors but epoch, scores; needs a state dict"):
        read_weights(tmp_path / "log.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="hold a list, needs a state dict"):
        read_weights(tmp_path / "list.pt")


def test_table_groups_blocks_and_lists_conversions() -> None:
    state = export_state(classifier(1000, in_channels=3), "timm") | {"odd.weight": torch.ones(1)}
    del state["blocks.1.norm2.bias"]
    lines = load_into(classifier(), state).table().splitlines()
    assert lines[0].startswith(
        "41 tensors loaded from the state dict (timm), 1 of them converted; 1 missing, "
        "2 new by design, 1 unexpected, 2 not used"
    )
    assert "matched    encoder.blocks.0-2.attn.qkv.weight <- blocks.*.attn.qkv.weight" in lines
    assert "matched    encoder.blocks.0,2.norm2.bias <- blocks.*.norm2.bias" in lines
    assert (
        "converted  encoder.patch_embed.proj.weight <- patch_embed.proj.weight [3 -> 1 channel: summed]"
        in lines
    )
    assert (
        "missing    encoder.blocks.1.norm2.bias [not in the source: keeps its initial value]"
        in lines
    )
    assert "new        head.weight [not in the source: keeps its initial value]" in lines
    assert "unexpected odd.weight" in lines
    assert "not used   head.weight [head of 1000 classes, this model has 2]" in lines
    lines = (
        load_into(classifier(), export_state(mae(), "huggingface", decoder=True))
        .table()
        .splitlines()
    )
    assert "not used   decoder.* (32 tensors) [a classifier has no decoder]" in lines
    # and the two of the final norm
    assert sum(line.startswith("not used") for line in lines) == 3


def test_export_state_shares_no_memory_with_the_model() -> None:
    model = classifier(pool="cls")
    for format_ in ("timm", "huggingface"):
        state = export_state(model, format_)
        before = snapshot(model)
        for tensor in state.values():
            assert tensor.is_contiguous()
            tensor.zero_()
        assert same(before, model.state_dict())


def test_save_safetensors_holds_the_exported_state(tmp_path: Path) -> None:
    model = mae()
    save_safetensors(tmp_path / "a.safetensors", model, "huggingface", decoder=True)
    assert same(
        load_file(tmp_path / "a.safetensors"), export_state(model, "huggingface", decoder=True)
    )


def test_read_weights_accepts_a_run_folder_and_its_best(tmp_path: Path) -> None:
    """--init runs/ct and --init runs/ct/pretrain/checkpoints/best."""
    manager = CheckpointManager(tmp_path / "ct" / "pretrain" / "checkpoints")
    first, second = mae(), mae()
    manager.save({"model": first.state_dict()}, 1, best=True)
    manager.save({"model": second.state_dict()}, 2)
    assert same(read_weights(tmp_path / "ct"), second.state_dict())
    assert same(read_weights(tmp_path / "ct" / "pretrain"), second.state_dict())
    assert same(read_weights(manager.folder / "best"), first.state_dict())
