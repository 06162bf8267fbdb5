"""Whether the self-distillation still compares something: measured on the validation images.

A distillation without a counterforce collapses: student and teacher agree on one output for every
image, the loss goes to 0, and what is left is a plain masked autoencoder.

Shapes: R rows (images, or tokens of a loss per token), S features or prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Collapsed runs end at a rank of 1.07 to 1.13 and an entropy of 0, the other forms stay above 1.6
# and 0.9 (docs/self-distillation.md).
MIN_RANK = 1.5
MIN_ENTROPY = 0.02
# At most so many rows are compared, evenly spaced: it bounds the time of the singular values, and
# the memory of a loss per token.
ROWS = 512


def evenly(x_RS: Tensor, rows: int) -> Tensor:
    """At most `rows` rows of x, evenly spaced."""
    return x_RS[:: max(1, -(-len(x_RS) // rows))]


def effective_rank(features_RS: Tensor) -> float:
    """exp(entropy of the normalised singular values): from 1 (all rows are multiples of one) to
    min(R, S).

    Source: Roy and Vetterli, EUSIPCO 2007; as a monitor of collapse Garrido et al., RankMe, arXiv
    2210.02885, eq. 1. Not finite: NaN.
    """
    x_RS = evenly(features_RS, ROWS).double()
    if not bool(torch.isfinite(x_RS).all()):
        return math.nan
    values = torch.linalg.svdvals(x_RS)
    p = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(p).sum().exp())


def mean_entropy(assigned_RS: Tensor) -> float:
    """Entropy of the mean assignment to the prototypes, as a fraction of its largest value log(S):
    0 = one prototype takes everything, 1 = all are used equally.
    """
    mean_S = assigned_RS.double().mean(0)
    return float(torch.special.entr(mean_S).sum() / math.log(len(mean_S)))


def information(assigned_RS: Tensor) -> float:
    """Mutual information of image and prototype, as a fraction of log(S): entropy of the mean
    assignment minus mean entropy of the assignments. 0 = the assignment is the same for all images,
    be it to one prototype or to all alike.
    """
    entropy_R = torch.special.entr(assigned_RS.double()).sum(1)
    return mean_entropy(assigned_RS) - float(entropy_R.mean() / math.log(assigned_RS.shape[1]))


def monitor(
    student_RS: Tensor, teacher_RS: Tensor, assigned_RS: Tensor | None = None
) -> dict[str, float]:
    """rank_student and rank_teacher; with prototypes also entropy and information."""
    found = {
        "rank_student": effective_rank(student_RS),
        "rank_teacher": effective_rank(teacher_RS),
    }
    if assigned_RS is not None:
        found["entropy"] = mean_entropy(assigned_RS)
        found["information"] = information(assigned_RS)
    return found


def collapse_warning(metrics: dict[str, float]) -> str | None:
    """One line for the metrics of `monitor` if the distillation has collapsed, else None."""
    reasons = []
    for side in ("student", "teacher"):
        rank = metrics.get(f"rank_{side}", math.inf)
        if rank < MIN_RANK:
            reasons.append(f"the {side}'s outputs have an effective rank of {rank:.2f}")
    entropy = metrics.get("entropy", 1.0)
    if entropy < MIN_ENTROPY:
        reasons.append(f"one prototype takes almost all images (entropy {entropy:.3f} of 1)")
    if not reasons:
        return None
    return (
        f"the self-distillation has collapsed: {'; '.join(reasons)}. The run goes on as a plain "
        "masked autoencoder; another objective.name avoids it (docs/self-distillation.md)"
    )
