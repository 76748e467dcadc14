"""The two value types that cross every border: a model's features of images, and the images themselves.

Legend of all shape comments: B images, N tokens (H * W), H W grid, C channels, D channels of the latent, K classes,
T teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """A model's features of B images: one summary vector for each image, one vector for each token, or both.

    Args:
        summary: (B, C), or None where the model has no vector for the whole image.
        spatial: (B, N, C), row-major over ``grid``, or None.
        grid: (H, W) with H * W == N; (0, 0) where ``spatial`` is None.
        rows: (B,) int64, which images of a batch these features belong to, as indices into it; None: all, in order.

    Raises:
        ValueError: if both components are None, or the shapes contradict each other.
    """

    summary: Tensor | None
    spatial: Tensor | None
    grid: tuple[int, int] = (0, 0)
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.summary is None and self.spatial is None:
            raise ValueError("Features need a summary, spatial features, or both; got neither")
        if self.summary is not None and self.summary.ndim != 2:
            raise ValueError(f"summary must be (B, C), got {tuple(self.summary.shape)}")
        if self.spatial is not None:
            h, w = self.grid
            if self.spatial.ndim != 3 or self.spatial.shape[1] != h * w:
                raise ValueError(
                    f"spatial must be (B, {h * w}, C) for grid {self.grid}, got {tuple(self.spatial.shape)}"
                )
        if self.rows is not None and self.rows.shape != (self.batch_size,):
            raise ValueError(f"rows must be ({self.batch_size},), one for each image, got {tuple(self.rows.shape)}")

    @property
    def batch_size(self) -> int:
        """B."""
        return len(next(iter(self.components().values())))

    @classmethod
    def from_map(cls, maps: Tensor, summary: Tensor | None = None, rows: Tensor | None = None) -> Features:
        """Features of a channels-first map (B, C, H, W)."""
        return cls(summary, maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]), rows)

    def to_map(self) -> Tensor:
        """The spatial features as a channels-first map (B, C, H, W)."""
        if self.spatial is None:
            raise ValueError("these Features have no spatial component")
        return self.spatial.transpose(1, 2).unflatten(2, self.grid)

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """The same Features with ``change`` applied to each component that is present."""
        return Features(
            None if self.summary is None else change(self.summary),
            None if self.spatial is None else change(self.spatial),
            self.grid,
            self.rows,
        )

    def take(self, rows: Tensor | None) -> Features:
        """Features of the images ``rows`` (b,) alone, in that order; None: of all images.

        Raises:
            ValueError: if these Features are of some images of a batch already.
        """
        if rows is None:
            return self
        if self.rows is not None:
            raise ValueError("these Features are of some images of a batch already; take rows of those of all images")
        return replace(self.map(lambda component: component[rows.to(component.device)]), rows=rows)

    def keep(self, mask: Tensor) -> Features:
        """Features of the images where ``mask`` (B,), bool, is true."""
        rows = mask.nonzero()[:, 0]
        kept = replace(self, rows=None).map(lambda component: component[rows])
        return replace(kept, rows=rows if self.rows is None else self.rows[rows])

    def components(self) -> dict[str, Tensor]:
        """``{"summary": (B, C), "spatial": (B, N, C)}``, without the absent ones."""
        both = {"summary": self.summary, "spatial": self.spatial}
        return {name: component for name, component in both.items() if component is not None}


def in_order(x: Tensor) -> Tensor:
    """The same numbers, row after row in memory: in another layout, sums over them are rounded differently."""
    if x.stride() == torch.empty(x.shape, device="meta").stride():  # is_contiguous is easy about sides of 1
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used: its name in the source and why."""

    name: str
    reason: str


CENTRAL = -1  # the number of the one view that is not random: of held-out images, and wherever nothing trains


@dataclass(frozen=True)
class Batch:
    """B views of B images, rendered from the decoded originals at several sizes.

    Args:
        ids: (B,) int64, the stable id of each image.
        rendered: {(h, w): (B, 3, h, w) uint8}.
        labels: (B,) int64 where the source has labels and the caller wants them, else None.
        skipped: images that failed to decode and were replaced in this batch.
        views: (B,) int64, the number of each view: `CENTRAL`, or what the random view was drawn with; None where
            it is unknown.
        sources: (B,) int64, the index of each image's source among those of the run; None where it is unknown.
    """

    ids: Tensor
    rendered: dict[tuple[int, int], Tensor]
    labels: Tensor | None = None
    skipped: tuple[Skipped, ...] = field(default=())
    views: Tensor | None = None
    sources: Tensor | None = None

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """Pixels (B, 3, h, w) in [0, 1], float32, at ``size`` = (h, w).

        Raises:
            KeyError: if the batch was not rendered at this size.
        """
        if size not in self.rendered:
            raise KeyError(
                f"this batch was rendered at {sorted(self.rendered)}, not at {size}: add the size to the loader"
            )
        return self.rendered[size].to(torch.float32) / 255

    def to(self, device: torch.device) -> Batch:
        """The same batch with its pixels on ``device``."""
        moved = {size: images.to(device, non_blocking=True) for size, images in self.rendered.items()}
        return replace(self, rendered=moved)

    @property
    def device(self) -> torch.device:
        """Where its pixels are; all else stays on the CPU."""
        return next(iter(self.rendered.values())).device

    def split(self, size: int) -> list[Batch]:
        """The batch in consecutive ones of ``size`` images; the last may be smaller."""
        return [self.take(slice(start, start + size)) for start in range(0, len(self), size)]

    def take(self, rows: Tensor | slice) -> Batch:
        """Some of the images, without what was skipped; ``rows`` (b,) int64 on the CPU, or a slice."""
        on_device = rows.to(self.device, non_blocking=True) if isinstance(rows, Tensor) else rows
        return Batch(
            self.ids[rows],
            {size: images[on_device] for size, images in self.rendered.items()},
            None if self.labels is None else self.labels[rows],
            views=None if self.views is None else self.views[rows],
            sources=None if self.sources is None else self.sources[rows],
        )

    def rows_of(self, sources: Sequence[int] | None) -> Tensor | None:
        """(b,) int64 on the CPU: which images come from these sources; None, of all images, for None.

        Raises:
            ValueError: if the batch does not record the sources of its images.
        """
        if sources is None:
            return None
        if self.sources is None:
            raise ValueError("this batch does not record the sources of its images; give Batch.sources")
        return torch.isin(self.sources, torch.tensor(list(sources), dtype=torch.int64)).nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.ids)


FeaturesOf = Callable[[Batch], Features]  # a model, as probes and evaluations see it


def align(features: Features, grid: tuple[int, int]) -> Features:
    """The same Features with the spatial component resized bilinearly (antialiased where it shrinks) to ``grid``."""
    if features.spatial is None or features.grid == grid:
        return features
    resized = F.interpolate(features.to_map(), size=grid, mode="bilinear", antialias=True, align_corners=False)
    return Features.from_map(resized, features.summary, features.rows)


def align_pair(one: Features, other: Features) -> tuple[Features, Features]:
    """Both on the smaller of their two grids (fewer tokens)."""
    tokens = [f.grid[0] * f.grid[1] for f in (one, other)]
    grid = one.grid if tokens[0] <= tokens[1] else other.grid
    return align(one, grid), align(other, grid)
