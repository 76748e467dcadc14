"""Splits with masks and with objects are found in the layouts that users have; an error names the broken file."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.images import Collection, open_source
from shoulders.tasks.data.labelled import find_labelled
from shoulders.tasks.data.mask_files import read_mask
from shoulders.tasks.data.masks import find_masks
from shoulders.tasks.data.objects import find_objects
from tests.tasks.scenes import save_masks, save_objects


def test_find_masks_reads_all_splits_and_the_class_names(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path))
    assert splits.classes == ("ground", "red", "blue")
    assert splits.val is not None
    assert [len(split.annotations) for split in (splits.train, splits.val, splits.test)] == [24, 8, 8]
    assert splits.how == "train, val, test as given"
    first = splits.train.annotations[0]
    assert (first.path, first.size) == (tmp_path / "annotations/train/0.png", (48, 64))


def test_without_class_names_the_highest_index_is_the_last_class(tmp_path: Path) -> None:
    assert find_masks(save_masks(tmp_path, names=False)).classes == ("0", "1", "2")


def test_masks_with_one_class_and_ignored_pixels_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path)
    for file in (tmp_path / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(file)) == 1, 255, 0).astype(np.uint8)).save(file)
    with pytest.raises(DataError, match=r"hold 1 of 3 classes; .*pixels of 255 are ignored"):
        find_masks(tmp_path)


def test_indices_above_the_classes_are_ignored(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 254, 255]], dtype=np.uint8)).save(tmp_path / "x.png")
    assert read_mask(tmp_path / "x.png", 2).tolist() == [[0, 1, 255, 255, 255]]
    Image.fromarray(np.array([[0, 1, 300, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(tmp_path / "deep.png", 255).tolist() == [[0, 1, 255, 255]]


def test_indices_without_a_name_are_reported(tmp_path: Path) -> None:
    """A list without the background would give every class the name of the next one."""
    save_masks(tmp_path)
    (tmp_path / "classes.json").write_text('["one", "two"]')
    with pytest.warns(
        UserWarning, match=r"masks hold 2 \(in 23\), classes\.json names 0 to 1: such pixels are ignored"
    ):
        assert find_masks(tmp_path).classes == ("one", "two")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    nested = 200_000 * "[" + 200_000 * "]"
    (save_masks(tmp_path / "masks") / "classes.json").write_text(nested)
    with pytest.raises(DataError, match=r"classes\.json: not JSON that can be read: maximum recursion depth"):
        find_masks(tmp_path / "masks")
    (save_objects(tmp_path / "objects") / "train.json").write_text(nested)
    with pytest.raises(DataError, match=r"train\.json: not a COCO annotation file: JSON that is nested too deeply"):
        find_objects(tmp_path / "objects")


@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
def test_labels_of_all_tasks_are_in_stored_pixels(tmp_path: Path, orientation: int) -> None:
    """As in pycocotools and in a mask, which know nothing of the EXIF orientation of the photo."""
    stored = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    stored[10:20, 5:30] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("train", "test"):
        stored[0, 0] = len(split)  # not the same image in both
        file = io.BytesIO()
        Image.fromarray(stored).save(file, "PNG", exif=exif)
        folders = [f"masks/images/{split}", f"objects/{split}", f"classes/{split}/a", f"classes/{split}/b"]
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "x.png").write_bytes(file.getvalue())
        (tmp_path / f"masks/annotations/{split}").mkdir(parents=True)
        mask = (stored == 255).all(-1).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / f"masks/annotations/{split}/x.png")
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 10, 25, 10]}
        image = {"id": 1, "file_name": "x.png", "height": 48, "width": 64}
        content = {"images": [image], "categories": [{"id": 1, "name": "white"}], "annotations": [box]}
        (tmp_path / f"objects/{split}.json").write_text(json.dumps(content))
    for find, folder in ((find_masks, "masks"), (find_objects, "objects"), (find_labelled, "classes")):
        test = find(tmp_path / folder).test
        warned = (
            warnings.catch_warnings() if orientation == 1 else pytest.warns(UserWarning, match="x.png: has an EXIF")
        )
        with warned:
            pixels, size = test.images.pixels(0, 10_000, None)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), stored) and size == (48, 64)
            test.images.pixels(0, 10_000, None)
    upright = Collection({"photos": open_source(tmp_path / "objects/test")}).pixels(0, 10_000, None)[0]
    assert np.array_equal(upright.permute(1, 2, 0).numpy(), stored) == (orientation == 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_hold_indices(bits: int, tmp_path: Path) -> None:
    indices = np.arange(2 ** min(bits, 4)).reshape(2, -1) % 4 if bits > 1 else np.array([[0, 1], [1, 0]])
    (tmp_path / "grey.png").write_bytes(grey_png(indices, bits))
    assert read_mask(tmp_path / "grey.png", 255).tolist() == indices.tolist()


def grey_png(indices: Any, bits: int) -> bytes:
    """A grey PNG with this number of bits per pixel, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = indices.shape
    rows = b""
    for row in indices:
        digits = "".join(f"{int(index):0{bits}b}" for index in row).ljust(-(-width * bits // 8) * 8, "0")
        rows += b"\0" + bytes(int(digits[start : start + 8], 2) for start in range(0, len(digits), 8))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_find_objects_reads_the_layout_of_roboflow(tmp_path: Path) -> None:
    save_objects(tmp_path, {"train": 4, "val": 2})
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").rename(tmp_path / name / "_annotations.coco.json")
    assert len(find_objects(tmp_path).train.annotations) == 4
    (tmp_path / "val").rename(tmp_path / "valid")
    with pytest.raises(RecipeError, match="holds valid; rename it to val"):
        find_objects(tmp_path)


def test_without_test_val_is_evaluated_on(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 20, "val": 5}))
    assert (splits.val, len(splits.test.annotations)) == (None, 5)


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
def test_an_error_names_a_broken_mask(fault: str, tmp_path: Path) -> None:
    break_it, message = MASK_FAULTS[fault]
    break_it(save_masks(tmp_path))
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
        lambda root: change_json(
            root / "train.json", lambda content: content["annotations"][4].update(bbox=[1, 2, -3, 4])
        ),
        "train.json: annotation 5: box",
    ),
    "classes": (
        lambda root: change_json(root / "val.json", lambda content: content["categories"].reverse()),
        "but train has",
    ),
    "masks": (lambda root: change_json(root / "test.json", no_masks), "test.json: 0.png has objects without masks"),
    "no object to fit on": (lambda root: change_json(root / "train.json", no_objects), "train.json: no object in it"),
    "no object to evaluate on": (
        lambda root: change_json(root / "test.json", no_objects),
        "test.json: no object in it",
    ),
}


@pytest.mark.parametrize("fault", OBJECT_FAULTS)
def test_an_error_names_broken_objects(fault: str, tmp_path: Path) -> None:
    break_it, message = OBJECT_FAULTS[fault]
    break_it(save_objects(tmp_path))
    with pytest.raises(DataError, match=message):
        find_objects(tmp_path, masks=True)


@pytest.mark.parametrize("find", [find_masks, find_objects])
def test_other_layouts_are_refused(find: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist; expected PATH/"):
        find(tmp_path / "absent")
    with pytest.raises(RecipeError, match="none of the splits"):
        find(tmp_path)
    (save_masks if find is find_masks else save_objects)(tmp_path, {"train": 2})
    with pytest.raises(RecipeError, match="holds train; train and val or test are needed"):
        find(tmp_path)


def test_real_layouts_are_read(shared_data: Path) -> None:
    streets, cells, people = (shared_data / name for name in ("camvid", "bccd", "pennfudan"))
    with pytest.warns(UserWarning, match=r"masks hold 11 \(in 700\), classes.json names 0 to 10"):  # the void
        assert len(find_masks(streets).classes) == 11
    assert len(find_objects(cells).classes) == 3
    splits = find_objects(people, masks=True)
    assert (splits.val, splits.how) == (None, "train, val as given")
