"""Who learns from labels: a run's student or its base by the adapter alone, or their architecture from nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModel

from shoulders.features import Features
from shoulders.model import ShouldersConfig, ShouldersModel
from shoulders.student.encoder import Encoder
from shoulders.student.families import BASES
from shoulders.tasks import FinetuneTask
from shoulders.tasks.finetune import FinetuneModel, HParams, Plan

BATCH = 32
TRIES = (HParams("adamw", 3e-4), HParams("adamw", 1e-3))
EPOCHS = 10
FEWEST_STEPS, MOST_STEPS = 300, 5000


def tuned(student: ShouldersModel, name: str, head: nn.Module) -> FinetuneModel:
    """The student or its base with a probe that was fitted on it; the probe and the adapter learn."""
    encoder = adapted(student, name)
    return FinetuneModel(partial(_latent, encoder), encoder, copy.deepcopy(head).to(student.device).train())


def tuning_plan(images: int, val: bool) -> Plan:
    """How long the adapter and the head learn from so many images; what is tried, where there is a val to choose on.

    Without one there is nothing to choose on: the probe that it starts from was fitted on all of train.
    """
    steps = min(max(FEWEST_STEPS, EPOCHS * images // BATCH), MOST_STEPS)
    return Plan(steps, BATCH, TRIES if val else TRIES[:1])


def adapted(student: ShouldersModel, name: str, weights: Mapping[str, Tensor] | None = None) -> Encoder:
    """An encoder of its own whose adapter alone learns: the student's, or for ``base`` one that is zero at birth.

    Args:
        weights: of the adapter, in place of those.
    """
    encoder = copy.deepcopy(student.encoder)
    if name == "base":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder.adapter.load_state_dict(fresh_encoder(student.config).adapter.state_dict())
    if weights is not None:
        encoder.adapter.load_state_dict(dict(weights))
    encoder.adapter.requires_grad_(True)
    return encoder


def init_from_scratch(config: ShouldersConfig, goal: FinetuneTask, seed: int, device: torch.device) -> FinetuneModel:
    """The architecture of a student's encoder and a head at birth; everything learns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = fresh_encoder(config)
        head = goal.head(encoder.width)
    encoder.base.requires_grad_(True)
    encoder.to(device)
    return FinetuneModel(partial(_whole, encoder), encoder, head.to(device))


def fresh_encoder(config: ShouldersConfig) -> Encoder:
    """The base of a student's config with random weights, and a fresh adapter."""
    base = config.base_config()
    built = AutoModel.from_config(base, **BASES[base.model_type].build)
    return Encoder(built, dict(config.adapter or {}), config.mean, config.std)


def _latent(encoder: Encoder, pixels: Tensor) -> Features:
    return encoder(pixels)["latent"]


def _whole(encoder: Encoder, pixels: Tensor) -> Features:
    """The latent, with a way back into the base even where the adapter stands beside it."""
    return encoder.adapt(encoder.run_base(pixels, ("latent", *encoder.adapter.input_layers)), pixels)["latent"]
