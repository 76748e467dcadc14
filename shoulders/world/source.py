"""A source of unlabelled scenes that are drawn when they are read, and so need no disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import RecipeError
from shoulders.world.files import encode_png, split_seed
from shoulders.world.scenes import SIZE, draw
from shoulders.world.styles import STYLES


class WorldImages:
    """Scenes of several styles in turn, as a `shoulders.images.ImageSource`.

    In a recipe::

        images: {sources: {world: {module: "shoulders.world:unlabelled", args: {count: 20000}}}}
    """

    classes: list[str] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, count: int, styles: Sequence[str], seed: int, size: int) -> None:
        self.count, self.styles, self.seed, self.size = count, tuple(styles), seed, size

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Style, seed, index and size of a scene, which determine it."""
        number, style = divmod(index, len(self.styles))
        return f"{self.styles[style]}/{self.seed}/{number:07d}-{self.size}.png"

    def read(self, index: int) -> bytes:
        """The scene as the bytes of a PNG file."""
        number, style = divmod(index, len(self.styles))
        return encode_png(draw(self.styles[style], self.seed, number, self.size).image)

    def label(self, index: int) -> int | None:
        """None: the scenes have no labels here."""
        return None


def unlabelled(
    count: int = 20_000, styles: Sequence[str] = tuple(STYLES), seed: int = 0, size: int = SIZE
) -> WorldImages:
    """Unlabelled scenes for training; none of them is in a split that `write_world` writes.

    Args:
        count: number of scenes.
        styles: names in `STYLES`, in turn.
        seed: of the world, as in `write_world`.
        size: side in px.

    Raises:
        RecipeError: no scenes, or an unknown style.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles or count < 1:
        raise RecipeError(f"{count} scenes of styles {list(styles)}: at least one, of {', '.join(STYLES)}")
    return WorldImages(count, styles, split_seed("unlabelled", seed), size)
