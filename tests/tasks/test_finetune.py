"""Encoder and head learn together: labels are cut where pixels are, what is frozen stays, a seed says it all."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features
from shoulders.images import View
from shoulders.tasks import TASKS, FinetuneTask
from shoulders.tasks.finetune import FinetuneModel, HParams, Movers, Plan, Views, run, train_end_to_end
from shoulders.tasks.heads import objects as object_head
from tests.tasks.scenes import COLOURS, SIZE, save_masks, save_objects

GRID = (8, 8)
FAST, SLOW = HParams("adamw", 1e-2), HParams("adamw", 1e-3)
PLAN = Plan(60, 8, (FAST,))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_head, "WIDTH", 16)
    monkeypatch.setattr(object_head, "FINE_WIDTH", 16)


class Net(nn.Module):
    """A frozen map of places of 4 x 4 px that sees brightness alone, and an adapter that is zero at birth."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(3, 4, 4, stride=4).requires_grad_(False)
        nn.init.constant_(self.base.weight, 1 / 48)
        self.adapter = nn.Conv2d(3, 4, 4, stride=4)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, pixels: Tensor) -> Features:
        maps = self.base(pixels) + self.adapter(pixels)
        return Features.from_map(maps, maps.mean((2, 3)))


def trainee(goal: FinetuneTask) -> FinetuneModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, head = Net(), goal.head(4)
    return FinetuneModel(net, net, head)


def save_classes(path: Path, counts: dict[str, int]) -> Path:
    """Two classes of pictures of the same brightness."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for kind, name in enumerate(("red", "blue")):
            (path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(60, 120, (32, 40, 3), dtype=np.uint8)
                pixels[..., 2 * kind] += 60
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tuned")
    counts = {"train": 16, "val": 8, "test": 8}
    objects = save_objects(root / "objects", counts)
    return {
        "classification": save_classes(root / "classes", {"train": 8, "val": 4, "test": 4}),
        "semantic": save_masks(root / "masks", counts),
        "detection": objects,
        "instance": objects,
    }


def goal_of(task: str, path: Path) -> FinetuneTask:
    return TASKS[task].tune(TASKS[task].find(path, "image"))


def loss_of(goal: FinetuneTask, who: FinetuneModel) -> float:
    views = Views(goal, goal.splits.train, SIZE, (0.6, 1.0), seed=9)
    pixels, targets = next(views.batches(8, 1, GRID))
    with torch.no_grad():
        return goal.loss(who.head.eval(), who.see(pixels), targets).item()


@pytest.mark.parametrize("task", TASKS)
def test_training_lowers_the_loss_and_leaves_alone_what_is_frozen(task: str, data: dict[str, Path]) -> None:
    if task in ("detection", "instance"):
        pytest.importorskip("faster_coco_eval")
    goal = goal_of(task, data[task])
    who = trainee(goal)
    before = copy.deepcopy(who.encoder.state_dict())
    first = loss_of(goal, who)
    train_end_to_end(who, Views(goal, goal.splits.train, SIZE, PLAN.scale, 0), PLAN, PLAN.steps, FAST)
    assert loss_of(goal, who) < 0.8 * first
    after = who.encoder.state_dict()
    assert torch.equal(after["base.weight"], before["base.weight"])
    assert not torch.equal(after["adapter.weight"], before["adapter.weight"])
    assert not who.encoder.training and not who.head.training


def test_from_the_frozen_probe_on_the_score_rises(data: dict[str, Path]) -> None:
    splits = TASKS["semantic"].find(data["semantic"], "image")
    net, heads = Net(), list[nn.Module]()

    def features_of(batch: Batch) -> Features:
        return net(batch.pixels(SIZE))

    frozen = TASKS["semantic"].run(features_of, splits, [SIZE], on_head=heads.append)
    goal = TASKS["semantic"].tune(splits)

    def make() -> FinetuneModel:
        own = copy.deepcopy(net)
        return FinetuneModel(own, own, copy.deepcopy(heads[0]).train())

    rows, _ = run(make, goal, SIZE, PLAN, told={"tune": "adapter"})
    tuned = {row["metric"]: row["value"] for row in rows}
    assert tuned["mIoU"] > {row["metric"]: row["value"] for row in frozen}["mIoU"] + 0.1
    assert {row["metric"] for row in frozen} == set(tuned)
    told = rows[0]["settings"]
    assert (told["tune"], told["lr"], told["steps"], told["train"]) == ("adapter", 1e-2, 60, 16)


def test_muon_moves_the_matrices_of_the_encoder_and_adamw_all_else(data: dict[str, Path]) -> None:
    goal = goal_of("classification", data["classification"])
    who = trainee(goal)
    adapter, before = who.encoder.get_submodule("adapter"), copy.deepcopy(who.encoder.state_dict())
    movers = Movers(who, PLAN, HParams("muon", 1e-2))
    assert [tuple(row.shape) for row in movers.rows.values()] == [(4, 48)]  # the frozen kernel is not among them
    adamw, muon = movers.optimizers
    moved = [sum(len(group["params"]) for group in mover.param_groups) for mover in (adamw, muon)]
    assert moved == [len(who.learns()) - 1, 1]
    for p in who.learns():
        p.grad = torch.randn_like(p)
    movers.step(0.5)
    step = adapter.weight.flatten(1) - before["adapter.weight"].flatten(1)  # type: ignore[operator]
    turned = step @ step.T  # an orthogonal step: as long in every direction
    assert (turned / turned.diagonal().mean() - torch.eye(4)).abs().max() < 0.6
    assert all(p.grad is None for p in who.learns())
    assert len(Movers(who, PLAN, FAST).optimizers) == 1


def test_the_rate_that_does_best_on_val_is_taken(data: dict[str, Path]) -> None:
    goal = goal_of("classification", data["classification"])
    rows, _ = run(partial(trainee, goal), goal, SIZE, Plan(150, 8, (HParams("adamw", 1e-7), HParams("adamw", 2e-2))))
    assert rows[0]["settings"]["lr"] == 2e-2 and rows[0]["settings"]["search_steps"] == 30
    assert rows[0]["value"] == 1.0 and rows[0]["n"] == 8


def test_the_same_seed_gives_the_same_bits(data: dict[str, Path]) -> None:
    goal = goal_of("classification", data["classification"])

    def trained(seed: int, workers: int) -> Tensor:
        who = trainee(goal)
        views = Views(goal, goal.splits.train, SIZE, PLAN.scale, seed)
        train_end_to_end(who, views, PLAN, 6, FAST, workers)
        return next(who.head.parameters()).detach()

    state = torch.get_rng_state()
    assert torch.equal(trained(3, 0), trained(3, 2))
    assert not torch.equal(trained(3, 0), trained(4, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_masks_are_cut_where_pixels_are(tmp_path: Path) -> None:
    goal = goal_of("semantic", save_masks(tmp_path))
    views = Views(goal, goal.splits.train, (32, 32), (0.3, 1.0), seed=1)
    for row in range(12):
        drawn = views.draw(row, step=row, grid=GRID)  # masks at 4 times the grid: as many places as pixels
        assert drawn is not None
        pixels, mask = drawn[0].float(), drawn[1]
        for kind, colour in enumerate(COLOURS, start=1):
            seen = (pixels - torch.tensor(colour)[:, None, None]).abs().amax(0) < 40
            inside = mask == kind
            if inside.sum() > 20:
                assert (seen & inside).sum() > 0.8 * inside.sum()
                assert (seen & ~inside & (mask != 255)).sum() < 0.2 * inside.sum()


def test_boxes_and_masks_of_objects_are_cut_where_pixels_are(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    goal = goal_of("instance", save_objects(tmp_path))
    views = Views(goal, goal.splits.train, (32, 32), (0.3, 1.0), seed=1)
    for row in range(16):
        drawn = views.draw(row, step=row, grid=GRID)
        assert drawn is not None
        pixels, target = drawn[0].float(), drawn[1]
        for kind, box, mask in zip(target.classes, target.boxes * 2, target.masks, strict=True):  # places of 2 px
            seen = (pixels - torch.tensor(COLOURS[kind])[:, None, None]).abs().amax(0) < 60  # (32, 32)
            y, x = (mask & seen).nonzero().unbind(1)
            edges = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (edges - box).abs().max() <= 1.5, (row, edges, box)
            assert (mask & seen).sum() > 0.6 * mask.sum()  # its rim is blurred


def test_a_mirrored_view_has_mirrored_labels(data: dict[str, Path]) -> None:
    pytest.importorskip("faster_coco_eval")
    goal = goal_of("instance", data["instance"])
    plain, mirrored = (goal.target(goal.splits.train, 1, View(0, 0, 1, 1, flip), GRID) for flip in (False, True))
    expected = plain.boxes.clone()
    expected[:, [0, 2]] = 16 - plain.boxes[:, [2, 0]]
    torch.testing.assert_close(mirrored.boxes, expected)
    assert torch.equal(mirrored.masks, plain.masks.flip(2))
    assert mirrored.classes.tolist() == plain.classes.tolist()
    goal = goal_of("semantic", data["semantic"])
    plain, mirrored = (goal.target(goal.splits.train, 1, View(0, 0, 1, 1, flip), GRID) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(1)) and len(plain.unique()) > 1


def test_what_a_view_hardly_shows_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    goal = goal_of("instance", save_objects(tmp_path))
    picture = goal.splits.train.truths[0]
    (left, _, right, _), w = picture.boxes[0], picture.size[1]
    assert len(picture.boxes) == 1

    def shown(share: float) -> int:
        """Objects in a view that ends where this share of the first object is shown."""
        view = View(0, 0, 1, round(left + share * (right - left)) / w)
        return len(goal.target(goal.splits.train, 0, view, GRID).boxes)

    assert (shown(0.1), shown(0.5)) == (0, 1)


def test_images_that_cannot_be_read_are_left_out_and_told(tmp_path: Path) -> None:
    save_classes(tmp_path, {"train": 4, "test": 2})
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"no picture")
    goal = goal_of("classification", tmp_path)
    rows, _ = run(partial(trainee, goal), goal, SIZE, Plan(4, 4, (FAST,)))
    assert rows[0]["settings"]["skipped"] == 1
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 4 images can be read; the first: .*png"):
        run(partial(trainee, goal), goal, SIZE, Plan(4, 4, (FAST,)))


def test_a_try_that_is_too_fast_does_not_stop_the_others(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    goal, tries, train = goal_of("classification", data["classification"]), (FAST, SLOW), train_end_to_end

    def diverges(who: Any, views: Any, plan: Any, steps: int, how: HParams, workers: int = 0) -> None:
        if how == FAST or both:
            raise NumericError("too fast")
        train(who, views, plan, steps, how, workers)

    monkeypatch.setattr("shoulders.tasks.finetune.train_end_to_end", diverges)
    both = False
    rows, _ = run(partial(trainee, goal), goal, SIZE, Plan(5, 4, tries))
    assert rows[0]["settings"]["lr"] == SLOW.rate
    both = True
    with pytest.raises(NumericError, match="too fast"):
        run(partial(trainee, goal), goal, SIZE, Plan(5, 4, tries))


def test_gradients_that_are_not_finite_stop_it(data: dict[str, Path]) -> None:
    goal = goal_of("classification", data["classification"])
    who = trainee(goal)
    nn.init.constant_(next(who.encoder.parameters()), float("nan"))
    with pytest.raises(NumericError, match="classification: the gradients are no longer finite at step 0"):
        train_end_to_end(who, Views(goal, goal.splits.train, SIZE, PLAN.scale, 0), PLAN, 2, FAST)
