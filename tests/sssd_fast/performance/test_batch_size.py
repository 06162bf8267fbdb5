"""`batch: auto`: the largest micro-batch that fits is found, and the effective batch stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sssd_fast.cli import main
from sssd_fast.config import Config, load_config
from sssd_fast.errors import ConfigError
from sssd_fast.performance import batch_size as microbatch
from sssd_fast.performance.batch_size import resolve_batch, search
from sssd_fast.run.device import World

CPU = World(torch.device("cpu"))


def _config(
    tiny: list[str], batch_size: int, accumulate: int = 1, task: str = "pretrain", *more: str
) -> Config:
    own = ["batch=auto", f"batch_size={batch_size}", f"accumulate={accumulate}"]
    return load_config(None, [*tiny, *(f"{task}.{setting}" for setting in own), *more])


@pytest.mark.parametrize("own", [1, 7, 24, 97, 256, 360])
@pytest.mark.parametrize("fits", [1, 5, 16, 100, 1000])
def test_the_largest_divisor_that_fits_is_found(own: int, fits: int) -> None:
    tried: list[int] = []

    def trial(images: int) -> bool:
        tried.append(images)
        return images <= fits

    found = search(own, lambda n: True, trial, CPU)
    assert found == max(n for n in range(1, own + 1) if own % n == 0 and n <= fits)
    assert tried == sorted(set(tried), reverse=True)
    assert search(own, lambda n: False, trial, CPU) is None
    assert search(own, lambda n: n <= 2, lambda n: True, CPU) == (2 if own % 2 == 0 else 1)


def test_processes_agree_on_what_fits_in_all_of_them() -> None:
    class Other(World):
        """A second process in which at most 8 images fit."""

        def any(self, flag: bool) -> bool:
            return flag or tried[-1] > 8

    tried = [0]

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= 32

    def likely(images: int) -> bool:
        tried.append(0)
        return True

    assert search(64, likely, fits, Other(torch.device("cpu"), size=2)) == 8


@pytest.mark.parametrize(
    ("task", "batch_size", "accumulate"),
    [("pretrain", 8, 1), ("pretrain", 1, 13), ("finetune", 4, 6), ("finetune", 96, 3)],
)
def test_the_effective_batch_stays(
    tiny: list[str], batch_size: int, accumulate: int, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny, batch_size, accumulate, task)
    said: list[str] = []
    found = getattr(resolve_batch(config, task, CPU, log=said.append), task)
    assert (found.batch_size, found.accumulate, found.batch) == (batch_size * accumulate, 1, None)
    own = batch_size * accumulate
    assert f"micro-batch {own} x 1 (effective batch {own})" in said[0]
    # with memory for about three images
    found = microbatch.estimate(config, task, "fp32", CPU.device, compiled=False)
    need = found.peak(3, accumulate=max(1, own // 3))
    monkeypatch.setattr(microbatch, "_free_bytes", lambda device: need / microbatch.CPU_SHARE)
    small = getattr(resolve_batch(config, task, CPU, log=said.append), task)
    assert small.batch_size * small.accumulate == own
    assert small.batch_size <= 3
    monkeypatch.setattr(microbatch, "_free_bytes", lambda device: 1000.0)
    with pytest.raises(ConfigError, match=r"is auto, and not one image fits: .*plan"):
        resolve_batch(config, task, CPU, log=said.append)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_trial_is_a_real_step_that_leaves_nothing_behind(
    tiny: list[str], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = _config(tiny, 4, 2, task), list[str]()
    state = torch.random.get_rng_state()

    def fits() -> bool:
        return microbatch.steps_fit(config, task, 2, CPU, 0, said.append)

    assert fits()
    assert torch.equal(state, torch.random.get_rng_state())
    assert said[-1] == "trying a micro-batch of 4: fits"
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory"), ValueError("another")]

    def fail(*args: object, **options: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(microbatch, "time_steps", fail)
    assert not fits()
    assert said[-1] == "trying a micro-batch of 4: out of memory"
    with pytest.raises(ValueError, match="another"):  # only a lack of memory is an answer
        fits()


def test_a_run_stores_the_numbers_and_resumes_with_them(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    own = ["batch=auto", "batch_size=2", "accumulate=4", "max_steps=4", "checkpoint_steps=2"]
    settings = [*tiny, *(f"pretrain.{setting}" for setting in own)]
    assert main(["pretrain", "--out", str(out), *settings]) == 0
    stored = load_config(out / "config.yaml", [])
    fixed = stored.pretrain
    assert (fixed.batch_size, fixed.accumulate, fixed.batch) == (8, 1, None)
    assert resolve_batch(stored, "pretrain", CPU) is stored
    assert main(["pretrain", "--resume", str(out)]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_on_a_gpu_the_cap_decides(task: str) -> None:
    """ViT-S in 3 GB: less than the effective batch of 512 fits, and one step of what was found
    runs under the same cap."""
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    settings = ["model.name=small", "step.compile=false", "data.resident_gib=0.1"]
    config = _config(settings, 512, 1, task)
    said: list[str] = []
    torch.cuda.set_per_process_memory_fraction(3e9 / total)
    try:
        found = getattr(resolve_batch(config, task, World(device), log=said.append), task)
        assert 1 <= found.batch_size < 512
        assert found.batch_size * found.accumulate == 512
        # the free memory is that of the whole card
        assert any("out of memory" in line for line in said)
        fixed = {"batch_size": found.batch_size, "accumulate": 2}
        resolved = config.model_copy(update={task: found.model_copy(update=fixed)})
        assert microbatch.steps_fit(resolved, task, 2, World(device), 0, said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
