"""Pictures of predictions and of features."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.features import Features
from shoulders.images.pictures import COLOURS, assign_colours, draw_prediction, pca_pictures

BOX = {"xmin": 1.0, "ymin": 2.0, "xmax": 30.0, "ymax": 40.0}
PREDICTIONS = [
    [],
    [{"label": "star", "score": 0.9}],
    [{"label": "star", "score": 0.9, "box": BOX}],
    [{"label": "star", "score": 0.9, "mask": torch.ones(96, 96, dtype=torch.bool).tril()}],
    [{"label": name, "score": None, "mask": torch.eye(96).bool()} for name in ("background", "star", "heart")],
    {"predicted_depth": torch.rand(96, 96)},
]


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_kind_of_prediction_changes_the_picture(prediction: object, image: Image.Image) -> None:
    picture = draw_prediction(image, prediction)
    assert picture.width == 480 and picture.height >= 480
    plain = np.asarray(image.resize((480, 480), Image.Resampling.BICUBIC))
    assert picture.height > 480 or (np.asarray(picture)[:480] != plain).any()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_text_is_drawn_where_colours_are_given(prediction: object, image: Image.Image) -> None:
    picture = draw_prediction(image, prediction, {"star": (255, 0, 0), "heart": (0, 255, 0)})
    assert picture.size == (480, 480)  # a legend would be below the image


def test_boxes_are_drawn_at_the_scale_of_the_picture(image: Image.Image) -> None:
    picture = draw_prediction(image, PREDICTIONS[2], {"star": (255, 0, 0)})
    red = (np.asarray(picture) == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (5, 10, 150, 200)  # 480 / 96 times the box


@pytest.mark.parametrize("prediction", PREDICTIONS[1:4])
def test_class_names_with_line_breaks_are_drawn_in_one_line(prediction: list[dict[str, object]]) -> None:
    image = Image.new("RGB", (96, 96))
    broken, escaped = ([{**item, "label": label} for item in prediction] for label in ("a\nb", "a\\nb"))
    assert draw_prediction(image, broken).size == draw_prediction(image, escaped).size


def test_large_images_are_not_enlarged() -> None:
    assert draw_prediction(Image.new("RGB", (600, 300)), [], {}).size == (600, 300)


def test_labels_have_different_colours_while_colours_last() -> None:
    labels = [f"class {i}" for i in range(len(COLOURS))]
    assert len(set(assign_colours(labels).values())) == len(COLOURS)
    assert set(assign_colours([*labels, "one more"])) == {*labels, "one more"}
    assert assign_colours(["star"]) == assign_colours(["star", "star"])


def test_equal_features_have_equal_colours() -> None:
    features = Features(None, torch.randn(2, 16, 8).repeat(1, 4, 1), (8, 8))
    first, second = pca_pictures(features, (8, 8))
    again = pca_pictures(features, (8, 8))
    assert first.tobytes() == again[0].tobytes() != second.tobytes()
    top, bottom = np.asarray(first)[:2], np.asarray(first)[2:4]
    assert (top == bottom).all()


def test_components_of_other_features_can_be_used() -> None:
    generator = torch.Generator().manual_seed(0)
    features = Features(None, torch.randn(2, 16, 6, generator=generator), (4, 4))
    shifted = features.map(lambda x: x + 100)
    plain = [picture.tobytes() for picture in pca_pictures(features, (4, 4))]
    assert [picture.tobytes() for picture in pca_pictures(features, (4, 4), like=features)] == plain
    assert [picture.tobytes() for picture in pca_pictures(shifted, (4, 4))] == plain  # its own mean is subtracted
    assert [picture.tobytes() for picture in pca_pictures(shifted, (4, 4), like=features)] != plain


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (20_000, 5)])
def test_large_images_are_reduced(size: tuple[int, int]) -> None:
    width, height = draw_prediction(Image.new("RGB", size), [], {}).size
    assert max(width, height) == 1600 and min(width, height) == max(round(1600 * min(size) / max(size)), 1)


def test_predictions_of_large_images_are_drawn_at_the_scale_of_the_picture() -> None:
    image = Image.new("RGB", (3200, 2400))
    box = {"xmin": 400.0, "ymin": 800.0, "xmax": 1200.0, "ymax": 1600.0}
    mask = torch.zeros(2400, 3200, dtype=torch.bool)
    mask[800:1600, 400:1200] = True
    depth = mask.float()
    for prediction, value in (
        ([{"label": "star", "score": 0.9, "box": box}], 255),
        ([{"label": "star", "score": 0.9, "mask": mask}], 255),
        ([{"label": "star", "score": None, "mask": mask}], 127),
        ({"predicted_depth": depth}, 255),
    ):
        for picture in (
            draw_prediction(image, prediction, {"star": (255, 0, 0)}),
            draw_prediction(image.resize((1600, 1200)), prediction, {"star": (255, 0, 0)}, size=image.size),
        ):
            assert picture.size == (1600, 1200)
            rows, columns = np.nonzero(np.asarray(picture)[..., 0] >= value)
            edges = (columns.min(), rows.min(), columns.max(), rows.max())
            assert np.abs(np.array(edges) - (200, 400, 600, 800)).max() <= 2


def test_pictures_of_a_large_image_cost_little() -> None:
    """Twenty masks of 48 megapixels: each is reduced before it is drawn."""
    masks = [{"label": f"{i}", "score": 0.9, "mask": torch.ones(6000, 8000, dtype=torch.bool)} for i in range(20)]
    reduced = Image.new("RGB", (1600, 1200))
    start = time.process_time()
    draw_prediction(reduced, masks, size=(8000, 6000))
    assert time.process_time() - start < 6  # about 1 s; more than 60 s at the original size
