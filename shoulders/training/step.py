"""One training step: teacher features, forward, backward and optimizer update of one batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shoulders.distributed.context import DistContext
from shoulders.distributed.sharding import sync_gradients
from shoulders.features import Batch, Features, in_order
from shoulders.teachers import AnyTeachers
from shoulders.training.masked import Masked, masked_images
from shoulders.training.module import DistillationModule, as_float
from shoulders.training.optimizers import Optimizers
from shoulders.transfer.losses import BASE, Terms

BASE_FORWARD, UPDATE = "base forward", "update"  # names of sections

Section = Callable[[str], AbstractContextManager[object]]


def no_section(name: str) -> AbstractContextManager[object]:
    """A section that is not timed."""
    return nullcontext()


class StepOutput(NamedTuple):
    """The results of a step, on its device."""

    loss: Tensor  # scalar, the mean over micro-batches
    terms: Terms  # {name: scalar}; nan for a term without images
    grad_norm: Tensor  # scalar, before clipping; not finite if the step was skipped
    masked: list[Masked]  # the images that a teacher is left out for


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """One update of the trainable parameters from one batch.

    The host waits for the device once per micro-batch, between the teachers and the student, and only if teachers run:
    which of their features are finite decides the shapes of what follows.

    A step holds no state of its own: ``dataclasses.replace`` makes another one, such as one with more micro-batches, of
    the same parameters and optimizers.

    Args:
        module: student and t2s projectors.
        wrapped: the same as `shoulders.distributed.sharding.wrap_model` returns it.
        teachers: live or cached; their precision is that of the step.
        optimizers: of the module's parameters.
        dist: rank and device of this process.
        size: (h, w) of the student's input in px.
        seed: of teacher dropping.
        accumulate: micro-batches of a step.
        compile: whether to compile the forward pass.
        section: a context manager for the named sections ``BASE_FORWARD`` and ``UPDATE``, for a stop watch.
    """

    module: DistillationModule
    wrapped: nn.Module
    teachers: AnyTeachers
    optimizers: Optimizers
    dist: DistContext
    size: tuple[int, int]
    seed: int
    accumulate: int = 1
    compile: bool = False
    section: Section = no_section
    forward: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", self._compiled() if self.compile else self.wrapped)

    def __call__(self, number: int, batch: Batch) -> StepOutput:
        """Step ``number`` (from 1) with this rank's part of the batch."""
        loss, terms, masked = self.backward(number, batch)
        with self.section(UPDATE):
            grad_norm = self.optimizers.step(number)
        return StepOutput(loss, terms, grad_norm, masked)

    def backward(self, number: int, batch: Batch) -> tuple[Tensor, Terms, list[Masked]]:
        """The loss of a batch, its terms and masked images, with the gradients added to the parameters."""
        self.module.train()
        micro_batches = batch.to(self.dist.device).split(len(batch) // self.accumulate)
        uniforms = self.drop_uniforms(number, len(batch)).chunk(len(micro_batches))
        losses, all_terms, masked = [], [], []
        for i, (micro_batch, uniform) in enumerate(zip(micro_batches, uniforms, strict=True)):
            teacher_features = self.teacher_features(micro_batch)
            with self.autocast(), sync_gradients(self.wrapped, i == len(micro_batches) - 1):
                loss, terms = self.forward(micro_batch.pixels(self.size), teacher_features, uniform)
                # the gradients of a loss that is not finite are not finite on any rank, even those of a constant
                (loss / len(micro_batches)).backward(loss.detach() * 0 + 1)
            losses.append(loss.detach())
            all_terms.append(terms)
            masked += masked_images(teacher_features, micro_batch, self.teachers.sources)
        means = {name: torch.stack([terms[name] for terms in all_terms]).nanmean() for name in all_terms[0]}
        return torch.stack(losses).mean(), means, masked

    def teacher_features(self, batch: Batch) -> dict[str, Features]:
        """{tap: Features} of the teachers, and of the base where it is preserved or read by the adapter."""
        features = self.teachers(batch)
        student = self.module.student
        missing = [layer for layer in student.base_layers if f"{BASE}/{layer}" not in features]
        if missing:
            with self.section(BASE_FORWARD), self.autocast():
                base_features = student.encoder.base_features(batch.pixels(self.size), missing)
            features |= {f"{BASE}/{layer}": as_float(one) for layer, one in base_features.items()}
        return {tap: one.map(in_order) for tap, one in features.items()}

    def drop_uniforms(self, number: int, images: int) -> Tensor:
        """(images, T) uniform numbers in [0, 1) for this rank's images, a pure function of seed and step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        uniforms = torch.rand(images * self.dist.world_size, len(self.module.weights), generator=generator)
        return uniforms.chunk(self.dist.world_size)[self.dist.rank].to(self.dist.device)

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.dist.device.type, torch.bfloat16, enabled=self.teachers.bf16)

    def _compiled(self) -> Callable[..., Any]:
        if self.teachers.sources:
            # the number of a teacher's images changes from step to step, and all that they pass would be compiled again
            return partial(self.wrapped, forward_features=torch.compile(self.module.student.forward_features))
        return torch.compile(self.wrapped)
