"""One live teacher at a time, asked in parts of one size, and the base as if it were a teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoulders.config.recipe import Recipe
from shoulders.config.section import as_size
from shoulders.errors import NumericError
from shoulders.feature_cache.codec import EncodeError
from shoulders.features import Batch, Features
from shoulders.student.base import base_layers_needed, load_base
from shoulders.student.encoder import Encoder
from shoulders.teachers import Teacher, Teachers, load_teacher
from shoulders.transfer.losses import BASE

MOST_AT_ONCE = 128  # images
PIXELS_AT_ONCE = 2**23  # 128 images of 224 px, 8 of 1024 px


def refusal(name: str, error: EncodeError, image: str = "an image") -> NumericError:
    """What is said of a teacher whose features cannot be stored."""
    if error.value == error.value and abs(error.value) != float("inf"):
        return NumericError(
            f"teachers.{name}: {error.part} of {image} holds {error.value:g}, too much for float16; take "
            f"cache.dtype=bfloat16"
        )
    return NumericError(f"teachers.{name}: {error.part} of {image} is not finite; check its weights and its size")


class _Base(nn.Module):
    """The base as a student asks it: at some places, with its adapters off."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.places = base_layers_needed(recipe.student, recipe.transfer.layers, bool(recipe.transfer.preserve))
        base = load_base(recipe.student)
        pixels = base.preprocessing
        self.encoder = Encoder(base.model, recipe.student.adapter.model_dump(), pixels.mean, pixels.std)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        return self.encoder.base_features(pixels, self.places)


class TeacherRunner:
    """One teacher of a recipe, loaded.

    Args:
        name: of the teacher; ``base`` for the base.
        extra_teachers: teachers that are not in the recipe.
        bf16: ask in bfloat16.
        device: where.
    """

    def __init__(
        self, name: str, recipe: Recipe, extra_teachers: Mapping[str, Teacher], bf16: bool, device: torch.device
    ) -> None:
        if name == BASE:
            # its encoder normalises by itself
            teacher = Teacher(_Base(recipe), as_size(recipe.images.size), mean=(0.0,) * 3, std=(1.0,) * 3)
        else:
            teacher = extra_teachers[name] if name in extra_teachers else load_teacher(name, recipe.teachers[name])
        self.name, self.taps, self.size, self.device = name, teacher.taps, teacher.size, device
        self.teachers = Teachers({name: teacher}, bf16=bf16).to(device)
        self.at_once = max(1, min(MOST_AT_ONCE, PIXELS_AT_ONCE // (self.size[0] * self.size[1])))

    def __call__(self, batch: Batch) -> dict[str, Features]:
        """``{tap: Features}`` in float32 of a batch, as in a live run."""
        told = [self.teachers(part.to(self.device)) for part in batch.split(self.at_once)]
        return {tap: together([said[f"{self.name}/{tap}"] for said in told]) for tap in self.taps}


def together(told: list[Features]) -> Features:
    """Features of several batches as those of one."""
    parts = {part: torch.cat([said.components()[part] for said in told]) for part in told[0].components()}
    return Features(parts.get("summary"), parts.get("spatial"), told[0].grid)
