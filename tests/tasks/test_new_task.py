"""A new task is one row: once it is in the table, the command line, evaluation, prediction and report know it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shoulders
from shoulders.evaluation.finetune_models import AdapterSettings
from shoulders.features import Features, FeaturesOf, Skipped
from shoulders.images import MAX_PIXELS, View, evaluation_batches
from shoulders.report import write_report
from shoulders.tasks import TASKS, Metric, ProbeHead, Row, Task, task_of_head
from shoulders.tasks.data.labelled import LabelledSplit, LabelledSplits, find_labelled
from shoulders.tasks.task import rows_of
from shoulders.tasks.vector_probes import image_vectors
from tests.evaluation.test_evaluate import evaluate_quickly, world  # noqa: F401
from tests.tiny import run_cli


class MeanHead(nn.Module):
    """Predicts one number for each image."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, 1)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.output(vectors)[:, 0]


def fit_age_probe(
    features_of: FeaturesOf,
    splits: LabelledSplits,
    sizes: Sequence[tuple[int, int]],
    batch: int = 64,
    workers: int = 0,
    seed: int = 0,
    on_head: Callable[[nn.Module], object] = lambda head: None,
    step_fraction: float = 1.0,
    widths: Sequence[int] = (),
) -> list[Row]:
    torch.manual_seed(seed)
    (first,) = evaluation_batches(splits.train.images, list(sizes), 1, splits.train.indices[:1], workers=workers)
    head = MeanHead(image_vectors(features_of(first)).shape[1], splits.n_classes)
    on_head(head)
    values, n = AgeTask(splits).evaluate(head, features_of, splits.test, sizes[0], batch, workers)
    return rows_of("age", values, n, 0.0, {"head": "mean"})


def predict_ages(
    head: MeanHead, classes: Sequence[str], features: Features, sizes: Sequence[tuple[int, int]], threshold: float
) -> list[Any]:
    return [[{"label": "age", "score": age}] for age in head(image_vectors(features)).tolist()]


@dataclass(frozen=True)
class AgeTask:
    """Finetuning: the squared error of the age, which is the index of the class."""

    splits: LabelledSplits
    task: str = "age"
    metric: str = "closeness"
    whole_images: bool = False

    def build_head(self, width: int) -> nn.Module:
        return MeanHead(width, self.splits.n_classes)

    def read_image(self, split: LabelledSplit, position: int, min_side: int) -> tuple[Tensor, Any] | Skipped:
        return split.images.pixels(int(split.indices[position]), MAX_PIXELS, min_side)

    def target(self, split: LabelledSplit, position: int, view: View, grid: tuple[int, int]) -> float:
        return float(split.labels()[position])

    def loss(self, head: nn.Module, features: Features, targets: Sequence[float]) -> Tensor:
        return (head(image_vectors(features)) - torch.tensor(targets)).square().mean()

    @torch.no_grad()
    def evaluate(
        self, head: nn.Module, features_of: FeaturesOf, split: Any, size: Any, batch: int, workers: int
    ) -> tuple[dict[str, float], int]:
        errors: list[float] = []
        for images in evaluation_batches(split.images, [size], batch, split.indices, workers=workers):
            assert images.labels is not None
            errors += (head(image_vectors(features_of(images))) - images.labels).abs().tolist()
        return {"closeness": 1 / (1 + sum(errors) / len(errors))}, len(errors)


AGE = Task(
    name="age",
    title="Age of a face",
    metrics=(Metric("closeness", "closeness", "closeness", "closeness", ("closeness",)),),
    find_splits=find_labelled,
    needs_spatial=False,
    fit_probe=fit_age_probe,
    probe_head=ProbeHead("mean", MeanHead, lambda head: head.output.in_features, predict_ages),
    finetune=AgeTask,
    evaluate_head=lambda head, splits, batch, workers: rows_of("age", {"closeness": 0.5}, 1, 0.0, {}),
    head_classes=("ForAgeRegression",),
    labels_as_predictions=lambda split, position, classes: [],
)


@pytest.fixture(autouse=True)
def _with_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that a new task adds to `shoulders.tasks.TASKS`."""
    monkeypatch.setitem(TASKS, AGE.name, AGE)


def test_the_command_line_offers_it(world: Path) -> None:  # noqa: F811
    help_text = " ".join(run_cli("evaluate", "--help").stdout.split())
    assert "semantic, instance, age" in help_text
    refused = run_cli("evaluate", world / "run", "--task", "unknown", "--data", world / "labelled")
    assert refused.returncode == 2 and "classification, detection, semantic, instance, age" in refused.stderr


def test_it_is_evaluated_predicted_and_reported(world: Path, tmp_path: Path) -> None:  # noqa: F811
    run, options = world / "run", ["--task", "age", "--data", world / "labelled", "--workers", 0, "--json"]
    done = run_cli("evaluate", run, "--models", "student,base,classifier", *options)
    rows = json.loads(done.stdout)
    assert [(row["model"], row["metric"]) for row in rows] == [
        (model, "closeness") for model in ("student", "base", "classifier")
    ], done.stderr
    image = world / "labelled/class0/0000.jpg"
    predicted = json.loads(run_cli("predict", run, image, "--probe", "student/age", "--out", tmp_path, "--json").stdout)
    assert predicted["0000.jpg"]["student/age"][0]["label"] == "age"
    page = write_report(run, out=tmp_path / "page.html").read_text()
    assert "Age of a face" in page and f"{rows[0]['value']:.3f}" in page


def test_it_is_finetuned_and_trained_from_scratch(world: Path) -> None:  # noqa: F811
    settings = AdapterSettings(min_steps=2, epochs=0)
    rows = evaluate_quickly(
        world / "run", "age", world / "labelled", ["student"], finetune="adapter", adapter_settings=settings
    )
    assert [row["metric"] for row in rows] == ["closeness"] and rows[0]["settings"]["probe_value"] > 0
    options = ["--models", "scratch", "--scratch-steps", 2, "--workers", 0, "--json"]
    done = run_cli("evaluate", world / "run", "--task", "age", "--data", world / "labelled", *options)
    assert [row["model"] for row in json.loads(done.stdout)] == ["scratch"], done.stderr


def test_heads_of_its_classes_do_it() -> None:
    model = type("FaceForAgeRegression", (), {})()
    assert task_of_head(SimpleNamespace(model=model)) == "age"
    assert task_of_head(SimpleNamespace(model=type("FaceForDepthEstimation", (), {})())) is None


def test_only_the_files_of_tasks_name_them() -> None:
    """Shipped teachers and their scenes name their tasks, and so do the forms of predictions of heads of one's own."""
    package = Path(shoulders.__file__).parent
    forms = {"teachers/task_head.py", "teachers/heads/post_process.py"}
    allowed = {f"tasks/{name}.py" for name in TASKS} | {"world/__init__.py", "world/files.py"} | forms
    naming = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in TASKS
    }
    assert naming <= allowed
