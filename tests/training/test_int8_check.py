"""Teachers in int8 are held against themselves, and refused where they are too far off or cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoulders.config.recipe import Recipe, TeacherSpec, check_recipe
from shoulders.errors import RecipeError
from shoulders.hub.fast import Int8Linear, int8_available
from shoulders.teachers import check_teacher, load, load_teacher
from shoulders.training import int8_check as fidelity
from shoulders.training.int8_check import check_int8
from tests.tiny import save_base, save_images, save_segformer


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_images(tmp_path / "images", 80)
    return check_recipe(
        {
            "student": {"base": str(save_base(tmp_path / "base"))},
            "teachers": {"segmenter": {"model": str(save_segformer(tmp_path / "segmenter")), "int8": True}},
            "images": {"path": str(tmp_path / "images"), "size": 32, "holdout": 8},
            "out": str(tmp_path / "run"),
        }
    )


@pytest.mark.skipif(not int8_available(), reason="int8 is no faster on this machine")
def test_how_far_off_it_is_is_said_and_too_far_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(isinstance(part, Int8Linear) for part in load_teacher("t", recipe.teachers["segmenter"]).modules())
    said: list[str] = []
    check_int8(recipe, said.append)
    assert len(said) == 1 and said[0].startswith("segmenter in int8: fvu ") and said[0].endswith("on 8 images")
    monkeypatch.setattr(fidelity, "MOST", 0.0)
    with pytest.raises(RecipeError, match=r"^teachers\.segmenter\.int8: stage\d/spatial loses .* leave the key out$"):
        check_int8(recipe, said.append)


def test_without_int8_nothing_is_loaded(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.teachers["segmenter"].int8 = False
    monkeypatch.setattr(fidelity, "load_teacher", None)
    check_int8(recipe, print)


def test_where_it_cannot_run_it_is_refused_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "int8_available", lambda: False)
    with pytest.raises(RecipeError, match=r"^teachers\.segmenter\.int8: needs a CPU with VNNI"):
        check_teacher("segmenter", recipe.teachers["segmenter"])
    with pytest.raises(ValueError, match="int8 is for a model"):
        TeacherSpec(module="somewhere:something", int8=True)
