"""patch_model on a MaskedAutoencoderViT test double and on transformers' ViTMAEForPreTraining.

Protects: the same loss, predictions, gradients and training curve as the host's own code; an unchanged state dict; a complete
way back; no part taken over whose numbers would differ, and none left to the host without a word.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mae_kernels
from mae_kernels import PatchReport, patch_model, unpatch_model
from tests.kernels import mae_by_hand
from tests.kernels.mae_by_hand import MaskedAutoencoderViT

HF_SIZES = {
    "image_size": 32, "patch_size": 8, "num_channels": 3, "norm_pix_loss": True, "mask_ratio": 0.7, "layer_norm_eps": 1e-6,
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48,
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip


def make_mae(**options: Any) -> nn.Module:
    return randomised(MaskedAutoencoderViT(**options))


def make_hf(attention: str = "sdpa", **options: Any) -> nn.Module:
    config = transformers.ViTMAEConfig(**HF_SIZES | options)
    return randomised(
        transformers.ViTMAEForPreTraining._from_config(config, attn_implementation=attention)
    )


def randomised(model: nn.Module) -> nn.Module:
    """Biases, norms and tokens away from 0 and 1, position tables trained: a dropped or swapped one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator)
                / max(parameter.shape[-1], 4) ** 0.5
            )
            parameter.requires_grad_(True)
    return model


def call_mae(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return model(images, 0.7)


def call_hf(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = model(images)
    return out.loss, out.logits, out.mask


Host = tuple[Callable[..., nn.Module], Callable[..., tuple[Tensor, Tensor, Tensor]]]
HOSTS: dict[str, Host] = {"mae": (make_mae, call_mae), "transformers": (make_hf, call_hf)}
SHALLOW = {
    "mae": {"depth": 1, "decoder_depth": 1},
    "transformers": {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1},
}
BOTH = pytest.mark.parametrize("host", list(HOSTS))


def images_for(batch: int = 3, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, channels, 32, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


def results(
    host: str, model: nn.Module, images: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Loss, predictions, mask and the gradient of every parameter, masking from the same seed."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss, pred, mask = HOSTS[host][1](model, images)
    loss.backward()
    return [loss.detach(), pred.detach(), mask, *(p.grad for p in model.parameters())]


# ---------------------------------------------------------------------------------------------- the same numbers
@BOTH
@pytest.mark.parametrize("options", [{}, {"norm_pix_loss": False}])
def test_equal_in_float64(host: str, options: dict[str, bool]) -> None:
    model = HOSTS[host][0](**options).double()
    images = images_for(dtype=torch.float64)
    before = results(host, model, images)
    report = patch_model(model)
    assert len(report.replaced) == 7 and report.left == ()
    after = results(host, model, images)
    names = ["loss", "predictions", "mask", *(name for name, _ in model.named_parameters())]
    for name, want, got in zip(names, before, after, strict=True):
        # a bias of the keys shifts all scores of a query alike, which the softmax takes away
        assert want.abs().max() > 1e-9 or name.endswith("k_proj.bias"), (
            f"{name}: zero gradients compare nothing"
        )
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-12 * max(1.0, float(want.abs().max())), msg=name
        )


@BOTH
def test_float32_is_as_near_to_float64_as_the_host(host: str, close: Callable[..., None]) -> None:
    model, images = HOSTS[host][0](), images_for()
    exact = results(host, copy.deepcopy(model).double(), images.double())
    eager = results(host, model, images)
    patch_model(model)
    got = results(host, model, images)
    assert torch.equal(got[2], eager[2])
    close([t.float() for t in got], exact, [t.float() for t in eager], atol=2e-6)


@BOTH
def test_autocast(host: str) -> None:
    """bfloat16: both are rounded, so they are compared with float64, the patched one by the host's own error."""
    model, images = HOSTS[host][0](), images_for(batch=8)
    exact = results(host, copy.deepcopy(model).double(), images.double())
    eager = results(host, model, images, torch.bfloat16)
    patch_model(model)
    got = results(host, model, images, torch.bfloat16)
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    for g, x, e in zip(got, exact, eager, strict=True):
        assert (g - x).norm() <= 2 * (e - x).norm() + 1e-3 * x.norm()


@pytest.mark.kernel
@BOTH
def test_float16_with_whatever_runs_on_this_device(host: str, device: torch.device) -> None:
    """The CPU's path, the Triton kernels interpreted, or a GPU: see test_interpreted.py."""
    wide = {
        "mae": {"embed_dim": 48, "decoder_embed_dim": 32},
        "transformers": {"hidden_size": 48, "decoder_hidden_size": 32},
    }
    model, images = HOSTS[host][0](**wide[host]), images_for()
    exact = results(host, copy.deepcopy(model).double(), images.double())
    model, images = model.half().to(device), images.half().to(device)
    torch.manual_seed(3)
    noise = torch.rand(3, 16).to(device)  # the masks of `exact`, on every device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, device: noise)
        eager = results(host, model, images)
    assert patch_model(model).left == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, device: noise)
        got = results(host, model, images)
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    for g, x, e in zip(got, exact, eager, strict=True):
        x = x.to(device)
        assert (g.double() - x).norm() <= 2 * (e.double() - x).norm() + 1e-3 * x.norm() + 1e-6


@BOTH
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_loss_curve_of_50_steps(host: str, optimizer: type[torch.optim.Optimizer]) -> None:
    curves = []
    ramp = torch.linspace(0, 1, 32)
    images = images_for(batch=4) * 0.1 + ramp + ramp[:, None]  # noise alone could not be predicted
    for patch in (False, True):
        model = HOSTS[host][0]()
        if patch:
            patch_model(model)
        optimise = optimizer(model.parameters(), lr=0.2 if optimizer is torch.optim.SGD else 0.003)
        torch.manual_seed(4)
        curve = []
        for _ in range(50):
            loss, _, _ = HOSTS[host][1](model, images)
            optimise.zero_grad()
            loss.backward()
            optimise.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-10:].mean() < 0.7 * curves[0][:5].mean(), (
        "training that learns nothing compares nothing"
    )
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)


def test_the_methods_called_one_by_one() -> None:
    """As fine-tuning and visualisation code of others does: each method keeps its meaning on its own."""
    model, images = make_mae(), images_for()
    mask = (torch.rand(3, 16) < 0.5).float()
    pred = torch.randn(3, 16, 192)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        latent, encoder_mask, ids_restore = model.forward_encoder(images, 0.5)
        decoded = model.forward_decoder(latent, ids_restore)
        return [latent, encoder_mask, ids_restore, decoded, model.forward_loss(images, pred, mask)]

    before = run()
    patch_model(model)
    for want, got in zip(before, run(), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_grey_images_and_an_odd_patch() -> None:
    model = make_mae(img_size=21, patch_size=7, in_chans=1).double()
    images = torch.rand(2, 1, 21, 21, dtype=torch.float64)
    before = results("mae", model, images)
    assert patch_model(model).left == ()
    for want, got in zip(before, results("mae", model, images), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_transformers_outputs_and_noise() -> None:
    model, images = make_hf(), images_for()
    noise = torch.rand(3, 16)
    model.eval()
    with torch.no_grad():
        before = model(images, noise=noise, output_hidden_states=True)
        as_tuple = model(images, noise=noise, return_dict=False)
        patch_model(model)
        after = model(images, noise=noise, output_hidden_states=True)
        also_tuple = model(images, noise=noise, return_dict=False)
    assert type(after) is type(before) and after.keys() == before.keys()
    assert torch.equal(after.mask, before.mask) and torch.equal(
        after.ids_restore, before.ids_restore
    )
    assert len(after.hidden_states) == len(before.hidden_states) == 3
    for want, got in zip((before.loss, before.logits, *before.hidden_states, *as_tuple[:2]),
                         (after.loss, after.logits, *after.hidden_states, *also_tuple[:2]), strict=True):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(also_tuple) == len(as_tuple) == 4
    with pytest.raises(ValueError, match="Input image size"):
        model(torch.rand(1, 3, 16, 16))


# ------------------------------------------------------------------------------------------------ nothing else changes
@BOTH
def test_state_dict_and_parameters_stay_and_unpatch_restores(host: str) -> None:
    model, images = HOSTS[host][0](), images_for()
    before = results(host, model, images)
    keys = list(model.state_dict())
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    kept = {name: (type(m), set(vars(m)), repr(m)) for name, m in model.named_modules()}
    random_state = torch.get_rng_state()
    patch_model(model)
    assert torch.equal(torch.get_rng_state(), random_state), (
        "patching must not move the masks of a seeded run"
    )
    assert list(model.state_dict()) == keys
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert {n: (set(vars(m)), repr(m)) for n, m in model.named_modules()} == {
        n: k[1:] for n, k in kept.items()
    }
    assert all(isinstance(m, kept[name][0]) for name, m in model.named_modules())
    own, patched = (inspect.signature(cls.forward).parameters for cls in (kept[""][0], type(model)))
    assert list(own) == list(patched), (
        "trainers choose the columns of a batch by the names of the arguments"
    )
    results(host, model, images)
    unpatch_model(model)
    assert {n: (type(m), set(vars(m)), repr(m)) for n, m in model.named_modules()} == kept
    assert all(torch.equal(a, b) for a, b in zip(before, results(host, model, images), strict=True))
    unpatch_model(model)  # harmless


def test_bound_methods_are_the_hosts_again() -> None:
    model = make_mae()
    patch_model(model)
    assert model.forward_encoder.__func__ is not MaskedAutoencoderViT.forward_encoder
    unpatch_model(model)
    for name in ("forward", "forward_encoder", "forward_decoder", "forward_loss", "random_masking"):
        assert getattr(model, name).__func__ is getattr(MaskedAutoencoderViT, name)
    assert model.blocks[0].attn.forward.__func__ is mae_by_hand.Attention.forward


@BOTH
def test_patching_twice_is_patching_once(host: str) -> None:
    model = HOSTS[host][0]()
    first, classes = patch_model(model), [type(m) for m in model.modules()]
    assert patch_model(model) == first
    assert [type(m) for m in model.modules()] == classes


@BOTH
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_patched_and_stand_alone(host: str, how: str) -> None:
    model, images = HOSTS[host][0](), images_for()
    patch_model(model)
    before = results(host, model, images)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    with torch.no_grad():
        model.get_parameter(
            next(iter(model.state_dict()))
        ).zero_()  # the copy has its own parameters
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(before, results(host, other, images), strict=True))
    unpatch_model(other)
    assert type(other) is not type(model), "unpatching the copy leaves the original patched"


@BOTH
def test_state_dicts_move_between_patched_and_plain(host: str) -> None:
    model, plain, images = HOSTS[host][0](), HOSTS[host][0](), images_for()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.5)
    want = results(host, plain, images)
    patch_model(model)
    model.load_state_dict(plain.state_dict())
    got = results(host, model, images)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-4, atol=1e-5)


def test_save_pretrained_does_not_see_the_patch(tmp_path) -> None:
    model = make_hf()
    patch_model(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "ViTMAEForPreTraining" and loaded.config.architectures == [
        "ViTMAEForPreTraining"
    ]
    for (name, want), got in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(want, got), name


@BOTH
def test_compiles_in_one_graph(host: str) -> None:
    model, images = HOSTS[host][0](**SHALLOW[host]), images_for()
    patch_model(model)
    want = results(host, model, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = results(host, compiled, images)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_notices_the_patch() -> None:
    model, images = make_mae(**SHALLOW["mae"]), images_for()
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    want = results("mae", compiled, images)
    patch_model(model)
    got = results("mae", compiled, images)
    assert len(graphs) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@BOTH
def test_train_and_eval_reach_the_patched_modules(host: str) -> None:
    model, images = HOSTS[host][0](), images_for()
    patch_model(model)
    want = results(host, model.train(), images)
    assert all(not m.training for m in model.eval().modules())
    assert all(torch.equal(a, b) for a, b in zip(want, results(host, model, images), strict=True))


# ------------------------------------------------------------------------------------------------------- refusals
def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match=r"model: got dict, needs a torch\.nn\.Module"):
        patch_model({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: got dict, needs a torch\.nn\.Module"):
        unpatch_model({})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"model: got Linear, needs a MaskedAutoencoderViT .* \(it lacks patch_embed",
    ):
        patch_model(nn.Linear(2, 2))
    lacking = make_mae()
    del lacking.decoder_pos_embed
    with pytest.raises(
        ValueError, match=r"in facebookresearch/mae \(it lacks decoder_pos_embed\) or ViTMAE"
    ):
        patch_model(lacking)

    class Renamed(MaskedAutoencoderViT):
        forward_loss = None

    with pytest.raises(ValueError, match=r"\(it lacks forward_loss\(\)\)"):
        patch_model(Renamed())
    encoder_only = make_hf().vit
    with pytest.raises(ValueError, match=r"of transformers 5 \(it lacks vit.embeddings"):
        patch_model(encoder_only)
    assert type(encoder_only) is transformers.ViTMAEModel


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_refuses_a_wrapped_model_with_advice(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(
        ValueError, match="It wraps another module: patch that one, before wrapping it"
    ):
        patch_model(wrap(make_mae()))


def test_unpatch_refuses_to_drop_what_came_on_top() -> None:
    model = make_mae()
    patch_model(model)
    attention = model.blocks[0].attn
    attention.__class__ = type("OnTop", (type(attention),), {})
    with pytest.raises(
        ValueError, match=r"the class of blocks.0.attn was changed after patch_model"
    ):
        unpatch_model(model)
    with pytest.raises(
        TypeError, match="Attention defines its own pickling; call unpatch_model before"
    ):
        copy.deepcopy(model)


# ------------------------------------------------------------------------- parts that stay with the host, and are told
def left(report: PatchReport) -> dict[str, str]:
    return {part.where: part.why for part in report.left}


class WithNorm(mae_by_hand.Attention):
    """Normalises q and k, as newer vision transformers do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.q_norm = nn.LayerNorm(self.qkv.in_features // self.num_heads)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.q_norm(q), self.q_norm(k))


class WithBias(mae_by_hand.Attention):
    """A learned bias that starts at zero: only random parameters show it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bias = nn.Parameter(torch.zeros(self.num_heads, 1, 1))
        self.register_buffer("places", torch.arange(64))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + self.bias * self.places[: q.shape[1]]


class WithHiddenDropout(mae_by_hand.Attention):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.other_drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.other_drop(super().forward(x))


class WithStoppedGradient(mae_by_hand.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class OnlyOnTheGPU(mae_by_hand.Attention):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            raise RuntimeError("this attention needs a GPU")
        return super().forward(x)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (WithNorm, "its own code computes something else"),
        (WithBias, "its own code computes something else"),
        (WithHiddenDropout, "its own code computes something else"),
        (WithStoppedGradient, "its own code computes something else"),
        (
            OnlyOnTheGPU,
            "could not be compared on the CPU in float64 (RuntimeError: this attention needs a GPU)",
        ),
    ],
)
def test_another_attention_stays(attention: type[nn.Module], why: str) -> None:
    model, images = make_mae(), images_for()
    model.blocks[1].attn = attention(24, 3)
    report = patch_model(model)
    assert list(left(report)) == ["blocks.1.attn"] and why in left(report)["blocks.1.attn"]
    assert type(model.blocks[1].attn) is attention
    assert "left     attention in blocks.1.attn: " + why[:20] in str(report)
    assert len(report.replaced) == 6
    if attention is not OnlyOnTheGPU:
        results("mae", model, images)


class OtherMask(MaskedAutoencoderViT):
    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        kept, mask, ids_restore = super().random_masking(x.flip(1), mask_ratio)
        return kept, mask.flip(1), ids_restore.flip(1)


class OtherRounding(MaskedAutoencoderViT):
    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        return super().random_masking(x, 1 - round(x.shape[1] * (1 - mask_ratio)) / x.shape[1])


class OtherLoss(MaskedAutoencoderViT):
    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=2, keepdim=True, correction=0)
            target = (target - mean) / (var + 1e-6).sqrt()
        return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


class OtherOrder(MaskedAutoencoderViT):
    def patchify(self, imgs: Tensor) -> Tensor:
        return nn.functional.unfold(imgs, 8, stride=8).transpose(1, 2)  # channels first


class StoppedGradient(MaskedAutoencoderViT):
    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        return super().forward_decoder(x.detach(), ids_restore)


class FrozenEmbedding(MaskedAutoencoderViT):
    """Stops the gradient of the patch embedding, as some do for stable training."""

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        hook = self.patch_embed.register_forward_hook(lambda module, args, out: out.detach())
        try:
            return super().forward_encoder(x, mask_ratio)
        finally:
            hook.remove()


class OtherDecoder(MaskedAutoencoderViT):
    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        return super().forward_decoder(x, ids_restore).tanh()


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (OtherMask, "forward_encoder"),
        (OtherRounding, "forward_encoder"),
        (OtherLoss, "forward_loss"),
        (OtherOrder, "forward_loss"),
        (OtherDecoder, "forward_decoder"),
        (StoppedGradient, "forward_decoder"),
        (FrozenEmbedding, "forward_encoder"),
    ],
)
def test_another_method_stays(kind: type[nn.Module], where: str) -> None:
    model, images = randomised(kind()).double(), images_for(dtype=torch.float64)
    before = results("mae", model, images)
    report = patch_model(model)
    assert (
        list(left(report)) == [where]
        and "its own code computes something else" in left(report)[where]
    )
    for want, got in zip(before, results("mae", model, images), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_method_set_on_the_instance_stays() -> None:
    model = make_mae()
    model.forward_loss = lambda imgs, pred, mask: pred.sum()
    report = patch_model(model)
    assert left(report) == {"forward_loss": "forward_loss was replaced on the instance"}
    loss, pred, _ = model(images_for())
    assert torch.equal(loss, pred.sum())


def watch(module: nn.Module) -> list[str]:
    """Counts the calls of a module through a hook."""
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("called"))
    return calls


def test_calls_that_an_op_cannot_serve_get_the_hosts_code() -> None:
    """Each exception that the report announces, by the calls that only the host's own code makes."""
    model, images = make_mae(), images_for()
    report = patch_model(model)
    unless = {part.where: part.unless for part in report.replaced}
    assert (
        "hooks on patch_embed" in unless["forward_encoder"]
        and "attn_drop" in unless["blocks.0.attn"]
    )
    plain = make_mae()
    want = results("mae", plain, images)

    calls = watch(model.patch_embed.proj)
    assert torch.allclose(results("mae", model, images)[0], want[0], rtol=1e-5) and calls == [
        "called"
    ]

    model.random_masking = lambda x, ratio: (x[:, :4], (torch.arange(16) >= 4).float().expand(3, 16),
                                             torch.arange(16).expand(3, 16))  # fmt: skip
    assert torch.equal(call_mae(model, images)[2][0], (torch.arange(16) >= 4).float())
    del model.random_masking

    with pytest.raises(AssertionError, match="the image has another size than the model"):
        model(torch.rand(1, 3, 16, 64))  # as many patches, in another grid

    images.requires_grad_(True)
    model.forward_loss(images, torch.zeros(3, 16, 192), torch.ones(3, 16)).backward()
    gradient = images.grad
    images.grad = None
    plain.forward_loss(images, torch.zeros(3, 16, 192), torch.ones(3, 16)).backward()
    assert torch.equal(gradient, images.grad) and gradient.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_gets_the_hosts_code_in_training_only(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = make_mae(), images_for()
    model.blocks[0].attn = mae_by_hand.Attention(24, 3, attn_drop=0.5)
    randomised(model).train(training)
    want = results("mae", model, images)
    assert patch_model(model).left == ()
    own_code = []
    scores = mae_by_hand.Attention.scores
    monkeypatch.setattr(
        mae_by_hand.Attention,
        "scores",
        lambda self, q, k: own_code.append(self) or scores(self, q, k),
    )
    torch.testing.assert_close(results("mae", model, images), want, rtol=1e-4, atol=1e-4)
    assert own_code == ([model.blocks[0].attn] if training else [])

    calls = watch(model.blocks[1].attn.attn_drop)  # how attention maps are often read
    torch.testing.assert_close(results("mae", model, images), want, rtol=1e-4, atol=1e-4)
    assert calls == ["called"]


def test_transformers_exceptions() -> None:
    """interpolate_pos_encoding, output_attentions, dropout, and adapters on a projection run the host's own code."""
    images = images_for()
    model, plain = make_hf("eager"), make_hf("eager")
    report = patch_model(model)
    assert report.left == ()
    assert any("interpolate_pos_encoding" in part.unless for part in report.replaced)
    assert any("output_attentions" in part.unless for part in report.replaced)
    noise = torch.rand(3, 16)
    want = plain(images, noise=noise, output_attentions=True)
    got = model(images, noise=noise, output_attentions=True)
    assert len(got.attentions) == len(want.attentions) == 2
    torch.testing.assert_close(got.attentions, want.attentions)
    model.config.output_attentions = plain.config.output_attentions = True
    torch.testing.assert_close(model(images, noise=noise).attentions, want.attentions)
    model.config.output_attentions = False

    larger = torch.rand(2, 3, 48, 48)
    noise = torch.rand(2, 36)
    want = plain(larger, noise=noise, interpolate_pos_encoding=True)
    got = model(larger, noise=noise, interpolate_pos_encoding=True)
    torch.testing.assert_close(
        (got.loss, got.logits), (want.loss, want.logits), rtol=1e-4, atol=1e-5
    )

    noise = torch.rand(3, 16)
    mask = torch.ones(3, 5)  # the class token and four visible patches
    mask[:, -1] = 0
    want, got = (m(images, noise=noise, attention_mask=mask) for m in (plain, model))
    torch.testing.assert_close(
        (got.loss, got.logits), (want.loss, want.logits), rtol=1e-4, atol=1e-5
    )
    assert (want.logits - plain(images, noise=noise).logits).abs().max() > 1e-3, (
        "the attention mask must matter"
    )

    calls = watch(model.vit.layers[0].attention.k_proj)
    model(images)
    assert calls == ["called"]


def test_transformers_attention_dropout() -> None:
    model = make_hf(attention_probs_dropout_prob=0.5).train()
    images = images_for()
    want = results("transformers", model, images)
    assert patch_model(model).left == ()
    torch.testing.assert_close(results("transformers", model, images), want, rtol=1e-4, atol=1e-4)


def test_the_report_is_readable() -> None:
    text = str(patch_model(make_mae()))
    assert text.startswith("facebookresearch/mae: 7 parts replaced, 0 left to the host\n")
    assert "attention in blocks.0.attn to decoder_blocks.1.attn (4)" in text
    assert "restore_tokens in forward_decoder" in text


def test_the_examples_of_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every code block of "Use it in another MAE" runs, the two sides of each pair agree, and the printed report is the one shown."""
    text = (Path(mae_kernels.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.split("## Use it in another MAE\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    printed = re.findall(r"```\n(facebookresearch.*?)\n```", section, re.DOTALL)
    published = types.ModuleType("models_mae")
    published.mae_vit_base_patch16 = functools.partial(make_mae, depth=12, decoder_depth=8)
    monkeypatch.setitem(sys.modules, "models_mae", published)
    monkeypatch.setattr(
        transformers.ViTMAEForPreTraining, "from_pretrained", lambda name: make_hf()
    )
    images = images_for()
    losses = []
    for block in blocks:
        names = {"images": images}
        torch.manual_seed(6)
        exec(block, names)
        for name in ("loss_before", "loss_after"):
            if name in names:
                torch.manual_seed(6)
                names["loss"] = names[name](make_mae(), images)
        losses.append(names["loss"])
    assert len(losses) == 6
    for before, after in zip(losses[::2], losses[1::2], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=0)
    assert len(printed) == 1 and printed[0] in capsys.readouterr().out
