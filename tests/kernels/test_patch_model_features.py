"""Features that other projects add to a masked autoencoder: patch_model keeps each of them.

Each host below has one feature. Either the method that has it keeps the host's code, with the
reason, or the calls that use it run the host's code: the numbers are those of the host.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_kernels import patch_attention, patch_model, unpatch_model
from tests.kernels.mae_by_hand import Attention, Block, MaskedAutoencoderViT
from tests.kernels.test_patch_model import images_for, left, make_mae, randomised, results
from tools import try_host

LOSS = "forward_loss"
ENCODER = "forward_encoder"
DECODER = "forward_decoder"


def embedded(self: Any, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """The host's encoder input, mask and ids_restore."""
    x = self.patch_embed(x) + self.pos_embed[:, 1:]
    x, mask, ids_restore = self.random_masking(x, mask_ratio)
    first = self.cls_token + self.pos_embed[:, :1]
    return torch.cat([first.repeat(len(x), 1, 1), x], 1), mask, ids_restore


def host(**methods: Callable[..., Any]) -> type[MaskedAutoencoderViT]:
    """A host whose methods, or attributes of the class, are exchanged."""
    return type("Host", (MaskedAutoencoderViT,), methods)


class Registers(MaskedAutoencoderViT):
    """Tokens that are added before the blocks and cut off after them: they act through attention
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(1, 4, 24))

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, ids = embedded(self, x, mask_ratio)
        x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(torch.cat([x[:, :1], x[:, 5:]], 1)), mask, ids


class DeepPrompts(MaskedAutoencoderViT):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Parameter(torch.randn(2, 24))

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, ids = embedded(self, x, mask_ratio)
        for i, block in enumerate(self.blocks):
            x = block(x + self.deep[i])
        return self.norm(x), mask, ids


def early_exit(self: Any, x: Tensor, mask_ratio: float) -> Any:
    x, mask, ids = embedded(self, x, mask_ratio)
    for block in self.blocks[:1]:
        x = block(x)
    return self.norm(x), mask, ids


def skip_connection(self: Any, x: Tensor, mask_ratio: float) -> Any:
    x, mask, ids = embedded(self, x, mask_ratio)
    first = self.blocks[0](x)
    return self.norm(self.blocks[1](first) + first), mask, ids


def checkpointed(self: Any, x: Tensor, mask_ratio: float) -> Any:
    x, mask, ids = embedded(self, x, mask_ratio)
    for block in self.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return self.norm(x), mask, ids


class ScaledBlock(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class BlockArguments(MaskedAutoencoderViT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ScaledBlock(24, 3) for _ in range(2)])

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, ids = embedded(self, x, mask_ratio)
        for block in self.blocks:
            x = block(x, 0.5)
        return self.norm(x), mask, ids


def layer_drop(self: Any, x: Tensor, mask_ratio: float) -> Any:
    x, mask, ids = embedded(self, x, mask_ratio)
    for block in self.blocks:
        if random.random() < 2:
            x = block(x)
    return self.norm(x), mask, ids


def loss_of(target: Tensor, pred: Tensor, mask: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return ((((pred - target) ** 2) * weight).mean(2) * mask).sum() / mask.sum()


def normalised(t: Tensor) -> Tensor:
    return (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()


def without_background(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    t = self.patchify(imgs)
    return loss_of(normalised(t), pred, mask, t != 0)


def without_nan(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    return loss_of(normalised(self.patchify(imgs.nan_to_num())), pred, mask)


def clamped(self: Any, x: Tensor, mask_ratio: float) -> Any:
    return MaskedAutoencoderViT.forward_encoder(self, x.clamp(-100, 100), mask_ratio)


def scaled_if_large(self: Any, x: Tensor, mask_ratio: float) -> Any:
    if x.max() > 1000:
        x = x / 255
    return MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)


def through_numpy(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    t = torch.from_numpy(self.patchify(imgs).numpy())
    return loss_of(normalised(t), pred, mask)


def other_epsilon(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    t = self.patchify(imgs)
    t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-5).sqrt()
    return loss_of(t, pred, mask)


def keeps_mask(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    self.last_mask = mask
    return MaskedAutoencoderViT.forward_loss(self, imgs, pred, mask)


def appends_mask(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    self.masks.append(1)
    return MaskedAutoencoderViT.forward_loss(self, imgs, pred, mask)


def prints(self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    print("loss")
    return MaskedAutoencoderViT.forward_loss(self, imgs, pred, mask)


class WarmUp(MaskedAutoencoderViT):
    """A weight in a buffer: 1 now, another number later."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(1.0))

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        return super().forward_loss(imgs, pred, mask) * self.factor


def more_outputs(self: Any, x: Tensor, ids: Tensor) -> Any:
    return MaskedAutoencoderViT.forward_decoder(self, x, ids), None, None


def named_outputs(self: Any, x: Tensor, mask_ratio: float) -> Any:
    return list(MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio))


def needs_argument(self: Any, x: Tensor, mask_ratio: float, center_masking: bool) -> Any:
    return MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride)


def overlapping() -> nn.Module:
    model: Any = make_mae()
    model.patch_embed.proj = nn.Conv2d(3, 24, 10, stride=8, padding=1)
    return model


def standardised() -> nn.Module:
    model: Any = make_mae()
    model.patch_embed.proj = Standardised(3, 24, 8, stride=8)
    return model


# where the host's code stays, a host, and the reason
FEATURES: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "register tokens": (ENCODER, Registers, "output 0 differs"),
    "deep prompts": (ENCODER, DeepPrompts, "output 0 differs"),
    "early exit": (ENCODER, host(forward_encoder=early_exit), "does not call all its blocks"),
    "checkpointing": (ENCODER, host(forward_encoder=checkpointed), "gradient checkpointing"),
    "argument of blocks": (ENCODER, BlockArguments, "more arguments than the tokens"),
    "layer drop": (ENCODER, host(forward_encoder=layer_drop), "random numbers of Python"),
    "skip connection": (ENCODER, host(forward_encoder=skip_connection), "output 0 differs"),
    "background": (LOSS, host(forward_loss=without_background), "may jump with values (ne)"),
    "no data": (LOSS, host(forward_loss=without_nan), "may jump with values (nan_to_num)"),
    "clamp": (ENCODER, host(forward_encoder=clamped), "may jump with values (clamp)"),
    "branch": (ENCODER, host(forward_encoder=scaled_if_large), "values (max, gt)"),
    "NumPy": (LOSS, host(forward_loss=through_numpy), "with values (values of tensors)"),
    "epsilon": (LOSS, host(forward_loss=other_epsilon), "the result differs by"),
    "kept mask": (LOSS, host(forward_loss=keeps_mask), "it sets last_mask"),
    "list of masks": (LOSS, host(forward_loss=appends_mask, masks=[]), "it changes masks"),
    "print": (LOSS, host(forward_loss=prints), "it prints"),
    "buffer": (LOSS, WarmUp, "the result differs by"),
    "more outputs": (DECODER, host(forward_decoder=more_outputs), "is a tuple where the op gives"),
    "list of outputs": (ENCODER, host(forward_encoder=named_outputs), "is a list where the op"),
    "argument": (ENCODER, host(forward_encoder=needs_argument), "takes center_masking"),
    "overlapping patches": (ENCODER, overlapping, "no plain convolution of square patches"),
    "standardised weight": (ENCODER, standardised, "output 0 differs by"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_patch_model_keeps_the_feature(name: str) -> None:
    where, make, why = FEATURES[name]
    model = make()
    report = patch_model(model)
    reasons = left(report)
    assert set(reasons) == {where}
    assert why in reasons[where]
    assert len(reasons[where]) < 140
    assert len(report.replaced) == 6


def test_patch_model_gives_unknown_arguments_to_the_host() -> None:
    def forward_encoder(
        self: Any, x: Tensor, mask_ratio: float, noise: Any = None, scale: float = 2.0
    ) -> Any:
        if noise is not None:
            return "noise"
        if scale != 2.0:
            return f"scale {scale}"
        return MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)

    def forward_loss(self: Any, images: Tensor, predictions: Tensor, masks: Tensor) -> Tensor:
        return MaskedAutoencoderViT.forward_loss(self, images, predictions, masks)

    model: Any = randomised(host(forward_encoder=forward_encoder, forward_loss=forward_loss)())
    images = images_for()
    torch.manual_seed(0)
    want = model.forward_encoder(images, 0.7)
    assert patch_model(model).left == ()
    for arguments in ({}, {"noise": None}, {"scale": 2.0}):
        torch.manual_seed(0)
        torch.testing.assert_close(model.forward_encoder(images, mask_ratio=0.7, **arguments), want)
    assert model.forward_encoder(images, 0.7, torch.rand(3, 16)) == "noise"
    assert model.forward_encoder(images, 0.7, scale=3.0) == "scale 3.0"
    with pytest.raises(TypeError, match="multiple values for argument 'mask_ratio'"):
        model.forward_encoder(images, 0.7, mask_ratio=0.7)
    # under the host's names
    pred, mask = torch.randn(3, 16, 192), torch.ones(3, 16)
    by_name = model.forward_loss(images=images, predictions=pred, masks=mask)
    unpatch_model(model)
    torch.testing.assert_close(by_name, model.forward_loss(images, pred, mask))


class Teacher(MaskedAutoencoderViT):
    """The target is set before each step, as in bootstrapped masked autoencoders."""

    target: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"weight": 1.0}

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        if self.target is not None:
            return loss_of(self.target, pred, mask)
        return super().forward_loss(imgs, pred, mask) * self.settings["weight"]


def other_function(self: Any, imgs: Tensor) -> Tensor:
    return MaskedAutoencoderViT.patchify(self, imgs).flip(2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "target": lambda model: setattr(model, "target", torch.full((3, 16, 192), 2.0)),
    "settings": lambda model: model.settings.update(weight=0.5),
    "norm_pix_loss": lambda model: setattr(model, "norm_pix_loss", False),
    "patchify": lambda model: setattr(model, "patchify", other_function.__get__(model)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_patch_model_follows_attributes_that_change_later(name: str, copied: bool) -> None:
    model, images = randomised(Teacher()), images_for()
    assert patch_model(model).left == ()
    if copied:
        model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results("mae", model, images)
    CHANGES[name](model)
    with pytest.warns(UserWarning, match=f"Teacher.forward_loss runs its own code .* {name}"):
        got = results("mae", model, images)
    unpatch_model(model)
    torch.testing.assert_close(got, results("mae", model, images), rtol=1e-4, atol=1e-5)


def test_patch_model_follows_a_method_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_mae()
    assert patch_model(model).left == ()
    monkeypatch.setattr(MaskedAutoencoderViT, "forward_loss", lambda *_: torch.tensor(5.0))
    assert model(images_for())[0] == 5.0


def test_patch_model_serves_weighted_masks() -> None:
    """A heat map instead of zeros and ones, also negative, and 0 weights for a whole image."""

    def forward(self: Any, imgs: Tensor, mask_ratio: float = 0.75) -> Any:
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        weights = mask * torch.linspace(-0.5, 2, 16) + 0.1 * (1 - mask)
        weights[0] = 0
        return self.forward_loss(imgs, pred, weights), pred, mask

    model = randomised(host(forward=forward)()).double()
    images = images_for().double()
    want = results("mae", model, images)
    assert patch_model(model).left == ()
    # the mask is fp32
    torch.testing.assert_close(results("mae", model, images), want, rtol=1e-5, atol=1e-7)


def test_patch_model_gives_wrong_dtypes_to_the_host() -> None:
    model = make_mae()
    patch_model(model)
    for images in (images_for().double(), (images_for() * 255).to(torch.uint8)):
        with pytest.raises(RuntimeError, match="type"):
            model(images)


def test_patch_model_needs_names_per_part() -> None:
    model: Any = make_mae()
    images, want = images_for(), None
    encoded = lambda: torch.manual_seed(0) and model.forward_encoder(images, 0.7)[0]  # noqa: E731
    want = encoded()
    del model.norm_pix_loss
    report = patch_model(model)
    assert left(report) == {"forward_loss": "it lacks norm_pix_loss"}
    assert len(report.replaced) == 6
    torch.testing.assert_close(encoded(), want)


def test_patch_model_in_jit_trace_and_vmap_runs_the_hosts_code() -> None:
    model: Any = make_mae()
    pred, mask, images = torch.randn(3, 16, 192), torch.ones(3, 16), images_for()

    def each(image: Tensor, pred: Tensor) -> Tensor:
        return model.forward_loss(image[None], pred[None], mask[:1])

    want = [torch.func.vmap(each)(images, pred), model.forward_loss(images, pred, mask)]
    assert patch_model(model).left == ()
    torch.testing.assert_close(torch.func.vmap(each)(images, pred), want[0])
    inputs = {"forward_loss": (images, pred, mask)}
    traced = torch.jit.trace_module(model, inputs, check_trace=False)
    torch.testing.assert_close(traced.forward_loss(images, pred, mask), want[1])


# ---------------------------------------------------------------------- patch_attention
class BeitAttention(nn.Module):
    """Biases of the queries and values only, as in BEiT; weights are returned when requested."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.randn(dim))
        self.v_bias = nn.Parameter(torch.randn(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, return_attention: bool = False) -> Any:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        q = q + self.q_bias.view(self.num_heads, -1)
        v = v + self.v_bias.view(self.num_heads, -1)
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * self.scale).softmax(-1)
        out = self.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
        return (out, weights) if return_attention else out


class ReturnsWeights(BeitAttention):
    def forward(self, x: Tensor, return_attention: bool = True) -> Any:
        return super().forward(x, return_attention)


def test_patch_attention_in_any_model() -> None:
    layers: Any = [Attention(24, 3), BeitAttention(24, 3), ReturnsWeights(24, 3), nn.Linear(24, 24)]
    model = randomised(nn.Sequential(*layers[:2], layers[3])).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    want = model(x)
    maps = layers[1](x, return_attention=True)
    report = patch_attention(model)
    assert [part.where for part in report.replaced] == ["0", "1"]
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(layers[1](x, return_attention=True), maps)
    unpatch_model(model)
    assert torch.equal(model(x), want)

    report = patch_attention(nn.ModuleList([layers[2]]))
    assert left(report) == {"0": "the result is a tuple where the op gives a Tensor"}
    with pytest.raises(ValueError, match="got Linear, needs modules with qkv proj num_heads scale"):
        patch_attention(layers[3])
    with pytest.raises(ValueError, match=r"patch_attention\(model\) replaces its attention"):
        patch_model(model)


def test_patch_model_compares_equal_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x: calls.append(self) or own(self, x))
    model = nn.ModuleList([Attention(24, 3) for _ in range(4)] + [Attention(24, 4)])
    assert len(patch_attention(model).replaced) == 5
    # two modes for each of the two numbers of heads
    assert len(calls) == 4


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_try_host_compares_a_model_with_and_without_the_ops(
    scale: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 if a replaced method gives other numbers: here the loss, after the comparison."""
    model = "tests.kernels.mae_by_hand:MaskedAutoencoderViT"
    options = ["--options", '{"depth": 1}', "--then", "0.7", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["try_host", "tests", model, *options])
    monkeypatch.setattr(try_host, "allow_old_names", lambda: None)
    own = try_host.patch

    def patched(host: nn.Module) -> Any:
        report = own(host)
        cls = type(host)
        loss = cls.forward_loss
        monkeypatch.setattr(cls, "forward_loss", lambda *args: loss(*args) * scale)
        return report

    if scale != 1:
        monkeypatch.setattr(try_host, "patch", patched)
    assert try_host.main() == (scale != 1)
    printed = capsys.readouterr().out
    assert "facebookresearch/mae: 6 parts replaced, 0 left to the host" in printed
    assert "2 steps: largest relative difference of the loss" in printed
