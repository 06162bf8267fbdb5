"""Scores of a trained classifier: of the images of a run, or of any images.

Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sssd_fast.config import Config, from_dict
from sssd_fast.data.images import SUFFIXES, GreyRange, ImageError, decode_image, to_channels
from sssd_fast.data.layout import list_classes
from sssd_fast.errors import CheckpointError, DataError
from sssd_fast.loaders import Loader
from sssd_fast.loaders.crops import evaluation_crop
from sssd_fast.model import Classifier
from sssd_fast.run.checkpoint import find_checkpoint, load_checkpoint
from sssd_fast.run.device import World, autocast, pick_precision
from sssd_fast.run.files import atomic_write_bytes


@dataclass
class Trained:
    """A classifier loaded from a checkpoint."""

    model: Classifier
    config: Config
    classes: list[str]
    path: Path
    grey_range: GreyRange | None = None  # of 16-bit images


def load_trained(path: str | Path, device: torch.device) -> Trained:
    """Raises CheckpointError if the checkpoint is damaged or does not hold a classifier."""
    path = find_checkpoint(path)
    state = load_checkpoint(path)
    if state.get("task") not in ("finetune", "probe"):
        raise CheckpointError(
            f"{path} is a checkpoint of `{state.get('task')}`, needs one of `finetune` or `probe`; "
            f"make one with: sssd-fast finetune --init {path.parent.parent}"
        )
    config, classes = from_dict(state["config"]), list(state["classes"])
    model = Classifier(config.model, len(classes), state["pool"])
    model.load_state_dict(state["model"])
    grey_range = state.get("grey_range")
    return Trained(model.to(device).eval(), config, classes, path, grey_range)


# part of the image's area, and whether the corner is at the bottom and at the right
CORNER_AREA = 0.85
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def logits_of(model: nn.Module, images_BCHW: Tensor, crops: int) -> Tensor:
    """[B, classes] logits; with 5 crops the logarithm of the mean softmax score over the images and
    their corners.

    Source: the averaging over crops of Krizhevsky et al., NeurIPS 2012, section 4.1.
    """
    logits_BC: Tensor = model(images_BCHW)
    if crops == 1:
        return logits_BC
    views = [logits_BC, *(model(corner(images_BCHW, *place)) for place in CORNERS)]
    logs = torch.stack([view.float().log_softmax(1) for view in views])
    return logs.logsumexp(0) - math.log(len(views))


def corner(images_BCHW: Tensor, down: int, right: int) -> Tensor:
    """[B, C, H, W] uint8 images -> one corner of each, CORNER_AREA of it, resized to [H, W]."""
    height, width = images_BCHW.shape[2:]
    h, w = round(height * CORNER_AREA**0.5), round(width * CORNER_AREA**0.5)
    top, left = down * (height - h), right * (width - w)
    cut = images_BCHW[:, :, top : top + h, left : left + w].float()
    cut = F.interpolate(cut, size=(height, width), mode="bicubic", antialias=True)
    return cut.round().clamp(0, 255).to(images_BCHW.dtype)


def predict_files(
    trained: Trained, inputs: Sequence[Path | NDArray[np.uint8]], *, batch_size: int, precision: str
) -> tuple[NDArray[np.float64], dict[int, str]]:
    """[N, classes] scores of files or [H, W] or [H, W, 3] arrays.

    Rows of files that cannot be read are NaN and listed with the reason.
    """
    config, device = trained.config, next(trained.model.parameters()).device
    context = autocast(pick_precision(precision, device), device)
    scores = np.full((len(inputs), len(trained.classes)), np.nan)
    bad: dict[int, str] = {}
    for start in range(0, len(inputs), batch_size):
        images: dict[int, Tensor] = {}
        for row, image in enumerate(inputs[start : start + batch_size], start):
            try:
                if isinstance(image, Path):
                    image = decode_image(image, trained.grey_range)
                picture = to_channels(image, config.model.in_channels)
            except (DataError, OSError) as error:
                bad[row] = error.reason if isinstance(error, ImageError) else str(error)
                continue
            view = evaluation_crop(picture, config.model.image_size, config.data.fit)
            # a copy, since decoded images may be read-only; [H, W] or [H, W, C] -> [C, H, W]
            images[row] = torch.tensor(np.atleast_3d(view)).permute(2, 0, 1).contiguous()
        if images:
            with torch.no_grad(), context:
                stacked = torch.stack(list(images.values())).to(device)
                logits = logits_of(trained.model, stacked, config.evaluate.crops)
            scores[list(images)] = logits.double().softmax(1).cpu().numpy()
    return scores, bad


def find_images(targets: Sequence[str], notes: list[str]) -> list[Path]:
    """Image files, and those in folders by the rules of `check_data`, sorted; `notes` receives what
    was ignored. Raises DataError if there are none.
    """
    found: list[Path] = []
    for target in map(Path, targets):
        if not target.exists():
            raise DataError(f"{target} does not exist; give image files or folders")
        if target.is_dir():
            rows = list_classes(target, tuple(SUFFIXES), notes, labelled=False)
            found += [target / row["path"] for row in rows]
        else:
            found.append(target)
    return found


def write_predictions(
    out: Path,
    classes: Sequence[str],
    paths: Sequence[Path],
    scores: NDArray[np.float64],
    slices: Sequence[str] = (),
) -> None:
    """CSV path[,slice],prediction,score_CLASS...; empty cells where a file could not be read.

    slices: with volumes, the number of each row's slice, "mean" or "max" over them, "" of an image.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [f"score_{name}" for name in classes]
    writer.writerow(["path", *(["slice"] if slices else []), "prediction", *names])
    for number, (path, row) in enumerate(zip(paths, scores, strict=True)):
        place = [slices[number]] if slices else []
        known = bool(np.isfinite(row).all())
        cells = [f"{value:.9g}" for value in row] if known else [""] * len(row)
        # the largest scores of the classes are of different slices
        label = classes[int(row.argmax())] if known and place != ["max"] else ""
        writer.writerow([str(path), *place, label, *cells])
    # a file name keeps its bytes
    atomic_write_bytes(out, text.getvalue().encode("utf-8", "surrogateescape"))


def predict(
    model: nn.Module,
    loader: Loader,
    ids: Sequence[int],
    num_classes: int,
    world: World,
    autocast: torch.autocast,
    crops: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels [N] and softmax scores [N, classes] of the images `ids`, from all processes."""
    training = model.training
    model.eval()
    labels_N, logits_NC = outputs(
        lambda images: logits_of(model, images, crops), loader, ids, num_classes, world, autocast
    )
    model.train(training)
    if not torch.isfinite(logits_NC).all():
        raise DataError(
            "the model's scores are not finite; the checkpoint is unusable, or fp16 overflows "
            "(try precision=fp32)"
        )
    return labels_N.numpy(), logits_NC.softmax(1).numpy()


@torch.no_grad()
def outputs(
    function: Callable[[Tensor], Tensor],
    loader: Loader,
    ids: Sequence[int],
    width: int,
    world: World,
    autocast: torch.autocast,
) -> tuple[Tensor, Tensor]:
    """Labels [N] and fp64 values [N, width] of `function` for the images `ids`, on the CPU."""
    row_of = {image: row for row, image in enumerate(ids)}
    values_NX = torch.zeros(len(ids), width, device=world.device)
    labels_N = torch.zeros(len(ids), device=world.device, dtype=torch.int64)
    for batch in loader.epoch(0):
        count = batch.count
        found = [row_of[i] for i in batch.indices[:count].tolist()]
        rows = torch.tensor(found, dtype=torch.int64, device=world.device)
        with autocast:
            values = function(batch.images)
        values_NX[rows] = values[:count].float()
        labels_N[rows] = batch.labels[:count]
    # every image belongs to one process, the other rows are 0
    world.sum_(values_NX)
    world.sum_(labels_N)
    return labels_N.cpu(), values_NX.double().cpu()
