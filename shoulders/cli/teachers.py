"""``shoulders teachers``: properties of teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.options import AsJson, Overrides, print_json
from shoulders.cli.tables import cell, print_table
from shoulders.errors import RecipeError


def teachers(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML) whose teachers are described.")] = None,
    overrides: Overrides = None,
    families: Annotated[bool, typer.Option("--families", help="List the supported model families.")] = False,
    as_json: AsJson = False,
) -> None:
    """Describe the teachers of a recipe, or list model families."""
    if families == (recipe is not None):
        raise RecipeError("give a recipe, or --families")
    if recipe is None:
        from shoulders.teachers import list_families

        rows = list_families()
    else:
        from shoulders.config.recipe import read_recipe

        checked = read_recipe(recipe, overrides or ())
        from shoulders.teachers import describe, load_teacher

        rows = [describe(name, load_teacher(name, spec)) for name, spec in checked.teachers.items()]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
