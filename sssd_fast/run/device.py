"""What a run needs of the machine.

World and `world`: the processes that torchrun started, and their collectives. `pick_device`,
`pick_precision`, `autocast`: device and dtype. `generator`: seeded random numbers.
`available_memory`, `peak_memory_gib`, `is_out_of_memory`: memory.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_kernels import cpu_bf16_units
from sssd_fast.errors import ConfigError, EndedByMain, SssdError
from sssd_fast.run.files import existing_folder

PEER_WAIT_S = 10.0  # longer than the launcher needs to see that a process has failed
# Set by run/processes.py: the processes share each batch.
SHARED_BATCH = "SSSD_FAST_SHARED_BATCH"


@dataclass(frozen=True)
class World:
    device: torch.device
    rank: int = 0
    size: int = 1
    share: int = 1  # processes that share one batch; 1 = each process has its own

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Factor of the effective batch."""
        return self.size // self.share

    def mean_(self, tensor: Tensor) -> Tensor:
        """Mean over all processes, in place."""
        return self.sum_(tensor).div_(self.size)

    def any(self, flag: bool) -> bool:
        """True everywhere when true anywhere."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_main(self, function: Callable[[], object]) -> None:
        """Runs `function` on the main process while the others wait.

        An error there ends them with the same exit code; the main process prints the message.
        """
        code: list[int | None] = [None]
        failure: SssdError | OSError | None = None
        if self.main:
            try:
                function()
            except (SssdError, OSError) as error:
                failure = error
                code[0] = error.exit_code if isinstance(error, SssdError) else 2
        if self.size > 1:
            dist.broadcast_object_list(code, device=self.device)
        if failure is not None:
            raise failure
        if code[0] is not None:
            raise EndedByMain(code[0])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA if available. Raises ConfigError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise ConfigError(f"device is {name!r}, needs auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices"
        raise ConfigError(
            f"device is {name!r}, but {found}; use device=cpu, or run `sssd-fast doctor` for the "
            "reason"
        )
    return device


@contextmanager
def world(device: str) -> Iterator[World]:
    """The process group of torchrun's variables, or a world of one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    share = size if os.environ.get(SHARED_BATCH) else 1
    if size == 1:
        yield World(pick_device(device))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = pick_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(own, dist.get_rank(), size, share)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        # Another process ended during a collective call. It reports the reason, and the launcher
        # then ends this one, which must not be the first to fail.
        time.sleep(PEER_WAIT_S)
        raise SssdError("another process of this run ended; its own message has the reason") from (
            error
        )
    finally:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, world: World) -> nn.Module:
    """`module` with gradients averaged over all processes; itself if there is one process."""
    if world.size == 1:
        return module
    # the name since torch 2.13
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ids = [world.device.index] if world.device.type == "cuda" else None
    options: dict[str, Any] = {"device_ids": ids, sync: False}
    return DistributedDataParallel(module, **options)


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> str:
    """auto: on a GPU bf16 from sm_80 on, fp16 on older ones; on a CPU bf16 if it has bf16 units,
    else fp32.
    """
    if name != "auto":
        cuda_bf16 = name == "bf16" and device.type == "cuda"
        if cuda_bf16 and torch.cuda.get_device_capability(device) < (8, 0):
            gpu = torch.cuda.get_device_name(device)
            raise ConfigError(f"precision is bf16, but {gpu} has no bf16 units; use precision=fp16")
        return name
    if device.type == "cpu":
        return "fp32" if cpu_bf16_units() is None else "bf16"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def precision_reason(name: str, device: torch.device) -> str:
    """Why `pick_precision` chooses what it chooses."""
    if name != "auto":
        return f"precision is {name}"
    if device.type == "cpu":
        units = cpu_bf16_units()
        if units is None:
            return "this CPU multiplies fp32 faster than bf16"
        return f"this CPU multiplies bf16 with {units}"
    return "this GPU has bf16 units" if pick_precision(name, device) == "bf16" else "no bf16 units"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """torch.autocast to bf16 or fp16; with fp32 it changes nothing."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator whose numbers depend on `key` alone, such as (seed, step, micro)."""
    state = 0
    for part in key:
        state = (state * 1_000_003 + part + 1) % (1 << 61)
    return torch.Generator(device).manual_seed(state)


GIB = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets glibc's malloc reuse freed memory rather than return it to the system.

    By default the pages of every large activation are requested again in each step: 14,000 page
    faults a step of a ViT-T, 7 % of its time (measured). 32 MiB is the largest threshold.
    Elsewhere than with glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def memory_gib() -> dict[str, float | None]:
    text = read_text("/proc/meminfo") or ""
    kib = {name: int(n) for name, n in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    gib = {name: round(n / 2**20, 1) for name, n in kib.items()}
    limit = (read_text("/sys/fs/cgroup/memory.max") or "max").strip()
    return {
        "total_gib": gib.get("MemTotal"),
        "available_gib": gib.get("MemAvailable"),
        "limit_gib": round(int(limit) / GIB, 1) if limit.isdigit() else None,
        "shm_free_gib": disk_free_gib(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
    }


def available_memory() -> int | None:
    """Bytes of host memory that are free, or the control group's limit if less; None = unknown."""
    memory = memory_gib()
    sizes = [size for size in (memory["available_gib"], memory["limit_gib"]) if size is not None]
    return int(min(sizes) * GIB) if sizes else None


def disk_free_gib(path: Path) -> float | None:
    try:
        return round(shutil.disk_usage(existing_folder(path)).free / GIB, 1)
    except OSError:
        return None


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def peak_memory_gib(device: torch.device | str) -> float:
    """Peak memory in GiB since the process started (or since torch.cuda.reset_peak_memory_stats).

    CUDA: what PyTorch's allocator reserved on `device`, which decides whether a batch fits (the
    CUDA context takes about 0.5 GiB more). Otherwise: resident memory of this process, without its
    loader workers.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    # getrusage inherits the maximum of the process that started this one
    found = re.search(r"^VmHWM:\s+(\d+)", read_text("/proc/self/status") or "", re.MULTILINE)
    if found:
        return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the device or the host ran out of memory, in any form that PyTorch reports."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False
