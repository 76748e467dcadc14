"""Functions from images to Features: a student, its base, a teacher; and kept heads on a student's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.config.recipe import as_size
from shoulders.errors import RecipeError
from shoulders.features import Batch, Features
from shoulders.model import ShouldersModel
from shoulders.teachers import Teacher
from shoulders.teachers.heads import Head
from shoulders.transfer.projectors import module_name, teacher_name

FINEST_STRIDE = 8  # px of a teacher's input between the places that a dense probe sees


FeaturesOf = Callable[[Batch], Features]


def features_of_teacher(teacher: Teacher, spatial: bool) -> FeaturesOf:
    """What a teacher says of a batch that a probe can read, of places where ``spatial``."""
    device = teacher.mean.device
    return _places_of(teacher, device) if spatial else _of_teacher(teacher, device)


def teacher_head_on_student(student: ShouldersModel, name: str, size: tuple[int, int]) -> HeadInput:
    """A kept head on what the student says of images that it sees at ``size`` = (h, w) px."""

    def feed(pixels: Tensor) -> dict[str, Features]:
        return predicted_taps(student, name, student.forward_features(pixels.to(student.device)))

    return HeadInput(student.head(name), size, feed)


def predicted_taps(student: ShouldersModel, name: str, seen: Mapping[str, Features]) -> dict[str, Features]:
    """What a student that sees ``{place: Features}`` says in place of one teacher; other projectors stay unasked."""
    return {
        tap.split("/", 1)[1]: student.standardizer(tap).inverse(student.projectors[module_name(tap)](seen))
        for tap in student.taps
        if teacher_name(tap) == name
    }


def features_of_student(student: ShouldersModel, size: tuple[int, int], base: bool = False) -> FeaturesOf:
    """What a student, or its base alone, says of a batch that it sees at ``size`` = (h, w) px: its latent."""

    def features_of(batch: Batch) -> Features:
        pixels = batch.to(student.device).pixels(size)
        with student.encoder.adapters_disabled() if base else nullcontext():
            return student.encoder(pixels)["latent"]

    return features_of


def input_size(student: ShouldersModel, size: tuple[int, int] | None) -> tuple[int, int]:
    """The size asked for, or that of the student's training."""
    if size is None:
        return as_size(tuple(student.config.image_size))
    try:
        student.encoder.grid(size)
    except ValueError as error:
        raise RecipeError(f"--size: {error}") from None
    return size


def _of_teacher(teacher: Teacher, device: torch.device) -> FeaturesOf:
    """A teacher's last tap: the summary where it has one, else its spatial features."""
    last = list(teacher.taps)[-1]
    return lambda batch: teacher(batch.to(device).pixels(teacher.size))[last]


def _places_of(teacher: Teacher, device: torch.device) -> FeaturesOf:
    """The spatial features of all taps side by side, on the finest grid among them that is no finer than 8 px."""
    grids = sorted(tap.grid for tap in teacher.taps.values() if tap.spatial is not None)  # the coarsest first
    grid = max((grid for grid in grids if grid[0] * FINEST_STRIDE <= teacher.size[0]), default=grids[0])

    def places(batch: Batch) -> Features:
        answers = teacher(batch.to(device).pixels(teacher.size)).values()
        maps = [_resize(features.to_map(), grid) for features in answers if features.spatial is not None]
        return Features.from_map(torch.cat(maps, 1))

    return places


def _resize(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), averaged where that is coarser."""
    if maps.shape[2] > grid[0]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False) if maps.shape[2:] != grid else maps


@dataclass(frozen=True)
class HeadInput:
    """A kept head together with the model that computes its input, as `shoulders.tasks.teacher_head_eval` needs them.

    Args:
        head: the head.
        size: (h, w) in px of the images that ``feed`` takes.
        feed: pixels (B, 3, h, w) in [0, 1] -> the features of the head's taps, a teacher's or a student's.
        names: the class names that a zero-shot head chooses from; default: all that it keeps.
    """

    head: Head
    size: tuple[int, int]
    feed: Callable[[Tensor], dict[str, Features]]
    names: Sequence[str] | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index."""
        return self.head.classes if self.names is None else list(self.names)

    @property
    def processor(self) -> Any:
        """The image processor of the head's teacher."""
        return self.head.processor

    def compute_output(self, pixels: Tensor) -> Any:
        """The head's own output."""
        return self.head(self.feed(pixels), **({} if self.names is None else {"classes": self.names}))


def has_classes(fed: HeadInput, names: Sequence[str] | None) -> bool:
    """Whether a head keeps all of the class names of some data, which has none where it only numbers its classes."""
    return bool(names) and set(names or ()) <= set(fed.classes)
