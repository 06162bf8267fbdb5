"""Add a loss term to the pre-training objective by subclassing.

    python examples/custom_loss.py --out runs/variance

The term is VICReg's variance hinge (arXiv 2105.04906, eq. 1) on the student's features. Without it,
the distillation term of the published SSSD loss can become zero by mapping every image to the same
features (collapse).
"""

from __future__ import annotations

import argparse

from torch import Tensor
from torch.nn import functional as F

import sssd_fast as sf
from sssd_fast.model import MAEOutput
from sssd_fast.objective import SSSD, SSSDOutput

WEIGHT = 0.1


class VarianceSSSD(SSSD):
    """SSSD + 0.1 * mean_d max(0, 1 - std_B(feature d)). Its name appears in metrics and log."""

    loss_names = (*SSSD.loss_names, "variance")

    def compute_losses(self, out: MAEOutput, images_BCHW: Tensor) -> SSSDOutput:
        result = super().compute_losses(out, images_BCHW)
        features_BD = out.student_BKD.float().mean(1)
        std_D = (features_BD.var(0, unbiased=False) + 1e-4).sqrt()
        variance = F.relu(1 - std_D).mean()
        return result._replace(
            total=result.total + WEIGHT * variance,
            losses={**result.losses, "variance": variance.detach()},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--config", default="cpu_smoke")
    parser.add_argument("--out", default="runs/custom_loss")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    sf.pretrain(
        args.data,
        config=args.config,
        settings=args.set,
        out=args.out,
        overwrite=True,
        objective=VarianceSSSD,
    )


if __name__ == "__main__":
    main()
