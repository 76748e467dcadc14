"""Labels of places are found as users have them, and what is broken is named."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.errors import DataError, NumericError, RecipeError
from shoulders.features import Batch, Features
from shoulders.tasks.data.dense import find_masks, find_objects, read_mask
from shoulders.tasks.feature_bank import FeatureBank, hold_out, minibatches
from tests.tasks.scenes import SIZE, colours, save_masks, save_objects


def test_masks_are_found_with_their_names(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path))
    assert splits.classes == ("ground", "red", "blue")
    assert splits.val is not None
    assert [len(split.truths) for split in (splits.train, splits.val, splits.test)] == [24, 8, 8]
    assert splits.how == "train, val, test as given"
    first = splits.train.truths[0]
    assert (first.path, first.size) == (tmp_path / "annotations/train/0.png", (48, 64))


def test_without_names_the_highest_index_says_how_many_classes_there_are(tmp_path: Path) -> None:
    assert find_masks(save_masks(tmp_path, names=False)).classes == ("0", "1", "2")


def test_masks_of_one_class_beside_what_is_ignored_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path)
    for file in (tmp_path / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(file)) == 1, 255, 0).astype(np.uint8)).save(file)
    with pytest.raises(DataError, match=r"hold 1 of 3 classes; .*pixels of 255 belong to none"):
        find_masks(tmp_path)


def test_indices_above_the_classes_are_ignored(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 254, 255]], dtype=np.uint8)).save(tmp_path / "x.png")
    assert read_mask(tmp_path / "x.png", 2).tolist() == [[0, 1, 255, 255, 255]]
    Image.fromarray(np.array([[0, 1, 300, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(tmp_path / "deep.png", 255).tolist() == [[0, 1, 255, 255]]


def test_indices_without_a_name_are_told(tmp_path: Path) -> None:
    """A list that leaves out the background would give every class the name of the next."""
    save_masks(tmp_path)
    (tmp_path / "classes.json").write_text('["one", "two"]')
    with pytest.warns(UserWarning, match=r"masks hold 2, classes\.json names 0 to 1: such pixels count as none"):
        assert find_masks(tmp_path).classes == ("one", "two")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_hold_indices(bits: int, tmp_path: Path) -> None:
    wanted = np.arange(2 ** min(bits, 4)).reshape(2, -1) % 4 if bits > 1 else np.array([[0, 1], [1, 0]])
    (tmp_path / "grey.png").write_bytes(grey_png(wanted, bits))
    assert read_mask(tmp_path / "grey.png", 255).tolist() == wanted.tolist()


def grey_png(indices: Any, bits: int) -> bytes:
    """A grey PNG of so many bits a pixel, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = indices.shape
    rows = b""
    for row in indices:
        digits = "".join(f"{int(index):0{bits}b}" for index in row).ljust(-(-width * bits // 8) * 8, "0")
        rows += b"\0" + bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_objects_as_roboflow_lays_them_out(tmp_path: Path) -> None:
    save_objects(tmp_path, {"train": 4, "val": 2})
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").rename(tmp_path / name / "_annotations.coco.json")
    assert len(find_objects(tmp_path).train.truths) == 4
    (tmp_path / "val").rename(tmp_path / "valid")
    with pytest.raises(RecipeError, match="holds valid; rename it to val"):
        find_objects(tmp_path)


def test_without_test_val_is_reported_and_a_fifth_of_train_chosen_on(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 20, "val": 5}))
    assert (splits.val, len(splits.test.truths)) == (None, 5)
    train = FeatureBank(colours, splits.train, SIZE, 8, 0)
    fit_on, choose_on = hold_out(train)
    assert (len(fit_on), len(choose_on)) == (16, 4)
    assert choose_on.ids().max() < fit_on.ids().min()
    row_of = {picture.file: row for row, picture in enumerate(train.truths)}
    for part in (fit_on, choose_on):
        rows = [row_of.pop(picture.file) for picture in part.truths]
        assert torch.equal(part.maps(range(len(part))), train.maps(rows))
    assert not row_of
    with pytest.raises(DataError, match="one image alone"):
        hold_out(train.take(np.array([3])))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


MASK_FAULTS = {
    "no mask": (lambda root: (root / "annotations/val/3.png").unlink(), "annotations/val/3.png: missing"),
    "no masks at all": (lambda root: (root / "annotations").rename(root / "labels"), "train/0.png: missing"),
    "half a mask": (
        lambda root: (root / "annotations/train/5.png").write_bytes(b"\x89PNG\r\n"),
        "train/5.png: not a mask that can",
    ),
    "colours": (
        lambda root: Image.new("RGB", (64, 48)).save(root / "annotations/test/0.png"),
        "test/0.png: .* holds colours",
    ),
    "names": (lambda root: (root / "classes.json").write_text('{"a": 0}'), "classes.json: not a list of names"),
    "no JSON": (lambda root: (root / "classes.json").write_text("["), "classes.json: not JSON"),
    "twice": (lambda root: (root / "classes.json").write_text('["a", "a"]'), "2 names, 1 different"),
    "one class": (lambda root: (root / "classes.json").write_text('["ground"]'), "needs at least two"),
}


@pytest.mark.parametrize("fault", MASK_FAULTS)
def test_a_broken_mask_is_named(fault: str, tmp_path: Path) -> None:
    breaks, message = MASK_FAULTS[fault]
    breaks(save_masks(tmp_path))
    with pytest.raises(DataError, match=message):
        find_masks(tmp_path)


def no_masks(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        annotation.pop("segmentation")


def no_objects(content: dict[str, Any]) -> None:
    content["annotations"].clear()


OBJECT_FAULTS = {
    "no annotations": (lambda root: (root / "val.json").unlink(), "val.json: No such file"),
    "no images": (lambda root: (root / "val").rename(root / "elsewhere"), "val: missing"),
    "image": (lambda root: (root / "test/2.png").unlink(), "test/2.png: missing, but test.json lists it"),
    "box": (
        lambda root: change_json(root / "train.json", lambda told: told["annotations"][4].update(bbox=[1, 2, -3, 4])),
        "train.json: annotation 5: box",
    ),
    "classes": (
        lambda root: change_json(root / "val.json", lambda told: told["categories"].reverse()),
        "but train has",
    ),
    "masks": (lambda root: change_json(root / "test.json", no_masks), "test.json: 0.png has objects without masks"),
    "nothing to learn from": (lambda root: change_json(root / "train.json", no_objects), "train.json: no object in it"),
    "nothing to find": (lambda root: change_json(root / "test.json", no_objects), "test.json: no object in it"),
}


@pytest.mark.parametrize("fault", OBJECT_FAULTS)
def test_broken_objects_are_named(fault: str, tmp_path: Path) -> None:
    breaks, message = OBJECT_FAULTS[fault]
    breaks(save_objects(tmp_path))
    with pytest.raises(DataError, match=message):
        find_objects(tmp_path, masks=True)


@pytest.mark.parametrize("find", [find_masks, find_objects])
def test_other_layouts_are_refused(find: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing here; allowed is"):
        find(tmp_path / "absent")
    with pytest.raises(RecipeError, match="none of the splits"):
        find(tmp_path)
    (save_masks if find is find_masks else save_objects)(tmp_path, {"train": 2})
    with pytest.raises(RecipeError, match="holds train; it takes train and val or test"):
        find(tmp_path)


def test_features_computed_anew_are_those_that_were_kept(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).train
    kept = FeatureBank(colours, split, SIZE, 5, 0)
    anew = FeatureBank(colours, split, SIZE, 5, 2, keep_bytes=0)
    assert kept.kept is not None and anew.kept is None
    assert (kept.grid, kept.width, len(kept)) == ((8, 8), 3, 24)
    assert torch.equal(kept.maps([7, 0, 7]), anew.maps([7, 0, 7]))
    # the whole picture, whatever its aspect; by name, "15" comes before "2"
    assert kept.truths[7].path.name == "15.png"
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "images/train/15.png"))).permute(2, 0, 1)[None] / 255.0
    whole = torch.nn.functional.adaptive_avg_pool2d(pixels, (8, 8)) * 4 - 2
    torch.testing.assert_close(kept.maps([7]), whole, atol=0.3, rtol=0)


def test_images_that_cannot_be_read_are_left_out_and_told(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).val
    assert split is not None
    (tmp_path / "images/val/2.png").write_bytes(b"no picture")
    for keep in (2**30, 0):
        frozen = FeatureBank(colours, split, SIZE, 3, 0, keep_bytes=keep)
        assert [image.name for image in frozen.skipped] == ["2.png"]
        assert [truth.path.stem for truth in frozen.truths] == ["0", "1", "3", "4", "5", "6", "7"]
        assert frozen.maps([2]).shape == (1, 3, 8, 8)
    for file in (tmp_path / "images/val").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 8 images can be read"):
        FeatureBank(colours, split, SIZE, 3, 0)


def test_an_image_of_another_size_than_its_labels_is_refused(tmp_path: Path) -> None:
    split = find_objects(save_objects(tmp_path)).test
    Image.new("RGB", (64, 40)).save(tmp_path / "test/4.png")
    with pytest.raises(DataError, match="4.png: the image is 64 x 40 px, its labels are for 64 x 48 px"):
        FeatureBank(colours, split, SIZE, 3, 1)


def test_features_must_be_of_places_and_finite(tmp_path: Path) -> None:
    split = find_masks(save_masks(tmp_path)).test

    def broken(batch: Batch) -> Features:
        return Features(None, torch.full((len(batch), 4, 2), torch.nan), (2, 2))

    with pytest.raises(RecipeError, match="no spatial part"):
        FeatureBank(lambda batch: Features(torch.ones(len(batch), 2), None), split, SIZE, 8, 0)
    with pytest.raises(NumericError, match="not finite"):
        FeatureBank(broken, split, SIZE, 8, 0)


def test_minibatches_pass_over_all_rows_in_turn() -> None:
    drawn = list(minibatches(10, 4, 5, torch.Generator().manual_seed(0)))
    rows = sum(drawn, [])
    assert [sorted(rows[:10]), sorted(rows[10:])] == [list(range(10))] * 2
    assert drawn == list(minibatches(10, 4, 5, torch.Generator().manual_seed(0)))
    assert [len(rows) for rows in minibatches(3, 4, 2, torch.Generator())] == [3, 3]


def test_real_layouts_are_read(shared_data: Path) -> None:
    street, blood, people = (shared_data / name for name in ("camvid", "bccd", "pennfudan"))
    with pytest.warns(UserWarning, match="masks hold 11, classes.json names 0 to 10"):  # what is void there
        assert len(find_masks(street).classes) == 11
    assert len(find_objects(blood).classes) == 3
    found = find_objects(people, masks=True)
    assert (found.val, found.how) == (None, "train, val as given")
