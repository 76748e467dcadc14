"""The data-centric baseline: the architecture of the student, trained from scratch with labels.

It gets the training FLOPs of the distillation. Matrix products, convolutions and attention are counted, forward and
backward, for one real step of each (`torch.utils.flop_counter`), with all teachers running. Optimizers and element-wise
operations are not counted; nor are calibration and held-out evaluations of the distillation, nor the search for the
optimizer and learning rate of the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shoulders.config.recipe import Recipe, read_recipe
from shoulders.config.section import as_size
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.evaluation.evaluate import Rows, evaluate
from shoulders.evaluation.finetune_models import init_from_scratch
from shoulders.evaluation.models import BASELINE
from shoulders.hub.flops import count_flops
from shoulders.model import ShouldersConfig, load
from shoulders.tasks import TASKS, FinetuneTask, Row
from shoulders.tasks.finetune import FinetuneSchedule, HParams, feature_grid, finetune
from shoulders.tasks.views import AugmentedViews
from shoulders.training.flops import distillation_flops
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import teacher_name

BATCH = 32
CANDIDATES = (HParams("adamw", 1e-3), HParams("muon", 2e-3))
COUNTED_IMAGES = 2  # of a counted step


@dataclass(frozen=True)
class TrainingFlops:
    """Training FLOPs of a whole distillation, and of one image of supervised training."""

    distillation: int
    supervised: int

    def equal_steps(self, batch: int) -> int:
        """Supervised steps of a batch with the FLOPs of the distillation, rounded."""
        return max(1, round(self.distillation / (self.supervised * batch)))


def evaluate_with_baseline(
    run: Path | str,
    task: str,
    data: Path | str,
    models: Sequence[str] | None = None,
    *,
    scratch_steps: int | None = None,
    size: tuple[int, int] | None = None,
    workers: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Rows:
    """`shoulders.evaluation.evaluate.evaluate`, which here also takes ``scratch``, the baseline, as a model.

    Args:
        scratch_steps: of the baseline; default: those with the FLOPs of the run's distillation.
        settings: the other arguments of `shoulders.evaluation.evaluate.evaluate`.

    Raises:
        RecipeError: as `shoulders.evaluation.evaluate.evaluate`, or the steps cannot be counted.
    """
    if models and BASELINE in models and scratch_steps is None:
        check_countable(run)

    def train(splits: Any) -> list[Row]:
        return train_supervised_baseline(run, task, splits, scratch_steps, size=size, workers=workers, seed=seed)

    trained = {BASELINE: train}
    return evaluate(run, task, data, models, size=size, workers=workers, seed=seed, trained_models=trained, **settings)


def train_supervised_baseline(
    folder: Path | str,
    task: str,
    splits: Any,
    steps: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    batch: int = BATCH,
    workers: int = 0,
    seed: int = 0,
    candidates: tuple[HParams, ...] = CANDIDATES,
) -> list[Row]:
    """Rows of the student's architecture, trained from scratch on train and evaluated on test.

    Args:
        folder: a run folder, or with ``steps`` a student's folder.
        task: a name in `shoulders.tasks.TASKS`.
        splits: as that task finds them.
        steps: default: those with the FLOPs of the run's distillation.
        size: (h, w) of the input in px; default: the student's.
        batch: images per step.
        workers: threads that decode.
        seed: of initial weights, of the views and of their order.
        candidates: optimizers and learning rates to select from.

    Raises:
        RecipeError: no recipe to count the steps of, or one that lacks a teacher.
        DataError: the student or the data cannot be used.
        NumericError: the training diverges.
    """
    config, finetune_task, device = load(folder).config, TASKS[task].finetune(splits), this_device()
    size = size or as_size(tuple(config.image_size))
    build = partial(init_from_scratch, config, finetune_task, seed, device)
    settings: dict[str, float | int | str] = {}
    if steps is None:
        flops = training_flops(folder, finetune_task, size)
        steps = flops.equal_steps(batch)
        settings = {"distillation_flops": flops.distillation, "flops_per_image": flops.supervised}
    schedule = FinetuneSchedule(steps, batch, candidates)
    return finetune(build, finetune_task, size, schedule, workers=workers, seed=seed, settings=settings)[0]


def training_flops(folder: Path | str, task: FinetuneTask, size: tuple[int, int]) -> TrainingFlops:
    """The training FLOPs of a run's distillation, and of an image of (h, w) px of supervised training.

    Raises:
        RecipeError: as `check_countable`.
    """
    recipe = check_countable(folder)
    student = load(folder)
    per_image = distillation_flops(student, recipe)
    step, images = _supervise(student.config, task, size)
    supervised = count_flops(step) / images
    return TrainingFlops(round(per_image * recipe.train.batch * recipe.train.steps), round(supervised))


def check_countable(folder: Path | str) -> Recipe:
    """The recipe of a run whose distillation can be counted.

    Raises:
        RecipeError: the folder holds no recipe, or the recipe lacks a teacher that the student learned from.
    """
    file = Path(folder) / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{folder}: no recipe.yaml, which the FLOPs of the distillation need; give --scratch-steps")
    recipe = read_recipe(file)
    absent = sorted({teacher_name(tap) for tap in load(folder).taps} - {*recipe.teachers, BASE})
    if absent:
        raise RecipeError(f"{folder}: its recipe lacks {', '.join(absent)}, whose FLOPs count; give --scratch-steps")
    return recipe


def _supervise(config: ShouldersConfig, task: FinetuneTask, size: tuple[int, int]) -> tuple[Callable[[], None], int]:
    """One supervised step, without the optimizer, and its number of images: unreadable ones are left out."""
    model = init_from_scratch(config, task, 0, this_device())
    schedule = FinetuneSchedule(1, COUNTED_IMAGES, CANDIDATES)
    views = AugmentedViews(task, task.splits.train, size, schedule.scale, 0)
    pixels, targets = next(views.batches(COUNTED_IMAGES, 1, feature_grid(model, size)))

    def step() -> None:
        task.loss(model.head, model.features_of(pixels.to(model.device)), targets).backward()

    return step, len(pixels)
