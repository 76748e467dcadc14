"""A probe that was fitted is kept, scores the same when it is opened again, and answers through ``predict``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoulders.errors import DataError, RecipeError
from shoulders.evaluation import finetune_models as trainees
from shoulders.evaluation.evaluate import evaluate
from shoulders.evaluation.finetune_models import adapted
from shoulders.evaluation.probes import open_probe, probe_names
from shoulders.inference import features_of_student
from shoulders.model import load
from shoulders.prediction import predict
from shoulders.tasks import TASKS
from shoulders.tasks.finetune import HParams
from tests.evaluation.test_evaluate import COUNTS, _quick, world  # noqa: F401

DATA = {"classification": "labelled", "semantic": "masks", "detection": "objects", "instance": "objects"}
METRIC = {"classification": "linear_top1", "semantic": "mIoU", "detection": "AP", "instance": "mask_AP"}


@pytest.fixture(scope="module")
def scores(world: Path) -> dict[str, dict[str, float]]:  # noqa: F811
    """What `evaluate` says of probes on the student, and of one on its base and on a teacher."""
    with pytest.MonkeyPatch.context() as patched:
        _quick.__wrapped__(patched)  # type: ignore[attr-defined]
        found = {}
        for task, folder in DATA.items():
            rows = evaluate(world / "run", task, world / folder, ["student"], workers=0)
            found[f"student/{task}"] = {row["metric"]: row["value"] for row in rows}
        rows = evaluate(world / "run", "semantic", world / "masks", ["base", "classifier"], workers=0)
        for name in ("base", "classifier"):
            found[f"{name}/semantic"] = {row["metric"]: row["value"] for row in rows if row["model"] == name}
        return found


@pytest.mark.parametrize("task", DATA)
def test_an_opened_probe_scores_what_evaluate_said(task: str, world: Path, scores: Any) -> None:  # noqa: F811
    if task in ("detection", "instance"):
        pytest.importorskip("faster_coco_eval")
    probe = open_probe(world / "run", f"student/{task}")
    goal = TASKS[task].tune(TASKS[task].find(world / DATA[task], "image"))
    assert (probe.classes, probe.size, probe.adapter) == (goal.splits.classes, (32, 32), None)
    features_of = features_of_student(load(world / "run"), probe.size)
    values, _ = goal.measure(probe.head, features_of, goal.splits.test, probe.size, 64, 0)
    said = {metric.removeprefix("linear_"): value for metric, value in scores[f"student/{task}"].items()}
    assert values == {metric: said[metric] for metric in values} and len(values) > 0


def test_all_probes_of_a_run_are_listed(world: Path, scores: Any) -> None:  # noqa: F811
    assert set(probe_names(world / "run")) >= set(scores)
    with pytest.raises(RecipeError, match="--probe: 'student/depth' is not in .*; it has base/semantic, "):
        open_probe(world / "run", "student/depth")
    with pytest.raises(RecipeError, match="it has none; shoulders evaluate leaves them there"):
        predict(world / "run/student", world / "photos", probes=["student/semantic"])


def test_predict_says_what_evaluate_scored(world: Path, scores: Any, tmp_path: Path) -> None:  # noqa: F811
    for name in ("student/semantic", "base/semantic", "classifier/semantic"):
        told = predict(world / "run", world / "masks/images/test", out=tmp_path / "out", probes=[name])
        assert len(told) == COUNTS["test"]
        right = total = 0
        for image, answers in told.items():
            mask = np.array(Image.open(world / "masks/annotations/test" / image))
            for one in answers[name]:
                assert set(one) == {"label", "score", "mask"} and one["score"] is None
                predicted = _drawn(one["mask"])
                kind = ["ground", "red", "blue"].index(one["label"])
                right += int((predicted & (mask == kind)).sum())
            total += int((mask != 255).sum())
        assert right / total == pytest.approx(scores[name]["pixel_accuracy"], abs=1e-12)
    assert (tmp_path / "out" / "0-student-semantic.png").is_file()


def _drawn(mask: dict[str, Any]) -> np.ndarray:
    flat = np.repeat(np.arange(len(mask["counts"])) % 2, mask["counts"]).astype(bool)
    return flat.reshape(mask["size"], order="F")


def test_classes_of_images_are_those_evaluate_counted(world: Path, scores: Any) -> None:  # noqa: F811
    splits = TASKS["classification"].find(world / "labelled", "image")
    right = 0
    for name in splits.classes:
        told = predict(world / "run", world / "labelled" / name, probes=["student/classification"])
        held = {Path(splits.test.images.name(int(index))).name for index in splits.test.indices}
        said = {image: answers["student/classification"] for image, answers in told.items() if image in held}
        assert all(one[0].keys() == {"label", "score"} for one in said.values())
        right += sum(one[0]["label"] == name for one in said.values())
    assert right / len(splits.test.indices) == scores["student/classification"]["linear_top1"]


def test_objects_come_in_the_form_of_the_pipelines(world: Path, scores: Any) -> None:  # noqa: F811
    pytest.importorskip("faster_coco_eval")
    names = ["student/detection", "student/instance"]
    told = predict(world / "run", world / "objects/test/0.png", probes=names, threshold=0.0)["0.png"]
    assert list(told) == names and told["student/detection"] and told["student/instance"]
    box = told["student/detection"][0]
    assert box["label"] in ("red", "blue") and set(box["box"]) == {"xmin", "ymin", "xmax", "ymax"}
    mask = told["student/instance"][0]
    assert set(mask) == {"label", "score", "mask"} and mask["mask"]["size"] == [48, 64]
    assert predict(world / "run", world / "objects/test/0.png", probes=names, threshold=1.0)["0.png"] == {
        name: [] for name in names
    }


def test_a_tuned_probe_brings_its_adapter(world: Path, scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(trainees, "FEWEST_STEPS", 5)
    monkeypatch.setattr(trainees, "TRIES", (HParams("adamw", 1e-2),))
    for model in ("student", "base"):
        rows = evaluate(world / "run", "semantic", world / "masks", [model], workers=0, tune="adapter")
        probe = open_probe(world / "run", f"{model}/semantic-tuned")
        student = load(world / "run")
        before = {name: p.clone() for name, p in student.encoder.base.named_parameters()}
        student.encoder = adapted(student, model, probe.adapter)
        assert all(torch.equal(p, before[name]) for name, p in student.encoder.base.named_parameters())
        goal = TASKS["semantic"].tune(TASKS["semantic"].find(world / "masks", "image"))
        values, _ = goal.measure(probe.head, features_of_student(student, (32, 32)), goal.splits.test, (32, 32), 64, 0)
        assert values == {row["metric"]: row["value"] for row in rows}
        fresh = adapted(load(world / "run"), model).adapter.state_dict()
        assert probe.adapter is not None
        assert any(not torch.equal(value, fresh[name]) for name, value in probe.adapter.items())
        told = predict(world / "run", world / "masks/images/test/0.png", probes=[f"{model}/semantic-tuned"])
        assert told["0.png"][f"{model}/semantic-tuned"]


@pytest.mark.parametrize("harm", ["cut", "no weights", "not JSON", "other head", "other width", "unknown task"])
def test_a_damaged_probe_is_refused(harm: str, world: Path, scores: Any, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "probes/student/semantic"
    shutil.copytree(world / "run/probes/student/semantic", folder)
    weights, told = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    changed = {"other head": {"head": "dense"}, "other width": {"width": 5}, "unknown task": {"task": "depth"}}
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif harm == "no weights":
        weights.unlink()
    elif harm == "not JSON":
        (folder / "config.json").write_text("{")
    else:
        (folder / "config.json").write_text(json.dumps(told | changed[harm]))
    with pytest.raises(DataError, match="student/semantic: not a sound probe: .*; fit it again"):
        open_probe(tmp_path, "student/semantic")


def test_a_half_written_probe_is_not_there(world: Path, scores: Any, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(world / "run/probes/student/semantic", tmp_path / "probes/student/semantic.partial")
    assert probe_names(tmp_path) == []
