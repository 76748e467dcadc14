"""A teacher is a function of the pixels of one image: others are refused before a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.features import Features
from shoulders.teachers import Teacher, Teachers, check_pure, check_same_on_ranks, load_teacher
from shoulders.training.preflight import check_inputs
from tests.tiny import save_base, save_images, tiny_recipe


class Net(nn.Module):
    """Means of 4 x 4 px, mapped to 6 channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)))

    def maps(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 4)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        maps = self.maps(pixels)
        spatial = maps.flatten(2).transpose(1, 2) @ self.mix
        return {"map": Features(spatial.mean(1), spatial, (maps.shape[2], maps.shape[3]))}


class DropoutAlways(Net):
    def maps(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(F.dropout(pixels, 0.5, training=True), 4)


class NetInAList(Net):
    """eval() does not reach a net in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = [nn.BatchNorm2d(3)]

    def maps(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(self.nets[0](pixels), 4)


class StaysInTrainMode(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def train(self, mode: bool = True) -> StaysInTrainMode:
        return super().train(True)


class StatisticsOfTheBatch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def maps(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(self.norm(pixels), 4)


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()

    def maps(self, pixels: Tensor) -> Tensor:
        return super().maps(pixels) + next(self.count)


class Drifts(Net):
    """Adds a thousandth of the spread of the pixels more in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()

    def maps(self, pixels: Tensor) -> Tensor:
        return super().maps(pixels) * (1 + 1e-3 * next(self.count))


class WeakStatisticsOfTheBatch(Net):
    def maps(self, pixels: Tensor) -> Tensor:
        return super().maps(pixels) + 0.005 * super().maps(pixels).mean(0)


class TapsChange(Net):
    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        features = super().forward(pixels)["map"]
        return {"map": features, f"tap{next(self.count)}": features}


class GridOfBrightness(Net):
    def maps(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels, 4 if pixels[0, 0].mean() > -1.5 else 8)


class OtherOrder(Net):
    def maps(self, pixels: Tensor) -> Tensor:
        return super().maps(pixels).flip(0)


def teacher(module: nn.Module) -> Teacher:
    return Teacher(module, size=(32, 32), license="mit")


def broken() -> Teacher:
    return teacher(StatisticsOfTheBatch())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (DropoutAlways, "the same pixels give other features when they are run again"),
        (NetInAList, "statistics over the batch"),
        (StaysInTrainMode, r"module(\.drop)? \((StaysInTrainMode|Dropout)\) stays in train mode"),
        (StatisticsOfTheBatch, "statistics over the batch"),
        (Counts, "the same pixels give other features when they are run again"),
        (Drifts, "the same pixels give other features when they are run again"),
        (WeakStatisticsOfTheBatch, "statistics over the batch"),
        (TapsChange, "its taps change: 'tap1'"),
        (GridOfBrightness, "another shape: .* other features alone"),
        (OtherOrder, "other features alone"),
    ],
)
def test_a_module_that_is_no_function_of_the_pixels_is_refused(module: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^teachers.own: is not a function of the pixels alone: .*{message}"):
        check_pure("own", teacher(module()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_with_a_batch_norm_in_evaluation_mode_is_accepted(dtype: torch.dtype) -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5)).to(dtype)

        def forward(self, pixels: Tensor) -> dict[str, Features]:
            return {"map": Features.from_map(self.net(pixels.to(dtype)).float())}

    check_pure("own", teacher(Convolutions()))


def test_a_module_of_a_recipe_and_a_teacher_from_python_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="^teachers.own: is not a function"):
        load_teacher("own", TeacherSpec(module="tests.teachers.test_pure:broken"))
    save_base(tmp_path / "base")
    save_images(tmp_path / "images", 20)
    recipe = tiny_recipe(tmp_path, teachers={})
    check_inputs(recipe, {"own": teacher(Net())})
    with pytest.raises(RecipeError, match="^teachers.own: is not a function"):
        check_inputs(recipe, {"own": broken()})


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_teachers_that_differ_between_ranks_are_refused(seed: int, same: bool) -> None:
    sent: list[object] = []

    def rank_1(value: object) -> list[object]:
        sent.append(value)
        return [value]

    check_same_on_ranks(Teachers({"own": teacher(Net(seed))}), rank_1)
    teachers = Teachers({"own": teacher(Net(0))})
    if same:
        check_same_on_ranks(teachers, lambda value: [value, *sent])
        return
    with pytest.raises(RecipeError, match="^teachers.own: .*tap 'map' differs between ranks 0 and 1"):
        check_same_on_ranks(teachers, lambda value: [value, *sent])
