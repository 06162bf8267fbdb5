"""The loaders on a CUDA device: the same images as on the CPU, no wait for the device, no batch
overwritten, bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.config import AugmentConfig
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.loaders import Loader, dali
from tests.sssd_fast.loaders.loading import JITTER, PLAIN, Make, assert_near, loader_of

pytestmark = pytest.mark.gpu

COUNT = 40
SETTINGS: dict[str, Any] = {"batch_size": 8, "image_size": (64, 96), "seed": 3}
# largest and mean difference to Pillow on smooth pictures: nvJPEG's inverse transform and colour
# differ by a level or two
EXACTNESS = {"torch": (0, 0.0), "resident": (2, 0.05), "staged": (2, 0.05), "dali": (45, 1.0)}
PROVIDERS = list(EXACTNESS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    """Grey and colour, PNG (decoded on the CPU by every provider) and JPEG (on the GPU by DALI)."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (root / "a").mkdir()
    for i in range(COUNT):
        coarse = Image.fromarray(
            rng.integers(0, 256, (9, 9) if i % 2 else (9, 9, 3), dtype=np.uint8)
        )
        picture = coarse.resize((100 + 3 * i, 150 - i), Image.Resampling.BICUBIC)
        picture.save(root / "a" / f"{i}.{'png' if i % 3 else 'jpg'}", quality=95)
    return check_data(root)


@pytest.fixture
def make(index: DataIndex) -> Iterator[Make]:
    made: list[Loader] = []

    def build(provider: str, augment: AugmentConfig | None, **changes: Any) -> Loader:
        settings = {"device": "cuda", **SETTINGS, "augment": augment, **changes}
        made.append(loader_of(index, provider=provider, **settings))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("train", [None, PLAIN], ids=["evaluate", "train"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_images_equal_those_of_pillow_on_a_gpu(
    make: Make, provider: str, train: AugmentConfig | None, channels: int
):
    expected = list(make("torch", train, device="cpu", channels=channels).epoch(1))
    for a, b in zip(expected, make(provider, train, channels=channels).epoch(1), strict=True):
        assert b.images.is_cuda
        for name in ("labels", "indices"):
            assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
        assert_near(b.images.cpu(), a.images, *EXACTNESS[provider])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_resume_is_bit_equal_and_returned_batches_are_not_overwritten(make: Make, provider: str):
    loader = make(provider, JITTER)
    whole = list(loader.epoch(2))
    kept = [batch.images.clone() for batch in whole]
    list(loader.epoch(3))
    torch.cuda.synchronize()
    again = list(make(provider, JITTER).epoch(2, start_step=2))
    for batch, copy in zip(whole, kept, strict=True):
        assert torch.equal(batch.images, copy)
    for a, b in zip(whole[2:], again, strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("provider", ["resident", "staged"])
def test_resident_set_never_waits_for_the_device(make: Make, provider: str):
    loader = make(provider, JITTER)
    list(loader.epoch(0))  # compiles the kernel, grows the pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(loader.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_memory_stays_flat(make: Make, provider: str):
    loader = make(provider, PLAIN)

    def used() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    for epoch in range(10):
        for _ in loader.epoch(epoch):
            pass
    before = used()
    for epoch in range(10, 50):
        for _ in loader.epoch(epoch):
            pass
    assert used() - before <= 32 * 2**20


@pytest.mark.parametrize("provider", PROVIDERS)
def test_batches_can_be_used_by_a_captured_graph(make: Make, provider: str):
    """Threads and memory of a loader must not break the capture of the training step or its
    replays.
    """
    loader = make(provider, PLAIN)
    batches = loader.epoch(0)
    static = next(batches).images.clone()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static.float().mean()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        mean = static.float().mean()
    for batch in batches:
        static.copy_(batch.images)
        graph.replay()
        torch.testing.assert_close(mean, batch.images.float().mean())


@pytest.mark.dali
def test_dali_runs_on_the_requested_device(make: Make):
    assert dali.unavailable(torch.device("cuda")) is None
    last = torch.cuda.device_count() - 1
    batch = next(make("dali", None, device=f"cuda:{last}").epoch(0))
    assert batch.images.device == torch.device("cuda", last)
