"""A teacher is a frozen model that says Features of pixels; several of them are asked one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shoulders.errors import RecipeError
from shoulders.features import EVERYBODY, Asked, Batch, Features


@dataclass(frozen=True)
class Tap:
    """What one tap gives: widths of its summary and spatial part (None where absent) and its grid (H, W)."""

    summary: int | None
    spatial: int | None
    grid: tuple[int, int]


class Teacher(nn.Module):
    """A frozen module with its own input size and normalisation: pixels in [0, 1] to ``{tap: Features}``.

    This is also the contract for a model of your own. ``module: package.module:function`` in the recipe names
    a function without arguments that returns a ``Teacher``::

        def teacher() -> Teacher:
            return Teacher(MyNet(), size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), license="mit")

    Args:
        module: maps normalised pixels (B, 3, h, w) to ``{tap: Features}``, with B first everywhere.
        size: (h, w) in px; images are rendered at this size and no other.
        mean, std: per channel, of pixels in [0, 1].
        license: as the weights' owner names it.
        source: where the weights come from, for reports.
        revision: commit of the hub repository, where there is one.
        taps: which of the module's answers to hand on; default: all.

    Raises:
        RecipeError: if the module's answer to a blank image is not finite Features by name, or lacks a tap.
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
    ) -> None:
        super().__init__()
        self.module = module
        self.size = (int(size[0]), int(size[1]))
        self.license = license
        self.source = source
        self.revision = revision
        self.register_buffer("mean", torch.tensor(mean).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).float().view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self._wanted = tuple(taps) if taps is not None else None
        self.taps = self._find_taps()

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        """Features by tap for pixels (B, 3, h, w) in [0, 1]; no gradient is recorded."""
        with torch.no_grad():
            answer = self.module((pixels - self.mean) / self.std)
        return answer if self._wanted is None else {tap: answer[tap] for tap in self._wanted}

    def train(self, mode: bool = True) -> Teacher:
        """A teacher does not train: it stays in eval mode whatever ``mode`` says."""
        return super().train(False)

    def with_taps(self, taps: Sequence[str]) -> Teacher:
        """The same teacher, handing on ``taps`` only."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return Teacher(self.module, self.size, mean, std, self.license, self.source, self.revision, taps)

    def _find_taps(self) -> dict[str, Tap]:
        blank = torch.full((1, 3, *self.size), 0.5)
        with torch.no_grad():
            answer = self.module((blank - self.mean) / self.std)
        check_answer(answer, 1)
        unknown = [tap for tap in self._wanted or () if tap not in answer]
        if unknown:
            raise RecipeError(f"taps {', '.join(unknown)}: not there; allowed: {', '.join(answer)}")
        return {tap: describe_tap(answer[tap]) for tap in self._wanted or answer}


def describe_tap(features: Features) -> Tap:
    """The widths and grid of Features."""
    widths = {name: part.shape[-1] for name, part in features.parts().items()}
    return Tap(widths.get("summary"), widths.get("spatial"), features.grid)


def silence(tap: Tap, device: torch.device) -> Features:
    """What a tap says of no image: (0, C) and (0, N, C)."""
    summary = None if tap.summary is None else torch.zeros(0, tap.summary, device=device)
    spatial = None if tap.spatial is None else torch.zeros(0, tap.grid[0] * tap.grid[1], tap.spatial, device=device)
    return Features(summary, spatial, tap.grid)


def check_answer(answer: Any, images: int) -> None:
    """Hold a module's answer against the contract ``{tap: Features}`` for ``images`` images.

    Raises:
        RecipeError: not a dict of Features, another number of images, or values that are not finite.
    """
    if not isinstance(answer, dict) or not answer:
        raise RecipeError(f"the module must answer {{tap: Features}}, got {type(answer).__name__}")
    for tap, features in answer.items():
        if not isinstance(tap, str) or not isinstance(features, Features):
            raise RecipeError(
                f"the module must answer {{tap: Features}}, got {type(features).__name__} for tap {tap!r}; "
                "wrap tensors in shoulders.features.Features"
            )
        for name, part in features.parts().items():
            if part.shape[0] != images:
                raise RecipeError(f"tap {tap!r}: {name} has {part.shape[0]} rows for {images} images; B comes first")
            if not torch.isfinite(part).all():
                raise RecipeError(f"tap {tap!r}: {name} is not finite; check weights and normalisation")


class Teachers(nn.Module):
    """Several teachers, asked one after another about the same views.

    Args:
        teachers: by name.
        taps: taps to use, by teacher name; a teacher not named here gives all of its taps.
        bf16: run the teachers in bfloat16 autocast; answers are float32 all the same.

    Raises:
        RecipeError: if a tap is asked for that the teacher does not have.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        taps: Mapping[str, Sequence[str]] | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        # with a slash: a bare name such as "type" could be one of ModuleDict's own
        self.teachers = nn.ModuleDict({f"{name}/": teacher for name, teacher in teachers.items()})
        self.bf16 = bf16
        chosen = taps or {}
        self.chosen = {name: tuple(chosen.get(name) or teacher.taps) for name, teacher in teachers.items()}
        for name, teacher in teachers.items():
            unknown = [tap for tap in self.chosen[name] if tap not in teacher.taps]
            if unknown:
                allowed = ", ".join(teacher.taps)
                raise RecipeError(f"teachers.{name}.taps: no tap {', '.join(unknown)}; allowed: {allowed}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes (h, w) that batches must be rendered at, without repeats."""
        return list(dict.fromkeys(self[name].size for name in self.chosen))

    @property
    def taps(self) -> dict[str, Tap]:
        """What each ``"name/tap"`` gives."""
        return {f"{name}/{tap}": self[name].taps[tap] for name, taps in self.chosen.items() for tap in taps}

    def pixels(self) -> dict[str, list[list[float]]]:
        """How each teacher wants its pixels: ``{name: [mean, std]}``."""
        return {name: [self[name].mean.flatten().tolist(), self[name].std.flatten().tolist()] for name in self.chosen}

    def provenance(self) -> dict[str, dict[str, str | None]]:
        """Where each teacher's knowledge comes from and what binds it: ``{name: {source, revision, license}}``."""
        each = {name: self[name] for name in self.chosen}
        return {
            name: {"source": teacher.source, "revision": teacher.revision, "license": teacher.license}
            for name, teacher in each.items()
        }

    def forward(self, batch: Batch, asked: Asked = EVERYBODY) -> dict[str, Features]:
        """``{"name/tap": Features}`` in float32.

        Args:
            asked: {name: (b,) the images of the batch that it is asked about}; one not named is asked about all.

        The answers carry no graph but may enter one: they come from ``no_grad``, because tensors made in
        inference mode cannot be saved for the backward pass of a loss.
        """
        answers = {}
        for name, taps in self.chosen.items():
            teacher = self[name]
            theirs = batch if name not in asked else batch.take(asked[name])
            if not len(theirs):
                device = teacher.mean.device
                if isinstance(teacher, FSDPModule):  # another rank may ask it now, and needs this one's part of it
                    teacher(torch.zeros(1, 3, *teacher.size, device=device))
                answers.update({f"{name}/{tap}": silence(teacher.taps[tap], device) for tap in taps})
                continue
            pixels = theirs.pixels(teacher.size)  # (b, 3, h, w)
            with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
                said = teacher(pixels)
            answers.update({f"{name}/{tap}": said[tap].map(Tensor.float) for tap in taps})
        return answers

    def __getitem__(self, name: str) -> Teacher:
        """One teacher, by its name."""
        teacher = self.teachers[f"{name}/"]
        assert isinstance(teacher, Teacher)  # noqa: S101
        return teacher
