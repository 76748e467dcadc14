"""The training FLOPs of a distillation: forward and backward of one real step, without its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shoulders.config.recipe import Recipe
from shoulders.config.section import as_size
from shoulders.distributed.context import DistContext
from shoulders.distributed.device import this_device
from shoulders.features import Batch
from shoulders.hub.flops import count_flops
from shoulders.images import open_images
from shoulders.model import ShouldersModel
from shoulders.teachers import Teachers, load_teacher
from shoulders.training.module import DistillationModule
from shoulders.training.optimizers import Optimizers
from shoulders.training.step import TrainStep

IMAGES = 2  # of a counted step


def distillation_flops(student: ShouldersModel, recipe: Recipe) -> float:
    """Training FLOPs of one image with all teachers live, the mean over the sources in their shares.

    Args:
        student: of the run; its weights do not matter.
        recipe: of the run.
    """
    if not recipe.teacher_sources:
        return step_flops(student, recipe, {}, source=0) / IMAGES
    images, total = open_images(recipe.images, recipe.train.seed), 0.0
    sources = {name: images.collection.source_indices(names) for name, names in recipe.teacher_sources.items()}
    for name, share in images.shares().items():
        (source,) = images.collection.source_indices([name])
        total += share * step_flops(student, recipe, sources, source) / IMAGES
    return total


def step_flops(student: ShouldersModel, recipe: Recipe, sources: Mapping[str, Sequence[int]], source: int) -> int:
    """FLOPs of forward and backward of a step with blank images of one source."""
    device = this_device()
    live = {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()}
    teachers = Teachers(live, sources=sources).to(device)
    module = DistillationModule(student, recipe).to(device)
    step = TrainStep(
        module=module,
        wrapped=module,
        teachers=teachers,
        optimizers=Optimizers(module, recipe.train),
        dist=DistContext(0, 1, device),
        size=as_size(recipe.images.size),
        seed=recipe.train.seed,
    )
    sizes = {step.size, *teachers.render_sizes}
    blank = {size: torch.full((IMAGES, 3, *size), 127, dtype=torch.uint8) for size in sizes}
    batch = Batch(torch.arange(IMAGES), blank, sources=torch.full((IMAGES,), source))
    return count_flops(lambda: step.backward(1, batch))
