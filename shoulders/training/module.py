"""What learns in a run, and all of its state: student, t2s projectors, optimizer, average, schedule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.config.recipe import Recipe
from shoulders.features import EVERYBODY, Asked, Features
from shoulders.model import ShouldersModel
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import BASE, Balance, Settings, kpu
from shoulders.transfer.projectors import FeatureDims, JointToStudent, TeacherToStudent, teacher_name


class DistillationModule(nn.Module):
    """Student and t2s projectors behind one forward, so that DDP sees everything that learns."""

    def __init__(self, student: ShouldersModel, recipe: Recipe):
        super().__init__()
        how = recipe.transfer
        self.student = student
        self.t2s = _t2s(student, recipe)
        self.distance = distance(how.distance, how.cosine_weight)
        self.settings = Settings(how.preserve, how.t2s, how.t2s_weight, how.t2s_grad_to)
        self.kind = how.balance
        taught_by = [name for name in student.config.teachers if name != BASE]
        self.shares = [recipe.teachers[name].weight if name in recipe.teachers else 1.0 for name in taught_by]

    def forward(
        self, pixels: Tensor, taught: Mapping[str, Features], coins: Tensor, asked: Asked = EVERYBODY
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named terms of pixels (B, 3, h, w), of what the teachers say of them, and of coins (B, T).

        Args:
            asked: of which images the teachers say it; of one not named, all.
        """
        base = {tap.removeprefix(f"{BASE}/"): said for tap, said in taught.items() if teacher_name(tap) == BASE}
        goals = {tap: taught[tap] for tap in self.student.taps}
        return self.compare(self.student.forward_features(pixels, base), goals, coins, asked)

    def compare(
        self, seen: Mapping[str, Features], taught: Mapping[str, Features], coins: Tensor, asked: Asked = EVERYBODY
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named terms of what the student sees, ``{place: Features}``: projectors, distances, balance."""
        told = self.student.project(seen, asked)
        goals = self.student.standardized(taught)

        def unify(present: Mapping[str, Tensor]) -> Mapping[str, Features]:
            grid = seen["latent"].grid
            if isinstance(self.t2s, JointToStudent):
                return {"joint": self.t2s(goals, grid, present, asked).map(torch.Tensor.float)}
            return {tap: guess.map(torch.Tensor.float) for tap, guess in self.t2s(goals, grid).items()}  # type: ignore[misc]

        latent = seen["latent"].map(torch.Tensor.float)  # distances want fp32
        told = {tap: features.map(torch.Tensor.float) for tap, features in told.items()}
        balance = partial(self._balance, coins=coins)
        loss, terms = kpu(latent, told, goals, unify, self.distance, balance, self.settings, asked)
        # a part that no teacher has, such as a summary, still gets a gradient, of zero: DDP and checkpoints count on it
        learned = {part for features in told.values() for part in features.parts()}
        for features in seen.values():
            loss = loss + sum(0 * x.float().sum() for part, x in features.parts().items() if part not in learned)
        return loss, terms

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _balance(self, losses: Tensor, asked: Tensor, coins: Tensor) -> Tensor:
        kinds: dict[str, Balance] = {
            "uniform": balance.uniform,
            "fixed": partial(balance.fixed, shares=self.shares),
            "dropping": partial(balance.dropping, coins=coins),
        }
        return kinds[self.kind](losses, asked)


def _t2s(student: ShouldersModel, recipe: Recipe) -> TeacherToStudent | JointToStudent | None:
    how, d = recipe.transfer, student.encoder.width
    taps = {tap: FeatureDims(spec["summary"], spec["spatial"]) for tap, spec in (student.config.taps or {}).items()}
    kinds: dict[str, Any] = {"none": lambda *_: None, "each": TeacherToStudent, "joint": JointToStudent}
    t2s = kinds[how.t2s](d, taps, how.projector_width or 2 * d)
    if t2s is not None and how.t2s_grad_to == "student":
        t2s.requires_grad_(False)  # no gradient reaches it, and DDP must not wait for one
    return t2s
