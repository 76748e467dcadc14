"""``shoulders cache``: teacher features on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoulders.cli.options import AsJson, Overrides, print_json
from shoulders.cli.tables import Table, print_table
from shoulders.errors import RecipeError
from shoulders.storage.atomic import size_text


def cache(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML) with cache.path and a number of images.views.")],
    overrides: Overrides = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only estimate its disk space, time and memory.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only read and check every record of it.")] = False,
    info: Annotated[bool, typer.Option("--info", help="Only list what it holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Precompute teacher features. Runs then read them instead of running the teachers."""
    if estimate + verify + info > 1:
        raise RecipeError("give one of --estimate, --verify and --info, or none of them to build the cache")
    from shoulders.config.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.feature_cache import build_cache, estimate_cache, info_cache, verify_cache

    run = estimate_cache if estimate else verify_cache if verify else info_cache if info else build_cache
    result = run(checked)
    if as_json:
        print_json(result)
        return
    titles, rows, notes = (estimate_table if estimate else contents_table)(result)
    print_table(titles, rows)
    print("", *notes, *(["every record is as it was written"] if verify else []), sep="\n")


def estimate_table(result: dict[str, Any]) -> Table:
    """The result of `shoulders.feature_cache.estimate_cache`."""
    rows = [
        [row["teacher"], str(row["views"]), str(row["bytes_per_view"]), f"{row['s_per_view']:.2g}"]
        for row in result["teachers"]
    ]
    disk, free, memory = (size_text(result[f"{kind}_bytes"]) for kind in ("disk", "free", "memory"))
    notes = [f"{disk} on disk ({free} free), {memory} of memory, {result['minutes']:.1f} minutes in one process"]
    return ["teacher", "views to compute", "bytes per view", "s per view"], rows, notes


def contents_table(contents: dict[str, Any]) -> Table:
    """The result of `shoulders.feature_cache.info_cache`, and of the functions that return the same."""
    rows = [
        [
            f"{row['teacher']}/{tap['tap']}/{tap['component']}",
            f"{tap['tokens']} x {tap['width']} {row['dtype']}",
            str(tap["bytes_per_view"]),
            f"{tap['reconstruction_fvu']:.1e}",
        ]
        for row in contents["teachers"]
        for tap in row["taps"]
    ]
    notes = [_teacher_line(row) for row in contents["teachers"]]
    notes.append(f"{contents['path']}: {size_text(contents['bytes'])}")
    return ["teacher / tap / component", "stored as", "bytes per view", "reconstruction fvu"], rows, notes


def _teacher_line(row: dict[str, Any]) -> str:
    done = "complete" if row["finished"] else f"{row['shards_done']} of {row['shards']} shards"
    reasons = {"undecodable": "their images cannot be decoded", "not_finite": "their features are not finite"}
    bad = "".join(f" ({row[key]} of them without features: {why})" for key, why in reasons.items() if row[key])
    return f"{row['folder']}: {row['views']} views{bad}, {done}, {size_text(row['bytes'])}"
