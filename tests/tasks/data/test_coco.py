"""COCO files are read, or refused with the annotation's name; average precision equals that of pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as reference_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from shoulders.errors import DataError, NumericError, RecipeError
from shoulders.tasks.average_precision import METRICS, Detections, Kind, average_precision, interval, match
from shoulders.tasks.data.coco import (
    AnnotatedImage,
    Annotations,
    decode,
    encode,
    parse_run_lengths,
    read_annotations,
)

HEIGHT, WIDTH = 40, 50


def annotation(**changes: Any) -> dict[str, Any]:
    """A complete annotation with some keys changed (None: left out)."""
    complete = {"id": 7, "image_id": 3, "category_id": 20, "bbox": [5, 6, 10, 12], "area": 90, "iscrowd": 0}
    return {key: value for key, value in {**complete, **changes}.items() if value is not None}


def write(folder: Path, *annotations: Any, **changes: Any) -> Path:
    """A file with two images and two classes, whose ids are neither dense nor sorted."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (3, 1)]
    categories = [{"id": 20, "name": "cat"}, {"id": 4, "name": "dog"}]
    file = folder / "train.json"
    content = {"images": images, "categories": categories, "annotations": list(annotations), **changes}
    file.write_text(json.dumps(content))
    return file


def box_mask(top: int, left: int, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
    mask[0, top : top + height, left : left + width] = True
    return mask


def test_images_and_classes_keep_the_order_of_the_file(tmp_path: Path) -> None:
    crowd = annotation(id=8, image_id=1, category_id=4, bbox=[0, 0, 50, 40], area=None, iscrowd=1)
    read = read_annotations(write(tmp_path, crowd, annotation()))
    assert read.classes == ("cat", "dog")
    assert [image.file for image in read.images] == ["3.jpg", "1.jpg"]
    first, second = read.images
    assert (first.size, first.classes.tolist(), first.boxes.tolist()) == ((HEIGHT, WIDTH), [0], [[5, 6, 15, 18]])
    assert (first.areas.tolist(), first.crowd.tolist(), first.masks) == ([90], [False], None)
    assert (second.classes.tolist(), second.areas.tolist(), second.crowd.tolist()) == ([1], [2000], [True])


def test_an_image_without_objects_is_kept(tmp_path: Path) -> None:
    empty = read_annotations(write(tmp_path)).images[1]
    assert (empty.boxes.shape, empty.areas.shape, empty.masks) == ((0, 4), (0,), ())


def test_polygons_and_both_forms_of_run_lengths_are_the_same_mask(tmp_path: Path) -> None:
    mask = box_mask(6, 5, 12, 10)
    flat = mask[0].T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    forms = (
        [[5, 6, 15, 6, 15, 18, 5, 18]],
        {"size": [HEIGHT, WIDTH], "counts": runs},
        {"size": [HEIGHT, WIDTH], "counts": encode(mask)[0]["counts"].decode()},
    )
    bare = {"bbox": None, "area": None}
    file = write(tmp_path, *(annotation(id=i, segmentation=f, **bare) for i, f in enumerate(forms)))
    with pytest.warns(UserWarning, match="2 of 3 objects have the image, class and box of an earlier one"):
        first = read_annotations(file).images[0]
    assert first.masks is not None
    assert (decode(first.masks, first.size) == mask).all()
    assert first.boxes.tolist() == [[5, 6, 15, 18]] * 3
    assert first.areas.tolist() == [120] * 3


def test_polygons_are_drawn_as_by_pycocotools(tmp_path: Path) -> None:
    parts = [[1.5, 2.5, 30.2, 4.0, 20.0, 33.3], [35, 20, 48.9, 22.2, 41, 38.7, 36, 30]]
    first = read_annotations(write(tmp_path, annotation(segmentation=parts))).images[0]
    assert first.masks is not None
    expected = reference_mask.merge(reference_mask.frPyObjects(parts, HEIGHT, WIDTH))
    assert first.masks[0]["counts"] == expected["counts"]


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_masks_are_encoded_and_decoded_as_by_pycocotools(density: float) -> None:
    masks = np.random.default_rng(0).random((3, 37, 41)) < density
    encoded = encode(masks)
    assert (decode(encoded, (37, 41)) == masks).all()
    for mask, one in zip(masks, encoded, strict=True):
        assert one["counts"] == reference_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
        pixels, value = [], False
        for run in parse_run_lengths(one["counts"].decode()):
            pixels += [value] * run
            value = not value
        assert pixels == mask.T.ravel().tolist()
    assert encode(masks[:0]) == ()
    assert decode((), (37, 41)).shape == (0, 37, 41)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_id": 9}, "image 9 is not in the list"),
        ({"image_id": None}, "no 'image_id'"),
        ({"category_id": 1}, "category 1 is not in the list"),
        ({"bbox": None}, "no 'bbox'"),
        ({"bbox": [1, 2, -1, 5]}, "below 0"),
        ({"bbox": [1, 2, 5]}, "left, top, width, height"),
        ({"bbox": [1, 2, 1e300, 5]}, "left, top, width, height"),
        ({"bbox": [1, 2, float("nan"), 5]}, "left, top, width, height"),
        ({"bbox": ["a", 2, 3, 5]}, "left, top, width, height"),
        ({"bbox": 5}, "left, top, width, height"),
        ({"area": -1}, "area -1"),
        ({"segmentation": [[1, 2, 3, 4]]}, "three points"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e300]]}, "three points"),
        ({"segmentation": "text"}, "neither polygons nor run lengths"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1, 2]}}, "cover 3 px"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]}}, "number of pixels"),
        ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}}, r"the image is \[40, 50\]"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "1Ä"}}, "character"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "0000o"}}, "middle of a number"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": 5}}, "neither polygons nor run lengths"),
    ],
)
def test_an_error_names_a_broken_annotation(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = write(tmp_path, annotation(id=1), annotation(id=77, **changes))
    with pytest.raises(DataError, match=reason) as refused:
        read_annotations(file)
    assert str(refused.value).startswith(f"{file}: annotation 77: ")
    assert "\n" not in str(refused.value)


def test_objects_without_width_or_height_are_left_out(tmp_path: Path) -> None:
    """Two of COCO's train2017 are 0 px high."""
    empty = [annotation(id=77, bbox=[1, 2, 0, 5]), annotation(id=78, bbox=[1, 2, 5, 0])]
    with pytest.warns(UserWarning, match=r"left out 2 objects of no width or height \(annotations 77, 78\)"):
        read = read_annotations(write(tmp_path, empty[0], annotation(id=1), empty[1]))
    assert [len(image.boxes) for image in read.images] == [1, 0]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="annotation number 0, without an id"):
        read_annotations(write(tmp_path, "nothing"))
    with pytest.raises(DataError, match="the same id"):
        read_annotations(write(tmp_path, categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]))
    with pytest.raises(DataError, match="no 'height'"):
        read_annotations(write(tmp_path, images=[{"id": 1, "file_name": "1.jpg"}]))
    for side in (0, -3, 10**6, float("inf")):
        with pytest.raises(DataError, match="image 1 is .* px high and 5 px wide|cannot convert float infinity"):
            read_annotations(write(tmp_path, images=[{"id": 1, "file_name": "1.jpg", "height": side, "width": 5}]))
    for text in ("{", "[]", "{}", "5"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json: not a COCO annotation file"):
            read_annotations(tmp_path / "bad.json")
    with pytest.raises(DataError, match="No such file"):
        read_annotations(tmp_path / "absent.json")


def random_detections(seed: int, images: int = 25, side: int = 150) -> tuple[Annotations, list[Detections]]:
    """Ellipses of three classes and all sizes, some of them groups, and detections close to most of them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]

    def draw(ellipses: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.stack([((x - a) / c) ** 2 + ((y - b) / d) ** 2 <= 1 for a, b, c, d in ellipses])

    annotated, detections = [], []
    for image in range(images):
        count = int(rng.integers(0, 7)) if image else 0  # the first image is empty
        ellipses = np.concatenate([rng.uniform(20, 130, (count, 2)), rng.uniform(4, 60, (count, 2))], 1)
        detected = np.concatenate([np.repeat(ellipses, 2, 0), [[75, 75, 20, 20]]])
        detected *= rng.uniform(0.9, 1.1, detected.shape)
        classes = rng.integers(0, 3, count)
        masks = encode(draw(ellipses)) if count else ()
        boxes = np.concatenate([ellipses[:, :2] - ellipses[:, 2:], ellipses[:, :2] + ellipses[:, 2:]], 1)
        areas = np.array([float(reference_mask.area(mask)) for mask in masks])
        crowd = rng.random(count) < 0.15
        annotated.append(AnnotatedImage(f"{image}.png", (side, side), classes, boxes, areas, crowd, masks))
        boxes = np.concatenate([detected[:, :2] - detected[:, 2:], detected[:, :2] + detected[:, 2:]], 1)
        predicted = np.where(rng.random(len(detected)) < 0.9, np.append(np.repeat(classes, 2), 0), 1)
        scores = rng.integers(0, 50, len(detected)) / 50  # with ties
        detections.append(Detections(predicted, scores, boxes, encode(draw(detected))))
    return Annotations(("a", "b", "c", "never annotated"), tuple(annotated)), detections


def reference(
    annotations: Annotations, detections: list[Detections], kind: Kind, chosen: NDArray[np.int64]
) -> list[float]:
    """The six numbers of pycocotools over the chosen images; one that is chosen twice counts twice."""
    images = [{"id": number, "height": 150, "width": 150} for number in range(len(chosen))]
    objects: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for number, index in enumerate(chosen):
        image, of_image = annotations.images[index], detections[index]
        for source, entries in ((image, objects), (of_image, scored)):
            assert source.masks is not None
            for k, (left, top, right, bottom), mask in zip(source.classes, source.boxes, source.masks, strict=True):
                shape = {"segmentation": mask} if kind == "masks" else {"bbox": [left, top, right - left, bottom - top]}
                entries.append({"id": len(entries) + 1, "image_id": number, "category_id": int(k), **shape})
        for entry, area, crowd in zip(objects[-len(image.areas) or 10**6 :], image.areas, image.crowd, strict=True):
            entry.update(area=area, iscrowd=int(crowd))
        for entry, score in zip(scored[-len(of_image.scores) :], of_image.scores, strict=True):
            entry["score"] = float(score)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        categories = [{"id": i, "name": name} for i, name in enumerate(annotations.classes)]
        coco.dataset = {"images": images, "categories": categories, "annotations": objects}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(scored), {"boxes": "bbox", "masks": "segm"}[kind])
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats[:6]]


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_average_precision_equals_that_of_pycocotools(kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    annotations, detections = random_detections(0)
    ours = average_precision(match(annotations, detections, kind))
    expected = reference(annotations, detections, kind, np.arange(len(detections)))
    assert list(ours) == list(METRICS)
    assert list(ours.values()) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < ours["AP"] < ours["AP50"] < 1
    assert capfd.readouterr() == ("", "")


def test_the_interval_is_over_images_drawn_with_replacement() -> None:
    annotations, detections = random_detections(1)
    matches = match(annotations, detections)
    generator = np.random.default_rng(5)
    drawn = [generator.integers(len(detections), size=len(detections)) for _ in range(8)]
    values = [reference(annotations, detections, "boxes", chosen)[0] for chosen in drawn]
    assert interval(matches, draws=8, seed=5) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-9)
    low, high = interval(matches)
    assert low < average_precision(matches)["AP"] < high
    assert interval(matches) == (low, high)


def test_perfect_detections_give_one_and_none_give_zero() -> None:
    annotations, _ = random_detections(2)
    none = [Detections(image.classes[:0], image.areas[:0], image.boxes[:0], ()) for image in annotations.images]
    perfect = [
        Detections(image.classes, np.ones(len(image.classes)), image.boxes, image.masks) for image in annotations.images
    ]
    assert average_precision(match(annotations, none))["AP"] == 0
    assert average_precision(match(annotations, perfect, "masks"))["AP"] == pytest.approx(1)
    empty = Annotations(annotations.classes, annotations.images[:1])
    assert np.isnan(average_precision(match(empty, none[:1]))["AP"])


def test_incomplete_detections_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, detections = random_detections(3, images=2)
    with pytest.raises(RecipeError, match="detections of 1 for 2 images"):
        match(annotations, detections[:1])
    boxes = [Detections(one.classes, one.scores, one.boxes) for one in detections]
    with pytest.raises(RecipeError, match="image number 0 has only boxes"):
        match(annotations, boxes, "masks")
    not_finite = Detections(detections[1].classes, detections[1].scores * np.nan, detections[1].boxes)
    with pytest.raises(NumericError, match=r"1\.png: a detected score"):
        match(annotations, [detections[0], not_finite])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'shoulders\[det\]'"):
        match(annotations, detections)
