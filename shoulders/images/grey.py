"""The range of grey values of more than 8 bits, one for all images of a source."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from shoulders.images.decode import GreyRange, Undecodable, deep_values
from shoulders.images.source import ImageSource

MAX_SAMPLES = 64  # images of a source that its ranges are chosen from
INTEGER_MAXIMA = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
MIN_USED = 0.1  # fraction of the range between the 1st and the 99th percentile of an image
MAX_CHECKED = 2**16  # values of an image
COUNTS = {10**power for power in range(10)}  # of images with the same fault, at which a note is kept


class SourceRanges:
    """The ranges of a source's grey values, chosen from samples of its images when the first deep image is decoded.

    They depend on the source alone: every process chooses the same.

    Args:
        source: the images.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.ranges: dict[str, GreyRange] | None = None  # by kind, as `deep_values` has it
        self.faults: dict[str, set[str]] = {}  # {what is wrong: names of images}
        self.notes: list[str] = []  # to be printed

    def choose(self, values: NDArray[np.generic], kind: str, name: Callable[[], str]) -> GreyRange:
        """The values that become black and white in an image; a note is kept of the 1st, 10th, .. that does not fit.

        Args:
            values: of the image.
            kind: of the values, as `deep_values` has it.
            name: gives the name of the image.
        """
        if self.ranges is None:
            self.ranges = self._sample()
        bounds = (0.0, 255.0) if kind == "colour" else self.ranges.get(kind) or choose_range(*_limits(values), kind)
        if fault := _fault(values, bounds, kind):
            self._count(fault, name())
        return bounds

    def print_notes(self) -> None:
        """Warn of what was assumed and noticed; in the main process or the first worker, so that it is printed once."""
        notes, self.notes = self.notes, []
        worker = get_worker_info()
        for note in notes if worker is None or worker.id == 0 else ():
            warnings.warn(note, stacklevel=3)

    def _count(self, fault: str, name: str) -> None:
        names = self.faults.setdefault(fault, set())
        if name not in names:
            names.add(name)
            if len(names) in COUNTS:
                count = f"{len(names)} images so far" if len(names) > 1 else "further images are counted"
                self.notes.append(f"{name}: {fault} ({count})")

    def _sample(self) -> dict[str, GreyRange]:
        """The range of each kind of values, and one line about them."""
        limits: dict[str, list[tuple[float, float]]] = {}
        for index in np.unique(np.linspace(0, len(self.source) - 1, MAX_SAMPLES).astype(int)).tolist():
            try:
                values, kind = deep_values(self.source.read(index))
            except (Undecodable, OSError):  # counted when it is its turn
                continue
            if kind in ("integer", "float"):
                limits.setdefault(kind, []).append(_limits(values))
        ranges = {
            kind: choose_range(min(low for low, _ in pairs), max(high for _, high in pairs), kind)
            for kind, pairs in limits.items()
        }
        for kind, (low, high) in ranges.items():
            count = f"{len(limits[kind])} of {len(self.source)} images"
            self.notes.append(
                f"{self.source.name(0)} and others: grey {kind} values, {low:g} is black, {high:g} white ({count})"
            )
        return ranges


def choose_range(low: float, high: float, kind: str) -> GreyRange:
    """The usual range that holds the values of a source from ``low`` to ``high``, else these two."""
    if kind == "header":
        return 0.0, 65535.0
    if low < 0:
        return low, high
    if kind == "integer":
        return next(((0.0, float(maximum)) for maximum in INTEGER_MAXIMA if high <= maximum), (low, high))
    if high <= 1:
        return 0.0, 1.0
    return (0.0, 255.0) if 127.5 < high <= 255 else (low, high)


def _limits(values: NDArray[np.generic]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise Undecodable("damaged: no finite pixel")
    return float(finite.min()), float(finite.max())


def _fault(values: NDArray[np.generic], bounds: GreyRange, kind: str) -> str:
    """What is wrong with the values of an image in a range, or nothing."""
    flat = values.ravel()
    finite = flat[:: max(1, flat.size // MAX_CHECKED)].astype(np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return ""
    low, high = np.quantile(finite, [0.01, 0.99])
    width, bits = bounds[1] - bounds[0], ", of 16 bits the upper 8," if kind == "colour" else ""
    if high - low < MIN_USED * width:
        return f"its values{bits} use under a tenth of the range from {bounds[0]:g} to {bounds[1]:g}"
    if finite.min() < bounds[0] or finite.max() > bounds[1]:
        return f"values outside of the range from {bounds[0]:g} to {bounds[1]:g} are clipped"
    return ""
