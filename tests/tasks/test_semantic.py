"""The probe for semantic segmentation counts as scikit-learn does, and segments by features that show the classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from shoulders.errors import DataError
from shoulders.features import FeaturesOf
from shoulders.tasks import Row, semantic
from shoulders.tasks.data.masks import find_masks
from shoulders.tasks.feature_bank import FeatureBank
from shoulders.tasks.probe import fit_probe
from shoulders.tasks.task import rows_of
from tests.tasks.scenes import SIZE, colours, constant, save_masks

PROBE = replace(semantic.PROBE, settings=replace(semantic.PROBE.settings, min_steps=60))


def fit(features_of: FeaturesOf, path: Path, **settings: Any) -> list[Row]:
    return fit_probe(PROBE, features_of, find_masks(path), [SIZE], **settings)


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize("classes_per_chunk", [1, 3, 7, 100])
def test_the_class_map_does_not_depend_on_the_chunks_it_is_computed_in(classes_per_chunk: int) -> None:
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = semantic.upsample(logits[None], (33, 41))[0].argmax(0)
    assert torch.equal(semantic.class_map(logits, (33, 41), classes_per_chunk * 33 * 41), expected)


def test_metrics_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 3000), rng.integers(1, 6, 3000)  # 0 is never predicted, 5 never a label
    confusion = torch.from_numpy(confusion_matrix(labels, predicted, labels=range(7)))  # 6 is neither
    scores = semantic.segmentation_scores(confusion, tuple("abcdefg"))
    by_class = jaccard_score(labels, predicted, average=None)  # of the classes that are labelled or predicted
    assert scores.pop("mIoU") == pytest.approx(jaccard_score(labels, predicted, average="macro"), abs=1e-9)
    assert scores.pop("pixel_accuracy") == pytest.approx(accuracy_score(labels, predicted), abs=1e-9)
    assert list(scores) == [f"IoU/{name}" for name in "abcdef"]
    assert list(scores.values()) == pytest.approx(by_class.tolist(), abs=1e-9)


def test_pixels_are_counted_at_the_size_of_the_masks_without_the_ignored_ones(tmp_path: Path) -> None:
    splits = find_masks(save_masks(tmp_path))
    test = FeatureBank(colours, splits.test, [SIZE], 3, 0)
    head = semantic.linear_head(3, 3).eval()
    predicted, labels = [], []
    for index in range(len(test)):
        mask = np.array(Image.open(tmp_path / f"annotations/test/{index}.png"))
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(head(test.maps([index])), mask.shape, mode="bilinear")
        predicted.append(logits[0].argmax(0).numpy()[mask != 255])
        labels.append(mask[mask != 255])
    expected = confusion_matrix(np.concatenate(labels), np.concatenate(predicted), labels=range(3))
    assert semantic.confusion_matrix(head, test, 3).tolist() == expected.tolist()


def test_classes_are_segmented_by_features_that_show_them(tmp_path: Path) -> None:
    save_masks(tmp_path)
    scores = by_metric(fit(colours, tmp_path, batch=7))
    assert list(scores) == ["mIoU", "pixel_accuracy", "IoU/ground", "IoU/red", "IoU/blue"]
    assert scores["mIoU"] > 0.75 and scores["pixel_accuracy"] > 0.95
    assert scores["mIoU"] == pytest.approx(np.mean([scores[f"IoU/{name}"] for name in ("ground", "red", "blue")]))
    assert by_metric(fit(constant, tmp_path))["mIoU"] < 0.35  # everything is ground


def test_the_same_seed_gives_the_same_rows(tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 12, "val": 4})

    def values(seed: int, batch: int = 64) -> list[tuple[str, float]]:
        return list(by_metric(fit(colours, tmp_path, batch=batch, seed=seed)).items())

    state = torch.get_rng_state()
    assert values(3) == values(3, batch=5)
    assert torch.equal(state, torch.get_rng_state())
    assert values(3) != values(4)


def test_rows_hold_the_settings_of_the_fit(tmp_path: Path) -> None:
    rows = fit(colours, save_masks(tmp_path, {"train": 10, "val": 4}), seed=5)
    settings = rows[0]["settings"]
    assert (rows[0]["task"], rows[0]["n"], settings["train"], settings["seed"]) == ("semantic", 4, 10, 5)
    assert (settings["selected_on"], settings["split"]) == ("a fifth of train", "train, val as given")
    assert settings["lr"] in PROBE.settings.lrs and settings["skipped"] == 0
    assert (settings["head"], settings["steps"]) == ("linear", 60)


def test_masks_of_ignored_pixels_only_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 2, "val": 2})
    for index in range(2):
        Image.new("L", ((64, 40)[index], (48, 40)[index]), 255).save(tmp_path / f"annotations/val/{index}.png")
    with pytest.raises(DataError, match="none of the 2 test images that can be read has a label"):
        fit(colours, tmp_path)


def test_without_a_labelled_pixel_there_is_no_value() -> None:
    """And not 0: the only mask with labels may be that of an image that cannot be read."""
    assert semantic.segmentation_scores(torch.zeros(2, 2, dtype=torch.int64), ("a", "b")) == {}
    with pytest.raises(DataError, match="semantic: none of the 3 test images that can be read has a label"):
        rows_of("semantic", {}, 3, 0.0, {})
