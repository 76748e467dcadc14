"""Which image comes when: pure functions of the seed, so that resuming a run takes one integer."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import RecipeError


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """A random order of ``range(count)`` that depends on the key alone.

    It sorts the raw words of a counter-based generator: NumPy promises to keep those the same for ever, its
    own ``permutation`` not.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(words, kind="stable")


def stream(first: int, amount: int, count: int, *key: int | str) -> NDArray[np.int64]:
    """Positions [first, first + amount) of the endless shuffled stream of ``count`` images.

    Returns:
        (amount, 2): number of the image in [0, count), and how many times the stream has passed it before.
    """
    parts = []
    for visit in range(first // count, -(-(first + amount) // count)):
        order = permutation(count, *key, visit)
        start, stop = max(first - visit * count, 0), min(first + amount - visit * count, count)
        seen = order[start:stop]
        parts.append(np.stack([seen, np.full_like(seen, visit)], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)


def quotas(counts: dict[str, int], shares: dict[str, float | None]) -> dict[str, int]:
    """How many images of an epoch (as long as all images together) each source gives.

    Shares that are given are fractions of the epoch, and the rest goes to the other sources in proportion to
    sqrt(count); where all are given, only their proportions matter.

    Raises:
        RecipeError: shares that leave nothing for a source.
    """
    given = {name: share for name in counts if (share := shares.get(name)) is not None}
    free = {name: math.sqrt(count) for name, count in counts.items() if name not in given}
    left = 1 - sum(given.values())
    if free and left <= 0:
        raise RecipeError(
            f"images.sources: the shares of {', '.join(given)} add up to {1 - left:g} and leave nothing for "
            f"{', '.join(free)}; lower them, or give every source a share"
        )
    weights = dict(given)
    for name, root in free.items():
        weights[name] = left * root / sum(free.values())
    rounded = _largest_remainder([weights[name] for name in counts], sum(counts.values()))
    for name, amount in zip(counts, rounded, strict=True):
        if amount == 0:
            raise RecipeError(f"images.sources.{name}: its share is below one image per epoch; raise it")
    return dict(zip(counts, rounded, strict=True))


def _largest_remainder(weights: list[float], total: int) -> list[int]:
    exact = [weight / sum(weights) * total for weight in weights]
    whole = [math.floor(amount) for amount in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in by_remainder[: total - sum(whole)]:
        whole[index] += 1
    return whole
