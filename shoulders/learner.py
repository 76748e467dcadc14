"""What learns in a run, and all of its state: student, t2s projectors, optimizer, average, schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.errors import DataError
from shoulders.features import EVERYBODY, Asked, Features
from shoulders.model import ShouldersModel
from shoulders.parallel import apart, clip, part_of, replicated
from shoulders.recipe import Recipe, Train
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.objective import BASE, Balance, Settings, kpu
from shoulders.transfer.projectors import JointToStudent, TeacherToStudent, Widths, teacher_of


class Learner(nn.Module):
    """Student and t2s projectors behind one forward, so that DDP sees everything that learns."""

    def __init__(self, student: ShouldersModel, recipe: Recipe):
        super().__init__()
        how = recipe.transfer
        self.student = student
        self.t2s = _t2s(student, recipe)
        self.distance = distance(how.distance, how.cosine_share)
        self.settings = Settings(how.preserve, how.t2s, how.t2s_weight, how.t2s_gradient)
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
        base = {tap.removeprefix(f"{BASE}/"): said for tap, said in taught.items() if teacher_of(tap) == BASE}
        goals = {tap: taught[tap] for tap in self.student.taps}
        return self.compare(self.student.places(pixels, base), goals, coins, asked)

    def compare(
        self, seen: Mapping[str, Features], taught: Mapping[str, Features], coins: Tensor, asked: Asked = EVERYBODY
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named terms of what the student sees, ``{place: Features}``: projectors, distances, balance."""
        told = self.student.tell(seen, asked)
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

    def learns(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _balance(self, losses: Tensor, asked: Tensor, coins: Tensor) -> Tensor:
        kinds: dict[str, Balance] = {
            "uniform": balance.uniform,
            "fixed": partial(balance.fixed, shares=self.shares),
            "dropping": partial(balance.dropping, coins=coins),
        }
        return kinds[self.kind](losses, asked)


class Optimization:
    """Muon or AdamW with warm-up and cosine, clipping, and the averaged weights; everything a checkpoint must hold."""

    def __init__(self, learner: Learner, train: Train):
        self.train = train
        self.learner = learner
        self.learns = learner.learns()
        matrices = {name: p for name, p in self.learns.items() if p.ndim > 1}
        others = [{"params": group} for group in apart(p for name, p in self.learns.items() if name not in matrices)]
        # Muon takes matrices alone: a kernel (C', C, k, k) is moved as the matrix (C', C k k), in the same memory
        self.rows = {name: nn.Parameter(p.detach().view(len(p), -1)) for name, p in matrices.items()}
        adamw = partial(torch.optim.AdamW, betas=train.betas, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw(others, train.lr, weight_decay=0.0)] if others else []
        if train.optimizer == "muon":
            # steps of AdamW's own magnitude (arXiv 2502.16982), so that one learning rate serves both
            muon = torch.optim.Muon(
                self.rows.values(), train.lr, train.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append(muon)
        else:
            self.optimizers.append(adamw(self.rows.values(), train.lr, weight_decay=train.weight_decay))
        self.average = {name: p.detach().clone() for name, p in self.learns.items()} if train.ema else {}

    def step(self, number: int) -> Tensor:
        """Clip, move, average; returns the gradient norm before clipping."""
        norm = clip(self.learns.values(), self.train.clip)
        whole = replicated if self.train.optimizer == "muon" else nn.Identity()  # Muon turns whole matrices
        for name, row in self.rows.items():
            gradient = self.learns[name].grad
            row.grad = None if gradient is None else whole(gradient.flatten(1))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr(number)
            optimizer.step()
        for p in (*self.learns.values(), *self.rows.values()):
            p.grad = None
        for name, mean in self.average.items():
            # at first a short memory, else what was there at birth would stay for 1 / (1 - ema) steps
            decay = min(self.train.ema or 0.0, (1 + number) / (10 + number))
            mean.lerp_(self.learns[name].detach(), 1 - decay)
        return norm

    def lr(self, number: int) -> float:
        """Learning rate of step ``number`` (from 1): linear warm-up, then cosine to zero."""
        warmup = max(1, round(self.train.warmup * self.train.steps))
        if number <= warmup:
            return self.train.lr * number / warmup
        done = (number - warmup) / max(1, self.train.steps - warmup)
        return self.train.lr * 0.5 * (1 + math.cos(math.pi * done))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the learner holds the averaged weights, where they are kept."""
        own = {name: self.learns[name].detach().clone() for name in self.average}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(own)

    def keep_average(self) -> None:
        """The averaged weights become the student's, where they are kept: the run is over."""
        self._fill(self.average)

    def tensors(self) -> dict[str, Tensor]:
        """What learns, its moments, its average, and the frozen statistics, by name."""
        found: dict[str, Tensor] = {f"model.{name}": p for name, p in self.learns.items()}
        found |= {f"average.{name}": mean for name, mean in self.average.items()}
        found |= {f"statistics.{name}": b for name, b in self.learner.student.standardizers.named_buffers()}
        for name, (optimizer, p) in self._movers().items():
            found |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave.

        Raises:
            DataError: if a tensor is missing, left over, or of another shape.
        """
        for optimizer, p in self._movers().values():
            muon = isinstance(optimizer, torch.optim.Muon)
            moments = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq")
            optimizer.state[p] = {moment: torch.zeros_like(replicated(p) if muon else p) for moment in moments}
            optimizer.state[p] |= {} if muon else {"step": torch.zeros((), device=p.device)}
        ours = self.tensors()
        odd = sorted(set(ours) ^ set(tensors)) or [n for n, t in ours.items() if t.shape != tensors[n].shape]
        if odd:
            raise DataError(f"the checkpoint is of another model: it differs in {len(odd)} tensors, such as {odd[0]}")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(part_of(tensors[name], tensor))

    def _movers(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]:
        """{name of what learns: (its optimizer, the parameter that stands for it there)}."""
        whose = {id(p): one for one in self.optimizers for group in one.param_groups for p in group["params"]}
        stands = {name: self.rows.get(name, p) for name, p in self.learns.items()}
        return {name: (whose[id(p)], p) for name, p in stands.items()}

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.learns[name].copy_(value)


def _t2s(student: ShouldersModel, recipe: Recipe) -> TeacherToStudent | JointToStudent | None:
    how, d = recipe.transfer, student.encoder.width
    taps = {tap: Widths(spec["summary"], spec["spatial"]) for tap, spec in (student.config.taps or {}).items()}
    kinds: dict[str, Any] = {"none": lambda *_: None, "each": TeacherToStudent, "joint": JointToStudent}
    t2s = kinds[how.t2s](d, taps, how.projector_width or 2 * d)
    if t2s is not None and how.t2s_gradient == "student":
        t2s.requires_grad_(False)  # no gradient reaches it, and DDP must not wait for one
    return t2s
