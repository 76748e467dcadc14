"""How far off teachers in int8 are, said before anything is learned from them."""

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

SEEN = 32  # images
MOST = 0.02  # fvu of a tap: a tenth and less of what a good student leaves


def check_int8(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Hold every teacher in int8 against itself in float32, on held-out images.

    Raises:
        RecipeError: a tap in int8 leaves more than ``MOST`` of the variance of the exact one unexplained.
    """
    quick = {name: load_teacher(name, spec) for name, spec in recipe.teachers.items() if spec.int8}
    if not quick:
        return
    images = open_images(recipe.images, recipe.train.seed)
    sizes = list(dict.fromkeys(teacher.size for teacher in quick.values()))
    batch = next(evaluation_batches(images.collection, sizes, SEEN, images.heldout[:SEEN]))
    for name, teacher in quick.items():
        exact = load_teacher(name, recipe.teachers[name].model_copy(update={"int8": False}))
        lost, cosine = _compare(teacher, exact, batch.pixels(exact.size))
        worst = max(lost, key=lambda tap: lost[tap])
        say(f"{name} in int8: fvu {lost[worst]:.2g} at {worst}, cosine {cosine[worst]:.4f}, on {len(batch)} images")
        if not lost[worst] <= MOST:
            raise RecipeError(
                f"teachers.{name}.int8: {worst} loses {lost[worst]:.3f} of its variance, more than {MOST}; "
                "leave the key out"
            )


@torch.no_grad()
def _compare(quick: Teacher, exact: Teacher, pixels: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """fvu and mean cosine of each ``tap/part``."""
    said, truth = quick(pixels), exact(pixels)
    lost, cosine = {}, {}
    for tap, features in truth.items():
        for part, y in features.parts().items():
            x = said[tap].parts()[part]
            target, guess = channel_standardized(y.flatten(0, -2).double(), x.flatten(0, -2).double())
            lost[f"{tap}/{part}"] = unexplained(guess, target)
            cosine[f"{tap}/{part}"] = float(F.cosine_similarity(x, y, dim=-1).mean())
    return lost, cosine
