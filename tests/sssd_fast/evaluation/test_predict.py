"""Averaging of scores over crops, by hand."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sssd_fast.evaluation.predict import logits_of


class _Spy(nn.Module):
    """Keeps the images it gets; logits from the mean grey value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.seen.append(images_BCHW)
        x_B = images_BCHW.float().mean((1, 2, 3)) / 40
        return torch.stack([x_B, 3 - x_B], 1)


def test_five_crops_are_the_image_and_its_corners() -> None:
    """Corners of 85 % of the area against Pillow's cut and resize; the mean of softmax scores."""
    images = torch.randint(0, 256, (3, 1, 40, 60), dtype=torch.uint8)
    images = (images // 8 + torch.linspace(0, 200, 60).to(torch.uint8)).contiguous()
    spy = _Spy()
    logits = logits_of(spy, images, 5)
    assert len(spy.seen) == 5
    assert torch.equal(spy.seen[0], images)
    boxes = [(0, 0, 55, 37), (5, 0, 60, 37), (0, 3, 55, 40), (5, 3, 60, 40)]
    for view, box in zip(spy.seen[1:], boxes, strict=True):
        assert view.dtype == torch.uint8
        for got, image in zip(view, images, strict=True):
            cut = (
                Image.fromarray(image[0].numpy())
                .crop(box)
                .resize((60, 40), Image.Resampling.BICUBIC)
            )
            difference = np.abs(got[0].numpy().astype(int) - np.asarray(cut).astype(int))
            assert difference.max() <= 1  # Pillow rounds after each direction
    scores = torch.stack([_Spy()(view).softmax(1) for view in spy.seen]).mean(0)
    torch.testing.assert_close(logits.softmax(1), scores)
    assert torch.equal(logits_of(_Spy(), images, 1), _Spy()(images))
