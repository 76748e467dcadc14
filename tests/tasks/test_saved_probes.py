"""A saved probe has the score of the fitted one, runs in ``predict``, and is refused when it is damaged."""

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
from shoulders.evaluation.finetune_models import AdapterSettings
from shoulders.inference import adapted_encoder, features_of_encoder, features_of_student
from shoulders.model import load
from shoulders.prediction import predict
from shoulders.storage.manifest import write_manifest
from shoulders.tasks import TASKS, FinetuneTask
from shoulders.tasks.finetune import HParams
from shoulders.tasks.saved_probes import FILES, open_probe, probe_names
from tests.evaluation.test_evaluate import COUNTS, evaluate_quickly, world  # noqa: F401

DATA = {"classification": "labelled", "semantic": "masks", "detection": "objects", "instance": "objects"}
Scores = dict[str, dict[str, float]]


def finetune_task(name: str, path: Path) -> FinetuneTask:
    return TASKS[name].finetune(TASKS[name].find_splits(path, "image"))


@pytest.fixture(scope="module")
def scores(world: Path) -> Scores:  # noqa: F811
    """{probe: {metric: value}} of `evaluate`, for probes on the student, on its base and on a teacher."""
    values = {}
    for task, folder in DATA.items():
        rows = evaluate_quickly(world / "run", task, world / folder, ["student"])
        values[f"student/{task}"] = {row["metric"]: row["value"] for row in rows}
    rows = evaluate_quickly(world / "run", "semantic", world / "masks", ["base", "classifier"])
    for name in ("base", "classifier"):
        values[f"{name}/semantic"] = {row["metric"]: row["value"] for row in rows if row["model"] == name}
    return values


@pytest.mark.parametrize("task", DATA)
def test_an_opened_probe_has_the_score_of_the_fitted_one(task: str, world: Path, scores: Scores) -> None:  # noqa: F811
    if task in ("detection", "instance"):
        pytest.importorskip("faster_coco_eval")
    probe = open_probe(world / "run", f"student/{task}")
    evaluator = finetune_task(task, world / DATA[task])
    assert (probe.classes, probe.size, probe.adapter) == (evaluator.splits.classes, (32, 32), None)
    features_of = features_of_student(load(world / "run"), probe.size)
    values, _ = evaluator.evaluate(probe.head, features_of, evaluator.splits.test, probe.size, 64, 0)
    expected = {metric.removeprefix("linear_"): value for metric, value in scores[f"student/{task}"].items()}
    assert values == {metric: expected[metric] for metric in values} and len(values) > 0


def test_all_probes_of_a_run_are_listed(world: Path, scores: Scores) -> None:  # noqa: F811
    assert set(probe_names(world / "run")) >= set(scores)
    with pytest.raises(RecipeError, match="--probe: 'student/depth' is not in .*; it has base/semantic, "):
        open_probe(world / "run", "student/depth")
    with pytest.raises(RecipeError, match="it has none; shoulders evaluate saves them"):
        predict(world / "run/student", world / "photos", probes=["student/semantic"])


def test_predicted_masks_have_the_accuracy_of_the_evaluation(world: Path, scores: Scores, tmp_path: Path) -> None:  # noqa: F811
    for name in ("student/semantic", "base/semantic", "classifier/semantic"):
        predictions = predict(world / "run", world / "masks/images/test", out=tmp_path / "out", probes=[name])
        assert len(predictions) == COUNTS["test"]
        correct = total = 0
        for image, by_name in predictions.items():
            mask = np.array(Image.open(world / "masks/annotations/test" / image))
            for one in by_name[name]:
                assert set(one) == {"label", "score", "mask"} and one["score"] is None
                label = ["ground", "red", "blue"].index(one["label"])
                correct += int((decode_runs(one["mask"]) & (mask == label)).sum())
            total += int((mask != 255).sum())
        assert correct / total == pytest.approx(scores[name]["pixel_accuracy"], abs=1e-12)
    assert (tmp_path / "out" / "0-student-semantic.png").is_file()


def decode_runs(mask: dict[str, Any]) -> np.ndarray:
    flat = np.repeat(np.arange(len(mask["counts"])) % 2, mask["counts"]).astype(bool)
    return flat.reshape(mask["size"], order="F")


def test_predicted_classes_have_the_accuracy_of_the_evaluation(world: Path, scores: Scores) -> None:  # noqa: F811
    splits, name = TASKS["classification"].find_splits(world / "labelled", "image"), "student/classification"
    tested = {Path(splits.test.images.name(int(index))).name for index in splits.test.indices}
    correct = 0
    for label in splits.classes:
        predictions = predict(world / "run", world / "labelled" / label, probes=[name])
        of_test = [by_name[name] for image, by_name in predictions.items() if image in tested]
        assert all(one[0].keys() == {"label", "score"} for one in of_test)
        correct += sum(one[0]["label"] == label for one in of_test)
    assert correct / len(splits.test.indices) == scores[name]["linear_top1"]


def test_objects_are_predicted_in_the_form_of_the_pipelines(world: Path, scores: Scores) -> None:  # noqa: F811
    pytest.importorskip("faster_coco_eval")
    image, names = world / "objects/test/0.png", ["student/detection", "student/instance"]
    by_name = predict(world / "run", image, probes=names, threshold=0.0)["0.png"]
    assert list(by_name) == names and by_name["student/detection"] and by_name["student/instance"]
    box = by_name["student/detection"][0]
    assert box["label"] in ("red", "blue") and set(box["box"]) == {"xmin", "ymin", "xmax", "ymax"}
    mask = by_name["student/instance"][0]
    assert set(mask) == {"label", "score", "mask"} and mask["mask"]["size"] == [48, 64]
    assert predict(world / "run", image, probes=names, threshold=1.0)["0.png"] == {name: [] for name in names}


def test_a_finetuned_probe_is_saved_with_its_adapter(world: Path, scores: Scores) -> None:  # noqa: F811
    run, settings = world / "run", AdapterSettings(min_steps=5, candidates=(HParams("adamw", 1e-2),))
    evaluator = finetune_task("semantic", world / "masks")
    for model in ("student", "base"):
        rows = evaluate_quickly(
            run, "semantic", world / "masks", [model], finetune="adapter", adapter_settings=settings
        )
        probe = open_probe(run, f"{model}/semantic-finetuned")
        student = load(run)
        encoder = adapted_encoder(student, model, probe.adapter)
        base_weights = dict(student.encoder.base.named_parameters())
        assert all(torch.equal(p, base_weights[name]) for name, p in encoder.base.named_parameters())
        features_of = features_of_encoder(encoder, (32, 32))
        values, _ = evaluator.evaluate(probe.head, features_of, evaluator.splits.test, (32, 32), 64, 0)
        assert values == {row["metric"]: row["value"] for row in rows}
        initial = adapted_encoder(student, model).adapter.state_dict()
        assert probe.adapter is not None
        assert any(not torch.equal(value, initial[name]) for name, value in probe.adapter.items())
        predictions = predict(run, world / "masks/images/test/0.png", probes=[f"{model}/semantic-finetuned"])
        assert predictions["0.png"][f"{model}/semantic-finetuned"]


CHANGES = {
    "other head": {"head": "dense"},
    "other width": {"width": 5},
    "absurd width": {"width": 10**9},
    "unknown task": {"task": "depth"},
}


@pytest.mark.parametrize("damage", ["cut", "no weights", "not JSON", *CHANGES])
def test_a_damaged_probe_is_refused(damage: str, world: Path, scores: Scores, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "probes/student/semantic"
    shutil.copytree(world / "run/probes/student/semantic", folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "not JSON":
        (folder / "config.json").write_text("{")
    else:
        (folder / "config.json").write_text(json.dumps(config | CHANGES[damage]))
    write_manifest(folder, FILES)
    with pytest.raises(DataError, match="student/semantic: not a valid probe: .*; fit it again"):
        open_probe(tmp_path, "student/semantic")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "manifest.json"])
def test_a_flipped_bit_in_a_probe_is_refused(file: str, world: Path, scores: Scores, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "probes/student/semantic"
    shutil.copytree(world / "run/probes/student/semantic", folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) * 4 // 5] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(DataError, match=r"student/semantic: not a valid probe: .*; fit it again"):
        open_probe(tmp_path, "student/semantic")
    if file != "config.json":
        open_probe(tmp_path, "student/semantic", verify=False)


def test_a_partly_written_probe_is_not_listed(world: Path, scores: Scores, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(world / "run/probes/student/semantic", tmp_path / "probes/student/semantic.partial")
    assert probe_names(tmp_path) == []
