"""What a loader returns, and how small arrays are copied to the device without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD_INDEX = -1
PAD_LABEL = -100  # the label that torch's cross_entropy ignores


@dataclass
class Batch:
    """B images. A padded row (evaluation only) has valid False, zero pixels, index -1, label
    -100.
    """

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], record numbers of the DataIndex
    valid: Tensor  # bool [B]

    def __len__(self) -> int:
        return len(self.labels)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies through pinned memory: a copy from pageable memory waits for all earlier GPU work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
