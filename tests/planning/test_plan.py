"""An estimate: a run takes what it predicts, it leaves nothing behind, and its suggestions apply."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distillation import Trainer, distill, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.feature_cache import build_cache
from shoulders.planning import plan
from shoulders.planning.advice import Measurements, suggestions
from shoulders.planning.watch import (
    BACKWARD,
    BASE,
    CACHE,
    DECODE,
    FORWARD,
    OPTIMIZER,
    REST,
    TRANSFER,
    WAITING,
    StopWatch,
    measure_steps,
    medians,
    timed,
)
from shoulders.training.checkpoint import checkpoints
from tests.teachers.heads.test_saved import save_teacher
from tests.tiny import run_cli, save_base, save_convnext, save_images, tiny_recipe

HERE = DistContext(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a teacher, one whose head is kept, 60 images, and a finished run."""
    root = tmp_path_factory.mktemp("plan")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_teacher("segformer", root / "segmenter")
    save_images(root / "images", 60)
    distill(recipe_of(root))
    return root


def recipe_of(root: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "teachers__segmenter": {"model": str(root / "segmenter")},
        "images__workers": 1,
        "train__steps": 6,
        "train__save_every": 2,
        "train__evaluate_every": 3,
        "train__ema": 0.9,
        "keep_heads": ["segmenter"],
    }
    return tiny_recipe(root, **settings | changes)


def contents(folder: Path) -> dict[str, int]:
    """Size of every file and folder below a folder, by name."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_estimate_is_what_a_run_takes_and_leaves_nothing_behind(world: Path) -> None:
    before = contents(world)
    estimate = plan(recipe_of(world))  # although its folder holds a run
    assert contents(world) == before
    parts = {part["part"]: part["s"] for part in estimate["parts"]}
    in_order = [
        WAITING,
        "teacher classifier",
        "teacher segmenter",
        BASE,
        FORWARD,
        TRANSFER,
        BACKWARD,
        OPTIMIZER,
        REST,
    ]
    assert list(parts) == in_order
    assert all(seconds > 0 for seconds in parts.values()) and estimate["decode"]["s_per_batch"] > 0
    # both are whole steps, one timed part by part, on a machine that does other things too
    assert 0.1 < sum(parts.values()) / estimate["step_s"] < 10
    assert estimate["images_per_s"] == pytest.approx(8 / estimate["step_s"])

    run = world / "run"
    disk = estimate["disk"]
    kept = checkpoints(run / "checkpoints")
    assert disk["checkpoints"] == len(kept) == 2 and disk["cache_bytes"] == 0
    assert disk["checkpoint_bytes"] == pytest.approx(size_of(kept[0]), rel=0.05)
    assert disk["student_bytes"] == pytest.approx(size_of(run / "student"), rel=0.05)
    assert disk["run_bytes"] == 2 * disk["checkpoint_bytes"] + disk["student_bytes"] < disk["free_bytes"]
    assert (
        2**27 < estimate["memory"]["peak_bytes"] < estimate["memory"]["available_bytes"]
        and estimate["memory"]["accumulate"] == 1
    )
    hours = estimate["hours"]
    assert hours["steps"] == pytest.approx(6 * estimate["step_s"] / 3600)
    assert hours["total"] == pytest.approx(hours["steps"] + hours["before"] + hours["measures"])
    assert json.loads(json.dumps(estimate, allow_nan=False))["memory"] == estimate["memory"]


def slow(*_: Any) -> None:
    time.sleep(0.05)


def watched(trainer: Trainer) -> dict[str, float]:
    """Median seconds of the parts of a step."""
    watch = StopWatch(HERE.device)
    return medians(measure_steps([timed(trainer.step, watch)], trainer.batches, watch)[0])


@pytest.mark.parametrize("adapter", [{"kind": "bottleneck", "width": 8}, {"kind": "side", "width": 8, "blocks": 2}])
def test_every_second_belongs_to_the_part_that_took_it(world: Path, adapter: dict[str, Any]) -> None:
    trainer = prepare(recipe_of(world, images__workers=0, student__adapter=adapter), {}, HERE)
    linear = next(part for part in trainer.student.encoder.adapter.modules() if isinstance(part, torch.nn.Linear))
    optimizer = trainer.optimizers.optimizer.optimizers[0]
    teacher = trainer.teachers["classifier"]
    slowed = {
        "teacher classifier": lambda: teacher.module.register_forward_hook(slow),
        FORWARD: lambda: linear.register_forward_hook(slow),
        BACKWARD: lambda: linear.weight.register_hook(slow),
        TRANSFER: lambda: next(trainer.student.projectors.parameters()).register_hook(slow),
        OPTIMIZER: lambda: optimizer.register_step_pre_hook(slow),
    }
    for part, slow_down in slowed.items():
        handle = slow_down()
        seconds = watched(trainer)
        handle.remove()
        assert seconds.keys() == {DECODE, BASE, REST, "teacher segmenter", *slowed}
        assert seconds[part] >= 0.05


def test_a_stop_watch_is_detached_after_its_step(world: Path) -> None:
    trainer = prepare(recipe_of(world, images__workers=0), {}, HERE)
    watch = StopWatch(HERE.device)
    (batch,) = trainer.batches.training(0, 1)
    timed(trainer.step, watch)(1, batch)
    assert FORWARD in watch.spent
    watch.start()
    trainer.step(2, batch)
    assert not watch.spent


def test_a_timed_step_is_the_same_step(world: Path) -> None:
    losses = []
    for time_it in (False, True):
        trainer = prepare(recipe_of(world, images__workers=0), {}, HERE)
        step = timed(trainer.step, StopWatch(HERE.device)) if time_it else trainer.step
        for number, batch in enumerate(trainer.batches.training(0, 2), 1):
            step(number, batch)
        losses.append(trainer.step.backward(3, batch)[0])
    assert torch.equal(*losses)


def test_a_cached_run_is_estimated_from_its_cache(world: Path, tmp_path: Path) -> None:
    cached = {"cache": {"path": str(tmp_path / "cache")}, "images__views": 1, "keep_heads": []}
    live = plan(recipe_of(world, **cached))
    assert live["disk"]["cache_bytes"] == 0 and not (tmp_path / "cache").exists()
    build_cache(recipe_of(world, **cached))
    before = contents(tmp_path)
    estimate = plan(recipe_of(world, **cached))
    assert contents(tmp_path) == before
    assert [part["part"] for part in estimate["parts"]] == [
        WAITING,
        CACHE,
        FORWARD,
        TRANSFER,
        BACKWARD,
        OPTIMIZER,
        REST,
    ]
    shards = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin"))
    assert (
        estimate["disk"]["cache_bytes"] == shards == live["cache_estimate"]["disk_bytes"]
        and live["cache_estimate"]["views"] == 1
    )
    assert estimate["cache_estimate"] is None
    assert not [
        one for one in estimate["suggestions"] if "cache" in one["reason"] or "precision" in str(one["overrides"])
    ]


def test_a_step_that_does_not_fit_into_memory_is_measured_in_micro_batches(world: Path) -> None:
    estimate = plan(recipe_of(world), available_bytes=2**20)
    assert (
        estimate["memory"]["accumulate"] == 8
        and estimate["memory"]["peak_bytes"] > estimate["memory"]["available_bytes"]
    )
    assert (
        estimate["suggestions"][0]["overrides"] == ("train.accumulate=8",)
        and estimate["suggestions"][0]["saves"] is None
    )


MEASURED = Measurements(
    check_recipe(
        {
            "student": {"base": "b"},
            "teachers": {"big": {"model": "m"}},
            "images": {"path": "p"},
            "out": "runs/x",
        }
    ),
    step_s=1.0,
    parts={"teacher big": 0.3, FORWARD: 0.3, BACKWARD: 0.25, TRANSFER: 0.1, BASE: 0.04, WAITING: 0.01},
    decode_s=0.2,
    cpus=4,
    peak_bytes=10,
    available_bytes=20,
    accumulate=1,
    projector_width=128,
    block_share=0.0,
)
ESTIMATE = {"views": 3, "path": "caches/x", "disk_bytes": 2**31, "minutes": 12.0}
HEAVY = {"teacher big": 0.1, FORWARD: 0.2, BACKWARD: 0.1, TRANSFER: 0.6, WAITING: 0.0}


def with_recipe(measured: Measurements, *changes: str) -> Measurements:
    tree = measured.recipe.model_dump(mode="json")
    for change in changes:
        *parents, last = change.partition("=")[0].split(".")
        here = tree
        for parent in parents:
            here = here[parent]
        here[last] = yaml.safe_load(change.partition("=")[2])
    return replace(measured, recipe=check_recipe(tree))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (MEASURED, {}),
        (replace(MEASURED, peak_bytes=30, accumulate=4), {("train.accumulate=4",): None}),
        (replace(MEASURED, peak_bytes=30), {}),  # no more micro-batches are possible
        (replace(MEASURED, cache=ESTIMATE), {("images.views=3", "cache.path=caches/x"): 0.34}),
        (with_recipe(replace(MEASURED, cache=ESTIMATE), "images.views=3"), {("cache.path=caches/x",): 0.34}),
        (with_recipe(replace(MEASURED, cache=ESTIMATE), "images.views=3", "cache.path=caches/x"), {(): 0.34}),
        # no step is faster than its loader
        (replace(MEASURED, cache=ESTIMATE, decode_s=0.8), {("images.views=3", "cache.path=caches/x"): 0.2}),
        (replace(MEASURED, bf16_s=0.5), {("train.precision=bf16",): 0.49}),
        (replace(MEASURED, bf16_s=0.98), {}),
        (replace(MEASURED, int8_s={"big": 0.2}), {("teachers.big.int8=true",): 0.1}),
        (replace(MEASURED, int8_s={"big": 0.4}), {}),
        (replace(MEASURED, parts={**MEASURED.parts, WAITING: 0.5}, decode_s=1.0), {("images.workers=2",): 0.5}),
        (replace(MEASURED, parts={**MEASURED.parts, WAITING: 0.8}, decode_s=1.0), {("images.workers=4",): 0.75}),
        (replace(MEASURED, parts={**MEASURED.parts, WAITING: 0.5}, decode_s=1.0, cpus=1), {}),
        (
            with_recipe(
                replace(MEASURED, parts={**MEASURED.parts, WAITING: 0.0, DECODE: 0.5}, decode_s=0.5), "images.workers=0"
            ),
            {("images.workers=1",): 0.5},
        ),
        (
            replace(MEASURED, parts=HEAVY, block_share=0.5),
            {
                ("transfer.layers=[latent]",): 0.3,
                ("transfer.projector_width=64",): 0.3,
            },
        ),
        (replace(MEASURED, parts=HEAVY), {("transfer.projector_width=64",): 0.3}),
        (
            with_recipe(
                replace(MEASURED, parts=HEAVY, block_share=0.5, projector_width=1),
                "transfer.layers=[block1, latent]",
                "student.adapter={kind: conv}",
            ),
            {("transfer.layers=[latent]", "student.adapter.blocks=[]"): 0.3},
        ),
        (replace(MEASURED, parts={**MEASURED.parts, BACKWARD: 0.4}), {("student.adapter={kind: side}",): 0.44}),
        (with_recipe(replace(MEASURED, parts={**MEASURED.parts, BACKWARD: 0.4}), "student.adapter={kind: side}"), {}),
    ],
)
def test_suggestions_are_made_exactly_where_they_apply(
    measured: Measurements, expected: dict[tuple[str, ...], float | None]
) -> None:
    by_overrides = {one.overrides: one.saves for one in suggestions(measured)}
    assert by_overrides == {
        overrides: saves if saves is None else pytest.approx(saves) for overrides, saves in expected.items()
    }
    for overrides in by_overrides:
        with_recipe(measured, *overrides)  # each is an override that the recipe takes


def test_suggestions_are_sorted_by_what_they_save() -> None:
    measured = replace(MEASURED, peak_bytes=30, accumulate=2, bf16_s=0.8, cache=ESTIMATE, int8_s={"big": 0.1})
    assert [one.saves for one in suggestions(measured)] == [None, *map(pytest.approx, (0.34, 0.2, 0.19))]


def test_the_command(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(world).model_dump(mode="json")))
    done = run_cli("plan", recipe, "images.workers=0")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["part", "of", "a", "step", "ms", "share"]
    assert [line.split()[0] for line in lines[2:5]] == [DECODE, "teacher", "teacher"]
    for start in ("a whole step", "memory  ", "disk    ", "time    "):
        assert any(line.startswith(start) for line in lines), done.stdout
    done = run_cli("plan", recipe, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["decode"]["workers"] == 1
    for change, message in (
        ("train.stepz=1", "train.stepz: unknown key; did you mean steps?"),
        ("images.size=30", "images.size: "),
        ("teachers.segmenter.taps=[stage7]", "teachers.segmenter.taps: "),
        ("train.accumulate=3", "train.batch: 8 cannot be divided"),
        (f"out={recipe}/x", "out: cannot write to "),
    ):
        done = run_cli("plan", recipe, change)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert message in done.stderr


def test_one_process_is_planned(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process, not 2; start it without torchrun"):
        plan(recipe_of(world))
