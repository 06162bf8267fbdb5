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
        """[B, D] features: the mean of the patch tokens, or the cls token if tuned with pool "cls".

        Images are uint8 from 0 to 255 or floats from 0 to 1, of size `image_size`. Raises
        ValueError for a wrong shape.
        """
        x_BND = self.tokens(images_BCHW)
        p = self.encoder.num_prefix
        out: Tensor = self.norm(x_BND[:, 0] if self.pool == "cls" else x_BND[:, p:].mean(1))
        return out


def load_model(path: str | Path) -> tuple[MAE | Classifier, Path]:
    """(model in eval mode, its checkpoint) of a run folder or checkpoint.

    An MAE of `pretrain`, a Classifier of `finetune` or `probe`. Raises CheckpointError for a
    missing, damaged or other checkpoint.
    """
    path = find_checkpoint(path)
    state = load_checkpoint(path)
    config, weights = from_dict(state["config"]).model, state["model"]
    model: MAE | Classifier
    if "classes" in state:
        model = Classifier(config, len(state["classes"]), state["pool"])
    else:
        model = MAE(config)
        own = {name: w for name, w in weights.items() if name.startswith("mae.")}
        weights = {name.removeprefix("mae."): w for name, w in own.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the whole model: {error}") from None
    return model.eval(), path


def load_encoder(path: str | Path) -> FeatureExtractor:
    """The encoder of a run folder or checkpoint of `pretrain`, `finetune` or `probe`, in eval mode.

    Raises CheckpointError for a missing or damaged checkpoint.
    """
    model, _ = load_model(path)
    if isinstance(model, Classifier):
        return FeatureExtractor(model.encoder, model.fc_norm, model.pool).eval()
    return FeatureExtractor(model.encoder, nn.Identity(), "mean").eval()
