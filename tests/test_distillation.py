"""A run: its results, bit for bit the same after kills, and the same on two ranks as on one."""

from __future__ import annotations

import json
import os
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
from shoulders.distillation import distill
from shoulders.errors import DataError, NumericError
from shoulders.images import ImageSet, open_source
from shoulders.training.checkpoint import checkpoints
from tests.runs import STEPS, run, run_tree
from tests.tiny import Colours, metric_rows, same_tensors, save_images, student_weights


def test_training_reduces_the_loss_and_the_run_folder_is_complete(tiny_world: Path, uninterrupted_run: Path) -> None:
    losses = [row["loss"] for row in metric_rows(uninterrupted_run)]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    evaluations = metric_rows(uninterrupted_run, "evaluation")
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
    # the student holds the base from the start
    assert evaluations[0]["fvu/base/latent/spatial"] < 0.2 < evaluations[0]["fvu/classifier/stage1/spatial"]
    written = yaml.safe_load((uninterrupted_run / "recipe.yaml").read_text())
    assert written["train"]["betas"] == [0.9, 0.99]  # complete: keys that were left out have their defaults
    rows = json.loads((uninterrupted_run / "results.json").read_text())
    assert {row["metric"] for row in rows} == {name for name in evaluations[-1] if name.startswith("fvu")}
    student = shoulders.load(uninterrupted_run)
    assert set(student.config.teachers) == {"classifier", "segmenter", "base"}
    assert "| segmenter |" in (uninterrupted_run / "student" / "README.md").read_text()


def test_the_base_of_the_student_is_unchanged(tiny_world: Path, uninterrupted_run: Path) -> None:
    of_base = {
        n.removeprefix("encoder.base."): t
        for n, t in student_weights(uninterrupted_run).items()
        if n.startswith("encoder.base.")
    }
    assert same_tensors(of_base, load_file(tiny_world / "base" / "model.safetensors"))


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    tiny_world: Path, uninterrupted_run: Path, tmp_path: Path
) -> None:
    run(tiny_world, tmp_path / "again", images__workers=2)
    assert same_tensors(student_weights(tmp_path / "again"), student_weights(uninterrupted_run))
    run(tiny_world, tmp_path / "other", train__seed=1)
    assert not same_tensors(student_weights(tmp_path / "other"), student_weights(uninterrupted_run))


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shoulders", "distill", str(recipe), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "group"),
    [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False), (signal.SIGUSR1, 128 + signal.SIGUSR1, True)],
)
def test_a_signal_ends_the_run_after_a_checkpoint(
    number: signal.Signals, code: int, group: bool, tiny_world: Path, uninterrupted_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = run_tree(
        tiny_world, out, images__workers=1, train__steps=5000, train__save_every=5000, train__evaluate_every=5000
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = start(tmp_path / "recipe.yaml")
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metric_rows(out)) > 3 or process.poll() is not None)
    if group:
        os.killpg(process.pid, number)  # as a batch system does: the workers too
        os.killpg(process.pid, number)  # and more than once
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors[-2000:]
    assert "continue with --resume" in errors.splitlines()[-1]
    assert len(checkpoints(out / "checkpoints")) == 1
    assert not (out / "student").exists()


# Muon rounds to bfloat16 inside, so sums in another order change its steps a little
@pytest.mark.parametrize(
    ("balance", "optimizer", "tolerance"), [("dropping", "adamw", 1e-5), ("uniform", "muon", 1e-2)]
)
def test_two_ranks_train_the_same_student_as_one(
    balance: str, optimizer: str, tolerance: float, tiny_world: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "transfer__balance": balance,
        "train__steps": 6,
        "train__accumulate": 2,
        "train__optimizer": optimizer,
    }
    run(tiny_world, tmp_path / "one", **changes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(run_tree(tiny_world, tmp_path / "two", **changes)))
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
    assert two == pytest.approx(one, rel=tolerance)
    one_student, other = student_weights(tmp_path / "one"), student_weights(tmp_path / "two")
    assert all(
        torch.allclose(one_student[name], other[name], rtol=100 * tolerance, atol=tolerance) for name in one_student
    )


def test_micro_batches_do_not_change_the_loss(tiny_world: Path, tmp_path: Path) -> None:
    for micro_batches in (1, 4):
        run(
            tiny_world,
            tmp_path / str(micro_batches),
            train__accumulate=micro_batches,
            train__steps=4,
            train__optimizer="adamw",
        )
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
def test_every_choice_of_the_recipe_trains(changes: dict[str, Any], tiny_world: Path, tmp_path: Path) -> None:
    run(tiny_world, tmp_path / "run", **changes, train__steps=3)
    assert all(row["loss"] < 100 for row in metric_rows(tmp_path / "run"))
    assert shoulders.load(tmp_path / "run")(torch.rand(1, 3, 32, 32)).latent.grid == (4, 4)


def test_an_extra_teacher_is_a_pytorch_module(tiny_world: Path, tmp_path: Path) -> None:
    extra_teachers = {"type": shoulders.Teacher(Colours(), size=(32, 32))}
    changes: dict[str, Any] = {"train__steps": 3, "transfer__balance": "fixed"}
    summary = distill(check_recipe(run_tree(tiny_world, tmp_path / "run", **changes)), extra_teachers=extra_teachers)
    assert 0 <= summary["fvu/type/mean.rgb/spatial"] < 1.5
    assert "type/mean.rgb" in shoulders.load(tmp_path / "run").predict_teacher_features(torch.rand(1, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's compiler imports what torch warns of
def test_a_compiled_run_has_the_same_losses(tiny_world: Path, tmp_path: Path) -> None:
    for name, compiled in (("plain", False), ("compiled", True)):
        run(tiny_world, tmp_path / name, train__compile=compiled, train__steps=4)
    plain, compiled_ = ([row["loss"] for row in metric_rows(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled_ == pytest.approx(plain, rel=1e-4)


def test_unreadable_images_are_listed_and_too_many_of_them_end_the_run(tiny_world: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", 60)
    held = set(ImageSet({"images": open_source(images)}, {"images": None}, 0, 8).heldout.tolist())
    broken = [min(held), *sorted(set(range(60)) - held)[:2]]  # one of them is held out
    for i in broken:
        (images / f"{i:04d}.jpg").write_bytes(b"not an image")
    changes: dict[str, Any] = {"images__path": str(images), "images__holdout": 8}
    with pytest.raises(DataError, match=r"images.max_unreadable"):
        run(tiny_world, tmp_path / "strict", **changes)
    summary = run(tiny_world, tmp_path / "lenient", **changes, images__max_unreadable=0.1)
    rows = [json.loads(line) for line in (tmp_path / "lenient" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["name"] for row in rows) == sorted(f"{i:04d}.jpg" for i in broken)
    assert summary["heldout"] == len(held) - 1


def test_a_new_attempt_starts_a_new_list_of_unreadable_images(tiny_world: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", 60)
    expected = (images / "0001.jpg").read_bytes()
    held = set(ImageSet({"images": open_source(images)}, {"images": None}, 0, 8).heldout.tolist())
    (images / f"{min(held):04d}.jpg").write_bytes(b"not an image")
    changes: dict[str, Any] = {"images__path": str(images), "images__holdout": 8}
    with pytest.raises(DataError, match=r"images.max_unreadable"):
        run(tiny_world, tmp_path / "run", **changes)
    (images / f"{min(held):04d}.jpg").write_bytes(expected)
    run(tiny_world, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


def test_a_run_that_diverges_ends_and_its_checkpoints_are_finite(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="the student's features are not finite for 8 of 8 held-out images"):
        run(tiny_world, tmp_path / "run", train__lr=1e30, train__clip=1e30, transfer__distance="mse")
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(torch.isfinite(t).all() for t in load_file(path / "tensors.safetensors").values())
