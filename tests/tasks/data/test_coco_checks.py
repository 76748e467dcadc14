"""COCO files whose boxes, areas or masks are written in another way are refused; what only looks odd is counted."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shoulders.errors import DataError
from shoulders.tasks.data.coco import encode, read_annotations
from shoulders.tasks.data.objects import find_objects
from tests.tasks.data.test_splits import change_json
from tests.tasks.scenes import save_objects

WIDTH, HEIGHT, IMAGES, OBJECTS = 200, 160, 12, 4
WHOLE = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])

Corners = NDArray[np.float64]  # left, top, right, bottom


def xywh(box: Corners) -> Corners:
    return np.concatenate([box[:2], box[2:] - box[:2]])


def centred(box: Corners) -> Corners:
    return np.concatenate([(box[:2] + box[2:]) / 2, box[2:] - box[:2]])


def swapped(box: Corners) -> Corners:
    return xywh(box)[[1, 0, 3, 2]]


def size(box: Corners) -> float:
    return float(np.prod(box[2:] - box[:2]))


def polygon(box: Corners) -> Corners:
    return box[[0, 1, 2, 1, 2, 3, 0, 3]]


def write(folder: Path, write_box: Callable[[Corners], Corners] = xywh, seed: int = 0, **keys: Any) -> Path:
    """A file of 48 random boxes; ``keys`` are further keys of annotations, or functions of the true box."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(20, 80, (IMAGES * OBJECTS, 2))
    corners = rng.uniform(0, 1, sides.shape) * (np.array([WIDTH, HEIGHT]) - sides)
    annotations = []
    for index, box in enumerate(np.concatenate([corners, corners + sides], 1)):
        of_box = {"id": index + 1, "image_id": index // OBJECTS, "category_id": 1, "bbox": write_box(box).tolist()}
        of_box |= {key: value(box) if callable(value) else value for key, value in keys.items()}
        annotations.append(of_box)
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(IMAGES)]
    file = folder / "train.json"
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": annotations}
    file.write_text(json.dumps(content))
    return file


PX, FRACTIONS = "in px: write left, top, width, height in px", "in fractions of the image"
CONVENTIONS: dict[str, tuple[Callable[[Corners], Corners], str]] = {
    "corners": (lambda box: box, rf"\d+ of 48 boxes reach out .* seem to be left, top, right, bottom {PX}"),
    "centre": (centred, f"seem to be centre x, centre y, width, height {PX}"),
    "y x h w": (swapped, f"seem to be top, left, height, width {PX}"),
    "y x y x": (lambda box: box[[1, 0, 3, 2]], f"seem to be top, left, bottom, right {PX}"),
    "fractions": (lambda box: xywh(box) / WHOLE, f"seem to be left, top, width, height {FRACTIONS}"),
    "fractions of corners": (lambda box: box / WHOLE, f"seem to be left, top, right, bottom {FRACTIONS}"),
    "fractions of centres": (lambda box: centred(box) / WHOLE, f"centre x, centre y, width, height {FRACTIONS}"),
    "twice as large": (lambda box: 2 * xywh(box), "of 48 boxes do not touch .* for images of another size"),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_boxes_in_another_convention_are_refused(convention: str, tmp_path: Path) -> None:
    write_box, message = CONVENTIONS[convention]
    with pytest.raises(DataError, match=rf"train\.json: .*{message}") as refused:
        read_annotations(write(tmp_path, write_box))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("seed", range(5))
def test_boxes_as_coco_writes_them_are_read_without_a_word(seed: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_annotations(write(tmp_path, seed=seed, area=size, segmentation=lambda box: [polygon(box).tolist()]))
        read_annotations(write(tmp_path, seed=seed, area=lambda box: size(box) / 3))
    assert len(read.images) == IMAGES


def test_evidence_of_areas_and_masks_refuses_boxes_that_lie_in_their_images(tmp_path: Path) -> None:
    """Percent of 0 to 100, and corners close to the upper left, fit as COCO reads them."""
    percent = "seem to be left, top, width, height in percent of the image"
    with pytest.raises(DataError, match=f"the areas are not those of boxes as COCO .* {percent}"):
        read_annotations(write(tmp_path, lambda box: 100 * xywh(box) / WHOLE, area=size))
    with pytest.raises(DataError, match=f"the masks of 48 of 48 objects miss their boxes .* {percent}"):
        outline: Any = lambda box: [polygon(box).tolist()]  # noqa: E731
        read_annotations(write(tmp_path, lambda box: 100 * xywh(box) / WHOLE, segmentation=outline))
    with pytest.raises(DataError, match="seem to be left, top, right, bottom in px"):
        read_annotations(write(tmp_path, lambda box: box / 2, area=lambda box: size(box) / 4))


def test_boxes_that_fill_only_a_part_of_every_image_are_reported(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no box reaches beyond 49% of the width and 62% of .* are they percent, or "):
        read_annotations(write(tmp_path, lambda box: 100 * xywh(box) / WHOLE))
    with pytest.warns(UserWarning, match=r"no box reaches beyond 59% .* are they for images of another size"):
        read_annotations(write(tmp_path, lambda box: 0.6 * xywh(box)))


def test_boxes_that_reach_out_of_an_image_are_counted_if_no_convention_explains_them(tmp_path: Path) -> None:
    """Boxes of the hidden parts of objects do, on all sides."""
    rng = np.random.default_rng(1)
    moved = write(tmp_path, lambda box: xywh(box) + rng.choice([-15, 15]) * np.array([1, 1, 0, 0]))
    with pytest.warns(UserWarning, match=r"11 of 48 boxes reach out of their images by more than 1.5 px"):
        read = read_annotations(moved)
    assert sum(len(image.boxes) for image in read.images) == IMAGES * OBJECTS


def run_lengths(box: Corners, rows: bool) -> dict[str, Any]:
    left, top, right, bottom = box.astype(int)
    mask = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
    mask[0, top:bottom, left:right] = True
    mask = mask.reshape(1, WIDTH, HEIGHT).transpose(0, 2, 1) if rows else mask
    return {"size": [HEIGHT, WIDTH], "counts": encode(mask)[0]["counts"].decode()}


MASKS: dict[str, tuple[Callable[[Corners], Any], str]] = {
    "fractions": (lambda box: [(polygon(box) / np.tile(WHOLE[:2], 4)).tolist()], "the polygons seem to be fractions"),
    "y x": (lambda box: [polygon(box).reshape(4, 2)[:, ::-1].ravel().tolist()], "seems to have y before x"),
    "rows": (lambda box: run_lengths(box, rows=True), "run lengths go down the columns, not along the rows"),
}


@pytest.mark.parametrize("way", MASKS)
def test_masks_that_miss_their_boxes_are_refused(way: str, tmp_path: Path) -> None:
    shape, message = MASKS[way]
    with pytest.raises(DataError, match=rf"the masks of \d+ of 48 objects miss their boxes .*{message}"):
        read_annotations(write(tmp_path, segmentation=shape))
    assert read_annotations(write(tmp_path, segmentation=lambda box: run_lengths(box, rows=False))).images


def test_some_masks_that_miss_their_boxes_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, segmentation=lambda box: [polygon(box).tolist()])

    def move(content: Any) -> None:
        for number in (3, 10, 20):
            content["annotations"][number]["segmentation"] = [[1, 1, 4, 1, 4, 4]]

    change_json(file, move)
    with pytest.warns(UserWarning, match=r"masks of 3 of 48 objects miss their boxes \(annotations 4, 11, 21\)"):
        read_annotations(file)


@pytest.mark.parametrize("value", ["0", "1", 2, "false", [0]])
def test_iscrowd_is_a_number(value: Any, tmp_path: Path) -> None:
    """``bool("0")`` is true: every object would be a group, which counts for nothing."""
    with pytest.raises(DataError, match="annotation 1: iscrowd .* is neither 0 nor 1"):
        read_annotations(write(tmp_path, iscrowd=value))
    for crowd in (0, 1, False, True, None):
        read = read_annotations(write(tmp_path, iscrowd=crowd))
        assert all((image.crowd == bool(crowd)).all() for image in read.images)


def test_objects_given_twice_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path)
    change_json(file, lambda content: content["annotations"].extend(content["annotations"][:5]))
    with pytest.warns(
        UserWarning, match=r"5 of 53 objects have the image, class and box of an .* \(annotations 1, 2, 3,"
    ):
        read_annotations(file)


@pytest.mark.parametrize("of_mask", [False, True])
@pytest.mark.parametrize("unit", [1 / (WIDTH * HEIGHT), 0, 100])
def test_areas_in_another_unit_are_counted(unit: float, of_mask: bool, tmp_path: Path) -> None:
    masks: Any = {"segmentation": lambda box: [polygon(box).tolist()]} if of_mask else {}
    with pytest.warns(UserWarning, match=r"areas of 48 of 48 objects are not those of their masks or boxes in px"):
        read_annotations(write(tmp_path, area=lambda box: unit * size(box), **masks))


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    """Roboflow's first category has no object, and sometimes the name of a class."""
    file = write(tmp_path)
    change_json(file, lambda content: content["categories"].insert(0, {"id": 0, "name": "cat"}))
    assert read_annotations(file).classes == ("cat",)
    change_json(file, lambda content: content["annotations"][7].update(category_id=0))
    with pytest.raises(DataError, match="categories 1 and 0 are both called 'cat'"):
        read_annotations(file)


def test_an_image_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path)
    change_json(file, lambda content: content["images"].append(content["images"][3] | {"id": 99}))
    with pytest.raises(DataError, match=r"1 images are listed more than once \('3\.png'\)"):
        read_annotations(file)


def test_splits_with_many_images_without_objects_are_reported(tmp_path: Path) -> None:
    save_objects(tmp_path)

    def keep(count: int) -> Callable[[dict[str, Any]], None]:
        return lambda content: content.update(
            annotations=[one for one in content["annotations"] if one["image_id"] < count]
        )

    change_json(tmp_path / "test.json", keep(6))
    assert find_objects(tmp_path).classes == ("red", "blue")
    change_json(tmp_path / "test.json", keep(5))
    with pytest.warns(UserWarning, match=r"3 of 8 images of test have no object \('test/5\.png', 'test/6\.png', "):
        find_objects(tmp_path)


def test_classes_without_an_object_in_train_are_reported(tmp_path: Path) -> None:
    save_objects(tmp_path)
    for name in ("train", "val", "test"):
        change_json(tmp_path / f"{name}.json", lambda content: content["categories"].append({"id": 9, "name": "green"}))
    with pytest.warns(UserWarning, match=r"classes without an object in train: 1 of 3 \('green'\)$"):
        assert find_objects(tmp_path).classes == ("red", "blue", "green")
    change_json(tmp_path / "test.json", lambda content: content["annotations"][0].update(category_id=9))
    with pytest.warns(UserWarning, match=r"1 of 3 \('green'\); other splits have 'green', which a probe cannot learn"):
        find_objects(tmp_path)


def test_images_that_train_holds_too_are_counted(tmp_path: Path) -> None:
    """By their bytes, whatever they are called; equal boxes of different images are no evidence."""
    save_objects(tmp_path, {"train": 6, "val": 4})
    (tmp_path / "val/3.png").write_bytes((tmp_path / "train/5.png").read_bytes())
    content = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "val")}
    of_train = [one for one in content["train"]["annotations"] if one["image_id"] == 5]
    others = [one for one in content["val"]["annotations"] if one["image_id"] != 3]
    content["val"]["annotations"] = others + [one | {"image_id": 3, "id": 100 + one["id"]} for one in of_train]
    (tmp_path / "val.json").write_text(json.dumps(content["val"]))
    with pytest.warns(UserWarning, match=r"1 of 4 images of val are in train too \('3\.png'\)"):
        find_objects(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "val/3.png")
    find_objects(tmp_path)


@pytest.mark.parametrize("name", ["bccd", "pennfudan", "coco128/det", "coco128/ins"])
def test_real_files_are_read_without_a_word(name: str, shared_data: Path) -> None:
    files = sorted((shared_data / name).glob("*.json"))
    assert len(files) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            read_annotations(file)
