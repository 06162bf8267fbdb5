"""The loader contract, for every provider: content and order are a function of (seed, epoch,
record), shards tile an epoch, resume is exact. The pixels are compared with Pillow's on the file.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.config import AugmentConfig
from sssd_fast.data.images import decode_image, to_channels
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.loaders import PAD_INDEX, PAD_LABEL, Batch, Loader, choose, dali, resident
from sssd_fast.loaders.augment import rotate_and_jitter
from sssd_fast.loaders.crops import crop_and_resize, evaluation_crop, training_crops
from tests.sssd_fast.loaders.loading import JITTER, Make, assert_near, loader_of

COUNT = 23
CROPS = AugmentConfig(hflip=0.5)
SETTINGS: dict[str, Any] = {"channels": 1, "seed": 7}
# largest difference to Pillow, mean difference: torch has 16-bit weights, DALI does not round
# between the two passes
EXACTNESS = {"torch": (0, 0.0), "resident": (2, 0.02), "staged": (2, 0.02), "dali": (45, 0.8)}
PROVIDERS = list(EXACTNESS)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = root / ("b" if i % 3 else "a")
        folder.mkdir(exist_ok=True)
        height, width = (40 + i, 50) if i % 2 else (40, 50 + i)
        coarse = Image.fromarray(
            rng.integers(0, 256, (12, 12) if i % 2 else (12, 12, 3), dtype=np.uint8)
        )
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return check_data(root)


@pytest.fixture
def make(index: DataIndex) -> Iterator[Make]:
    """Builds loaders of the index and closes them."""
    made: list[Loader] = []

    def build(provider: str, augment: AugmentConfig | None = CROPS, **changes: Any) -> Loader:
        made.append(loader_of(index, provider=provider, augment=augment, **{**SETTINGS, **changes}))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


def same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.count == b.count
        for name in ("images", "labels", "indices"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def assert_images(
    batches: Iterable[Batch], index: DataIndex, provider: str, crop: Callable[..., np.ndarray]
) -> None:
    """Each image against crop(pixels of the file, its record number), by Pillow."""
    for batch in batches:
        for image, i in zip(batch.images, batch.indices.tolist(), strict=True):
            if i != PAD_INDEX:
                pixels = to_channels(decode_image(index.file(i)), len(image))
                expected = torch.from_numpy(crop(pixels, i).reshape(24, 32, -1).copy())
                assert_near(image, expected.permute(2, 0, 1), *EXACTNESS[provider])
        labels = [index.records[i].label for i in batch.indices[: batch.count].tolist()]
        assert batch.labels[: batch.count].tolist() == labels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_images_depend_only_on_seed_epoch_and_record(
    index: DataIndex, make: Make, provider: str, channels: int
):
    shapes = np.array([(r.height, r.width) for r in index.records])
    crops = training_crops(shapes, CROPS, 7, 3)

    def crop(pixels: np.ndarray, i: int) -> np.ndarray:
        return crop_and_resize(pixels, crops.boxes[i], bool(crops.flips[i]), (24, 32))

    assert_images(make(provider, channels=channels).epoch(3), index, provider, crop)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_evaluation_images_equal_those_of_pillow(
    index: DataIndex, make: Make, provider: str, fit: str
):
    def crop(pixels: np.ndarray, i: int) -> np.ndarray:
        return evaluation_crop(pixels, (24, 32), fit)

    assert_images(make(provider, None, channels=3, fit=fit).epoch(0), index, provider, crop)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rotation_and_jitter_are_applied_after_the_crop(
    index: DataIndex, make: Make, provider: str
):
    shapes = np.array([(r.height, r.width) for r in index.records])
    crops = training_crops(shapes, JITTER, 7, 1)
    for plain, turned in zip(make(provider).epoch(1), make(provider, JITTER).epoch(1), strict=True):
        jitter = torch.from_numpy(crops.jitter[plain.indices.numpy()]).float()
        assert torch.equal(turned.images, rotate_and_jitter(plain.images, jitter))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_epochs_shuffle_and_drop_the_incomplete_batch(make: Make, provider: str):
    loader = make(provider)
    orders = [torch.cat([b.indices for b in loader.epoch(e)]).tolist() for e in range(3)]
    assert loader.steps_per_epoch == 5
    for order in orders:
        assert len(order) == len(set(order)) == 20
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != torch.cat([b.indices for b in make(provider, seed=8).epoch(0)]).tolist()


@pytest.mark.parametrize(("provider", "workers"), [(p, 0) for p in PROVIDERS] + [("torch", 2)])
def test_epoch_can_start_at_any_step(make: Make, provider: str, workers: int):
    loader = make(provider, workers=workers)
    whole = list(loader.epoch(1))
    kept = [b.images.clone() for b in whole]
    abandoned = loader.epoch(2)
    next(abandoned)  # abandoned while batches are prefetched
    same(whole[3:], loader.epoch(1, start_step=3))
    same(whole, loader.epoch(1))
    same(whole, make(provider).epoch(1))
    for before, batch in zip(kept, whole, strict=True):
        assert torch.equal(before, batch.images)  # returned batches are not overwritten
    assert list(loader.epoch(1, start_step=5)) == []


@pytest.mark.parametrize("train", [CROPS, None], ids=["train", "evaluate"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_ranks_tile_the_global_batch(
    make: Make, provider: str, train: AugmentConfig | None, world: int
):
    """N ranks of batch b are one rank of batch N*b: position g belongs to rank g % N."""
    one = list(make(provider, train, batch_size=2 * world).epoch(1))
    ranks = [
        list(make(provider, train, batch_size=2, rank=r, world=world).epoch(1))
        for r in range(world)
    ]
    assert {len(r) for r in ranks} == {len(one)}
    for step, whole in enumerate(one):
        assert sum(rank[step].count for rank in ranks) == whole.count
        for name in ("images", "labels", "indices"):
            woven = torch.stack([getattr(ranks[r][step], name) for r in range(world)], 1).flatten(
                0, 1
            )
            assert torch.equal(woven, getattr(whole, name)), name


@pytest.mark.parametrize(("batch_size", "world"), [(4, 1), (7, 3), (50, 4)])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_evaluation_returns_every_image_once_in_order(
    make: Make, provider: str, batch_size: int, world: int
):
    seen: list[int] = []
    for rank in range(world):
        loader = make(provider, None, batch_size=batch_size, rank=rank, world=world)
        for epoch in range(2):  # evaluations repeat
            found = []
            for batch in loader.epoch(epoch):
                assert len(batch) == len(batch.images) == batch_size
                assert (batch.indices[batch.count :] == PAD_INDEX).all()
                assert (batch.labels[batch.count :] == PAD_LABEL).all()
                assert not batch.images[batch.count :].any()
                found += batch.indices[: batch.count].tolist()
        seen += found
    assert sorted(seen) == list(range(COUNT))
    if world == 1:
        assert seen == sorted(seen)


def test_impossible_requests_are_refused(make: Make):
    with pytest.raises(ConfigError, match="loader is 'ffcv'"):
        make("ffcv")
    with pytest.raises(ConfigError, match="start_step is 6; an epoch has 5 steps"):
        next(make("torch").epoch(0, 6))
    with pytest.raises(DataError, match="no images"):
        make("torch", ids=[])


def test_too_few_images_give_an_error_with_the_batch_size_that_fits(make: Make):
    with pytest.raises(
        DataError, match=r"23 training images do not fill one batch of 12 on 2 .* at most 11"
    ):
        make("torch", batch_size=12, world=2)
    assert make("torch", batch_size=11, world=2).steps_per_epoch == 1
    assert make("torch", None, batch_size=100).steps_per_epoch == 1  # evaluation pads instead


@pytest.mark.parametrize("provider", PROVIDERS)
def test_describe_names_provider_steps_and_rank(make: Make, provider: str):
    name = provider.replace("staged", "resident")
    assert make(provider, None).describe().startswith(f"{name}: 23 images, 6 steps of 4, ")
    ranks = make(provider, batch_size=2, rank=1, world=2).describe()
    assert "23 images, 5 steps of 2, rank 1 of 2, " in ranks


def test_loaders_of_one_index_share_the_decoded_images(make: Make):
    train, evaluate = make("resident"), make("resident", None)
    assert train._set is evaluate._set  # type: ignore[attr-defined]
    assert make("resident", channels=3)._set is not train._set  # type: ignore[attr-defined]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_close_ends_the_threads_in_the_middle_of_an_epoch(make: Make, provider: str):
    before = threading.active_count()
    for _ in range(2):
        loader = make(provider)
        stream = loader.epoch(0)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        loader.close()
        del loader, stream
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


# ---- choice of the provider ----


def test_auto_selects_resident_if_it_fits_then_dali_then_torch(
    index: DataIndex, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dali, "unavailable", lambda device: None)
    provider, where, reason = choose("auto", index, 1, CPU)
    assert (provider, where) == ("resident", "device")
    assert "MiB of decoded images fit in memory (at most" in reason
    provider, _, reason = choose("auto", index, 1, CPU, limit_gib=1e-6)
    assert provider == "dali"
    assert "not resident: 0 MiB of decoded images are more than the 0.0 GiB of memory" in reason
    monkeypatch.setattr(dali, "unavailable", lambda device: "not installed")
    provider, _, reason = choose("auto", index, 1, CPU, limit_gib=1e-6)
    assert provider == "torch"
    assert "not dali: not installed" in reason
    assert choose("torch", index, 1, CPU)[0] == "torch"
    for name, reason in (("dali", "not installed"), ("resident", "more than")):
        with pytest.raises(ConfigError, match=f"data.loader is '{name}', but .*{reason}"):
            choose(name, index, 1, CPU, limit_gib=1e-6)


def test_placement_follows_the_documented_shares(monkeypatch: pytest.MonkeyPatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(resident, "available_memory", lambda: 16 * 2**30)
    cases = (
        (0.7, None, "device"),
        (0.9, None, "host"),
        (7.9, None, "host"),
        (8.1, None, None),
        (2.0, 3.0, "device"),
    )
    for size, limit, where in (*cases, (7.0, 7.0, "host"), (7.5, 7.0, None)):
        found, reason = resident.placement(int(size * 2**30), cuda, limit)
        assert found == where, reason
    assert (
        resident.placement(7 * 2**30, CPU, None)[0] == "device"
    )  # the device is the CPU: in its memory
    assert resident.placement(9 * 2**30, CPU, None)[0] is None


def test_dali_whose_import_fails_is_not_available(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    reason = dali.unavailable(CPU)
    assert reason is not None and ("not installed" in reason or "import fails" in reason)


LEAVES_WITHOUT_CLOSING = """
import sys
import torch
from sssd_fast.data.index import DataIndex
from tests.sssd_fast.loaders.loading import PLAIN, loader_of

index = DataIndex.load(sys.argv[1])
loader = loader_of(index, augment=PLAIN, provider=sys.argv[2], workers=2)
stream = loader.epoch(0)
print(next(stream).images.float().mean() > 0)
raise SystemExit(7)
"""


@pytest.mark.parametrize("provider", ["dali", "torch"])
def test_process_that_exits_in_the_middle_of_an_epoch_ends(
    index: DataIndex, tmp_path: Path, provider: str
):
    index.save(tmp_path / "index.json")
    arguments = [str(tmp_path / "index.json"), provider]
    command = [sys.executable, "-c", LEAVES_WITHOUT_CLOSING, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("tensor(True)\n", 7), done.stderr
    assert "Traceback" not in done.stderr
