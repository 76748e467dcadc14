"""A plan: what it says is what a run then takes, it leaves nothing, and its advice applies."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shoulders.cli import main
from shoulders.config.recipe import Recipe, check_recipe
from shoulders.distillation import distill, prepare
from shoulders.distributed.context import DistContext
from shoulders.errors import RecipeError
from shoulders.feature_cache import build_cache
from shoulders.planning import plan
from shoulders.planning.advice import Facts, suggestions
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
    Watch,
    medians,
    steps,
    watched,
)
from shoulders.training.checkpoint import checkpoints
from tests.teachers.heads.test_saved import save_teacher
from tests.tiny import save_base, save_convnext, save_images, tiny_recipe

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


def test_it_says_what_a_run_takes_and_leaves_nothing(world: Path) -> None:
    before = contents(world)
    told = plan(recipe_of(world))  # although a run is in its folder
    assert contents(world) == before
    parts = {part["part"]: part["s"] for part in told["parts"]}
    one_after_another = [
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
    assert list(parts) == one_after_another
    assert all(seconds > 0 for seconds in parts.values()) and told["decode"]["s_per_batch"] > 0
    # both are whole steps: one with a watch, one without, on a machine that does other things
    assert 0.1 < sum(parts.values()) / told["step_s"] < 10
    assert told["images_per_s"] == pytest.approx(8 / told["step_s"])

    run = world / "run"
    disk = told["disk"]
    kept = checkpoints(run / "checkpoints")
    assert disk["checkpoints"] == len(kept) == 2 and disk["cache_bytes"] == 0
    assert disk["checkpoint_bytes"] == pytest.approx(size_of(kept[0]), rel=0.05)
    assert disk["student_bytes"] == pytest.approx(size_of(run / "student"), rel=0.05)
    assert disk["run_bytes"] == 2 * disk["checkpoint_bytes"] + disk["student_bytes"] < disk["free_bytes"]
    assert (
        2**27 < told["memory"]["peak_bytes"] < told["memory"]["available_bytes"] and told["memory"]["accumulate"] == 1
    )
    hours = told["hours"]
    assert hours["steps"] == pytest.approx(6 * told["step_s"] / 3600)
    assert hours["total"] == pytest.approx(hours["steps"] + hours["before"] + hours["measures"])
    assert json.loads(json.dumps(told, allow_nan=False))["memory"] == told["memory"]


def slow(*_: Any) -> None:
    time.sleep(0.05)


@pytest.mark.parametrize("adapter", [{"kind": "bottleneck", "width": 8}, {"kind": "side", "width": 8, "blocks": 2}])
def test_every_second_is_of_the_part_that_took_it(world: Path, adapter: dict[str, Any]) -> None:
    run = prepare(recipe_of(world, images__workers=0, student__adapter=adapter), {}, HERE)
    watch = Watch(HERE.device)
    inside = next(part for part in run.student.encoder.adapter.modules() if isinstance(part, torch.nn.Linear))
    teacher = run.teachers["classifier"]
    slowed = {
        "teacher classifier": lambda: teacher.module.register_forward_hook(slow),
        FORWARD: lambda: inside.register_forward_hook(slow),
        BACKWARD: lambda: inside.weight.register_hook(slow),
        TRANSFER: lambda: next(run.student.projectors.parameters()).register_hook(slow),
        OPTIMIZER: lambda: run.optimization.optimizer.optimizers[0].register_step_pre_hook(slow),
    }
    for part, slow_down in slowed.items():
        handle = slow_down()
        told = medians(steps(run, watch, [partial(watched, run, watch)])[0])
        handle.remove()
        assert told.keys() == {DECODE, BASE, REST, "teacher segmenter", *slowed}
        assert told[part] >= 0.05
    assert "forward" not in vars(teacher) and "forward_features" not in vars(run.student)  # nothing stays hung on


def test_a_watch_leaves_everything_as_it_was(world: Path) -> None:
    run = prepare(recipe_of(world), {}, HERE)
    stand_in = run.student.forward_features
    run.student.forward_features = stand_in  # type: ignore[method-assign]  # as where the student alone is compiled
    for _ in range(2):
        with watched(run, Watch(HERE.device)):
            assert run.student.forward_features is not stand_in
        assert vars(run.student)["forward_features"] is stand_in
        assert "compare" not in vars(run.learner)


def test_a_cached_run_is_planned_from_its_cache(world: Path, tmp_path: Path) -> None:
    cached = {"cache": {"path": str(tmp_path / "cache")}, "images__views": 1, "keep_heads": []}
    live = plan(recipe_of(world, **cached))
    assert live["disk"]["cache_bytes"] == 0 and not (tmp_path / "cache").exists()
    build_cache(recipe_of(world, **cached))
    before = contents(tmp_path)
    told = plan(recipe_of(world, **cached))
    assert contents(tmp_path) == before
    assert [part["part"] for part in told["parts"]] == [WAITING, CACHE, FORWARD, TRANSFER, BACKWARD, OPTIMIZER, REST]
    shards = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin"))
    assert (
        told["disk"]["cache_bytes"] == shards == live["cache_estimate"]["disk_bytes"]
        and live["cache_estimate"]["views"] == 1
    )
    assert told["cache_estimate"] is None
    assert not [one for one in told["suggestions"] if "cache" in one["why"] or "precision" in str(one["give"])]


def test_a_step_that_does_not_fit_is_measured_in_parts(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoulders.planning.size.memory_there", lambda device: 2**20)
    told = plan(recipe_of(world))
    assert told["memory"]["accumulate"] == 8 and told["memory"]["peak_bytes"] > told["memory"]["available_bytes"]
    assert told["suggestions"][0]["give"] == ("train.accumulate=8",) and told["suggestions"][0]["saves"] is None


FACTS = Facts(
    check_recipe(
        {
            "student": {"base": "b"},
            "teachers": {"big": {"model": "m"}},
            "images": {"path": "p"},
            "out": "runs/x",
        }
    ),
    step=1.0,
    parts={"teacher big": 0.3, FORWARD: 0.3, BACKWARD: 0.25, TRANSFER: 0.1, BASE: 0.04, WAITING: 0.01},
    decode=0.2,
    cpus=4,
    peak=10,
    there=20,
    fits=1,
    hidden=128,
    ladder=0.0,
)
STORING = {"views": 3, "path": "caches/x", "disk_bytes": 2**31, "minutes": 12.0}
HEAVY = {"teacher big": 0.1, FORWARD: 0.2, BACKWARD: 0.1, TRANSFER: 0.6, WAITING: 0.0}


def with_recipe(facts: Facts, *changes: str) -> Facts:
    tree = facts.recipe.model_dump(mode="json")
    for change in changes:
        *parents, last = change.partition("=")[0].split(".")
        here = tree
        for parent in parents:
            here = here[parent]
        here[last] = yaml.safe_load(change.partition("=")[2])
    return replace(facts, recipe=check_recipe(tree))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (FACTS, {}),
        (replace(FACTS, peak=30, fits=4), {("train.accumulate=4",): None}),
        (replace(FACTS, peak=30), {}),  # it is as small as it can be
        (replace(FACTS, storing=STORING), {("images.views=3", "cache.path=caches/x"): 0.34}),
        (with_recipe(replace(FACTS, storing=STORING), "images.views=3"), {("cache.path=caches/x",): 0.34}),
        (with_recipe(replace(FACTS, storing=STORING), "images.views=3", "cache.path=caches/x"), {(): 0.34}),
        # no step is faster than its loader
        (replace(FACTS, storing=STORING, decode=0.8), {("images.views=3", "cache.path=caches/x"): 0.2}),
        (replace(FACTS, in_bf16=0.5), {("train.precision=bf16",): 0.49}),
        (replace(FACTS, in_bf16=0.98), {}),
        (replace(FACTS, in_int8={"big": 0.2}), {("teachers.big.int8=true",): 0.1}),
        (replace(FACTS, in_int8={"big": 0.4}), {}),
        (replace(FACTS, parts={**FACTS.parts, WAITING: 0.5}, decode=1.0), {("images.workers=2",): 0.5}),
        (replace(FACTS, parts={**FACTS.parts, WAITING: 0.8}, decode=1.0), {("images.workers=4",): 0.75}),
        (replace(FACTS, parts={**FACTS.parts, WAITING: 0.5}, decode=1.0, cpus=1), {}),
        (
            with_recipe(
                replace(FACTS, parts={**FACTS.parts, WAITING: 0.0, DECODE: 0.5}, decode=0.5), "images.workers=0"
            ),
            {("images.workers=1",): 0.5},
        ),
        (
            replace(FACTS, parts=HEAVY, ladder=0.5),
            {
                ("transfer.layers=[latent]",): 0.3,
                ("transfer.projector_width=64",): 0.3,
            },
        ),
        (replace(FACTS, parts=HEAVY), {("transfer.projector_width=64",): 0.3}),
        (
            with_recipe(
                replace(FACTS, parts=HEAVY, ladder=0.5, hidden=1),
                "transfer.layers=[block1, latent]",
                "student.adapter={kind: conv}",
            ),
            {("transfer.layers=[latent]", "student.adapter.blocks=[]"): 0.3},
        ),
        (replace(FACTS, parts={**FACTS.parts, BACKWARD: 0.4}), {("student.adapter={kind: side}",): 0.44}),
        (with_recipe(replace(FACTS, parts={**FACTS.parts, BACKWARD: 0.4}), "student.adapter={kind: side}"), {}),
    ],
)
def test_advice_is_given_exactly_where_it_applies(facts: Facts, expected: dict[tuple[str, ...], float | None]) -> None:
    told = {one.give: one.saves for one in suggestions(facts)}
    assert told == {give: saves if saves is None else pytest.approx(saves) for give, saves in expected.items()}
    for give in told:
        with_recipe(facts, *give)  # each is an override that the recipe takes


def test_advice_comes_in_the_order_of_what_it_saves() -> None:
    facts = replace(FACTS, peak=30, fits=2, in_bf16=0.8, storing=STORING, in_int8={"big": 0.1})
    assert [one.saves for one in suggestions(facts)] == [None, *map(pytest.approx, (0.34, 0.2, 0.19))]


def shoulders(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    """Exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["shoulders", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_the_command(world: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(world).model_dump(mode="json")))
    code, out, _ = shoulders(monkeypatch, capsys, "plan", recipe, "images.workers=0")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["part", "of", "a", "step", "ms", "share"]
    assert [line.split()[0] for line in lines[2:5]] == [DECODE, "teacher", "teacher"]
    for start in ("a whole step", "memory  ", "disk    ", "time    "):
        assert any(line.startswith(start) for line in lines), out
    code, out, _ = shoulders(monkeypatch, capsys, "plan", recipe, "--json")
    assert code == 0 and json.loads(out)["decode"]["workers"] == 1
    for change, message in (
        ("train.stepz=1", "train.stepz: unknown key; did you mean steps?"),
        ("images.size=30", "images.size: "),
        ("teachers.segmenter.taps=[stage7]", "teachers.segmenter.taps: "),
        ("train.accumulate=3", "train.batch: 8 cannot be shared"),
        (f"out={recipe}/x", "out: cannot write to "),
    ):
        code, out, err = shoulders(monkeypatch, capsys, "plan", recipe, change)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and message in err


def test_one_process_is_planned(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process, not 2; start it without torchrun"):
        plan(recipe_of(world))
