"""The loader contract: content and order are a function of (seed, epoch, record), shards tile an epoch, resume is exact."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sssd_fast.data.images import decode_image
from sssd_fast.data.index import DataIndex, check_data
from sssd_fast.errors import ConfigError, DataError
from sssd_fast.loaders import PAD_INDEX, PAD_LABEL, AugmentSpec, Batch, build_loader
from sssd_fast.loaders.augment import augment, resize_center_crop
from sssd_fast.loaders.torch_loader import TorchLoader

COUNT = 23
SPEC = AugmentSpec(rotation_deg=10, brightness=0.1, contrast=0.1)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DataIndex:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = root / ("b" if i % 3 else "a")
        folder.mkdir(exist_ok=True)
        shape = (40 + i, 50) if i % 2 else (40, 50 + i, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return check_data(root)


def make(index: DataIndex, train: AugmentSpec | None = SPEC, **changes: object) -> TorchLoader:
    settings = {"batch_size": 4, "image_size": (24, 32), "channels": 1, "train": train, "seed": 7}
    loader = build_loader(index, range(len(index)), **{**settings, **changes})  # type: ignore[arg-type]
    assert isinstance(loader, TorchLoader)
    return loader


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for name in ("images", "labels", "indices", "valid"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_every_training_image_is_the_stated_function_of_seed_epoch_and_record(index: DataIndex):
    for batch in make(index).epoch(3):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 1, 24, 32)
        for image, label, i in zip(batch.images, batch.labels.tolist(), batch.indices.tolist(), strict=True):
            grey = np.asarray(Image.open(index.file(i)).convert("L"))
            expected = augment(grey, SPEC, (24, 32), np.random.default_rng([7, 3, i]))
            np.testing.assert_array_equal(image[0].numpy(), expected)
            assert label == index.records[i].label


def test_three_channels_keep_their_order(index: DataIndex):
    batch = next(make(index, None, channels=3).epoch(0))
    for row, i in enumerate(batch.indices.tolist()):
        image = decode_image(index.file(i))
        expected = resize_center_crop(image if image.ndim == 3 else np.stack([image] * 3, 2), (24, 32))
        np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0).numpy(), expected)


def test_epochs_shuffle_and_drop_the_incomplete_batch(index: DataIndex):
    loader = make(index)
    orders = [torch.cat([b.indices for b in loader.epoch(e)]).tolist() for e in range(3)]
    assert loader.steps_per_epoch == len(loader) == 5
    for order in orders:
        assert len(order) == len(set(order)) == 20
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != torch.cat([b.indices for b in make(index, seed=8).epoch(0)]).tolist()
    left_out = set.union(*(set(range(COUNT)) - set(loader.order(e)[:20].tolist()) for e in range(30)))
    assert len(left_out) > 15  # dropping is not always the same images


@pytest.mark.parametrize("workers", [0, 2])
def test_any_epoch_and_step_can_be_produced_directly(index: DataIndex, workers: int):
    loader = make(index, workers=workers)
    whole = list(loader.epoch(1))
    abandoned = loader.epoch(2)
    next(abandoned)  # left in the middle, with batches in flight
    assert_same(whole[3:], loader.epoch(1, start_step=3))
    assert_same(whole, make(index, cache="none").epoch(1))
    loader.close()


def test_cache_and_workers_change_nothing(index: DataIndex):
    variants = [{"cache": "ram"}, {"cache": "none"}, {"workers": 1}, {"workers": 2}]
    loaders = [make(index, **v) for v in variants]
    for epoch in (0, 1):
        reference = list(make(index).epoch(epoch))
        for loader in loaders:
            assert_same(reference, loader.epoch(epoch))
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("train", [SPEC, None], ids=["train", "evaluate"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_tile_the_global_batch(index: DataIndex, train: AugmentSpec | None, world: int):
    """N ranks of batch b are one rank of batch N*b: position g belongs to rank g % N."""
    one = list(make(index, train, batch_size=2 * world).epoch(1))
    ranks = [list(make(index, train, batch_size=2, rank=r, world=world).epoch(1)) for r in range(world)]
    assert {len(r) for r in ranks} == {len(one)}
    for step, whole in enumerate(one):
        for name in ("images", "labels", "indices", "valid"):
            woven = torch.stack([getattr(ranks[r][step], name) for r in range(world)], 1).flatten(0, 1)
            assert torch.equal(woven, getattr(whole, name)), name


@pytest.mark.parametrize(("batch_size", "world"), [(4, 1), (4, 2), (7, 3), (50, 4), (23, 1)])
def test_evaluation_sees_every_image_once_in_order(index: DataIndex, batch_size: int, world: int):
    seen: list[int] = []
    for rank in range(world):
        for batch in make(index, None, batch_size=batch_size, rank=rank, world=world).epoch(0):
            assert len(batch) == batch_size
            padded = ~batch.valid
            assert (batch.indices[padded] == PAD_INDEX).all()
            assert (batch.labels[padded] == PAD_LABEL).all()
            assert not batch.images[padded].any()
            seen += batch.indices[batch.valid].tolist()
    assert sorted(seen) == list(range(COUNT))
    if world == 1:
        assert seen == sorted(seen)


def test_padding_is_invisible_to_cross_entropy(index: DataIndex):
    batch = list(make(index, None).epoch(0))[-1]
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert batch.valid.sum() == 3
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, batch.labels),
        torch.nn.functional.cross_entropy(logits[:3], batch.labels[:3]),
    )


def test_saved_position_continues_with_the_next_batch(index: DataIndex):
    loader = make(index)
    stream = loader.epoch(2)
    next(stream)
    next(stream)
    state = loader.state_dict()
    other = make(index, batch_size=2, rank=1, world=2)  # the same global batch on other hardware
    assert other.load_state_dict(state) == (2, 2)
    assert_same(list(stream), make(index).epoch(*make(index).load_state_dict(state)))
    assert loader.state_dict()["epoch"] == 3  # the epoch is done: the next one starts at its first step
    assert loader.state_dict()["step"] == 0


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"batch_size": 3}, {"image_size": (32, 32)}, {"channels": 3}, {"train": AugmentSpec()}]
)
def test_saved_position_of_other_settings_is_refused(index: DataIndex, change: dict[str, object]):
    state = make(index).state_dict()
    with pytest.raises(DataError, match="other data or settings"):
        make(index, **change).load_state_dict(state)


def test_saved_position_of_other_images_is_refused(index: DataIndex):
    settings = {"batch_size": 4, "image_size": (24, 32), "channels": 1, "train": SPEC, "seed": 7}
    fewer = build_loader(index, range(20), **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="other data or settings"):
        fewer.load_state_dict(make(index).state_dict())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["vanished", "truncated", "replaced"])
def test_a_file_that_breaks_after_the_check_is_named(tmp_path: Path, workers: int, fault: str):
    for i in range(6):
        (tmp_path / "a").mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a" / f"{i}.png")
    index = check_data(tmp_path)
    bad = tmp_path / "a" / "4.png"
    if fault == "vanished":
        bad.unlink()
    elif fault == "truncated":
        bad.write_bytes(bad.read_bytes()[:100])
    else:
        Image.new("L", (30, 30)).save(bad)
    loader = build_loader(index, range(6), batch_size=3, image_size=(16, 16), channels=1, train=None, workers=workers)
    with pytest.raises(DataError, match=r"a/4\.png") as error:
        list(loader.epoch(0))
    assert "Traceback" not in str(error.value)
    loader.close()


def test_a_dead_worker_process_is_an_error_with_advice(index: DataIndex, monkeypatch: pytest.MonkeyPatch):
    import os

    import sssd_fast.loaders.torch_loader as module

    monkeypatch.setattr(module, "decode_image", lambda path: os._exit(9))  # workers are forked: they inherit this
    loader = make(index, workers=1)
    with pytest.raises(DataError, match=r"a loader process died.*fewer workers"):
        list(loader.epoch(0))
    loader.close()


def test_too_few_images_says_which_batch_fits(index: DataIndex):
    with pytest.raises(DataError, match=r"23 training images do not fill one batch of 12 on 2 .* at most 11"):
        make(index, batch_size=12, world=2)
    assert make(index, batch_size=11, world=2).steps_per_epoch == 1
    assert make(index, None, batch_size=100).steps_per_epoch == 1  # evaluation pads instead


def test_auto_cache_respects_its_limit(index: DataIndex, monkeypatch: pytest.MonkeyPatch):
    import sssd_fast.loaders.torch_loader as module

    decoded: list[str] = []
    monkeypatch.setattr(module, "decode_image", lambda path: decoded.append(str(path)) or decode_image(path))
    roomy, tight = make(index, None), make(index, None, cache_limit_bytes=1000)
    assert "kept in memory" in roomy.describe()
    assert "decoded anew each epoch" in tight.describe()
    for loader, expected in ((roomy, COUNT), (tight, 2 * COUNT)):
        decoded.clear()
        for epoch in range(2):
            list(loader.epoch(epoch))
        assert len(decoded) == expected


def test_settings_out_of_range_are_refused_together(index: DataIndex):
    with pytest.raises(ConfigError) as error:
        make(index, batch_size=0, channels=2, rank=3, workers=-1, cache="disk", fit="pad", image_size=(0, 4))
    for name in ("batch_size", "channels", "rank", "workers", "cache", "fit", "image_size"):
        assert name in str(error.value)
    with pytest.raises(ConfigError, match="cache 'ram' with 2 workers"):
        make(index, workers=2, cache="ram")
    with pytest.raises(ConfigError, match="provider is 'ffcv'"):
        make(index, provider="ffcv")
    with pytest.raises(ConfigError, match="start_step is 6; an epoch has 5 steps"):
        next(make(index).epoch(0, 6))
    with pytest.raises(DataError, match="no images"):
        build_loader(index, [], batch_size=1, image_size=(8, 8), channels=1, train=None)
    with pytest.raises(DataError, match="record numbers 0 to 23; the index holds 23"):
        build_loader(index, [0, 23], batch_size=1, image_size=(8, 8), channels=1, train=None)
