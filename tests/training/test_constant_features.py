"""Features without variance are refused, not reported with fvu 0; an fvu above 1 is explained below the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from shoulders.distillation import distill
from shoulders.errors import DataError
from shoulders.features import Features
from shoulders.teachers import Teacher
from shoulders.transfer.fvu import is_constant
from tests.tiny import run_cli, save_base, save_images, tiny_recipe, tiny_tree


class TwoTaps(nn.Module):
    """The mean of 8 x 8 px, and the same scaled and shifted."""

    def __init__(self, scale: float, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, pixels: Tensor) -> dict[str, Features]:
        features = Features.from_map(nn.functional.avg_pool2d(pixels, 8))
        return {"map": features, "scaled": features.map(lambda x: x * self.scale + self.offset)}


@pytest.mark.parametrize(("scale", "offset"), [(0.0, 0.0), (0.0, 0.7), (1e-5, 1000.0)])
@pytest.mark.parametrize("standardize", ["phi_s", "none"])
def test_a_tap_that_never_varies_is_refused(tmp_path: Path, scale: float, offset: float, standardize: str) -> None:
    save_base(tmp_path / "base")
    save_images(tmp_path / "images", 30)
    recipe = tiny_recipe(tmp_path, teachers={}, train__steps=1, transfer__standardize=standardize)
    own = Teacher(TwoTaps(scale, offset), size=(32, 32))
    with pytest.raises(
        DataError, match=r"^teachers\.own: the spatial of tap 'scaled' is the same for all of 8 held-out"
    ):
        distill(recipe, extra_teachers={"own": own})


def test_constant_means_that_no_channel_varies_beyond_rounding() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(8, 2, 3)
    assert not is_constant(vectors) and not is_constant(vectors * 1e-3 + 1)
    assert is_constant(vectors * 0 + 0.7) and is_constant(vectors * 1e-9 + 1)
    assert not is_constant(torch.where(torch.arange(3) == 1, vectors, 0.0))
    assert not is_constant(vectors * float("nan"))  # refused elsewhere, by its own name


@pytest.mark.parametrize(("value", "explained"), [(0.9, False), (1.2, True)])
@pytest.mark.parametrize("key", ["fvu/own/map/spatial", "fvu_projector/own/map/spatial"])
def test_an_fvu_above_1_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, explained: bool, key: str
) -> None:
    measures = {"fvu/own/map/spatial": 0.5, "fvu_spread": 7.0} | {key: value}
    summary = {"out": "run", "steps": 1, "seconds": 1.0, "heldout": 12} | measures
    monkeypatch.setattr("shoulders.distillation.distill", lambda recipe, resume: summary)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    shown = run_cli("distill", tmp_path / "recipe.yaml")
    assert shown.returncode == 0, shown.stderr
    assert ("an fvu above 1 is worse than the mean" in shown.stdout) == explained
