"""The results that a finished run leaves in ``results.json``, and its summary from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoulders.config.recipe import Recipe
from shoulders.storage.results import read_rows, upsert_results

TASK = "inheritance"


def write_results(recipe: Recipe, summary: Mapping[str, Any]) -> None:
    """Write a row for each held-out measure of a run's summary."""
    common = {"model": "student", "task": TASK, "n": summary["heldout"], "seconds": summary["seconds"]}
    rows = [common | {"metric": name, "value": value} for name, value in summary.items() if name.startswith("fvu")]
    upsert_results(recipe.out / "results.json", rows)


def is_finished(recipe: Recipe) -> bool:
    """Whether the run is finished: its student is written after the last step alone, and its rows after that."""
    return (recipe.out / "student").exists() and bool(_rows(recipe))


def read_summary(recipe: Recipe) -> dict[str, Any]:
    """The summary of a finished run."""
    rows = _rows(recipe)
    summary = {"out": str(recipe.out), "steps": recipe.train.steps, "seconds": rows[0]["seconds"]}
    return summary | {"heldout": rows[0]["n"]} | {row["metric"]: row["value"] for row in rows}


def _rows(recipe: Recipe) -> list[dict[str, Any]]:
    return [row for row in read_rows(recipe.out / "results.json") if row["task"] == TASK]
