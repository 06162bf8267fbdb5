"""The encoder of a run as a module for other code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sssd_fast.config import from_dict
from sssd_fast.errors import CheckpointError
from sssd_fast.model import Classifier, Encoder
from sssd_fast.run.checkpoint import find_checkpoint, load_checkpoint

PRETRAINED = "mae.encoder."


class FeatureExtractor(nn.Module):
    """A vision transformer that maps images to features; it normalises the images itself.

    Attributes:
        width: D, the number of features.
        image_size: (height, width) of the images in pixels.
        in_channels: C.
        mean, std: [C, 1, 1] buffers, statistics of pixel / 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, norm: nn.Module, pool: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = norm
        self.pool = pool
        self.width = encoder.width
        self.image_size = encoder.image_size
        self.in_channels = encoder.in_channels
        self.register_buffer("mean", torch.tensor(encoder.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(encoder.std).view(-1, 1, 1), persistent=False)

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """[B, p+L, D] tokens of the last block, with its norm if the encoder has one.

        p = 1 cls token, or 0; L patches in row-major order. Images as in `forward`.
        """
        if images_BCHW.is_floating_point():
            images_BCHW = (images_BCHW - self.mean) / self.std
        out: Tensor = self.encoder(images_BCHW)
        return out

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, D] features: mean of the patch tokens, or the cls token if the model was tuned so.

        Args:
            images_BCHW: uint8 from 0 to 255, or floats from 0 to 1, of size `image_size`.

        Raises:
            ValueError: wrong shape.
        """
        x_BND = self.tokens(images_BCHW)
        pooled_BD = (
            x_BND[:, 0] if self.pool == "cls" else x_BND[:, self.encoder.num_prefix :].mean(1)
        )
        out: Tensor = self.norm(pooled_BD)
        return out


def load_encoder(path: str | Path) -> FeatureExtractor:
    """The encoder of a run folder or checkpoint of `pretrain`, `finetune` or `probe`, in eval mode.

    Raises CheckpointError for a missing or damaged checkpoint.
    """
    path = find_checkpoint(path)
    state = load_checkpoint(path)
    config, weights = from_dict(state["config"]), state["model"]
    if "classes" in state:
        model = Classifier(config.model, len(state["classes"]), state["pool"])
        model.load_state_dict(weights)
        return FeatureExtractor(model.encoder, model.fc_norm, model.pool).eval()
    encoder = Encoder(config.model)
    own = {name[len(PRETRAINED) :]: w for name, w in weights.items() if name.startswith(PRETRAINED)}
    if not own:
        raise CheckpointError(f"{path} holds no encoder; give a checkpoint of sssd-fast pretrain")
    encoder.load_state_dict(own)
    return FeatureExtractor(encoder, nn.Identity(), "mean").eval()
