"""Encoder and head are trained together: labels match pixels, frozen weights stay, and a seed determines the result."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from shoulders.errors import DataError, NumericError
from shoulders.features import Batch, Features
from shoulders.images import View
from shoulders.tasks import TASKS, FinetuneTask, semantic
from shoulders.tasks.finetune import (
    FinetuneModel,
    FinetuneSchedule,
    HParams,
    build_optimizer,
    finetune,
    train_end_to_end,
)
from shoulders.tasks.heads.objects import ObjectHead
from shoulders.tasks.objects import ObjectTask
from shoulders.tasks.views import AugmentedViews
from tests.tasks.scenes import COLOURS, SIZE, save_masks, save_objects

GRID = (8, 8)
HIGH_LR, LOW_LR = HParams("adamw", 1e-2), HParams("adamw", 1e-3)
SCHEDULE = FinetuneSchedule(60, 8, (HIGH_LR,))


class Net(nn.Module):
    """A frozen map of cells of 4 x 4 px that computes brightness, and an adapter with zero weights initially."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(3, 4, 4, stride=4).requires_grad_(False)
        nn.init.constant_(self.base.weight, 1 / 48)
        self.adapter = nn.Conv2d(3, 4, 4, stride=4)
        nn.init.zeros_(self.adapter.weight)

    def forward(self, pixels: Tensor) -> Features:
        maps = self.base(pixels) + self.adapter(pixels)
        return Features.from_map(maps, maps.mean((2, 3)))


def build_model(task: FinetuneTask) -> FinetuneModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, head = Net(), task.build_head(4)
    return FinetuneModel(net, net, head)


def save_classes(path: Path, counts: dict[str, int]) -> Path:
    """Two classes of images with the same brightness."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(("red", "blue")):
            (path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(60, 120, (32, 40, 3), dtype=np.uint8)
                pixels[..., 2 * label] += 60
                Image.fromarray(pixels).save(path / split / name / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("labelled")
    counts = {"train": 16, "val": 8, "test": 8}
    objects = save_objects(root / "objects", counts)
    return {
        "classification": save_classes(root / "classes", {"train": 8, "val": 4, "test": 4}),
        "semantic": save_masks(root / "masks", counts),
        "detection": objects,
        "instance": objects,
    }


def finetune_task(name: str, path: Path) -> FinetuneTask:
    """The finetuning of a task, with a small head for objects."""
    task = TASKS[name].finetune(TASKS[name].find_splits(path, "image"))
    if not isinstance(task, ObjectTask):
        return task
    build = partial(ObjectHead, masks=task.masks, trunk_width=16, anchor_width=16)
    return replace(task, probe=replace(task.probe, build=build))


def loss_of(task: FinetuneTask, model: FinetuneModel) -> float:
    views = AugmentedViews(task, task.splits.train, SIZE, (0.6, 1.0), seed=9)
    pixels, targets = next(views.batches(8, 1, GRID))
    with torch.no_grad():
        return task.loss(model.head.eval(), model.features_of(pixels), targets).item()


@pytest.mark.parametrize("name", TASKS)
def test_training_lowers_the_loss_and_leaves_frozen_weights(name: str, data: dict[str, Path]) -> None:
    if name in ("detection", "instance"):
        pytest.importorskip("faster_coco_eval")
    task = finetune_task(name, data[name])
    model = build_model(task)
    before = copy.deepcopy(model.encoder.state_dict())
    first = loss_of(task, model)
    views = AugmentedViews(task, task.splits.train, SIZE, SCHEDULE.scale, 0)
    train_end_to_end(model, views, SCHEDULE, SCHEDULE.steps, HIGH_LR)
    assert loss_of(task, model) < 0.8 * first
    after = model.encoder.state_dict()
    assert torch.equal(after["base.weight"], before["base.weight"])
    assert not torch.equal(after["adapter.weight"], before["adapter.weight"])
    assert not model.encoder.training and not model.head.training


def test_finetuning_a_fitted_probe_raises_its_score(data: dict[str, Path]) -> None:
    splits = TASKS["semantic"].find_splits(data["semantic"], "image")
    net, heads = Net(), list[nn.Module]()

    def features_of(batch: Batch) -> Features:
        return net(batch.pixels(SIZE))

    probe_rows = TASKS["semantic"].fit_probe(features_of, splits, [SIZE], on_head=heads.append)
    task = TASKS["semantic"].finetune(splits)

    def build() -> FinetuneModel:
        encoder = copy.deepcopy(net)
        return FinetuneModel(encoder, encoder, copy.deepcopy(heads[0]).train())

    rows, _ = finetune(build, task, SIZE, SCHEDULE, settings={"finetune": "adapter"})
    scores = {row["metric"]: row["value"] for row in rows}
    assert scores["mIoU"] > {row["metric"]: row["value"] for row in probe_rows}["mIoU"] + 0.1
    assert {row["metric"] for row in probe_rows} == set(scores)
    settings = rows[0]["settings"]
    assert (settings["finetune"], settings["lr"], settings["steps"], settings["train"]) == ("adapter", 1e-2, 60, 16)


def test_muon_updates_matrices_of_the_encoder_and_adamw_all_else(data: dict[str, Path]) -> None:
    task = finetune_task("classification", data["classification"])
    model = build_model(task)
    adapter, before = model.encoder.get_submodule("adapter"), copy.deepcopy(model.encoder.state_dict())
    optimizer = build_optimizer(model, SCHEDULE.weight_decay, HParams("muon", 1e-2))
    assert [tuple(matrix.shape) for matrix in optimizer.matrices.values()] == [(4, 48)]  # not the frozen kernel
    counts = [sum(len(group["params"]) for group in one.param_groups) for one in optimizer.optimizers]
    assert counts == [len(model.trainable_parameters()) - 1, 1]
    for p in model.trainable_parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(0.5e-2)
    step = adapter.weight.flatten(1) - before["adapter.weight"].flatten(1)  # type: ignore[operator]
    gram = step @ step.T  # an orthogonal step has the same length in every direction
    assert (gram / gram.diagonal().mean() - torch.eye(4)).abs().max() < 0.6
    assert all(p.grad is None for p in model.trainable_parameters())
    assert len(build_optimizer(model, SCHEDULE.weight_decay, HIGH_LR).optimizers) == 1


def test_the_learning_rate_with_the_best_score_on_val_is_selected(data: dict[str, Path]) -> None:
    task = finetune_task("classification", data["classification"])
    schedule = FinetuneSchedule(150, 8, (HParams("adamw", 1e-7), HParams("adamw", 2e-2)))
    rows, _ = finetune(partial(build_model, task), task, SIZE, schedule)
    assert rows[0]["settings"]["lr"] == 2e-2 and rows[0]["settings"]["search_steps"] == 30
    assert rows[0]["value"] == 1.0 and rows[0]["n"] == 8


def test_the_same_seed_gives_the_same_bits(data: dict[str, Path]) -> None:
    task = finetune_task("classification", data["classification"])

    def trained(seed: int, workers: int) -> Tensor:
        model = build_model(task)
        views = AugmentedViews(task, task.splits.train, SIZE, SCHEDULE.scale, seed)
        train_end_to_end(model, views, SCHEDULE, 6, HIGH_LR, workers)
        return next(model.head.parameters()).detach()

    state = torch.get_rng_state()
    assert torch.equal(trained(3, 0), trained(3, 2))
    assert not torch.equal(trained(3, 0), trained(4, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_masks_match_the_pixels_of_a_view(tmp_path: Path) -> None:
    task = finetune_task("semantic", save_masks(tmp_path))
    views = AugmentedViews(task, task.splits.train, (32, 32), (0.3, 1.0), seed=1)
    for position in range(12):
        drawn = views.draw(position, step=position, grid=GRID)  # masks at 4 times the grid: one element per pixel
        assert drawn is not None
        pixels, mask = drawn[0].float(), drawn[1]
        for label, colour in enumerate(COLOURS, start=1):
            coloured = (pixels - torch.tensor(colour)[:, None, None]).abs().amax(0) < 40
            inside = mask == label
            if inside.sum() > 20:
                assert (coloured & inside).sum() > 0.8 * inside.sum()
                assert (coloured & ~inside & (mask != 255)).sum() < 0.2 * inside.sum()


def test_boxes_and_masks_of_objects_match_the_pixels_of_a_view(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    task = finetune_task("instance", save_objects(tmp_path))
    views = AugmentedViews(task, task.splits.train, (32, 32), (0.3, 1.0), seed=1)
    for position in range(16):
        drawn = views.draw(position, step=position, grid=GRID)
        assert drawn is not None
        pixels, target = drawn[0].float(), drawn[1]
        for label, box, mask in zip(target.classes, target.boxes * 2, target.masks, strict=True):  # anchors of 2 px
            coloured = (pixels - torch.tensor(COLOURS[label])[:, None, None]).abs().amax(0) < 60  # (32, 32)
            y, x = (mask & coloured).nonzero().unbind(1)
            edges = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (edges - box).abs().max() <= 1.5, (position, edges, box)
            assert (mask & coloured).sum() > 0.6 * mask.sum()  # the border is blurred


def test_a_mirrored_view_has_mirrored_labels(data: dict[str, Path]) -> None:
    pytest.importorskip("faster_coco_eval")
    task = finetune_task("instance", data["instance"])
    plain, mirrored = (task.target(task.splits.train, 1, View(0, 0, 1, 1, flip), GRID) for flip in (False, True))
    expected = plain.boxes.clone()
    expected[:, [0, 2]] = 16 - plain.boxes[:, [2, 0]]
    torch.testing.assert_close(mirrored.boxes, expected)
    assert torch.equal(mirrored.masks, plain.masks.flip(2))
    assert mirrored.classes.tolist() == plain.classes.tolist()
    task = finetune_task("semantic", data["semantic"])
    plain, mirrored = (task.target(task.splits.train, 1, View(0, 0, 1, 1, flip), GRID) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(1)) and len(plain.unique()) > 1


def test_objects_that_a_view_hardly_shows_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    task = finetune_task("instance", save_objects(tmp_path))
    image = task.splits.train.annotations[0]
    (left, _, right, _), w = image.boxes[0], image.size[1]
    assert len(image.boxes) == 1

    def count(visible: float) -> int:
        """Objects in a view that shows this fraction of the first object."""
        view = View(0, 0, 1, round(left + visible * (right - left)) / w)
        return len(task.target(task.splits.train, 0, view, GRID).boxes)

    assert (count(0.1), count(0.5)) == (0, 1)


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path) -> None:
    save_classes(tmp_path, {"train": 4, "test": 2})
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"not an image")
    task = finetune_task("classification", tmp_path)
    rows, _ = finetune(partial(build_model, task), task, SIZE, FinetuneSchedule(4, 4, (HIGH_LR,)))
    assert rows[0]["settings"]["skipped"] == 1
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(DataError, match="none of 4 images can be read; the first: .*png"):
        finetune(partial(build_model, task), task, SIZE, FinetuneSchedule(4, 4, (HIGH_LR,)))


def test_a_candidate_that_diverges_does_not_stop_the_others(data: dict[str, Path]) -> None:
    task, diverging = finetune_task("semantic", data["semantic"]), HParams("adamw", 1e38)
    rows, _ = finetune(partial(build_model, task), task, SIZE, FinetuneSchedule(10, 4, (diverging, LOW_LR)))
    assert rows[0]["settings"]["lr"] == LOW_LR.lr
    with pytest.raises(NumericError, match="no longer finite at step 1 with .*1e\\+38"):
        finetune(partial(build_model, task), task, SIZE, FinetuneSchedule(10, 4, (diverging, diverging)))


def test_gradients_that_are_not_finite_stop_the_training(data: dict[str, Path]) -> None:
    task = finetune_task("classification", data["classification"])
    model = build_model(task)
    nn.init.constant_(next(model.encoder.parameters()), float("nan"))
    views = AugmentedViews(task, task.splits.train, SIZE, SCHEDULE.scale, 0)
    with pytest.raises(NumericError, match="classification: the gradients are no longer finite at step 0"):
        train_end_to_end(model, views, SCHEDULE, 2, HIGH_LR)


def test_the_upsampled_logits_are_compared_with_the_labelled_pixels_only() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    labels[:, :4] = 255
    upsampled = torch.nn.functional.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    log_probabilities = upsampled.log_softmax(1)
    expected = [
        -log_probabilities[b, int(labels[b, y, x]), y, x] for b in range(2) for y in range(4, 8) for x in range(8)
    ]
    loss = semantic.segmentation_loss(nn.Identity(), logits, list(labels))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
