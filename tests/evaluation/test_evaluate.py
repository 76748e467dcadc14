"""Student, base and teachers are evaluated on every task by the same code, from files to rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shoulders.distillation import distill
from shoulders.errors import DataError, RecipeError
from shoulders.evaluation.evaluate import evaluate
from shoulders.evaluation.finetune_models import AdapterSettings
from shoulders.features import Batch, Features
from shoulders.inference import all_taps
from shoulders.model import load
from shoulders.tasks import TASKS
from shoulders.tasks.saved_probes import open_probe
from shoulders.teachers import Teacher
from shoulders.training.checkpoint import fingerprint
from tests.tasks.scenes import save_masks, save_objects
from tests.tiny import run_cli, save_base, save_convnext, save_images, save_segformer, tiny_recipe

COUNTS = {"train": 6, "val": 3, "test": 4}
FEW_STEPS = 0.02  # of the usual number of steps


class SummaryOnly(torch.nn.Module):
    """A teacher without spatial features."""

    def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
        return {"last": Features(pixels.mean((2, 3)), None)}


def summary_teacher() -> Teacher:
    return Teacher(SummaryOnly(), size=(32, 32))


def evaluate_quickly(*args: Any, **settings: Any) -> list[dict[str, Any]]:
    return evaluate(*args, **{"workers": 0, "step_fraction": FEW_STEPS, **settings})


def saved_rows(run: Path, task: str) -> list[dict[str, Any]]:
    return [row for row in json.loads((run / "results.json").read_text()) if row["task"] == task]


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


@pytest.mark.parametrize("task", DATA)
def test_all_models_are_evaluated_and_the_rows_are_saved(task: str, world: Path) -> None:
    if task != "semantic":
        pytest.importorskip("faster_coco_eval")
    models: list[str] = []
    rows = evaluate_quickly(world / "run", task, world / DATA[task], on_model=models.append)
    assert models == ["student", "base", "classifier", "segmenter"]
    assert {row["model"] for row in rows if row["metric"] == TASKS[task].metric.in_probes} == set(models)
    assert all(row["task"] == task and row["n"] == 4 and 0 <= row["value"] <= 1 for row in rows)
    assert saved_rows(world / "run", task) == rows
    again = evaluate_quickly(world / "run", task, world / DATA[task], ("base",))
    values = {row["metric"]: row["value"] for row in rows if row["model"] == "base"}
    assert {row["metric"]: row["value"] for row in again} == values
    assert len(saved_rows(world / "run", task)) == len(rows)


def test_a_teacher_without_spatial_features_is_refused_before_any_evaluation(world: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((world / "run/recipe.yaml").read_text())
    recipe["teachers"]["flat"] = {"module": "tests.evaluation.test_evaluate:summary_teacher"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    models: list[str] = []
    with pytest.raises(RecipeError, match="teachers.flat: has no spatial features, which semantic needs"):
        evaluate_quickly(tmp_path, "semantic", world / "masks", ("segmenter", "flat"), on_model=models.append)
    assert models == []
    rows = evaluate_quickly(tmp_path, "semantic", world / "masks", ("segmenter",), on_model=models.append)
    assert (models, rows[0]["model"]) == (["segmenter"], "segmenter")


def test_taps_of_several_grids_are_concatenated_on_the_finest_of_at_least_8_px() -> None:
    class Levels(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> dict[str, Features]:
            pooled = {side: torch.nn.functional.adaptive_avg_pool2d(pixels, side) for side in (2, 8, 4)}
            return {f"level{side}": Features.from_map(maps * side) for side, maps in pooled.items()}

    teacher = Teacher(Levels(), size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    pixels = torch.full((2, 3, 32, 32), 51, dtype=torch.uint8)
    features = all_taps(teacher)(Batch(torch.arange(2), {(32, 32): pixels}))
    assert features.grid == (4, 4)
    expected = torch.tensor([2.0, 8.0, 4.0]).repeat_interleave(3) * 0.2
    torch.testing.assert_close(features.spatial, expected.expand(2, 16, 9))


def test_finetuned_rows_are_saved_beside_those_of_probes(world: Path) -> None:
    run, data, settings = world / "run", world / "labelled", AdapterSettings(min_steps=4)
    probe_rows = evaluate_quickly(run, "classification", data, ["student"])
    before = fingerprint(load(run))
    rows = evaluate_quickly(run, "classification", data, finetune="adapter", adapter_settings=settings)
    assert [(row["model"], row["metric"]) for row in rows] == [("student", "top1"), ("base", "top1")]
    described = rows[0]["settings"]
    probe_value = {row["metric"]: row["value"] for row in probe_rows}["linear_top1"]
    assert (described["finetune"], described["probe_value"], described["steps"]) == ("adapter", probe_value, 6)
    assert described["lr"] in {one.lr for one in settings.candidates}
    saved = saved_rows(run, "classification")
    assert [row for row in saved if "finetune" not in row["settings"] and row["model"] == "student"] == probe_rows
    assert [row for row in saved if "finetune" in row["settings"]] == rows
    assert fingerprint(load(run)) == before
    again = evaluate_quickly(run, "classification", data, ["base"], finetune="adapter", adapter_settings=settings)
    assert [row["value"] for row in again] == [row["value"] for row in rows if row["model"] == "base"]


def test_without_val_no_learning_rate_is_selected() -> None:
    # the probe that finetuning starts from was fitted on all of train: a part of that selects nothing
    settings = AdapterSettings()
    assert settings.schedule(1000, has_val=True).candidates == settings.candidates
    assert settings.schedule(1000, has_val=False).candidates == settings.candidates[:1]
    steps = [settings.schedule(images, has_val=True).steps for images in (10, 3200, 10**6)]
    assert steps == [300, 1000, 5000]


def test_rows_of_a_larger_probe_are_saved_beside_those_of_the_default_one(world: Path) -> None:
    default = evaluate_quickly(world / "run", "semantic", world / "masks", ["student"])
    rows = evaluate_quickly(
        world / "run", "semantic", world / "masks", ["student"], probe="upernet", step_fraction=0.002
    )
    assert {(row["settings"]["head"], row["settings"]["steps"]) for row in rows} == {("upernet", 2)}
    saved = [row for row in saved_rows(world / "run", "semantic") if row["model"] == "student"]
    assert [row for row in saved if row["settings"].get("head") == "linear"] == default
    assert [row for row in saved if row["settings"].get("head") == "upernet"] == rows
    assert [row["metric"] for row in rows][:2] == ["mIoU", "pixel_accuracy"]
    open_probe(world / "run", "student/semantic")  # only the default one is saved
    with pytest.raises(RecipeError, match="--probe: 'upernet' is none of dense, rt_detr_v2, the probes of detection"):
        evaluate(world / "run", "detection", world / "objects", ["student"], probe="upernet")


def test_only_models_with_an_adapter_are_finetuned(world: Path) -> None:
    with pytest.raises(RecipeError, match="--finetune: classifier has no adapter; choose --models from"):
        evaluate(world / "run", "semantic", world / "masks", ["student", "classifier"], finetune="adapter")
    with pytest.raises(RecipeError, match="--finetune: scratch, teachers has no adapter"):
        evaluate(world / "run", "semantic", world / "masks", ["scratch", "teachers"], finetune="adapter")
    with pytest.raises(RecipeError, match="--finetune: 'base' cannot be finetuned; only adapter can"):
        evaluate(world / "run", "semantic", world / "masks", ["student"], finetune="base")


def test_unknown_tasks_and_models_are_refused(world: Path) -> None:
    with pytest.raises(RecipeError, match="'flying' is not one of classification, detection, semantic, instance"):
        evaluate(world / "run", "flying", world / "masks")
    with pytest.raises(
        RecipeError, match="no nobody in this run; choose from student, base, teachers, concatenated, scratch, "
    ):
        evaluate(world / "run", "semantic", world / "masks", ("nobody",))
    with pytest.raises(RecipeError, match="scratch is trained by .*evaluate_with_baseline"):
        evaluate(world / "run", "semantic", world / "masks", ("scratch",))


def test_a_broken_mask_is_one_line_and_exit_3(world: Path, tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "annotations/val/1.png").write_bytes(b"no mask")
    with pytest.raises(DataError, match="val/1.png: not a mask"):
        evaluate(world / "run", "semantic", tmp_path)
    done = run_cli("evaluate", world / "run", "--task", "semantic", "--data", tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1), done.stderr
    assert "val/1.png: not a mask" in done.stderr


def test_the_table_counts_test_images_that_are_skipped(world: Path, tmp_path: Path) -> None:
    for split, count in (("train", 12), ("test", 8)):
        save_images(tmp_path / "data" / split, count, classes=2)
    for file in sorted((tmp_path / "data/test").rglob("*.jpg"))[:2]:
        file.write_bytes(file.read_bytes()[:300])
    options = ["--task", "classification", "--data", str(tmp_path / "data"), "--models", "student", "--workers", "0"]
    refused = run_cli("evaluate", str(world / "run"), *options)
    assert refused.returncode == 3 and "at most 0.01 of them may be skipped" in refused.stderr
    assert refused.stderr.endswith("or give --max-unreadable 0.25\n")
    options += ["--max-unreadable", "0.25"]
    printed = run_cli("evaluate", str(world / "run"), *options).stdout
    assert printed.startswith("classification: scores in %, 6 of 8 images; skipped: 2 damaged ('")
    settings = saved_rows(world / "run", "classification")[-1]["settings"]
    assert settings["skipped_test"] == 2
    for file in sorted((tmp_path / "data/test").rglob("*.jpg"))[:3]:
        file.write_bytes(b"")
    refused = run_cli("evaluate", str(world / "run"), *options)
    assert refused.returncode == 3 and "3 of 8 labelled images cannot be read, 3 empty file ('" in refused.stderr


def test_the_table_leaves_out_single_classes(world: Path, tmp_path: Path) -> None:
    save_masks(tmp_path, {"train": 2, "val": 2})
    student, models = world / "run/student", "student,base"
    done = run_cli("evaluate", student, "--task", "semantic", "--data", tmp_path, "--models", models)
    lines = done.stdout.splitlines()
    assert lines[0] == "semantic: scores in %, 2 images", done.stderr
    assert lines[1].split() == ["model", "mIoU", "pixel_accuracy"]
    assert [line.split()[0] for line in lines[3:]] == ["student", "base"]


def test_probes_and_the_baseline_from_the_command_line(world: Path, tmp_path: Path) -> None:
    labelled, run = world / "labelled", world / "run"
    options = ["--models", "student,scratch", "--scratch-steps", 2, "--workers", 0]
    done = run_cli("evaluate", run, "--task", "classification", "--data", labelled, *options)
    lines = done.stdout.splitlines()
    assert lines[1].split()[:2] == ["model", "knn_top1"] and lines[1].split()[-1] == "top1", done.stderr
    assert [line.split()[0] for line in lines[3:]] == ["student", "scratch"]
    image = labelled / "class0" / "0000.jpg"
    done = run_cli("predict", run, image, "--probe", "student/classification", "--out", tmp_path, "--json")
    assert list(json.loads(done.stdout)["0000.jpg"]) == ["student/classification"], done.stderr
