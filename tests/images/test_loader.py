"""Batches are pure functions of the recipe and the step, and a bad image affects no other one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shoulders.config.sections import Images
from shoulders.errors import DataError, ProcessLost, RecipeError
from shoulders.features import Batch
from shoulders.images import (
    Collection,
    ImageSet,
    batches,
    evaluation_batches,
    open_source,
    random_view,
    render,
)

PHOTOS = Path(os.environ.get("SHOULDERS_DATA", Path(__file__).parents[2] / "../shared/data")) / "photos"
SIZES = [(16, 16), (8, 12)]


def open_set(folder: Path) -> ImageSet:
    return ImageSet({"images": open_source(folder)}, {}, seed=0, holdout=8)


def run(
    images: ImageSet, first_step: int = 0, steps: int = 8, rank: int = 0, world_size: int = 1, **settings: int
) -> list[Batch]:
    recipe = Images.model_validate({"workers": 0} | settings)
    return list(
        batches(
            images, SIZES, recipe, batch=8, seed=3, steps=steps, first_step=first_step, rank=rank, world_size=world_size
        )
    )


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.skipped == other.skipped
        for size in SIZES:
            assert torch.equal(one.rendered[size], other.rendered[size])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(folder: Path, workers: int) -> None:
    images = open_set(folder)
    assert_equal(run(images), run(images, workers=workers))


def test_a_resumed_run_needs_only_the_step(folder: Path) -> None:
    expected = run(open_set(folder))
    for step in (1, 3, 5):  # 32 images train: step 4 begins the second epoch
        assert_equal(expected[step:], run(open_set(folder), first_step=step, steps=8 - step))
    assert_equal(expected[5:], run(open_set(folder), first_step=5, steps=3, workers=2))
    assert run(open_set(folder), first_step=8, steps=0) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_divide_the_batch(folder: Path, world_size: int) -> None:
    images = open_set(folder)
    ranks = [run(images, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, expected in enumerate(run(images)):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(expected.ids, torch.cat([part.ids for part in parts]))
        assert expected.skipped == tuple(skip for part in parts for skip in part.skipped)
        for size in SIZES:
            assert torch.equal(expected.rendered[size], torch.cat([part.rendered[size] for part in parts]))


def test_a_batch_that_cannot_be_divided_among_ranks_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.batch=8 cannot be divided among 3 ranks; make it a multiple of 3"):
        run(open_set(folder), world_size=3)


def test_the_contents_of_a_batch(folder: Path) -> None:
    images = open_set(folder)
    batch = run(images, steps=1)[0]
    for row, (index, visit) in enumerate(images.positions(0, 8).tolist()):
        if index in (7, 21):
            continue
        pixels, full_size = images.collection.pixels(index, 10**6, None)
        identity = int(images.collection.ids[index])
        view = random_view(3, identity, visit, (0.4, 1.0), True, full_size)
        assert batch.ids[row] == identity
        for size in SIZES:
            assert torch.equal(batch.rendered[size][row], render(pixels, view, size))
    assert batch.labels is None and batch.pixels((8, 12)).shape == (8, 3, 8, 12)


def test_bad_images_are_replaced_and_reported(folder: Path) -> None:
    images = open_set(folder)
    training = {images.collection.name(index): int(images.collection.ids[index]) for index in images.training["images"]}
    bad = {"07.jpg", "21.jpg"} & set(training)
    assert bad, "a bad image of the fixture has to be a training image"
    epochs = run(images, steps=8)
    ids = {int(identity) for batch in epochs for identity in batch.ids}
    assert ids <= {training[name] for name in set(training) - bad}
    reported = [skip for batch in epochs for skip in batch.skipped]
    assert {skip.name for skip in reported} == bad
    assert all(skip.reason.startswith(("not an image", "damaged")) for skip in reported)
    assert len(reported) >= 2 * len(bad)  # once in each epoch


def test_held_out_images_are_never_in_training_batches(folder: Path) -> None:
    images = open_set(folder)
    heldout = set(images.collection.ids[images.heldout].tolist())
    assert not heldout & {int(identity) for batch in run(images, steps=12) for identity in batch.ids}


def by_id(run_batches: list[Batch]) -> dict[int, list[bytes]]:
    pixels_of: dict[int, list[bytes]] = {}
    for batch in run_batches:
        for identity, pixels in zip(batch.ids.tolist(), batch.rendered[SIZES[0]], strict=True):
            pixels_of.setdefault(identity, []).append(pixels.numpy().tobytes())
    return pixels_of


def test_views_are_fresh_or_repeated(folder: Path) -> None:
    for name in ("07.jpg", "21.jpg"):
        (folder / name).unlink()
    images = open_set(folder)  # 38 images, 30 of them for training
    recipe = {"steps": 15}  # 120 positions: 4 epochs
    for pixels in by_id(run(images, **recipe)).values():
        assert len(pixels) == len(set(pixels)) == 4
    for pixels in by_id(run(images, **recipe, views=2)).values():
        assert pixels[0] == pixels[2] != pixels[1] == pixels[3]


def test_a_folder_of_bad_images_is_refused(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(b"not found")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"\(not an image: .*\): nor could any other image") as refusal:
            run(open_set(tmp_path), workers=workers)
        assert "\n" not in str(refusal.value)


def test_a_deleted_file_is_skipped(folder: Path) -> None:
    images = open_set(folder)
    deleted = images.collection.name(int(images.positions(0, 1)[0, 0]))
    (folder / deleted).unlink()
    batch = run(images, steps=1)[0]
    assert deleted in {skip.name for skip in batch.skipped} and len(batch) == 8


def test_evaluation_keeps_order_and_leaves_bad_images_out(folder: Path) -> None:
    images = Collection({"images": open_source(folder)})
    for workers in (0, 2):
        result = list(evaluation_batches(images, SIZES, 8, workers=workers))
        ids = [identity for batch in result for identity in batch.ids.tolist()]
        assert ids == [int(identity) for index, identity in enumerate(images.ids) if index not in (7, 21)]
        assert [skip.name for batch in result for skip in batch.skipped] == ["07.jpg", "21.jpg"]
        assert all(batch.labels is None for batch in result)


def test_evaluation_of_selected_images_with_labels(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for number in range(6):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[number % 2] / f"{number}.jpg").write_bytes(jpeg(number))
    images = Collection({"images": open_source(tmp_path)})
    (batch,) = evaluation_batches(images, SIZES, 8, indices=np.array([5, 0, 3]))
    assert batch.labels is not None and batch.labels.tolist() == [1, 0, 1]
    assert batch.ids.tolist() == images.ids[[5, 0, 3]].tolist()


def test_evaluation_batches_without_a_good_image(folder: Path, tmp_path: Path) -> None:
    images = Collection({"images": open_source(folder)})
    result = list(evaluation_batches(images, SIZES, 1, indices=np.array([7, 0, 1, 21])))
    assert [len(batch) for batch in result] == [1, 1]
    assert [[skip.name for skip in batch.skipped] for batch in result] == [["07.jpg"], ["21.jpg"]]
    with pytest.raises(DataError, match="none of 2 images could be decoded"):
        list(evaluation_batches(images, SIZES, 1, indices=np.array([7, 21])))


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(open_set(folder), workers=1, steps=2)
    run(open_set(folder), steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_generator(folder: Path) -> None:
    recipe = Images.model_validate({"workers": 2})
    stream: Iterator[Batch] = batches(open_set(folder), SIZES, recipe, batch=8, seed=0, steps=1000)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    del stream
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        pytest.param(os.abort, "SIGABRT", marks=pytest.mark.slow),
        pytest.param(lambda: os._exit(3), "exit code 3", marks=pytest.mark.slow),
    ],
    ids=["kill", "abort", "exit"],
)
def test_a_lost_worker_and_its_image_are_named(
    end: Callable[[], None], reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, handler = open_set(folder), signal.getsignal(signal.SIGCHLD)

    def decode(self: Collection, index: int, *args: Any, pixels: Any = Collection.pixels) -> Any:
        if self.name(index) == "13.jpg":
            end()
        return pixels(self, index, *args)

    monkeypatch.setattr(Collection, "pixels", decode)
    with pytest.raises(ProcessLost, match=rf"worker \d \(process \d+\) died \({reason}\); .*'13.jpg'") as lost:
        run(images, steps=100, workers=2)
    assert lost.value.exit_code == 70
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_that_dies_while_its_batch_is_received_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is in memory that its worker shares, and the connection breaks before the process has an exit code."""
    images, count = open_set(folder), multiprocessing.get_context("fork").Value("i", 0)

    def decode(self: Collection, index: int, *args: Any, pixels: Any = Collection.pixels) -> Any:
        if count.value == 20:  # in the third batch of the only worker
            resource_sharer.stop()
            count.value += 1
            time.sleep(1)
            os._exit(3)
        count.value += 1
        return pixels(self, index, *args)

    monkeypatch.setattr(Collection, "pixels", decode)
    stream = batches(images, SIZES, Images.model_validate({"workers": 1}), batch=8, seed=3, steps=100)
    next(stream)
    while count.value <= 20:
        time.sleep(0.01)
    with pytest.raises(ProcessLost, match=r"worker 0 \(process \d+\) died \(exit code 3\); .*'\d+\.jpg'"):
        next(stream)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs real photos (set SHOULDERS_DATA)")
def test_real_photos() -> None:
    images = Collection({"images": open_source(PHOTOS)})
    indices = np.arange(0, len(images), 20)
    result = list(evaluation_batches(images, [(64, 64)], 25, indices=indices, workers=1))
    assert [len(batch) for batch in result] == [25, 25]
    assert not any(batch.skipped for batch in result)
    means = torch.cat([batch.pixels((64, 64)) for batch in result]).mean(dim=(0, 2, 3))
    assert ((means > 0.3) & (means < 0.6)).all()  # photos are mid-grey on average


def test_central_views_of_one_shape_show_the_same_part_at_every_size(folder: Path) -> None:
    images = Collection({"images": open_source(folder)})
    (single,) = evaluation_batches(images, [(32, 48)], 4, indices=np.arange(4))
    (shared,) = evaluation_batches(images, [(32, 48), (64, 64)], 4, indices=np.arange(4), shape=(32, 48))
    assert torch.equal(shared.rendered[32, 48], single.rendered[32, 48])
    wide = F.interpolate(shared.rendered[64, 64].float(), (32, 48), mode="bilinear", antialias=True)
    (square,) = evaluation_batches(images, [(64, 64)], 4, indices=np.arange(4))
    cropped = F.interpolate(square.rendered[64, 64].float(), (32, 48), mode="bilinear", antialias=True)
    near, far = ((pixels - single.rendered[32, 48]).abs().mean() for pixels in (wide, cropped))
    assert near < 0.5 * far
