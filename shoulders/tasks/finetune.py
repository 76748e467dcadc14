"""An encoder and the head of a task, trained together from pixels to labels, and scored as frozen features are.

Views are pure functions of (seed, image, step) and minibatches of (seed, step): the same settings give the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shoulders.distributed.device import use_bf16
from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features, Skipped
from shoulders.images import View, min_decode_side, random_view, render
from shoulders.tasks.feature_bank import WHOLE, held_out, minibatches
from shoulders.tasks.goals import FinetuneTask
from shoulders.tasks.rows import Row

KEEP_BYTES = 2 * 2**30  # of decoded images that are kept
CLIP = 1.0  # gradient norm
WARM_UP = 0.05  # of the steps
CHOOSING = 0.2  # of the steps, for each learning rate that is tried


@dataclass(frozen=True)
class HParams:
    """An optimizer (``adamw``; ``muon``: of the encoder's matrices, AdamW of all else) and its learning rate."""

    optimizer: Literal["adamw", "muon"]
    rate: float


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    Args:
        steps: of the training that is reported.
        batch: images a step.
        tries: kinds of optimizer and learning rates, each for a fifth of the steps on top of them; one alone is taken
            as it is.
        weight_decay: of all that is not a bias, a scale or a norm.
        scale: least and most area of a view, as fractions of the image.
    """

    steps: int
    batch: int
    tries: tuple[HParams, ...]
    weight_decay: float = 0.05
    scale: tuple[float, float] = (0.6, 1.0)


@dataclass(frozen=True)
class FinetuneModel:
    """An encoder and a head that learn.

    Args:
        see: pixels (B, 3, h, w) in [0, 1] -> Features, on the device of the encoder.
        encoder: the module behind it: what of it has a gradient learns.
        head: of a goal.
    """

    see: Callable[[Tensor], Features]
    encoder: nn.Module
    head: nn.Module

    def learns(self) -> list[nn.Parameter]:
        """What an optimizer moves."""
        return [p for part in (self.encoder, self.head) for p in part.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.encoder.parameters()).device


class Views:
    """Augmented views of the images of a split, and their targets.

    Args:
        goal: reads images and tells targets.
        split: of that goal.
        size: (h, w) of the views in px.
        scale: see `Plan`.
        seed: of the views and of their order.

    Attributes:
        unread: images that could not be read, by row, as far as they were asked for.
    """

    def __init__(
        self, goal: FinetuneTask, split: Any, size: tuple[int, int], scale: tuple[float, float], seed: int
    ) -> None:
        self.goal, self.split, self.size, self.scale, self.seed = goal, split, size, scale, seed
        self.unread: dict[int, Skipped] = {}
        at_least = min_decode_side([size], scale)
        many = max(1, KEEP_BYTES // (3 * (2 * at_least) ** 2))
        self.read = lru_cache(maxsize=many)(partial(_decoded, goal, split, at_least=at_least))

    def draw(self, row: int, step: int, grid: tuple[int, int]) -> tuple[Tensor, Any] | None:
        """The view (3, h, w) uint8 of an image at a step and its target; None where it cannot be read."""
        read = self.read(row)
        if isinstance(read, Skipped):
            self.unread[row] = read
            return None
        pixels, full_size = read
        identity = int(self.split.images.ids[self.split.indices[row]])
        shape = self.size if self.goal.whole else full_size
        view = _on_pixels(random_view(self.seed, identity, step, self.scale, True, shape), full_size)
        return render(pixels, view, self.size), self.goal.target(self.split, row, view, grid)

    def batches(
        self, batch: int, steps: int, grid: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, list[Any]]]:
        """Pixels (B, 3, h, w) in [0, 1] and B targets for each step.

        Raises:
            DataError: none of the images of a step can be read.
        """
        order = minibatches(len(self.split.indices), batch, steps, torch.Generator().manual_seed(self.seed))
        with ThreadPoolExecutor(workers) if workers else nullcontext() as pool:
            for step, rows in enumerate(order):
                few = list((pool.map if pool else map)(partial(self.draw, step=step, grid=grid), rows))
                drawn = [pair for pair in few if pair is not None]
                if not drawn:
                    first = self.unread[rows[0]]
                    raise DataError(f"none of {len(rows)} images can be read; the first: {first.name} ({first.reason})")
                yield torch.stack([pixels for pixels, _ in drawn]).float() / 255, [target for _, target in drawn]


class Movers:
    """What moves a trainee: AdamW, and where it is asked for Muon, of linear layers and convolutions of the encoder."""

    def __init__(self, trainee: FinetuneModel, plan: Plan, how: HParams) -> None:
        self.rate, self.learns = how.rate, trainee.learns()
        layers = [m.weight for m in trainee.encoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        matrices = [p for p in layers if p.requires_grad] if how.optimizer == "muon" else []
        taken = {id(p) for p in matrices}
        rest = [p for p in self.learns if id(p) not in taken]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=how.rate, weight_decay=plan.weight_decay, fused=True)
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        # a kernel (C', C, k, k) is moved as the matrix (C', C k k), in the same memory
        self.rows = {p: nn.Parameter(p.detach().view(len(p), -1)) for p in matrices}
        if matrices:  # by steps of AdamW's own magnitude (arXiv 2502.16982)
            rows = list(self.rows.values())
            self.optimizers.append(
                torch.optim.Muon(rows, how.rate, plan.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, share: float) -> None:
        """Move by what is in the gradients, at this share of the learning rate, and clear them."""
        for p, row in self.rows.items():
            row.grad = None if p.grad is None else p.grad.flatten(1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * share
            optimizer.step()
        for p in self.learns:
            p.grad = None


def train_end_to_end(
    trainee: FinetuneModel, views: Views, plan: Plan, steps: int, how: HParams, workers: int = 0
) -> None:
    """Train an encoder and a head together, in place: linear warm-up, cosine to zero.

    The encoder computes in bfloat16 where the hardware has it, as in a distillation.

    Raises:
        NumericError: the loss is no longer finite.
        DataError: images that cannot be read.
    """
    learns, goal, bf16 = trainee.learns(), views.goal, use_bf16("auto", trainee.device)
    movers = Movers(trainee, plan, how)
    trainee.encoder.train()
    trainee.head.train()
    batches = views.batches(plan.batch, steps, grid_of(trainee, views.size), workers)
    for step, (pixels, targets) in enumerate(tqdm(batches, total=steps, unit=" steps", leave=False, disable=None)):
        with torch.autocast(trainee.device.type, torch.bfloat16, enabled=bf16):
            seen = trainee.see(pixels.to(trainee.device))
        loss = goal.loss(trainee.head, seen.map(Tensor.float), targets)
        loss.backward()
        if not nn.utils.clip_grad_norm_(learns, CLIP).isfinite():
            raise NumericError(f"{goal.task}: the gradients are no longer finite at step {step} with {how}")
        movers.step(_share(step, steps))
    trainee.encoder.eval()
    trainee.head.eval()


def run(
    make: Callable[[], FinetuneModel],
    goal: FinetuneTask,
    size: tuple[int, int],
    plan: Plan,
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    told: dict[str, float | int | str] | None = None,
) -> tuple[list[Row], FinetuneModel]:
    """Choose one of the tries on val (or a fifth of train), train with all of train, score on test.

    Args:
        make: a trainee at its beginning, the same each time.
        goal: a task and its images.
        size: (h, w) of the encoder's input in px.
        batch: images at a time where nothing is trained.
        workers: threads that decode.
        told: what else the settings of the rows are to say.

    Returns:
        Rows as of a frozen probe, and what was trained.
    """
    begun = time.perf_counter()
    splits = goal.splits
    how, tried = plan.tries[0], 0
    if len(plan.tries) > 1:
        fit_on, choose_on = _parts(splits)
        tried = max(1, round(CHOOSING * plan.steps))
        values, failed = {}, None
        for candidate in plan.tries:
            trainee = make()
            try:
                train_end_to_end(trainee, Views(goal, fit_on, size, plan.scale, seed), plan, tried, candidate, workers)
            except NumericError as error:  # too fast; the others may not be
                failed = error
                continue
            values[candidate] = _measure(goal, trainee, choose_on, size, batch, workers)[0].get(goal.metric, 0.0)
        if failed and not values:
            raise failed
        how = max(values, key=values.__getitem__)
    trainee, views = make(), Views(goal, splits.train, size, plan.scale, seed)
    train_end_to_end(trainee, views, plan, plan.steps, how, workers)
    measured, n = _measure(goal, trainee, splits.test, size, batch, workers)
    settings: dict[str, float | int | str] = {
        "optimizer": how.optimizer,
        "lr": how.rate,
        "steps": plan.steps,
        "batch": plan.batch,
        "weight_decay": plan.weight_decay,
        "seed": seed,
        "search_steps": tried,
        "tries": ", ".join(f"{one.optimizer} {one.rate:g}" for one in plan.tries),
        "selected_on": "nothing" if not tried else "val" if splits.val is not None else "a fifth of train",
        "split": splits.how,
        "train": len(splits.train.indices),
        "skipped": len(views.unread),
        **(told or {}),
    }
    seconds = time.perf_counter() - begun
    return [
        Row(task=goal.task, metric=metric, value=value, n=n, seconds=seconds, settings=settings)
        for metric, value in measured.items()
    ], trainee


def grid_of(trainee: FinetuneModel, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of the features at an input size; (0, 0) where they have no places."""
    with torch.no_grad():
        return trainee.see(torch.zeros(1, 3, *size, device=trainee.device)).grid


def _measure(
    goal: FinetuneTask, trainee: FinetuneModel, split: Any, size: tuple[int, int], batch: int, workers: int
) -> tuple[dict[str, float], int]:
    def features_of(images: Batch) -> Features:
        with torch.no_grad():
            return trainee.see(images.to(trainee.device).pixels(size))

    return goal.measure(trainee.head, features_of, split, size, batch, workers)


def _parts(splits: Any) -> tuple[Any, Any]:
    """Images to fit on and to choose on while nothing is reported yet."""
    if splits.val is not None:
        return splits.train, splits.val
    kept, held = held_out(splits.train.images.ids[splits.train.indices])
    return splits.train.take(kept), splits.train.take(held)


def _decoded(goal: FinetuneTask, split: Any, row: int, at_least: int) -> tuple[Tensor, tuple[int, int]] | Skipped:
    """An image no larger than twice what its views need, so that many can be kept."""
    read = goal.read(split, row, at_least)
    if isinstance(read, Skipped):
        return read
    pixels, full_size = read
    times = min(pixels.shape[1:]) / at_least
    if times <= 2:
        return pixels, full_size
    return render(pixels, WHOLE, (round(pixels.shape[1] / times), round(pixels.shape[2] / times))), full_size


def _on_pixels(view: View, size: tuple[int, int]) -> View:
    """The view with its sides on whole pixels of the original, so that labels are cut exactly where pixels are."""

    def snapped(start: float, length: float, side: int) -> tuple[float, float]:
        first = min(round(start * side), side - 1)
        return first / side, (max(first + 1, min(side, round((start + length) * side))) - first) / side

    (top, height), (left, width) = snapped(view.top, view.height, size[0]), snapped(view.left, view.width, size[1])
    return View(top, left, height, width, view.flip)


def _share(step: int, steps: int) -> float:
    """Of the learning rate, at a step from 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
