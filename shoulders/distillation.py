"""The story: images -> teachers -> features -> transfer <- student. Read it straight down.

The order of images, their views, the dropping of teachers and the schedule are pure functions of (seed, step), so
a run that was killed needs one integer and the tensors that learn to go on bit for bit.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoulders.config.recipe import Recipe, as_recipe, as_size, dump_recipe
from shoulders.distributed.context import DistContext, init_distributed
from shoulders.distributed.device import use_bf16
from shoulders.distributed.sharding import gather_state, sync_gradients, unsharded, wrap_model
from shoulders.distributed.signals import catch_signals
from shoulders.errors import DataError, Interrupted, NumericError, RecipeError
from shoulders.feature_cache import open_cache
from shoulders.features import Batch, Features, Skipped, in_order
from shoulders.images import ImageSet, SkipReport, batches, evaluation_batches, open_images
from shoulders.model import save_student
from shoulders.storage.atomic import write_folder, write_text
from shoulders.storage.locks import run_lock
from shoulders.storage.results import read_rows, upsert_results
from shoulders.teachers import AnyTeachers, Teacher, Teachers, load_teacher
from shoulders.teachers.heads import Head, load_head
from shoulders.teachers.heads.post_process import check_processor
from shoulders.training.checkpoint import fingerprint, load_newest, save_checkpoint
from shoulders.training.heldout import HeldOutSet
from shoulders.training.logger import MetricLogger
from shoulders.training.module import DistillationModule
from shoulders.training.optimizers import Optimizers
from shoulders.training.preflight import check, check_heldout, check_out
from shoulders.training.student import init_student
from shoulders.transfer.losses import BASE
from shoulders.transfer.projectors import teacher_name
from shoulders.transfer.standardize import Moments


def distill(
    recipe: Recipe | Path | str, *, own: Mapping[str, Teacher] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Distil the recipe's teachers into one student; everything it leaves is in the folder ``recipe.out``.

    Args:
        recipe: a recipe, or its file.
        own: teachers beside those of the recipe, as modules of your own, by name.
        resume: go on from the newest checkpoint in ``recipe.out`` that verifies.

    Returns:
        A summary: out, steps, seconds, and the last held-out measures.

    Raises:
        RecipeError: if the recipe cannot work, or another process is at work in ``out``; before any weight is loaded.
        DataError: if too many images are unreadable, or no checkpoint verifies.
        NumericError: if the loss is no longer finite.
        SpaceError: if the disk is full.
        Interrupted: after SIGTERM or SIGINT, with a checkpoint saved.
    """
    recipe, started = as_recipe(recipe), time.perf_counter()
    with init_distributed() as dist, ExitStack() as held:
        check(recipe, own or {}, dist, resume)
        dist.barrier()  # nobody writes before all have checked
        held.enter_context(run_lock(recipe.out, dist))
        check_out(recipe, resume)  # once more: another run may have ended there since
        if dist.is_main:
            write_text(recipe.out / "recipe.yaml", dump_recipe(recipe))
        if resume and _finished(recipe):
            dist.log(f"{recipe.out} is finished already")
            return _summary_of(recipe)
        run = prepare(recipe, own or {}, dist)
        heads = kept_heads(recipe, run.teachers, dist)  # what cannot be kept is not found out after the last step
        measures = run.train(resume)
        seconds = run.before + time.perf_counter() - started
        summary = {"out": str(recipe.out), "steps": recipe.train.steps, "seconds": seconds}
        summary |= measures
        weights = gather_state(run.student.state_dict(), dist)
        if dist.is_main:
            write_folder(recipe.out / "student", partial(save_student, run.student, heads=heads, weights=weights))
            upsert_results(recipe.out / "results.json", _rows(summary))
        dist.barrier()
        return summary


def prepare(recipe: Recipe, own: Mapping[str, Teacher], dist: DistContext) -> Run:
    """Open the images, load the teachers or their cache, and bring a student into the world."""
    images = open_images(recipe.images, recipe.train.seed)
    check_heldout(recipe, images)
    bf16 = use_bf16(recipe.train.precision, dist.device)
    teachers = open_cache(recipe, own, images, bf16, dist) or Teachers(
        {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()} | dict(own),
        bf16=bf16,
        sources={name: images.collection.source_indices(names) for name, names in recipe.teacher_sources.items()},
    )
    torch.manual_seed(recipe.train.seed)
    learner = DistillationModule(init_student(recipe, teachers), recipe)
    dist.log(f"{len(images)} images to learn from, {len(images.heldout)} held out; base {recipe.student.base}")
    for tap, facts in teachers.taps.items():
        dist.log(f"  {tap}: summary {facts.summary or '-'}, spatial {facts.spatial or '-'} on {facts.grid}")
    return Run(recipe, learner, teachers, images, dist)


RESUME_INVARIANTS = {
    "frozen": "the base, a teacher, or whether teachers are asked live or out of a cache (cache.mode) is not as when",
    "images": "the images are not those that there were when",
    "bf16": "the precision that this machine computes in (train.precision) is not the one it was when",
}
FEWEST = 4  # that a statistic is taken of
ASKED_AT_ONCE = 16  # images that teachers see together outside of training steps: few, for the largest of them


class Run:
    """One run in progress: images, teachers and the student's state, and the loop over them."""

    def __init__(
        self,
        recipe: Recipe,
        learner: DistillationModule,
        teachers: AnyTeachers,
        images: ImageSet,
        dist: DistContext,
    ):
        self.recipe, self.learner, self.teachers, self.images, self.dist = recipe, learner, teachers, images, dist
        self.student = learner.student
        self.size = as_size(recipe.images.size)
        self.sizes = sorted({self.size, *teachers.sizes})  # images are decoded for all of them, cached or live
        self.drawn = sorted({self.size, *teachers.render_sizes})
        self.before, self.began = 0.0, time.perf_counter()  # seconds of earlier legs of this run; of this one
        own = self.student.config.mean, self.student.config.std
        self.frozen = fingerprint(
            self.student.encoder.base, teachers, facts=(teachers.taps, teachers.sizes, teachers.preprocessing(), own)
        )
        self.module = wrap_model(learner, self.student.encoder.base, teachers, recipe.train.parallel, dist)
        self.optimization = Optimizers(learner, recipe.train)  # of what this rank holds of them
        self.finite = torch.ones((), dtype=torch.bool, device=dist.device)
        self.autocast = partial(torch.autocast, dist.device.type, torch.bfloat16, enabled=teachers.bf16)
        self.forward: Callable[..., Any] = self.module
        if recipe.train.compile and recipe.teacher_sources:
            # how many images a teacher is asked about changes from step to step: what meets them would be compiled anew
            self.student.forward_features = torch.compile(self.student.forward_features)  # type: ignore[method-assign]
        elif recipe.train.compile:
            self.forward = torch.compile(self.module)

    def train(self, resume: bool) -> dict[str, float]:
        """From the first step, or the newest checkpoint, to the last. Returns the last held-out measures."""
        train, dist = self.recipe.train, self.dist
        first = self._resume() if resume else 0
        if first == 0:
            self.calibrate()
        dist.log(f"asking the teachers about {len(self.images.heldout)} held-out images")
        heldout = HeldOutSet(self._taught(self._heldout_batches()), self.student, self.size)
        bad = self.recipe.out / "skipped.jsonl"
        if first == 0 and dist.is_main:
            bad.unlink(missing_ok=True)  # of an earlier try: what was wrong then may have been put right
        dist.barrier()
        report = SkipReport(bad, len(self.images.collection), self.recipe.images.max_unreadable, dist.is_main)
        report.add(heldout.skipped)
        skipped: list[Skipped] = []
        with (
            catch_signals() as asked,
            MetricLogger(self.recipe.out, first, train, dist.is_main) as journal,
            closing(self._batches(first, train.steps, dist.rank, dist.world_size)) as stream,
        ):
            measures = journal.last_evaluation() if first else self._evaluate(heldout, journal, 0)
            for step, batch in enumerate(stream, first + 1):
                loss, terms, norm = self.step(step, batch)
                journal.advance(train.batch)
                skipped += batch.skipped

                log, evaluate, save = (
                    step == train.steps or step % every == 0
                    for every in (train.log_every, train.evaluate_every, train.save_every)
                )
                stop = dist.any(bool(asked))
                if not (log or evaluate or save or stop):
                    continue  # nothing waits for the device
                report.add([skip for said in dist.gather(skipped) for skip in said])
                skipped = []
                self._stop_unless_finite(step)
                if log:
                    journal.train(step, dist.means(terms | {"loss": loss}), self.optimization.lr(step), norm.item())
                if evaluate:
                    measures = self._evaluate(heldout, journal, step)
                if save or stop:
                    self._save(step)
                if stop and step < train.steps:
                    raise Interrupted(asked[0] if asked else signal.SIGTERM, step)
        self.optimization.load_ema()
        return measures | {"heldout": len(heldout)}

    def step(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """One update from one batch, in ``accumulate`` parts. Nothing here waits for the device."""
        self.learner.train()
        parts = batch.to(self.dist.device).split(len(batch) // self.recipe.train.accumulate)
        losses, told = [], []
        for i, (part, coins) in enumerate(zip(parts, self._coins(step).chunk(len(parts)), strict=True)):
            taught = self.teach(part)
            with self.autocast(), sync_gradients(self.module, i == len(parts) - 1):
                loss, terms = self.forward(part.pixels(self.size), taught, coins)
                (loss / len(parts)).backward()
            losses.append(loss.detach())
            told.append(terms)
        norm = self.optimization.step(step)
        self.finite &= torch.isfinite(norm)
        terms = {name: torch.stack([terms[name] for terms in told]).nanmean() for name in told[0]}
        return torch.stack(losses).mean(), terms, norm

    def teach(self, batch: Batch) -> dict[str, Features]:
        """What the teachers say of the batch; the base is one of them where it is to be preserved, or only read."""
        taught = self.teachers(batch)
        missing = [place for place in self.student.base_layers if f"{BASE}/{place}" not in taught]
        if missing:
            with self.autocast():
                said = self.student.encoder.base_features(batch.pixels(self.size), missing)
            taught |= {f"{BASE}/{place}": features.map(torch.Tensor.float) for place, features in said.items()}
        return {tap: features.map(in_order) for tap, features in taught.items()}

    def _taught(self, stream: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Features]]]:
        for batch in (batch.to(self.dist.device) for batch in stream):
            taught = self.teach(batch)
            yield batch, {tap: taught[tap] for tap in self.student.taps}

    def _batches(self, first: int, steps: int, rank: int, world_size: int) -> Generator[Batch, None, None]:
        """A rank's part of the training batches of steps (first, steps]."""
        train = self.recipe.train
        return batches(
            self.images,
            self.drawn,
            self.recipe.images,
            batch=train.batch,
            seed=train.seed,
            first_step=first,
            steps=steps - first,
            rank=rank,
            world_size=world_size,
            decode_sizes=self.sizes,
        )

    def _heldout_batches(self) -> Iterator[Batch]:
        how = self.recipe.images
        return evaluation_batches(
            self.images.collection,
            self.drawn,
            ASKED_AT_ONCE,
            self.images.heldout,
            how.workers,
            how.max_pixels,
            self.sizes,
            self.size,
        )

    def _coins(self, step: int) -> Tensor:
        """(B, T) uniform numbers of this rank's images, a pure function of (seed, step)."""
        generator = torch.Generator().manual_seed(self.recipe.train.seed * 1_000_003 + step)
        coins = torch.rand(self.recipe.train.batch, len(self.learner.weights), generator=generator)
        return coins.chunk(self.dist.world_size)[self.dist.rank].to(self.dist.device)

    def calibrate(self) -> None:
        """Fit the standardizers on the first ``calibration`` images; every rank does the same, to the same bits."""
        how, train = self.recipe.transfer, self.recipe.train
        if how.standardize == "none":
            return
        moments: dict[str, dict[str, Moments]] = {}
        images: Counter[str] = Counter()  # by tap
        steps = -(-how.calibration_images // train.batch)
        self.dist.log(f"fitting the standardizers ({how.standardize}) on {steps * train.batch} images")
        # parts of one size whatever the ranks: a rounding difference may turn an eigenvector, and with it the targets
        parts = (part for batch in self._batches(0, steps, 0, 1) for part in batch.split(ASKED_AT_ONCE))
        for _, taught in self._taught(parts):
            for tap, features in taught.items():
                images[tap] += features.batch_size
                for part, x in features.components().items():
                    moments.setdefault(tap, {}).setdefault(part, Moments(x.shape[-1])).update(x)
        for tap in self.student.taps:
            if images[tap] < FEWEST:
                raise DataError(
                    f"teachers.{teacher_name(tap)}.sources: {images[tap] or 'none'} of the {steps * train.batch} images "
                    "that the statistics are estimated on come from there; raise transfer.calibration_images, or the share of "
                    "these"
                )
            if not all(one.mean.isfinite().all() for one in moments[tap].values()):
                raise NumericError(f"{tap}: what is said of some images is not finite; check its weights and its size")
            self.student.standardizer(tap).fit(moments[tap])

    def _evaluate(self, heldout: HeldOutSet, journal: MetricLogger, step: int) -> dict[str, float]:
        self.learner.eval()
        with self.autocast(), self.optimization.ema_weights(), unsharded(self.learner):
            numbers, per_teacher = heldout.measure(self.student, self.dist.device)
        journal.evaluation(step, numbers, per_teacher)
        return numbers

    def _stop_unless_finite(self, step: int) -> None:
        if self.dist.any(not self.finite.item()):
            raise NumericError(
                f"the gradients are no longer finite at step {step}; start again in another out with a lower train.lr "
                f"or train.precision=fp32, or look at what the teachers say"
            )

    def _save(self, step: int) -> None:
        tensors = gather_state(self.optimization.tensors(), self.dist)
        if self.dist.is_main:
            folder = self.recipe.out / "checkpoints"
            state = self._began_with() | {"seconds": self.before + time.perf_counter() - self.began}
            save_checkpoint(folder, step, tensors, state, self.recipe.train.keep_checkpoints)
        self.dist.barrier()

    def _began_with(self) -> dict[str, Any]:
        """What a run that goes on must find again, beside its recipe."""
        ids = self.images.collection.ids
        images = hashlib.sha256(np.sort(ids).tobytes()).hexdigest()
        return {"frozen": self.frozen, "images": images, "bf16": self.teachers.bf16}

    def _resume(self) -> int:
        """The step of the newest checkpoint that verifies, after taking its tensors; 0 where there is none."""
        saved = load_newest(self.recipe.out / "checkpoints", self.dist.log)
        if saved is None:
            self.dist.log(f"{self.recipe.out}: no checkpoint to go on from; starting with the first step")
            return 0
        tensors, state = saved
        now = self._began_with()
        for what, words in RESUME_INVARIANTS.items():
            if state.get(what, now[what]) != now[what]:
                raise DataError(f"{self.recipe.out}: {words} this run began")
        self.optimization.restore(tensors)
        self.before = state.get("seconds", 0.0)
        return int(state["step"])


def kept_heads(recipe: Recipe, teachers: AnyTeachers, dist: DistContext) -> dict[str, Head]:
    """The heads that the student will keep, from their teachers' own checkpoints; on the rank that writes them.

    Raises:
        RecipeError: a head cannot be cut off.
        DataError: weights of a head are missing or broken.
    """
    heads = {name: load_head(name, recipe.teachers[name], teachers[name]) for name in recipe.keep_heads}
    for name, head in heads.items():
        try:
            check_processor(head)
        except RecipeError as error:  # the head itself can be kept and asked in Python
            dist.log(f"keep_heads: {name}: {error}")
    return heads if dist.is_main else {}


def _rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of results.json out of a run's summary."""
    common = {"model": "student", "task": "inheritance", "n": summary["heldout"], "seconds": summary["seconds"]}
    return [common | {"metric": name, "value": value} for name, value in summary.items() if name.startswith("fvu")]


def _finished(recipe: Recipe) -> bool:
    """A student is written after the last step alone, and its rows after it."""
    return (recipe.out / "student").exists() and bool(_inherited(recipe))


def _inherited(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows that the end of a run left."""
    return [row for row in read_rows(recipe.out / "results.json") if row["task"] == "inheritance"]


def _summary_of(recipe: Recipe) -> dict[str, Any]:
    """The summary of a finished run, out of what it left."""
    rows = _inherited(recipe)
    summary = {"out": str(recipe.out), "steps": recipe.train.steps, "seconds": rows[0]["seconds"]}
    return summary | {"heldout": rows[0]["n"]} | {row["metric"]: row["value"] for row in rows}
