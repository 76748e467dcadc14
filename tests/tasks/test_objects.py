"""The probe for objects: its parts agree with references, and it finds what is in the features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shoulders.tasks import find_objects, objects
from shoulders.tasks.data.coco import decode
from shoulders.tasks.feature_bank import FeatureBank
from shoulders.tasks.heads import objects as object_head
from shoulders.tasks.heads.objects import Answer, Objects, Target, assign, ious, losses, nms, pick
from shoulders.tasks.rows import Row
from tests.tasks.scenes import SIZE, colours, noise, save_objects

pytest.importorskip("faster_coco_eval")


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_head, "WIDTH", 32)
    monkeypatch.setattr(object_head, "FINE_WIDTH", 32)
    monkeypatch.setattr(objects, "FEWEST_STEPS", 160)
    monkeypatch.setattr(objects, "BATCH", 6)
    monkeypatch.setattr(objects, "LR", 3e-3)


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def random_boxes(count: int, seed: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners.amin(1), corners.amax(1) + 0.5], 1)


def test_overlaps_agree_with_pycocotools() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    one, other = random_boxes(30, 1).double(), random_boxes(20, 2).double()

    def sides(boxes: torch.Tensor) -> np.ndarray:
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).numpy()

    expected = mask.iou(sides(one), sides(other), [0] * 20)
    np.testing.assert_allclose(ious(one[:, None], other).numpy(), expected, atol=1e-9)


def test_the_generalized_overlap_knows_how_far_apart_boxes_are() -> None:
    one, far = torch.tensor([0.0, 0, 2, 2]), torch.tensor([3.0, 0, 5, 2])
    assert ious(one, far, general=True).item() == pytest.approx(0 - (10 - 8) / 10)
    assert ious(one, one, general=True).item() == pytest.approx(1)


def test_of_boxes_that_overlap_the_best_of_each_class_is_kept() -> None:
    boxes, generator = random_boxes(80, 3), torch.Generator().manual_seed(0)
    scores, classes = torch.rand(80, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    kept: list[int] = []
    for candidate in sorted(range(80), key=lambda i: -scores[i].item()):
        rivals = [other for other in kept if classes[other] == classes[candidate]]
        if all(ious(boxes[candidate], boxes[other]) <= 0.3 for other in rivals):
            kept.append(candidate)
    assert nms(boxes, scores, classes, 0.3).tolist() == kept
    assert 10 < len(kept) < 80
    assert nms(boxes[:0], scores[:0], classes[:0]).tolist() == []


def test_places_answer_for_the_smallest_object_near_whose_centre_they_are() -> None:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 6.0], [3.2, 2.2, 4.8, 3.8], [7.1, 5.1, 7.3, 5.3]])
    owner = assign(boxes, (6, 8)).view(6, 8)
    expected = torch.full((6, 8), -1)
    expected[2:4, 3:5] = 0  # |x - 4| < 1.5 and |y - 3| < 1.5 of the middles
    for y in range(6):
        for x in range(8):
            if abs(x + 0.5 - 4) < 1.5 and abs(y + 0.5 - 3) < 1.5:
                expected[y, x] = 0
            if 3.2 < x + 0.5 < 4.8 and 2.2 < y + 0.5 < 3.8:
                expected[y, x] = 1
    expected[5, 7] = 2  # smaller than a place
    assert owner.tolist() == expected.tolist()
    assert (assign(boxes[:0], (6, 8)) == -1).all()


def perfect(target: Target, grid: tuple[int, int], n_classes: int) -> Answer:
    """The answer that says at each place the object that it has to answer for."""
    owner = assign(target.boxes, grid)
    scores = torch.full((1, len(owner), n_classes), -30.0)
    boxes = torch.zeros(1, len(owner), 4) + torch.tensor([0.0, 0, 1, 1])
    at = owner >= 0
    scores[0, at, target.classes[owner[at]]] = 30.0
    boxes[0, at] = target.boxes[owner[at]]
    if target.masks is None:
        return Answer(scores, boxes)
    embeddings = torch.nn.functional.one_hot(owner.clamp(min=0), len(target.boxes)).float()[None]
    return Answer(scores, boxes, embeddings, (target.masks.float() * 60 - 30)[None])


def test_the_right_answer_costs_nothing_and_scores_everything(tmp_path: Path) -> None:
    pictures = find_objects(save_objects(tmp_path), masks=True).train.truths
    for picture in pictures[:6]:
        target = objects.target_of(picture, (8, 8), masks=True)
        answer = perfect(target, (16, 16), 2)
        terms = losses(answer, [target], (16, 16))
        assert set(terms) == {"score", "box", "mask"}
        assert all(0 <= term.item() < 0.01 for term in terms.values()), terms
        found = objects.to_original(pick(answer, 0), picture.size, (8, 8))
        order = np.lexsort(found.boxes.T), np.lexsort(picture.boxes.T)
        np.testing.assert_allclose(found.boxes[order[0]], picture.boxes[order[1]], atol=1e-4)
        assert found.classes[order[0]].tolist() == picture.classes[order[1]].tolist()
        assert found.masks is not None and picture.masks is not None
        for ours, theirs in zip(order[0], order[1], strict=True):
            drawn, truth = decode([found.masks[ours]], picture.size), decode([picture.masks[theirs]], picture.size)
            assert (drawn & truth).sum() / (drawn | truth).sum() > 0.6  # as fine as 4 x 8 places allow


def test_groups_cost_nothing_wherever_they_are_found() -> None:
    boxes = torch.tensor([[1.0, 1.0, 4.0, 4.0], [6.0, 1.0, 11.0, 7.0]])
    both = Target(torch.tensor([0, 1]), boxes, torch.tensor([False, True]), None)
    answer = perfect(Target(both.classes, boxes, torch.zeros(2, dtype=torch.bool), None), (8, 12), 2)
    assert losses(answer, [both], (8, 12))["score"].item() < 1e-3
    only = Target(both.classes[:1], boxes[:1], both.crowd[:1], None)
    assert losses(answer, [only], (8, 12))["score"].item() > 10


def test_a_batch_without_objects_has_a_finite_loss() -> None:
    empty = Target(
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, 32, 32, dtype=torch.bool),
    )
    head = object_head.ObjectHead(3, 2, masks=True)
    terms = losses(head(torch.rand(2, 3, 8, 8)), [empty, empty], (16, 16))
    sum(terms.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert terms["box"].item() == terms["mask"].item() == 0


def test_nothing_found_is_an_answer() -> None:
    nothing = Objects(torch.zeros(0), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 32, 32))
    found = objects.to_original(nothing, (40, 50), (8, 8))
    assert found.boxes.shape == (0, 4) and found.masks == ()


def test_masks_drawn_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, those of a photo of 12 megapixels would take gigabytes."""
    torch.manual_seed(0)
    corners = torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 2.0, 8.0, 11.0], [1.0, 5.0, 14.0, 12.0]])
    several = Objects(torch.arange(3), torch.rand(3), corners, torch.randn(3, 32, 32))
    whole = objects.to_original(several, (40, 50), (8, 8))
    monkeypatch.setattr(objects, "AT_ONCE", 40 * 50 * 2)
    assert objects.to_original(several, (40, 50), (8, 8)).masks == whole.masks
    assert whole.masks is not None and decode(whole.masks, (40, 50)).any((1, 2)).all()


def test_boxes_are_found_by_features_that_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = find_objects(save_objects(tmp_path))
    rows = objects.run(colours, splits, [SIZE], batch=7)
    found = by_metric(rows)
    assert list(found) == ["AP", "AP50", "AP75", "AP_small"]  # no object is larger
    assert found["AP50"] > 0.7 and found["AP"] > 0.35, found
    told = rows[0]["settings"]
    assert (rows[0]["task"], rows[0]["n"], told["train"], told["selected_on"]) == ("detection", 8, 24, "val")
    monkeypatch.setattr(objects, "FEWEST_STEPS", 40)
    assert by_metric(objects.run(noise, splits, [SIZE]))["AP50"] < 0.3


def test_masks_are_found(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 20, "val": 3, "test": 6}), masks=True)
    found = by_metric(objects.run(colours, splits, [SIZE], masks=True))
    assert [name for name in found if name.startswith("mask_")] == [f"mask_{name}" for name in list(found)[:4]]
    assert found["mask_AP50"] > 0.6, found


def test_the_same_seed_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FEWEST_STEPS", 40)
    splits = find_objects(save_objects(tmp_path, {"train": 8, "val": 6}), masks=True)

    def measured(seed: int, batch: int = 64) -> dict[str, float]:
        return by_metric(objects.run(colours, splits, [SIZE], batch, 0, seed, masks=True))

    state = torch.get_rng_state()
    first = measured(1)
    assert torch.equal(state, torch.get_rng_state())
    assert max(first.values()) > 0
    assert measured(1, batch=3) == first
    assert measured(2) != first


def test_a_fit_that_stops_early_is_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 6, "val": 2}))
    frozen = FeatureBank(colours, splits.train, SIZE, 8, 0)
    worse = iter([0.3, 0.5, 0.4, 0.1])
    chosen = objects.fit(frozen, splits.classes, False, 0, 40, lambda head: next(worse))
    again = objects.fit(frozen, splits.classes, False, 0, chosen.steps)
    assert (chosen.steps, chosen.value) == (20, 0.5)
    for ours, theirs in zip(chosen.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_where_nothing_tells_the_lengths_apart_the_longest_is_taken(tmp_path: Path) -> None:
    splits = find_objects(save_objects(tmp_path, {"train": 6, "val": 2}))
    frozen = FeatureBank(colours, splits.train, SIZE, 8, 0)
    assert objects.fit(frozen, splits.classes, False, 0, 40, lambda head: 0.0).steps == 40


def test_what_is_not_in_the_annotation_file_is_not_counted(tmp_path: Path) -> None:
    save_objects(tmp_path)
    content = json.loads((tmp_path / "test.json").read_text())
    content["images"] = content["images"][:3]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] < 3]
    (tmp_path / "test.json").write_text(json.dumps(content))
    test = find_objects(tmp_path).test
    assert [test.images.name(index) for index in test.indices] == ["0.png", "1.png", "2.png"]
