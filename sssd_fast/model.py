"""The masked autoencoder (He et al., arXiv 2111.06377) and the classifier built on its encoder.

Shapes: B images, L patches, K visible, M = L - K masked, p prefix tokens (1 with a cls token, else
0), N tokens in a block, D encoder width, E decoder width, H heads, d = D / H head width, V = P*P*C
values of one patch in the order (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_kernels import Masking, embed_patches, gelu_linear, random_masking, restore_tokens
from sssd_fast.attention import attend
from sssd_fast.config import ModelConfig

SelectTokens = Callable[[Tensor], Tensor]  # [B, N, D] -> the tokens that are used afterwards


class MAEOutput(NamedTuple):
    pred_BMV: Tensor  # predicted masked patches, in the order of masking.ids_masked
    masking: Masking
    student_BKD: Tensor  # LayerNorm(encoder) of the visible patches, without the cls token
    teacher_BKE: Tensor | None  # LayerNorm(decoder) at the same positions


def sincos_positions(width: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """[prefix + rows*cols, width] fixed 2-D sin-cos positions; prefix rows are zero.

    Half of the width encodes the column, half the row, each as sin then cos of position / 10000^(i
    / (width/4)): the layout of facebookresearch/mae, so that its weights fit.
    """
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = (torch.arange(n, dtype=torch.float64) for n in grid)
    rows, cols = torch.meshgrid(*axes, indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (cols, rows)]
    table = torch.cat([torch.cat((a.sin(), a.cos()), 1) for a in angles], 1)
    return torch.cat([torch.zeros(prefix, width, dtype=torch.float64), table]).float()


class _PickPatches(torch.autograd.Function):
    """Rows of x[:, p:] in the order of ids.

    The backward is a gather too: torch's own scatters with atomic additions, which are slow on a
    GPU and add in a different order in each run.
    """

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, ids_BM: Tensor, rank_BL: Tensor) -> Tensor:
        ctx.save_for_backward(rank_BL)
        ctx.prefix = x_BND.shape[1] - rank_BL.shape[1]
        ctx.picked = ids_BM.shape[1]
        return _rows(x_BND, ids_BM + ctx.prefix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rank_BL,), grad_BMD = ctx.saved_tensors, grads[0]
        rank_BL = F.pad(rank_BL, (ctx.prefix, 0), value=-1)
        inside_BN = (rank_BL >= 0) & (rank_BL < ctx.picked)
        dx_BND = _rows(grad_BMD, rank_BL.clamp(0, ctx.picked - 1))
        return torch.where(inside_BN.unsqueeze(-1), dx_BND, 0), None, None


def pick_patches(x_BND: Tensor, ids_BM: Tensor, rank_BL: Tensor) -> Tensor:
    """[B, M, D]: the patch tokens `ids` in that order. x is [B, p+L, D]; its p prefix tokens are
    dropped.

    rank [B, L] is the position of each patch in `ids`; a patch that is not in `ids` has a rank
    below 0 or at least M.
    """
    out: Tensor = _PickPatches.apply(x_BND, ids_BM, rank_BL)
    return out


def _rows(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    return x_BND.gather(1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


QUERIES_AT_ONCE = 256


class Attention(nn.Module):
    # "fused" is mae_kernels.attention. performance.execution sets the provider chosen for this
    # machine.
    provider = "fused"

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        out_BNHd = attend(self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads), self.provider)
        out: Tensor = self.proj(out_BNHd.reshape(B, N, D))
        return out

    def probabilities(self, x_BND: Tensor, queries: slice) -> Tensor:
        """[B, H, N] softmax(q k^T / sqrt(d)), the mean over the queries; a few at a time, since
        [B, H, N, N] may need more memory than training.
        """
        B, N, D = x_BND.shape
        qkv_BN3Hd = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads)
        q_BHNd, k_BHNd, _ = qkv_BN3Hd.permute(2, 0, 3, 1, 4).float()
        q_BHQd = q_BHNd[:, :, queries] * (D // self.heads) ** -0.5
        total_BHN = torch.zeros_like(k_BHNd[..., 0])
        for i in range(B):
            for q_HSd in q_BHQd[i].split(QUERIES_AT_ONCE, 1):
                total_BHN[i] += (q_HSd @ k_BHNd[i].transpose(-1, -2)).softmax(-1).sum(1)
        return total_BHN / q_BHQd.shape[2]


class MLP(nn.Module):
    # Set by performance.execution. fused: mae_kernels.gelu_linear computes GELU and the second
    # layer. keep_gelu: it keeps GELU for the backward, which takes memory and saves time.
    fused = keep_gelu = False

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            h = F.linear(x, self.fc1.weight)
            second = (self.fc2.weight, self.fc2.bias)
            return gelu_linear(h, self.fc1.bias, *second, recompute=not self.keep_gelu)
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; `drop_path` skips a branch per image (stochastic depth, arXiv
    1603.09382).
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, norm_eps: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = drop_path

    def _branch(self, x_BND: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x_BND
        keep = 1.0 - self.drop_path
        return x_BND * (torch.rand(x_BND.shape[0], 1, 1, device=x_BND.device) < keep) / keep

    def forward(self, x_BND: Tensor, select: SelectTokens | None = None) -> Tensor:
        """`select` keeps only the tokens that are used afterwards; the MLP does not compute the
        others.

        It is applied after the attention's projection, where it only changes what the norm loads.
        Before the projection, the gather would move more bytes than projecting the dropped tokens
        costs.
        """
        x_BND = x_BND + self._branch(self.attn(self.norm1(x_BND)))
        if select is not None:
            x_BND = select(x_BND)
        return x_BND + self._branch(self.mlp(self.norm2(x_BND)))


class Blocks(nn.ModuleList):
    """The blocks of an encoder or decoder, and how they are computed.

    residual: dtype of the tokens between blocks under autocast; None does not convert them.
    recompute: wraps the call of a block so that its activations are recomputed in the backward;
    None keeps them. Both are set by performance.execution and change results by rounding at most.
    """

    residual: torch.dtype | None = None
    recompute: Callable[..., Tensor] | None = None

    def forward(self, x_BND: Tensor, select: SelectTokens | None = None, skip: int = 0) -> Tensor:
        """All blocks but the last `skip`, in order; `select` is applied in the last block."""
        if self.residual is not None:
            x_BND = x_BND.to(self.residual)
        recompute = self.recompute if torch.is_grad_enabled() else None
        for i, block in enumerate(list(self)[: len(self) - skip]):
            kept = select if i == len(self) - 1 else None
            x_BND = block(x_BND, kept) if recompute is None else recompute(block, x_BND, kept)
        return x_BND


class PatchEmbed(nn.Module):
    """The parameters of the patch projection `proj`, which mae_kernels.embed_patches applies."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)


class Encoder(nn.Module):
    """ViT encoder over the visible patches, or over all of them."""

    def __init__(
        self, config: ModelConfig, *, final_norm: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        width, depth, heads = config.encoder_shape
        self.patch_size = config.patch_size
        self.grid = config.grid
        self.in_channels = config.in_channels
        self.image_size = config.image_size
        self.num_prefix = int(config.cls_token)
        self.width = width
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.cls_token else None
        self.pos_embed = nn.Parameter(
            sincos_positions(width, config.grid, self.num_prefix), requires_grad=False
        )
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = Blocks(
            Block(width, heads, config.mlp_ratio, config.norm_eps, drop_path=rate) for rate in rates
        )
        self.norm: nn.Module = (
            nn.LayerNorm(width, eps=config.norm_eps) if final_norm else nn.Identity()
        )
        # Plain numbers, not buffers: they belong to the data and stay exact in a half-precision
        # model.
        self.mean = config.mean * (config.in_channels // len(config.mean))
        self.std = config.std * (config.in_channels // len(config.std))

    def tokens(self, images_BCHW: Tensor, ids_BK: Tensor | None) -> Tensor:
        """[B, p+K, D] input of the first block. `ids` None = all patches in order."""
        needed = (self.in_channels, *self.image_size)
        if tuple(images_BCHW.shape[1:]) != needed:
            raise ValueError(
                f"images have shape {tuple(images_BCHW.shape)}, the model needs [B, {needed[0]}, "
                f"{needed[1]}, {needed[2]}]; resize them or set model.image_size and "
                "model.in_channels"
            )
        B, p = images_BCHW.shape[0], self.num_prefix
        if ids_BK is None:
            patches_L = torch.arange(self.grid[0] * self.grid[1], device=images_BCHW.device)
            ids_BK = patches_L.expand(B, -1)
        proj, pos_LD = self.patch_embed.proj, self.pos_embed[p:]
        mean, std = (self.mean, self.std) if images_BCHW.dtype == torch.uint8 else (None, None)
        x_BKD = embed_patches(
            images_BCHW, ids_BK, proj.weight, proj.bias, pos_LD, mean=mean, std=std
        )
        if self.cls_token is None:
            return x_BKD
        cls_B1D = (self.cls_token + self.pos_embed[:p]).expand(B, -1, -1)
        return torch.cat([cls_B1D.to(x_BKD.dtype), x_BKD], 1)

    def forward(
        self, images_BCHW: Tensor, ids_BK: Tensor | None = None, select: SelectTokens | None = None
    ) -> Tensor:
        """[B, p+K, D] tokens after the final norm, or only those that `select` keeps.

        Images are uint8 (normalised here with mean and std) or floats that are normalised already.
        """
        out: Tensor = self.norm(self.blocks(self.tokens(images_BCHW, ids_BK), select))
        return out

    @torch.no_grad()
    def attention_maps(self, images_BCHW: Tensor, *, cls: bool = True) -> Tensor:
        """[B, H, L] attention to each patch in the last block: that of the class token; without
        one, or with cls=False (a classifier of the mean token), the mean over the patches'.
        """
        x_BND, p = self.blocks(self.tokens(images_BCHW, None), skip=1), self.num_prefix
        last = self.blocks[-1]
        assert isinstance(last, Block)
        queries = slice(0, 1) if cls and p else slice(p, None)
        return last.attn.probabilities(last.norm1(x_BND), queries)[:, :, p:]


class Decoder(nn.Module):
    """Restores the full sequence with mask tokens and predicts pixels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.num_prefix = int(config.cls_token)
        self.embed = nn.Linear(config.encoder_shape[0], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(
            sincos_positions(width, config.grid, self.num_prefix), requires_grad=False
        )
        self.blocks = Blocks(
            Block(width, config.decoder_heads, config.mlp_ratio, config.norm_eps)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pred = nn.Linear(width, config.patch_size**2 * config.in_channels)

    def forward(
        self, x_BND: Tensor, ids_restore_BL: Tensor, select: SelectTokens | None = None
    ) -> Tensor:
        """[B, p+K, D] encoder output -> [B, L, E] patch tokens in image order, before the final
        norm.

        With `select`: the tokens that it keeps of [B, p+L, E].
        """
        mask_token_E, p = self.mask_token.flatten(), self.num_prefix
        x_BNE = restore_tokens(
            self.embed(x_BND), ids_restore_BL, mask_token_E, self.pos_embed, prefix=p
        )
        if select is None:  # not `or`: Dynamo of torch 2.11 cannot take the truth of a function
            return self.blocks(x_BNE, lambda y_BNE: y_BNE[:, p:])
        return self.blocks(x_BNE, select)


class MAE(nn.Module):
    """Encoder over the visible patches and decoder over all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(_init)
        _init_tokens(self.encoder)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def forward(self, images_BCHW: Tensor, noise_BL: Tensor, *, teacher: bool = True) -> MAEOutput:
        """`noise` orders the patches: the K smallest stay visible. Only masked patches are
        predicted.

        After the decoder's last attention only the tokens that are used remain: visible, then
        masked patches; without `teacher` only the masked ones, and teacher_BKE is None.
        """
        decoder, K = self.decoder, self.config.num_visible
        masking = random_masking(noise_BL, K)
        ids_masked, rank_BL = masking.ids_masked, masking.ids_restore
        x_BND = self.encoder(images_BCHW, masking.ids_keep)

        def select(y_BNE: Tensor) -> Tensor:
            if not teacher:
                return pick_patches(y_BNE, ids_masked, rank_BL - K)
            return pick_patches(y_BNE, torch.cat([masking.ids_keep, ids_masked], 1), rank_BL)

        y_BLE = decoder(x_BND, rank_BL, select)
        # One norm for each group: its output is then contiguous, as the next layers need it.
        teacher_BKE = decoder.norm(y_BLE[:, :K]) if teacher else None
        pred_BMV = decoder.pred(decoder.norm(y_BLE[:, -ids_masked.shape[1] :]))
        return MAEOutput(pred_BMV, masking, x_BND[:, self.encoder.num_prefix :], teacher_BKE)

    @torch.no_grad()
    def reconstruct(self, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Masking]:
        """([B, L, V] predictions of every patch in image order, masking); for pictures."""
        masking = random_masking(noise_BL, self.config.num_visible)
        y_BLE = self.decoder(self.encoder(images_BCHW, masking.ids_keep), masking.ids_restore)
        return self.decoder.pred(self.decoder.norm(y_BLE)), masking


class Classifier(nn.Module):
    """Encoder over all patches, pooled, with a linear head.

    In training, a random fraction `patch_drop` of the patches of each image is left out
    (PatchDropout, arXiv 2208.07220): a regularisation that also saves time. Parameter names below
    `encoder.` are those of timm's VisionTransformer.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        pool: str = "mean",
        drop_path: float = 0.0,
        patch_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "cls") or (pool == "cls" and not config.cls_token):
            raise ValueError(
                f"pool is {pool!r}, needs 'mean', or 'cls' if the model has a cls token"
            )
        self.config = config
        self.pool = pool
        self.num_classes = num_classes
        L = config.num_patches
        self.kept = max(1, L - int(L * patch_drop))  # patches of an image in a training step
        self.encoder = Encoder(config, final_norm=pool == "cls", drop_path=drop_path)
        self.encoder.pos_embed.requires_grad_(True)  # as in facebookresearch/mae's fine-tuning
        width = config.encoder_shape[0]
        self.fc_norm: nn.Module = (
            nn.LayerNorm(width, eps=config.norm_eps) if pool == "mean" else nn.Identity()
        )
        self.head = nn.Linear(width, num_classes)
        self.apply(_init)
        _init_tokens(self.encoder)
        # As in MAE's fine-tuning: logits near zero at the start.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """[B, D] pooled features: mean over the patch tokens, then norm; or the normalised cls
        token.
        """
        used = slice(0, 1) if self.pool == "cls" else slice(self.encoder.num_prefix, None)
        ids_BK = None
        if self.training and self.kept < self.config.num_patches:
            size = len(images_BCHW), self.config.num_patches
            noise_BL = torch.rand(size, device=images_BCHW.device)
            ids_BK = random_masking(noise_BL, self.kept).ids_keep
        x_BND = self.encoder(images_BCHW, ids_BK, select=lambda x_BND: x_BND[:, used])
        pooled_BD = x_BND[:, 0] if self.pool == "cls" else x_BND.mean(1)
        out: Tensor = self.fc_norm(pooled_BD)
        return out

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images_BCHW))
        return logits


def _init(module: nn.Module) -> None:
    """Xavier-uniform linear layers, as facebookresearch/mae; the patch projection like a linear
    layer too.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _init_tokens(encoder: Encoder) -> None:
    if encoder.cls_token is not None:
        nn.init.normal_(encoder.cls_token, std=0.02)
