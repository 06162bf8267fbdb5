"""Fine-tuning: a classifier on the pre-trained encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sssd_fast.config import FinetuneConfig
from sssd_fast.data.index import DataIndex
from sssd_fast.data.split import Split
from sssd_fast.evaluation.metrics import classification_metrics
from sssd_fast.evaluation.predict import predict
from sssd_fast.loaders import Batch
from sssd_fast.loaders.augment import mix_batch, random_erasing, soft_targets
from sssd_fast.loaders.prepare import (
    make_loader,
    positive_label,
    prepare_data,
    require_classes,
)
from sssd_fast.model import Classifier
from sssd_fast.optim import parameter_groups
from sssd_fast.run.device import generator
from sssd_fast.run.folder import Run
from sssd_fast.step import Step, TaskLoss
from sssd_fast.train import Progress, fit
from sssd_fast.weights.files import Norm
from sssd_fast.weights.load import load_into


class FinetuneTask:
    """The Task of `fit` for a classifier. finetune.select is the metric of the best checkpoint."""

    name = "finetune"

    def __init__(self, run: Run, index: DataIndex, split: Split) -> None:
        config = run.config
        self.run = run
        self.index = index
        self.settings: FinetuneConfig = config.finetune
        self.best: tuple[str, bool] = (self.settings.select, self.settings.select != "loss")
        self.num_classes = len(index.classes)
        require_classes(index)
        torch.manual_seed(config.seed)
        s = self.settings
        self.module = Classifier(config.model, self.num_classes, s.pool, s.drop_path, s.patch_drop)
        self.module.to(run.world.device)
        counts = np.bincount(
            [index.records[i].label for i in split.train], minlength=self.num_classes
        )
        weights = np.ones(self.num_classes)
        if self.settings.class_weights == "balanced":
            weights = counts.sum() / (self.num_classes * np.maximum(counts, 1))
        self.class_weights = torch.tensor(weights, dtype=torch.float32, device=run.world.device)
        self.val_ids = split.val
        self.val_loader = None
        if split.val:
            batch_size = config.evaluate.batch_size
            self.val_loader = make_loader(run, index, split.val, batch_size=batch_size)

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(
            self.module,
            weight_decay=self.settings.weight_decay,
            layer_decay=self.settings.layer_decay,
            depth=self.run.config.model.encoder_shape[1],
        )

    def loss(self, module: nn.Module, batch: Batch, step: int, micro: int) -> TaskLoss:
        """Soft-target cross-entropy after mixing and erasing of uint8 images on the device."""
        s, world = self.settings, self.run.world
        random = generator(torch.device("cpu"), self.run.config.seed, step, micro, world.rank)
        targets_BC = soft_targets(batch.labels, self.num_classes, s.label_smoothing)
        images = batch.images
        if s.mixup or s.cutmix:
            images, targets_BC = mix_batch(
                images, targets_BC, mixup_alpha=s.mixup, cutmix_alpha=s.cutmix, generator=random
            )
        if s.random_erasing:
            images = random_erasing(images, s.random_erasing, random)
        log_q_BC = F.log_softmax(module(images).float(), 1)
        return TaskLoss(-(targets_BC * self.class_weights * log_q_BC).sum(1).mean(), {})

    def update_state(self, batch_stats: Tensor, finite: Tensor) -> None:
        """A classifier has no state other than its parameters."""

    def end_epoch(self, epoch: int, last: bool, step: Step) -> dict[str, float]:
        due = last or epoch % self.settings.validate_epochs == 0
        if self.val_loader is None or not due:
            return {}
        world, classes = self.run.world, self.num_classes
        context = step.autocast()
        labels_N, scores_NC = predict(
            self.module, self.val_loader, self.val_ids, classes, world, context
        )
        chosen_N = np.clip(scores_NC[np.arange(len(labels_N)), labels_N], 1e-12, None)
        loss = float(-np.log(chosen_N).mean())
        if classes == 2:
            positive = positive_label(self.run.config, self.index)
            found = classification_metrics(labels_N == positive, scores_NC[:, positive])
        else:
            found = classification_metrics(labels_N, scores_NC)
        values = {"loss": loss, "accuracy": found["accuracy"], "auc": found["auc"]}
        return {name: value for name, value in values.items() if value is not None}

    def extra_state(self) -> dict[str, Any]:
        # predict shows 16-bit images as they were shown in training
        return {
            "classes": list(self.index.classes),
            "pool": self.settings.pool,
            "grey_range": self.index.grey_range,
        }


def finetune(run: Run, init: str | None, norm: Norm | None = None) -> Progress:
    """Fine-tunes the encoder in `init` (None = from scratch, the supervised control) or resumes."""
    index, split = prepare_data(run)
    task = FinetuneTask(run, index, split)
    if init is not None and not run.resume:
        run.console.info(load_into(task.module, init, source_norm=norm).summary)
    settings = run.config.finetune
    size = run.local_batch(settings.batch_size)
    loader = make_loader(run, index, split.train, batch_size=size, augment=settings.augment)
    return fit(task, loader, run)
