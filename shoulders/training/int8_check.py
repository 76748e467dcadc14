"""Measure how far the features of int8 teachers are from those in float32, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.config.recipe import Recipe
from shoulders.errors import RecipeError
from shoulders.images import evaluation_batches, open_images
from shoulders.teachers import Teacher, load_teacher
from shoulders.transfer.fvu import channel_standardized, unexplained

MAX_IMAGES = 32
MAX_FVU = 0.02  # of a tap: at most a tenth of the fvu that a good student reaches


def check_int8(recipe: Recipe, log: Callable[[str], None], max_fvu: float = MAX_FVU) -> None:
    """Compare every int8 teacher with itself in float32, on held-out images.

    Args:
        recipe: the recipe; a recipe without int8 teachers needs no check.
        log: receives one line per int8 teacher.
        max_fvu: the largest fraction of variance of a float32 tap that the int8 tap may leave unexplained.

    Raises:
        RecipeError: a tap exceeds ``max_fvu``.
    """
    int8_teachers = {name: load_teacher(name, spec) for name, spec in recipe.teachers.items() if spec.int8}
    if not int8_teachers:
        return
    images = open_images(recipe.images, recipe.train.seed)
    sizes = list(dict.fromkeys(teacher.size for teacher in int8_teachers.values()))
    batch = next(evaluation_batches(images.collection, sizes, MAX_IMAGES, images.heldout[:MAX_IMAGES]))
    for name, teacher in int8_teachers.items():
        exact = load_teacher(name, recipe.teachers[name].model_copy(update={"int8": False}))
        fvu, cosine = _compare(teacher, exact, batch.pixels(exact.size))
        worst = max(fvu, key=lambda tap: fvu[tap])
        log(f"{name} in int8: fvu {fvu[worst]:.2g} at {worst}, cosine {cosine[worst]:.4f}, on {len(batch)} images")
        if not fvu[worst] <= max_fvu:
            raise RecipeError(
                f"teachers.{name}.int8: {worst} loses {fvu[worst]:.3f} of its variance, more than {max_fvu}; "
                "leave the key out"
            )


@torch.no_grad()
def _compare(teacher: Teacher, exact: Teacher, pixels: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """fvu and mean cosine of each ``tap/component`` of a teacher against the exact one."""
    features, exact_features = teacher(pixels), exact(pixels)
    fvu, cosine = {}, {}
    for tap, expected in exact_features.items():
        for component, y in expected.components().items():
            x = features[tap].components()[component]
            target, prediction = channel_standardized(y.flatten(0, -2).double(), x.flatten(0, -2).double())
            fvu[f"{tap}/{component}"] = unexplained(prediction, target)
            cosine[f"{tap}/{component}"] = float(F.cosine_similarity(x, y, dim=-1).mean())
    return fvu, cosine
