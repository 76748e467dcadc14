"""Annotation files as users have them are read or refused by name; average precision is COCO's."""

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
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, decode, encode, read_annotations, run_lengths

HEIGHT, WIDTH = 40, 50


def annotation(**changes: Any) -> dict[str, Any]:
    """A whole annotation, or one with parts of it changed (None: left out)."""
    whole = {"id": 7, "image_id": 3, "category_id": 20, "bbox": [5, 6, 10, 12], "area": 90, "iscrowd": 0}
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


def write(folder: Path, *annotations: Any, **changes: Any) -> Path:
    """A file with two images and two classes, whose ids are neither dense nor sorted."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (3, 1)]
    kinds = [{"id": 20, "name": "cat"}, {"id": 4, "name": "dog"}]
    file = folder / "train.json"
    file.write_text(json.dumps({"images": images, "categories": kinds, "annotations": list(annotations), **changes}))
    return file


def blob(top: int, left: int, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
    mask[0, top : top + height, left : left + width] = True
    return mask


def test_a_file_is_read_in_its_own_order(tmp_path: Path) -> None:
    crowd = annotation(id=8, image_id=1, category_id=4, bbox=[0, 0, 50, 40], area=None, iscrowd=1)
    read = read_annotations(write(tmp_path, crowd, annotation()))
    assert read.classes == ("cat", "dog")
    assert [picture.file for picture in read.pictures] == ["3.jpg", "1.jpg"]
    first, second = read.pictures
    assert (first.size, first.classes.tolist(), first.boxes.tolist()) == ((HEIGHT, WIDTH), [0], [[5, 6, 15, 18]])
    assert (first.areas.tolist(), first.crowd.tolist(), first.masks) == ([90], [False], None)
    assert (second.classes.tolist(), second.areas.tolist(), second.crowd.tolist()) == ([1], [2000], [True])


def test_an_image_without_objects_stays(tmp_path: Path) -> None:
    empty = read_annotations(write(tmp_path)).pictures[1]
    assert (empty.boxes.shape, empty.areas.shape, empty.masks) == ((0, 4), (0,), ())


def test_masks_of_all_three_forms_are_the_same(tmp_path: Path) -> None:
    mask = blob(6, 5, 12, 10)
    flat = mask[0].T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    forms = (
        [[5, 6, 15, 6, 15, 18, 5, 18]],
        {"size": [HEIGHT, WIDTH], "counts": runs},
        {"size": [HEIGHT, WIDTH], "counts": encode(mask)[0]["counts"].decode()},
    )
    bare = {"bbox": None, "area": None}
    picture = read_annotations(
        write(tmp_path, *(annotation(id=i, segmentation=f, **bare) for i, f in enumerate(forms)))
    )
    first = picture.pictures[0]
    assert first.masks is not None
    assert (decode(first.masks, first.size) == mask).all()
    assert first.boxes.tolist() == [[5, 6, 15, 18]] * 3
    assert first.areas.tolist() == [120] * 3


def test_polygons_are_those_of_the_reference(tmp_path: Path) -> None:
    parts = [[1.5, 2.5, 30.2, 4.0, 20.0, 33.3], [35, 20, 48.9, 22.2, 41, 38.7, 36, 30]]
    first = read_annotations(write(tmp_path, annotation(segmentation=parts))).pictures[0]
    assert first.masks is not None
    theirs = reference_mask.merge(reference_mask.frPyObjects(parts, HEIGHT, WIDTH))
    assert first.masks[0]["counts"] == theirs["counts"]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_run_lengths_are_read_and_written(share: float) -> None:
    masks = np.random.default_rng(0).random((3, 37, 41)) < share
    coded = encode(masks)
    assert (decode(coded, (37, 41)) == masks).all()
    for mask, code in zip(masks, coded, strict=True):
        assert code["counts"] == reference_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
        drawn, value = [], False
        for run in run_lengths(code["counts"].decode()):
            drawn += [value] * run
            value = not value
        assert drawn == mask.T.ravel().tolist()
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
        ({"bbox": [1, 2, float("nan"), 5]}, "left, top, width, height"),
        ({"bbox": ["a", 2, 3, 5]}, "left, top, width, height"),
        ({"bbox": 5}, "left, top, width, height"),
        ({"area": -1}, "area -1"),
        ({"segmentation": [[1, 2, 3, 4]]}, "three points"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e300]]}, "three points"),
        ({"segmentation": "here"}, "neither polygons nor run lengths"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1, 2]}}, "cover 3 px"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]}}, "number of pixels"),
        ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}}, r"the image is \[40, 50\]"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "1Ä"}}, "character"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "0000o"}}, "middle of a number"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": 5}}, "neither polygons nor run lengths"),
    ],
)
def test_a_broken_annotation_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = write(tmp_path, annotation(id=1), annotation(id=77, **changes))
    with pytest.raises(DataError, match=reason) as refused:
        read_annotations(file)
    assert str(refused.value).startswith(f"{file}: annotation 77: ")
    assert "\n" not in str(refused.value)


def test_objects_of_no_extent_are_left_out(tmp_path: Path) -> None:
    """Two of COCO's train2017 are 0 px high."""
    flat = [annotation(id=77, bbox=[1, 2, 0, 5]), annotation(id=78, bbox=[1, 2, 5, 0])]
    with pytest.warns(UserWarning, match=r"left out 2 objects of no width or height, 77 first"):
        read = read_annotations(write(tmp_path, flat[0], annotation(id=1), flat[1]))
    assert [len(picture.boxes) for picture in read.pictures] == [1, 0]


def test_a_file_that_is_no_annotation_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="annotation number 0, without an id"):
        read_annotations(write(tmp_path, "nothing"))
    with pytest.raises(DataError, match="the same id"):
        read_annotations(write(tmp_path, categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]))
    with pytest.raises(DataError, match="no 'height'"):
        read_annotations(write(tmp_path, images=[{"id": 1, "file_name": "1.jpg"}]))
    for text in ("{", "[]", "{}", "5"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json: not a COCO annotation file"):
            read_annotations(tmp_path / "bad.json")
    with pytest.raises(DataError, match="No such file"):
        read_annotations(tmp_path / "absent.json")


def scattered(seed: int, images: int = 25, side: int = 150) -> tuple[Annotations, list[Detections]]:
    """Ellipses of three classes and all sizes, some of them groups; most are found about where they are."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]

    def drawn(spots: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.stack([((x - a) / c) ** 2 + ((y - b) / d) ** 2 <= 1 for a, b, c, d in spots])

    pictures, found = [], []
    for image in range(images):
        count = int(rng.integers(0, 7)) if image else 0  # the first image is empty
        spots = np.concatenate([rng.uniform(20, 130, (count, 2)), rng.uniform(4, 60, (count, 2))], 1)
        guessed = np.concatenate([np.repeat(spots, 2, 0), [[75, 75, 20, 20]]])
        guessed *= rng.uniform(0.9, 1.1, guessed.shape)
        kinds = rng.integers(0, 3, count)
        there = encode(drawn(spots)) if count else ()
        boxes = np.concatenate([spots[:, :2] - spots[:, 2:], spots[:, :2] + spots[:, 2:]], 1)
        areas = np.array([float(reference_mask.area(mask)) for mask in there])
        pictures.append(
            AnnotatedImage(f"{image}.png", (side, side), kinds, boxes, areas, rng.random(count) < 0.15, there)
        )
        near = np.concatenate([guessed[:, :2] - guessed[:, 2:], guessed[:, :2] + guessed[:, 2:]], 1)
        guesses = np.where(rng.random(len(guessed)) < 0.9, np.append(np.repeat(kinds, 2), 0), 1)
        scores = rng.integers(0, 50, len(guessed)) / 50  # with ties
        found.append(Detections(guesses, scores, near, encode(drawn(guessed))))
    return Annotations(("a", "b", "c", "never there"), tuple(pictures)), found


def reference(truth: Annotations, found: list[Detections], kind: Kind, chosen: NDArray[np.int64]) -> list[float]:
    """The six numbers of pycocotools, over the images chosen; one chosen twice counts twice."""
    images = [{"id": at, "height": 150, "width": 150} for at in range(len(chosen))]
    objects: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for at, image in enumerate(chosen):
        picture, answer = truth.pictures[image], found[image]
        for part, rows in ((picture, objects), (answer, answers)):
            assert part.masks is not None
            for k, (left, top, right, bottom), mask in zip(part.classes, part.boxes, part.masks, strict=True):
                shape = {"segmentation": mask} if kind == "masks" else {"bbox": [left, top, right - left, bottom - top]}
                rows.append({"id": len(rows) + 1, "image_id": at, "category_id": int(k), **shape})
        for row, area, crowd in zip(objects[-len(picture.areas) or 10**6 :], picture.areas, picture.crowd, strict=True):
            row.update(area=area, iscrowd=int(crowd))
        for row, score in zip(answers[-len(answer.scores) :], answer.scores, strict=True):
            row["score"] = float(score)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        kinds = [{"id": i, "name": name} for i, name in enumerate(truth.classes)]
        coco.dataset = {"images": images, "categories": kinds, "annotations": objects}
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(answers), {"boxes": "bbox", "masks": "segm"}[kind])
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats[:6]]


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_average_precision_is_that_of_pycocotools(kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    truth, found = scattered(0)
    ours = average_precision(match(truth, found, kind))
    theirs = reference(truth, found, kind, np.arange(len(found)))
    assert list(ours) == list(METRICS)
    assert list(ours.values()) == pytest.approx(theirs, abs=1e-9)
    assert 0.1 < ours["AP"] < ours["AP50"] < 1
    assert capfd.readouterr() == ("", "")


def test_the_interval_is_over_images_drawn_with_replacement() -> None:
    truth, found = scattered(1)
    matched = match(truth, found)
    generator = np.random.default_rng(5)
    drawn = [generator.integers(len(found), size=len(found)) for _ in range(8)]
    values = [reference(truth, found, "boxes", chosen)[0] for chosen in drawn]
    assert interval(matched, draws=8, seed=5) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-9)
    low, high = interval(matched)
    assert low < average_precision(matched)["AP"] < high
    assert interval(matched) == (low, high)


def test_all_found_is_one_and_nothing_found_is_zero() -> None:
    truth, _ = scattered(2)
    none = [Detections(p.classes[:0], p.areas[:0], p.boxes[:0], ()) for p in truth.pictures]
    every = [Detections(p.classes, np.ones(len(p.classes)), p.boxes, p.masks) for p in truth.pictures]
    assert average_precision(match(truth, none))["AP"] == 0
    assert average_precision(match(truth, every, "masks"))["AP"] == pytest.approx(1)
    empty = Annotations(truth.classes, truth.pictures[:1])
    assert np.isnan(average_precision(match(empty, none[:1]))["AP"])


def test_what_cannot_be_counted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = scattered(3, images=2)
    with pytest.raises(RecipeError, match="1 answers for 2 images"):
        match(truth, found[:1])
    bare = [Detections(each.classes, each.scores, each.boxes) for each in found]
    with pytest.raises(RecipeError, match="image number 0 has boxes alone"):
        match(truth, bare, "masks")
    lost = Detections(found[1].classes, found[1].scores * np.nan, found[1].boxes)
    with pytest.raises(NumericError, match=r"1\.png: a score"):
        match(truth, [found[0], lost])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'shoulders\[det\]'"):
        match(truth, found)
