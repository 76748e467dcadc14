"""Runs one teacher at a time in batches of limited size; the base is run in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

MAX_BATCH_IMAGES = 128
MAX_BATCH_PIXELS = 2**23  # 128 images of 224 px, 8 of 1024 px


class BaseTeacher(nn.Module):
    """The base of a student as the module of a teacher: its layers are the taps, adapters are off."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.layers = base_layers_needed(recipe.student, recipe.transfer.layers, bool(recipe.transfer.preserve))
        base = load_base(recipe.student)
        preprocessing = base.preprocessing
        adapter = recipe.student.adapter.model_dump()
        self.encoder = Encoder(base.model, adapter, preprocessing.mean, preprocessing.std)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        """``{layer: Features}`` for pixels (B, 3, h, w) in [0, 1]."""
        return self.encoder.base_features(pixels, self.layers)


class TeacherRunner:
    """A loaded teacher of a recipe.

    Args:
        name: of the teacher; ``base`` for the base.
        recipe: names the teacher.
        extra_teachers: teachers that are not in the recipe, by name.
        bf16: run in bfloat16.
        device: where to run.
    """

    def __init__(
        self, name: str, recipe: Recipe, extra_teachers: Mapping[str, Teacher], bf16: bool, device: torch.device
    ) -> None:
        if name == BASE:
            # the encoder of a student normalizes pixels itself
            teacher = Teacher(BaseTeacher(recipe), as_size(recipe.images.size), mean=(0.0,) * 3, std=(1.0,) * 3)
        else:
            teacher = extra_teachers[name] if name in extra_teachers else load_teacher(name, recipe.teachers[name])
        self.name, self.taps, self.size, self.device = name, teacher.taps, teacher.size, device
        self.teachers = Teachers({name: teacher}, bf16=bf16).to(device)
        self.max_batch = max(1, min(MAX_BATCH_IMAGES, MAX_BATCH_PIXELS // (self.size[0] * self.size[1])))

    def __call__(self, batch: Batch) -> dict[str, Features]:
        """``{tap: Features}`` in float32 for a batch of any size, as in a run without a cache.

        Images of which the features are not finite are not among the rows.
        """
        parts = batch.split(self.max_batch)
        outputs = [self.teachers(part.to(self.device)) for part in parts]
        return {tap: concat([output[f"{self.name}/{tap}"] for output in outputs], parts) for tap in self.taps}


def concat(features: Sequence[Features], batches: Sequence[Batch]) -> Features:
    """The Features of several batches as those of one."""
    components = {name: torch.cat([one.components()[name] for one in features]) for name in features[0].components()}
    rows = None
    if any(one.rows is not None for one in features):
        every = torch.arange(sum(map(len, batches)), device=next(iter(components.values())).device)
        parts = zip(features, every.split([len(batch) for batch in batches]), strict=True)
        rows = torch.cat([part if one.rows is None else part[one.rows] for one, part in parts])
    return Features(components.get("summary"), components.get("spatial"), features[0].grid, rows)


def numeric_error(teacher: str, error: EncodeError, image: str = "an image") -> NumericError:
    """The error message for features of a teacher that float16 cannot hold."""
    return NumericError(
        f"teachers.{teacher}: {error.field} of {image} contains {error.value:g}, too much for float16; set "
        f"cache.dtype=bfloat16"
    )
