"""The dense probe for objects: its parts equal references, and it detects objects by features that show them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoulders.features import FeaturesOf
from shoulders.tasks import Row, detection, instance, objects
from shoulders.tasks.data.coco import AnnotatedImage, decode
from shoulders.tasks.data.objects import find_objects
from shoulders.tasks.data.splits import AnnotatedSplits
from shoulders.tasks.feature_bank import FeatureBank
from shoulders.tasks.heads.object_loss import ObjectTarget, assign_anchors, object_losses
from shoulders.tasks.heads.objects import ImageObjects, ObjectHead, ObjectPredictions, box_ious, nms, select_objects
from shoulders.tasks.probe import ProbeFit, SpatialProbe, fit_head, fit_probe
from tests.tasks.scenes import SIZE, colours, constant, save_objects

pytest.importorskip("faster_coco_eval")

SMALL_HEAD = partial(ObjectHead, trunk_width=32, anchor_width=32)
SETTINGS = replace(objects.SETTINGS, min_steps=160, batch=6, lrs=(3e-3,))
BOXES = replace(detection.PROBE, build=partial(SMALL_HEAD, masks=False), settings=SETTINGS)
MASKS = replace(instance.PROBE, build=partial(SMALL_HEAD, masks=True), settings=SETTINGS)


def shorter(probe: SpatialProbe, min_steps: int) -> SpatialProbe:
    return replace(probe, settings=replace(probe.settings, min_steps=min_steps))


def fit(
    probe: SpatialProbe, features_of: FeaturesOf, splits: AnnotatedSplits[AnnotatedImage], **settings: Any
) -> list[Row]:
    return fit_probe(probe, features_of, splits, [SIZE], **settings)


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def random_boxes(count: int, seed: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners.amin(1), corners.amax(1) + 0.5], 1)


def test_ious_equal_those_of_pycocotools() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    one, other = random_boxes(30, 1).double(), random_boxes(20, 2).double()

    def sides(boxes: torch.Tensor) -> np.ndarray:
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).numpy()

    expected = mask.iou(sides(one), sides(other), [0] * 20)
    np.testing.assert_allclose(box_ious(one[:, None], other).numpy(), expected, atol=1e-9)


def test_the_generalized_iou_of_separate_boxes_falls_with_their_distance() -> None:
    one, far = torch.tensor([0.0, 0, 2, 2]), torch.tensor([3.0, 0, 5, 2])
    assert box_ious(one, far, generalized=True).item() == pytest.approx(0 - (10 - 8) / 10)
    assert box_ious(one, one, generalized=True).item() == pytest.approx(1)


def test_nms_keeps_the_best_of_overlapping_boxes_of_a_class() -> None:
    boxes, generator = random_boxes(80, 3), torch.Generator().manual_seed(0)
    scores, classes = torch.rand(80, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    kept: list[int] = []
    for candidate in sorted(range(80), key=lambda i: -scores[i].item()):
        rivals = [other for other in kept if classes[other] == classes[candidate]]
        if all(box_ious(boxes[candidate], boxes[other]) <= 0.3 for other in rivals):
            kept.append(candidate)
    assert nms(boxes, scores, classes, 0.3).tolist() == kept
    assert 10 < len(kept) < 80
    assert nms(boxes[:0], scores[:0], classes[:0]).tolist() == []


def test_an_anchor_is_assigned_to_the_smallest_object_whose_centre_is_near() -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 6.0], [3.2, 2.2, 4.8, 3.8], [7.1, 5.1, 7.3, 5.3]])
    assigned = assign_anchors(boxes, (6, 8)).view(6, 8)
    expected = torch.full((6, 8), -1)
    expected[2:4, 3:5] = 0  # |x - 4| < 1.5 and |y - 3| < 1.5 of the centres
    for y in range(6):
        for x in range(8):
            if abs(x + 0.5 - 4) < 1.5 and abs(y + 0.5 - 3) < 1.5:
                expected[y, x] = 0
            if 3.2 < x + 0.5 < 4.8 and 2.2 < y + 0.5 < 3.8:
                expected[y, x] = 1
    expected[5, 7] = 2  # smaller than an anchor
    assert assigned.tolist() == expected.tolist()
    assert (assign_anchors(boxes[:0], (6, 8)) == -1).all()


def perfect_predictions(target: ObjectTarget, grid: tuple[int, int], n_classes: int) -> ObjectPredictions:
    """Predictions of exactly the object that each anchor is assigned to."""
    assigned = assign_anchors(target.boxes, grid)
    scores = torch.full((1, len(assigned), n_classes), -30.0)
    boxes = torch.zeros(1, len(assigned), 4) + torch.tensor([0.0, 0, 1, 1])
    positive = assigned >= 0
    scores[0, positive, target.classes[assigned[positive]]] = 30.0
    boxes[0, positive] = target.boxes[assigned[positive]]
    if target.masks is None:
        return ObjectPredictions(scores, boxes)
    embeddings = torch.nn.functional.one_hot(assigned.clamp(min=0), len(target.boxes)).float()[None]
    return ObjectPredictions(scores, boxes, embeddings, (target.masks.float() * 60 - 30)[None])


def test_perfect_predictions_have_no_loss_and_give_back_the_objects(tmp_path: Path) -> None:
    images = find_objects(save_objects(tmp_path), masks=True).train.annotations
    for image in images[:6]:
        target = objects.object_target(image, (8, 8), masks=True)
        predictions = perfect_predictions(target, (16, 16), 2)
        terms = object_losses(predictions, [target], (16, 16))
        assert set(terms) == {"score", "box", "mask"}
        assert all(0 <= term.item() < 0.01 for term in terms.values()), terms
        detections = objects.to_detections(select_objects(predictions, 0), image.size, (8, 8))
        order = np.lexsort(detections.boxes.T), np.lexsort(image.boxes.T)
        np.testing.assert_allclose(detections.boxes[order[0]], image.boxes[order[1]], atol=1e-4)
        assert detections.classes[order[0]].tolist() == image.classes[order[1]].tolist()
        assert detections.masks is not None and image.masks is not None
        for ours, theirs in zip(order[0], order[1], strict=True):
            predicted, mask = decode([detections.masks[ours]], image.size), decode([image.masks[theirs]], image.size)
            assert (predicted & mask).sum() / (predicted | mask).sum() > 0.6  # as fine as a grid of 32 x 32 allows


def test_detections_in_groups_have_no_loss() -> None:
    boxes = torch.tensor([[1.0, 1.0, 4.0, 4.0], [6.0, 1.0, 11.0, 7.0]])
    with_group = ObjectTarget(torch.tensor([0, 1]), boxes, torch.tensor([False, True]), None)
    single = torch.zeros(2, dtype=torch.bool)
    predictions = perfect_predictions(ObjectTarget(with_group.classes, boxes, single, None), (8, 12), 2)
    assert object_losses(predictions, [with_group], (8, 12))["score"].item() < 1e-3
    without_group = ObjectTarget(with_group.classes[:1], boxes[:1], with_group.crowd[:1], None)
    assert object_losses(predictions, [without_group], (8, 12))["score"].item() > 10


def test_a_batch_without_objects_has_a_finite_loss() -> None:
    empty = ObjectTarget(
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, 32, 32, dtype=torch.bool),
    )
    head = SMALL_HEAD(3, 2, masks=True)
    terms = object_losses(head(torch.rand(2, 3, 8, 8)), [empty, empty], (16, 16))
    sum(terms.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert terms["box"].item() == terms["mask"].item() == 0


def test_an_image_without_detections_is_valid() -> None:
    nothing = ImageObjects(torch.zeros(0), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 32, 32))
    detections = objects.to_detections(nothing, (40, 50), (8, 8))
    assert detections.boxes.shape == (0, 4) and detections.masks == ()


def test_masks_do_not_depend_on_the_chunks_they_are_upsampled_in() -> None:
    """All masks of a photo of 12 megapixels together would take gigabytes."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 2.0, 8.0, 11.0], [1.0, 5.0, 14.0, 12.0]])
    three = ImageObjects(torch.arange(3), torch.rand(3), boxes, torch.randn(3, 32, 32))
    together = objects.to_detections(three, (40, 50), (8, 8))
    assert objects.to_detections(three, (40, 50), (8, 8), max_pixels=40 * 50 * 2).masks == together.masks
    assert together.masks is not None and decode(together.masks, (40, 50)).any((1, 2)).all()


def test_boxes_are_detected_by_features_that_show_them(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path))
    rows = fit(BOXES, colours, splits, batch=7)
    scores = by_metric(rows)
    assert list(scores) == ["AP", "AP50", "AP75", "AP_small"]  # no object is larger
    assert scores["AP50"] > 0.7 and scores["AP"] > 0.35, scores
    settings = rows[0]["settings"]
    assert (rows[0]["task"], rows[0]["n"], settings["train"], settings["selected_on"]) == ("detection", 8, 24, "val")
    assert by_metric(fit(shorter(BOXES, 40), constant, splits))["AP50"] < 0.3


def test_masks_are_detected_by_features_that_show_them(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 20, "val": 3, "test": 6}), masks=True)
    scores = by_metric(fit(MASKS, colours, splits))
    assert [name for name in scores if name.startswith("mask_")] == [f"mask_{name}" for name in list(scores)[:4]]
    assert scores["mask_AP50"] > 0.6, scores


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 8, "val": 6}), masks=True)

    def values(seed: int, batch: int = 64) -> dict[str, float]:
        return by_metric(fit(shorter(MASKS, 40), colours, splits, batch=batch, seed=seed))

    state = torch.get_rng_state()
    first = values(1)
    assert torch.equal(state, torch.get_rng_state())
    assert max(first.values()) > 0
    assert values(1, batch=3) == first
    assert values(2) != first


def fit_boxes(path: Path, steps: int, values: list[float] | None = None) -> ProbeFit:
    """A fit whose state has these values when it is evaluated."""
    bank = FeatureBank(colours, find_objects(path).train, [SIZE], 8, 0)
    waiting = iter(values or ())
    score = None if values is None else lambda head: next(waiting)
    return fit_head(BOXES, bank, BOXES.targets(bank, 2), 2, 3e-3, steps, 0, score)


def test_a_fit_that_stops_early_is_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    save_objects(tmp_path, {"train": 6, "val": 2})
    selected = fit_boxes(tmp_path, 40, [0.3, 0.5, 0.4, 0.1])
    again = fit_boxes(tmp_path, selected.steps)
    assert (selected.steps, selected.value) == (20, 0.5)
    for ours, theirs in zip(selected.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_of_equal_values_the_longest_fit_is_selected(tmp_path: Path) -> None:
    save_objects(tmp_path, {"train": 6, "val": 2})
    assert fit_boxes(tmp_path, 40, [0.0] * 4).steps == 40


def test_images_that_the_annotation_file_does_not_list_are_left_out(tmp_path: Path) -> None:
    save_objects(tmp_path)
    content = json.loads((tmp_path / "test.json").read_text())
    content["images"] = content["images"][:3]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] < 3]
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"5 of 40 images are not used, .* \('test/3.png', 'test/4.png', "):
        test = find_objects(tmp_path).test
    assert [test.images.name(index) for index in test.indices] == ["0.png", "1.png", "2.png"]
