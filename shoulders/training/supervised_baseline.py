"""The data-centric baseline: the student's own architecture without what it inherited, trained with labels alone.

It gets the training FLOPs of the distillation. Counted are matrix products, convolutions and attention, forward and
backward, of one real step of each (`torch.utils.flop_counter`), with all teachers asked live. Not counted are
optimizers and what moves or adds numbers; of the distillation, calibration and held-out measures; of the baseline,
what it tries first to choose an optimizer and its learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shoulders.config.recipe import Recipe, as_size, read_recipe
from shoulders.distributed.device import this_device
from shoulders.errors import RecipeError
from shoulders.evaluation.finetune_models import init_from_scratch
from shoulders.hub.flops import count_flops
from shoulders.model import ShouldersConfig, load
from shoulders.tasks import TASKS, FinetuneTask, Row
from shoulders.tasks.finetune import HParams, Plan, Views, grid_of, run
from shoulders.training.flops import distillation_flops
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import teacher_name

BATCH = 32
TRIES = (HParams("adamw", 1e-3), HParams("muon", 2e-3))
COUNTED = 2  # images of a counted step


@dataclass(frozen=True)
class Equal:
    """Training FLOPs of a whole distillation, and of one image of supervised training."""

    distillation: int
    supervised: int

    def steps(self, batch: int) -> int:
        """How many supervised steps of a batch cost what the distillation cost, rounded."""
        return max(1, round(self.distillation / (self.supervised * batch)))


def scratch(
    folder: Path | str,
    task: str,
    splits: Any,
    steps: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    batch: int = BATCH,
    workers: int = 0,
    seed: int = 0,
    tries: tuple[HParams, ...] = TRIES,
) -> list[Row]:
    """Rows of a fresh student trained with the labels of train, on what its head says of test.

    Args:
        folder: a run folder, or with `steps` a student's folder.
        task: a name in ``shoulders.tasks.TASKS``.
        splits: as that task finds them.
        steps: default: as many as cost what the run's distillation did, `equal_flops`.
        size: (h, w) of the input in px; default: the student's.
        batch: images a step.
        workers: threads that decode.
        tries: optimizers and learning rates to try.

    Raises:
        RecipeError: no recipe to count the steps of, or one that lacks a teacher.
        DataError: the student or the data cannot be used.
        NumericError: training left the finite numbers.
    """
    config, goal, device = load(folder).config, TASKS[task].tune(splits), this_device()
    size = size or as_size(tuple(config.image_size))
    make = partial(init_from_scratch, config, goal, seed, device)
    told: dict[str, float | int | str] = {}
    if steps is None:
        equal = equal_flops(folder, goal, size)
        steps = equal.steps(batch)
        told = {"distillation_flops": equal.distillation, "flops_per_image": equal.supervised}
    return run(make, goal, size, Plan(steps, batch, tries), workers=workers, seed=seed, told=told)[0]


def equal_flops(folder: Path | str, goal: FinetuneTask, size: tuple[int, int]) -> Equal:
    """What a run's distillation cost, and what an image of (h, w) px costs a fresh student that learns a goal.

    Raises:
        RecipeError: as `check_countable`.
    """
    recipe = check_countable(folder)
    student = load(folder)
    per_image = distillation_flops(student, recipe)
    step, images = _supervise(student.config, goal, size)
    supervised = count_flops(step) / images
    return Equal(round(per_image * recipe.train.batch * recipe.train.steps), round(supervised))


def check_countable(folder: Path | str) -> Recipe:
    """The recipe of a run whose distillation can be counted.

    Raises:
        RecipeError: the folder holds no recipe, or the recipe lacks a teacher that the student learned from.
    """
    file = Path(folder) / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{folder}: no recipe.yaml to tell what the distillation cost; give --scratch-steps")
    recipe = read_recipe(file)
    absent = sorted({teacher_name(tap) for tap in load(folder).taps} - {*recipe.teachers, BASE})
    if absent:
        raise RecipeError(f"{folder}: its recipe lacks {', '.join(absent)}, whose cost counts; give --scratch-steps")
    return recipe


def _supervise(config: ShouldersConfig, goal: FinetuneTask, size: tuple[int, int]) -> tuple[Callable[[], None], int]:
    """One supervised step, but for the optimizer, and its number of images: one that cannot be read is not there."""
    learns = init_from_scratch(config, goal, 0, this_device())
    plan = Plan(1, COUNTED, TRIES)
    views = Views(goal, goal.splits.train, size, plan.scale, 0)
    pixels, targets = next(views.batches(COUNTED, 1, grid_of(learns, size)))

    def step() -> None:
        goal.loss(learns.head, learns.see(pixels.to(learns.device)), targets).backward()

    return step, len(pixels)
