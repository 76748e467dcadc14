"""A teacher's head as it was published: on images as the teacher's own image processor draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shoulders.config.sections import TeacherSpec
from shoulders.tasks.class_match import ClassMap
from shoulders.tasks.frame import Frame, ModelInput, whole_frame
from shoulders.teachers import load_teacher
from shoulders.teachers.checkpoint import read_checkpoint
from shoulders.teachers.heads import ZeroShot, load_head
from shoulders.teachers.heads.load import read_own_processor
from shoulders.teachers.heads.whole import (
    WholeModel,
    describe_processor,
    draws_maps,
    load_whole_model,
    resized_size,
    size_settings,
)

Size = tuple[int, int]  # (h, w) in px


@dataclass(frozen=True)
class PublishedHead:
    """A teacher with its head and its image processor.

    Args:
        head: the teacher's model, or its zero-shot head.
        processor: its image processor.
        settings: arguments of the processor's call.
        run: a batch of what the processor computes, by name -> the head's own output.
        names: the class names that a zero-shot head chooses from; default: all that it keeps.
        class_map: the head's class for some classes of the data.
    """

    head: WholeModel | ZeroShot
    processor: Any
    settings: Mapping[str, Any]
    run: Callable[..., Any]
    names: Sequence[str] | None = None
    class_map: ClassMap = field(default_factory=dict)

    min_side = None  # images are decoded at their full size: the processor resizes them

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return self.head.classes if self.names is None else list(self.names)

    @property
    def input_description(self) -> str:
        """What `draw` does with an image."""
        return describe_processor(self.processor, self.settings)

    def draw(self, pixels: Tensor, size: Size) -> ModelInput:
        """What the processor makes of an image (3, H, W) uint8 of ``size`` = (H, W)."""
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        inputs = self.processor(images=image, return_tensors="pt", **self.settings)
        tensors = {name: values[0] for name, values in inputs.items() if isinstance(values, Tensor)}
        return ModelInput(tensors, self._frame(size, tensors))

    def compute_output(self, **tensors: Tensor) -> Any:
        """The head's own output."""
        return self.run(**tensors, **({} if self.names is None else {"classes": self.names}))

    def _frame(self, size: Size, tensors: Mapping[str, Tensor]) -> Frame:
        """Where the image lies in the input."""
        mask = tensors.get("pixel_mask")  # (h, w)
        if mask is not None:  # padded at the bottom and on the right
            rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
            return _frame(size, (mask.shape[0], mask.shape[1]), (rows, columns), (0, 0))
        crops, pads = (getattr(self.processor, key, False) for key in ("do_center_crop", "do_pad"))
        if not crops and not pads:
            return whole_frame(size)
        h, w = tensors["pixel_values"].shape[1:]
        resized = resized_size(self.processor, size, self.settings)
        rest = h - resized[0], w - resized[1]
        # of an odd rest, a crop has the larger part in front, padding on all sides behind
        corner = (-(-rest[0] // 2), -(-rest[1] // 2)) if crops else (rest[0] // 2, rest[1] // 2)
        return _frame(size, (h, w), resized, corner)


def _frame(size: Size, input_size: Size, resized: Size, corner: Size) -> Frame:
    """The frame of an image of ``size`` that was resized and lies at a corner (top, left) of the input, in px of it."""
    scales = size[0] / resized[0], size[1] / resized[1]
    full = round(input_size[0] * scales[0]), round(input_size[1] * scales[1])
    return Frame(size, full, round(corner[0] * scales[0]), round(corner[1] * scales[1]))


def load_published_head(name: str, spec: TeacherSpec, device: torch.device) -> PublishedHead | None:
    """A teacher's head as it was published; None where it has no image processor that loads on this machine.

    Args:
        name: the teacher's name in the recipe.
        spec: its entry there; a ``size`` scales the sizes of the processor.

    Raises:
        RecipeError, DataError: as `load_head`.
    """
    if spec.module is not None:
        return None
    if spec.classes:
        return _load_zero_shot(name, spec, device)
    whole = load_whole_model(name, spec)
    if whole is None:
        return None
    whole.model.to(device)

    def run(**tensors: Tensor) -> Any:
        return whole.compute_output(**{key: value.to(device) for key, value in tensors.items()})

    return PublishedHead(whole, whole.processor, size_settings(name, spec, whole.processor), run)


def _load_zero_shot(name: str, spec: TeacherSpec, device: torch.device) -> PublishedHead | None:
    pretrained = read_checkpoint(name, spec).pretrained
    processor = read_own_processor(pretrained.source, pretrained.revision)
    if processor is None or not draws_maps(processor):
        return None
    teacher = load_teacher(name, spec).to(device)
    head = load_head(name, spec, teacher).to(device)
    assert isinstance(head, ZeroShot)  # noqa: S101  (a teacher with class names)

    def run(pixel_values: Tensor, classes: Sequence[str] | None = None) -> Any:
        return head(teacher.module(pixel_values.to(device)), classes=classes)

    return PublishedHead(head, processor, size_settings(name, spec, processor), run)
