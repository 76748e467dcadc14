"""Detection and instance segmentation by frozen features: one small dense head, scored as COCO does."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.features import Batch, Features
from shoulders.images import View
from shoulders.tasks.average_precision import Detections, average_precision, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, decode, encode
from shoulders.tasks.data.dense import DenseSplit, DenseSplits
from shoulders.tasks.feature_bank import WHOLE, FeatureBank, hold_out, minibatches
from shoulders.tasks.heads.objects import ObjectHead, Objects, Target, losses, pick
from shoulders.tasks.rows import Row

LR = 1e-3
WEIGHT_DECAY = 0.01
BATCH = 16
EPOCHS = 20
FEWEST_STEPS, MOST_STEPS = 600, 20_000
WARM_UP = 50  # steps
AVERAGE = 0.99  # what the averaged weights keep of themselves at each step
LOOKS = 4  # at val, evenly over the steps
AT_ONCE = 2**26  # pixels of masks that are drawn together
SHOWN = 0.25  # of a box that a view has to show, so that the object counts


@dataclass(frozen=True)
class Fitted:
    """A head, the steps it took, and how well it does on what it was chosen on (nan: nothing was looked at)."""

    head: ObjectHead
    steps: int
    value: float = math.nan


def run(
    features_of: Callable[[Batch], Features],
    splits: DenseSplits[AnnotatedImage],
    sizes: list[tuple[int, int]],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    masks: bool = False,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    effort: float = 1.0,
) -> list[Row]:
    """AP of boxes and, as ``mask_AP``, of masks where they are asked for; see `classification.run`."""
    begun = time.perf_counter()

    def frozen(split: DenseSplit[AnnotatedImage]) -> FeatureBank[AnnotatedImage]:
        return FeatureBank(features_of, split, sizes[0], batch, workers)

    train, test = frozen(splits.train), frozen(splits.test)
    val = None if splits.val is None else frozen(splits.val)
    fit_on, choose_on = hold_out(train) if val is None else (train, val)
    computed = time.perf_counter()
    metric = "mask_AP" if masks else "AP"
    fitted = fit(
        fit_on,
        splits.classes,
        masks,
        seed,
        steps_for(len(fit_on), effort),
        lambda head: measure(head, choose_on, splits.classes, masks).get(metric, 0.0),
    )
    if val is None:  # with what was held out
        fitted = fit(train, splits.classes, masks, seed, fitted.steps)
    on_head(fitted.head)
    values = measure(fitted.head, test, splits.classes, masks)
    settings: dict[str, float | int | str] = {
        "head": "dense",
        "lr": LR,
        "steps": fitted.steps,
        "batch": BATCH,
        "weight_decay": WEIGHT_DECAY,
        "seed": seed,
        "selected_on": "val" if val is not None else "a fifth of train",
        "split": splits.how,
        "train": len(train),
        "skipped": sum(len(part.skipped) for part in (train, val, test) if part is not None),
        "features_seconds": computed - begun,
    }
    seconds, task = time.perf_counter() - computed, "instance" if masks else "detection"
    return [
        Row(task=task, metric=metric, value=value, n=len(test), seconds=seconds, settings=settings)
        for metric, value in values.items()
    ]


def steps_for(images: int, effort: float = 1.0) -> int:
    """How many minibatches a fit takes at most."""
    return max(1, round(effort * min(max(FEWEST_STEPS, EPOCHS * images // BATCH), MOST_STEPS)))


def fit(
    frozen: FeatureBank[AnnotatedImage],
    classes: tuple[str, ...],
    masks: bool,
    seed: int,
    steps: int,
    look: Callable[[ObjectHead], float] | None = None,
) -> Fitted:
    """The averaged weights after `steps`, or after those of the looks at which they did best.

    The rate stays what it is after the warm-up, so that a fit that stops early is the beginning of a longer one.
    """
    targets = [target_of(picture, frozen.grid, masks) for picture in frozen.truths]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ObjectHead(frozen.width, len(classes), masks).to(frozen.device)
    averaged = copy.deepcopy(head).eval()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    places = (2 * frozen.grid[0], 2 * frozen.grid[1])
    looks = [round(steps * (number + 1) / LOOKS) for number in range(LOOKS)]
    best: Fitted | None = None
    order = minibatches(len(frozen), BATCH, steps, torch.Generator().manual_seed(seed))
    for step, rows in enumerate(order, start=1):
        wanted = [on(targets[row], frozen.device) for row in rows]
        terms = losses(head(frozen.maps(rows)), wanted, places)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        follow(averaged, head, min(AVERAGE, step / (step + 10)))
        if look is not None and step in looks:
            value = look(averaged)
            if best is None or value >= best.value:  # a longer fit of the same value is the better guess
                best = Fitted(copy.deepcopy(averaged), step, value)
    return best or Fitted(averaged, steps)


@torch.no_grad()
def follow(averaged: ObjectHead, head: ObjectHead, keep: float) -> None:
    """Move the averaged weights towards the head's."""
    for ours, theirs in zip(averaged.parameters(), head.parameters(), strict=True):
        ours.lerp_(theirs, 1 - keep)
    for count, theirs_count in zip(averaged.buffers(), head.buffers(), strict=True):
        count.copy_(theirs_count)


def target_of(picture: AnnotatedImage, grid: tuple[int, int], masks: bool, view: View = WHOLE) -> Target:
    """The objects of a view in places of twice the grid, masks at four times the grid.

    What a view shows less than a quarter of is left out; the sides of the view are whole px.
    """
    top, left = round(view.top * picture.size[0]), round(view.left * picture.size[1])
    h, w = round(view.height * picture.size[0]), round(view.width * picture.size[1])
    per_px = torch.tensor([2 * grid[1] / w, 2 * grid[0] / h]).repeat(2)  # (4,)
    boxes, kept = torch.from_numpy(picture.boxes).float(), np.arange(len(picture.boxes))
    if view != WHOLE:
        boxes, shown = cut(boxes - torch.tensor([left, top]).repeat(2), (h, w), view.flip)
        kept = (shown >= SHOWN).nonzero()[:, 0].numpy()
    small = None
    if masks:
        of_kept = tuple(picture.masks[row] for row in kept) if picture.masks else ()
        drawn = torch.from_numpy(decode(of_kept, picture.size))[:, top : top + h, left : left + w].float()  # (n, h, w)
        drawn = drawn.flip(2) if view.flip else drawn
        size = (4 * grid[0], 4 * grid[1])
        # an empty batch cannot be resized
        small = F.adaptive_avg_pool2d(drawn, size) >= 0.5 if len(drawn) else torch.zeros(0, *size, dtype=torch.bool)
    classes, crowd = torch.from_numpy(picture.classes[kept]), torch.from_numpy(picture.crowd[kept])
    return Target(classes, boxes[torch.from_numpy(kept)] * per_px, crowd, small)


def cut(boxes: Tensor, size: tuple[int, int], flip: bool) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) cut off at the sides of a view of ``size`` = (h, w) and mirrored, and how much of each is shown."""
    most = torch.tensor([size[1], size[0]]).repeat(2)
    inside = torch.minimum(boxes.clamp(min=0), most)
    areas, before = ((part[:, 2:] - part[:, :2]).prod(1) for part in (inside, boxes))
    if flip:
        inside = torch.stack([size[1] - inside[:, 2], inside[:, 1], size[1] - inside[:, 0], inside[:, 3]], 1)
    return inside, areas / before


def on(target: Target, device: torch.device) -> Target:
    """The same target on a device."""
    masks = None if target.masks is None else target.masks.to(device)
    return Target(target.classes.to(device), target.boxes.to(device), target.crowd.to(device), masks)


def measure(
    head: ObjectHead, frozen: FeatureBank[AnnotatedImage], classes: tuple[str, ...], masks: bool
) -> dict[str, float]:
    """AP by metric, those of masks with ``mask_`` in front; none where there is no object to find."""
    truth = Annotations(classes, tuple(frozen.truths))
    found = find(head, frozen)
    values = average_precision(match(truth, found, "boxes"))
    if masks:
        of_masks = average_precision(match(truth, found, "masks"))
        values |= {f"mask_{name}": value for name, value in of_masks.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


@torch.no_grad()
def find(head: ObjectHead, frozen: FeatureBank[AnnotatedImage]) -> list[Detections]:
    """What the head finds in each image, in px of the original."""
    found = []
    for start in range(0, len(frozen), BATCH):
        rows = range(start, min(start + BATCH, len(frozen)))
        answer = head(frozen.maps(rows))
        found += [to_original(pick(answer, i), frozen.truths[row].size, frozen.grid) for i, row in enumerate(rows)]
    return found


def to_original(objects: Objects, size: tuple[int, int], grid: tuple[int, int]) -> Detections:
    """Objects in places as `Detections` in an image of ``size`` = (h, w) px."""
    boxes, masks = in_pixels(objects, size, grid), objects.masks
    few = max(1, AT_ONCE // (size[0] * size[1]))
    drawn = (
        None
        if masks is None
        else (
            mask
            for part, inside in zip(masks.split(few), boxes.split(few), strict=True)
            for mask in encode(draw(part, inside, size).numpy())
        )
    )
    return Detections(
        objects.classes.cpu().numpy(),
        objects.scores.cpu().double().numpy(),
        boxes.double().numpy(),
        None if drawn is None else tuple(drawn),
    )


def in_pixels(objects: Objects, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Boxes (q, 4) of objects in places, in an image of ``size`` = (h, w) px."""
    h, w = size
    px = torch.tensor([w / (2 * grid[1]), h / (2 * grid[0])]).repeat(2)
    boxes = objects.boxes.cpu() * px
    return torch.stack(
        [boxes[:, 0].clamp(0, w), boxes[:, 1].clamp(0, h), boxes[:, 2].clamp(0, w), boxes[:, 3].clamp(0, h)], 1
    )


def draw(logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (q, h, w) bool of logits (q, 4 H, 4 W), each inside its box (q, 4) in px of the original."""
    if not len(logits):
        return torch.zeros(0, *size, dtype=torch.bool)
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    left, top, right, bottom = (boxes[:, side, None, None] for side in range(4))
    inside = (x > left - 0.5) & (x < right + 0.5) & (y > top - 0.5) & (y < bottom + 0.5)  # (q, h, w)
    large = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return (large.cpu() > 0) & inside
