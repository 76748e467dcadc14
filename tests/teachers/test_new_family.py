"""A new family of teachers is one new row of the table: all commands know it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf

import shoulders
from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.teachers import FAMILIES, Tap, load_teacher
from shoulders.teachers.families import Family, HeadSpec, Taps
from shoulders.teachers.families.extract import extract_final_map
from shoulders.teachers.families.inject import inject_pooled
from shoulders.teachers.heads import load_head
from tests.tiny import run_cli, save_base, save_images, tiny_recipe

MODEL_TYPE = "bit"  # a model type of transformers that the table does not have
ROW = Family(
    "hierarchical",
    "BitModel",
    Taps("last", lambda config: ("last",)),
    extract_final_map,
    head=HeadSpec("bit", inject_pooled),
    size_multiple=32,
    default_size=64,
)


@pytest.fixture(scope="module", autouse=True)
def _new_row() -> Iterator[None]:
    """The row stands in the table during these tests."""
    with pytest.MonkeyPatch.context() as patch:
        assert MODEL_TYPE not in FAMILIES
        patch.setitem(FAMILIES, MODEL_TYPE, ROW)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a teacher of the new family, and images with the two classes that the teacher's head has."""
    root = tmp_path_factory.mktemp("new_family")
    save_base(root / "base")
    torch.manual_seed(0)
    names = {0: "class0", 1: "class1"}
    config = hf.BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=2, id2label=names)
    model = hf.BitForImageClassification(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(root / "teacher")
    for split in ("train", "test"):
        save_images(root / "images" / split, 16, classes=2)
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A student that was distilled from the teacher and keeps its head."""
    teachers = {"new": {"model": str(root / "teacher")}}
    shoulders.distill(tiny_recipe(root, teachers=teachers, keep_heads=["new"], train__steps=2, images__holdout=8))
    return root / "run"


def test_it_is_listed_with_the_other_families() -> None:
    rows = {row["model type"]: row for row in json.loads(run_cli("teachers", "--families", "--json").stdout)}
    assert rows[MODEL_TYPE] == {
        "model type": MODEL_TYPE,
        "kind": "hierarchical",
        "taps": "last",
        "default": "the last one",
        "size": "multiples of 32",
    }


def test_a_teacher_of_it_computes_the_features_and_the_output_of_the_original(root: Path) -> None:
    spec = TeacherSpec(model=str(root / "teacher"))
    teacher = load_teacher("new", spec)
    assert teacher.taps == {"last": Tap(32, 32, (8, 8))}
    original = hf.BitForImageClassification.from_pretrained(root / "teacher").eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        normalized = (pixels - teacher.mean) / teacher.std
        maps, logits = original.bit(normalized).last_hidden_state, original(normalized).logits
    features = teacher(pixels)
    assert logits.std() > 0
    assert torch.equal(features["last"].to_map(), maps)
    assert torch.equal(load_head("new", spec, teacher)(features).logits, logits)


def test_a_student_keeps_its_head_and_predicts_with_it(root: Path, run: Path, tmp_path: Path) -> None:
    (prediction,) = shoulders.load(run).predict("new", torch.rand(1, 3, 32, 32))
    assert {one["label"] for one in prediction} == {"class0", "class1"}
    done = run_cli(
        "predict", run, root / "images" / "test", "--head", "new", "--out", tmp_path / "predictions", "--json"
    )
    assert done.returncode == 0, done.stderr
    predictions = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert len(predictions) == 16 and all(set(heads) == {"new"} for heads in predictions.values())


def test_its_head_is_evaluated_and_reported(root: Path, run: Path) -> None:
    done = run_cli("evaluate", run, "--task", "classification", "--data", root / "images", "--heads", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((run / "results.json").read_text())
    top1 = {row["model"]: row["value"] for row in rows if row.get("head") == "new" and row["metric"] == "top1"}
    assert set(top1) == {"student", "new"} and all(0 <= value <= 1 for value in top1.values())
    done = run_cli("report", run)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\bhead\b[^<>]*\bnew\b|\bnew\b[^<>]*\bhead\b", (run / "report.html").read_text())


def test_without_its_row_it_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, MODEL_TYPE)
    with pytest.raises(RecipeError, match="of model type 'bit', which is not supported; known: beit, "):
        load_teacher("new", TeacherSpec(model=str(root / "teacher")))
