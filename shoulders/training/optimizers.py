"""The optimizer of a distillation: clipping, schedule, averaged weights, and all of its state by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shoulders.config.sections import Train
from shoulders.distributed.sharding import clip_grad_norm, replicate, shard_like
from shoulders.errors import DataError
from shoulders.optimizers import MuonAdamW, ema_update, split_parameters, warmup_cosine
from shoulders.training.module import DistillationModule


class Optimizers:
    """Muon or AdamW with warm-up and cosine, clipping, and averaged weights; everything that a checkpoint must hold."""

    def __init__(self, module: DistillationModule, train: Train):
        self.train = train
        self.module = module
        self.parameters = module.trainable_parameters()
        matrices, others = split_parameters(self.parameters.values())
        muon, decayed = (matrices, []) if train.optimizer == "muon" else ([], matrices)
        self.optimizer = MuonAdamW(muon, decayed, others, train.lr, train.weight_decay, train.betas)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if train.ema else {}

    def step(self, number: int) -> Tensor:
        """Clip the gradients, update the parameters and their averages; returns the gradient norm before clipping.

        Where that norm is not finite, on any rank and so on all, parameters, averages and the state of the optimizer
        stay as they are.
        """
        norm = clip_grad_norm(self.parameters.values(), self.train.clip)
        finite: Tensor | None = norm.isfinite()
        if norm.device.type == "cpu":  # which knows the value at once; a GPU would have to be waited for
            if not finite:
                self.optimizer.clear_gradients()
                return norm
            finite = None
        self.optimizer.step(self.lr(number), finite)
        # the first averages are short, else the initial weights would remain for 1 / (1 - ema) steps
        decay = min(self.train.ema or 0.0, (1 + number) / (10 + number))
        ema_update(self.ema.values(), [self.parameters[name] for name in self.ema], decay, finite)
        return norm

    def lr(self, number: int) -> float:
        """Learning rate of step ``number`` (from 1): linear warm-up, then cosine to zero."""
        warmup = max(1, round(self.train.warmup * self.train.steps))
        return warmup_cosine(number, self.train.steps, warmup, self.train.lr)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within this context the module holds the averaged weights, where they are kept."""
        current = {name: self.parameters[name].detach().clone() for name in self.ema}
        self._copy(self.ema)
        try:
            yield
        finally:
            self._copy(current)

    def load_ema(self) -> None:
        """Replace the weights by their averages, where they are kept: the run is over."""
        self._copy(self.ema)

    def tensors(self) -> dict[str, Tensor]:
        """The trainable parameters, their averages, the standardizers' statistics and the optimizer's state."""
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": average for name, average in self.ema.items()}
        tensors |= {f"statistics.{name}": b for name, b in self.module.student.standardizers.named_buffers()}
        owners = self.optimizer.owners()
        for name, p in self.parameters.items():
            optimizer, held = owners[p]
            state = optimizer.state[held] or _empty_state(optimizer, held)  # of a run without a first update
            tensors |= {f"{key}.{name}": value for key, value in state.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what :meth:`tensors` returned.

        Raises:
            DataError: if a tensor is missing, left over, or of another shape.
        """
        for optimizer, held in self.optimizer.owners().values():
            optimizer.state[held] = _empty_state(optimizer, held)
        ours = self.tensors()
        odd = sorted(set(ours) ^ set(tensors)) or [n for n, t in ours.items() if t.shape != tensors[n].shape]
        if odd:
            raise DataError(f"the checkpoint is of another model: it differs in {len(odd)} tensors, such as {odd[0]}")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(shard_like(tensors[name], tensor))

    def _copy(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)


def _empty_state(optimizer: torch.optim.Optimizer, held: nn.Parameter) -> dict[str, Tensor]:
    """The state that an optimizer keeps of a tensor, all zeros."""
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(replicate(held))}
    step = {"step": torch.zeros((), device=held.device)}
    return {moment: torch.zeros_like(held) for moment in ("exp_avg", "exp_avg_sq")} | step
