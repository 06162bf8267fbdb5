"""The training loop: every command that trains builds a Task and calls `fit`.

A run is a pure function of its configuration. The order of images, their augmentation, the masks
and all random numbers of step s are derived from (seed, s). A checkpoint therefore needs no random
state, and a resumed run continues bit for bit with the same number of threads.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
from sssd_fast.performance.execution import (
    ExecutionPlan,
    compile_summary,
    compiled,
    configure_model,
)
from sssd_fast.performance.fake import FakeStep
from sssd_fast.run.checkpoint import load_checkpoint
from sssd_fast.run.device import World, data_parallel, generator, peak_memory_gib
from sssd_fast.run.files import atomic_write_text
from sssd_fast.run.folder import Run
from sssd_fast.run.log import format_metric
from sssd_fast.run.signals import SignalGuard
from sssd_fast.step import Step, StepResult, TaskLoss

COMPILING = "compiling the training step; this can take minutes, later runs use the cache"
MOST_SKIPPED = 0.5  # of the steps of a run; a run with more has not trained
# Number of non-finite steps in a row that ends a run. fp16 starts with a loss scale of 65536, which
# such steps reduce.
SKIPS_ALLOWED = {"fp32": 3, "bf16": 3, "fp16": 25}


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
        """(metric of `end_epoch` that selects the best checkpoint, whether higher is better)."""
        ...

    def groups(self) -> list[dict[str, Any]]: ...

    def loss(self, module: nn.Module, batch: Batch, step: int, micro: int) -> TaskLoss: ...

    def update_state(self, batch_stats: Tensor, finite: Tensor) -> None: ...

    def end_epoch(self, epoch: int, last: bool, step: Step) -> dict[str, float]:
        """Validation and pictures after `epoch` (from 1). The metrics go to metrics.jsonl."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs in addition to parameters, such as class names."""
        ...


@dataclass
class Progress:
    """Position of a run, stored in its checkpoints."""

    epoch: int = 0  # epochs finished
    step_in_epoch: int = 0  # optimizer steps done in the current epoch
    step: int = 0  # optimizer steps done
    best: float | None = None  # best validation metric so far

    def epoch_fraction(self, schedule: Schedule) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.epoch + self.step_in_epoch / schedule.steps_per_epoch


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps and learning rates of a run."""

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


def make_step(
    task: Task, run: Run, config: Config, run_images: int = 0
) -> tuple[Step, ExecutionPlan]:
    """The step for `task` with the settings of config.step, and the choices made.

    run_images: images that the whole run trains on, 0 for a few steps.
    """
    settings, world = task.settings, run.world
    betas = settings.beta1, settings.beta2
    optimizer = build_optimizer(task.groups(), betas, config.step.optimizer)
    execution = configure_model(
        task.module,
        config,
        run.precision,
        world.device,
        run.local_batch(settings.batch_size),
        run_images,
    )
    module: nn.Module = task.module
    if execution.compiled:
        module = compiled(module, config.step, graphs=execution.graphs)
    module = data_parallel(module, world)
    step = Step(
        module,
        optimizer,
        task.loss,
        world=world,
        precision=run.precision,
        clip_grad=settings.clip_grad,
        update_state=task.update_state,
        graphs=execution.graphs,
    )
    return step, execution


def fit(task: Task, loader: Loader, run: Run) -> Progress:
    """Trains `task` to the end of its schedule; a resumed run continues from its newest
    checkpoint.
    """
    settings, config, world = task.settings, run.config, run.world
    schedule = Schedule.of(settings, loader.steps_per_epoch, world.replicas)
    images = schedule.total_steps * schedule.effective_batch // world.size
    step, execution = make_step(task, run, config, images)
    progress = _restore(task, step, run) if run.resume else Progress()
    run.accept()
    run.tracker.start(progress.step)
    _first_screen(task, run, schedule, loader, execution)
    if config.processes not in ("auto", world.share):
        run.console.info(
            f"processes is {config.processes}, but {world.share} is used: a Python function trains "
            "in the process that calls it, and torchrun starts its own processes"
        )
    guard = FiniteGuard(SKIPS_ALLOWED[run.precision], folder=run.out if world.main else None)
    # Reading a loss waits for the device, so on a GPU it is done every ten steps only.
    sync_every = 1 if world.device.type == "cpu" else 10
    record_every = sync_every * max(1, schedule.total_steps // (2000 * sync_every))
    compiling = execution.compiled or config.step.optimizer == "adamw8bit"
    meter = _Meter(schedule.effective_batch)

    with (
        SignalGuard() as signals,
        run.console.progress(
            schedule.total_steps,
            run.title,
            start=progress.step,
            later=_later_steps(run, images, schedule.effective_batch),
        ) as bar,
    ):
        while progress.step < schedule.total_steps:
            for batches in _micro_batches(loader, progress, settings.accumulate, schedule, meter):
                lr = schedule.lr(progress.step)
                # Drop path draws from torch's global generator: seeded by the step, like the rest.
                seed = generator(world.device, config.seed, progress.step, world.rank)
                torch.manual_seed(seed.initial_seed())
                if compiling:
                    with (
                        run.console.announce(COMPILING),
                        _stop_with_compiler(signals, task, step, progress, run),
                    ):
                        result = step(batches, progress.step, lr)
                        float(result.grad_norm)  # waits until the device has finished
                    run.console.info(compile_summary())
                    compiling = False
                else:
                    result = step(batches, progress.step, lr)
                progress.step += 1
                progress.step_in_epoch += 1
                meter.add(result)

                last = progress.step == schedule.total_steps
                if progress.step % sync_every == 0 or last:
                    for finite in meter.flags():
                        context = f"loss {float(result.losses['loss']):.4g}, lr {lr:.3g}"
                        guard.check(finite, progress.step, context)
                    record = meter.record(world)
                    if guard.skipped:
                        record["skipped_steps"] = guard.skipped
                    if progress.step % record_every == 0 or last:
                        epoch = progress.epoch_fraction(schedule)
                        run.tracker.log(
                            "train", progress.step, epoch=round(epoch, 4), lr=lr, **record
                        )
                    bar.update(progress.step, lr=lr, **record)
                every = settings.checkpoint_steps
                if every and progress.step % every == 0 and not last:
                    _save(task, step, progress, run)
                if last:
                    break
                # Checking the other processes needs a collective call: not in every step.
                if world.size == 1 or progress.step % 10 == 0:
                    _stop_on_signal(signals, task, step, progress, run)
            if progress.step == schedule.total_steps:
                guard.check_applied(progress.step, run.precision)
            _end_epoch(task, step, progress, schedule, run)
    run.tracker.close()
    return progress


def _first_screen(
    task: Task, run: Run, schedule: Schedule, loader: Loader, execution: ExecutionPlan
) -> None:
    """One table of what is trained, and what was chosen and why."""
    config, world = run.config, run.world
    width, depth, heads = config.model.encoder_shape
    size = " x ".join(map(str, config.model.image_size))
    millions = sum(p.numel() for p in task.module.parameters()) / 1e6
    processes = f", {world.size} processes" if world.size > 1 else ""
    rows = {
        "data": run.data_summary,
        "loader": loader.reason,
        "": loader.describe(),
        "model": f"ViT, {depth} blocks of width {width}, {heads} heads, {size} pixels, patches of "
        f"{config.model.patch_size}; {millions:.2f} million parameters in training",
        "training": f"{schedule.total_steps} steps, {schedule.steps_per_epoch} per epoch, "
        f"effective batch {schedule.effective_batch}, peak lr {schedule.peak_lr:.3g}",
        "device": f"{world.device}{processes}",
        **dict(map(_choice, execution.lines)),
        "run folder": str(run.out),
    }
    run.console.table(run.title, ("", ""), list(rows.items()))


def _choice(line: str) -> tuple[str, str]:
    """ "attention (37 tokens): fused, because ..." -> ("attention", "fused, ... (37 tokens)")."""
    name, _, reason = line.partition(": ")
    name, _, detail = name.partition(" (")
    return name, f"{reason} ({detail}" if detail else reason


def _later_steps(run: Run, images: int, effective_batch: int) -> float:
    """The work of the stages after this one, in steps of this one, by their FLOPs.

    images: that this stage trains on; for fewer than 1000 the count is not worth its time.
    """
    if not run.later or images < 1000:
        return 0.0
    work = 0.0
    for stage in run.later:
        settings: TrainConfig = getattr(run.config, stage)
        steps = settings.epochs * (run.train_images // (settings.batch_size * settings.accumulate))
        steps = steps if settings.max_steps is None else min(steps, settings.max_steps)
        batch = settings.batch_size * settings.accumulate
        work += steps * batch * FakeStep(run.config, stage).flops()
    return work / (FakeStep(run.config, run.task).flops() * effective_batch)


def _end_epoch(task: Task, step: Step, progress: Progress, schedule: Schedule, run: Run) -> None:
    """Validation, pictures and checkpoint after an epoch, or after the last step."""
    epoch = progress.epoch_fraction(schedule)
    if progress.step_in_epoch == schedule.steps_per_epoch:
        progress.epoch += 1
        progress.step_in_epoch = 0
    last = progress.step == schedule.total_steps
    with run.console.doing("validating"):
        metrics = task.end_epoch(math.ceil(epoch), last, step)
    if metrics:
        run.tracker.log("val", progress.step, epoch=round(epoch, 4), **metrics)
        values = (format_metric(name, value) for name, value in metrics.items())
        run.console.info(f"epoch {epoch:.4g}: {', '.join(values)}")
    name, higher_is_better = task.best
    value = metrics.get(name, math.nan)
    improved = math.isfinite(value)
    if progress.best is not None:  # comparisons with NaN are false
        improved = value > progress.best if higher_is_better else value < progress.best
    if improved:
        progress.best = value
    if improved or last or progress.epoch % task.settings.checkpoint_epochs == 0:
        _save(task, step, progress, run, best=improved)


def _stop_on_signal(
    signals: SignalGuard, task: Task, step: Step, progress: Progress, run: Run
) -> None:
    """Saves a checkpoint and raises Interrupted if any process received a signal."""
    if run.world.any(signals.requested is not None):
        _save(task, step, progress, run)
        raise _interrupted(signals, progress, run)


@contextlib.contextmanager
def _stop_with_compiler(
    signals: SignalGuard, task: Task, step: Step, progress: Progress, run: Run
) -> Iterator[None]:
    """A signal to the process group (Ctrl-C, `timeout`) ends the compiler too, and the step fails.

    The forward or backward failed, so no parameter has changed, and the state before the step is
    saved, without waiting for other processes, which may be in the middle of the step. adamw8bit
    compiles its update too, and may have changed some parameters: nothing is saved then.
    """
    try:
        yield
    except Exception as error:
        if signals.requested is None or run.config.step.optimizer == "adamw8bit":
            raise
        _write(task, step, progress, run)
        raise _interrupted(signals, progress, run) from error


def _interrupted(signals: SignalGuard, progress: Progress, run: Run) -> Interrupted:
    signum = signals.requested or signal.SIGTERM  # another process received it
    return Interrupted(
        f"stopped by {signal.Signals(signum).name} at step {progress.step}; a checkpoint was "
        f"saved. Continue with:\n  {run.resume_with}",
        signum,
    )


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
    loader: Loader, progress: Progress, accumulate: int, schedule: Schedule, meter: _Meter
) -> Iterator[list[Batch]]:
    """The rest of the current epoch in groups of `accumulate`; an incomplete group is dropped."""
    batches = loader.epoch(progress.epoch, start_step=progress.step_in_epoch * accumulate)
    for _ in range(schedule.steps_per_epoch - progress.step_in_epoch):
        started = time.perf_counter()
        group = [next(batches) for _ in range(accumulate)]
        meter.waited(time.perf_counter() - started)
        yield group


def _save(task: Task, step: Step, progress: Progress, run: Run, *, best: bool = False) -> None:
    """Saves a checkpoint on the main process; the others wait, so that none runs ahead
    of a failing disk.
    """
    _write(task, step, progress, run, best=best)
    run.world.barrier()


def _write(task: Task, step: Step, progress: Progress, run: Run, *, best: bool = False) -> None:
    """Saves a checkpoint on the main process, without waiting for the others."""
    if run.world.main:
        state = {
            "task": task.name,
            "model": task.module.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scaler": None if step.scaler is None else step.scaler.state_dict(),
            "progress": vars(progress).copy(),
            "config": to_dict(run.config),
            "processes": run.world.replicas,
            "data": run.data_fingerprint,
            **task.extra_state(),
        }
        run.checkpoints.save(state, progress.step, best=best)


def _restore(task: Task, step: Step, run: Run) -> Progress:
    newest = run.checkpoints.latest()
    if newest is None:
        raise CheckpointError(
            f"{run.out} holds no checkpoint to resume from; start again with --overwrite"
        )
    state = load_checkpoint(newest, map_location=run.world.device)
    run.world.on_main(lambda: run.check_resumable(state, newest))
    task.module.load_state_dict(state["model"])
    step.optimizer.load_state_dict(state["optimizer"])
    if step.scaler is not None and state["scaler"] is not None:
        step.scaler.load_state_dict(state["scaler"])
    progress = Progress(**state["progress"])
    run.console.info(f"resuming from {newest.name}: step {progress.step}, epoch {progress.epoch}")
    return progress


class FiniteGuard:
    """Ends a run after `limit` non-finite steps in a row; each of them was skipped on the device.

    folder: the run folder, for `failure/step-N.json`; None writes nothing. Random numbers depend on
    (seed, step) alone, so resuming from the last checkpoint reproduces the failure.
    """

    def __init__(self, limit: int = 3, *, folder: str | Path | None = None) -> None:
        if limit < 1:
            raise ConfigError(f"limit of non-finite steps in a row is {limit}, needs at least 1")
        self.limit = limit
        self.folder = None if folder is None else Path(folder) / "failure"
        self.consecutive = 0
        self.skipped = 0

    def check(self, finite: bool, step: int, context: str = "") -> bool:
        """Returns `finite`. Raises NumericsError at the `limit`-th skipped step in a row.

        context: values to report, such as "loss nan, lr 0.001".
        """
        if finite:
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.skipped += 1
        if self.consecutive < self.limit:
            return False
        values = f" ({context})" if context else ""
        raise NumericsError(
            f"loss or gradients were not finite in {self.consecutive} steps in a row, the last was "
            f"step {step}{values}. None of these steps was applied: parameters and checkpoints are "
            "intact. Try precision=bf16 (fp32 on hardware without it), a lower base_lr, or a "
            "smaller clip_grad." + self._write(step, context)
        )

    def check_applied(self, steps: int, precision: str) -> None:
        """Raises NumericsError if less than half of the `steps` of the run were applied; those
        before a resume count as applied.
        """
        # a dry run trains two steps, which fp16 may skip until it finds its loss scale
        if steps <= 2 or self.skipped <= MOST_SKIPPED * steps:
            return
        reason = "loss or gradients were not finite; lower base_lr, or set precision=fp32"
        if precision == "fp16":
            reason = (
                "the gradients overflow until fp16's loss scale, which starts at 65536, is small "
                "enough; train more steps, or set precision=bf16 or fp32"
            )
        raise NumericsError(
            f"only {steps - self.skipped} of {steps} steps were applied: {reason}. No checkpoint "
            "of the last epoch was saved."
        )

    def _write(self, step: int, context: str) -> str:
        """Writes a record of the failure; an error here must not hide the reason of the stop."""
        if self.folder is None:
            return ""
        record = {"step": step, "consecutive": self.consecutive, "skipped": self.skipped}
        path = self.folder / f"step-{step}.json"
        try:
            atomic_write_text(path, json.dumps({**record, "context": context}, indent=2) + "\n")
        except (OSError, SssdError) as error:
            return f" (Writing {self.folder} failed as well: {error})"
        return f" Details: {path}"
