"""NVIDIA DALI: files -> decode (JPEG on a GPU if available) -> crop -> bicubic resize -> flip,
prefetched.

One pipeline definition serves GPU and CPU. The pipeline draws no random numbers: bytes, boxes and
flips of a batch come from Python, so every provider shows the same crops, and (epoch, step) is
enough to resume. Checkpointing is on, because DALI then rejects operators whose state it cannot
save.

DALI cannot skip a bad file, and decodes some files by other rules (transparency, 16 bits, CMYK,
orientation). Therefore only files of the checked index are used, their content is compared with the
index at every read, and a file that decoders do not agree on (`ImageRecord.plain` is False) is
decoded by Pillow and passed on as an uncompressed image.
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
from sssd_fast.loaders.crops import Crops
from sssd_fast.loaders.order import BaseLoader, SampleOrder

PREFETCH = 2  # batches that DALI holds ready
READ_AHEAD = 2  # batches whose files are read before DALI requests them

Encoded = npt.NDArray[np.uint8]  # [bytes of one file]
Position = tuple[int, int]  # (epoch, step)


def unavailable(device: torch.device) -> str | None:
    """Why DALI cannot run for this device; None when it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it has no pipeline for the device {device}"
    try:
        from nvidia.dali import fn, pipeline_def  # noqa: F401
    except ModuleNotFoundError:
        return (
            "not installed (pip install 'sssd-fast[dali-cu13]', or dali-cu12 for drivers before "
            "r580)"
        )
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the run works without it
        return f"its import fails: {error!r}"
    return None


class _Read(NamedTuple):
    """A batch whose files are being read for DALI."""

    position: Position
    crops: Crops
    files: list[Future[Encoded]]


class DaliLoader(BaseLoader):
    """threads: CPU threads of DALI, and as many that read files. Raises DependencyError if
    DALI cannot run.
    """

    name = "dali"

    def __init__(
        self, order: SampleOrder, device: torch.device | str = "cpu", *, threads: int = 2
    ) -> None:
        super().__init__(order, device)
        reason = unavailable(self.device)
        if reason is not None:
            advice = "set data.loader to auto or another provider"
            raise DependencyError(f"DALI cannot be used: {reason}; {advice}")
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
        # All evaluation epochs are equal.
        return epoch if self.order.augment is not None else 0, step

    def _start_read(self) -> _Read:
        """Starts reading the next batch with rows; at the end of an evaluation a rank may have
        none.
        """
        while not len(crops := self.order.crops(*self._next)):
            self._next = self._key(*self.order.next_position(*self._next))
        position = self._next
        self._next = self._key(*self.order.next_position(*self._next))
        files = [self._readers.submit(self._encoded, int(i)) for i in crops.records]
        return _Read(position, crops, files)

    def _encoded(self, i: int) -> Encoded:
        """The file of record i as any decoder can read it."""
        index = self.order.index
        if index.records[i].plain:
            return np.frombuffer(read_record(index, i), dtype=np.uint8)
        pixels = to_channels(decode_record(index, i, self.order.channels), 3)
        # A portable pixmap: a header with the size, then RGB.
        header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
        return np.frombuffer(header + pixels.tobytes(), dtype=np.uint8)

    def _source(self, iteration: int) -> tuple[list[Encoded], list[Any], list[Any], list[Any]]:
        """Called by DALI for each batch: encoded files, box corners, box sizes, flips."""
        while len(self._reads) < READ_AHEAD + 1:
            self._reads.append(self._start_read())
        read = self._reads.popleft()
        try:
            files = [file.result() for file in read.files]
        except DataError as error:
            self._failure = error  # DALI keeps only the text of an exception
            raise
        self._running.append(read.position)
        boxes = read.crops.boxes.astype(np.int32)
        flips = read.crops.flips.astype(np.int32)
        return files, list(boxes[:, :2]), list(boxes[:, 2:]), list(flips)

    # ---- the pipeline ----

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        # With exec_dynamic, the default, a batch that was returned is never overwritten.
        pipe = Pipeline(
            batch_size=self.order.batch_size,
            num_threads=self._threads,
            device_id=self._gpu() if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            enable_checkpointing=True,
        )
        with pipe:
            encoded, corner, extent, flip = fn.external_source(
                source=self._source, num_outputs=4, batch=True
            )
            # RGB first: for some PNGs DALI's grey values differ from those of other decoders.
            box = {"start": corner, "shape": extent, "axis_names": "HW"}
            device = "mixed" if on_gpu else "cpu"
            images = fn.decoders.image_slice(encoded, device=device, output_type=types.RGB, **box)
            if self.order.channels == 1:
                grey = {"image_type": types.RGB, "output_type": types.GRAY}
                images = fn.color_space_conversion(images, **grey)
            cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
            images = fn.resize(images, size=self.order.size, **cubic)
            pipe.set_outputs(fn.flip(images, horizontal=flip))
        pipe.build()
        _alive.add(pipe)
        return pipe

    def _gpu(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _run(self) -> Tensor:
        """The next batch, uint8 [R, C, H, W] in DALI's memory, while DALI starts on another one."""
        if self._pipe is None:
            self._pipe = self._build()
        try:
            (images,) = self._pipe.run()
        except Exception as error:
            failure, running = self._failure, list(self._running)
            self._pipe = None  # a pipeline is unusable after an error
            self._restart((0, 0))
            if failure is not None:
                raise failure from None
            if not isinstance(error, RuntimeError):
                raise
            raise self._find_bad_file(running, error) from error
        return torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def _find_bad_file(self, positions: list[Position], error: RuntimeError) -> DataError:
        """DALI's error names no file: decodes each file of these batches alone, names the first
        to fail.
        """
        from nvidia.dali import Pipeline, fn, types

        lines = [line for line in str(error).splitlines() if "fail" in line.lower()]
        reason = lines[0] if lines else str(error).strip()
        batches = (self.order.crops(*position).records for position in positions)
        for i in itertools.chain.from_iterable(batches):
            pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
            with pipe:
                encoded = fn.external_source(source=self._alone(int(i)), batch=True)
                pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
            try:
                pipe.build()
                pipe.run()
            except RuntimeError:
                path = self.order.index.file(int(i))
                return DataError(
                    f"{printable(str(path))}: DALI cannot decode it, Pillow can; set "
                    f"data.loader=torch or resident ({reason})"
                )
        return DataError(f"DALI stopped: {reason}; set data.loader to resident or torch")

    def _alone(self, i: int) -> Callable[[], list[Encoded]]:
        # Without parameters, not even one with a default: DALI would pass an argument.
        return lambda: [self._encoded(i)]

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        for step in range(start_step, self.steps_per_epoch):
            crops = self.order.crops(epoch, step)
            if not len(crops):
                shape = (0, self.order.channels, *self.order.size)
                yield torch.empty(shape, dtype=torch.uint8, device=self.device), crops
                continue
            self._go_to(self._key(epoch, step))
            images = self._run()
            self._running.popleft()
            yield images, crops

    def _go_to(self, position: Position) -> None:
        """Discards batches prefetched for another position, after an epoch that was not
        finished.
        """
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
        o, where = self.order, "decoded on the CPU"
        if self.device.type == "cuda":
            where = "JPEG decoded on the GPU, PNG on the CPU"
        size = o.size[0] * o.size[1] * o.channels * o.batch_size
        other = sum(not o.index.records[i].plain for i in o.ids)
        if other:
            where += f", {other} files with transparency, 16 bits or similar decoded by Pillow"
        ahead = f"{PREFETCH} batches of {size / 2**20:.1f} MiB ahead, {self._threads} threads"
        return self._describe(f"{where}, {ahead}")

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._pipe = None  # DALI ends its threads and frees its buffers with the last reference


# A pipeline that ends in a forked child (a DataLoader's worker) would wait there for threads that
# only the parent has. A child therefore keeps references to those that existed at the fork.
_alive: WeakSet[Any] = WeakSet()
_kept_by_children: list[Any] = []
os.register_at_fork(
    before=lambda: _kept_by_children.extend(_alive), after_in_parent=_kept_by_children.clear
)
