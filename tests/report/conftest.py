"""A small finished run with three teachers of random weights, their heads, and measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoulders.distillation import distill
from tests.teachers.heads.test_saved import save_teacher
from tests.tiny import save_base, save_images, tiny_recipe

HEADS = {"segformer": "semantic", "rt_detr_v2": "detection", "resnet": "classification"}


def result_rows(model: str, task: str, data: Path, head: str | None = None, **values: float) -> list[dict[str, Any]]:
    """Rows as `shoulders.evaluation.evaluate` writes them."""
    row = {"model": model, "task": task, "n": 90, "seconds": 1.0, "settings": {}, "data": str(data), "seed": 0}
    row = row if head is None else row | {"head": head}
    return [{**row, "metric": metric, "value": value} for metric, value in values.items()]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    save_base(root / "base")
    save_images(root / "images", 40)
    save_images(root / "cells" / "classification" / "test", 12, classes=3)
    recipe = tiny_recipe(
        root,
        student__adapter__width=4,
        teachers={kind: save_teacher(kind, root / kind).model_dump() for kind in HEADS},
        images__holdout=8,
        train__batch=4,
        train__evaluate_every=2,
        keep_heads=list(HEADS),
    )
    distill(recipe)
    labels, masks = root / "cells" / "classification", root / "deleted" / "semantic"
    rows = [
        *result_rows("resnet", "classification", labels, "resnet", top1=0.8),
        *result_rows("student", "classification", labels, "resnet", top1=0.6),
        *result_rows("student", "classification", labels, knn_top1=0.5, linear_top1=0.7),
        *result_rows("base", "classification", labels, knn_top1=0.4, linear_top1=0.45),
        *result_rows("student", "semantic", masks, mIoU=0.3),
        {"model": "student", "task": "semantic", "metric": "IoU/sky", "value": 0.9, "n": 90, "data": str(masks)},
    ]
    file = root / "run" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) + rows))
    return root / "run"
