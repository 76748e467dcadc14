"""The base: which pretrained models can carry a student, and how one is checked and loaded."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from shoulders.errors import RecipeError
from shoulders.hub import IMAGENET, Preprocessing, load_strict, read_config, read_preprocessing
from shoulders.recipe import Student
from shoulders.student.encoder import BASES

# full image-text checkpoints: the base is their image tower
TOWERS = {"siglip": "siglip_vision_model"}


def check_base(spec: Student, size: tuple[int, int]) -> None:
    """What can be known before weights load: the family is supported and the size fits its patches.

    Raises:
        RecipeError: one line with the fix.
    """
    config = read_config(spec.base, spec.revision, "student.base")
    kind = _kind(config)
    if kind not in BASES:
        raise RecipeError(
            f"student.base: {spec.base!r} is a {kind}; a base is one of {', '.join(sorted([*BASES, *TOWERS]))}"
        )
    patch = config.get("vision_config", config).get("patch_size", 16)
    if any(side % patch or side < patch for side in size):
        legal = tuple(max(patch, round(side / patch) * patch) for side in size)
        raise RecipeError(
            f"images.size: {size} is not a multiple of the base's patch size {patch}; the nearest is {legal}"
        )


def load_base(spec: Student) -> tuple[PreTrainedModel, Preprocessing]:
    """The pretrained base with its own normalisation.

    Raises:
        DataError: if a weight is missing.
    """
    family = BASES[_kind(read_config(spec.base, spec.revision, "student.base"))]
    model_class = getattr(transformers, family.model)
    model = load_strict(model_class, spec.base, spec.revision, where="student.base", **family.build)
    return model.eval(), read_preprocessing(spec.base, spec.revision) or Preprocessing(None, *IMAGENET)


def _kind(config: dict[str, Any]) -> str:
    kind = config.get("model_type", "model without model_type")
    return TOWERS.get(kind, kind)
