"""One teacher and several: frozen, with normalized pixels at their own size, usable in a loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.features import Batch, Features, in_order
from shoulders.teachers import Tap, Teacher, Teachers, describe, load_teacher
from shoulders.teachers.describe import flops_per_image

WriteTiny = Callable[..., Path]


class Patches(nn.Module):
    """A linear map of 2 x 2 squares, and the mean colour of the image."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, width, 2, stride=2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        maps = self.dropout(self.linear(pixels))
        return {"map": Features.from_map(maps), "colour": Features(pixels.mean((2, 3)), None)}


class FunctionModule(nn.Module):
    """A module that computes a given function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, pixels: Tensor) -> Any:
        return self.function(pixels)


def batch(*sizes: tuple[int, int], images: int = 3) -> Batch:
    rendered = {size: torch.randint(0, 256, (images, 3, *size), dtype=torch.uint8) for size in sizes}
    return Batch(torch.arange(images), rendered)


def test_taps_are_described_and_pixels_normalized() -> None:
    teacher = Teacher(Patches(), size=(4, 6), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    assert teacher.taps == {"map": Tap(None, 5, (2, 3)), "colour": Tap(3, None, (0, 0))}
    pixels = torch.full((2, 3, 4, 6), 0.75)
    torch.testing.assert_close(teacher(pixels)["colour"].summary, torch.tensor([[0.5, 2.0, 0.75]] * 2))
    assert teacher.license == "unknown" and teacher.revision is None


def test_a_teacher_stays_frozen() -> None:
    teacher = Teacher(Patches(), size=(4, 4))
    initial = [parameter.clone() for parameter in teacher.parameters()]
    holder = nn.ModuleDict({"teacher": teacher}).train()
    assert not any(module.training for module in holder["teacher"].modules())
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    spatial = teacher(pixels)["map"].spatial
    assert spatial is not None and not spatial.requires_grad
    assert torch.equal(spatial, teacher(pixels)["map"].spatial)  # dropout is off
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(initial, teacher.parameters(), strict=True))
    assert not any("mean" in key or "std" in key for key in teacher.state_dict())


def test_selected_taps() -> None:
    teacher = Teacher(Patches(), size=(4, 4), mean=(0.1, 0.1, 0.1), source="folder").with_taps(["colour"])
    assert list(teacher.taps) == list(teacher(torch.rand(1, 3, 4, 4))) == ["colour"]
    assert teacher.source == "folder" and teacher.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    with pytest.raises(RecipeError, match="taps depth: unknown; allowed: map, colour"):
        Teacher(Patches(), size=(4, 4), taps=["depth"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.mean((2, 3)), "must return .*got Tensor"),
        (lambda x: {}, "must return"),
        (lambda x: {"a": x.mean((2, 3))}, "got Tensor for tap 'a'"),
        (lambda x: {1: Features(x.mean((2, 3)), None)}, "must return"),
        (lambda x: {"a": Features(x.mean((2, 3)).repeat(2, 1), None)}, "summary has 2 rows for 1 images"),
        (lambda x: {"a": Features(x.mean((2, 3)) / 0, None)}, "summary is not finite"),
    ],
)
def test_other_outputs_than_features_by_tap_are_refused(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Teacher(FunctionModule(function), size=(4, 4))


def test_teachers_give_features_by_name_and_tap_at_their_own_size() -> None:
    a, b, c = Teacher(Patches(), (4, 4)), Teacher(Patches(7), (8, 6)), Teacher(Patches(2), (4, 4))
    teachers = Teachers({"a": a, "b": b, "c": c}, {"b": ["map"]})
    assert teachers.sizes == [(4, 4), (8, 6)]
    views = batch(*teachers.sizes)
    features = teachers(views)
    assert list(features) == list(teachers.taps) == ["a/map", "a/colour", "b/map", "c/map", "c/colour"]
    assert teachers.taps["b/map"] == Tap(None, 7, (4, 3))
    assert torch.equal(features["b/map"].spatial, b(views.pixels((8, 6)))["map"].spatial)
    with pytest.raises(KeyError, match="add the size to the loader"):
        teachers(batch((4, 4)))
    with pytest.raises(RecipeError, match=r"teachers\.a\.taps: no tap depth; allowed: map, colour"):
        Teachers({"a": a}, {"a": ["depth"]})


def test_a_loss_on_the_features_has_gradients_for_a_projector() -> None:
    teachers = Teachers({"a": Teacher(Patches(), (4, 4))})
    spatial = teachers(batch((4, 4)))["a/map"].spatial
    projector = nn.Linear(5, 5)  # teacher to student: its input is saved for the backward pass
    target = torch.zeros_like(spatial, requires_grad=True)
    loss = (projector(spatial) - target).pow(2).mean() + (spatial * target).mean()
    loss.backward()
    assert projector.weight.grad is not None and projector.weight.grad.abs().sum() > 0
    assert target.grad is not None and not spatial.is_inference()


def test_in_bf16_teachers_compute_in_bfloat16_and_return_float32() -> None:
    dtypes: list[torch.dtype] = []
    model = Patches()
    model.linear.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    teacher = Teacher(model, (4, 4))
    views = batch((4, 4))
    bf16, fp32 = Teachers({"a": teacher}, bf16=True)(views), Teachers({"a": teacher})(views)
    assert dtypes[-2:] == [torch.bfloat16, torch.float32]
    assert bf16["a/map"].spatial.dtype == torch.float32
    torch.testing.assert_close(bf16["a/map"].spatial, fp32["a/map"].spatial, atol=0.05, rtol=0.05)


def test_description(write_tiny: WriteTiny) -> None:
    folder = write_tiny("vit")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n")
    teacher = load_teacher("v", TeacherSpec(model=str(folder)))
    described = describe("v", teacher)
    blocks, width, hidden, tokens, patch = 3, 16, 32, 16, 8
    length = tokens + 1
    attention = 4 * length * width * width + 2 * length * length * width
    products = blocks * (attention + 2 * length * width * hidden) + tokens * 3 * patch * patch * width
    assert flops_per_image(teacher) == 2 * products
    assert described["gflop_per_image"] == round(2 * products / 1e9, 3)
    assert described["taps"] == {"last": {"summary": 16, "spatial": 16, "grid": (4, 4)}}
    assert (described["license"], described["size"], described["revision"]) == ("apache-2.0", (32, 32), None)
    original = transformers.ViTForImageClassification.from_pretrained(folder).vit
    assert described["parameters"] == sum(parameter.numel() for parameter in original.parameters())


def test_memory_layout_of_features_with_a_side_of_one() -> None:
    pooled = torch.rand(4, 16, 1, 1)
    spatial = Features.from_map(pooled).spatial  # (4, 1, 16), with strides that is_contiguous accepts
    assert spatial is not None and spatial.is_contiguous() and spatial.stride() != (16, 16, 1)
    assert in_order(spatial).stride() == (16, 16, 1) and torch.equal(in_order(spatial), spatial)
    matrix = torch.rand(2, 3)
    assert in_order(matrix) is matrix and in_order(matrix.T).stride() == (2, 1)
