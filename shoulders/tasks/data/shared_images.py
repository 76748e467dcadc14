"""Images that are in train and in another split too."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from shoulders.images import Undecodable
from shoulders.tasks.data.splits import AnnotatedSplit, T, first_names

MAX_COMPARED = 1000  # images of a split whose bytes are compared with those of train


def warn_shared(
    path: Path, by_name: Mapping[str, AnnotatedSplit[T]], keys: Mapping[str, Sequence[Hashable | None]]
) -> None:
    """Name images of other splits that train holds as well, byte for byte, under whatever name.

    Args:
        path: of the data set.
        by_name: the splits.
        keys: of the annotation of each image; only images whose annotations are equal are read. None: never read.
    """
    train_positions: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys["train"]):
        if key is not None:
            train_positions.setdefault(key, []).append(position)
    for name, split in by_name.items():
        if name == "train":
            continue
        candidates = [i for i, key in enumerate(keys[name]) if key in train_positions][:MAX_COMPARED]
        wanted = {keys[name][position] for position in candidates}
        train = {_digest(by_name["train"], i) for key in wanted for i in train_positions[key][:MAX_COMPARED]}
        shared = [position for position in candidates if (digest := _digest(split, position)) and digest in train]
        if shared:
            names = [split.images.name(int(split.indices[position])) for position in shared]
            most = " or more" if len(candidates) == MAX_COMPARED else ""
            warnings.warn(
                f"{path}: {len(shared)}{most} of {len(split.annotations)} images of {name} are in train too "
                f"({first_names(names)}); a probe is fitted on these",
                stacklevel=3,
            )


def _digest(split: AnnotatedSplit[T], position: int) -> bytes:
    """Of the bytes of an image; empty if it cannot be read."""
    try:
        return hashlib.sha256(split.images.encoded(int(split.indices[position]))).digest()
    except Undecodable:
        return b""
