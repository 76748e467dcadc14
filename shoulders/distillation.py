"""The story: images -> teachers -> features -> transfer <- student. Read it from top to bottom.

The order of images, their views, the dropping of teachers and the learning rate are pure functions of (seed, step).
A run that was killed therefore resumes bit for bit from one integer and the tensors of its checkpoint.

One step is `shoulders.training.step.TrainStep`, its loss is in `shoulders.transfer.losses`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shoulders.config.recipe import Recipe, as_recipe, dump_recipe
from shoulders.distributed.context import DistContext, init_distributed
from shoulders.distributed.device import use_bf16
from shoulders.distributed.sharding import gather_state, unsharded, wrap_model
from shoulders.distributed.signals import catch_signals, stop_if_signalled
from shoulders.feature_cache import open_cache
from shoulders.features import Batch, Features, Skipped
from shoulders.images import ImageSet, SkipReport, open_images
from shoulders.model import save_student
from shoulders.storage.atomic import write_folder, write_text
from shoulders.storage.locks import run_lock
from shoulders.teachers import AnyTeachers, Teacher, Teachers, check_same_on_ranks, load_teacher
from shoulders.training.agreement import check_same_inputs, check_same_recipe
from shoulders.training.batches import MAX_IMAGES, run_batches
from shoulders.training.calibration import fit_standardizers
from shoulders.training.checkpoint import NAME, load_newest, name_checkpoint, save_checkpoint
from shoulders.training.heldout import HeldOutSet
from shoulders.training.logger import MetricLogger
from shoulders.training.masked import Masked, mask_report, masked_images
from shoulders.training.module import DistillationModule
from shoulders.training.optimizers import Optimizers
from shoulders.training.preflight import check_heldout, check_out, check_run
from shoulders.training.results import is_finished, read_summary, write_results
from shoulders.training.resume import check_invariants, resume_invariants
from shoulders.training.skipped_steps import SkippedSteps
from shoulders.training.step import TrainStep
from shoulders.training.student import init_student, load_kept_heads

NOTHING_IS_LOST = "nothing is lost: start again with the same command"


def distill(
    recipe: Recipe | Path | str, *, extra_teachers: Mapping[str, Teacher] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Distil the recipe's teachers into one student. All results are in the folder ``recipe.out``.

    Args:
        recipe: a recipe, or its file.
        extra_teachers: further teachers by name, as PyTorch modules.
        resume: resume from the latest valid checkpoint in ``recipe.out``.

    Returns:
        A summary: out, steps, seconds, and the last held-out measures.

    Raises:
        RecipeError: the recipe cannot work, or another process uses ``out``; before any weight is loaded.
        DataError: too many images are unreadable, or no checkpoint is valid.
        NumericError: too many steps in a row, or too many features of a teacher, are not finite.
        SpaceError: the disk is full.
        Interrupted: after SIGTERM, SIGINT or SIGUSR1, with a checkpoint saved, or with the student complete.
        ProcessLost: a worker process or another rank died or was stopped.
    """
    recipe, started_at = as_recipe(recipe), time.perf_counter()
    with (
        name_checkpoint(recipe.out),
        init_distributed() as dist,
        catch_signals(f"{recipe.out} is finished") as signals,
        ExitStack() as locks,
    ):
        check_same_recipe(recipe, extra_teachers or {}, resume, dist)
        check_run(recipe, extra_teachers or {}, dist, resume)
        dist.barrier()  # all ranks have checked before one of them writes
        locks.enter_context(run_lock(recipe.out, dist))
        check_out(recipe, resume)  # again: another run may have finished in the folder since
        if dist.is_main:
            write_text(recipe.out / "recipe.yaml", dump_recipe(recipe))
        if resume and is_finished(recipe):
            dist.log(f"{recipe.out} is finished already")
            return read_summary(recipe)

        trainer = prepare(recipe, extra_teachers or {}, dist, signals)
        heads = load_kept_heads(recipe, trainer.teachers, dist)  # a head that cannot be kept fails before training
        measures = trainer.train(resume)

        seconds = trainer.elapsed + time.perf_counter() - started_at
        summary = {"out": str(recipe.out), "steps": recipe.train.steps, "seconds": seconds} | measures
        weights = gather_state(trainer.student.state_dict(), dist)
        if dist.is_main:
            write_folder(recipe.out / "student", partial(save_student, trainer.student, heads=heads, weights=weights))
            write_results(recipe, summary)
        dist.barrier()
        return summary


def prepare(
    recipe: Recipe, extra_teachers: Mapping[str, Teacher], dist: DistContext, signals: Sequence[int] = ()
) -> Trainer:
    """Open the images, load the teachers or their cache, and initialise a student.

    Args:
        signals: those that were received so far, see `catch_signals`.
    """
    images = open_images(recipe.images, recipe.train.seed)
    check_heldout(recipe, images)
    dist.barrier()  # one rank may have listed its images long before another
    stop_if_signalled(signals, dist, NOTHING_IS_LOST)
    bf16 = use_bf16(recipe.train.precision, dist.device)
    teachers = open_cache(recipe, extra_teachers, images, bf16, dist) or Teachers(
        {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()} | dict(extra_teachers),
        bf16=bf16,
        sources={name: images.collection.source_indices(names) for name, names in recipe.teacher_sources.items()},
    )
    torch.manual_seed(recipe.train.seed)
    module = DistillationModule(init_student(recipe, teachers), recipe)
    check_same_inputs(teachers, module.student, images, dist)
    if dist.world_size > 1 and isinstance(teachers, Teachers):
        check_same_on_ranks(teachers, dist.gather)
    dist.log(f"{len(images)} training images, {len(images.heldout)} held out; base {recipe.student.base}")
    for tap, shape in teachers.taps.items():
        dist.log(f"  {tap}: summary {shape.summary or '-'}, spatial {shape.spatial or '-'} on {shape.grid}")
    return Trainer(recipe, module, teachers, images, dist, signals)


class Trainer:
    """Images, teachers, student and optimizers of one run, and the loop over its steps.

    Attributes:
        step: one training step, `shoulders.training.step.TrainStep`.
        batches: of training and held-out images, `shoulders.training.batches.RunBatches`.
        elapsed: seconds that the run took before this process started.
        skipped_steps: the steps whose loss or gradients are not finite.
        mask_report: the images of which a teacher's features are not finite.
    """

    def __init__(
        self,
        recipe: Recipe,
        module: DistillationModule,
        teachers: AnyTeachers,
        images: ImageSet,
        dist: DistContext,
        signals: Sequence[int] = (),
    ):
        self.recipe, self.module, self.teachers, self.images, self.dist = recipe, module, teachers, images, dist
        self.student, self.signals = module.student, signals
        self.batches = run_batches(recipe, images, teachers)
        self.elapsed, self.started_at = 0.0, time.perf_counter()
        self.invariants = resume_invariants(self.student, teachers, images)
        wrapped = wrap_model(module, self.student.encoder.base, teachers, recipe.train.parallel, dist)
        self.optimizers = Optimizers(module, recipe.train)  # of this rank's shards
        self.skipped_steps = SkippedSteps(dist.log)
        self.mask_report = mask_report(recipe, self.student.taps, images.collection, dist)
        self.step = TrainStep(
            module=module,
            wrapped=wrapped,
            teachers=teachers,
            optimizers=self.optimizers,
            dist=dist,
            size=self.batches.size,
            seed=recipe.train.seed,
            accumulate=recipe.train.accumulate,
            compile=recipe.train.compile,
        )

    def train(self, resume: bool) -> dict[str, float]:
        """Train from the first step, or the latest checkpoint, to the last. Returns the last held-out measures.

        Raises:
            Interrupted: a signal was received, by any rank.
        """
        recipe, train, dist = self.recipe, self.recipe.train, self.dist
        step = first_step = self.resume() if resume else 0
        skip_report = self.open_reports(first_step)
        if first_step == 0:
            self.calibrate()
        dist.log(f"computing the teacher features of {len(self.images.heldout)} held-out images")
        heldout = HeldOutSet(
            self.with_targets(self.batches.heldout()), self.student, self.batches.size, self.mask_report.names
        )
        skip_report.add(heldout.skipped)
        skipped: list[Skipped] = []
        masked: list[Masked] = []
        with (
            MetricLogger(recipe.out, first_step, train, dist.is_main) as logger,
            closing(self.batches.training(first_step, train.steps, dist.rank, dist.world_size)) as batches,
        ):
            measures = logger.last_evaluation() if first_step else self.evaluate(heldout, logger, 0)
            for step, batch in enumerate(batches, first_step + 1):
                output = self.step(step, batch)
                self.skipped_steps.add(step, output.grad_norm)
                logger.advance(train.batch)
                skipped += batch.skipped
                masked += output.masked

                log, evaluate, save = (
                    step == train.steps or step % every == 0
                    for every in (train.log_every, train.evaluate_every, train.save_every)
                )
                stop = dist.any(bool(self.signals))
                if not (log or evaluate or save or stop or self.skipped_steps.is_due):
                    continue  # nothing waits for the device
                self.skipped_steps.update()
                diverged = self.skipped_steps.too_many
                skip_report.add([one for by_rank in dist.gather(skipped) for one in by_rank])
                self.mask_report.add([one for by_rank in dist.gather(masked) for one in by_rank])
                skipped, masked = [], []
                if log:
                    terms = dist.means(output.terms | {"loss": output.loss})
                    terms["skipped_steps"] = self.skipped_steps.total
                    logger.train(step, terms, self.optimizers.lr(step), output.grad_norm.item())
                if evaluate:
                    measures = self.evaluate(heldout, logger, step)
                if save or stop or diverged:
                    self.save(step)
                if diverged:
                    raise self.skipped_steps.error(recipe.out / "checkpoints" / NAME.format(step))
                if stop:
                    break
        stop_if_signalled(self.signals, dist, f"the checkpoint of step {step} is saved: continue with --resume")
        self.optimizers.load_ema()
        self.mask_report.log_counts()
        return measures | {"heldout": len(heldout)}

    def with_targets(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Features]]]:
        """Each batch with the teacher features that the student is trained to predict; the same on every rank."""
        for batch in (batch.to(self.dist.device) for batch in batches):
            stop_if_signalled(self.signals, self.dist, NOTHING_IS_LOST)
            features = self.step.teacher_features(batch)
            self.mask_report.add(masked_images(features, batch, self.teachers.sources))
            yield batch, {tap: features[tap] for tap in self.student.taps}

    def calibrate(self) -> None:
        """Fit the standardizers on the first images; every rank does the same, to the same bits."""
        transfer, batch_size = self.recipe.transfer, self.recipe.train.batch
        if transfer.standardize == "none":
            return
        steps = -(-transfer.calibration_images // batch_size)
        images = steps * batch_size
        self.dist.log(f"fitting the standardizers ({transfer.standardize}) on {images} images")
        # the same sizes on any number of ranks: a rounding difference may turn an eigenvector, and with it the targets
        batches = (part for batch in self.batches.training(0, steps) for part in batch.split(MAX_IMAGES))
        features = (targets for _, targets in self.with_targets(batches))
        fit_standardizers(self.student, features, images, self.mask_report.names)

    def evaluate(self, heldout: HeldOutSet, logger: MetricLogger, step: int) -> dict[str, float]:
        """Measure the student, with averaged weights where they are kept, on the held-out images."""
        self.module.eval()
        with self.step.autocast(), self.optimizers.ema_weights(), unsharded(self.module):
            numbers, per_teacher = heldout.measure(self.student, self.dist.device)
        logger.evaluation(step, numbers, per_teacher)
        return numbers

    def save(self, step: int) -> None:
        """Save a checkpoint of this step."""
        tensors = gather_state(self.optimizers.tensors(), self.dist)
        if self.dist.is_main:
            seconds = self.elapsed + time.perf_counter() - self.started_at
            state = self.invariants | {"seconds": seconds, "skipped_steps": self.skipped_steps.total}
            save_checkpoint(self.recipe.out / "checkpoints", step, tensors, state, self.recipe.train.keep_checkpoints)
        self.dist.barrier()

    def resume(self) -> int:
        """Load the latest valid checkpoint and return its step; 0 where there is none.

        Raises:
            DataError: no checkpoint is valid, or the models, images or precision are not the same any more.
        """
        checkpoint = load_newest(self.recipe.out / "checkpoints", self.dist.log)
        if checkpoint is None:
            self.dist.log(f"{self.recipe.out}: no checkpoint to resume from; starting with the first step")
            return 0
        tensors, state = checkpoint
        check_invariants(self.recipe.out, state, self.invariants)
        self.optimizers.restore(tensors)
        self.elapsed = state.get("seconds", 0.0)
        self.skipped_steps.total = state.get("skipped_steps", 0)
        return int(state["step"])

    def open_reports(self, first_step: int) -> SkipReport:
        """The report of unreadable images; a run from the first step starts a new one, and a new `mask_report`."""
        path = self.recipe.out / "skipped.jsonl"
        if first_step:
            self.mask_report.resume()
        else:
            self.mask_report.restart()
            if self.dist.is_main:
                path.unlink(missing_ok=True)  # the images may have been repaired since an earlier attempt
        self.dist.barrier()
        max_unreadable = self.recipe.images.max_unreadable
        return SkipReport(path, len(self.images.collection), max_unreadable, self.dist.is_main)
