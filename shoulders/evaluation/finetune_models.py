"""Models to be trained with labels: a student or its base by the adapter only, or their architecture from scratch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shoulders.features import Features
from shoulders.inference import adapted_encoder, random_encoder
from shoulders.model import ShouldersConfig, ShouldersModel
from shoulders.student.encoder import Encoder
from shoulders.tasks import FinetuneTask
from shoulders.tasks.finetune import FinetuneModel, FinetuneSchedule, HParams


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter and a probe are finetuned together.

    Args:
        batch: images per step.
        epochs: of the training, within ``min_steps`` and ``max_steps``.
        candidates: hyperparameters to select from, where there is a val.
    """

    batch: int = 32
    epochs: int = 10
    min_steps: int = 300
    max_steps: int = 5000
    candidates: tuple[HParams, ...] = (HParams("adamw", 3e-4), HParams("adamw", 1e-3))

    def schedule(self, images: int, has_val: bool) -> FinetuneSchedule:
        """The schedule for so many training images.

        Without a val there is nothing to select on: the probe that the training starts from was fitted on all of train.
        """
        steps = min(max(self.min_steps, self.epochs * images // self.batch), self.max_steps)
        return FinetuneSchedule(steps, self.batch, self.candidates if has_val else self.candidates[:1])


def adapter_model(student: ShouldersModel, name: str, head: nn.Module) -> FinetuneModel:
    """The student or its base (``name``) with a probe that was fitted on it; the probe and the adapter are trained."""
    encoder = adapted_encoder(student, name)
    return FinetuneModel(partial(_latent, encoder), encoder, copy.deepcopy(head).to(student.device).train())


def init_from_scratch(config: ShouldersConfig, task: FinetuneTask, seed: int, device: torch.device) -> FinetuneModel:
    """The architecture of a student's encoder and a head, both with random weights; everything is trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = random_encoder(config)
        head = task.build_head(encoder.width)
    encoder.base.requires_grad_(True)
    encoder.to(device)
    return FinetuneModel(partial(_latent_through_base, encoder), encoder, head.to(device))


def _latent(encoder: Encoder, pixels: Tensor) -> Features:
    return encoder(pixels)["latent"]


def _latent_through_base(encoder: Encoder, pixels: Tensor) -> Features:
    """The latent, with gradients into the base even where the adapter is beside it."""
    return encoder.adapt(encoder.run_base(pixels, ("latent", *encoder.adapter.input_layers)), pixels)["latent"]
