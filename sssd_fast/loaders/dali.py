"""NVIDIA DALI: files -> decode (JPEG on the GPU where there is one) -> crop -> bicubic resize -> mirror, ahead of the training.

One definition serves GPU and CPU. The pipeline draws nothing itself: bytes, boxes and mirrors of a batch come from Python, so
every provider shows the same views, and (epoch, step) is all there is to resume. Checkpointing is switched on nevertheless,
because DALI then refuses operators with a state it cannot save.

DALI cannot skip a bad file, and decodes some files by other rules (transparency, 16 bits, CMYK, orientation). So only files
of the checked index are fed, their content is compared with the index on every reading, and what any decoder does not give
alike (`ImageRecord.plain`) is decoded by our own rules and handed over as an uncompressed image.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sssd_fast.data.images import printable, to_channels
from sssd_fast.data.pixels import decode_record, read_record
from sssd_fast.errors import DataError, DependencyError
from sssd_fast.loaders.crops import Views
from sssd_fast.loaders.order import Schedule, ScheduledLoader

PREFETCH = 2  # batches that DALI holds ready
READ_AHEAD = 2  # batches whose files are being read before DALI asks for them

Encoded = npt.NDArray[np.uint8]  # [bytes of one file]
Position = tuple[int, int]  # (epoch, step)


def refusal(device: torch.device) -> str | None:
    """Why DALI cannot run for this device; None when it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it has no pipeline for the device {device}"
    try:
        from nvidia.dali import fn, pipeline_def  # noqa: F401
    except ModuleNotFoundError:
        return "not installed (pip install 'sssd-fast[dali-cu13]', or dali-cu12 for drivers before r580)"
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the run works without it
        return f"its import fails: {error!r}"
    return None


class _Read(NamedTuple):
    """A batch on its way to DALI."""

    position: Position
    views: Views
    files: list[Future[Encoded]]


class DaliLoader(ScheduledLoader):
    """threads: CPU threads of DALI, and as many that read files. Raises DependencyError where DALI cannot run."""

    name = "dali"

    def __init__(
        self, schedule: Schedule, device: torch.device | str = "cpu", *, threads: int = 2
    ) -> None:
        super().__init__(schedule, device)
        reason = refusal(self.device)
        if reason is not None:
            raise DependencyError(
                f"DALI cannot be used: {reason}; set data.loader to auto or another provider"
            )
        self._threads = max(1, threads)
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="read")
        self._pipe: Any = None
        self._restart((0, 0))

    def _restart(self, position: Position) -> None:
        self._next = position
        self._reads = deque[_Read]()
        self._running = deque[Position]()
        self._failure: DataError | None = None

    # ---- what goes in ----

    def _key(self, epoch: int, step: int) -> Position:
        return (
            epoch if self.schedule.train is not None else 0,
            step,
        )  # all evaluation epochs are the same

    def _read_on(self) -> _Read:
        """Starts reading the next batch that has rows; at the end of an evaluation a rank may have none."""
        while not len(views := self.schedule.views(*self._next)):
            self._next = self._key(*self.schedule.after(*self._next))
        position = self._next
        self._next = self._key(*self.schedule.after(*self._next))
        return _Read(
            position, views, [self._readers.submit(self._encoded, int(i)) for i in views.records]
        )

    def _encoded(self, i: int) -> Encoded:
        """The file of record i as any decoder can read it."""
        index = self.schedule.index
        if index.records[i].plain:
            return np.frombuffer(read_record(index, i), dtype=np.uint8)
        pixels = to_channels(decode_record(index, i, self.schedule.channels), 3)
        header = (
            f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
        )  # a portable pixmap: size, then RGB
        return np.frombuffer(header + pixels.tobytes(), dtype=np.uint8)

    def _source(self, iteration: int) -> tuple[list[Encoded], list[Any], list[Any], list[Any]]:
        """DALI asks for a batch: encoded files, box corners, box sizes, mirrors."""
        while len(self._reads) < READ_AHEAD + 1:
            self._reads.append(self._read_on())
        read = self._reads.popleft()
        try:
            files = [file.result() for file in read.files]
        except DataError as error:
            self._failure = error  # DALI would hand on its text alone
            raise
        self._running.append(read.position)
        boxes = read.views.boxes.astype(np.int32)
        mirrors = read.views.flips.astype(np.int32)
        return files, list(boxes[:, :2]), list(boxes[:, 2:]), list(mirrors)

    # ---- the pipeline ----

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        # exec_dynamic, the default: a batch that was handed out is never written again
        pipe = Pipeline(
            batch_size=self.schedule.batch_size,
            num_threads=self._threads,
            device_id=self._gpu() if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            enable_checkpointing=True,
        )
        with pipe:
            encoded, corner, extent, mirror = fn.external_source(
                source=self._source, num_outputs=4, batch=True
            )
            # RGB first, because DALI's grey of some PNGs is not that of other decoders
            box = {"start": corner, "shape": extent, "axis_names": "HW"}
            device = "mixed" if on_gpu else "cpu"
            images = fn.decoders.image_slice(encoded, device=device, output_type=types.RGB, **box)
            if self.schedule.channels == 1:
                images = fn.color_space_conversion(
                    images, image_type=types.RGB, output_type=types.GRAY
                )
            images = fn.resize(
                images, size=self.schedule.size, interp_type=types.INTERP_CUBIC, antialias=True
            )
            pipe.set_outputs(fn.flip(images, horizontal=mirror))
        pipe.build()
        _alive.add(pipe)
        return pipe

    def _gpu(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _run(self) -> Tensor:
        """The next batch, uint8 [R, C, H, W] in DALI's own memory; DALI starts on another one meanwhile."""
        if self._pipe is None:
            self._pipe = self._build()
        try:
            (images,) = self._pipe.run()
        except Exception as error:
            failure, running = self._failure, list(self._running)
            self._pipe = None  # it is of no more use
            self._restart((0, 0))
            if failure is not None:
                raise failure from None
            if not isinstance(error, RuntimeError):
                raise
            raise self._blame(running, error) from error
        return torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def _blame(self, positions: list[Position], error: RuntimeError) -> DataError:
        """DALI names no file: decodes each one of the batches under way by itself, and names the first that fails."""
        from nvidia.dali import Pipeline, fn, types

        reason = next(
            (line for line in str(error).splitlines() if "fail" in line.lower()), str(error).strip()
        )
        for i in itertools.chain.from_iterable(
            self.schedule.views(*position).records for position in positions
        ):
            pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
            with pipe:
                encoded = fn.external_source(source=self._alone(int(i)), batch=True)
                pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
            try:
                pipe.build()
                pipe.run()
            except RuntimeError:
                path = self.schedule.index.file(int(i))
                return DataError(
                    f"{printable(str(path))}: DALI cannot decode it, Pillow can; set data.loader=torch or resident ({reason})"
                )
        return DataError(f"DALI stopped: {reason}; set data.loader to resident or torch")

    def _alone(self, i: int) -> Callable[[], list[Encoded]]:
        return lambda: [
            self._encoded(i)
        ]  # without an argument, not even one with a default: DALI would fill it in

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Views]]:
        for step in range(start_step, self.steps_per_epoch):
            views = self.schedule.views(epoch, step)
            if not len(views):
                shape = (0, self.schedule.channels, *self.schedule.size)
                yield torch.empty(shape, dtype=torch.uint8, device=self.device), views
                continue
            self._go_to(self._key(epoch, step))
            images = self._run()
            self._running.popleft()
            yield images, views

    def _go_to(self, position: Position) -> None:
        """Lets what was prefetched for another position run out, when an epoch was left in its middle."""
        coming = [*self._running, *(read.position for read in self._reads), self._next]
        if coming[0] == position:
            return
        for read in self._reads:
            for file in read.files:
                file.cancel()
        self._reads.clear()
        self._next = position
        while self._running and self._running[0] != position:
            self._run()
            self._running.popleft()

    def describe(self) -> str:
        where = (
            "JPEG decoded on the GPU, PNG on the CPU"
            if self.device.type == "cuda"
            else "decoded on the CPU"
        )
        size = (
            self.schedule.size[0]
            * self.schedule.size[1]
            * self.schedule.channels
            * self.schedule.batch_size
        )
        other = sum(not self.schedule.index.records[i].plain for i in self.schedule.ids)
        by_us = (
            f", {other} files with transparency, 16 bits or the like decoded by Pillow"
            if other
            else ""
        )
        ahead = f"{PREFETCH} batches of {size / 2**20:.1f} MiB ahead, {self._threads} threads"
        return self._described(f"{where}{by_us}, {ahead}")

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._pipe = None  # DALI ends its threads and frees its buffers with the last reference


# A pipeline that ends in a forked child (a DataLoader's worker) would wait there for threads that only the parent has: a child
# never lets go of those that were alive when it was made.
_alive: WeakSet[Any] = WeakSet()
_kept_by_children: list[Any] = []
os.register_at_fork(
    before=lambda: _kept_by_children.extend(_alive), after_in_parent=_kept_by_children.clear
)
