"""The model against a vision transformer written by hand, for every supported geometry. Masking,
attention maps, drop path, and equal results of uint8 and float images.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import sssd_fast.model
from sssd_fast.config import ModelConfig
from sssd_fast.model import MAE, Block, Classifier, sincos_positions
from sssd_fast.weights.formats import export_state
from tests.sssd_fast import vit_by_hand

KEYS = ("image_size", "patch_size", "in_channels", "cls_token", "mlp_ratio")
GEOMETRIES = {
    "square grey patch 16": dict(zip(KEYS, ((64, 64), 16, 1), strict=False)),
    "wide colour patch 8": dict(zip(KEYS, ((24, 40), 8, 3), strict=False)),
    "tall grey patch 14 without cls": dict(zip(KEYS, ((70, 42), 14, 1, False), strict=False)),
    "wide colour patch 16 without cls": dict(zip(KEYS, ((32, 80), 16, 3, False), strict=False)),
    "tall grey patch 8, odd mlp": dict(zip(KEYS, ((40, 16), 8, 1, True, 1.5), strict=False)),
}


def small(**overrides: object) -> ModelConfig:
    encoder = {"width": 24, "depth": 3, "heads": 3, "norm_eps": 1e-5}
    decoder = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
    return ModelConfig(**encoder | decoder | overrides)


def randomize(model: torch.nn.Module) -> None:
    """No parameter is 0 or 1, so that a dropped or swapped one changes the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def images_for(config: ModelConfig, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, config.in_channels, *config.image_size, dtype=dtype)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_classifier_with_exported_weights_equals_the_reference(name: str, pool: str) -> None:
    config = small(**GEOMETRIES[name])
    if pool == "cls" and not config.cls_token:
        with pytest.raises(
            ValueError, match="pool is 'cls', needs 'mean', or 'cls' if the model has a cls token"
        ):
            Classifier(config, 5, pool)
        return
    model = Classifier(config, 5, pool).double().eval()
    randomize(model)
    images, weights = images_for(config), export_state(model, "timm")
    want = vit_by_hand.classify(images, weights, config.encoder_shape[2], config.norm_eps)
    torch.testing.assert_close(model(images), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_autoencoder_equals_the_reference(name: str) -> None:
    """Masked encoder, restored sequence, decoder and prediction."""
    config = small(**GEOMETRIES[name], mask_ratio=0.6)
    model = MAE(config).double().eval()
    randomize(model)
    images = images_for(config)
    noise = torch.rand(2, config.num_patches, dtype=torch.float64)
    weights = export_state(model, "timm", decoder=True)
    decoder = {n[8:]: t for n, t in weights.items() if n.startswith("decoder_")}
    encoder = {n: t for n, t in weights.items() if not n.startswith("decoder_")}
    order = torch.from_numpy(np.argsort(noise.numpy(), axis=1, kind="stable"))
    keep = order[:, : config.num_visible]

    x, _ = vit_by_hand.encode(images, encoder, config.encoder_shape[2], config.norm_eps, keep)
    x = vit_by_hand.layer_norm(x, encoder, "norm", config.norm_eps)
    visible = vit_by_hand.linear(x, decoder, "embed")
    prefix = int(config.cls_token)
    full = weights["mask_token"].reshape(1, 1, -1).repeat(2, prefix + config.num_patches, 1)
    for b in range(2):
        full[b, :prefix] = visible[b, :prefix]
        for k, patch in enumerate(keep[b].tolist()):
            full[b, prefix + patch] = visible[b, prefix + k]
    full = full + decoder["pos_embed"]
    for i in range(config.decoder_depth):
        sizes = config.decoder_heads, config.norm_eps
        full, _ = vit_by_hand.block(full, decoder, f"blocks.{i}", *sizes)
    teacher = vit_by_hand.layer_norm(full, decoder, "norm", config.norm_eps)[:, prefix:]
    want = vit_by_hand.linear(teacher, decoder, "pred")

    pred, masking = model.reconstruct(images, noise)
    out = model(images, noise)
    torch.testing.assert_close(pred, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(masking.ids_keep, keep)
    for b in range(2):
        masked = masking.ids_masked[b]
        assert sorted([*masked.tolist(), *keep[b].tolist()]) == list(range(config.num_patches))
        torch.testing.assert_close(out.pred_BMV[b], want[b, masked], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.teacher_BKE[b], teacher[b, keep[b]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.student_BKD, x[:, prefix:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_attention_maps_are_the_probabilities_of_the_last_block(
    name: str, cls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sssd_fast.model, "QUERIES_AT_ONCE", 3)
    config = small(**GEOMETRIES[name])
    model = MAE(config).double().eval()
    randomize(model)
    images = images_for(config)
    maps = model.encoder.attention_maps(images, cls=cls)
    weights = export_state(model, "timm")
    _, want = vit_by_hand.encode(images, weights, config.encoder_shape[2], config.norm_eps)
    p = model.encoder.num_prefix
    want = want[:, :, 0, p:] if cls and p else want[:, :, p:, p:].mean(2)
    # computed in float32 by design
    torch.testing.assert_close(maps.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls_token", [True, False])
def test_predictions_depend_on_visible_patches_only(cls_token: bool) -> None:
    """Predictions are bit-equal for any content of masked patches; visible ones change all."""
    config = small(image_size=(64, 48), cls_token=cls_token)
    model = MAE(config).eval()
    randomize(model)
    images = torch.randint(0, 256, (3, 1, 64, 48), dtype=torch.uint8)
    noise = torch.rand(3, config.num_patches)
    before, masking = model.reconstruct(images, noise)
    assert masking.mask.sum(1).tolist() == [config.num_patches - config.num_visible] * 3
    hidden = masking.mask.view(3, 1, *config.grid).repeat_interleave(16, 2).repeat_interleave(16, 3)
    noise_image = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    after, _ = model.reconstruct(torch.where(hidden, noise_image, images), noise)
    assert torch.equal(before, after)
    assert torch.equal(
        model(images, noise).pred_BMV,
        model(torch.where(hidden, noise_image, images), noise).pred_BMV,
    )
    shown, _ = model.reconstruct(torch.where(hidden, images, noise_image), noise)
    assert bool((shown != before).any(-1).all())


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(1, (0.4,), (0.2,)), (3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (3, (0.5,), (0.25,))],
)
def test_uint8_images_give_the_output_of_normalised_floats(
    channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    config = small(image_size=(32, 48), in_channels=channels, mean=mean, std=std)
    model = MAE(config)
    randomize(model)
    images = torch.randint(0, 256, (2, channels, 32, 48), dtype=torch.uint8)
    m, s = (torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std))
    scaled = (images / 255.0 - m) / s
    noise = torch.rand(2, config.num_patches)
    close = {"rtol": 1e-4, "atol": 1e-5}
    got, want = model(images, noise).pred_BMV, model(scaled, noise).pred_BMV
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(model.encoder(images), model.encoder(scaled), **close)


@pytest.mark.parametrize(
    ("width", "grid"), [(24, (3, 5)), (16, (7, 2)), (192, (14, 14)), (32, (1, 6))]
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_positions_equal_a_table_computed_by_loops(
    width: int, grid: tuple[int, int], prefix: int
) -> None:
    want = vit_by_hand.sincos_table(width, *grid)
    got = sincos_positions(width, grid, prefix)
    assert got[:prefix].abs().sum() == 0
    np.testing.assert_allclose(got[prefix:].numpy(), want, rtol=0, atol=1e-7)
    # every place has its own code
    assert len(np.unique(want.round(6), axis=0)) == grid[0] * grid[1]


def test_positions_are_fixed_in_pre_training_and_trained_in_fine_tuning() -> None:
    config = small(image_size=(32, 32))
    mae = MAE(config)
    assert not mae.encoder.pos_embed.requires_grad
    assert not mae.decoder.pos_embed.requires_grad
    assert Classifier(config, 2).encoder.pos_embed.requires_grad


def test_drop_path_is_the_identity_in_evaluation_and_keeps_the_expectation_in_training() -> None:
    block = Block(16, 2, 2.0, 1e-6, drop_path=0.3)
    plain = Block(16, 2, 2.0, 1e-6)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(1, 4, 16)
    assert torch.equal(block.eval()(x), plain(x))
    branch = torch.randn(20_000, 1, 1).expand(-1, 3, 2)
    dropped = block.train()._branch(branch)
    kept = dropped[:, 0, 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)  # 6 standard deviations
    # so that the mean over draws is the branch
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.7)
    assert bool((dropped == 0).flatten(1).all(1).eq(~kept).all())  # a whole image at a time


def test_patch_drop_reads_random_patches_in_training_and_all_in_evaluation() -> None:
    model = Classifier(small(image_size=(32, 32), patch_size=8), 2, patch_drop=0.6)
    randomize(model)
    used = torch.zeros(16)
    for _ in range(40):
        images = torch.randn(3, 1, 32, 32, requires_grad=True)
        model.train()(images).sum().backward()
        assert images.grad is not None
        read_BL = images.grad.abs().unfold(2, 8, 8).unfold(3, 8, 8).sum((1, 4, 5)).flatten(1) > 0
        assert read_BL.sum(1).tolist() == [7, 7, 7]  # 16 - int(16 * 0.6)
        used += read_BL.sum(0)
    assert used.min() >= 27  # expected 52.5 of 120, standard deviation 5.4
    images = torch.randn(3, 1, 32, 32)
    whole = Classifier(small(image_size=(32, 32), patch_size=8), 2)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), whole.eval()(images))


def test_drop_path_grows_linearly_with_depth() -> None:
    model = Classifier(small(image_size=(32, 32), depth=5), 2, drop_path=0.2)
    rates = [block.drop_path for block in model.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    model.train()
    images = torch.randn(2, 1, 32, 32)
    assert not torch.equal(model.features(images), model.features(images))
    model.eval()
    assert torch.equal(model.features(images), model.features(images))


def test_initial_values_follow_the_published_recipes() -> None:
    """Xavier-uniform linear layers and patch projection, zero biases, tokens of deviation 0.02,
    a head near zero.
    """
    model = MAE(
        ModelConfig(name="tiny", depth=1, decoder_depth=1, decoder_width=192, decoder_heads=3)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif parameter.requires_grad and parameter.ndim >= 2 and "token" not in name:
            fan_out, fan_in = parameter.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.99 * bound < parameter.abs().max().item() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name
        elif "token" in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
    classifier = Classifier(ModelConfig(name="tiny", depth=1), 2)
    assert classifier(torch.randn(2, 1, 224, 224)).abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 48), (2, 1, 48, 32)])
def test_images_of_another_shape_raise_an_error_with_the_needed_one(shape: tuple[int, ...]) -> None:
    model = MAE(small(image_size=(32, 32)))
    with pytest.raises(
        ValueError,
        match=r"needs \[B, 1, 32, 32\]; resize them or set model.image_size and model.in_channels",
    ):
        model.encoder(torch.randn(shape))


def test_state_dict_names_do_not_change() -> None:
    names = set(MAE(small(image_size=(32, 32), depth=1, decoder_depth=1)).state_dict())
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    ends = ["encoder.patch_embed.proj", "encoder.norm"]
    ends += ["decoder.embed", "decoder.norm", "decoder.pred"]
    ends += [f"{part}.blocks.0.{layer}" for part in ("encoder", "decoder") for layer in layers]
    single = {"encoder.cls_token", "encoder.pos_embed", "decoder.mask_token", "decoder.pos_embed"}
    assert names == single | {f"{layer}.{kind}" for layer in ends for kind in ("weight", "bias")}
