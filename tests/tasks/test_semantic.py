"""The probe for semantic segmentation counts as scikit-learn does, and finds what is in the features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from shoulders.tasks import find_masks, semantic
from shoulders.tasks.feature_bank import FeatureBank
from shoulders.tasks.rows import Row
from tests.tasks.scenes import SIZE, colours, noise, save_masks


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "FEWEST_STEPS", 60)


@pytest.mark.parametrize("classes_at_once", [1, 3, 7, 100])
def test_the_class_of_each_pixel_however_many_classes_are_enlarged_at_once(
    classes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = semantic.enlarge(logits[None], (33, 41))[0].argmax(0)
    monkeypatch.setattr(semantic, "AT_ONCE", classes_at_once * 33 * 41)
    assert torch.equal(semantic.class_map(logits, (33, 41)), expected)


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def test_metrics_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, 3000), rng.integers(1, 6, 3000)  # class 0 never predicted, 5 never there
    counted = torch.from_numpy(confusion_matrix(truth, predicted, labels=range(7)))  # class 6 neither
    found = semantic.scores(counted, tuple("abcdefg"))
    each = jaccard_score(truth, predicted, average=None)  # of the classes that are there or predicted
    assert found.pop("mIoU") == pytest.approx(jaccard_score(truth, predicted, average="macro"), abs=1e-9)
    assert found.pop("pixel_accuracy") == pytest.approx(accuracy_score(truth, predicted), abs=1e-9)
    assert list(found) == [f"IoU/{name}" for name in "abcdef"]
    assert list(found.values()) == pytest.approx(each.tolist(), abs=1e-9)


def test_pixels_are_counted_at_the_size_of_the_masks_without_the_ignored_ones(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path))
    test = FeatureBank(colours, splits.test, SIZE, 3, 0)
    head = semantic.linear_head(3, 3).eval()
    predicted, truth = [], []
    for row in range(len(test)):
        mask = np.array(Image.open(tmp_path / f"annotations/test/{row}.png"))
        with torch.no_grad():
            large = torch.nn.functional.interpolate(head(test.maps([row])), mask.shape, mode="bilinear")
        predicted.append(large[0].argmax(0).numpy()[mask != 255])
        truth.append(mask[mask != 255])
    expected = confusion_matrix(np.concatenate(truth), np.concatenate(predicted), labels=range(3))
    assert semantic.confusion(head, test, 3).tolist() == expected.tolist()


def test_colours_are_found_by_features_that_hold_them(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path))
    found = by_metric(semantic.run(colours, splits, [SIZE], batch=7))
    assert list(found) == ["mIoU", "pixel_accuracy", "IoU/ground", "IoU/red", "IoU/blue"]
    assert found["mIoU"] > 0.75 and found["pixel_accuracy"] > 0.95
    assert found["mIoU"] == pytest.approx(np.mean([found[f"IoU/{name}"] for name in splits.classes]))
    nothing = by_metric(semantic.run(noise, splits, [SIZE]))
    assert nothing["mIoU"] < 0.35  # all is ground


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path, {"train": 12, "val": 4}))

    def measured(seed: int, batch: int = 64) -> list[tuple[str, float]]:
        return list(by_metric(semantic.run(colours, splits, [SIZE], batch, 0, seed)).items())

    state = torch.get_rng_state()
    assert measured(3) == measured(3, batch=5)
    assert torch.equal(state, torch.get_rng_state())
    assert measured(3) != measured(4)


def test_rows_say_how_they_came_about(tmp_path: Path) -> None:
    rows = semantic.run(colours, find_masks(save_masks(tmp_path, {"train": 10, "val": 4})), [SIZE], seed=5)
    told = rows[0]["settings"]
    assert (rows[0]["task"], rows[0]["n"], told["train"], told["seed"]) == ("semantic", 4, 10, 5)
    assert (told["selected_on"], told["split"]) == ("a fifth of train", "train, val as given")
    assert told["lr"] in semantic.LR_GRID and told["skipped"] == 0


def test_a_picture_of_ignored_pixels_alone_does_no_harm(tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 2, "val": 2})
    for index in range(2):
        Image.new("L", ((64, 40)[index], (48, 40)[index]), 255).save(tmp_path / f"annotations/val/{index}.png")
    found = by_metric(semantic.run(colours, find_masks(tmp_path), [SIZE]))
    assert found == {"mIoU": 0.0, "pixel_accuracy": 0.0}
