"""The published models against our own in float64, on converted weights and equal noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import eager, published, step_models
from sssd_fast.config import Config, from_dict
from sssd_fast.errors import ConfigError
from sssd_fast.objective import SSSD
from sssd_fast.weights.formats import to_own_names

NEAR = 5e-6  # relative; our loss is a float32 number, which its gradients pass
# our heads are float32, and the teacher's gradient is a difference of nearly equal numbers
NEAR_HEADS = 2e-4
SIZES = {"depth": 2, "width": 32, "heads": 4, "decoder_width": 24, "decoder_depth": 2}
SIZES |= {"decoder_heads": 3, "mlp_ratio": 2.5}
COLOUR = {"patch_size": 8, "in_channels": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grey": ("patch", {"image_size": 32, "patch_size": 8, "mask_ratio": 0.75}),
    "colour, by channel": ("channel", {**COLOUR, "image_size": [24, 40], "mask_ratio": 0.6}),
    "colour, raw": ("none", {**COLOUR, "image_size": [32, 48], "mask_ratio": 0.5}),
}


def config_of(name: str) -> Config:
    norm, model = CASES[name]
    objective = {"norm": norm, "head_hidden": 20, "head_bottleneck": 12, "prototypes": 30}
    return from_dict({"model": {**SIZES, **model}, "objective": {**objective, "weight": 0.3}})


def both(name: str, task: str) -> tuple[SSSD, nn.Module, Tensor, Tensor]:
    """Our model, the published one with its weights, float images, noise: all in float64."""
    config = step_models.for_task(config_of(name), task)
    setup = step_models.Setup("", config, task, torch.device("cpu"), 3)
    ours: Any = step_models.initial_model(setup)
    ours.center.copy_(torch.rand(ours.center.shape) / 30)
    theirs = step_models.published_model(setup, ours)
    data = step_models.Data(setup)
    return ours.double(), theirs.double(), data.floats.double(), data.noise(0).double()


def worst(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest value of its tensor, but at least to a hundredth
    of the largest of all; both have the same tensors."""
    assert got.keys() == exact.keys()
    largest = {name: float(tensor.abs().max()) for name, tensor in exact.items()}
    assert all(largest.values())
    floor = max(largest.values()) / 100
    return max(float((got[n] - exact[n]).abs().max()) / max(largest[n], floor) for n in exact)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def own_gradients(theirs: nn.Module) -> dict[str, Tensor]:
    """Gradients of a published model under the names of ours."""
    found = gradients(theirs)
    if isinstance(theirs, published.MaskedAutoencoderViT):
        return {f"mae.{n}": c.tensor for n, c in to_own_names(found)[1].items()}
    mae = {n.removeprefix("mae."): g for n, g in found.items() if n.startswith("mae.")}
    named = {f"mae.{n}": c.tensor for n, c in to_own_names(mae)[1].items()}
    return {**named, **{n: g for n, g in found.items() if not n.startswith("mae.")}}


def mae_errors(name: str, theirs: nn.Module | None = None) -> tuple[float, float, float]:
    """Relative errors of loss, predictions and gradients of the published autoencoder."""
    ours, made, images, noise = both(name, "MAE")
    theirs = made if theirs is None else theirs
    assert isinstance(theirs, published.MaskedAutoencoderViT)
    out = ours(images, noise)
    loss, _ = theirs(images, noise)
    latent, _, restore, mask = theirs.encode(images, noise)
    pred = theirs.decoder_pred(theirs.decode(latent, restore))[:, 1:]
    whole, masking = ours.mae.reconstruct(images, noise)
    masked = masking.mask.unsqueeze(-1)
    out.total.backward()
    loss.backward()
    assert torch.equal(mask.bool(), masking.mask)
    return (
        abs(float(loss.detach()) / float(out.total.detach()) - 1),
        worst({"pred": pred.detach() * masked}, {"pred": whole * masked}),
        worst(own_gradients(theirs), gradients(ours)),
    )


@pytest.mark.parametrize("name", CASES)
def test_published_autoencoder_has_our_loss_predictions_and_gradients(name: str) -> None:
    loss, predictions, grads = mae_errors(name)
    assert loss < NEAR
    assert predictions < 1e-10
    assert grads < NEAR


@pytest.mark.parametrize("name", CASES)
def test_published_distillation_has_our_losses_and_gradients(name: str) -> None:
    ours, theirs, images, noise = both(name, "SSSD")
    assert isinstance(theirs, published.SDMAE)
    expected = ours(images, noise)
    total, center = theirs(images, noise)
    reconstruction, distillation, _ = theirs.losses(images, noise)
    found = {"total": total, "reconstruction": reconstruction, "distillation": distillation}
    for name, loss in {"total": expected.total, **expected.losses}.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=NEAR)
    # so that exchanged losses would be detected
    assert abs(distillation.item() - reconstruction.item()) > 0.1
    torch.testing.assert_close(center, expected.batch_center.double(), rtol=NEAR, atol=1e-8)
    expected.total.backward()
    total.backward()
    assert worst(own_gradients(theirs), gradients(ours)) < NEAR_HEADS
    before = theirs.center.clone()
    ours.update_center(expected.batch_center, torch.tensor(True))
    theirs.update_center(center)
    torch.testing.assert_close(theirs.center, ours.center, rtol=NEAR, atol=1e-9)
    assert not torch.allclose(theirs.center, before)


def _flip_scores(model: published.MaskedAutoencoderViT) -> None:
    qkv = model.decoder_blocks[1].attn["qkv"]
    for queries in (qkv.weight.data[:24], qkv.bias.data[:24]):
        queries.neg_()


def _flip_positions(model: published.MaskedAutoencoderViT) -> None:
    model.decoder_pos_embed.data.neg_()


def _flip_gradient(model: published.MaskedAutoencoderViT) -> None:
    model.blocks[0].attn["qkv"].weight.register_hook(torch.neg)


@pytest.mark.parametrize("plant", [_flip_scores, _flip_positions, _flip_gradient])
def test_a_planted_sign_error_is_seen(plant: Any) -> None:
    _, theirs, _, _ = both("grey", "MAE")
    plant(theirs)
    errors = mae_errors("grey", theirs)
    assert max(errors) > 1e-3
    assert (errors[0] > 1e-4) == (plant is not _flip_gradient)


def test_patches_are_rows_of_pixels_with_the_channel_last() -> None:
    images = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    found = eager.patchify(images, 2, "rcc")
    for b in range(2):
        for patch in range(6):
            top, left = patch // 3 * 2, patch % 3 * 2
            cut = images[b, :, top : top + 2, left : left + 2]
            expected = [cut[c, i, j] for i in range(2) for j in range(2) for c in range(3)]
            assert found[b, patch].tolist() == [float(value) for value in expected]


def test_settings_that_the_published_models_lack_are_refused() -> None:
    config, cpu = config_of("grey"), torch.device("cpu")
    token = config.objective.model_copy(update={"pooling": "token"})
    setup = step_models.Setup("", config.model_copy(update={"objective": token}), "SSSD", cpu, 2)
    with pytest.raises(ConfigError, match="pooling"):
        step_models.published_model(setup, step_models.initial_model(setup))


def test_published_classifier_has_our_logits_and_gradients() -> None:
    config = step_models.for_task(config_of("colour, raw"), "finetune")
    setup = step_models.Setup("", config, "finetune", torch.device("cpu"), 3)
    ours: Any = step_models.initial_model(setup)
    theirs = step_models.published_model(setup, ours).double()
    ours.double()
    images = step_models.Data(setup).floats.double()
    expected, logits = ours(images), theirs(images)
    torch.testing.assert_close(logits, expected, rtol=NEAR, atol=0)
    for out in (expected, logits):
        out.square().sum().backward()
    renamed = {n: c.tensor for n, c in to_own_names(gradients(theirs))[1].items()}
    assert worst(renamed, gradients(ours)) < NEAR
