"""Pre-training: reconstruct masked patches and distil the decoder into the encoder, without
labels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sssd_fast.config import PretrainConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.data.split import Split
from sssd_fast.evaluation.collapse import ROWS, collapse_warning, evenly, monitor
from sssd_fast.evaluation.pictures import (
    MAX_EPOCHS,
    attention_picture,
    reconstruction_picture,
)
from sssd_fast.loaders import Batch, Loader
from sssd_fast.loaders.prepare import make_loader, prepare_data, pretraining_images
from sssd_fast.objective import SSSD, SSSDOutput
from sssd_fast.optim import parameter_groups
from sssd_fast.run.device import generator
from sssd_fast.run.folder import Run
from sssd_fast.step import Step, TaskLoss
from sssd_fast.train import Progress, fit
from sssd_fast.weights.files import Norm
from sssd_fast.weights.load import load_into

VALIDATION_SEED = 2**31  # masks of the validation images, the same in every epoch
PICTURED_IMAGES = 8


class PretrainTask:
    """The Task of `fit` for SSSD.

    The best checkpoint has the lowest reconstruction loss on the validation images, whose masks
    never change. The loss of a distillation says little: it can grow while the teacher improves.
    """

    name = "pretrain"
    best = ("loss_reconstruction", False)

    def __init__(
        self, run: Run, index: DataIndex, split: Split, objective: type[SSSD] = SSSD
    ) -> None:
        config = run.config
        self.run = run
        self.settings: PretrainConfig = config.pretrain
        torch.manual_seed(config.seed)
        self.module = objective(config.model, config.objective).to(run.world.device)
        self.collapsed = False
        self.val_loader: Loader | None = None
        if split.val:
            size = run.local_batch(self.settings.batch_size)
            self.val_loader = make_loader(run, index, split.val, batch_size=size)
        shown = (split.val or split.train)[:PICTURED_IMAGES]
        self.pictured_names = [index.records[i].path for i in shown]
        self.pictured = make_loader(run, index, shown, batch_size=len(shown), shard=False)

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.module, weight_decay=self.settings.weight_decay)

    def loss(self, module: nn.Module, batch: Batch, step: int, micro: int) -> TaskLoss:
        noise = self._noise(len(batch.images), self.run.config.seed, step, micro)
        out: SSSDOutput = module(batch.images, noise)
        return TaskLoss(out.total, _named(out), out.batch_center)

    def update_state(self, batch_stats: Tensor, finite: Tensor) -> None:
        self.module.update_center(batch_stats, finite)

    def end_epoch(self, epoch: int, last: bool, step: Step) -> dict[str, float]:
        every, epochs = self.settings.image_epochs, self.settings.epochs
        sheet = last or (every > 0 and epoch % every == 0)
        # kept for the rows of the last picture
        row = epoch in [math.ceil(epochs * k / MAX_EPOCHS) for k in range(1, MAX_EPOCHS)]
        if self.run.world.main and (sheet or row):
            with self.run.console.doing("drawing reconstructions"):
                self._draw(epoch, step, sheet)
        due = last or epoch % self.settings.validate_epochs == 0
        return self._validate(self.val_loader, step) if due and self.val_loader is not None else {}

    def extra_state(self) -> dict[str, Any]:
        return {}

    def _noise(self, images: int, *key: int) -> Tensor:
        """[B, L]: this process's rows of one draw for all processes.

        N processes therefore choose the same masks as one process with N times the batch.
        """
        world = self.run.world
        shape = images * world.size, self.run.config.model.num_patches
        noise = torch.rand(shape, generator=generator(world.device, *key), device=world.device)
        return noise[world.rank :: world.size]

    @torch.no_grad()
    def _validate(self, loader: Loader, step: Step) -> dict[str, float]:
        """Means over the validation images and the monitor of collapse; the centre is not updated.

        The monitor sees the images of the first process.
        """
        world = self.run.world
        # Not taken from an output: a process without validation images computes none.
        names = ["loss", *(f"loss_{name}" for name in self.module.loss_names)]
        sums = torch.zeros(len(names) + 1, device=world.device, dtype=torch.float64)
        compared: list[tuple[Tensor, ...]] = []
        self.module.eval()
        for i, batch in enumerate(loader.epoch(0)):
            noise = self._noise(len(batch.images), VALIDATION_SEED, i)
            if count := batch.count:
                images, noise = batch.images[:count], noise[:count]
                with step.autocast():
                    out = self.module(images, noise)
                terms = (out.losses[name] for name in self.module.loss_names)
                values = [out.total, *terms, torch.ones_like(out.total)]
                sums += torch.stack(values).double() * count
                if out.compared is not None:
                    rows = -(-ROWS // loader.steps_per_epoch)
                    compared.append(tuple(evenly(t, rows) for t in out.compared if t is not None))
        self.module.train()
        world.mean_(sums)
        found = {name: float(sums[i] / sums[-1]) for i, name in enumerate(names)}
        return found | self._monitor(compared)

    def _monitor(self, compared: list[tuple[Tensor, ...]]) -> dict[str, float]:
        if not compared or not self.run.world.main:
            return {}
        student, teacher, *assigned = (torch.cat(parts) for parts in zip(*compared, strict=True))
        found = monitor(student, teacher, *assigned)
        warning = collapse_warning(found)
        if warning is not None and not self.collapsed:
            self.run.console.warn(warning)
        self.collapsed = warning is not None
        return found

    @torch.no_grad()
    def _draw(self, epoch: int, step: Step, sheet: bool) -> None:
        """images/reconstruction-eNNNN.png and attention-eNNNN.png of the first validation images;
        without `sheet` only the row of reconstructions for later pictures.
        """
        model, out = self.run.config.model, self.run.out / "images"
        encoder = self.module.mae.encoder
        images = next(iter(self.pictured.epoch(0))).images
        shape, device = (len(images), model.num_patches), images.device
        noise = torch.rand(shape, generator=generator(device, VALIDATION_SEED), device=device)
        self.module.eval()
        with step.autocast():
            pred, masking = self.module.mae.reconstruct(images, noise)
            attention = encoder.attention_maps(images) if sheet else None
        self.module.train()
        reconstruction_picture(
            images,
            pred.float(),
            masking.mask,
            model.patch_size,
            folder=out,
            epoch=epoch,
            sheet=sheet,
            names=self.pictured_names,
            norm=self.run.config.objective.norm,
            mean=list(encoder.mean),
            std=list(encoder.std),
        )
        if attention is not None:
            attention_picture(
                images,
                attention,
                encoder.grid,
                encoder.num_prefix,
                path=out / f"attention-e{epoch:04d}.png",
                names=self.pictured_names,
            )


def _named(out: SSSDOutput) -> dict[str, Tensor]:
    """The loss terms under the names that metrics.jsonl uses."""
    return {f"loss_{name}": value for name, value in out.losses.items()}


def pretrain(
    run: Run, init: str | None = None, norm: Norm | None = None, objective: type[SSSD] = SSSD
) -> Progress:
    """Trains from scratch, from the weights in `init`, or from the newest checkpoint of a resumed
    run. `objective` is a subclass of SSSD with other losses.
    """
    index, split = prepare_data(run)
    task = PretrainTask(run, index, split, objective)
    if init is not None and not run.resume:
        run.console.info(load_into(task.module.mae, init, source_norm=norm).summary)
    settings = run.config.pretrain
    images, ids = pretraining_images(run, index, split)
    size = run.local_batch(settings.batch_size)
    loader = make_loader(run, images, ids, batch_size=size, augment=settings.augment)
    return fit(task, loader, run)
