"""What all training shares: the learning rate schedule, Muon beside AdamW, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shoulders.distributed.sharding import replicate, split_by_dtensor


def warmup_cosine(step: int, steps: int, warmup: int, peak: float = 1.0, ends_at_zero: bool = True) -> float:
    """The learning rate of a step: linear warm-up to ``peak``, then half a cosine down to zero.

    Args:
        step: from 1 to ``steps``.
        warmup: steps of the warm-up, at least 1.
        ends_at_zero: whether the last step has rate 0; else the step after it would have it.
    """
    if step <= warmup:
        return peak * step / warmup
    elapsed = step - warmup - (0 if ends_at_zero else 1)
    return peak * 0.5 * (1 + math.cos(math.pi * elapsed / max(1, steps - warmup)))


def split_parameters(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with two or more dimensions (matrices, kernels), and the others (biases, scales)."""
    all_parameters = list(parameters)
    return [p for p in all_parameters if p.ndim > 1], [p for p in all_parameters if p.ndim <= 1]


class AdamW(torch.optim.AdamW):
    """AdamW with steps that may have to change nothing."""

    found_inf: Tensor | None = None

    def step_where(self, finite: Tensor) -> None:
        """A step that changes nothing if ``finite``, a scalar bool, is false; the host does not wait for its value."""
        self.found_inf = (~finite).float()  # torch's fused kernel reads it, as it does for `torch.amp.GradScaler`
        self.step()
        self.found_inf = None


class Muon(torch.optim.Muon):
    """Muon with steps that may have to change nothing."""

    @torch.no_grad()
    def step_where(self, finite: Tensor) -> None:
        """As `AdamW.step_where`."""
        matrices = [matrix for group in self.param_groups for matrix in group["params"] if matrix.grad is not None]
        before = [matrix.detach().clone() for matrix in matrices]
        for matrix in matrices:  # a gradient that equals the momentum leaves the momentum as it is
            matrix.grad = torch.where(finite, matrix.grad, self.state[matrix].get("momentum_buffer", 0.0))
        self.step()
        for matrix, old in zip(matrices, before, strict=True):
            matrix.copy_(torch.where(finite, matrix, old))


class MuonAdamW:
    """Muon for some parameters and AdamW for all others, with one learning rate.

    Muon's steps are scaled to AdamW's own magnitude (arXiv 2502.16982), so that one rate serves both. It takes matrices
    alone: a kernel (C', C, k, k) is updated as the matrix (C', C k k) in the same memory.

    Args:
        muon: parameters of two or more dimensions, updated by Muon with weight decay; may be empty.
        decayed: updated by AdamW with weight decay.
        undecayed: updated by AdamW without weight decay.
        betas: of AdamW.
    """

    def __init__(
        self,
        muon: Sequence[nn.Parameter],
        decayed: Sequence[nn.Parameter],
        undecayed: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.parameters = [*muon, *decayed, *undecayed]
        self.matrices = {p: nn.Parameter(p.detach().view(len(p), -1)) for p in muon}
        # torch updates no list that holds both sharded and whole tensors
        groups: list[dict[str, Any]] = [{"params": group} for group in split_by_dtensor(decayed)]
        groups += [{"params": group, "weight_decay": 0.0} for group in split_by_dtensor(undecayed)]
        self.optimizers: list[AdamW | Muon] = []
        if groups:
            self.optimizers.append(AdamW(groups, lr, betas, weight_decay=weight_decay, fused=True))
        if muon:
            matrices = list(self.matrices.values())
            self.optimizers.append(Muon(matrices, lr, weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"))

    def step(self, lr: float, finite: Tensor | None = None) -> None:
        """Update every parameter by its gradient at this learning rate, and clear the gradients.

        Args:
            lr: the learning rate.
            finite: scalar bool; where it is false no parameter and no state of an optimizer changes. The host does not
                wait for its value. None: true.
        """
        for p, matrix in self.matrices.items():
            matrix.grad = None if p.grad is None else replicate(p.grad.flatten(1))  # Muon needs whole matrices
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite is None:
                optimizer.step()
            else:
                optimizer.step_where(finite)
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget the gradients of all parameters."""
        for p in (*self.parameters, *self.matrices.values()):
            p.grad = None

    def owners(self) -> dict[nn.Parameter, tuple[torch.optim.Optimizer, nn.Parameter]]:
        """Each parameter's optimizer, and the tensor under which that optimizer holds its state."""
        by_tensor = {p: one for one in self.optimizers for group in one.param_groups for p in group["params"]}
        held = {p: self.matrices.get(p, p) for p in self.parameters}
        return {p: (by_tensor[tensor], tensor) for p, tensor in held.items()}


def ema_update(
    averages: Iterable[Tensor], values: Iterable[Tensor], decay: float, finite: Tensor | None = None
) -> None:
    """Move each average towards its value, in place: decay x average + (1 - decay) x value.

    Args:
        averages: updated.
        values: of the same shapes.
        decay: between 0 and 1.
        finite: scalar bool; where it is false no average changes. None: true.
    """
    update = get_ema_multi_avg_fn(decay)
    pairs = [(average, value.detach()) for average, value in zip(averages, values, strict=True)]
    if finite is not None:
        pairs = [(average, torch.where(finite, value, average)) for average, value in pairs]
    for sharded in (False, True):  # torch updates no list that holds both sharded and whole tensors
        alike = [pair for pair in pairs if isinstance(pair[0], DTensor) == sharded]
        if alike:
            update([average for average, _ in alike], [value for _, value in alike], 0)
