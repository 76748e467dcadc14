"""A step whose loss or gradient is not finite changes nothing on any rank; ten in a row end the run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distillation import Trainer, distill, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import NumericError
from shoulders.training.checkpoint import checkpoints, load_checkpoint
from shoulders.training.skipped_steps import SkippedSteps
from tests.marked import all_finite, mark_images, marked_teacher
from tests.tiny import metric_rows, same_tensors, save_images, student_weights, tiny_recipe, tiny_tree

SINGLE_PROCESS = DistContext(0, 1, torch.device("cpu"))
STEPS = 5
OVERFLOW = 1e25  # its square is not finite in float32
# of a loss that overflows where features do
RAW = {"transfer__standardize": "none", "transfer__distance": "mse", "transfer__t2s": "none"}


def nan_loss(trainer: Trainer) -> Callable[[], None]:
    return trainer.module.register_forward_hook(lambda module, args, output: (output[0] * math.nan, output[1])).remove


def infinite_constant(trainer: Trainer) -> Callable[[], None]:
    """The loss is not finite, but its gradients would be."""
    return trainer.module.register_forward_hook(lambda module, args, output: (output[0] + math.inf, output[1])).remove


def nan_gradient(trainer: Trainer) -> Callable[[], None]:
    parameter = list(trainer.optimizers.parameters.values())[-1]
    return parameter.register_hook(lambda gradient: gradient * math.nan).remove


def state_after(trainer: Trainer, bad_step: int, poison: Callable[[Trainer], Callable[[], None]] | None) -> Any:
    """All tensors of a checkpoint after some steps; without ``poison`` the bad step is left out."""
    trainer.calibrate()
    norms = []
    for number, batch in enumerate(trainer.batches.training(0, STEPS), 1):
        if number == bad_step and poison is None:
            continue
        restore = poison(trainer) if number == bad_step and poison else lambda: None
        norms.append(trainer.step(number, batch).grad_norm.isfinite().item())
        restore()
    return {name: x.detach().clone() for name, x in trainer.optimizers.tensors().items()}, norms


@pytest.mark.parametrize("bad_step", [1, 3])
@pytest.mark.parametrize(
    ("poison", "train"),
    [
        (nan_loss, {"optimizer": "adamw", "ema": 0.9}),
        (infinite_constant, {"optimizer": "muon", "ema": 0.9, "accumulate": 2}),
        (nan_gradient, {"optimizer": "muon", "ema": 0.5}),
    ],
)
def test_a_step_that_is_not_finite_moves_nothing(
    tiny_world: Path,
    tmp_path: Path,
    poison: Callable[[Trainer], Callable[[], None]],
    train: dict[str, Any],
    bad_step: int,
) -> None:
    """Weights, averages and the state of the optimizer are those of a run without that step, bit for bit."""
    changes = {f"train__{key}": value for key, value in train.items()}
    poisoned, reference = (
        state_after(prepare(tiny_recipe(tiny_world, tmp_path, **changes), {}, SINGLE_PROCESS), bad_step, one)
        for one in (poison, None)
    )
    assert poisoned[1] == [number != bad_step for number in range(1, STEPS + 1)]
    assert same_tensors(poisoned[0], reference[0]) and all_finite(poisoned[0])


def overflowing(root: Path, out: Path, **changes: Any) -> Recipe:
    return tiny_recipe(root, out, **{**RAW, "train__steps": 40, "train__save_every": 4, **changes})


def test_ten_steps_in_a_row_end_the_run_and_resuming_goes_past_them(tiny_world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    teachers = {"own": marked_teacher(OVERFLOW, everywhere=True, spread=True)}
    for last in (10, 20):
        with pytest.raises(NumericError, match=rf"in 10 steps in a row, .*step-000000{last}: --resume") as error:
            distill(overflowing(tiny_world, out, train__log_every=7), extra_teachers=teachers, resume=last > 10)
        assert error.value.exit_code == 4 and "\n" not in str(error.value)
        tensors, state = load_checkpoint(checkpoints(out / "checkpoints")[-1])
        assert (state["step"], state["skipped_steps"]) == (last, last)
        assert all_finite(tensors)


def test_a_batch_that_overflows_costs_its_step_alone(tiny_world: Path, tmp_path: Path, capsys: Any) -> None:
    save_images(tmp_path / "images", 60)
    changes = {"images__path": str(tmp_path / "images"), "train__steps": 12}
    (name,) = mark_images(overflowing(tiny_world, tmp_path, **changes), training=1, heldout=0)
    recipe = overflowing(tiny_world, tmp_path / "run", **changes)
    distill(recipe, extra_teachers={"own": marked_teacher(OVERFLOW)})
    trainer = prepare(recipe, {"own": marked_teacher(OVERFLOW)}, SINGLE_PROCESS)
    bad = [
        number
        for number, batch in enumerate(trainer.batches.training(0, 12), 1)
        if name in map(trainer.images.collection.name_of_id, batch.ids.tolist())
    ]
    rows = metric_rows(tmp_path / "run")
    assert 1 <= len(bad) <= 2
    assert [row["skipped_steps"] for row in rows] == [sum(one <= row["step"] for one in bad) for row in rows]
    assert [row["step"] for row in rows if "loss" not in row] == bad
    assert f"no update in step {bad[0]}: the loss or a gradient is not finite" in capsys.readouterr().err
    assert all_finite(student_weights(tmp_path / "run"))


def test_a_spike_of_the_loss_is_clipped_and_logged(tiny_world: Path, tmp_path: Path) -> None:
    """Features of one image that are a million times too large: a finite loss and gradient, whose update is clipped."""
    save_images(tmp_path / "images", 60)
    changes = {"images__path": str(tmp_path / "images"), "train__steps": 8}
    recipe = overflowing(tiny_world, tmp_path / "run", **changes)
    mark_images(recipe, training=1, heldout=0)
    distill(recipe, extra_teachers={"own": marked_teacher(1e6)})
    rows = metric_rows(tmp_path / "run")
    assert all(row["skipped_steps"] == 0 for row in rows)
    losses = sorted(row["loss"] for row in rows)
    assert losses[-1] > 1e9 and losses[0] < 100
    assert max(row["gradient_norm"] for row in rows) > 1e3
    before, after = student_weights(tmp_path / "run"), prepare(recipe, {"own": marked_teacher(1e6)}, SINGLE_PROCESS)
    initial = after.student.state_dict()
    moved = max(float((x - initial[name]).abs().max()) for name, x in before.items() if name in initial)
    assert all_finite(before) and moved < 0.1  # at most the sum of the learning rates of 8 steps, and no more


def test_a_streak_counts_over_several_updates() -> None:
    lines: list[str] = []
    steps = SkippedSteps(lines.append, total=2)
    norms = [1.0, math.nan, 2.0, *[math.inf] * 9, 3.0, *[math.nan] * 10]
    ended = []
    for number, norm in enumerate(norms, 1):
        steps.add(number, torch.tensor(norm))
        if number % 4 == 0 or steps.is_due:
            steps.update()
        ended.append(steps.too_many)
    assert ended == [False] * (len(norms) - 1) + [True]
    assert steps.total == 2 + 20
    assert lines[0] == "no update in step 2, 4: the loss or a gradient is not finite (4 steps so far)"


# The program of a rank: the same steps with and without a bad one on rank 1, and two runs of a bad teacher.
RANK = """
import faulthandler, importlib, json, math, sys
from contextlib import nullcontext
from pathlib import Path

faulthandler.dump_traceback_later(200, exit=True)  # ranks have sessions of their own, which a test cannot end
from shoulders.config.recipe import check_recipe
from shoulders.distributed.context import init_distributed
from shoulders.distributed.sharding import gather_state
from shoulders.errors import NumericError
from tests.marked import all_finite, marked_teacher
from tests.tiny import same_tensors

distillation = importlib.import_module("shoulders.distillation")
trees = json.loads(Path(sys.argv[1]).read_text())


def state_after(tree, dist, poisoned):
    trainer = distillation.prepare(check_recipe(tree), {}, dist)
    trainer.calibrate()
    for number, batch in enumerate(trainer.batches.training(0, 5, dist.rank, 2), 1):
        if number == 3 and not poisoned:
            continue
        factor = math.nan if number == 3 and dist.rank == 1 else 1.0
        hook = trainer.step.wrapped.register_forward_hook(lambda module, args, out: (out[0] * factor, out[1]))
        norm = trainer.step(number, batch).grad_norm
        assert norm.isfinite() == (number != 3)
        hook.remove()
    return gather_state({name: x.clone() for name, x in trainer.optimizers.tensors().items()}, dist)


with init_distributed() as dist:
    for tree in trees["steps"]:
        one, other = (state_after(tree, dist, poisoned) for poisoned in (True, False))
        assert same_tensors(one, other) and all_finite(one)
        assert not dist.is_main or len(one) > 20
    distillation.init_distributed = lambda: nullcontext(dist)
    if trees["masked"]:
        distillation.distill(check_recipe(trees["masked"]), extra_teachers={"own": marked_teacher(math.nan)})
        try:
            own = marked_teacher(1e25, everywhere=True, spread=True)
            distillation.distill(check_recipe(trees["overflowing"]), extra_teachers={"own": own})
        except NumericError as error:
            assert "in 10 steps in a row" in str(error)
        else:
            raise AssertionError
"""


def run_on_two_ranks(trees: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(trees))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    command += [sys.executable, "-W", "ignore", "-c", RANK, str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]


def step_trees(root: Path, out: Path, *kinds: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        tiny_tree(root, out, train__parallel=kind, train__ema=0.9, train__optimizer=optimizer)
        for kind, optimizer in kinds
    ]


@pytest.mark.timeout(300)
def test_a_loss_that_is_not_finite_on_one_of_two_ranks_moves_nothing(tiny_world: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "images", 60)
    images = {"images__path": str(tmp_path / "images")}
    masked = tiny_tree(tiny_world, tmp_path / "masked", train__steps=7, **images)
    names = mark_images(check_recipe(masked), training=2, heldout=1)
    overflow = tiny_tree(tiny_world, tmp_path / "overflowing", train__steps=30, **RAW)
    trees = {"steps": step_trees(tiny_world, tmp_path, ("ddp", "muon")), "masked": masked, "overflowing": overflow}
    run_on_two_ranks(trees, tmp_path / "trees.json")
    rows = [json.loads(line) for line in (tmp_path / "masked" / "not_finite.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == sorted(names)  # of both ranks
    assert all_finite(student_weights(tmp_path / "masked"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loss_that_is_not_finite_on_one_of_two_ranks_moves_no_shard(tiny_world: Path, tmp_path: Path) -> None:
    trees = step_trees(tiny_world, tmp_path, ("fsdp", "muon"), ("fsdp", "adamw"))
    run_on_two_ranks({"steps": trees, "masked": None}, tmp_path / "trees.json")
