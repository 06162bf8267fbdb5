"""patch_model on a MaskedAutoencoderViT test double and on transformers' ViTMAEForPreTraining.

Same loss, predictions and gradients as the host's own code; unchanged state dict; complete
undo; no method is replaced whose numbers differ, and each exception is reported.
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
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mae_kernels
from mae_kernels import PatchReport, patch_model, unpatch_model
from tests.kernels import mae_by_hand
from tests.kernels.mae_by_hand import MaskedAutoencoderViT

ROOT = Path(mae_kernels.__file__).parents[2]
HF_SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "norm_pix_loss": True,
    "mask_ratio": 0.7,
    "layer_norm_eps": 1e-6,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
HF_SHALLOW = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}


def make_mae(**options: Any) -> nn.Module:
    return randomised(MaskedAutoencoderViT(**options))


def make_hf(attention: str = "sdpa", **options: Any) -> nn.Module:
    config = transformers.ViTMAEConfig(**HF_SIZES | options)
    create = transformers.ViTMAEForPreTraining._from_config
    return randomised(create(config, attn_implementation=attention))


def randomised(model: nn.Module) -> nn.Module:
    """Biases, norms and tokens differ from 0 and 1, position tables train: a swapped one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        random = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(random / max(parameter.shape[-1], 4) ** 0.5)
        parameter.requires_grad_(True)
    return model


def call_mae(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return model(images, 0.7)


def call_hf(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = model(images)
    return out.loss, out.logits, out.mask


Host = tuple[Callable[..., nn.Module], Callable[..., tuple[Tensor, Tensor, Tensor]]]
HOSTS: dict[str, Host] = {"mae": (make_mae, call_mae), "transformers": (make_hf, call_hf)}
BOTH = pytest.mark.parametrize("host", list(HOSTS))


def images_for(batch: int = 3, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(2))


def results(
    host: str, model: nn.Module, images: Tensor, autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Loss, predictions, mask and the gradient of every parameter, masking from the same seed."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss, pred, mask = HOSTS[host][1](model, images)
    loss.backward()
    return [loss.detach(), pred.detach(), mask, *(p.grad for p in model.parameters())]


def assert_close(got: Any, want: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# -------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize(
    ("host", "options", "shape"),
    [
        ("mae", {}, {}),
        ("mae", {"norm_pix_loss": False}, {}),
        ("mae", {"img_size": 21, "patch_size": 7, "in_chans": 1}, {"channels": 1, "side": 21}),
        ("transformers", {}, {}),
        ("transformers", {"norm_pix_loss": False}, {}),
    ],
)
def test_results_are_equal_in_float64(
    host: str, options: dict[str, Any], shape: dict[str, int]
) -> None:
    model, images = HOSTS[host][0](**options).double(), images_for(**shape).double()
    before = results(host, model, images)
    report = patch_model(model)
    assert len(report.replaced) == 7
    assert report.left == ()
    names = ["loss", "predictions", "mask", *(name for name, _ in model.named_parameters())]
    for name, want, got in zip(names, before, results(host, model, images), strict=True):
        # a bias of the keys shifts all scores of a query alike, which the softmax removes
        assert want.abs().max() > 1e-9 or name.endswith("k_proj.bias"), f"{name} compares zeros"
        assert got.dtype == want.dtype, name
        atol = 1e-12 * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=atol, msg=name)


@BOTH
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_rounding_is_as_small_as_the_hosts(host: str, autocast: torch.dtype | None) -> None:
    model, images = HOSTS[host][0](), images_for(batch=8)
    exact = results(host, copy.deepcopy(model).double(), images.double())
    eager = results(host, model, images, autocast)
    patch_model(model)
    got = results(host, model, images, autocast)
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    assert torch.equal(got[2], eager[2])
    small = 1e-3 if autocast else 2e-6
    for g, x, e in zip(got, exact, eager, strict=True):
        assert (g - x).norm() <= 2 * (e - x).norm() + small * max(1.0, x.norm())


@pytest.mark.kernel
@BOTH
def test_float16_on_this_device(
    host: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference, the interpreted Triton kernels, or a GPU: see test_interpreted.py."""
    # one block each, of widths that the attention kernel takes
    sizes = {
        "mae": {"embed_dim": 48, "decoder_embed_dim": 32, "depth": 1, "decoder_depth": 1},
        "transformers": {"hidden_size": 48, "decoder_hidden_size": 32} | HF_SHALLOW,
    }
    model, images = HOSTS[host][0](**sizes[host]), images_for()
    exact = results(host, copy.deepcopy(model).double(), images.double())
    model, images = model.half().to(device), images.half().to(device)
    torch.manual_seed(3)
    # the masks of `exact`, on every device
    noise = torch.rand(3, 16).to(device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, device: noise)
        eager = results(host, model, images)
    assert patch_model(model).left == ()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, device: noise)
        got = results(host, model, images)
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    for g, x, e in zip(got, exact, eager, strict=True):
        x = x.to(device)
        assert (g.double() - x).norm() <= 2 * (e.double() - x).norm() + 1e-3 * x.norm() + 1e-6


def test_transformers_outputs_and_noise() -> None:
    model, images = make_hf().eval(), images_for()
    noise = torch.rand(3, 16)

    @torch.no_grad()
    def run() -> tuple[Any, Any]:
        named = model(images, noise=noise, output_hidden_states=True)
        return named, model(images, noise=noise, return_dict=False)

    before, before_tuple = run()
    patch_model(model)
    after, after_tuple = run()
    assert type(after) is type(before)
    assert after.keys() == before.keys()
    assert torch.equal(after.mask, before.mask)
    assert torch.equal(after.ids_restore, before.ids_restore)
    assert_close((after.loss, after.logits), (before.loss, before.logits))
    assert_close(after.hidden_states, before.hidden_states)
    assert_close(after_tuple, before_tuple)
    with pytest.raises(ValueError, match="Input image size"):
        model(torch.rand(1, 3, 16, 16))


# ------------------------------------------------------------------ nothing else changes
@BOTH
def test_unpatch_restores_everything(host: str) -> None:
    model, images = HOSTS[host][0](), images_for()

    def state() -> list[Any]:
        parameters = [(name, id(p)) for name, p in model.named_parameters()]
        modules = [(name, set(vars(m)), repr(m)) for name, m in model.named_modules()]
        return [list(model.state_dict()), parameters, modules, torch.get_rng_state().tolist()]

    before = results(host, model, images)
    kept, classes = state(), [type(m) for m in model.modules()]
    report = patch_model(model)
    assert state() == kept
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    own, patched = (inspect.signature(cls.forward).parameters for cls in (classes[0], type(model)))
    assert list(own) == list(patched), "trainers select columns of a batch by argument names"
    patched_classes = [type(m) for m in model.modules()]
    assert patch_model(model) == report, "patching twice equals patching once"
    assert [type(m) for m in model.modules()] == patched_classes
    for _ in range(2):
        unpatch_model(model)
        assert [type(m) for m in model.modules()] == classes
    assert state() == kept
    assert_equal(results(host, model, images), before)


@BOTH
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_independent(host: str, how: str) -> None:
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
    for parameter in model.parameters():
        parameter.data.zero_()
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert_equal(results(host, other, images), before)
    unpatch_model(other)
    assert type(other) is not type(model), "unpatching the copy leaves the original patched"


def test_save_pretrained_does_not_see_the_patch(tmp_path: Path) -> None:
    model = make_hf()
    patch_model(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["ViTMAEForPreTraining"]
    assert_equal(list(loaded.state_dict().values()), list(model.state_dict().values()))


@pytest.mark.parametrize(
    ("host", "options"), [("mae", {"depth": 1, "decoder_depth": 1}), ("transformers", HF_SHALLOW)]
)
def test_compiled_model_is_one_graph_and_notices_the_patch(
    host: str, options: dict[str, int]
) -> None:
    model, images = HOSTS[host][0](**options), images_for()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    want = results(host, compiled, images)
    patch_model(model)
    assert_close(results(host, compiled, images), want)
    assert len(graphs) == 2


# --------------------------------------------------------------------------- rejections
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            r"got Linear, needs a masked autoencoder as in .*; it lacks .* Other models can use",
        ),
        (
            lambda: make_hf().vit,
            r"got ViTMAEModel, .* it lacks .* patch_attention\(model\) replaces its attention",
        ),
        (lambda: torch.compile(make_mae()), "It wraps another module: patch that one, before"),
        (lambda: nn.DataParallel(make_mae()), "It wraps another module: patch that one, before"),
    ],
)
def test_unknown_model_is_rejected(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        patch_model(model)
    for function in (patch_model, unpatch_model):
        with pytest.raises(TypeError, match=r"model: got dict, needs a torch\.nn\.Module"):
            function({})  # type: ignore[operator]


def test_later_change_of_a_class_is_not_dropped() -> None:
    model = make_mae()
    patch_model(model)
    attention = model.blocks[0].attn
    attention.__class__ = type("OnTop", (type(attention),), {})
    with pytest.raises(ValueError, match=r"the class of blocks.0.attn was changed after patch_mod"):
        unpatch_model(model)
    with pytest.raises(TypeError, match="Attention defines its own pickling; call unpatch_model"):
        copy.deepcopy(model)


# ------------------------------------------------------- methods that the host keeps
OTHER = re.compile(r" differs by | where the op gives |may jump with values \(linalg_vector_norm")


def left(report: PatchReport) -> dict[str, str]:
    return {part.where: part.why for part in report.left}


def variant(base: type[nn.Module], method: str, change: Callable[..., Any]) -> type[nn.Module]:
    """A subclass with one changed method; change(the base's method, self, *arguments)."""
    own = getattr(base, method)
    changed = functools.wraps(own)(lambda self, *args: change(own, self, *args))
    return type("Variant", (base,), {method: changed})


class WithBias(mae_by_hand.Attention):
    """A learned bias, initialised to zero: only random parameters show it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bias = nn.Parameter(torch.zeros(self.num_heads, 1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + self.bias * torch.arange(q.shape[1])


NEEDS_GPU = "could not be compared on the CPU in float64 (RuntimeError: this attention needs a GPU)"


def only_on_a_gpu(own: Callable[..., Tensor], self: nn.Module, x: Tensor) -> Tensor:
    raise RuntimeError("this attention needs a GPU")


def other_variance(own: Any, self: Any, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    var, mean = torch.var_mean(self.patchify(imgs), dim=2, keepdim=True, correction=0)
    target = (self.patchify(imgs) - mean) / (var + 1e-6).sqrt()
    return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


def frozen_embedding(own: Any, self: Any, x: Tensor, mask_ratio: float) -> Any:
    """Stops the gradient of the patch embedding, as some do for stable training."""
    hook = self.patch_embed.register_forward_hook(lambda module, args, out: out.detach())
    try:
        return own(self, x, mask_ratio)
    finally:
        hook.remove()


def flipped(kept: Tensor, mask: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return kept, mask.flip(1), ids_restore.flip(1)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


ATTENTION = "blocks.1.attn"
# where the host's own code stays, and a method that differs there, or a class of attention
VARIANTS: dict[str, tuple[str, str, Any]] = {
    "learned bias": (ATTENTION, "", WithBias),
    "normalised q and k": (
        ATTENTION,
        "scores",
        lambda own, self, q, k: own(self, unit(q), unit(k)),
    ),
    "hidden dropout": (
        ATTENTION,
        "forward",
        lambda own, self, x: F.dropout(own(self, x), 0.5, self.training),
    ),
    "stopped gradient": (ATTENTION, "forward", lambda own, self, x: own(self, x.detach())),
    "only on a GPU": (ATTENTION, "forward", only_on_a_gpu),
    "mask": (
        "forward_encoder",
        "random_masking",
        lambda own, self, x, ratio: flipped(*own(self, x.flip(1), ratio)),
    ),
    "rounding": (
        "forward_encoder",
        "random_masking",
        lambda own, self, x, ratio: own(self, x, 1 - round(16 * (1 - ratio)) / 16),
    ),
    "frozen embedding": ("forward_encoder", "forward_encoder", frozen_embedding),
    "variance": ("forward_loss", "forward_loss", other_variance),
    "channels first": (
        "forward_loss",
        "patchify",
        lambda own, self, imgs: F.unfold(imgs, 8, stride=8).transpose(1, 2),
    ),
    "decoder": (
        "forward_decoder",
        "forward_decoder",
        lambda own, self, x, ids: own(self, x, ids).tanh(),
    ),
    "stopped decoder gradient": (
        "forward_decoder",
        "forward_decoder",
        lambda own, self, x, ids: own(self, x.detach(), ids),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_different_code_is_kept(name: str) -> None:
    where, method, change = VARIANTS[name]
    model: Any = make_mae()
    if where == ATTENTION:
        kind = variant(mae_by_hand.Attention, method, change) if method else change
        model.blocks[1].attn = kind(24, 3)
    else:
        model = variant(MaskedAutoencoderViT, method, change)()
    model, images = randomised(model).double(), images_for().double()
    comparable = name not in ("hidden dropout", "only on a GPU")
    before = results("mae", model, images) if comparable else []
    report = patch_model(model)
    why = re.compile(re.escape(NEEDS_GPU)) if name == "only on a GPU" else OTHER
    assert list(left(report)) == [where]
    assert why.search(left(report)[where])
    assert f" in {where}: {left(report)[where]}" in str(report)
    assert len(report.replaced) == 6
    if comparable:
        assert_close(results("mae", model, images), before, rtol=1e-9, atol=1e-10)


def test_method_set_on_the_instance_stays() -> None:
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


def test_reported_exceptions_run_the_hosts_code() -> None:
    """Detected by calls that only the host's own code makes."""
    model, images = make_mae(), images_for()
    report = patch_model(model)
    unless = {part.where: part.unless for part in report.replaced}
    assert "images of another size" in unless["forward_encoder"]
    assert "after a change of what it reads" in unless["forward_encoder"]
    assert "dropout" in unless["blocks.0.attn"]
    plain = make_mae()
    want = results("mae", plain, images)

    calls = watch(model.patch_embed.proj)
    with pytest.warns(UserWarning, match=r"because patch_embed\.proj\._forward_hooks changed"):
        assert_close(results("mae", model, images)[0], want[0])
    assert calls == ["called"]

    order = torch.arange(16).expand(3, 16)
    model.random_masking = lambda x, ratio: (x[:, :4], (order >= 4).float(), order)
    with pytest.warns(UserWarning, match="because .* changed after patching"):
        assert torch.equal(call_mae(model, images)[2], (order >= 4).float())
    del model.random_masking

    with pytest.raises(AssertionError, match="the image has another size than the model"):
        # the same number of patches, in another grid
        model(torch.rand(1, 3, 16, 64))

    images.requires_grad_(True)
    model.forward_loss(images, torch.zeros(3, 16, 192), torch.ones(3, 16)).backward()
    gradient = images.grad
    images.grad = None
    plain.forward_loss(images, torch.zeros(3, 16, 192), torch.ones(3, 16)).backward()
    assert torch.equal(gradient, images.grad) and gradient.abs().max() > 0


def test_transformers_attention_dropout_runs_the_hosts_code() -> None:
    model, images = make_hf(attention_probs_dropout_prob=0.5).train(), images_for()
    want = results("transformers", model, images)
    assert patch_model(model).left == ()
    assert_close(results("transformers", model, images), want, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_runs_the_hosts_code_in_training_only(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = make_mae(), images_for()
    model.blocks[0].attn = mae_by_hand.Attention(24, 3, attn_drop=0.5)
    randomised(model).train(training)
    want = results("mae", model, images)
    own_code = []
    scores = mae_by_hand.Attention.scores
    counted = lambda self, q, k: own_code.append(self) or scores(self, q, k)  # noqa: E731
    monkeypatch.setattr(mae_by_hand.Attention, "scores", counted)
    assert patch_model(model).left == ()
    own_code.clear()
    assert_close(results("mae", model, images), want, atol=1e-4)
    assert own_code == ([model.blocks[0].attn] if training else [])

    # attention maps are often read like this
    calls = watch(model.blocks[1].attn.attn_drop)
    with pytest.warns(UserWarning, match=r"because attn_drop\._forward_hooks changed"):
        assert_close(results("mae", model, images), want, atol=1e-4)
    assert calls == ["called"]


def test_transformers_exceptions() -> None:
    """Other sizes, masks, attention outputs and hooks on a projection run the host's code."""
    images = images_for()
    model, plain = make_hf("eager"), make_hf("eager")
    report = patch_model(model)
    # it returns its weights always
    assert set(left(report).values()) == {"output 1 is a Tensor where the op gives a NoneType"}
    assert {part.where for part in report.replaced} == {"vit.embeddings", "decoder", "forward"}
    assert any("interpolate_pos_encoding" in part.unless for part in report.replaced)
    noise = torch.rand(3, 16)
    want = plain(images, noise=noise, output_attentions=True)
    got = model(images, noise=noise, output_attentions=True)
    assert len(got.attentions) == len(want.attentions) == 2
    torch.testing.assert_close(got.attentions, want.attentions)
    model.config.output_attentions = plain.config.output_attentions = True
    torch.testing.assert_close(model(images, noise=noise).attentions, want.attentions)

    model, plain = make_hf(), make_hf()
    assert patch_model(model).left == ()
    larger = torch.rand(2, 3, 48, 48)
    noise = torch.rand(2, 36)
    want = plain(larger, noise=noise, interpolate_pos_encoding=True)
    got = model(larger, noise=noise, interpolate_pos_encoding=True)
    assert_close((got.loss, got.logits), (want.loss, want.logits))

    noise = torch.rand(3, 16)
    # the class token and four visible patches
    mask = torch.ones(3, 5)
    mask[:, -1] = 0
    want, got = (m(images, noise=noise, attention_mask=mask) for m in (plain, model))
    assert_close((got.loss, got.logits), (want.loss, want.logits))
    without = plain(images, noise=noise).logits
    assert (want.logits - without).abs().max() > 1e-3, "the attention mask must matter"

    calls = watch(model.vit.layers[0].attention.k_proj)
    with pytest.warns(UserWarning, match=r"because k_proj\._forward_hooks changed"):
        model(images)
    assert calls == ["called"]


# --------------------------------------------------------------- documentation and examples
def test_python_blocks_of_the_readme_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses before and after agree, and the report is as printed."""
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    first, *pairs, timing = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["tokens"].shape == (8, 197, 384)
    assert 0.1 < names["loss"] < 10
    published = types.ModuleType("models_mae")
    published.mae_vit_base_patch16 = functools.partial(make_mae, depth=12, decoder_depth=8)
    monkeypatch.setitem(sys.modules, "models_mae", published)
    load = "transformers.ViTMAEForPreTraining.from_pretrained"
    monkeypatch.setattr(load, lambda name: make_hf())
    exec(timing, names)
    times = names["times"]
    assert all(time.median > 0 for time in times.values())
    want = names["eager"](names["noise"], 49)
    got = mae_kernels.random_masking(names["noise"], 49)
    assert_close([got.ids_keep, got.ids_restore, got.mask], list(want))
    assert "us'}" in capsys.readouterr().out
    losses = []
    for block in pairs:
        names = {"images": images_for()}
        torch.manual_seed(6)
        exec(block, names)
        losses.append(names["loss"])
    assert len(losses) == 4
    assert_close(losses[1::2], losses[::2], atol=0)
    printed = re.findall(r"```\n(facebookresearch.*?)\n```", text, re.DOTALL)
    assert len(printed) == 1
    assert printed[0] in capsys.readouterr().out
