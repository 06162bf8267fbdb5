"""The MAE against transformers' ViTMAEForPreTraining with the same weights and noise, in float64:
masking, predictions, loss and the gradient of every parameter, through the weight conversion.
Detects a wrong pixel order, patch order, position layout, target normalisation or q/k/v order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mae_kernels import masked_reconstruction_loss
from sssd_fast.config import ModelConfig
from sssd_fast.errors import WeightsError
from sssd_fast.model import MAE, Classifier, sincos_positions
from sssd_fast.weights.export import save_huggingface
from sssd_fast.weights.formats import export_state, huggingface_config, to_own_names
from sssd_fast.weights.load import load_into

SIZES = {"width": 48, "depth": 3, "heads": 4, "mlp_ratio": 2.0}
SIZES |= {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
GREY = ModelConfig(image_size=64, patch_size=16, **SIZES)
COLOUR = ModelConfig(image_size=48, patch_size=8, in_channels=3, mask_ratio=0.6, **SIZES)
RAW = {"image_size": 56, "patch_size": 14, "in_channels": 3, "mask_ratio": 0.5, "norm_eps": 1e-12}
# name: (configuration, whether targets are normalised)
CASES = {
    "grey_norm_pix": (GREY, True),
    "colour_norm_pix": (COLOUR, True),
    "colour_raw_pixels": (ModelConfig(**RAW, **SIZES), False),
}


def hf_config(config: ModelConfig, norm: bool = True) -> transformers.ViTMAEConfig:
    return transformers.ViTMAEConfig(
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        num_channels=config.in_channels,
        norm_pix_loss=norm,
        mask_ratio=config.mask_ratio,
        layer_norm_eps=config.norm_eps,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        # "eager" takes the softmax in float32 whatever the model's dtype
        attn_implementation="sdpa",
    )


def randomized(model: Any) -> Any:
    """No bias, norm or token is 0 or 1, so that a dropped or swapped one changes the result.
    Position tables stay."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model.eval()


def with_positions(model: transformers.ViTMAEForPreTraining) -> transformers.ViTMAEForPreTraining:
    """transformers 5.23 leaves the position tables of a new model at zero; its initialisation
    function fills them."""
    embeddings, decoder = model.vit.embeddings, model.decoder
    for marked in (embeddings.patch_embeddings.projection, *model.parameters()):
        marked._is_hf_initialized = False
    embeddings.initialize_weights()
    decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    assert embeddings.position_embeddings.abs().max() == decoder.decoder_pos_embed.abs().max() == 1
    return model


def hf_pretraining(config: ModelConfig, norm: bool = True) -> transformers.ViTMAEForPreTraining:
    return randomized(
        with_positions(transformers.ViTMAEForPreTraining(hf_config(config, norm)).double())
    )


def loaded(name: str, folder: Path | None, **options: Any) -> nn.Module:
    """The model of transformers, which finds all its weights and no others."""
    load = getattr(transformers, name).from_pretrained
    model, info = load(folder, output_loading_info=True, **options)
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    return model.eval()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_mae_equals_vitmae_with_the_same_weights_and_noise(name: str) -> None:
    config, norm = CASES[name]
    theirs = hf_pretraining(config, norm)
    ours = MAE(config).double()
    report = load_into(ours, theirs.state_dict())
    assert not report.rows("missing", "unexpected", "new")

    images = torch.randn(3, config.in_channels, *config.image_size, dtype=torch.float64)
    noise = torch.rand(3, config.num_patches, dtype=torch.float64)
    expected = theirs(images, noise=noise)
    got = ours(images, noise)
    masking, options = got.masking, {"norm": "patch" if norm else None}
    options |= {"ids": masking.ids_masked, "patch_size": config.patch_size}
    loss = masked_reconstruction_loss(got.pred_BMV, images, **options)

    assert torch.equal(masking.ids_restore, expected.ids_restore)
    assert torch.equal(masking.mask, expected.mask.bool())
    exact = {"rtol": 1e-10, "atol": 1e-10}
    ids = masking.ids_masked.unsqueeze(-1).expand(-1, -1, expected.logits.shape[-1])
    torch.testing.assert_close(got.pred_BMV, expected.logits.gather(1, ids), **exact)
    every = ours.reconstruct(images, noise)[0]
    torch.testing.assert_close(every, expected.logits.detach(), **exact)
    # the op's result is float32, which the gradients pass
    torch.testing.assert_close(loss.double(), expected.loss, rtol=2e-6, atol=0)

    loss.backward()
    expected.loss.backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    _, gradients = to_own_names(wanted)
    trained = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    for parameter, gradient in trained.items():
        want = gradients[parameter].tensor
        largest = want.abs().max().item()
        assert largest > 0, parameter
        tolerance = {"rtol": 2e-6, "atol": 2e-6 * largest}
        torch.testing.assert_close(gradient, want, **tolerance, msg=parameter)


@pytest.mark.parametrize("grid", [4, 7, 14])
def test_position_tables_equal_those_of_transformers(grid: int) -> None:
    config = GREY.model_copy(update={"image_size": (16 * grid, 16 * grid)})
    model = with_positions(transformers.ViTMAEForPreTraining(hf_config(config)))
    encoder, decoder = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    for width, table in ((48, encoder), (32, decoder)):
        got = sincos_positions(width, (grid, grid), 1)
        torch.testing.assert_close(got, table[0].detach(), rtol=0, atol=1e-7)


def test_load_reads_encoder_and_decoder_of_save_pretrained(tmp_path: Path) -> None:
    """The names in files differ from those in memory, and transformers 5.x has renamed both."""
    theirs = hf_pretraining(COLOUR).float()
    theirs.save_pretrained(tmp_path)
    ours = MAE(COLOUR)
    report = load_into(ours, tmp_path)
    assert not report.rows("missing", "unexpected", "new", "not used")
    images, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    close(ours.reconstruct(images, noise)[0], theirs(images, noise=noise).logits)
    # weights have the same shapes for any number of heads; only config.json has the number
    model = MAE(ModelConfig(**COLOUR.model_dump() | {"heads": 8}))
    with pytest.raises(WeightsError, match=r"with heads 4, the model has 8; set model\.heads=4"):
        load_into(model, tmp_path)


@torch.no_grad()
def test_exported_encoder_gives_the_same_tokens_in_vit_model(tmp_path: Path) -> None:
    ours = randomized(MAE(COLOUR))
    save_huggingface(tmp_path, ours)
    theirs = loaded("ViTModel", tmp_path, add_pooling_layer=False)
    images = torch.randn(2, 3, 48, 48)
    close(ours.encoder(images), theirs(images).last_hidden_state)


@torch.no_grad()
def test_exported_classifier_round_trips_through_vit_for_image_classification(
    tmp_path: Path,
) -> None:
    ours = randomized(Classifier(GREY, 3, pool="cls"))
    save_huggingface(tmp_path, ours)
    theirs = loaded("ViTForImageClassification", tmp_path)
    images = torch.randn(2, 1, 64, 64)
    close(ours(images), theirs(images).logits)
    back = Classifier(GREY, 3, pool="cls").eval()
    theirs.save_pretrained(tmp_path / "again")
    assert not load_into(back, tmp_path / "again").rows("missing")
    assert torch.equal(back(images), ours(images))


@torch.no_grad()
def test_exported_autoencoder_loads_in_vitmae() -> None:
    """With the decoder, which the released facebookresearch weights do not have."""
    ours = randomized(MAE(COLOUR))
    tree = huggingface_config(ours, decoder=True)
    del tree["architectures"], tree["model_type"]
    options = {"config": transformers.ViTMAEConfig(**tree)}
    options["state_dict"] = export_state(ours, "huggingface", decoder=True)
    theirs = loaded("ViTMAEForPreTraining", None, **options)
    images, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    close(ours.reconstruct(images, noise)[0], theirs(images, noise=noise).logits)
