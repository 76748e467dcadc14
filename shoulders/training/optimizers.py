"""Optimizers, learning rate schedule, clipping and averaged weights: everything of them that a checkpoint must hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from shoulders.config.recipe import Train
from shoulders.distributed.sharding import clip_grad_norm, replicate, shard_like, split_by_dtensor
from shoulders.errors import DataError
from shoulders.training.module import DistillationModule


class Optimizers:
    """Muon or AdamW with warm-up and cosine, clipping, and the averaged weights; everything a checkpoint must hold."""

    def __init__(self, learner: DistillationModule, train: Train):
        self.train = train
        self.learner = learner
        self.learns = learner.learns()
        matrices = {name: p for name, p in self.learns.items() if p.ndim > 1}
        others = [
            {"params": group}
            for group in split_by_dtensor(p for name, p in self.learns.items() if name not in matrices)
        ]
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
        norm = clip_grad_norm(self.learns.values(), self.train.clip)
        whole = replicate if self.train.optimizer == "muon" else nn.Identity()  # Muon turns whole matrices
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
            optimizer.state[p] = {moment: torch.zeros_like(replicate(p) if muon else p) for moment in moments}
            optimizer.state[p] |= {} if muon else {"step": torch.zeros((), device=p.device)}
        ours = self.tensors()
        odd = sorted(set(ours) ^ set(tensors)) or [n for n, t in ours.items() if t.shape != tensors[n].shape]
        if odd:
            raise DataError(f"the checkpoint is of another model: it differs in {len(odd)} tensors, such as {odd[0]}")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(shard_like(tensors[name], tensor))

    def _movers(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]:
        """{name of what learns: (its optimizer, the parameter that stands for it there)}."""
        whose = {id(p): one for one in self.optimizers for group in one.param_groups for p in group["params"]}
        stands = {name: self.rows.get(name, p) for name, p in self.learns.items()}
        return {name: (whose[id(p)], p) for name, p in stands.items()}

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.learns[name].copy_(value)
