"""The model of a run, and its encoder as a module for other code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sssd_fast.config import from_dict
from sssd_fast.errors import CheckpointError
from sssd_fast.model import MAE, Classifier, Encoder
from sssd_fast.run.checkpoint import find_checkpoint, load_checkpoint


class FeatureExtractor(nn.Module):
    """A vision transformer that maps images to features; it normalises the images itself.

    width: D, the number of features. image_size: (height, width) in pixels. in_channels: C.
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

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, D] features: the mean of the patch tokens, or the cls token if tuned with pool "cls".

        Images [B, C, *image_size] are uint8 from 0 to 255 or floats from 0 to 1. Raises ValueError.
        """
        if images_BCHW.is_floating_point():
            images_BCHW = (images_BCHW - self.mean) / self.std
        x_BND = self.encoder(images_BCHW)
        p = self.encoder.num_prefix
        out: Tensor = self.norm(x_BND[:, 0] if self.pool == "cls" else x_BND[:, p:].mean(1))
        return out


def load_model(path: str | Path) -> tuple[MAE | Classifier, Path]:
    """(model in eval mode, its checkpoint) of a run folder or checkpoint: an MAE of `pretrain`, a
    Classifier of `finetune` or `probe`. Raises CheckpointError.
    """
    path = find_checkpoint(path)
    state = load_checkpoint(path)
    config, weights = from_dict(state["config"]).model, state["model"]
    model: MAE | Classifier
    if "classes" in state:
        model = Classifier(config, len(state["classes"]), state["pool"])
    else:
        model = MAE(config)
        weights = {name[4:]: w for name, w in weights.items() if name.startswith("mae.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the whole model: {error}") from None
    return model.eval(), path


def load_encoder(path: str | Path) -> FeatureExtractor:
    """The encoder of a run folder or checkpoint in eval mode; raises CheckpointError."""
    model, _ = load_model(path)
    if isinstance(model, Classifier):
        return FeatureExtractor(model.encoder, model.fc_norm, model.pool).eval()
    return FeatureExtractor(model.encoder, nn.Identity(), "mean").eval()
