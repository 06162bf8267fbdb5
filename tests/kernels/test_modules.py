"""The modules: state dicts of other projects fit, results and gradients are those of the layers
they replace.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from mae_kernels import (
    GeluMLP,
    MaskedReconstructionLoss,
    PatchEmbedVisible,
    ReconstructionHead,
    RestoreTokens,
    ShortAttention,
    random_masking,
)
from tests.kernels.mae_by_hand import MaskedAutoencoderViT


class WithModules(nn.Module):
    """The double, its parts exchanged for the modules and the masked rows predicted only: what
    README shows.
    """

    def __init__(self, host: MaskedAutoencoderViT) -> None:
        super().__init__()
        width, decoder_width = host.cls_token.shape[-1], host.mask_token.shape[-1]
        side = host.patch_embed.patch_size[0]
        channels = host.patch_embed.proj.in_channels
        patches = 16
        self.patch_embed = PatchEmbedVisible(side, channels, width)
        self.cls_token = nn.Parameter(host.cls_token.clone())
        self.pos_embed = nn.Parameter(host.pos_embed.clone())
        self.blocks = copy.deepcopy(host.blocks)
        self.norm = copy.deepcopy(host.norm)
        self.decoder_embed = copy.deepcopy(host.decoder_embed)
        self.restore = RestoreTokens(patches, decoder_width)
        self.decoder_blocks = copy.deepcopy(host.decoder_blocks)
        self.decoder_norm = copy.deepcopy(host.decoder_norm)
        self.decoder_pred = ReconstructionHead(decoder_width, side, channels)
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn = ShortAttention(block.norm1.normalized_shape[0], block.attn.num_heads)
        state = host.state_dict()
        for name in ("mask_token", "decoder_pos_embed"):
            state["restore." + name] = state.pop(name)
        self.load_state_dict(state)  # strict: every other name and shape is the host's

    def forward(self, images: Tensor, noise: Tensor, keep: int) -> Tensor:
        masking = random_masking(noise, keep)
        x = self.patch_embed(images, masking.ids_keep, self.pos_embed[:, 1:])
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.restore(self.decoder_embed(self.norm(x)), masking.ids_restore)
        for block in self.decoder_blocks:
            x = block(x)
        rows = masking.ids_masked[..., None].expand(-1, -1, x.shape[-1])
        hidden = self.decoder_norm(x)[:, 1:].gather(1, rows)
        return self.decoder_pred.loss(hidden, images, masking.ids_masked)


def test_model_with_modules_equals_the_model_without() -> None:
    host = MaskedAutoencoderViT().double()
    model = WithModules(host).double()
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(5)
    noise = torch.rand(3, 16)
    torch.manual_seed(5)
    want = host(images, 0.75)[0]
    want.backward()
    got = model(images, noise, 4)
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    names = {name.removeprefix("restore."): p for name, p in model.named_parameters()}
    for name, parameter in host.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 1e-8, name
            torch.testing.assert_close(
                names[name].grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=name
            )


def test_masked_reconstruction_loss_module_equals_the_host() -> None:
    host = MaskedAutoencoderViT()
    images = torch.rand(2, 3, 32, 32)
    pred = torch.randn(2, 16, 192)
    mask = torch.rand(2, 16) < 0.7
    loss = MaskedReconstructionLoss(8)
    torch.testing.assert_close(
        loss(pred, images, mask=mask), host.forward_loss(images, pred, mask.float())
    )
    ids = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    rows = pred.gather(1, ids[..., None].expand(-1, -1, 192))
    masked = torch.zeros(2, 16).scatter_(1, ids, 1.0)
    torch.testing.assert_close(loss(rows, images, ids=ids), host.forward_loss(images, pred, masked))
    host.norm_pix_loss = False
    plain = MaskedReconstructionLoss(8, norm=None, mean=[0.5, 0.4, 0.3], std=0.2)
    shifted = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    torch.testing.assert_close(
        plain(pred, images, mask=mask), host.forward_loss(shifted, pred, mask.float())
    )
    assert list(loss.state_dict()) == []


def test_reconstruction_head_is_the_linear_layer_and_its_loss() -> None:
    head = ReconstructionHead(16, 4, 3, norm="channel", mean=0.5, std=0.25)
    linear = nn.Linear(16, 48)
    head.load_state_dict(linear.state_dict())
    hidden = torch.randn(2, 5, 16)
    images = torch.rand(2, 3, 8, 12)
    ids = torch.arange(5).expand(2, 5)
    assert torch.equal(head(hidden), linear(hidden))
    loss = MaskedReconstructionLoss(4, norm="channel", mean=0.5, std=0.25)
    torch.testing.assert_close(
        head.loss(hidden, images, ids), loss(linear(hidden), images, ids=ids)
    )


def test_modules_load_the_state_dict_of_transformers() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 24, "image_size": 32, "patch_size": 8}
    sizes |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    sizes |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    config = transformers.ViTMAEConfig(**sizes)
    state = transformers.ViTMAEForPreTraining(config).state_dict()
    restore = RestoreTokens(16, 16)
    restore.load_state_dict({name: state["decoder." + name] for name in restore.state_dict()})
    head = ReconstructionHead(16, 8, 3)
    head.load_state_dict(
        {name: state["decoder.decoder_pred." + name] for name in head.state_dict()}
    )
    embed = PatchEmbedVisible(8, 3, 24)
    path = "vit.embeddings.patch_embeddings.projection."
    embed.proj.load_state_dict({name: state[path + name] for name in embed.proj.state_dict()})


@pytest.mark.parametrize("bias", [True, False])
def test_modules_with_and_without_bias(bias: bool) -> None:
    embed = PatchEmbedVisible(4, 1, 6, bias=bias, mean=0.5, std=0.25)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    ids, pos = torch.tensor([[3, 0], [1, 2]]), torch.randn(1, 4, 6)
    every = embed.proj((images / 255 - 0.5) / 0.25).flatten(2).transpose(1, 2) + pos
    torch.testing.assert_close(
        embed(images, ids, pos), every.gather(1, ids[..., None].expand(-1, -1, 6))
    )

    attention = ShortAttention(12, 3, qkv_bias=bias, proj_drop=0.5)
    x = torch.randn(2, 5, 12)
    # the same by torch's own module, whose in_proj is qkv
    other = nn.MultiheadAttention(12, 3, batch_first=True)
    other.in_proj_weight.data = attention.qkv.weight.data
    other.in_proj_bias.data = attention.qkv.bias.data if bias else torch.zeros(36)
    other.out_proj.load_state_dict(attention.proj.state_dict())
    want = other(x, x, x, need_weights=False)[0]
    dropped = attention(x)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2 * want))
    assert 0.2 < (dropped == 0).float().mean() < 0.8
    torch.testing.assert_close(attention.eval()(x), want)
    assert ("qkv.bias" in attention.state_dict()) == bias


def test_restore_tokens_module_with_learned_positions() -> None:
    restore = RestoreTokens(4, 6, prefix=0, learn_positions=True)
    with torch.no_grad():
        restore.decoder_pos_embed.normal_()
    visible = torch.randn(2, 2, 6)
    ids_restore = torch.tensor([[2, 0, 1, 3], [1, 3, 2, 0]])
    out = restore(visible, ids_restore)
    token, pos = restore.mask_token[0, 0], restore.decoder_pos_embed[0]
    want = [
        [token, visible[0, 0], visible[0, 1], token],
        [visible[1, 1], token, token, visible[1, 0]],
    ]
    torch.testing.assert_close(out, torch.stack([torch.stack(rows) for rows in want]) + pos)
    out.sum().backward()
    assert torch.equal(restore.decoder_pos_embed.grad, torch.full((1, 4, 6), 2.0))
    assert not RestoreTokens(4, 6).decoder_pos_embed.requires_grad


def test_model_with_modules_copies_and_compiles() -> None:
    model = WithModules(MaskedAutoencoderViT(depth=1, decoder_depth=1))
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    want = model(images, noise, 4)
    assert torch.equal(copy.deepcopy(model)(images, noise, 4), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images, noise, 4), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, noise, 4), want)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ShortAttention(10, 3), "dim: got 10, needs a multiple of num_heads = 3"),
        (lambda: ShortAttention(10, 0), "num_heads: got 0, needs at least 1"),
        (lambda: PatchEmbedVisible(16.0), "patch_size: got float, needs an int"),
        (lambda: RestoreTokens(4, 6, prefix=-1), "prefix: got -1, needs at least 0"),
        (lambda: MaskedReconstructionLoss(norm="pixel"), "norm: got 'pixel', needs one of 'pat"),
        (lambda: MaskedReconstructionLoss(eps=0.0), "eps: got 0.0, needs a positive number"),
        (lambda: ReconstructionHead(in_chans=0), "in_chans: got 0, needs at least 1"),
        (lambda: GeluMLP(0, 4), "dim: got 0, needs at least 1"),
    ],
)
def test_modules_name_a_bad_argument(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        make()
