"""What a loader hands over, and how small arrays get to the device without a wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD_INDEX = -1
PAD_LABEL = -100  # what torch's cross_entropy ignores


@dataclass
class Batch:
    """B images. A padded row (evaluation only) has valid False, zero pixels, index -1 and label -100."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], record numbers of the DataIndex
    valid: Tensor  # bool [B]

    def __len__(self) -> int:
        return len(self.labels)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory, because a copy from other memory waits until the device has done everything before it."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )
