"""The batches of a run: training views in their order, and held-out images."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from shoulders.config.recipe import Recipe
from shoulders.config.section import as_size
from shoulders.config.sections import Images
from shoulders.features import Batch
from shoulders.images import ImageSet, batches, evaluation_batches
from shoulders.teachers import AnyTeachers

MAX_IMAGES = 16  # of a teacher's forward pass outside of training steps: few, for the largest teachers


@dataclass(frozen=True)
class RunBatches:
    """The batches of a run.

    Args:
        images: all images of the run.
        settings: ``images:`` of the recipe.
        batch: images per step over all ranks.
        seed: of views and order.
        size: (h, w) of the student's input in px.
        render_sizes: every (h, w) that batches are rendered at.
        decode_sizes: every (h, w) that images are decoded for: the same with live teachers as with cached ones.
    """

    images: ImageSet
    settings: Images
    batch: int
    seed: int
    size: tuple[int, int]
    render_sizes: list[tuple[int, int]]
    decode_sizes: list[tuple[int, int]]

    def training(
        self, first_step: int, last_step: int, rank: int = 0, world_size: int = 1
    ) -> Generator[Batch, None, None]:
        """A rank's part of the training batches of steps (first_step, last_step]."""
        return batches(
            self.images,
            self.render_sizes,
            self.settings,
            batch=self.batch,
            seed=self.seed,
            first_step=first_step,
            steps=last_step - first_step,
            rank=rank,
            world_size=world_size,
            decode_sizes=self.decode_sizes,
        )

    def heldout(self) -> Iterator[Batch]:
        """Central views of the held-out images, a few at a time."""
        return evaluation_batches(
            self.images.collection,
            self.render_sizes,
            MAX_IMAGES,
            self.images.heldout,
            self.settings.workers,
            self.settings.max_pixels,
            self.decode_sizes,
            self.size,
        )


def run_batches(recipe: Recipe, images: ImageSet, teachers: AnyTeachers) -> RunBatches:
    """The batches that a recipe and its teachers need."""
    size = as_size(recipe.images.size)
    return RunBatches(
        images,
        recipe.images,
        recipe.train.batch,
        recipe.train.seed,
        size,
        render_sizes=sorted({size, *teachers.render_sizes}),
        decode_sizes=sorted({size, *teachers.sizes}),
    )
