"""Probes on spatial features: how every head is fitted, how hyperparameters are selected, and how it is evaluated."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from shoulders.errors import NumericError
from shoulders.features import FeaturesOf
from shoulders.optimizers import ema_update, warmup_cosine
from shoulders.tasks.data.splits import AnnotatedSplit, AnnotatedSplits
from shoulders.tasks.feature_bank import FeatureBank, hold_out, minibatches
from shoulders.tasks.skipped import skipped_settings
from shoulders.tasks.task import Row, Size, rows_of


@dataclass(frozen=True)
class ProbeSettings:
    """How a head is fitted, by AdamW.

    Args:
        lrs: peak learning rates to select from.
        weight_decay: of all weights.
        schedule: a name in `SCHEDULES`.
        warmup_steps: of a schedule with a warm-up.
        batch: images per step.
        epochs: of the fit, within ``min_steps`` and ``max_steps``.
        max_grad_norm: the gradient is clipped to it; None: not clipped.
        ema: decay of the averaged weights, which are the result; None: no average.
        num_evals: how often a fit is evaluated on val, evenly over its steps; the best of these states is kept.
        select: whether anything is selected on val; else it is not used, and all of train is fitted on.
        check_loss: whether to stop at a loss that is not finite.
    """

    lrs: tuple[float, ...]
    weight_decay: float
    schedule: str
    warmup_steps: int = 0
    batch: int = 16
    epochs: int = 20
    min_steps: int = 400
    max_steps: int = 20_000
    max_grad_norm: float | None = None
    ema: float | None = None
    num_evals: int = 1
    select: bool = True
    check_loss: bool = False

    def steps(self, images: int, fraction: float = 1.0) -> int:
        """Steps of a fit on so many images, or a fraction of them."""
        return max(1, round(fraction * min(max(self.min_steps, self.epochs * images // self.batch), self.max_steps)))


# of heads that are too slow to select anything
LARGER_PROBE_SETTINGS = ProbeSettings(
    lrs=(5e-4,),
    weight_decay=0.01,
    schedule="warmup_cosine",
    warmup_steps=50,
    epochs=40,
    min_steps=1000,
    max_grad_norm=1.0,
    select=False,
    check_loss=True,
)


@dataclass(frozen=True)
class SpatialProbe:
    """A head on spatial features, and all that is needed to fit and evaluate it.

    Args:
        task: whose probe it is.
        name: of the head, in rows.
        metric: of those of ``evaluate``, the one to select by.
        build: (C, K) -> a fresh head.
        targets: (features, K) -> the target of each image, by index.
        loss: (head, maps (B, C, H, W), B targets) -> a scalar.
        evaluate: (head, features, K class names) -> values by metric.
        settings: of the fit.
    """

    task: str
    name: str
    metric: str
    build: Callable[..., nn.Module]
    targets: Callable[[FeatureBank[Any], int], Any]
    loss: Callable[[Any, Tensor, Sequence[Any]], Tensor]
    evaluate: Callable[[Any, FeatureBank[Any], tuple[str, ...]], dict[str, float]]
    settings: ProbeSettings


@dataclass(frozen=True)
class ProbeFit:
    """A fitted head, its learning rate and steps, and its value on the images to select on (nan: not evaluated)."""

    head: Any
    lr: float
    steps: int
    value: float = math.nan


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int, int], LRScheduler]] = {
    "cosine": lambda optimizer, steps, warmup: CosineAnnealingLR(optimizer, steps),
    # the rate stays constant after the warm-up, so that a fit that stops early is the beginning of a longer one
    "constant": lambda optimizer, steps, warmup: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup)),
    "warmup_cosine": lambda optimizer, steps, warmup: LambdaLR(
        optimizer, lambda step: warmup_cosine(step + 1, steps, warmup, ends_at_zero=False)
    ),
}


def fit_probe(
    probe: SpatialProbe,
    features_of: FeaturesOf,
    splits: AnnotatedSplits[Any],
    sizes: Sequence[Size],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    step_fraction: float = 1.0,
) -> list[Row]:
    """Fit a probe on train, select on val (or a fifth of train), evaluate on test.

    Args:
        features_of: Features of a batch, on whichever device it computes.
        splits: the labelled images.
        sizes: (h, w) in px of the inputs that ``features_of`` needs.
        batch: images per batch while features are computed.
        workers: threads that decode.
        seed: of the head's initial weights and of the order of images.
        on_head: called with the fitted head.
        step_fraction: of the usual number of steps.
    """
    started_at = time.perf_counter()
    banks = _compute_banks(features_of, splits, sizes, batch, workers, probe.settings.select)
    computed_at = time.perf_counter()
    fit = _fit_and_select(probe, banks, splits.classes, seed, step_fraction)
    on_head(fit.head)
    values = probe.evaluate(fit.head, banks.test, splits.classes)
    settings: dict[str, float | int | str] = {
        "head": probe.name,
        "lr": fit.lr,
        "steps": fit.steps,
        "batch": probe.settings.batch,
        "weight_decay": probe.settings.weight_decay,
        "seed": seed,
        "split": splits.how,
        "selected_on": banks.selected_on,
        "train": len(banks.train),
        "skipped": sum(len(bank.skipped) for bank in (banks.train, banks.val, banks.test) if bank is not None),
        "features_seconds": computed_at - started_at,
        **skipped_settings(banks.test.skipped),
    }
    if not probe.settings.select:
        settings["parameters"] = sum(parameter.numel() for parameter in fit.head.parameters())
    return rows_of(probe.task, values, len(banks.test), time.perf_counter() - computed_at, settings)


@dataclass(frozen=True)
class _Banks:
    """The features of all splits; those to fit on and to select on (None: nothing is selected)."""

    train: FeatureBank[Any]
    val: FeatureBank[Any] | None
    test: FeatureBank[Any]
    fit_on: FeatureBank[Any]
    select_on: FeatureBank[Any] | None
    selected_on: str


def _compute_banks(
    features_of: FeaturesOf, splits: AnnotatedSplits[Any], sizes: Sequence[Size], batch: int, workers: int, select: bool
) -> _Banks:
    def compute(split: AnnotatedSplit[Any]) -> FeatureBank[Any]:
        return FeatureBank(features_of, split, sizes, batch, workers)

    train, test = compute(splits.train), compute(splits.test)
    if not select:
        return _Banks(train, None, test, train, None, "nothing: the settings are fixed")
    if splits.val is not None:
        val = compute(splits.val)
        return _Banks(train, val, test, train, val, "val")
    return _Banks(train, None, test, *hold_out(train), "a fifth of train")


def _fit_and_select(
    probe: SpatialProbe, banks: _Banks, classes: tuple[str, ...], seed: int, step_fraction: float
) -> ProbeFit:
    """The fit with the highest value on the images to select on; fitted again if these were held out of train."""
    settings, select_on, n_classes = probe.settings, banks.select_on, len(classes)

    def score(head: nn.Module) -> float:
        return probe.evaluate(head, select_on, classes).get(probe.metric, 0.0)  # type: ignore[arg-type]

    steps, targets = settings.steps(len(banks.fit_on), step_fraction), probe.targets(banks.fit_on, n_classes)
    fits = [
        fit_head(probe, banks.fit_on, targets, n_classes, lr, steps, seed, None if select_on is None else score)
        for lr in settings.lrs
    ]
    best = max(fits, key=lambda fit: fit.value)
    if select_on is None or banks.val is not None:
        return best
    steps = best.steps if settings.num_evals > 1 else settings.steps(len(banks.train), step_fraction)
    return fit_head(probe, banks.train, probe.targets(banks.train, n_classes), n_classes, best.lr, steps, seed)


def fit_head(
    probe: SpatialProbe,
    bank: FeatureBank[Any],
    targets: Sequence[Any] | Tensor,
    n_classes: int,
    lr: float,
    steps: int,
    seed: int,
    score: Callable[[nn.Module], float] | None = None,
    on_step: Callable[[float], object] | None = None,
) -> ProbeFit:
    """Fit a head on stored features.

    Args:
        bank: the features.
        targets: of each image.
        lr: peak learning rate.
        steps: minibatches.
        seed: of initial weights, of the order of images, and of all that a loss draws.
        score: the value of a head; the best of ``settings.num_evals`` states is returned. None: the last state is.
        on_step: called with the loss of each step.

    Raises:
        NumericError: the loss is no longer finite, where that is checked.
    """
    num_evals, ema, best = probe.settings.num_evals, probe.settings.ema, None
    eval_steps = [round(steps * (number + 1) / num_evals) for number in range(num_evals)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = probe.build(bank.width, n_classes).to(bank.device)
        result = head if ema is None else copy.deepcopy(head)
        for step, loss in enumerate(_train_steps(probe, head.train(), bank, targets, lr, steps, seed), start=1):
            if ema is not None:
                _move_average(result, head, min(ema, step / (step + 10)))
            if on_step is not None:
                on_step(loss.item())
            if score is not None and step in eval_steps:
                value = score(result.eval())
                if best is None or value >= best.value:  # of equal values, the longer fit
                    best = ProbeFit(copy.deepcopy(result), lr, step, value)
                head.train()
    return best or ProbeFit(result.eval(), lr, steps)


def _train_steps(
    probe: SpatialProbe,
    head: nn.Module,
    bank: FeatureBank[Any],
    targets: Sequence[Any] | Tensor,
    lr: float,
    steps: int,
    seed: int,
) -> Iterator[Tensor]:
    """Update a head for each minibatch; the loss of each."""
    settings = probe.settings
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=settings.weight_decay)
    schedule = SCHEDULES[settings.schedule](optimizer, steps, settings.warmup_steps)
    for indices in minibatches(len(bank), settings.batch, steps, torch.Generator().manual_seed(seed)):
        loss = probe.loss(head, bank.maps(indices), [targets[index] for index in indices])
        if settings.check_loss and not loss.isfinite():
            raise NumericError(f"the loss of {type(head).__name__} is no longer finite; check the features")
        optimizer.zero_grad()
        loss.backward()
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(head.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        yield loss.detach()


@torch.no_grad()
def _move_average(average: nn.Module, head: nn.Module, decay: float) -> None:
    """Move averaged weights towards those of the head; buffers are copied."""
    ema_update(average.parameters(), head.parameters(), decay)
    for ours, theirs in zip(average.buffers(), head.buffers(), strict=True):
        ours.copy_(theirs)
