"""Student, base and teachers are measured on every task by the same code, from files to rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from shoulders.distillation import distill
from shoulders.errors import DataError, RecipeError
from shoulders.evaluation import finetune_models as trainees
from shoulders.evaluation.evaluate import evaluate
from shoulders.evaluation.probes import open_probe
from shoulders.features import Batch, Features
from shoulders.inference import _places_of
from shoulders.model import load
from shoulders.tasks import TASKS, objects, semantic, transformer_probes
from shoulders.tasks.heads import objects as object_head
from shoulders.tasks.heads import transformers as transformer_heads
from shoulders.teachers import Teacher
from shoulders.training.checkpoint import fingerprint
from tests.tasks.scenes import save_masks, save_objects
from tests.tiny import save_base, save_convnext, save_images, save_segformer, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 6, "val": 3, "test": 4}


class Whole(torch.nn.Module):
    """Answers for the whole image alone."""

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        return {"last": Features(pixels.mean((2, 3)), None)}


def speechless() -> Teacher:
    return Teacher(Whole(), size=(32, 32))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (semantic, objects):
        monkeypatch.setattr(module, "FEWEST_STEPS", 8)
    monkeypatch.setattr(object_head, "WIDTH", 16)
    monkeypatch.setattr(object_head, "FINE_WIDTH", 16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_base(root / "base")
    save_convnext(root / "classifier")
    save_segformer(root / "segmenter")
    save_images(root / "photos", 40)
    save_images(root / "labelled", 24, classes=2)
    save_masks(root / "masks", COUNTS)
    save_objects(root / "objects", COUNTS)
    recipe = tiny_recipe(
        root,
        student__adapter={"kind": "lora", "rank": 2},
        teachers={name: {"model": str(root / name)} for name in ("classifier", "segmenter")},
        images__path=str(root / "photos"),
        images__holdout=None,
        train={"steps": 2, "batch": 4},
    )
    distill(recipe)
    return root


DATA = {"semantic": "masks", "detection": "objects", "instance": "objects"}
FIRST = {"semantic": "mIoU", "detection": "AP", "instance": "mask_AP"}


@pytest.mark.parametrize("task", DATA)
def test_all_models_are_measured_and_the_rows_are_kept(task: str, world: Path) -> None:
    if task != "semantic":
        pytest.importorskip("faster_coco_eval")
    asked: list[str] = []
    rows = evaluate(world / "run", task, world / DATA[task], workers=0, on_model=asked.append)
    assert asked == ["student", "base", "classifier", "segmenter"]
    assert {row["model"] for row in rows if row["metric"] == FIRST[task]} == set(asked)
    assert all(row["task"] == task and row["n"] == 4 and 0 <= row["value"] <= 1 for row in rows)
    kept = [row for row in json.loads((world / "run/results.json").read_text()) if row["task"] == task]
    assert kept == rows
    again = evaluate(world / "run", task, world / DATA[task], ("base",), workers=0)
    values = {row["metric"]: row["value"] for row in rows if row["model"] == "base"}
    assert {row["metric"]: row["value"] for row in again} == values
    assert len([row for row in json.loads((world / "run/results.json").read_text()) if row["task"] == task]) == len(
        rows
    )


def test_a_teacher_without_places_is_named_before_anything_is_measured(world: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((world / "run/recipe.yaml").read_text())
    recipe["teachers"]["mute"] = {"module": "tests.evaluation.test_evaluate:speechless"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    asked: list[str] = []
    with pytest.raises(RecipeError, match="teachers.mute: has no spatial features, which semantic needs"):
        evaluate(tmp_path, "semantic", world / "masks", ("segmenter", "mute"), workers=0, on_model=asked.append)
    assert asked == []
    rows = evaluate(tmp_path, "semantic", world / "masks", ("segmenter",), workers=0, on_model=asked.append)
    assert (asked, rows[0]["model"]) == (["segmenter"], "segmenter")


def test_a_teacher_of_several_grids_is_asked_for_all_of_them() -> None:
    class Levels(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
            pooled = {side: torch.nn.functional.adaptive_avg_pool2d(pixels, side) for side in (2, 8, 4)}
            return {f"level{side}": Features.from_map(maps * side) for side, maps in pooled.items()}

    teacher = Teacher(Levels(), size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    pixels = torch.full((2, 3, 32, 32), 51, dtype=torch.uint8)
    told = _places_of(teacher, torch.device("cpu"))(Batch(torch.arange(2), {(32, 32): pixels}))
    assert told.grid == (4, 4)  # of 8 px; 4 px would be finer than is asked for
    expected = torch.tensor([2.0, 8.0, 4.0]).repeat_interleave(3) * 0.2
    torch.testing.assert_close(told.spatial, expected.expand(2, 16, 9))


def test_tuned_rows_stand_beside_frozen_ones(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainees, "FEWEST_STEPS", 4)
    frozen = evaluate(world / "run", "classification", world / "labelled", ["student"], workers=0)
    before = fingerprint(load(world / "run"))
    rows = evaluate(world / "run", "classification", world / "labelled", workers=0, tune="adapter")
    assert [(row["model"], row["metric"]) for row in rows] == [("student", "top1"), ("base", "top1")]
    told = rows[0]["settings"]
    values = {row["metric"]: row["value"] for row in frozen}
    assert (told["tune"], told["frozen"], told["steps"]) == ("adapter", values["linear_top1"], 6)
    assert told["lr"] in {one.rate for one in trainees.TRIES}
    kept = [row for row in json.loads((world / "run/results.json").read_text()) if row["task"] == "classification"]
    assert [row for row in kept if "tune" not in row["settings"] and row["model"] == "student"] == frozen
    assert [row for row in kept if "tune" in row["settings"]] == rows
    assert fingerprint(load(world / "run")) == before
    again = evaluate(world / "run", "classification", world / "labelled", ["base"], workers=0, tune="adapter")
    assert [row["value"] for row in again] == [row["value"] for row in rows if row["model"] == "base"]


def test_without_val_a_tuned_learning_rate_is_not_chosen() -> None:
    # the probe that tuning starts from was fitted on all of train: a part of that says nothing
    assert trainees.tuning_plan(1000, val=True).tries == trainees.TRIES
    assert trainees.tuning_plan(1000, val=False).tries == trainees.TRIES[:1]


def test_rows_of_another_probe_stand_beside_those_of_the_default_one(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_heads, "WIDTH", 16)
    monkeypatch.setattr(transformer_probes, "FEWEST_STEPS", 2)
    monkeypatch.setattr(transformer_probes, "EPOCHS", 0)
    default = evaluate(world / "run", "semantic", world / "masks", ["student"], workers=0)
    rows = evaluate(world / "run", "semantic", world / "masks", ["student"], workers=0, probe="upernet")
    assert {row["settings"]["head"] for row in rows} == {"upernet"}
    kept = [row for row in json.loads((world / "run/results.json").read_text()) if row["task"] == "semantic"]
    kept = [row for row in kept if row["model"] == "student"]
    assert [row for row in kept if row["settings"].get("head") == "linear"] == default
    assert [row for row in kept if row["settings"].get("head") == "upernet"] == rows
    assert [row["metric"] for row in rows][:2] == ["mIoU", "pixel_accuracy"]
    open_probe(world / "run", "student/semantic")  # the default one is the one that is kept
    with pytest.raises(RecipeError, match="--probe: 'upernet' is none of dense, rt_detr_v2, the probes of detection"):
        evaluate(world / "run", "detection", world / "objects", ["student"], probe="upernet")


def test_only_those_with_an_adapter_are_tuned(world: Path) -> None:
    with pytest.raises(RecipeError, match="--tune: classifier without an adapter to tune; choose --models from"):
        evaluate(world / "run", "semantic", world / "masks", ["student", "classifier"], tune="adapter")
    with pytest.raises(RecipeError, match="--tune: scratch, teachers without an adapter"):
        evaluate(world / "run", "semantic", world / "masks", ["scratch", "teachers"], tune="adapter")
    with pytest.raises(RecipeError, match="--tune: 'base' is not there; adapter is all that can be tuned"):
        evaluate(world / "run", "semantic", world / "masks", ["student"], tune="base")


def test_unknown_tasks_and_models_are_refused(world: Path) -> None:
    with pytest.raises(RecipeError, match="'flying' is not one of classification, detection, semantic, instance"):
        evaluate(world / "run", "flying", world / "masks")
    with pytest.raises(RecipeError, match="--models: nobody not here; choose from student, base, teachers, scratch, "):
        evaluate(world / "run", "semantic", world / "masks", ("nobody",))
    assert list(TASKS) == ["classification", "detection", "semantic", "instance"]


def shoulders(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoulders", *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def test_a_broken_mask_is_one_line_and_exit_3(world: Path, tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "annotations/val/1.png").write_bytes(b"no mask")
    with pytest.raises(DataError, match="val/1.png: not a mask"):
        evaluate(world / "run", "semantic", tmp_path)
    done = shoulders("evaluate", world / "run", "--task", "semantic", "--data", tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1), done.stderr
    assert "val/1.png: not a mask" in done.stderr


def test_the_table_leaves_out_single_classes(world: Path, tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 2, "val": 2})
    done = shoulders(
        "evaluate", world / "run/student", "--task", "semantic", "--data", tmp_path, "--models", "student,base"
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "semantic: scores in %, 2 images", done.stderr
    assert lines[1].split() == ["model", "mIoU", "pixel_accuracy"]
    assert [line.split()[0] for line in lines[3:]] == ["student", "base"]


def test_probes_tuning_and_scratch_from_the_command_line(world: Path, tmp_path: Path) -> None:
    labelled, run = world / "labelled", world / "run"
    done = shoulders(
        "evaluate",
        run,
        "--task",
        "classification",
        "--data",
        labelled,
        "--models",
        "student,scratch",
        "--scratch-steps",
        2,
        "--workers",
        0,
    )
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["model", "knn_top1"] and lines[1].split()[-1] == "top1", done.stderr
    assert [line.split()[0] for line in lines[3:]] == ["student", "scratch"]
    image = labelled / "class0" / "0000.jpg"
    done = shoulders("predict", run, image, "--probe", "student/classification", "--out", tmp_path, "--json")
    assert list(json.loads(done.stdout)["0000.jpg"]) == ["student/classification"], done.stderr
