"""Masks as run lengths, the form in which COCO and the transformers pipelines write them into JSON."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mask_to_runs(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE of a mask (H, W): lengths of the runs down the columns, the first one of zeros."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs: list[int] = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
