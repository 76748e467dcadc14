"""A feature bank stores or recomputes the same features, and holds out and draws images as documented."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.errors import DataError, NumericError, RecipeError
from shoulders.features import Batch, Features
from shoulders.tasks.data.masks import find_masks
from shoulders.tasks.data.objects import find_objects
from shoulders.tasks.feature_bank import FeatureBank, hold_out, minibatches
from shoulders.tasks.skipped import max_unreadable
from tests.tasks.scenes import SIZE, colours, save_masks, save_objects


def test_features_computed_again_equal_the_stored_ones(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).train
    stored = FeatureBank(colours, split, [SIZE], 5, 0)
    computed = FeatureBank(colours, split, [SIZE], 5, 2, max_bytes=0)
    assert stored.stored is not None and computed.stored is None
    assert (stored.grid, stored.width, len(stored)) == ((8, 8), 3, 24)
    assert torch.equal(stored.maps([7, 0, 7]), computed.maps([7, 0, 7]))
    # images are sorted by name, so that "15" is before "2"; each is drawn whole, whatever its aspect
    assert stored.annotations[7].path.name == "15.png"
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "images/train/15.png"))).permute(2, 0, 1)[None] / 255.0
    expected = torch.nn.functional.adaptive_avg_pool2d(pixels, (8, 8)) * 4 - 2
    torch.testing.assert_close(stored.maps([7]), expected, atol=0.3, rtol=0)


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).val
    assert split is not None
    (tmp_path / "images/val/2.png").write_bytes(b"not an image")
    for max_bytes in (2**30, 0):
        with max_unreadable(0.2):
            bank = FeatureBank(colours, split, [SIZE], 3, 0, max_bytes=max_bytes)
        assert [image.name for image in bank.skipped] == ["2.png"]
        assert [file.path.stem for file in bank.annotations] == ["0", "1", "3", "4", "5", "6", "7"]
        assert bank.maps([2]).shape == (1, 3, 8, 8)
    for file in (tmp_path / "images/val").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 8 images can be read"):
        FeatureBank(colours, split, [SIZE], 3, 0)


def test_each_image_is_drawn_at_all_sizes(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).test
    small = (16, 24)

    def both(batch: Batch) -> Features:
        coarse = torch.nn.functional.avg_pool2d(batch.pixels(small), (2, 3)) * 4 - 2  # (B, 3, 8, 8)
        return Features.from_map(torch.cat([colours(batch).to_map(), coarse], 1))

    (tmp_path / "images/test/2.png").write_bytes(b"not an image")
    with max_unreadable(0.2):
        for max_bytes in (2**30, 0):
            bank = FeatureBank(both, split, [SIZE, small], 3, 1, max_bytes=max_bytes)
            expected = FeatureBank(colours, split, [SIZE], 3, 0)
            assert (len(bank), bank.width, bank.readable.tolist()) == (7, 6, [0, 1, 3, 4, 5, 6, 7])
            assert torch.equal(bank.maps(range(7))[:, :3], expected.maps(range(7)))
            torch.testing.assert_close(bank.maps(range(7))[:, 3:], expected.maps(range(7)), atol=0.3, rtol=0)


def test_an_image_of_another_size_than_its_annotation_is_refused(tmp_path: Path) -> None:
    split = find_objects(save_objects(tmp_path)).test
    Image.new("RGB", (64, 40)).save(tmp_path / "test/4.png")
    with pytest.raises(DataError, match="4.png: the image is 64 x 40 px, its labels are for 64 x 48 px"):
        FeatureBank(colours, split, [SIZE], 3, 1)


def test_features_must_be_spatial_and_finite(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).test

    def broken(batch: Batch) -> Features:
        return Features(None, torch.full((len(batch), 4, 2), torch.nan), (2, 2))

    with pytest.raises(RecipeError, match="no spatial component"):
        FeatureBank(lambda batch: Features(torch.ones(len(batch), 2), None), split, [SIZE], 8, 0)
    with pytest.raises(NumericError, match="not finite"):
        FeatureBank(broken, split, [SIZE], 8, 0)


def test_minibatches_use_every_index_once_per_epoch() -> None:
    drawn = list(minibatches(10, 4, 5, torch.Generator().manual_seed(0)))
    indices = sum(drawn, [])
    assert [sorted(indices[:10]), sorted(indices[10:])] == [list(range(10))] * 2
    assert drawn == list(minibatches(10, 4, 5, torch.Generator().manual_seed(0)))
    assert [len(indices) for indices in minibatches(3, 4, 2, torch.Generator())] == [3, 3]


def test_hold_out_takes_the_fifth_of_train_with_the_lowest_ids(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 20, "val": 5}))
    train = FeatureBank(colours, splits.train, [SIZE], 8, 0)
    fit_on, select_on = hold_out(train)
    assert (len(fit_on), len(select_on)) == (16, 4)
    assert select_on.ids().max() < fit_on.ids().min()
    index_of = {image.file: index for index, image in enumerate(train.annotations)}
    for part in (fit_on, select_on):
        indices = [index_of.pop(image.file) for image in part.annotations]
        assert torch.equal(part.maps(range(len(part))), train.maps(indices))
    assert not index_of
    with pytest.raises(DataError, match="only one image"):
        hold_out(train.take(np.array([3])))
