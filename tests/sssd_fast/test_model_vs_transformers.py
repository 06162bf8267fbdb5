"""The MAE against transformers' ViTMAEForPreTraining with the same weights and noise, in float64:
masking, predictions, loss and the gradient of every parameter, through the weight conversion.
Detects a wrong pixel order, patch order, position layout, target normalisation or q/k/v order.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mae_kernels import masked_reconstruction_loss
from sssd_fast.config import ModelConfig
from sssd_fast.model import MAE, Classifier, sincos_positions
from sssd_fast.weights.files import save_huggingface
from sssd_fast.weights.formats import to_own_names
from sssd_fast.weights.load import load_into

SIZES = ("image", "patch", "channels", "norm", "eps", "ratio")
CASES = {
    "grey_norm_pix": dict(zip(SIZES, (64, 16, 1, True, 1e-6, 0.75), strict=True)),
    "colour_norm_pix": dict(zip(SIZES, (48, 8, 3, True, 1e-6, 0.6), strict=True)),
    "colour_raw_pixels": dict(zip(SIZES, (56, 14, 3, False, 1e-12, 0.5), strict=True)),
}


def hf_config(case: dict, **overrides: object) -> transformers.ViTMAEConfig:
    sizes = {
        "image_size": case["image"],
        "patch_size": case["patch"],
        "num_channels": case["channels"],
        "norm_pix_loss": case["norm"],
        "mask_ratio": case["ratio"],
        "layer_norm_eps": case["eps"],
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # "eager" takes the softmax in float32 whatever the model's dtype
        "attn_implementation": "sdpa",
    }
    return transformers.ViTMAEConfig(**sizes | overrides)


def our_config(case: dict, **overrides: object) -> ModelConfig:
    sizes = {
        "image_size": (case["image"], case["image"]),
        "patch_size": case["patch"],
        "in_channels": case["channels"],
        "mask_ratio": case["ratio"],
        "norm_eps": case["eps"],
        "width": 48,
        "depth": 3,
        "heads": 4,
        "mlp_ratio": 2.0,
        "decoder_width": 32,
        "decoder_depth": 2,
        "decoder_heads": 2,
    }
    return ModelConfig(**sizes | overrides)


def randomize(model: torch.nn.Module) -> None:
    """No bias, norm or token is 0 or 1, so that a dropped or swapped one changes the result.
    Position tables stay.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                )


def with_positions(model: transformers.ViTMAEForPreTraining) -> transformers.ViTMAEForPreTraining:
    """transformers 5.23 leaves the position tables of a new model at zero; its initialisation
    function fills them.
    """
    embeddings = model.vit.embeddings
    for marked in (embeddings.patch_embeddings.projection, *model.parameters()):
        marked._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    assert (
        embeddings.position_embeddings.abs().max()
        == model.decoder.decoder_pos_embed.abs().max()
        == 1
    )
    return model


def hf_pretraining(case: dict) -> transformers.ViTMAEForPreTraining:
    model = with_positions(transformers.ViTMAEForPreTraining(hf_config(case)).double())
    randomize(model)
    return model


def loaded(name: str, folder: Path, **options: object) -> torch.nn.Module:
    """The model of transformers, which finds all its weights and no others in the folder."""
    load = getattr(transformers, name).from_pretrained
    model, info = load(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_mae_equals_vitmae_with_the_same_weights_and_noise(name: str) -> None:
    case = CASES[name]
    theirs = hf_pretraining(case)
    ours = MAE(our_config(case)).double()
    report = load_into(ours, theirs.state_dict())
    assert not report.rows("missing")
    assert not report.rows("unexpected")
    assert not report.rows("new")

    images = torch.randn(3, case["channels"], case["image"], case["image"], dtype=torch.float64)
    noise = torch.rand(3, ours.config.num_patches, dtype=torch.float64)
    expected = theirs(images, noise=noise)
    got = ours(images, noise)
    loss = masked_reconstruction_loss(
        got.pred_BMV,
        images,
        ids=got.masking.ids_masked,
        patch_size=case["patch"],
        norm="patch" if case["norm"] else None,
    )

    assert torch.equal(got.masking.ids_restore, expected.ids_restore)
    assert torch.equal(got.masking.mask, expected.mask.bool())
    ids = got.masking.ids_masked.unsqueeze(-1).expand(-1, -1, expected.logits.shape[-1])
    torch.testing.assert_close(got.pred_BMV, expected.logits.gather(1, ids), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        ours.reconstruct(images, noise)[0], expected.logits.detach(), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        loss.double(), expected.loss, rtol=2e-6, atol=0
    )  # the op's result is float32

    loss.backward()
    expected.loss.backward()
    _, gradients = to_own_names(
        {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    )
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == gradients.keys()
    for parameter_name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            want = gradients[parameter_name].tensor
            assert want.abs().max() > 0, parameter_name
            # the gradient passes the float32 loss
            tolerance = 2e-6 * want.abs().max().item()
            torch.testing.assert_close(
                parameter.grad, want, rtol=2e-6, atol=tolerance, msg=parameter_name
            )


@pytest.mark.parametrize("grid", [4, 7, 14])
def test_position_tables_equal_those_of_transformers(grid: int) -> None:
    model = with_positions(
        transformers.ViTMAEForPreTraining(hf_config(CASES["grey_norm_pix"], image_size=16 * grid))
    )
    encoder = model.vit.embeddings.position_embeddings[0]
    decoder = model.decoder.decoder_pos_embed[0]
    torch.testing.assert_close(
        sincos_positions(48, (grid, grid), 1), encoder.detach(), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        sincos_positions(32, (grid, grid), 1), decoder.detach(), rtol=0, atol=1e-7
    )


def test_load_reads_encoder_and_decoder_of_save_pretrained(tmp_path: Path) -> None:
    """The names in files differ from those in memory, and transformers 5.x has renamed both."""
    case = CASES["colour_norm_pix"]
    theirs = hf_pretraining(case).float()
    theirs.save_pretrained(tmp_path)
    ours = MAE(our_config(case))
    report = load_into(ours, tmp_path)
    assert (
        not report.rows("missing")
        + report.rows("unexpected")
        + report.rows("new")
        + report.rows("not used")
    )
    images, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    torch.testing.assert_close(
        ours.reconstruct(images, noise)[0], theirs(images, noise=noise).logits, rtol=1e-4, atol=1e-5
    )


def test_load_rejects_a_folder_with_other_heads(tmp_path: Path) -> None:
    """Weights have the same shapes for any number of heads; only config.json has the number."""
    case = CASES["colour_norm_pix"]
    hf_pretraining(case).save_pretrained(tmp_path)
    model = MAE(our_config(case, heads=8))
    with pytest.raises(Exception, match=r"made with heads 4, the model has 8; set model.heads=4"):
        load_into(model, tmp_path)


def test_exported_encoder_gives_the_same_tokens_in_vit_model(tmp_path: Path) -> None:
    case = CASES["colour_norm_pix"]
    ours: MAE = MAE(our_config(case))
    randomize(ours)
    save_huggingface(tmp_path, ours)
    theirs = loaded("ViTModel", tmp_path, add_pooling_layer=False)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        got, want = ours.encoder(images), theirs(images).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_exported_classifier_round_trips_through_vit_for_image_classification(
    tmp_path: Path,
) -> None:
    case = CASES["grey_norm_pix"]
    config = our_config(case)
    ours = Classifier(config, 3, pool="cls").eval()
    randomize(ours)
    save_huggingface(tmp_path, ours)
    theirs = loaded("ViTForImageClassification", tmp_path)
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-5)
    back = Classifier(config, 3, pool="cls").eval()
    theirs.save_pretrained(tmp_path / "again")
    assert not load_into(back, tmp_path / "again").rows("missing")
    with torch.no_grad():
        assert torch.equal(back(images), ours(images))


def test_exported_mean_classifier_gives_the_same_features_in_vit_model(tmp_path: Path) -> None:
    """ViTForImageClassification cannot pool the mean: the encoder is exported, fc_norm as its
    norm.
    """
    config = our_config(CASES["colour_norm_pix"])
    ours = Classifier(config, 3, pool="mean").eval()
    randomize(ours)
    save_huggingface(tmp_path, ours)
    theirs = loaded("ViTModel", tmp_path, add_pooling_layer=False)
    images = torch.randn(2, config.in_channels, *config.image_size)
    with torch.no_grad():
        hidden = theirs(images, output_hidden_states=True).hidden_states[-1]
        features = theirs.layernorm(hidden[:, 1:].mean(1))
        torch.testing.assert_close(ours.features(images), features, rtol=1e-4, atol=1e-5)
    # pixels as the model scales them: uint8 -> resize -> (x / 255 - mean) / std
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.size["width"]) == config.image_size
    pixels = torch.randint(0, 256, (config.in_channels, *config.image_size), dtype=torch.uint8)
    got = torch.as_tensor(processor(pixels, return_tensors="pt")["pixel_values"])[0]
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (ours.encoder.mean, ours.encoder.std))
    torch.testing.assert_close(got, (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_exported_autoencoder_loads_in_vitmae(tmp_path: Path) -> None:
    """With the decoder, which the released facebookresearch weights do not have."""
    case = CASES["colour_norm_pix"]
    ours = MAE(our_config(case))
    randomize(ours)
    save_huggingface(tmp_path, ours, decoder=True)
    theirs = loaded("ViTMAEForPreTraining", tmp_path)
    images, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    with torch.no_grad():
        want = theirs(images, noise=noise)
    torch.testing.assert_close(
        ours.reconstruct(images, noise)[0], want.logits, rtol=1e-4, atol=1e-5
    )
