"""Input size and normalization of a checkpoint, read from its JSON as plain data.

The image processors of transformers are not used: some of them need torchvision, and the loader of this project renders
the views, so that only a size, a mean and a standard deviation are needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoulders.hub.files import Pretrained, may_exist_on_hub, read_json
from shoulders.hub.processor_defaults import with_class_defaults

Triple = tuple[float, ...]
PixelStats = tuple[Triple, Triple]  # mean and std

IMAGENET_STATS: PixelStats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_STATS: PixelStats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MAX_SIDE_PX = 16_384
BICUBIC = 3  # as Pillow numbers it; how views are rendered
FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Preprocessing:
    """Size (h, w) in px, and mean and std per channel of pixels in [0, 1]."""

    size: tuple[int, int]
    mean: Triple
    std: Triple


def read_preprocessing(pretrained: Pretrained, default: Preprocessing) -> Preprocessing:
    """The preprocessing that the files of a model give, and ``default`` for what they leave out.

    Raises:
        RecipeError: the files cannot be parsed.
    """
    processor, image_processor = (read_json(pretrained, file) or {} for file in FILES)
    if not processor and not image_processor and may_exist_on_hub(pretrained, FILES[1]):
        raise pretrained.error(
            f"is in the hub's cache without its {FILES[1]}, and the hub cannot be reached; connect once, or give the "
            "local folder of the model"
        )
    try:
        # the older of the two files may be left over: transformers 5 writes and reads the other one
        settings = processor if "image_processor" in processor else image_processor or processor
        return parse_preprocessing(settings, default, str(pretrained.config.get("model_type")))
    except ValueError as error:
        raise pretrained.error(f"has a {' or '.join(FILES)} that cannot be used: {error}") from error


def parse_preprocessing(tree: Mapping[str, Any], default: Preprocessing, model_type: str = "") -> Preprocessing:
    """The preprocessing of a preprocessor_config.json, or of the image processor in a processor_config.json.

    Args:
        tree: the parsed JSON; {} where the checkpoint has none.
        default: used for what the JSON leaves out, after what transformers assumes for the class of the processor.
        model_type: of the checkpoint, whose usual class counts where the JSON names none.

    Raises:
        ValueError: a size or a mean is written in an unknown way, a side is too large, or a std is not positive.
    """
    tree = tree.get("image_processor", tree)
    if not isinstance(tree, Mapping):
        raise ValueError(f"image_processor must be a mapping, got {type(tree).__name__}")
    mean, std = _statistics(with_class_defaults(tree, model_type), default)
    size = _size(tree) or default.size
    if not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise ValueError(f"images of {size[0]} x {size[1]} px; a side has 1 to {MAX_SIDE_PX} px")
    return Preprocessing(size, mean, std)


def write_unit_range(folder: Path, size: tuple[int, int]) -> None:
    """Write a preprocessor_config.json with which transformers gives pixels in [0, 1] of ``size`` (h, w) px.

    The model of the folder normalizes them itself.
    """
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _size(tree: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of what enters the model: the crop where there is one, else what images are resized to."""
    if tree.get("do_center_crop") and tree.get("crop_size"):
        return _height_width(tree["crop_size"])
    if tree.get("size") and tree.get("do_resize", True):
        return _height_width(tree["size"])
    return None


def _height_width(size: Any) -> tuple[int, int]:
    """Any spelling of a size as (h, w); where only one edge is given, the square on it."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping):
        sides = {name: int(side) for name, side in size.items() if isinstance(side, int | float)}
        if "height" in sides and "width" in sides:
            return sides["height"], sides["width"]
        for edge in ("shortest_edge", "longest_edge"):
            if edge in sides:
                return sides[edge], sides[edge]
    raise ValueError(f"cannot read size {size!r}; known: an int, height and width, or an edge")


def _statistics(tree: Mapping[str, Any], default: Preprocessing) -> tuple[Triple, Triple]:
    """Mean and std of pixels in [0, 1], with another rescale than 1/255 folded in."""
    normalizes = tree.get("do_normalize", True)  # null is no, as in transformers
    mean = _triple(tree.get("image_mean"), default.mean) if normalizes else (0.0, 0.0, 0.0)
    std = _triple(tree.get("image_std"), default.std) if normalizes else (1.0, 1.0, 1.0)
    if tree.get("include_top"):  # EfficientNet divides by the deviation once more
        std = tuple(s * t for s, t in zip(std, _triple(tree.get("image_std"), default.std), strict=True))
    # the model was trained on (255 x factor - offset - mean) / std for x in [0, 1]
    factor = 255 * _number(tree.get("rescale_factor") or 1 / 255) if tree.get("do_rescale", True) else 255.0
    offset = 1.0 if tree.get("rescale_offset") else 0.0
    if abs(factor - 1) > 1e-6 or offset:
        mean = tuple((m + offset) / factor for m in mean)
        std = tuple(s / factor for s in std)
    if min(std) <= 0:
        raise ValueError(f"image_std must be positive, got {std}")
    return mean, std


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"rescale_factor must be a number, got {value!r}")
    return float(value)


def _triple(value: Any, default: Triple) -> Triple:
    if value is None:
        return default
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, list) or [isinstance(v, int | float) for v in values] != [True] * 3:
        raise ValueError(f"a mean or std must be three numbers, got {value!r}")
    return tuple(float(v) for v in values)
