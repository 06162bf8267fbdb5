"""The training loop. Every command that trains builds a Task and calls `fit`; read it top to
bottom.

A run is a pure function of its configuration: the order of images, their augmentation, the masks
and every random number of step s are derived from (seed, s), so a checkpoint needs no random state,
and resuming continues bit for bit on the same number of threads.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sssd_fast.config import Config, TrainConfig, to_dict
from sssd_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NumericsError,
    SssdError,
)
from sssd_fast.loaders import Batch, Loader
from sssd_fast.model import Classifier
from sssd_fast.objective import SSSD
from sssd_fast.optim import build_optimizer, lr_at, scaled_lr
from sssd_fast.performance.execution import Execution, compile_summary, compiled, prepare
from sssd_fast.run.checkpoint import load_checkpoint
from sssd_fast.run.device import World, generator, peak_memory_gib
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import Run
from sssd_fast.run.log import format_metric
from sssd_fast.run.signals import SignalGuard
from sssd_fast.step import Step, StepResult, TaskLoss

COMPILING = "compiling the training step; this can take minutes the first time, later runs find it in the cache"
SKIPS_ALLOWED = {
    "fp32": 3,
    "bf16": 3,
    "fp16": 25,
}  # fp16 starts at a loss scale of 65536 and has to find its way down


class Task(Protocol):
    """What differs between pre-training, fine-tuning and probing."""

    @property
    def name(self) -> str: ...

    @property
    def module(self) -> SSSD | Classifier: ...

    @property
    def settings(self) -> TrainConfig: ...

    @property
    def best(self) -> tuple[str, bool]:
        """(figure of `end_epoch` that chooses the best checkpoint, whether higher is better)."""
        ...

    def groups(self) -> list[dict[str, Any]]: ...

    def loss(self, module: nn.Module, batch: Batch, step: int, micro: int) -> TaskLoss: ...

    def update_state(self, batch_stats: Tensor, finite: Tensor) -> None: ...

    def end_epoch(self, epoch: int, last: bool, step: Step) -> dict[str, float]:
        """Validation and pictures after `epoch` (from 1); the figures go to metrics.jsonl. Empty =
        nothing measured.
        """
        ...

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides parameters, such as class names."""
        ...


@dataclass
class Progress:
    """Where a run stands; this and the tensors are all that a checkpoint holds."""

    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0  # optimizer steps done in the current epoch
    step: int = 0  # optimizer steps done
    best: float | None = None


@dataclass(frozen=True)
class Schedule:
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    effective_batch: int

    @classmethod
    def of(cls, settings: TrainConfig, micro_steps: int, processes: int) -> Schedule:
        per_epoch = micro_steps // settings.accumulate
        if per_epoch == 0:
            raise DataError(
                f"an epoch has {micro_steps} batches of {settings.batch_size}, "
                f"accumulate={settings.accumulate} needs at least "
                f"{settings.accumulate}; lower accumulate or batch_size"
            )
        total = settings.epochs * per_epoch
        if settings.max_steps is not None:
            total = min(total, settings.max_steps)
        effective = settings.batch_size * settings.accumulate * processes
        warmup = min(round(settings.warmup_epochs * per_epoch), max(0, total - 1))
        peak = scaled_lr(settings.base_lr, effective)
        low = scaled_lr(settings.min_lr, effective)
        return cls(per_epoch, total, warmup, peak, low, effective)

    def lr(self, step: int) -> float:
        steps = {"total_steps": self.total_steps, "warmup_steps": self.warmup_steps}
        return lr_at(step, peak=self.peak_lr, minimum=self.min_lr, **steps)


def make_step(task: Task, run: Run, config: Config) -> tuple[Step, Execution]:
    """The step that trains `task` as config.step wants it, and what was decided, which is printed
    too.
    """
    settings, world = task.settings, run.world
    optimizer = build_optimizer(
        task.groups(), (settings.beta1, settings.beta2), config.step.optimizer
    )
    execution = prepare(task.module, config, run.precision, world.device, settings.batch_size)
    for line in execution.lines:
        run.console.info(line)
    module: nn.Module = task.module
    if execution.compiled:
        module = compiled(module, config.step, graphs=execution.graphs)
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)
    step = Step(
        module,
        optimizer,
        task.loss,
        world=world,
        precision=run.precision,
        clip_grad=settings.clip_grad,
        update_state=task.update_state,
        compiled=execution.compiled,
        graphs=execution.graphs,
    )
    return step, execution


def fit(task: Task, loader: Loader, run: Run) -> Progress:
    """Trains `task` to the end of its schedule, or from the newest checkpoint on when the run was
    opened to resume.
    """
    settings, config, world = task.settings, run.config, run.world
    schedule = Schedule.of(settings, loader.steps_per_epoch, world.size)
    progress = Progress()
    step, execution = make_step(task, run, config)
    if run.resume:
        progress = _restore(task, step, run)
    run.tracker.start(progress.step)
    run.console.info(
        f"{task.name}: {schedule.total_steps} steps, {schedule.steps_per_epoch} per epoch, "
        f"effective batch {schedule.effective_batch}, "
        f"peak lr {schedule.peak_lr:.3g}, {run.precision} on {world.device}"
        + (f", {world.size} processes" if world.size > 1 else "")
    )
    guard = FiniteGuard(limit=SKIPS_ALLOWED[run.precision], folder=run.out if world.main else None)
    sync_every = 1 if world.device.type == "cpu" else 10  # reading a figure waits for the device
    record_every = sync_every * max(1, schedule.total_steps // (2000 * sync_every))
    meter = _Meter(schedule.effective_batch)

    with (
        SignalGuard() as signals,
        run.console.progress(schedule.total_steps, task.name, start=progress.step) as bar,
    ):
        while progress.step < schedule.total_steps:
            micro_batches = _micro_batches(
                loader, progress, settings.accumulate, schedule.steps_per_epoch, meter
            )
            for batches in micro_batches:
                lr = schedule.lr(progress.step)
                # what draws from torch's own generator (drop path) depends on the step alone, like
                # everything else
                torch.manual_seed(
                    generator(world.device, config.seed, progress.step, world.rank).initial_seed()
                )
                compiling = (
                    execution.compiled or config.step.optimizer == "adamw8bit"
                ) and meter.steps == 0
                with run.console.announce(COMPILING) if compiling else nullcontext():
                    result = step(batches, progress.step, lr)
                    if compiling:
                        float(
                            result.grad_norm
                        )  # waits for the device, so that the announced time is the real one
                if compiling:
                    run.console.info(compile_summary())
                progress.step += 1
                progress.step_in_epoch += 1
                meter.add(result)
                last = progress.step == schedule.total_steps
                if progress.step % sync_every == 0 or last:
                    for finite in meter.flags():
                        guard.check(
                            finite,
                            progress.step,
                            f"loss {float(result.losses['loss']):.4g}, lr {lr:.3g}",
                        )
                if progress.step % record_every == 0 or progress.step % sync_every == 0 or last:
                    record = meter.record(world)
                    if guard.skipped:
                        record["skipped_steps"] = guard.skipped
                    if progress.step % record_every == 0 or last:
                        epoch = progress.epoch + progress.step_in_epoch / schedule.steps_per_epoch
                        run.tracker.log(
                            "train", progress.step, epoch=round(epoch, 4), lr=lr, **record
                        )
                    bar.update(progress.step, lr=lr, **record)
                if (
                    settings.checkpoint_steps
                    and progress.step % settings.checkpoint_steps == 0
                    and not last
                ):
                    _save(task, step, progress, run)
                if last:
                    break
                if (world.size == 1 or progress.step % 10 == 0) and (
                    signum := _signal(signals, run)
                ):
                    _save(task, step, progress, run)
                    raise Interrupted(
                        f"stopped by {signal.Signals(signum).name} at step {progress.step}; a "
                        "checkpoint was saved. Continue with:\n"
                        f"  {run.resume_with}",
                        signum,
                    )
            epoch = progress.epoch + progress.step_in_epoch / schedule.steps_per_epoch
            if progress.step_in_epoch == schedule.steps_per_epoch:
                progress.epoch = progress.epoch + 1
                progress.step_in_epoch = 0
            last = progress.step == schedule.total_steps
            with run.console.doing("validating"):
                figures = task.end_epoch(math.ceil(epoch), last, step)
            metric = figures.get(task.best[0])
            if figures:
                run.tracker.log("val", progress.step, epoch=round(epoch, 4), **figures)
                bar.note(_sentence(epoch, figures))
            improved = (
                metric is not None
                and math.isfinite(metric)
                and _better(metric, progress.best, task.best[1])
            )
            if improved:
                progress.best = metric
            if improved or last or progress.epoch % settings.checkpoint_epochs == 0:
                _save(task, step, progress, run, best=improved)
    run.tracker.close()
    return progress


class _Meter:
    """Throughput, waiting time and device-side sums between two records."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.steps = 0
        self._flags: list[Tensor] = []
        self._reset()

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._pending = list[StepResult]()

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self._pending.append(result)
        self._flags.append(result.finite)

    def flags(self) -> list[bool]:
        """Whether each step since the last call was applied; waits for the device."""
        flags = self._flags
        self._flags = []
        return [bool(flag) for flag in torch.stack(flags).tolist()] if flags else []

    def record(self, world: World) -> dict[str, float]:
        """Means of the losses over all processes since the last record, speed and memory; waits for
        the device.
        """
        names = list(self._pending[0].losses)
        means = torch.stack(
            [torch.stack([r.losses[name] for r in self._pending]).mean() for name in names]
        )
        values = dict(zip(names, world.mean_(means).tolist(), strict=True))
        values["grad_norm"] = float(self._pending[-1].grad_norm)
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        values["images_per_s"] = len(self._pending) * self.images_per_step / elapsed
        values["data_wait_fraction"] = min(1.0, self._waited / elapsed)
        values["memory_gib"] = peak_memory_gib(world.device)
        values["step_time_s"] = elapsed / len(self._pending)
        self._reset()
        return values


def _micro_batches(
    loader: Loader, progress: Progress, accumulate: int, steps_per_epoch: int, meter: _Meter
) -> Iterator[list[Batch]]:
    """The rest of the current epoch in groups of `accumulate`; what does not fill a group is left
    out.
    """
    batches = loader.epoch(progress.epoch, start_step=progress.step_in_epoch * accumulate)
    for _ in range(steps_per_epoch - progress.step_in_epoch):
        started = time.perf_counter()
        group = [next(batches) for _ in range(accumulate)]
        meter.waited(time.perf_counter() - started)
        yield group


def _signal(signals: SignalGuard, run: Run) -> Any:
    if run.world.any(signals.requested is not None):
        return signals.requested or 15
    return None


def _better(value: float, best: float | None, higher: bool) -> bool:
    return best is None or (value > best if higher else value < best)


def _sentence(epoch: float, figures: dict[str, float]) -> str:
    named = (format_metric(name, value) for name, value in figures.items())
    return f"epoch {epoch:.4g}: {', '.join(named)}"


def _save(task: Task, step: Step, progress: Progress, run: Run, *, best: bool = False) -> None:
    """Saves a checkpoint on the main process; the others wait, so that none runs ahead
    of a failing disk.
    """
    if run.world.main:
        state = {
            "task": task.name,
            "model": task.module.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scaler": None if step.scaler is None else step.scaler.state_dict(),
            "progress": vars(progress).copy(),
            "config": to_dict(run.config),
            "processes": run.world.size,
            "data": run.data_fingerprint,
            **task.extra_state(),
        }
        run.checkpoints.save(state, progress.step, best=best)
    run.world.barrier()


def _restore(task: Task, step: Step, run: Run) -> Progress:
    newest = run.checkpoints.latest()
    if newest is None:
        raise CheckpointError(
            f"{run.out} holds no checkpoint to resume from; start again with --overwrite"
        )
    state = load_checkpoint(newest, map_location=run.world.device)
    run.check_resumable(state, newest)
    task.module.load_state_dict(state["model"])
    step.optimizer.load_state_dict(state["optimizer"])
    if step.scaler is not None and state["scaler"] is not None:
        step.scaler.load_state_dict(state["scaler"])
    progress = Progress(**state["progress"])
    run.console.info(f"resuming from {newest.name}: step {progress.step}, epoch {progress.epoch}")
    return progress


class FiniteGuard:
    """Host-side policy: a non-finite step is skipped; `limit` of them in a row end the run.

    fp16 needs a larger limit than bf16 or fp32 (3): its loss scale starts too high and halves at
    every overflow.
    folder: the run folder, for `failure/step-N.json`; without one nothing is written. Steps draw
    from (seed, step) alone, so resuming from the last checkpoint reproduces the failure.
    """

    def __init__(self, limit: int = 3, *, folder: str | Path | None = None) -> None:
        if limit < 1:
            raise ConfigError(
                f"the number of non-finite steps in a row that ends a run is {limit}, at least 1 "
                "is needed"
            )
        self.limit = limit
        self.folder = None if folder is None else Path(folder) / "failure"
        self.consecutive = 0
        self.skipped = 0

    def check(self, finite: bool, step: int, context: str | Mapping[str, Any] = "") -> bool:
        """Whether to apply `step`. Raises NumericsError at the `limit`-th skipped step in a row.

        context: what to report with it, such as {"loss": ..., "lr": ..., "loss_scale": ...}.
        """
        if finite:
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.skipped += 1
        if self.consecutive < self.limit:
            return False
        numbers = (
            context
            if isinstance(context, str)
            else ", ".join(f"{key} {value}" for key, value in context.items())
        )
        raise NumericsError(
            f"loss or gradients were not finite in {self.consecutive} steps in a row, the last was "
            f"step {step}"
            + (f" ({numbers})" if numbers else "")
            + ". None of these steps was applied: parameters and checkpoints are intact. Try "
            "precision=bf16 (fp32 on "
            "hardware without it), a lower base_lr, or a smaller clip_grad."
            + self._write(step, context)
        )

    def _write(self, step: int, context: str | Mapping[str, Any]) -> str:
        """Files for the post-mortem; a problem in writing them must not hide the reason the run
        stopped.
        """
        import json

        if self.folder is None:
            return ""
        values = {"context": context} if isinstance(context, str) else dict(context)
        record = {"step": step, "consecutive": self.consecutive, "skipped": self.skipped, **values}
        # NaN and infinity are not JSON: written as the strings "nan", "inf"
        safe = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        path = self.folder / f"step-{step}.json"
        try:
            atomic_write_text(path, json.dumps(safe, indent=2, default=str) + "\n")
        except (OSError, SssdError) as error:
            return f" (Writing {self.folder} failed as well: {error})"
        return f" Details: {path}"
