"""The order of images: pure functions of the seed, so that a run needs one integer to resume."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import RecipeError


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """A random order of ``range(count)`` that depends on the key alone.

    It sorts the raw words of a counter-based generator, which NumPy promises never to change; NumPy makes no such
    promise for its own ``permutation``.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(words, kind="stable")


def stream(first: int, length: int, count: int, *key: int | str) -> NDArray[np.int64]:
    """Positions [first, first + length) of the endless shuffled stream of ``count`` images.

    Returns:
        (length, 2): index of the image in [0, count), and number of its earlier visits in the stream.
    """
    parts = []
    for visit in range(first // count, -(-(first + length) // count)):
        order = permutation(count, *key, visit)
        start, stop = max(first - visit * count, 0), min(first + length - visit * count, count)
        indices = order[start:stop]
        parts.append(np.stack([indices, np.full_like(indices, visit)], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)


def quotas(counts: dict[str, int], shares: dict[str, float | None]) -> dict[str, int]:
    """Number of images of each source in an epoch, which is as long as all sources together.

    A given share is a fraction of the epoch. The sources without a share divide the rest in proportion to the square
    root of their number of images. If every source has a share, only the proportions of the shares matter.

    Args:
        counts: number of images by source.
        shares: by source; None or absent for a source without one.

    Raises:
        RecipeError: shares that leave no image to a source.
    """
    given = {name: share for name in counts if (share := shares.get(name)) is not None}
    roots = {name: math.sqrt(count) for name, count in counts.items() if name not in given}
    rest = 1 - sum(given.values())
    if roots and rest <= 0:
        raise RecipeError(
            f"images.sources: the shares of {', '.join(given)} add up to {1 - rest:g} and leave nothing for "
            f"{', '.join(roots)}; lower them, or give every source a share"
        )
    weights = dict(given)
    for name, root in roots.items():
        weights[name] = rest * root / sum(roots.values())
    rounded = _largest_remainder([weights[name] for name in counts], sum(counts.values()))
    for name, quota in zip(counts, rounded, strict=True):
        if quota == 0:
            raise RecipeError(f"images.sources.{name}: its share is below one image per epoch; raise it")
    return dict(zip(counts, rounded, strict=True))


def _largest_remainder(weights: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to ``total``."""
    exact = [weight / sum(weights) * total for weight in weights]
    rounded = [math.floor(amount) for amount in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: rounded[index] - exact[index])
    for index in by_remainder[: total - sum(rounded)]:
        rounded[index] += 1
    return rounded
