"""Probes with heads of transformers learn what the features show, are deterministic, and are refused in words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoulders.errors import NumericError, RecipeError
from shoulders.tasks import TASKS, Row, check_probe, detection, instance, objects, semantic
from shoulders.tasks.data.masks import find_masks
from shoulders.tasks.feature_bank import FeatureBank
from shoulders.tasks.heads.object_loss import ObjectTarget
from shoulders.tasks.heads.transformers import HeadSize, Mask2Former, Pyramid, RTDetr, UperNet
from shoulders.tasks.probe import LARGER_PROBE_SETTINGS, SpatialProbe, fit_head, fit_probe
from tests.tasks.scenes import SIZE, colours, constant, save_masks, save_objects

SMALL = HeadSize(width=32, layers=2, queries=20, denoising_queries=0, mask_points=128)
SETTINGS = replace(LARGER_PROBE_SETTINGS, lrs=(3e-3,), batch=6, epochs=0, warmup_steps=10)
# probe, metric, its least value with features that show the classes, steps; with constant features it is below half
LEARNED = [
    (semantic.UPERNET, "mIoU", 0.7, 40),
    (detection.RT_DETR, "AP50", 0.2, 120),
    (instance.MASK2FORMER, "mask_AP50", 0.5, 60),
]


def small(probe: SpatialProbe, steps: int) -> SpatialProbe:
    return replace(probe, build=partial(probe.build, size=SMALL), settings=replace(SETTINGS, min_steps=steps))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    boxes = save_objects(root / "objects")
    return {"semantic": save_masks(root / "masks"), "detection": boxes, "instance": boxes}


def by_metric(rows: list[Row]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize(("probe", "metric", "least", "steps"), LEARNED, ids=lambda value: getattr(value, "name", None))
def test_it_learns_what_the_features_show(
    probe: SpatialProbe, metric: str, least: float, steps: int, data: dict[str, Path]
) -> None:
    if probe.task != "semantic":
        pytest.importorskip("faster_coco_eval")
    splits = TASKS[probe.task].find_splits(data[probe.task], "image")
    blind = by_metric(fit_probe(small(probe, 20), constant, splits, [SIZE]))
    assert blind.get(metric, 0.0) < least / 2
    heads: list[nn.Module] = []
    rows = fit_probe(small(probe, steps), colours, splits, [SIZE], on_head=heads.append)
    assert by_metric(rows)[metric] >= least
    assert all(row["task"] == probe.task and row["settings"]["head"] == probe.name and row["n"] == 8 for row in rows)
    assert rows[0]["settings"]["steps"] == steps and not heads[0].training
    assert probe.name in TASKS[probe.task].larger_probes


@pytest.mark.parametrize("build", [RTDetr, Mask2Former])
def test_the_loss_falls_and_two_fits_are_equal(build: Callable[..., nn.Module], data: dict[str, Path]) -> None:
    probe = replace(small(instance.MASK2FORMER, 20), build=partial(build, size=replace(SMALL, denoising_queries=10)))
    bank = FeatureBank(colours, TASKS["instance"].find_splits(data["instance"], "image").train, [SIZE], 8, 0)
    targets = [objects.object_target(image, bank.grid, masks=True) for image in bank.annotations]
    before = torch.random.get_rng_state()
    losses: list[list[float]] = [[], []]
    heads = [fit_head(probe, bank, targets, 2, lr=3e-3, steps=20, seed=3, on_step=each.append).head for each in losses]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert sum(losses[0][-5:]) < 0.8 * sum(losses[0][:5])
    for ours, theirs in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_odd_grids_images_without_objects_and_groups_are_valid() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 7, 6)
    grids = [(32, 24), (16, 12), (8, 6), (4, 3)]
    for levels in (3, 4):
        assert [level.shape[2:] for level in Pyramid(5, levels, 32)(maps).feature_maps] == grids[-levels:]
    box, group = torch.tensor([[1.0, 1.0, 6.0, 5.0]]), torch.tensor([[0.0, 0.0, 12.0, 14.0]])
    mask = torch.zeros(1, 28, 24, dtype=torch.bool)
    mask[:, 4:12, 4:14] = True
    single = ObjectTarget(torch.tensor([1]), box, torch.tensor([False]), mask)
    with_group = ObjectTarget(
        torch.tensor([1, 0]), torch.cat([box, group]), torch.tensor([False, True]), mask.repeat(2, 1, 1)
    )
    empty = ObjectTarget(torch.zeros(0, dtype=torch.long), box[:0], torch.zeros(0, dtype=torch.bool), mask[:0])
    for build in (RTDetr, Mask2Former):
        head = build(5, 2, SMALL)
        values = []
        for targets in ([single, single, empty], [with_group, with_group, empty], [empty] * 3):
            torch.manual_seed(1)  # the losses draw points
            values.append(head.loss(maps, targets).item())
        assert values[0] == values[1] and all(torch.tensor(values).isfinite())
    ignored = [torch.full((28, 24), 255, dtype=torch.uint8)] * 3
    assert semantic.segmentation_loss(UperNet(5, 2, SMALL), maps, ignored).item() == 0


class NanHead(nn.Module):
    """A head whose loss is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float("nan")))

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean() * self.scale


def test_a_loss_that_is_not_finite_stops_the_fit(data: dict[str, Path]) -> None:
    bank = FeatureBank(colours, find_masks(data["semantic"]).train, [SIZE], 8, 0)
    probe = replace(
        small(semantic.UPERNET, 3),
        build=lambda width, n_classes: NanHead(),
        loss=lambda head, maps, targets: head(maps),
    )
    with pytest.raises(NumericError, match="the loss of NanHead is no longer finite"):
        fit_head(probe, bank, bank.annotations, 3, lr=1e-3, steps=3, seed=0)


def test_unknown_probes_and_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in TASKS.values():
        names = (task.probe_head.name, *task.larger_probes)
        check_probe(task, names[0])
        with pytest.raises(RecipeError, match=f"'eomt' is none of {', '.join(names)}, the probes of {task.name}"):
            check_probe(task, "eomt")
    check_probe(TASKS["detection"], "rt_detr_v2")
    with pytest.raises(RecipeError, match="upernet is fitted on frozen features only; leave --finetune or --probe out"):
        check_probe(TASKS["semantic"], "upernet", finetune="adapter")
    monkeypatch.setitem(sys.modules, "scipy", None)
    check_probe(TASKS["semantic"], "upernet")
    with pytest.raises(RecipeError, match=r"the loss of mask2former needs scipy; install .*shoulders\[det\]"):
        check_probe(TASKS["instance"], "mask2former")
