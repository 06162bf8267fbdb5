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

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sssd_fast.data.images import to_channels
from sssd_fast.data.pixels import decode_record, read_record
from sssd_fast.errors import DataError, DependencyError
from sssd_fast.loaders.crops import Crops
from sssd_fast.loaders.order import Loader, SampleOrder

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


class DaliLoader(Loader):
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
        # batches that were not returned yet; DALI has taken the first `_taken` of them
        self._ahead: deque[_Read] = deque()
        self._taken = 0
        self._reads: Iterator[_Read] = iter(())
        self._failure: DataError | None = None

    # ---- what goes in ----

    def _key(self, epoch: int, step: int) -> Position:
        # All evaluation epochs are equal.
        return epoch if self.order.augment is not None else 0, step

    def _reads_from(self, epoch: int, step: int) -> Iterator[_Read]:
        """Reads the files of all batches from a position on, also those of later epochs."""
        while True:
            crops = self.order.crops(epoch, step)
            # at the end of an evaluation a rank may have no rows
            if len(crops):
                files = [self._readers.submit(self._encoded, int(i)) for i in crops.records]
                yield _Read((epoch, step), crops, files)
            step += 1
            if step == self.steps_per_epoch:
                epoch, step = self._key(epoch + 1, 0)

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
        while len(self._ahead) < self._taken + 1 + READ_AHEAD:
            self._ahead.append(next(self._reads))
        read = self._ahead[self._taken]
        try:
            files = [file.result() for file in read.files]
        except DataError as error:
            self._failure = error  # DALI keeps only the text of an exception
            raise
        self._taken += 1
        boxes = read.crops.boxes.astype(np.int32)
        flips = read.crops.flips.astype(np.int32)
        return files, list(boxes[:, :2]), list(boxes[:, 2:]), list(flips)

    # ---- the pipeline ----

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        index = self.device.index
        # With exec_dynamic, the default, a batch that was returned is never overwritten.
        pipe = Pipeline(
            batch_size=self.order.batch_size,
            num_threads=self._threads,
            device_id=(torch.cuda.current_device() if index is None else index) if on_gpu else None,
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
            images = fn.resize(images, size=self.order.image_size, **cubic)
            pipe.set_outputs(fn.flip(images, horizontal=flip))
        pipe.build()
        return pipe

    def _run(self) -> Tensor:
        """The next batch, uint8 [R, C, H, W] in DALI's memory, while DALI starts on another one."""
        if self._pipe is None:
            self._pipe = self._build()
        try:
            (images,) = self._pipe.run()
        except Exception as error:
            failure, self._failure = self._failure, None
            self._pipe = None  # a pipeline is unusable after an error
            self._ahead.clear()
            self._taken = 0
            if failure is not None:
                raise failure from None
            if not isinstance(error, RuntimeError):
                raise
            # its message names no file
            lines = [line for line in str(error).splitlines() if "fail" in line.lower()]
            raise DataError(
                f"DALI stopped, probably at a file that Pillow can decode and DALI cannot; set "
                f"data.loader to torch or resident ({lines[0] if lines else str(error).strip()})"
            ) from error
        self._ahead.popleft()
        self._taken -= 1
        return torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def _pixels(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Crops]]:
        for step in range(start_step, self.steps_per_epoch):
            crops = self.order.crops(epoch, step)
            if len(crops):
                self._go_to(self._key(epoch, step))
                yield self._run(), crops
            else:
                shape = (0, self.order.channels, *self.order.image_size)
                yield torch.empty(shape, dtype=torch.uint8, device=self.device), crops

    def _go_to(self, position: Position) -> None:
        """Discards batches prefetched for another position, after an unfinished epoch."""
        if self._ahead and self._ahead[0].position == position:
            return
        while len(self._ahead) > self._taken:
            for file in self._ahead.pop().files:
                file.cancel()
        self._reads = self._reads_from(*position)
        while self._taken and self._ahead[0].position != position:
            self._run()

    def describe(self) -> str:
        where = "JPEG decoded on the GPU" if self.device.type == "cuda" else "decoded on the CPU"
        other = sum(not self.order.index.records[i].plain for i in self.order.ids)
        if other:
            where += f", {other} files with transparency, 16 bits or similar decoded by Pillow"
        return self._describe(f"{where}, {PREFETCH} batches ahead, {self._threads} threads")

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._pipe = None  # DALI ends its threads and frees its buffers with the last reference
