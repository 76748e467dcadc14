"""Arguments and options that several commands share, and output as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer


def expand_home(path: Path | None) -> Path | None:
    """Replace a leading ~ by the home folder: the shell leaves it in ``--out=~/page.html``."""
    return None if path is None else Path(os.path.expanduser(path))


RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to keys of the recipe, such as train.steps=2000.")]
RunOrStudent = Annotated[Path, typer.Argument(help="A run folder, or the folder of a student.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=1))
