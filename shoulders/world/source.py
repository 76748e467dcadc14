"""Scenes drawn as they are asked for: a source of unlabelled images that takes no disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import RecipeError
from shoulders.world.files import encode, seed_of
from shoulders.world.scenes import SIZE, draw
from shoulders.world.styles import STYLES


class Drawn:
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
        """Style, seed, index and size of a scene: all that it depends on."""
        number, style = divmod(index, len(self.styles))
        return f"{self.styles[style]}/{self.seed}/{number:07d}-{self.size}.png"

    def read(self, index: int) -> bytes:
        """The scene as a PNG file."""
        number, style = divmod(index, len(self.styles))
        return encode(draw(self.styles[style], self.seed, number, self.size).image)

    def label(self, index: int) -> int | None:
        """None: nobody says what is in a scene."""
        return None


def unlabelled(count: int = 20_000, styles: Sequence[str] = tuple(STYLES), seed: int = 0, size: int = SIZE) -> Drawn:
    """`count` scenes to learn from without labels; none of them is in a split that `write_world` writes.

    Args:
        styles: names in `STYLES`, drawn in turn.
        seed: of the world.
        size: side in px.

    Raises:
        RecipeError: no scenes, or an unknown style.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles or count < 1:
        raise RecipeError(f"{count} scenes of styles {list(styles)}: at least one, of {', '.join(STYLES)}")
    return Drawn(count, styles, seed_of("unlabelled", seed), size)
