"""Training of an encoder and a task's head together, from pixels to labels, and its evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shoulders.distributed.device import use_bf16
from shoulders.errors import NumericError
from shoulders.features import Batch, Features
from shoulders.optimizers import MuonAdamW, split_parameters, warmup_cosine
from shoulders.tasks.feature_bank import held_out_indices
from shoulders.tasks.task import FinetuneTask, Row, Size, rows_of
from shoulders.tasks.views import AugmentedViews

MAX_GRAD_NORM = 1.0
WARMUP_FRACTION = 0.05  # of the steps
SEARCH_FRACTION = 0.2  # of the steps, for each candidate


@dataclass(frozen=True)
class HParams:
    """An optimizer (``muon``: for the encoder's matrices, AdamW for all else) and its peak learning rate."""

    optimizer: Literal["adamw", "muon"]
    lr: float


@dataclass(frozen=True)
class FinetuneSchedule:
    """How long to train, and with which hyperparameters.

    Args:
        steps: of the training that is reported.
        batch: images per step.
        candidates: hyperparameters to select from, each trained for a fifth of the steps in addition; a single one is
            used as it is.
        weight_decay: of all weights but biases, scales and norms.
        scale: smallest and largest area of a view, as fractions of the image.
    """

    steps: int
    batch: int
    candidates: tuple[HParams, ...]
    weight_decay: float = 0.05
    scale: tuple[float, float] = (0.6, 1.0)


@dataclass(frozen=True)
class FinetuneModel:
    """An encoder and a head to be trained.

    Args:
        features_of: pixels (B, 3, h, w) in [0, 1] -> Features, on the device of the encoder.
        encoder: the module behind it; its parameters with gradients are trained.
        head: of a task.
    """

    features_of: Callable[[Tensor], Features]
    encoder: nn.Module
    head: nn.Module

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of encoder and head with gradients."""
        return [p for module in (self.encoder, self.head) for p in module.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        """The device of the encoder."""
        return next(self.encoder.parameters()).device


def build_optimizer(model: FinetuneModel, weight_decay: float, hparams: HParams) -> MuonAdamW:
    """AdamW, and with ``muon`` Muon for linear layers and convolutions of the encoder."""
    layers = [module for module in model.encoder.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    matrices = [p for p in (layer.get_parameter("weight") for layer in layers) if p.requires_grad]
    muon = matrices if hparams.optimizer == "muon" else []
    by_muon = set(map(id, muon))
    others = [p for p in model.trainable_parameters() if id(p) not in by_muon]
    return MuonAdamW(muon, *split_parameters(others), hparams.lr, weight_decay)


def train_end_to_end(
    model: FinetuneModel,
    views: AugmentedViews,
    schedule: FinetuneSchedule,
    steps: int,
    hparams: HParams,
    workers: int = 0,
) -> None:
    """Train an encoder and a head together, in place: linear warm-up, cosine to zero.

    The encoder computes in bfloat16 where the hardware has it, as in a distillation.

    Raises:
        NumericError: the gradients are no longer finite.
        DataError: images that cannot be read.
    """
    parameters, task, bf16 = model.trainable_parameters(), views.task, use_bf16("auto", model.device)
    optimizer, warmup = build_optimizer(model, schedule.weight_decay, hparams), max(1, round(WARMUP_FRACTION * steps))
    model.encoder.train()
    model.head.train()
    batches = views.batches(schedule.batch, steps, feature_grid(model, views.size), workers)
    for step, (pixels, targets) in enumerate(tqdm(batches, total=steps, unit=" steps", leave=False, disable=None)):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            features = model.features_of(pixels.to(model.device))
        loss = task.loss(model.head, features.map(Tensor.float), targets)
        loss.backward()
        if not nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).isfinite():
            raise NumericError(f"{task.task}: the gradients are no longer finite at step {step} with {hparams}")
        optimizer.step(hparams.lr * warmup_cosine(step + 1, steps, warmup, ends_at_zero=False))
    model.encoder.eval()
    model.head.eval()


def finetune(
    build: Callable[[], FinetuneModel],
    task: FinetuneTask,
    size: Size,
    schedule: FinetuneSchedule,
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    settings: dict[str, float | int | str] | None = None,
) -> tuple[list[Row], FinetuneModel]:
    """Select hyperparameters on val (or a fifth of train), train with all of train, evaluate on test.

    Args:
        build: the model in its initial state, the same each time.
        task: the task and its images.
        size: (h, w) of the encoder's input in px.
        schedule: steps and candidates.
        batch: images per batch of an evaluation.
        workers: threads that decode.
        seed: of the views and of their order.
        settings: more settings for the rows.

    Returns:
        Rows as of a probe, and the trained model.
    """
    started_at, splits = time.perf_counter(), task.splits
    search_steps = max(1, round(SEARCH_FRACTION * schedule.steps)) if len(schedule.candidates) > 1 else 0
    hparams = schedule.candidates[0]
    if search_steps:
        hparams = select_hparams(build, task, size, schedule, search_steps, batch, workers, seed)
    model, views = build(), AugmentedViews(task, splits.train, size, schedule.scale, seed)
    train_end_to_end(model, views, schedule, schedule.steps, hparams, workers)
    values, n = evaluate_model(task, model, splits.test, size, batch, workers)
    described: dict[str, float | int | str] = {
        "optimizer": hparams.optimizer,
        "lr": hparams.lr,
        "steps": schedule.steps,
        "batch": schedule.batch,
        "weight_decay": schedule.weight_decay,
        "seed": seed,
        "search_steps": search_steps,
        "candidates": ", ".join(f"{one.optimizer} {one.lr:g}" for one in schedule.candidates),
        "selected_on": "nothing" if not search_steps else "val" if splits.val is not None else "a fifth of train",
        "split": splits.how,
        "train": len(splits.train.indices),
        "skipped": len(views.skipped),
        **(settings or {}),
    }
    if n < len(splits.test.indices):
        described |= {"skipped_test": len(splits.test.indices) - n, "skipped_reasons": "images that cannot be read"}
    return rows_of(task.task, values, n, time.perf_counter() - started_at, described), model


def select_hparams(
    build: Callable[[], FinetuneModel],
    task: FinetuneTask,
    size: Size,
    schedule: FinetuneSchedule,
    steps: int,
    batch: int,
    workers: int,
    seed: int,
) -> HParams:
    """The candidate with the best value after ``steps``; one whose training diverges is left out.

    Raises:
        NumericError: the training of every candidate diverges.
    """
    fit_on, select_on = _search_splits(task.splits)
    values: dict[HParams, float] = {}
    diverged: NumericError | None = None
    for candidate in schedule.candidates:
        model, views = build(), AugmentedViews(task, fit_on, size, schedule.scale, seed)
        try:
            train_end_to_end(model, views, schedule, steps, candidate, workers)
        except NumericError as error:  # its learning rate is too high; the others may not be
            diverged = error
            continue
        values[candidate] = evaluate_model(task, model, select_on, size, batch, workers)[0].get(task.metric, 0.0)
    if diverged and not values:
        raise diverged
    return max(values, key=values.__getitem__)


def feature_grid(model: FinetuneModel, size: Size) -> tuple[int, int]:
    """The grid of the features at an input size; (0, 0) where they have no spatial component."""
    with torch.no_grad():
        return model.features_of(torch.zeros(1, 3, *size, device=model.device)).grid


def evaluate_model(
    task: FinetuneTask, model: FinetuneModel, split: Any, size: Size, batch: int, workers: int
) -> tuple[dict[str, float], int]:
    """Values by metric on a split, and the number of images."""

    def features_of(images: Batch) -> Features:
        with torch.no_grad():
            return model.features_of(images.to(model.device).pixels(size))

    return task.evaluate(model.head, features_of, split, size, batch, workers)


def _search_splits(splits: Any) -> tuple[Any, Any]:
    """Images to fit on and to select on."""
    if splits.val is not None:
        return splits.train, splits.val
    fit, select = held_out_indices(splits.train.images.ids[splits.train.indices])
    return splits.train.take(fit), splits.train.take(select)
