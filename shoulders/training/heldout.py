"""How much of each teacher the student holds, measured on images that it never trains on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shoulders.errors import DataError
from shoulders.features import Asked, Batch, Features, Skipped, align
from shoulders.model import ShouldersModel
from shoulders.transfer.fvu import channel_standardized, fvu, unexplained
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import teacher_name

FEWEST = 4  # images: half of them fit, the others choose and tell
PLACES = 16  # places per image that are compared: neighbours say nearly the same, memory is not free


@dataclass
class Target:
    """What a teacher says of the held-out images at one tap and part."""

    vectors: Tensor  # (n, P, C)
    places: Tensor | None  # (n, P) indices into ``grid``; None for a summary
    grid: tuple[int, int]  # the smaller of the teacher's and the student's
    first: list[int]  # row of `vectors` where each batch begins


class HeldOutSet:
    """Held-out images with their teachers' features, asked once; :meth:`measure` asks the student."""

    def __init__(
        self,
        taught: Iterable[tuple[Batch, Mapping[str, Features], Asked]],
        student: ShouldersModel,
        size: tuple[int, int],
    ):
        self.size = size
        self.batches: list[Batch] = []
        self.asked: list[Asked] = []  # of each batch
        self.skipped: list[Skipped] = []
        grid = student.encoder.grid(size)
        rows: dict[str, list[Tensor]] = {}
        grids: dict[str, tuple[int, int]] = {}
        places: dict[str, list[Tensor]] = {}
        for number, (batch, features, asked) in enumerate(taught):
            self.skipped += batch.skipped
            self.batches.append(Batch(batch.ids, {size: batch.rendered[size]}))
            self.asked.append(asked)
            for tap, said in features.items():
                if said.summary is not None:
                    rows.setdefault(f"{tap}/summary", []).append(said.summary.cpu()[:, None])
                if said.spatial is not None:
                    name = f"{tap}/spatial"
                    grids[name] = _smaller(grid, said.grid)
                    chosen = _choose(len(said.spatial), grids[name], seed=number)
                    places.setdefault(name, []).append(chosen)
                    rows.setdefault(name, []).append(_at(align(said, grids[name]), chosen))
        self.targets = {
            name: Target(
                torch.cat(parts),
                torch.cat(places[name]) if name in places else None,
                grids.get(name, (0, 0)),
                [0, *accumulate(map(len, parts))],
            )
            for name, parts in rows.items()
        }
        for name, target in self.targets.items():
            if len(target.vectors) < FEWEST:
                raise too_few(teacher_name(name), len(target.vectors), len(self))

    def __len__(self) -> int:
        """Images that could be read."""
        return sum(map(len, self.batches))

    @torch.no_grad()
    def measure(self, student: ShouldersModel, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
        """fvu per tap and part (``fvu/..``), of the trained projectors (``fvu_projector/..``), and ``fvu_spread``.

        Returns:
            numbers: everything by name.
            per_teacher: {teacher: mean fvu over its taps and parts}.
        """
        latents, told = self._ask(student, device)
        numbers, per_teacher = {}, {}
        by_teacher: dict[str, list[float]] = {}
        for name, target in self.targets.items():
            numbers[f"fvu/{name}"] = fvu(latents[name], target.vectors)
            half = len(target.vectors) // 2
            _, ours, theirs = channel_standardized(
                *(v.flatten(0, 1).double() for v in (target.vectors[:half], told[name][half:], target.vectors[half:]))
            )
            numbers[f"fvu_projector/{name}"] = unexplained(ours, theirs)
            by_teacher.setdefault(teacher_name(name), []).append(numbers[f"fvu/{name}"])
        for teacher, values in by_teacher.items():
            per_teacher[teacher] = numbers[f"fvu/{teacher}"] = sum(values) / len(values)
        purposeful = [value for teacher, value in per_teacher.items() if teacher != BASE]
        numbers["fvu_spread"] = max(purposeful) / max(min(purposeful), 1e-6)
        return numbers, per_teacher

    def _ask(self, student: ShouldersModel, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        latents: dict[str, list[Tensor]] = {name: [] for name in self.targets}
        told: dict[str, list[Tensor]] = {name: [] for name in self.targets}
        for number, (batch, asked) in enumerate(zip(self.batches, self.asked, strict=True)):
            seen = student.forward_features(batch.to(device).pixels(self.size))
            said = student.project(seen, asked)
            for name, target in self.targets.items():
                tap, part = name.rsplit("/", 1)
                raw = student.standardizer(tap).inverse(said[tap])
                latent = seen["latent"].take(asked.get(teacher_name(tap))).map(Tensor.float)
                for features, found in ((latent, latents), (raw, told)):
                    if target.places is None:
                        found[name].append(features.parts()[part].cpu()[:, None])
                    else:
                        here = target.places[target.first[number] : target.first[number + 1]]
                        found[name].append(_at(align(features, target.grid), here))
        return ({name: torch.cat(parts) for name, parts in found.items()} for found in (latents, told))  # type: ignore[return-value]


def too_few(teacher: str, asked: int, heldout: int) -> DataError:
    """The refusal of a teacher that cannot be measured."""
    return DataError(
        f"images: {teacher} is asked about {asked} of {heldout} held-out images, and {FEWEST} are needed; give more "
        "images"
    )


def _smaller(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one if one[0] * one[1] <= other[0] * other[1] else other


def _choose(images: int, grid: tuple[int, int], seed: int) -> Tensor:
    """(B, P) distinct places per image, the same in every evaluation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, grid[0] * grid[1], generator=generator).argsort(1)[:, :PLACES]


def _at(features: Features, places: Tensor) -> Tensor:
    """(B, P, C) of the spatial features at ``places`` (B, P)."""
    spatial = features.parts()["spatial"].cpu()
    return spatial.gather(1, places[:, :, None].expand(-1, -1, spatial.shape[-1]))
