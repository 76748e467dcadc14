"""Int8 teachers are compared with themselves in float32, and refused where they differ too much or cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoulders.config.recipe import Recipe
from shoulders.config.sections import TeacherSpec
from shoulders.errors import RecipeError
from shoulders.hub.fast import Int8Linear, int8_available
from shoulders.teachers import check_teacher, load_teacher
from shoulders.training.int8_check import check_int8
from tests.tiny import save_base, save_images, save_segformer, tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    save_base(tmp_path / "base")
    save_images(tmp_path / "images", 80)
    segmenter = {"model": str(save_segformer(tmp_path / "segmenter")), "int8": True}
    return tiny_recipe(tmp_path, teachers={"segmenter": segmenter}, images__holdout=8)


@pytest.mark.skipif(not int8_available(), reason="int8 is no faster on this machine")
def test_the_difference_is_logged_and_too_large_a_difference_is_refused(recipe: Recipe) -> None:
    teacher = load_teacher("t", recipe.teachers["segmenter"])
    assert any(isinstance(module, Int8Linear) for module in teacher.modules())
    lines: list[str] = []
    check_int8(recipe, lines.append)
    assert len(lines) == 1 and lines[0].startswith("segmenter in int8: fvu ") and lines[0].endswith("on 8 images")
    with pytest.raises(RecipeError, match=r"^teachers\.segmenter\.int8: stage\d/spatial loses .* leave the key out$"):
        check_int8(recipe, lines.append, max_fvu=0.0)


def test_without_int8_teachers_nothing_is_loaded(recipe: Recipe) -> None:
    recipe.teachers["segmenter"].int8 = False
    recipe.teachers["segmenter"].model = "/missing"
    recipe.images.path = Path("/missing")
    check_int8(recipe, print)


def test_int8_is_refused_on_a_machine_without_it(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"^teachers\.segmenter\.int8: needs a CPU with VNNI"):
        check_teacher("segmenter", recipe.teachers["segmenter"], has_int8=False)
    with pytest.raises(ValueError, match="int8 needs model:"):
        TeacherSpec(module="somewhere:something", int8=True)
