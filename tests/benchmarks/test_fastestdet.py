"""FastestDet as a teacher given as ``module:``: random weights of the published names and shapes, and the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.strangers.fastestdet import Encoder
from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.teachers import Tap, load_teacher


def random_weights(folder: Path) -> Path:
    """A folder with random weights, as the published one is."""
    torch.manual_seed(0)
    save_file(Encoder().state_dict(), folder / "model.safetensors")
    return folder


def spec_of(folder: Path) -> TeacherSpec:
    return TeacherSpec(module="benchmarks.strangers.fastestdet:teacher", args={"folder": str(folder)})


def test_the_encoder_is_a_teacher_with_one_tap(tmp_path: Path) -> None:
    teacher = load_teacher("detector", spec_of(random_weights(tmp_path)))
    assert teacher.taps == {"spp": Tap(None, 96, (22, 22))}
    assert (teacher.size, teacher.license) == ((352, 352), "bsd-3-clause")


def test_its_weights_have_the_published_names_and_shapes(shared_data: Path) -> None:
    file = shared_data / "strangers" / "fastestdet_coco" / "model.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    with safe_open(file, "pt") as weights:
        published = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    weights_of_encoder = {name: value for name, value in Encoder().state_dict().items() if "num_batches" not in name}
    expected = {name: list(value.shape) for name, value in weights_of_encoder.items()}
    assert {name: shape for name, shape in published.items() if not name.startswith("detect_head.")} == expected


def test_without_weights_it_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^teachers\.detector\.module: .*fails: .*model.safetensors"):
        load_teacher("detector", spec_of(tmp_path))


def test_arguments_need_a_function() -> None:
    with pytest.raises(ValueError, match="args needs module"):
        TeacherSpec(model="a", args={"folder": "b"})
