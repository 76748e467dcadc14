"""Size and normalization in the forms in which checkpoints on the hub write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from shoulders.hub.preprocessing import Preprocessing, parse_preprocessing

DEFAULT = Preprocessing((224, 224), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("tree", "size"),
    [
        ({}, (224, 224)),
        ({"size": 384}, (384, 384)),
        ({"size": [320, 480]}, (320, 480)),
        ({"size": {"height": 320, "width": 480}}, (320, 480)),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (800, 800)),
        ({"size": {"longest_edge": 1024}}, (1024, 1024)),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, (224, 224)),
        ({"size": 256, "crop_size": {"height": 196, "width": 182}, "do_center_crop": True}, (196, 182)),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, (256, 256)),
        ({"size": 256, "crop_size": 224}, (256, 256)),
        ({"size": 256, "do_resize": False}, (224, 224)),
        ({"size": {"height": None, "width": None, "shortest_edge": 256.0}}, (256, 256)),
        ({"image_processor": {"size": 112}, "processor_class": "CLIPProcessor"}, (112, 112)),
    ],
)
def test_size(tree: dict[str, Any], size: tuple[int, int]) -> None:
    assert parse_preprocessing(tree, DEFAULT).size == size


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "do_normalize": True},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
        {"rescale_factor": 1 / 255},
        {"rescale_factor": None, "do_normalize": None},
        {
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "image_mean": [0, 0, 0],
            "image_std": [1, 1, 1],
        },
        {"do_rescale": False, "image_mean": [123.0, 117.0, 104.0], "image_std": [58.0, 57.0, 57.0]},
        {"do_rescale": False, "do_normalize": False},
        {"include_top": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]},
    ],
)
def test_normalized_pixels_are_those_of_the_image_processor(tree: dict[str, Any]) -> None:
    bytes_ = torch.randint(0, 256, (3, 4, 4)).float()
    parsed = parse_preprocessing(tree, DEFAULT)

    # the steps of an image processor, one by one
    expected = bytes_
    if tree.get("do_rescale", True):
        expected = expected * (tree.get("rescale_factor") or 1 / 255) - (1 if tree.get("rescale_offset") else 0)
    if tree.get("do_normalize", True):
        mean = torch.as_tensor(tree.get("image_mean", DEFAULT.mean)).expand(3)
        std = torch.as_tensor(tree.get("image_std", DEFAULT.std)).expand(3)
        expected = (expected - mean[:, None, None]) / std[:, None, None]
    if tree.get("include_top"):
        expected = expected / torch.as_tensor(tree["image_std"])[:, None, None]

    mean, std = torch.tensor(parsed.mean), torch.tensor(parsed.std)
    ours = (bytes_ / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"include_top": False},
        {"do_normalize": False},
        {"rescale_offset": True, "rescale_factor": 1 / 127.5},
        {"image_std": [0.47853944, 0.4732864, 0.47434163], "resample": 0},  # as published; squared, those of ImageNet
    ],
)
def test_efficientnet_divides_by_its_deviation_twice(settings: dict[str, Any]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    tree = {"image_processor_type": "EfficientNetImageProcessor", "size": 8, **settings}
    processor = EfficientNetImageProcessorPil(**{**settings, "size": {"height": 8, "width": 8}})
    expected = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    parsed = parse_preprocessing(tree, DEFAULT, "efficientnet")
    mean, std = torch.tensor(parsed.mean).view(3, 1, 1), torch.tensor(parsed.std).view(3, 1, 1)
    torch.testing.assert_close(
        (torch.from_numpy(image).movedim(2, 0) / 255 - mean) / std, expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"size": {"max_side": 3}}, "cannot read size"),
        ({"size": "224"}, "cannot read size"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number"),
        ({"image_std": ["a", "b", "c"]}, "three numbers"),
        ({"image_std": [0, 1, 1]}, "must be positive"),
        ({"image_processor": 3}, "must be a mapping"),
    ],
)
def test_malformed_settings_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_preprocessing(tree, DEFAULT)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("tree", "model_type", "mean"),
    [
        ({}, "dinov2", DEFAULT.mean),  # no processor: nothing that transformers would use
        ({"size": 64}, "dinov2", CLIP_MEAN),  # BitImageProcessor is the usual one
        ({"size": 64}, "mobilenet_v2", (0.5, 0.5, 0.5)),
        ({"size": 64}, "of_nobody", DEFAULT.mean),
        ({"image_processor_type": "BitImageProcessor"}, "vit", CLIP_MEAN),
        ({"image_processor_type": "ConvNextImageProcessorFast"}, "dinov2", (0.5, 0.5, 0.5)),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "dinov2", (0.5, 0.5, 0.5)),
        ({"image_processor_type": "SegformerImageProcessor"}, "vit", (0.485, 0.456, 0.406)),
        ({"image_processor_type": "RTDetrImageProcessor"}, "vit", (0.0, 0.0, 0.0)),  # it does not normalize
        ({"image_processor_type": "RTDetrImageProcessor", "do_normalize": True}, "vit", (0.485, 0.456, 0.406)),
        ({"image_processor_type": "BitImageProcessor", "image_mean": [0.1, 0.2, 0.4]}, "vit", (0.1, 0.2, 0.4)),
        ({"image_processor_type": "BitImageProcessor", "do_normalize": False}, "vit", (0.0, 0.0, 0.0)),
        ({"image_processor_type": "OfNobodyImageProcessor"}, "vit", DEFAULT.mean),
    ],
)
def test_what_a_file_leaves_out_is_what_transformers_assumes_for_its_class(
    tree: dict[str, Any], model_type: str, mean: tuple[float, ...]
) -> None:
    parsed = parse_preprocessing(tree, DEFAULT, model_type)
    assert parsed.mean == pytest.approx(mean) and parsed.size in (DEFAULT.size, (64, 64))
