"""A teacher as it was published: encoder and head in one model, with its own image processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.hub import load_strict
from shoulders.teachers.checkpoint import read_checkpoint
from shoulders.teachers.heads.head import class_names
from shoulders.teachers.heads.load import check_head, head_class, read_own_processor

Size = tuple[int, int]  # (h, w) in px
# settings of image processors that decide which part of an image is where in the input
GEOMETRY = ("crop_pct", "keep_aspect_ratio", "ensure_multiple_of", "size_divisor", "pad_size")
UNCHANGED = {"do_center_crop": False, "do_pad": False}


@dataclass(frozen=True)
class WholeModel:
    """A transformers model with its head.

    Args:
        model: the model.
        processor: its image processor.
        options: arguments of its forward with which it takes images of any size.
    """

    model: Any
    processor: Any
    options: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        """The name of the model's class, such as ``SegformerForSemanticSegmentation``."""
        return type(self.model).__name__

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return class_names(self.model.config)

    def compute_output(self, **inputs: Tensor) -> Any:
        """The output for what the processor makes of images; inputs that the model does not take are left out."""
        known = inspect.signature(self.model.forward).parameters
        return self.model(**{name: value for name, value in inputs.items() if name in known}, **self.options)


def load_whole_model(name: str, spec: TeacherSpec) -> WholeModel | None:
    """A teacher's whole model in float32; None where its image processor does not load on this machine.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there, with a ``model:`` whose head can be kept.

    Raises:
        RecipeError: as `check_head`.
        DataError: weights are missing or damaged.
    """
    check_head(name, spec)
    checkpoint = read_checkpoint(name, spec)
    processor = read_own_processor(checkpoint.pretrained.source, checkpoint.pretrained.revision)
    if processor is None:
        return None
    model = load_strict(checkpoint.pretrained, head_class(checkpoint.config), checkpoint.config)
    head = checkpoint.family.head
    return WholeModel(model, processor, head.forward_options if head else {})


def size_settings(name: str, spec: TeacherSpec, processor: Any) -> dict[str, Any]:
    """The settings of a teacher's image processor for the ``size`` of the recipe: all of its sizes scaled alike.

    Empty where the recipe gives no size: the processor then draws images as it was published.
    """
    if spec.size is None:
        return {}
    height, width = read_checkpoint(name, spec).preprocessing.size
    own = read_checkpoint(name, spec.model_copy(update={"size": None})).preprocessing.size
    factors, settings = (height / own[0], width / own[1]), processor.to_dict()
    crops = bool(settings.get("do_center_crop"))
    edge = max(factors) if crops else min(factors)
    by_side = {"height": factors[0], "width": factors[1]}
    scaled: dict[str, Any] = {
        key: {side: round(px * by_side.get(side, edge)) for side, px in settings[key].items()}
        for key in ("size", "pad_size")
        if settings.get(key)
    }
    return scaled | ({"crop_size": {"height": height, "width": width}} if crops else {})


def describe_processor(processor: Any, settings: Mapping[str, Any]) -> str:
    """How an image processor draws an image, in words."""
    given = {**processor.to_dict(), **settings}
    parts = []
    if given.get("do_resize", True) and given.get("size"):
        parts.append(f"resized to {_describe(given['size'])} px, {_resample(given.get('resample'))}")
    if given.get("do_center_crop"):
        parts.append(f"center crop of {_describe(given['crop_size'])} px")
    parts += [f"{key} {_describe(given[key])}" for key in GEOMETRY if given.get(key)]
    return f"{given.get('image_processor_type', type(processor).__name__)}: " + ", ".join(parts)


def _describe(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    if {"height", "width"} <= set(value):
        return f"{value['height']} x {value['width']}"
    return ", ".join(f"{side} {px}" for side, px in value.items())


def _resample(number: Any) -> str:
    return "bilinear" if number is None else Image.Resampling(int(number)).name.lower()


def resized_size(processor: Any, size: Size, settings: Mapping[str, Any]) -> Size:
    """The size of an image of ``size`` after an image processor resized it, before it is cropped or padded."""
    unchanged = {key: value for key, value in UNCHANGED.items() if hasattr(processor, key)}
    blank = Image.new("RGB", (size[1], size[0]))
    pixels = processor(images=blank, return_tensors="pt", **{**settings, **unchanged})["pixel_values"]
    return int(pixels.shape[2]), int(pixels.shape[3])


def draws_maps(processor: Any) -> bool:
    """Whether an image processor gives pixels (B, 3, h, w), not a sequence of patches (SigLIP 2 with any aspect)."""
    return processor(images=Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"].ndim == 4
