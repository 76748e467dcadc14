"""Steps whose loss or gradient is not finite: they change no weight, they are counted, and too many end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shoulders.errors import NumericError

MAX_IN_A_ROW = 10  # steps


class SkippedSteps:
    """Counts the steps that `shoulders.training.optimizers.Optimizers.step` skipped.

    The values of a step stay on its device until `update` reads those of several steps at once. Every rank has the
    same ones: the norm of the gradients is taken after the ranks have averaged them.

    Args:
        log: prints one line.
        total: skipped steps of the run so far.
    """

    def __init__(self, log: Callable[[str], None], total: int = 0) -> None:
        self.log, self.total, self.in_a_row = log, total, 0
        self._steps: list[int] = []
        self._finite: list[Tensor] = []

    def add(self, step: int, grad_norm: Tensor) -> None:
        """Note a step and the norm of its gradients, a scalar."""
        self._steps.append(step)
        self._finite.append(grad_norm.isfinite())

    @property
    def is_due(self) -> bool:
        """Whether the steps since the last `update` could end the run."""
        return self.in_a_row + len(self._steps) >= MAX_IN_A_ROW

    def update(self) -> None:
        """Read the steps since the last call, and print a line if any was skipped."""
        finite = torch.stack(self._finite).tolist() if self._finite else []
        skipped = [step for step, ok in zip(self._steps, finite, strict=True) if not ok]
        for ok in finite:
            self.in_a_row = 0 if ok else self.in_a_row + 1
        self._steps, self._finite = [], []
        self.total += len(skipped)
        if skipped:
            listed = ", ".join(map(str, skipped))
            self.log(f"no update in step {listed}: the loss or a gradient is not finite ({self.total} steps so far)")

    @property
    def too_many(self) -> bool:
        """Whether so many steps in a row were skipped that the run has to end."""
        return self.in_a_row >= MAX_IN_A_ROW

    def error(self, checkpoint: Path) -> NumericError:
        """The error that ends the run, with the checkpoint of its last step."""
        return NumericError(
            f"the loss or a gradient was not finite in {self.in_a_row} steps in a row, which changed no weight; the "
            f"last good weights are in {checkpoint}: --resume continues with the images after these steps; if the run "
            "stops again, start in another out with a lower train.lr or train.precision=fp32"
        )
