"""How much of each teacher's features the student holds, measured on images that are never trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features, Skipped, align
from shoulders.model import ShouldersModel
from shoulders.training.masked import not_finite
from shoulders.transfer.fvu import channel_standardized, fvu, is_constant, unexplained
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import teacher_name

MIN_IMAGES = 4  # half of them fit, the others choose and score
MAX_TOKENS = 16  # compared per image: neighbours are nearly the same, and memory is limited


@dataclass
class Target:
    """A teacher's features of the held-out images at one tap and component."""

    vectors: Tensor  # (n, P, C)
    tokens: Tensor | None  # (n, P) indices into ``grid``; None for a summary
    grid: tuple[int, int]  # the smaller of the teacher's and the student's
    starts: list[int]  # index into `vectors` where each batch begins, and their length


class HeldOutSet:
    """Held-out images with their teachers' features, computed once; :meth:`measure` runs the student.

    Args:
        batches: each batch and its {tap: Features}.
        student: whose grid and taps are used.
        size: (h, w) of the student's input in px.
        masked: {teacher: images of which its features are not finite}, which is complete after the last batch.

    Raises:
        DataError: a teacher has features of fewer than ``MIN_IMAGES`` images, or the same for all of them.
        NumericError: a teacher has finite features of fewer than ``MIN_IMAGES`` images.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Batch, Mapping[str, Features]]],
        student: ShouldersModel,
        size: tuple[int, int],
        masked: Mapping[str, Collection[str]],
    ):
        self.size = size
        self.batches: list[Batch] = []
        self.rows: list[dict[str, Tensor | None]] = []  # of each batch, by teacher
        self.skipped: list[Skipped] = []
        grid = student.encoder.grid(size)
        vectors: dict[str, list[Tensor]] = {}
        grids: dict[str, tuple[int, int]] = {}
        tokens: dict[str, list[Tensor]] = {}
        for number, (batch, teacher_features) in enumerate(batches):
            self.skipped += batch.skipped
            self.batches.append(Batch(batch.ids, {size: batch.rendered[size]}))
            self.rows.append({teacher_name(tap): features.rows for tap, features in teacher_features.items()})
            for tap, features in teacher_features.items():
                if features.summary is not None:
                    vectors.setdefault(f"{tap}/summary", []).append(features.summary.cpu()[:, None])
                if features.spatial is not None:
                    name = f"{tap}/spatial"
                    grids[name] = _smaller(grid, features.grid)
                    sampled = _sample_tokens(len(features.spatial), grids[name], seed=number)
                    tokens.setdefault(name, []).append(sampled)
                    vectors.setdefault(name, []).append(_gather_tokens(align(features, grids[name]), sampled))
        self.targets = {
            name: Target(
                torch.cat(by_batch),
                torch.cat(tokens[name]) if name in tokens else None,
                grids.get(name, (0, 0)),
                [0, *accumulate(map(len, by_batch))],
            )
            for name, by_batch in vectors.items()
        }
        for name, target in self.targets.items():
            teacher, count = teacher_name(name), len(target.vectors)
            if count < MIN_IMAGES:
                images = masked.get(teacher)
                raise not_finite(teacher, count, len(self), images) if images else too_few(teacher, count, len(self))
            if is_constant(target.vectors):
                raise constant_features(name, len(target.vectors))

    def __len__(self) -> int:
        """Images that could be read."""
        return sum(map(len, self.batches))

    @torch.no_grad()
    def measure(self, student: ShouldersModel, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
        """fvu per tap and component (``fvu/..``), of the trained projectors (``fvu_projector/..``), and ``fvu_spread``.

        Returns:
            numbers: everything by name.
            per_teacher: {teacher: mean fvu over its taps and components}.

        Raises:
            NumericError: the student's features are not finite.
        """
        latents, predictions = self._run(student, device)
        for name, vectors in (latents | {f"the projector of {name}": x for name, x in predictions.items()}).items():
            if count := int((~vectors.isfinite().flatten(1).all(1)).sum()):
                raise diverged(name, count, len(vectors))
        numbers, per_teacher = {}, {}
        by_teacher: dict[str, list[float]] = {}
        for name, target in self.targets.items():
            numbers[f"fvu/{name}"] = fvu(latents[name], target.vectors)
            numbers[f"fvu_projector/{name}"] = _fvu_of_predictions(predictions[name], target.vectors)
            by_teacher.setdefault(teacher_name(name), []).append(numbers[f"fvu/{name}"])
        for teacher, values in by_teacher.items():
            per_teacher[teacher] = numbers[f"fvu/{teacher}"] = sum(values) / len(values)
        without_base = [value for teacher, value in per_teacher.items() if teacher != BASE]
        numbers["fvu_spread"] = max(without_base) / max(min(without_base), 1e-6)
        return numbers, per_teacher

    def _run(self, student: ShouldersModel, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The student's latents and its predictions of teacher features, (n, P, ..) each, by name of the target."""
        latents: dict[str, list[Tensor]] = {name: [] for name in self.targets}
        predictions: dict[str, list[Tensor]] = {name: [] for name in self.targets}
        for number, batch in enumerate(self.batches):
            student_features = student.forward_features(batch.to(device).pixels(self.size))
            for teacher, rows in self.rows[number].items():
                inputs = {layer: features.take(rows) for layer, features in student_features.items()}
                predicted = student.project_teacher(teacher, inputs)
                for name, target in self.targets.items():
                    tap, component = name.rsplit("/", 1)
                    if tap in predicted:
                        latent = inputs["latent"].map(Tensor.float)
                        latents[name].append(_at(target, number, latent, component))
                        raw = student.standardizer(tap).inverse(predicted[tap])
                        predictions[name].append(_at(target, number, raw, component))
        return _concatenated(latents), _concatenated(predictions)


def too_few(teacher: str, count: int, heldout: int) -> DataError:
    """The refusal of a teacher that cannot be measured."""
    return DataError(
        f"images: {teacher} learns from {count} of {heldout} held-out images, and {MIN_IMAGES} are needed; give more "
        "images"
    )


def diverged(name: str, count: int, images: int) -> NumericError:
    """The refusal of a student whose features are not finite.

    Args:
        name: of the target.
        count: images with such features.
        images: of all.
    """
    return NumericError(
        f"the student's features are not finite for {count} of {images} held-out images ({name}); start in another out "
        "with a lower train.lr or train.precision=fp32"
    )


def constant_features(name: str, count: int) -> DataError:
    """The refusal of features without variance: nothing can be learned from them, and fvu would be 0.

    Args:
        name: of the target: teacher/tap/component.
        count: number of images.
    """
    teacher = teacher_name(name)
    tap, component = name.removeprefix(f"{teacher}/").rsplit("/", 1)
    return DataError(
        f"teachers.{teacher}: the {component} of tap {tap!r} is the same for all of {count} held-out images; leave it "
        f"out with teachers.{teacher}.taps, check the teacher's weights, or give images that differ"
    )


def _concatenated(by_batch: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(tensors) for name, tensors in by_batch.items()}


def _fvu_of_predictions(predictions: Tensor, targets: Tensor) -> float:
    """fvu of predictions (n, P, C) themselves, on the second half of the images."""
    half = len(targets) // 2
    fit, x, y = (v.flatten(0, 1).double() for v in (targets[:half], predictions[half:], targets[half:]))
    _, x, y = channel_standardized(fit, x, y)
    return unexplained(x, y)


def _at(target: Target, batch: int, features: Features, component: str) -> Tensor:
    """(B, P, C) of the features of one batch, at the tokens of the target."""
    if target.tokens is None:
        return features.components()[component].cpu()[:, None]
    tokens = target.tokens[target.starts[batch] : target.starts[batch + 1]]
    return _gather_tokens(align(features, target.grid), tokens)


def _smaller(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one if one[0] * one[1] <= other[0] * other[1] else other


def _sample_tokens(images: int, grid: tuple[int, int], seed: int) -> Tensor:
    """(B, P) distinct tokens per image, the same in every evaluation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, grid[0] * grid[1], generator=generator).argsort(1)[:, :MAX_TOKENS]


def _gather_tokens(features: Features, tokens: Tensor) -> Tensor:
    """(B, P, C) of the spatial features at ``tokens`` (B, P)."""
    spatial = features.components()["spatial"].cpu()
    return spatial.gather(1, tokens[:, :, None].expand(-1, -1, spatial.shape[-1]))
