"""Pixel values of a masked autoencoder's predictions, without a look at the answer.

The model is trained to predict each patch minus its mean, divided by its deviation. To show a prediction, both have to come back; taking
them from the masked patch itself would give away its brightness and contrast. Here they are fitted to visible pixels only.
Shapes: n images, C channels, L = rows * cols patches, P patch side, E values along one edge of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sssd_fast.errors import DataError

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Statistics = Literal["visible", "target"]
Norm = Literal["patch", "channel", "none"]

PRIOR = 0.01  # weight of the interpolated statistics against one joining edge
STATISTICS_TEXT = {
    "visible": "brightness and contrast of masked patches are fitted to the visible pixels; masked pixels are not used",
    "target": "uses target statistics: brightness and contrast of masked patches are taken from the answer",
}


def unnormalise(
    pred: Any,
    images: Any,
    mask: Any,
    patch_size: int,
    statistics: Statistics = "visible",
    *,
    norm: Norm = "patch",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    eps: float = 1e-6,
) -> Floats:
    """Predictions as pixel values 0..255 (not clipped), [n, L, P*P*C] in (row, column, channel) order; visible rows are 0.

    pred [n, L, P*P*C] is in the space of the training target: (x / 255 - mean) / std, then, for norm "patch" or "channel", minus the
    patch's mean and divided by its sqrt(unbiased variance + eps) (He et al. 2022, section 4.2). mask [n, L] bool, True = masked.

    statistics="visible" never reads a masked pixel. Mean and deviation of masked patches are chosen so that neighbouring patches join
    up, starting from the visible ones: least squares over all edges, with a weak pull to the statistics of the visible patches around,
    weighted by 1 / distance^4. statistics="target" takes both from the answer and must be asked for.
    Raises DataError for shapes that do not fit, or an image without any visible patch.
    """
    images_nCHW = uint8_images(images)
    mask_nL = np.asarray(as_array(mask), dtype=bool)
    pred_nLX = as_array(pred).astype(np.float64)
    n, channels = images_nCHW.shape[:2]
    rows, cols = _grid(images_nCHW, patch_size)
    if statistics not in STATISTICS_TEXT:
        raise DataError(
            f"statistics is {statistics!r}; give 'visible', or 'target' to use the answer's own statistics"
        )
    for name, got, need in (
        ("pred", pred_nLX.shape, (n, rows * cols, patch_size**2 * channels)),
        ("mask", mask_nL.shape, (n, rows * cols)),
    ):
        if got != need:
            raise DataError(
                f"{name}: got shape {list(got)}, need {list(need)} for these images and patch size {patch_size}"
            )
    if not np.isfinite(pred_nLX).all():
        raise DataError(
            "pred: some values are not finite; the model has diverged, so there is nothing to show"
        )
    scale = 255 * np.asarray(std, dtype=np.float64)
    shift = 255 * np.asarray(mean, dtype=np.float64)
    pred_nLSC = pred_nLX.reshape(n, rows * cols, patch_size**2, channels)
    if norm != "none":
        known_nLSC = (patchify(images_nCHW, patch_size).reshape(pred_nLSC.shape) - shift) / scale
        axes = (2, 3) if norm == "patch" else 2
        center = known_nLSC.mean(axis=axes, keepdims=True)
        spread = np.sqrt(known_nLSC.var(axis=axes, ddof=1, keepdims=True) + eps)
        if statistics == "visible":
            center, spread = _joined(pred_nLSC, known_nLSC, mask_nL, center, spread, (rows, cols))
        pred_nLSC = pred_nLSC * spread + center
    values_nLX = (pred_nLSC * scale + shift).reshape(pred_nLX.shape)
    return np.where(mask_nL[:, :, None], values_nLX, 0.0)


def patchify(images_nCHW: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """[n, C, H, W] -> [n, L, P*P*C], pixels of a patch in (row, column, channel) order."""
    n, channels = images_nCHW.shape[:2]
    rows, cols = _grid(images_nCHW, patch_size)
    cells = images_nCHW.reshape(n, channels, rows, patch_size, cols, patch_size)
    return cells.transpose(0, 2, 4, 3, 5, 1).reshape(n, rows * cols, patch_size**2 * channels)


def unpatchify(patches_nLX: NDArray[Any], shape: tuple[int, ...], patch_size: int) -> NDArray[Any]:
    """Inverse of `patchify` for images of `shape` [n, C, H, W], as [n, H, W, C]."""
    n, channels, height, width = shape
    cells = patches_nLX.reshape(
        n, height // patch_size, width // patch_size, patch_size, patch_size, channels
    )
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, channels)


def _joined(
    pred_nLSC: Floats,
    known_nLSC: Floats,
    mask_nL: NDArray[np.bool_],
    center: Floats,
    spread: Floats,
    grid: tuple[int, int],
) -> tuple[Floats, Floats]:
    """Mean and deviation per patch (and channel, as in `center`) of masked patches, from visible pixels and the prediction."""
    center, spread = (_from_visible(value, mask_nL, grid) for value in (center, spread))
    n, num_patches, area, channels = pred_nLSC.shape
    side = int(np.sqrt(area))
    per_channel = center.shape[3]  # 1: all channels of a patch share their statistics
    shape = (n, *grid, side, side, per_channel, channels // per_channel)

    def problems(value: Floats) -> Floats:
        """[n * statistics per patch, rows, cols, side, side, channels that share them]"""
        return np.moveaxis(value.reshape(shape), 5, 1).reshape(
            -1, *grid, side, side, channels // per_channel
        )

    mask = np.repeat(mask_nL.reshape(n, 1, *grid), per_channel, axis=1).reshape(-1, *grid)
    prior = np.stack([spread, center], axis=-1).reshape(n, *grid, per_channel, 2)
    prior = np.moveaxis(prior, 3, 1).reshape(-1, *grid, 2)
    fitted = _join(problems(pred_nLSC), problems(known_nLSC), mask, prior)
    fitted = np.moveaxis(fitted.reshape(n, per_channel, *grid, 2), 1, 3).reshape(
        n, num_patches, 1, per_channel, 2
    )
    return fitted[..., 1], np.maximum(fitted[..., 0], 0.0)


def _join(pred: Floats, known: Floats, mask: NDArray[np.bool_], prior: Floats) -> Floats:
    """[n, rows, cols, 2] (deviation, mean): minimises sum over edges of mean (value - neighbour's value)^2 + PRIOR * |x - prior|^2.

    The normal equations couple each patch with its right and lower neighbour by 2 x 2 blocks; solved by conjugate gradients.
    """
    own = np.broadcast_to(PRIOR * np.eye(2), (*prior.shape, 2)).copy()
    rhs = PRIOR * prior
    couplings = []
    # per direction: the edge of a patch, the edge of the neighbour it touches, and where both lie in the grid
    for edge, touching, first, second in (
        (np.s_[..., :, -1, :], np.s_[..., :, 0, :], np.s_[:, :, :-1], np.s_[:, :, 1:]),
        (np.s_[..., -1, :, :], np.s_[..., 0, :, :], np.s_[:, :-1], np.s_[:, 1:]),
    ):
        basis_1, fixed_1 = _edge(pred[first], known[first], mask[first], edge)
        basis_2, fixed_2 = _edge(pred[second], known[second], mask[second], touching)
        gap = fixed_2 - fixed_1
        own[first] += np.einsum("...ea,...eb->...ab", basis_1, basis_1) / gap.shape[-1]
        own[second] += np.einsum("...ea,...eb->...ab", basis_2, basis_2) / gap.shape[-1]
        rhs[first] += np.einsum("...ea,...e->...a", basis_1, gap) / gap.shape[-1]
        rhs[second] -= np.einsum("...ea,...e->...a", basis_2, gap) / gap.shape[-1]
        couplings.append(
            (first, second, -np.einsum("...ea,...eb->...ab", basis_1, basis_2) / gap.shape[-1])
        )

    def times(x: Floats) -> Floats:
        y = np.einsum("...ab,...b->...a", own, x)
        for first, second, block in couplings:
            y[first] += np.einsum("...ab,...b->...a", block, x[second])
            y[second] += np.einsum("...ab,...a->...b", block, x[first])
        return y

    inverse = np.linalg.inv(own)
    x = prior.copy()
    residual = rhs - times(x)
    step = conditioned = np.einsum("...ab,...b->...a", inverse, residual)
    energy = (residual * conditioned).sum(axis=(1, 2, 3), keepdims=True)
    start = np.maximum(energy, 1e-300)
    for _ in range(1000):  # an upper bound; some 50 are usual
        if (energy <= 1e-16 * start).all():
            break
        image = times(step)
        rate = energy / np.maximum((step * image).sum(axis=(1, 2, 3), keepdims=True), 1e-300)
        x, residual = x + rate * step, residual - rate * image
        conditioned = np.einsum("...ab,...b->...a", inverse, residual)
        previous = energy
        energy = (residual * conditioned).sum(axis=(1, 2, 3), keepdims=True)
        step = conditioned + energy / np.maximum(previous, 1e-300) * step
    return x


def _edge(pred: Floats, known: Floats, mask: NDArray[np.bool_], edge: Any) -> tuple[Floats, Floats]:
    """Values along an edge are basis @ (deviation, mean) + fixed: basis [..., E, 2] is 0 where visible, fixed [..., E] where masked."""
    lead = mask.shape
    shown = pred[edge].reshape(*lead, -1)
    basis = np.stack([shown, np.ones_like(shown)], axis=-1) * mask[..., None, None]
    return basis, np.where(mask[..., None], 0.0, known[edge].reshape(*lead, -1))


def _from_visible(value_nL1C: Floats, mask_nL: NDArray[np.bool_], grid: tuple[int, int]) -> Floats:
    """Mean of the visible patches' values, weighted by 1 / distance^4 (a patch counts itself as one patch away)."""
    if mask_nL.all(axis=1).any():
        raise DataError(
            "mask: an image has no visible patch, so its statistics cannot be estimated; mask fewer patches"
        )
    place_L2 = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1)
    squared_LL = ((place_L2[:, None] - place_L2[None]) ** 2).sum(axis=2).astype(np.float64)
    weight_LL = np.maximum(squared_LL, 1.0) ** -2
    shown_nLX = np.where(mask_nL[:, :, None], 0.0, value_nL1C.reshape(*mask_nL.shape, -1))
    sums_nLX = weight_LL @ shown_nLX
    totals_nL1 = weight_LL @ (~mask_nL[:, :, None]).astype(np.float64)
    return np.asarray((sums_nLX / totals_nL1).reshape(value_nL1C.shape))


def as_array(value: Any) -> NDArray[Any]:
    """numpy array of an array or of a torch tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def uint8_images(images: Any) -> Bytes:
    array = as_array(images)
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[1] not in (1, 3):
        raise DataError(
            f"images: got {array.dtype} of shape {list(array.shape)}, need uint8 [n, C, H, W] with C = 1 or 3"
        )
    return array


def _grid(images_nCHW: NDArray[Any], patch_size: int) -> tuple[int, int]:
    height, width = images_nCHW.shape[2:]
    if height % patch_size or width % patch_size:
        raise DataError(
            f"images of {height} x {width} pixels cannot be cut into patches of {patch_size}"
        )
    return height // patch_size, width // patch_size
