"""A teacher is a frozen model that computes Features of pixels; several of them run one after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shoulders.errors import DataError, RecipeError
from shoulders.features import Batch, Features
from shoulders.teachers.task_head import TaskHead


@dataclass(frozen=True)
class Tap:
    """The shape of a tap's Features: channels of its summary and spatial component (None where absent), grid (H, W)."""

    summary: int | None
    spatial: int | None
    grid: tuple[int, int]


class Teacher(nn.Module):
    """A frozen module with its own input size and normalization: pixels in [0, 1] to ``{tap: Features}``.

    A model of your own is a ``Teacher`` too: ``module: package.module:function`` in the recipe names a function without
    arguments that returns one::

        def teacher() -> Teacher:
            return Teacher(MyNet(), size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), license="mit")

    Args:
        module: maps normalized pixels (B, 3, h, w) to ``{tap: Features}``, with B first everywhere.
        size: (h, w) in px; images are rendered at this size and no other.
        mean, std: per channel, of pixels in [0, 1].
        license: as the weights' owner names it.
        source: where the weights come from, for reports.
        revision: commit of the hub repository, where there is one.
        taps: which of the module's outputs to use; default: all.
        head: the task head, which a student can keep (``keep_heads``).

    Raises:
        RecipeError: if the module's output for a blank image is not finite Features by name, or lacks a tap.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        size: tuple[int, int],
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        license: str = "unknown",
        source: str = "",
        revision: str | None = None,
        taps: Sequence[str] | None = None,
        head: TaskHead | None = None,
    ) -> None:
        super().__init__()
        if not (head is None or isinstance(head, TaskHead)):
            raise RecipeError(f"head: must be a shoulders.TaskHead, got {type(head).__name__}")
        self.module = module
        self._heads = (head,)  # in a tuple, so that its weights are not part of the teacher's
        self.size = (int(size[0]), int(size[1]))
        self.license = license
        self.source = source
        self.revision = revision
        self.register_buffer("mean", torch.tensor(mean).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).float().view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self._selected = tuple(taps) if taps is not None else None
        self.taps = self._find_taps()

    @property
    def head(self) -> TaskHead | None:
        """The task head of a teacher of your own."""
        return self._heads[0]

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        """Features by tap for pixels (B, 3, h, w) in [0, 1]; no gradient is recorded."""
        with torch.no_grad():
            output = self.module((pixels - self.mean) / self.std)
        return output if self._selected is None else {tap: output[tap] for tap in self._selected if tap in output}

    def train(self, mode: bool = True) -> Teacher:
        """A teacher is not trained: it stays in evaluation mode whatever ``mode`` is."""
        return super().train(False)

    def with_taps(self, taps: Sequence[str]) -> Teacher:
        """The same teacher with ``taps`` only."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return Teacher(self.module, self.size, mean, std, self.license, self.source, self.revision, taps, self.head)

    def _find_taps(self) -> dict[str, Tap]:
        blank = torch.full((1, 3, *self.size), 0.5)
        with torch.no_grad():
            output = self.module((blank - self.mean) / self.std)
        check_output(output, 1)
        unknown = [tap for tap in self._selected or () if tap not in output]
        if unknown:
            raise RecipeError(f"taps {', '.join(unknown)}: unknown; allowed: {', '.join(output)}")
        return {tap: describe_tap(output[tap]) for tap in self._selected or output}


def describe_tap(features: Features) -> Tap:
    """The channels and grid of Features."""
    channels = {name: x.shape[-1] for name, x in features.components().items()}
    return Tap(channels.get("summary"), channels.get("spatial"), features.grid)


def empty_features(tap: Tap, device: torch.device) -> Features:
    """A tap's Features of no image: (0, C) and (0, N, C)."""
    summary = None if tap.summary is None else torch.zeros(0, tap.summary, device=device)
    spatial = None if tap.spatial is None else torch.zeros(0, tap.grid[0] * tap.grid[1], tap.spatial, device=device)
    return Features(summary, spatial, tap.grid)


def drop_not_finite(features: Mapping[str, Features]) -> dict[str, Features]:
    """``{"name/tap": Features}`` without the images for which any feature of the same teacher is not finite.

    The host waits for the device once.
    """
    # a sum is finite only if all of its terms are, and it takes a fraction of the time of isfinite
    sums = [x.flatten(1).sum(1) for one in features.values() for x in one.components().values()]
    if torch.cat(sums).isfinite().all():
        return dict(features)
    masks: dict[str, Tensor] = {}  # (b,) by teacher
    for tap, one in features.items():
        teacher = tap.split("/")[0]
        for x in one.components().values():
            finite = x.isfinite().flatten(1).all(1)
            masks[teacher] = masks[teacher] & finite if teacher in masks else finite
    dropped = {teacher for teacher, mask in masks.items() if not mask.all()}
    return {
        tap: one.keep(masks[teacher]) if (teacher := tap.split("/")[0]) in dropped else one
        for tap, one in features.items()
    }


def check_output(output: Any, images: int) -> None:
    """Refuse a module's output that is not ``{tap: Features}`` of ``images`` images.

    Raises:
        RecipeError: not a dict of Features, another number of images, or values that are not finite.
    """
    if not isinstance(output, dict) or not output:
        raise RecipeError(f"the module must return {{tap: Features}}, got {type(output).__name__}")
    for tap, features in output.items():
        if not isinstance(tap, str) or not isinstance(features, Features):
            raise RecipeError(
                f"the module must return {{tap: Features}}, got {type(features).__name__} for tap {tap!r}; "
                "wrap tensors in shoulders.features.Features"
            )
        for name, x in features.components().items():
            if x.shape[0] != images:
                raise RecipeError(f"tap {tap!r}: {name} has {x.shape[0]} rows for {images} images; B comes first")
            if not torch.isfinite(x).all():
                raise RecipeError(f"tap {tap!r}: {name} is not finite; check weights and normalization")


class AnyTeachers(nn.Module, ABC):
    """The teachers of a run, live or cached: a batch to ``{"name/tap": Features}``.

    Args:
        bf16: whether the run computes in bfloat16.
        sources: {teacher: indices of the image sources that it learns from}; a teacher that is not named: all of them.
    """

    def __init__(self, bf16: bool, sources: Mapping[str, Sequence[int]] | None) -> None:
        super().__init__()
        self.bf16 = bf16
        self.sources = dict(sources or {})

    @property
    @abstractmethod
    def taps(self) -> dict[str, Tap]:
        """The shape of each ``"name/tap"`` of the teachers, without the base."""

    @property
    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """The input sizes (h, w) of the teachers; images are decoded for all of them."""

    @property
    @abstractmethod
    def render_sizes(self) -> list[tuple[int, int]]:
        """The sizes (h, w) that batches must be rendered at."""

    @abstractmethod
    def preprocessing(self) -> dict[str, list[list[float]]]:
        """The pixel normalization of each live teacher: ``{name: [mean, std]}``."""

    @abstractmethod
    def provenance(self) -> dict[str, dict[str, str | None]]:
        """Origin and license of each teacher's weights: ``{name: {source, revision, license}}``."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Features]:
        """``{"name/tap": Features}`` in float32, of the images in their ``rows``.

        Images of which a teacher's features are not finite are not among its rows. The features carry no graph but may
        enter one: they come from ``no_grad``, because tensors made in inference mode cannot be saved for the backward
        pass of a loss.
        """

    @abstractmethod
    def __getitem__(self, name: str) -> Teacher:
        """One live teacher, by its name."""


class Teachers(AnyTeachers):
    """Several live teachers, run one after another on the same views.

    Args:
        teachers: by name.
        taps: taps to use, by teacher name; a teacher that is not named uses all of its taps.
        bf16: run the teachers in bfloat16 autocast; their features are float32 all the same.
        sources: see :class:`AnyTeachers`.

    Raises:
        RecipeError: if a teacher does not have a tap.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        taps: Mapping[str, Sequence[str]] | None = None,
        bf16: bool = False,
        sources: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(bf16, sources)
        # the slash keeps names such as "type" apart from attributes of ModuleDict
        self.teachers = nn.ModuleDict({f"{name}/": teacher for name, teacher in teachers.items()})
        selected = taps or {}
        self.selected = {name: tuple(selected.get(name) or teacher.taps) for name, teacher in teachers.items()}
        for name, teacher in teachers.items():
            unknown = [tap for tap in self.selected[name] if tap not in teacher.taps]
            if unknown:
                allowed = ", ".join(teacher.taps)
                raise RecipeError(f"teachers.{name}.taps: no tap {', '.join(unknown)}; allowed: {allowed}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys(self[name].size for name in self.selected))

    @property
    def render_sizes(self) -> list[tuple[int, int]]:
        return self.sizes

    @property
    def taps(self) -> dict[str, Tap]:
        return {f"{name}/{tap}": self[name].taps[tap] for name, taps in self.selected.items() for tap in taps}

    def preprocessing(self) -> dict[str, list[list[float]]]:
        return {name: [self[name].mean.flatten().tolist(), self[name].std.flatten().tolist()] for name in self.selected}

    def provenance(self) -> dict[str, dict[str, str | None]]:
        teachers = {name: self[name] for name in self.selected}
        return {
            name: {"source": teacher.source, "revision": teacher.revision, "license": teacher.license}
            for name, teacher in teachers.items()
        }

    def with_bf16(self, bf16: bool) -> Teachers:
        """The same teachers, run with or without bfloat16 autocast."""
        return Teachers({name: self[name] for name in self.selected}, self.selected, bf16, self.sources)

    def forward(self, batch: Batch) -> dict[str, Features]:
        features: dict[str, Features] = {}
        for name, taps in self.selected.items():
            rows = batch.rows_of(self.sources.get(name))
            outputs = self._run(self[name], batch if rows is None else batch.take(rows))
            if lost := [tap for tap in taps if tap not in outputs]:
                raise DataError(f"teachers.{name}: has no tap {lost[0]!r} any more; return the same for all images")
            on_device = None if rows is None else rows.to(self[name].mean.device, non_blocking=True)
            features |= {f"{name}/{tap}": replace(outputs[tap].map(Tensor.float), rows=on_device) for tap in taps}
        return drop_not_finite(features)

    def _run(self, teacher: Teacher, batch: Batch) -> dict[str, Features]:
        if not len(batch):
            if isinstance(teacher, FSDPModule):  # another rank may run it now, and needs this rank's shard
                teacher(torch.zeros(1, 3, *teacher.size, device=teacher.mean.device))
            return {tap: empty_features(shape, teacher.mean.device) for tap, shape in teacher.taps.items()}
        pixels = batch.pixels(teacher.size)  # (b, 3, h, w)
        with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return teacher(pixels)

    def __getitem__(self, name: str) -> Teacher:
        teacher = self.teachers[f"{name}/"]
        assert isinstance(teacher, Teacher)  # noqa: S101
        return teacher
