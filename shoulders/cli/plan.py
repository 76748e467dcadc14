"""``shoulders plan``: the cost of a run, before it is started."""

from __future__ import annotations

import shlex
from typing import Any

from shoulders.cli.options import AsJson, Overrides, RecipeFile, print_json
from shoulders.cli.tables import Table, print_table
from shoulders.storage.atomic import size_text


def plan(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Estimate a run's time, memory and disk. Also suggest how to reduce them."""
    from shoulders.config.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.planning import plan

    cost = plan(checked)
    if as_json:
        print_json(cost)
        return
    titles, rows, notes = cost_table(cost)
    print_table(titles, rows)
    print("", *notes, sep="\n")


def cost_table(cost: dict[str, Any]) -> Table:
    """The result of `shoulders.planning.plan` as a table of the parts of a step, and lines about everything else."""
    step_s = cost["step_s"]
    total_s = sum(part["s"] for part in cost["parts"])
    rows = [_row(part["part"], part["s"], step_s) for part in cost["parts"]]
    rows += [_row("sum of these parts", total_s, step_s), _row("a whole step, measured separately", step_s, step_s)]
    notes = [
        *_decode(cost["decode"], step_s),
        _memory(cost["memory"]),
        _disk(cost["disk"]),
        _hours(cost["hours"]),
        *_cache(cost["cache_estimate"]),
        "",
        *_suggestions(cost["suggestions"]),
    ]
    return ["part of a step", "ms", "share"], rows, notes


def _row(name: str, seconds: float, step_s: float) -> list[str]:
    return [name, f"{1000 * seconds:8.1f}", f"{seconds / step_s:5.0%}"]


def _decode(decode: dict[str, Any], step_s: float) -> list[str]:
    workers = decode["workers"]
    if not workers:
        return []
    busy = decode["s_per_batch"] / workers / step_s
    return [
        f"decode  {1000 * decode['s_per_batch']:.1f} ms per batch in one worker; with {workers} at work, each is "
        f"busy for {busy:.0%} of the step"
    ]


def _memory(memory: dict[str, Any]) -> str:
    device = "GPU" if memory["of"] == "cuda" else "machine"
    return (
        f"memory  {size_text(memory['peak_bytes'])} at most; {size_text(memory['available_bytes'])} are available on "
        f"this {device}"
    )


def _disk(disk: dict[str, Any]) -> str:
    text = (
        f"disk    {size_text(disk['run_bytes'])}: checkpoints {disk['checkpoints']} x "
        f"{size_text(disk['checkpoint_bytes'])}, the student {size_text(disk['student_bytes'])}; "
        f"{size_text(disk['free_bytes'])} free"
    )
    return text + (f"; the cache that the run reads: {size_text(disk['cache_bytes'])}" if disk["cache_bytes"] else "")


def _hours(hours: dict[str, float]) -> str:
    return (
        f"time    {_time(hours['total'])}: {_time(hours['steps'])} for the steps, {_time(hours['before'])} for running "
        f"the teachers before the first step, {_time(hours['measures'])} for the evaluations on held-out images"
    )


def _cache(estimate: dict[str, Any] | None) -> list[str]:
    if not estimate:
        return []
    return [
        f"cache   {size_text(estimate['disk_bytes'])} on disk for {estimate['views']} views, built in "
        f"{_time(estimate['minutes'] / 60)}"
    ]


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"


def _suggestions(suggestions: list[dict[str, Any]]) -> list[str]:
    if not suggestions:
        return ["no known setting would make the run cheaper"]
    lines = ["what would make the run cheaper, and the share of a step that each saves:"]
    for row in suggestions:
        saved = "needed" if row["saves"] is None else f"{row['saves']:.0%}"
        lines += [f"{saved:>6}  {shlex.join(row['overrides']) or '(nothing to change)'}", f"        {row['reason']}"]
    return lines
