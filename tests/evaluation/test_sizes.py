"""A student is evaluated at other input sizes than that of its training; sizes that do not fit are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoulders.cli import app
from shoulders.errors import RecipeError
from tests.evaluation.test_evaluate import evaluate_quickly, world  # noqa: F401


def test_rows_at_another_size_differ_and_are_not_saved(world: Path) -> None:  # noqa: F811
    file = world / "run" / "results.json"
    values = {}
    for size in (None, (32, 32), (48, 64)):
        before = file.read_text()
        rows = evaluate_quickly(world / "run", "semantic", world / "masks", ("student", "base"), size=size)
        values[size] = {(row["model"], row["metric"]): row["value"] for row in rows}
        assert size is None or file.read_text() == before
    assert values[None] == values[32, 32]  # the size of the training
    assert values[48, 64] != values[None]


@pytest.mark.parametrize("size", [(33, 32), (0, 32)])
def test_a_size_that_is_no_multiple_of_the_patch_size_is_refused(world: Path, size: tuple[int, int]) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match="--size: input size .* is not a multiple of the patch size 8"):
        evaluate_quickly(world / "run", "semantic", world / "masks", ("student",), size=size)


@pytest.mark.parametrize("size", ["large", "32,", "1,2,3", "-8", "0"])
def test_the_command_line_takes_one_number_or_two(size: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", "run", "--task", "semantic", "--data", "data", "--size", size])
    assert isinstance(done.exception, RecipeError)
    assert "is neither N nor H,W in px" in str(done.exception)
