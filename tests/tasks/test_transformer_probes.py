"""Probes with heads of transformers: they learn what is in the features, twice the same, and are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoulders.errors import NumericError, RecipeError
from shoulders.tasks import find_masks, find_objects, objects, transformer_probes
from shoulders.tasks.feature_bank import FeatureBank
from shoulders.tasks.heads import transformers as transformer_heads
from shoulders.tasks.heads.objects import Target
from shoulders.tasks.heads.transformers import Detector, MaskFinder, Pyramid, Segmenter
from shoulders.tasks.rows import Row
from shoulders.tasks.transformer_probes import DEFAULT, PROBES, check_probe, fit
from tests.tasks.scenes import SIZE, colours, noise, save_masks, save_objects

FIND: dict[str, Callable[[Path], Any]] = {
    "semantic": find_masks,
    "detection": find_objects,
    "instance": partial(find_objects, masks=True),
}
# (task, probe, metric, least with the colours, steps); features that say nothing stay below half of it
LEARNT = [
    ("semantic", "upernet", "mIoU", 0.7, 40),
    ("detection", "rt_detr_v2", "AP50", 0.2, 120),
    ("instance", "mask2former", "mask_AP50", 0.5, 60),
]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"WIDTH": 32, "LAYERS": 2, "QUERIES": 20, "DENOISED": 0, "POINTS": 128}
    for name, value in small.items():
        monkeypatch.setattr(transformer_heads, name, value)
    for name, value in {"FEWEST_STEPS": 20, "BATCH": 6, "EPOCHS": 0, "WARM_UP": 10}.items():
        monkeypatch.setattr(transformer_probes, name, value)
    monkeypatch.setattr(transformer_probes, "LR", 3e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    boxes = save_objects(root / "objects")
    return {"semantic": save_masks(root / "masks"), "detection": boxes, "instance": boxes}


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize(("task", "name", "metric", "least", "steps"), LEARNT)
def test_it_learns_what_is_in_the_features(
    task: str, name: str, metric: str, least: float, steps: int, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if task != "semantic":
        pytest.importorskip("faster_coco_eval")
    splits = FIND[task](data[task])
    blind = by_metric(PROBES[task][name](noise, splits, [SIZE]))
    assert blind.get(metric, 0.0) < least / 2
    heads: list[nn.Module] = []
    monkeypatch.setattr(transformer_probes, "FEWEST_STEPS", steps)
    rows = PROBES[task][name](colours, splits, [SIZE], on_head=heads.append)
    assert by_metric(rows)[metric] >= least
    assert all(row["task"] == task and row["settings"]["head"] == name and row["n"] == 8 for row in rows)
    assert rows[0]["settings"]["steps"] == steps and not heads[0].training


@pytest.mark.parametrize("build", [Detector, MaskFinder])
def test_the_loss_falls_and_a_fit_is_the_same_twice(
    build: Callable[[int, int], nn.Module], data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_heads, "DENOISED", 10)
    frozen = FeatureBank(colours, FIND["instance"](data["instance"]).train, SIZE, 8, 0)
    targets = [objects.target_of(picture, frozen.grid, masks=True) for picture in frozen.truths]
    before = torch.random.get_rng_state()
    heads: list[nn.Module] = []
    losses: list[list[float]] = [[], []]
    for told in losses:
        heads.append(fit(frozen, partial(build, frozen.width, 2), targets, seed=3, steps=20, on_step=told.append))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert sum(losses[0][-5:]) < 0.8 * sum(losses[0][:5])
    for ours, theirs in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_odd_grids_images_without_objects_and_groups_are_fine() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 7, 6)
    grids = [(32, 24), (16, 12), (8, 6), (4, 3)]
    for levels in (3, 4):
        assert [level.shape[2:] for level in Pyramid(5, levels)(maps).feature_maps] == grids[-levels:]
    box, group = torch.tensor([[1.0, 1.0, 6.0, 5.0]]), torch.tensor([[0.0, 0.0, 12.0, 14.0]])
    there = torch.zeros(1, 28, 24, dtype=torch.bool)
    there[:, 4:12, 4:14] = True
    single = Target(torch.tensor([1]), box, torch.tensor([False]), there)
    both = Target(torch.tensor([1, 0]), torch.cat([box, group]), torch.tensor([False, True]), there.repeat(2, 1, 1))
    empty = Target(torch.zeros(0, dtype=torch.long), box[:0], torch.zeros(0, dtype=torch.bool), there[:0])
    for build in (Detector, MaskFinder):
        head = build(5, 2)
        values = []
        for targets in ([single, single, empty], [both, both, empty], [empty] * 3):
            torch.manual_seed(1)  # the losses draw points
            values.append(head.loss(maps, targets).item())
        assert values[0] == values[1] and all(torch.tensor(values).isfinite())
    masks = [torch.full((28, 24), 255, dtype=torch.uint8)] * 3
    assert Segmenter(5, 2).loss(maps, masks).item() == 0  # no pixel is labelled


def test_a_loss_that_is_not_finite_stops_the_fit(data: dict[str, Path]) -> None:
    frozen = FeatureBank(colours, find_masks(data["semantic"]).train, SIZE, 8, 0)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(float("nan")))

        def loss(self, maps: torch.Tensor, targets: list[Any]) -> torch.Tensor:
            return maps.mean() * self.scale

    with pytest.raises(NumericError, match="the loss of Broken is no longer finite"):
        fit(frozen, Broken, frozen.truths, seed=0, steps=3)


def test_unknown_probes_and_what_they_need_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for task, default in DEFAULT.items():
        check_probe(task, default)
        with pytest.raises(RecipeError, match=f"'eomt' is none of {', '.join((default, *PROBES.get(task, {})))}, the"):
            check_probe(task, "eomt")
    check_probe("detection", "rt_detr_v2")
    with pytest.raises(RecipeError, match="upernet is fitted on frozen features alone; leave --tune or --probe out"):
        check_probe("semantic", "upernet", tune="adapter")
    monkeypatch.setattr(transformer_probes, "find_spec", lambda name: None)
    check_probe("semantic", "upernet")
    with pytest.raises(RecipeError, match=r"the loss of mask2former needs scipy; install .*shoulders\[det\]"):
        check_probe("instance", "mask2former")
