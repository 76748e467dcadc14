"""The run: bit for bit the same after kills, the same on two ranks as on one, and refused early where it must be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import shoulders
from shoulders.config.recipe import check_recipe
from shoulders.config.sections import Train
from shoulders.distillation import distill
from shoulders.errors import DataError, NumericError, RecipeError
from shoulders.features import Features
from shoulders.images import ImageSet, open_source
from shoulders.planning import plan
from shoulders.storage.locks import RUN_LOCK, FileLocks
from shoulders.training.checkpoint import checkpoints, load_checkpoint
from shoulders.training.logger import MetricLogger
from tests.tiny import (
    metric_rows,
    same_tensors,
    save_convnext,
    save_images,
    save_tiny_world,
    student_weights,
    tiny_tree,
)

STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers and 60 images in one folder."""
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def tree(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"train__steps": STEPS, "train__save_every": 4, "train__evaluate_every": 6, "train__ema": 0.9}
    return tiny_tree(world, out, **settings | changes)


def run(world: Path, out: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return distill(check_recipe(tree(world, out, **changes)), resume=resume)


@pytest.fixture(scope="module")
def quiet_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that the others are compared with."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    run(world, out)
    return out


def test_it_learns_and_leaves_everything_that_a_run_folder_promises(world: Path, quiet_run: Path) -> None:
    losses = [row["loss"] for row in metric_rows(quiet_run)]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    evaluations = metric_rows(quiet_run, "evaluation")
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    names = {
        "fvu/classifier/stage1/summary",
        "fvu/segmenter/stage0/spatial",
        "fvu_projector/base/latent/spatial",
        "fvu/segmenter",
        "fvu/base",
        "fvu_spread",
    }
    assert names <= evaluations[-1].keys()
    # the base is there from the start
    assert evaluations[0]["fvu/base/latent/spatial"] < 0.2 < evaluations[0]["fvu/classifier/stage1/spatial"]
    written = yaml.safe_load((quiet_run / "recipe.yaml").read_text())
    assert written["train"]["betas"] == [0.9, 0.99]  # complete: what was left out is there
    rows = json.loads((quiet_run / "results.json").read_text())
    assert {row["metric"] for row in rows} == {name for name in evaluations[-1] if name.startswith("fvu")}
    student = shoulders.load(quiet_run)
    assert set(student.config.teachers) == {"classifier", "segmenter", "base"}
    assert "| segmenter |" in (quiet_run / "student" / "README.md").read_text()


def test_the_base_inside_is_still_the_base(world: Path, quiet_run: Path) -> None:
    inside = {
        n.removeprefix("encoder.base."): t
        for n, t in student_weights(quiet_run).items()
        if n.startswith("encoder.base.")
    }
    assert same_tensors(inside, load_file(world / "base" / "model.safetensors"))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    world: Path, quiet_run: Path, tmp_path: Path
) -> None:
    run(world, tmp_path / "again", images__workers=2)
    assert same_tensors(student_weights(tmp_path / "again"), student_weights(quiet_run))
    run(world, tmp_path / "other", train__seed=1)
    assert not same_tensors(student_weights(tmp_path / "other"), student_weights(quiet_run))


# where the run is killed: (event, how many times it has happened by then)
KILLS = [
    ("save: tensors written", 1),
    ("save: before the rename", 2),
    ("save: after the rename", 1),
    ("decode", 30),
    ("backward", 6),
    ("backward", 11),
    ("evaluate", 2),
    ("optimizer", 3),
]

KILLER = """
import os, signal, sys, threading, yaml
from shoulders.training import checkpoint
from shoulders.training import heldout
from shoulders.training import module as learner
from shoulders.distillation import distill
from shoulders.images import image_set
from shoulders.config.recipe import check_recipe
import torch

event, count = sys.argv[2], int(sys.argv[3])
seen = 0

def then_die(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)

then_die(*{
    "save: tensors written": (checkpoint, "_fingerprint"),
    "save: before the rename": (checkpoint.Path, "rename"),
    "save: after the rename": (checkpoint.shutil, "rmtree"),
    "decode": (image_set, "decode_with_size"),
    "backward": (torch.Tensor, "backward"),
    "evaluate": (heldout.HeldOutSet, "measure"),
    "optimizer": (torch.optim.AdamW, "step"),
}[event])
distill(check_recipe(yaml.safe_load(open(sys.argv[1]).read())))
"""


@pytest.mark.parametrize(("event", "count"), KILLS)
def test_killed_and_resumed_ends_with_the_same_bits(
    event: str, count: int, world: Path, quiet_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = tree(world, out)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    killed = python(KILLER, tmp_path / "recipe.yaml", event, count)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (out / "student").exists()
    distill(check_recipe(recipe), resume=True)
    assert same_tensors(student_weights(out), student_weights(quiet_run))
    # the log is that of one run: each step and evaluation once, with the same numbers
    for kind, number in (("train", "loss"), ("evaluation", "fvu_spread")):
        ours, theirs = ([(row["step"], row[number]) for row in metric_rows(o, kind)] for o in (out, quiet_run))
        assert ours == theirs
    assert not list(out.rglob("*.partial"))


def test_a_finished_run_is_left_as_it_is(world: Path, quiet_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def left() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in quiet_run.rglob("*") if path.is_file()}

    before = left()
    summary = run(world, quiet_run, resume=True)
    assert "finished already" in capsys.readouterr().err
    assert left() == before
    assert summary["fvu_spread"] == metric_rows(quiet_run, "evaluation")[-1]["fvu_spread"]


def test_a_finished_run_needs_no_checkpoint(world: Path, quiet_run: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(quiet_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(world, tmp_path / "run", resume=True)
    assert "finished already" in capsys.readouterr().err


def python(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=240)


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shoulders", "distill", str(recipe), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(claim: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code", "group"), [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)])
def test_asked_to_stop_it_saves_and_says_so(
    number: signal.Signals, code: int, group: bool, world: Path, quiet_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = tree(world, out, images__workers=1, train__steps=5000, train__save_every=5000, train__evaluate_every=5000)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = start(tmp_path / "recipe.yaml")
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metric_rows(out)) > 3 or process.poll() is not None)
    if group:
        os.killpg(process.pid, number)  # as a batch system does: workers and all
        os.killpg(process.pid, number)  # and more than once
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors[-2000:]
    assert "continue with --resume" in errors.splitlines()[-1]
    assert len(checkpoints(out / "checkpoints")) == 1
    assert not (out / "student").exists()


def test_a_flipped_bit_in_the_newest_checkpoint_means_the_one_before(
    world: Path, quiet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(world, out)
    newest = checkpoints(out / "checkpoints")[-1] / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    shutil.rmtree(out / "student")
    run(world, out, resume=True)
    assert "trying the previous one" in capsys.readouterr().err
    assert same_tensors(student_weights(out), student_weights(quiet_run))
    for checkpoint in checkpoints(out / "checkpoints"):
        (checkpoint / "state.json").unlink()
    shutil.rmtree(out / "student")
    with pytest.raises(DataError, match="none of the 2 checkpoints is valid"):
        run(world, out, resume=True)


# Muon rounds to bfloat16 inside, so that sums in another order lead a little elsewhere
@pytest.mark.parametrize(("balance", "optimizer", "off"), [("dropping", "adamw", 1e-5), ("uniform", "muon", 1e-2)])
def test_two_ranks_learn_what_one_learns(balance: str, optimizer: str, off: float, world: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "transfer__balance": balance,
        "train__steps": 6,
        "train__accumulate": 2,
        "train__optimizer": optimizer,
    }
    run(world, tmp_path / "one", **changes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree(world, tmp_path / "two", **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        "-m",
        "shoulders",
        "distill",
        str(recipe),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([row["loss"] for row in metric_rows(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=off)
    ours, theirs = student_weights(tmp_path / "one"), student_weights(tmp_path / "two")
    assert all(torch.allclose(ours[name], theirs[name], rtol=100 * off, atol=off) for name in ours)


def test_accumulation_changes_memory_and_nothing_else(world: Path, tmp_path: Path) -> None:
    for parts in (1, 4):
        run(world, tmp_path / str(parts), train__accumulate=parts, train__steps=4, train__optimizer="adamw")
    one, four = (metric_rows(tmp_path / name) for name in ("1", "4"))
    for name in ("loss", "s2t/classifier/stage1/summary", "t2s/joint/spatial"):
        assert [row[name] for row in four] == pytest.approx([row[name] for row in one], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "transfer__t2s": "none",
            "transfer__standardize": "none",
            "transfer__distance": "mse",
            "transfer__preserve": 0.0,
        },
        {"transfer__t2s": "each", "transfer__standardize": "channel", "transfer__layers": ["block0", "latent"]},
        {"transfer__t2s_grad_to": "student", "transfer__balance": "fixed", "images__views": 2},
        {
            "student__adapter": {"kind": "lora", "rank": 2, "alpha": 4.0},
            "train__precision": "bf16",
            "images__size": [32, 48],
        },
    ],
    ids=["mse", "each", "fixed", "lora-bf16"],
)
def test_every_choice_of_the_recipe_trains(changes: dict[str, Any], world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "run", **changes, train__steps=3)
    assert all(row["loss"] < 100 for row in metric_rows(tmp_path / "run"))
    assert shoulders.load(tmp_path / "run")(torch.rand(1, 3, 32, 32)).latent.grid == (4, 4)


class Colours(torch.nn.Module):
    """Mean colours, of the image and of its parts."""

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        return {"mean.rgb": Features.from_map(torch.nn.functional.avg_pool2d(pixels, 8), pixels.mean((2, 3)))}


def test_a_module_of_your_own_teaches_from_python(world: Path, tmp_path: Path) -> None:
    own = {"type": shoulders.Teacher(Colours(), size=(32, 32))}
    changes: dict[str, Any] = {"train__steps": 3, "transfer__balance": "fixed"}
    summary = distill(check_recipe(tree(world, tmp_path / "run", **changes)), extra_teachers=own)
    assert 0 <= summary["fvu/type/mean.rgb/spatial"] < 1.5
    assert "type/mean.rgb" in shoulders.load(tmp_path / "run").predict_teacher_features(torch.rand(1, 3, 32, 32))


def test_taps_that_would_be_one_in_the_students_weights_are_refused(world: Path, tmp_path: Path) -> None:
    class Twins(Colours):
        def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
            (said,) = super().forward(pixels).values()
            return {"a.b": said, "a_b": said}

    with pytest.raises(RecipeError, match=r"type/a.b, type/a_b: these names differ by a point"):
        distill(
            check_recipe(tree(world, tmp_path / "run")),
            extra_teachers={"type": shoulders.Teacher(Twins(), size=(32, 32))},
        )


@pytest.mark.parametrize("name", ["base", "student", "my.net", "classifier"])
def test_own_teachers_have_names_of_their_own(name: str, world: Path, tmp_path: Path) -> None:
    own = {name: shoulders.Teacher(Colours(), size=(32, 32))}
    with pytest.raises(RecipeError, match="rename one|teacher name"):
        distill(check_recipe(tree(world, tmp_path / "run")), extra_teachers=own)


def test_a_run_goes_on_only_with_the_models_that_it_began_with(world: Path, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for name in ("base", "classifier", "segmenter", "images"):
        shutil.copytree(world / name, tmp_path / "world" / name)
    run(tmp_path / "world", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    save_convnext(tmp_path / "world" / "classifier", seed=9)
    with pytest.raises(DataError, match=r"the base, a teacher, or .* is not the same as when this run started"):
        run(tmp_path / "world", tmp_path / "run", resume=True)


def test_a_run_goes_on_only_with_the_pixels_that_its_teachers_saw(world: Path, tmp_path: Path) -> None:
    for name in ("base", "classifier", "segmenter", "images"):
        shutil.copytree(world / name, tmp_path / "world" / name)
    run(tmp_path / "world", tmp_path / "run", train__steps=1)
    shutil.rmtree(tmp_path / "run" / "student")
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}}
    (tmp_path / "world" / "classifier" / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"the base, a teacher, or .* is not the same as when this run started"):
        run(tmp_path / "world", tmp_path / "run", resume=True, train__steps=1)


def test_a_run_goes_on_only_in_the_order_that_it_began_with(world: Path, quiet_run: Path) -> None:
    teachers = tree(world, quiet_run)["teachers"]
    with pytest.raises(RecipeError, match="teachers: the run started with classifier, segmenter in this order"):
        run(world, quiet_run, resume=True, teachers=dict(reversed(teachers.items())))


def test_a_folder_holds_one_run_at_a_time(world: Path, tmp_path: Path) -> None:
    with FileLocks(tmp_path / "run").claim(RUN_LOCK):
        with pytest.raises(RecipeError, match=rf"out: .* is in use by process {os.getpid()} on .*; wait for it"):
            run(world, tmp_path / "run")
        assert not (tmp_path / "run" / "recipe.yaml").exists()
    run(world, tmp_path / "run", train__steps=1)
    assert not list((tmp_path / "run").glob(".run*"))


def test_the_seconds_of_a_run_are_those_of_all_its_legs(world: Path, tmp_path: Path) -> None:
    whole = run(world, tmp_path / "run", train__steps=4)["seconds"]
    shutil.rmtree(tmp_path / "run" / "student")
    (newest,) = checkpoints(tmp_path / "run" / "checkpoints")
    state = load_checkpoint(newest)[1]
    assert 0 < state["seconds"] < whole
    summary = run(world, tmp_path / "run", resume=True, train__steps=4)
    assert summary["seconds"] > state["seconds"]


def test_a_run_that_has_nothing_to_go_on_from_says_so(world: Path, tmp_path: Path, capsys: Any) -> None:
    run(world, tmp_path / "run", resume=True, train__steps=1)
    assert "no checkpoint to resume from; starting with the first step" in capsys.readouterr().err


def test_damaged_results_are_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(tree(world, tmp_path / "run")))
    (tmp_path / "run" / "results.json").write_text("[{")
    with pytest.raises(DataError, match=r"results.json: damaged .*; move it out of the way"):
        run(world, tmp_path / "run", resume=True)


def test_a_run_goes_on_only_with_the_images_that_it_began_with(world: Path, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for name in ("base", "classifier", "segmenter", "images"):
        shutil.copytree(world / name, tmp_path / "world" / name)
    run(tmp_path / "world", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    save_images(tmp_path / "world" / "images" / "more", 3)
    with pytest.raises(DataError, match="the set of images is not the same as when this run started"):
        run(tmp_path / "world", tmp_path / "run", resume=True)


def test_a_half_line_of_a_killed_run_is_no_measure(tmp_path: Path) -> None:
    lines = [json.dumps({"step": 3, "kind": "evaluation", "fvu/one": 0.5}), '{"step": 6, "ki']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    journal = MetricLogger(tmp_path, 3, Train(), is_main=False)
    assert journal.last_evaluation() == {"fvu/one": 0.5}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler imports what torch warns of
def test_compiled_it_learns_the_same(world: Path, tmp_path: Path) -> None:
    for name, compiled in (("plain", False), ("compiled", True)):
        run(world, tmp_path / name, train__compile=compiled, train__steps=4)
    plain, compiled_ = ([row["loss"] for row in metric_rows(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled_ == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images__path": "nowhere"}, "images: nowhere .images. does not exist"),
        ({"train__batch": 9, "train__accumulate": 2}, "train.batch: 9 cannot be divided .* multiple of 2"),
        ({"images__size": 30}, r"images.size: .*30.* nearest"),
        ({"teachers": {}}, "teachers: none"),
        ({"transfer__layers": ["block0"], "transfer__t2s": "none"}, "no gradient reaches the last block"),
        ({"transfer__layers": ["block0", "block7"]}, "has no layer 'block7'"),
        ({"images__scale": [0, 1]}, "images: scale: fractions"),
        ({"train__betas": [2, 0.9]}, "train.betas"),
        ({"out": "/dev/null/run"}, "out: cannot write to /dev/null"),
    ],
    ids=["images", "batch", "size", "teachers", "reads", "places", "scale", "betas", "out"],
)
def test_what_cannot_work_is_refused_before_anything_loads(
    changes: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as refusal:
        run(world, **({"out": tmp_path / "run"} | changes))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_an_old_run_is_neither_overwritten_nor_resumed_with_another_recipe(world: Path, quiet_run: Path) -> None:
    with pytest.raises(RecipeError, match="add --resume, or choose another out"):
        run(world, quiet_run)
    with pytest.raises(RecipeError, match=r"train.lr: the run started with 0.005, not 0.01"):
        run(world, quiet_run, resume=True, train__lr=0.01)


def test_bad_images_are_named_and_too_many_of_them_stop_the_run(world: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", 60)
    held = set(ImageSet({"images": open_source(images)}, {"images": None}, 0, 8).heldout.tolist())
    broken = [min(held), *sorted(set(range(60)) - held)[:2]]  # one of them is held out
    for i in broken:
        (images / f"{i:04d}.jpg").write_bytes(b"not an image")
    changes: dict[str, Any] = {"images__path": str(images), "images__holdout": 8}
    with pytest.raises(DataError, match=r"images.max_unreadable"):
        run(world, tmp_path / "strict", **changes)
    summary = run(world, tmp_path / "lenient", **changes, images__max_unreadable=0.1)
    rows = [json.loads(line) for line in (tmp_path / "lenient" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == sorted(f"{i:04d}.jpg" for i in broken)
    assert summary["heldout"] == len(held) - 1


def test_gradients_that_are_not_finite_stop_the_run_before_they_are_saved(world: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="no longer finite"):
        run(world, tmp_path / "run", train__lr=1e30, train__clip=1e30, transfer__distance="mse")
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(torch.isfinite(t).all() for t in load_file(path / "tensors.safetensors").values())


def test_what_was_put_right_is_not_held_against_a_new_try(world: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", 60)
    whole = (images / "0001.jpg").read_bytes()
    held = set(ImageSet({"images": open_source(images)}, {"images": None}, 0, 8).heldout.tolist())
    (images / f"{min(held):04d}.jpg").write_bytes(b"not an image")
    changes: dict[str, Any] = {"images__path": str(images), "images__holdout": 8}
    with pytest.raises(DataError, match=r"images.max_unreadable"):
        run(world, tmp_path / "run", **changes)
    (images / f"{min(held):04d}.jpg").write_bytes(whole)
    run(world, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


def test_a_part_that_no_teacher_has_does_not_stop_a_run_from_going_on(world: Path, tmp_path: Path) -> None:
    maps_alone = {"segmenter": {"model": str(world / "segmenter"), "taps": ["stage0"]}}
    changes: dict[str, Any] = {
        "teachers": maps_alone,
        "transfer__preserve": 0.0,
        "train__precision": "fp32",
        "student__adapter": {"kind": "conv", "width": 32},
    }
    run(world, tmp_path / "run", **changes)
    whole = student_weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    newest = checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(max(newest))
    run(world, tmp_path / "run", resume=True, **changes)
    assert same_tensors(student_weights(tmp_path / "run"), whole)


def test_too_few_images_are_refused_with_what_to_do(world: Path, tmp_path: Path) -> None:
    few = save_images(tmp_path / "few", 6)
    with pytest.raises(DataError, match=r"images: .* 3 held-out images, and 4 are needed; give more images"):
        run(world, tmp_path / "run", images__path=str(few), images__holdout=8)
    with pytest.raises(DataError, match=r"classifier learns from 3 of 3 held-out images"):
        plan(check_recipe(tree(world, tmp_path / "run", images__path=str(few), images__holdout=8)))
