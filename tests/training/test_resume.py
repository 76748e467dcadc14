"""A resumed run: from the latest valid checkpoint, with the same models, images and recipe only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoulders.config.sections import Train
from shoulders.errors import DataError, RecipeError
from shoulders.training.checkpoint import checkpoints, load_checkpoint
from shoulders.training.logger import MetricLogger
from tests.runs import run, run_tree
from tests.tiny import metric_rows, same_tensors, save_convnext, save_images, student_weights


def test_resuming_a_finished_run_changes_nothing(
    tiny_world: Path, uninterrupted_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in uninterrupted_run.rglob("*") if path.is_file()}

    before = contents()
    summary = run(tiny_world, uninterrupted_run, resume=True)
    assert "finished already" in capsys.readouterr().err
    assert contents() == before
    assert summary["fvu_spread"] == metric_rows(uninterrupted_run, "evaluation")[-1]["fvu_spread"]


def test_a_finished_run_needs_no_checkpoint(
    tiny_world: Path, uninterrupted_run: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(uninterrupted_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(tiny_world, tmp_path / "run", resume=True)
    assert "finished already" in capsys.readouterr().err


def test_a_run_resumes_from_the_previous_checkpoint_where_the_latest_is_damaged(
    tiny_world: Path, uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(tiny_world, out)
    newest = checkpoints(out / "checkpoints")[-1] / "tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    shutil.rmtree(out / "student")
    run(tiny_world, out, resume=True)
    assert "trying the previous one" in capsys.readouterr().err
    assert same_tensors(student_weights(out), student_weights(uninterrupted_run))
    for checkpoint in checkpoints(out / "checkpoints"):
        (checkpoint / "state.json").unlink()
    shutil.rmtree(out / "student")
    with pytest.raises(DataError, match="none of the 2 checkpoints is valid"):
        run(tiny_world, out, resume=True)


def test_resuming_without_a_checkpoint_starts_with_the_first_step(
    tiny_world: Path, tmp_path: Path, capsys: Any
) -> None:
    run(tiny_world, tmp_path / "run", resume=True, train__steps=1)
    assert "no checkpoint to resume from; starting with the first step" in capsys.readouterr().err


def test_the_seconds_of_a_run_include_those_before_it_was_resumed(tiny_world: Path, tmp_path: Path) -> None:
    expected = run(tiny_world, tmp_path / "run", train__steps=4)["seconds"]
    shutil.rmtree(tmp_path / "run" / "student")
    (newest,) = checkpoints(tmp_path / "run" / "checkpoints")
    state = load_checkpoint(newest)[1]
    assert 0 < state["seconds"] < expected
    summary = run(tiny_world, tmp_path / "run", resume=True, train__steps=4)
    assert summary["seconds"] > state["seconds"]


def test_a_run_resumes_where_no_teacher_has_a_summary(tiny_world: Path, tmp_path: Path) -> None:
    maps_alone = {"segmenter": {"model": str(tiny_world / "segmenter"), "taps": ["stage0"]}}
    changes: dict[str, Any] = {
        "teachers": maps_alone,
        "transfer__preserve": 0.0,
        "train__precision": "fp32",
        "student__adapter": {"kind": "conv", "width": 32},
    }
    run(tiny_world, tmp_path / "run", **changes)
    expected = student_weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    newest = checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(max(newest))
    run(tiny_world, tmp_path / "run", resume=True, **changes)
    assert same_tensors(student_weights(tmp_path / "run"), expected)


def test_a_run_resumes_only_with_the_same_models(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for name in ("base", "classifier", "segmenter", "images"):
        shutil.copytree(tiny_world / name, tmp_path / "world" / name)
    run(tmp_path / "world", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    save_convnext(tmp_path / "world" / "classifier", seed=9)
    with pytest.raises(DataError, match=r"the base, a teacher, or .* is not the same as when this run started"):
        run(tmp_path / "world", tmp_path / "run", resume=True)


def test_a_run_resumes_only_with_the_same_preprocessing(tiny_world: Path, tmp_path: Path) -> None:
    for name in ("base", "classifier", "segmenter", "images"):
        shutil.copytree(tiny_world / name, tmp_path / "world" / name)
    run(tmp_path / "world", tmp_path / "run", train__steps=1)
    shutil.rmtree(tmp_path / "run" / "student")
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}}
    (tmp_path / "world" / "classifier" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    with pytest.raises(DataError, match=r"the base, a teacher, or .* is not the same as when this run started"):
        run(tmp_path / "world", tmp_path / "run", resume=True, train__steps=1)


def test_a_run_resumes_only_with_the_same_images(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for name in ("base", "classifier", "segmenter", "images"):
        shutil.copytree(tiny_world / name, tmp_path / "world" / name)
    run(tmp_path / "world", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    save_images(tmp_path / "world" / "images" / "more", 3)
    with pytest.raises(DataError, match="the set of images is not the same as when this run started"):
        run(tmp_path / "world", tmp_path / "run", resume=True)


def test_a_run_resumes_only_with_the_same_order_of_teachers(tiny_world: Path, uninterrupted_run: Path) -> None:
    teachers = run_tree(tiny_world, uninterrupted_run)["teachers"]
    with pytest.raises(RecipeError, match="teachers: the run started with classifier, segmenter in this order"):
        run(tiny_world, uninterrupted_run, resume=True, teachers=dict(reversed(teachers.items())))


def test_damaged_results_are_named(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(run_tree(tiny_world, tmp_path / "run")))
    (tmp_path / "run" / "results.json").write_text("[{")
    with pytest.raises(DataError, match=r"results.json: damaged .*; move it out of the way"):
        run(tiny_world, tmp_path / "run", resume=True)


def test_an_incomplete_line_of_the_log_is_ignored(tmp_path: Path) -> None:
    lines = [json.dumps({"step": 3, "kind": "evaluation", "fvu/one": 0.5}), '{"step": 6, "ki']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    logger = MetricLogger(tmp_path, 3, Train(), is_main=False)
    assert logger.last_evaluation() == {"fvu/one": 0.5}
