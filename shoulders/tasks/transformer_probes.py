"""Probes whose head is a whole transformers head: fitted on frozen features, scored as the default probes are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from shoulders.errors import NumericError, RecipeError
from shoulders.features import Batch, Features
from shoulders.tasks import objects, semantic
from shoulders.tasks.average_precision import Detections, average_precision, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations
from shoulders.tasks.data.dense import DenseSplits, MaskFile
from shoulders.tasks.feature_bank import FeatureBank, minibatches
from shoulders.tasks.heads.transformers import Detector, MaskFinder, Segmenter
from shoulders.tasks.rows import Row
from shoulders.tasks.teacher_head_eval import boxes_found, masks_found

LR = 5e-4
WEIGHT_DECAY = 0.01
BATCH = 16
EPOCHS = 40
FEWEST_STEPS, MOST_STEPS = 1000, 20_000
WARM_UP = 50  # steps
CLIP = 1.0  # of the gradient's norm
FeaturesOf = Callable[[Batch], Features]


def upernet(
    features_of: FeaturesOf,
    splits: DenseSplits[MaskFile],
    sizes: list[tuple[int, int]],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    effort: float = 1.0,
) -> list[Row]:
    """mIoU, pixel accuracy and the IoU of each class, by UperNet; see `classification.run`."""
    begun, n_classes = time.perf_counter(), len(splits.classes)
    train, test = (FeatureBank(features_of, split, sizes[0], batch, workers) for split in (splits.train, splits.test))
    computed = time.perf_counter()
    labels, build = list(semantic.small_masks(train, n_classes)), partial(Segmenter, train.width, n_classes)
    head = fit(train, build, labels, seed, steps_for(len(train), effort))
    on_head(head)
    values = semantic.scores(semantic.confusion(head, test, n_classes), splits.classes)
    return _rows("semantic", "upernet", values, head, train, test, splits.how, seed, effort, (begun, computed))


def find_objects(
    features_of: FeaturesOf,
    splits: DenseSplits[AnnotatedImage],
    sizes: list[tuple[int, int]],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    masks: bool = False,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    effort: float = 1.0,
) -> list[Row]:
    """AP of boxes by RT-DETR v2, or of masks and the boxes around them by Mask2Former; as `objects.run` says them."""
    begun = time.perf_counter()
    train, test = (FeatureBank(features_of, split, sizes[0], batch, workers) for split in (splits.train, splits.test))
    computed = time.perf_counter()
    build, found = (MaskFinder, masks_found) if masks else (Detector, boxes_found)
    targets = [objects.target_of(picture, train.grid, masks) for picture in train.truths]
    head = fit(train, partial(build, train.width, len(splits.classes)), targets, seed, steps_for(len(train), effort))
    on_head(head)
    values = score(find(head, test, found), test, splits.classes, masks)
    task, name = ("instance", "mask2former") if masks else ("detection", "rt_detr_v2")
    return _rows(task, name, values, head, train, test, splits.how, seed, effort, (begun, computed))


def steps_for(images: int, effort: float = 1.0) -> int:
    """How many minibatches a fit takes, or a share of them."""
    return max(1, round(effort * min(max(FEWEST_STEPS, EPOCHS * images // BATCH), MOST_STEPS)))


def fit(
    frozen: FeatureBank[Any],
    build: Callable[[], Any],
    targets: Sequence[Any],
    seed: int,
    steps: int,
    on_step: Callable[[float], object] = lambda loss: None,
) -> Any:
    """A head after so many minibatches by its own loss; AdamW, linear warm-up, the rate falling by half a cosine.

    Args:
        frozen: the features.
        build: a fresh head.
        targets: what is known of each image, as the head's loss takes it.
        on_step: called with the loss of each step.

    Raises:
        NumericError: the loss is no longer finite.
    """
    with torch.random.fork_rng(devices=[]):  # these losses draw random points and queries
        torch.manual_seed(seed)
        head = build().to(frozen.device).train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, steps=steps))
        for rows in minibatches(len(frozen), BATCH, steps, torch.Generator().manual_seed(seed)):
            loss = head.loss(frozen.maps(rows), [targets[row] for row in rows])
            if not loss.isfinite():
                raise NumericError(f"the loss of {type(head).__name__} is no longer finite; check the features")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            on_step(loss.item())
    return head.eval()


def _share(step: int, steps: int) -> float:
    """Of the learning rate, at a step from 0."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


@torch.no_grad()
def find(head: Any, frozen: FeatureBank[AnnotatedImage], found: Callable[..., Any]) -> list[Detections]:
    """What a head finds in each image, in px of the original; ``found`` reads its output."""
    answers: list[Detections] = []
    for start in range(0, len(frozen), BATCH):
        rows = range(start, min(start + BATCH, len(frozen)))
        answers += found(head.processor, head(frozen.maps(rows)), [frozen.truths[row].size for row in rows])
    return answers


def score(
    found: list[Detections], frozen: FeatureBank[AnnotatedImage], classes: tuple[str, ...], masks: bool
) -> dict[str, float]:
    """AP by metric, those of masks with ``mask_`` in front; none where there is no object to find."""
    truth = Annotations(classes, tuple(frozen.truths))
    values = average_precision(match(truth, found, "boxes"))
    if masks:
        values |= {f"mask_{name}": value for name, value in average_precision(match(truth, found, "masks")).items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _rows(
    task: str,
    name: str,
    values: dict[str, float],
    head: nn.Module,
    train: FeatureBank[Any],
    test: FeatureBank[Any],
    how: str,
    seed: int,
    effort: float,
    times: tuple[float, float],
) -> list[Row]:
    begun, computed = times
    settings: dict[str, float | int | str] = {
        "head": name,
        "lr": LR,
        "steps": steps_for(len(train), effort),
        "batch": BATCH,
        "weight_decay": WEIGHT_DECAY,
        "seed": seed,
        "selected_on": "nothing: the settings are fixed",
        "split": how,
        "train": len(train),
        "skipped": len(train.skipped) + len(test.skipped),
        "features_seconds": computed - begun,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
    }
    seconds = time.perf_counter() - computed
    return [
        Row(task=task, metric=metric, value=value, n=len(test), seconds=seconds, settings=settings)
        for metric, value in values.items()
    ]


# task -> the probes that may take the place of the default one, by name
PROBES: dict[str, dict[str, Callable[..., list[Row]]]] = {
    "semantic": {"upernet": upernet},
    "detection": {"rt_detr_v2": find_objects},
    "instance": {"mask2former": partial(find_objects, masks=True)},
}
DEFAULT = {"classification": "linear", "detection": "dense", "semantic": "linear", "instance": "dense"}
NEED_SCIPY = ("rt_detr_v2", "mask2former")  # their losses match what is found and what is there with it


def check_probe(task: str, name: str, tune: str | None = None) -> None:
    """Refuse a probe that the task does not have, or that cannot be fitted here or tuned on.

    Raises:
        RecipeError: naming those that it has, or what to install.
    """
    allowed = (DEFAULT[task], *PROBES.get(task, {}))
    if name not in allowed:
        raise RecipeError(f"--probe: {name!r} is none of {', '.join(allowed)}, the probes of {task}")
    if tune and name != DEFAULT[task]:
        raise RecipeError(f"--probe: {name} is fitted on frozen features alone; leave --tune or --probe out")
    if name in NEED_SCIPY and find_spec("scipy") is None:
        raise RecipeError(f'--probe: the loss of {name} needs scipy; install it with pip install "shoulders[det]"')
