"""A plan for people: a table of the parts of a step, and lines of what it all takes."""

from __future__ import annotations

import shlex
from typing import Any

from shoulders.cli.cache_tables import Table
from shoulders.storage.atomic import size_text


def show_plan(told: dict[str, Any]) -> Table:
    """Of `shoulders.planning.plan`: titles, rows, and what is said below."""
    step, decode = told["step_s"], told["decode"]
    together = sum(part["s"] for part in told["parts"])
    rows = [_row(part["part"], part["s"], step) for part in told["parts"]]
    rows += [_row("these one after another", together, step), _row("a whole step, measured by itself", step, step)]
    below = [_memory(told["memory"]), _disk(told["disk"]), _hours(told["hours"])]
    if decode["workers"]:
        busy = decode["s_per_batch"] / decode["workers"] / step
        below.insert(
            0,
            f"decode  {1000 * decode['s_per_batch']:.1f} ms a batch for one worker; {decode['workers']} at "
            f"work beside the step, busy for {busy:.0%} of it",
        )
    if told["cache_estimate"]:
        storing = told["cache_estimate"]
        below.append(
            f"cache   of {storing['views']} views: {size_text(storing['disk_bytes'])} on disk, made in "
            f"{_time(storing['minutes'] / 60)}"
        )
    return ["part of a step", "ms", "share"], rows, [*below, "", *_advice(told["suggestions"])]


def _row(name: str, seconds: float, step: float) -> list[str]:
    return [name, f"{1000 * seconds:8.1f}", f"{seconds / step:5.0%}"]


def _memory(told: dict[str, Any]) -> str:
    whose = "of the GPU" if told["of"] == "cuda" else "of this machine"
    return f"memory  {size_text(told['peak_bytes'])} at most, {size_text(told['available_bytes'])} {whose} are there"


def _disk(told: dict[str, Any]) -> str:
    text = (
        f"disk    {size_text(told['run_bytes'])}: {told['checkpoints']} checkpoints of "
        f"{size_text(told['checkpoint_bytes'])}, the student {size_text(told['student_bytes'])}; "
        f"{size_text(told['free_bytes'])} free"
    )
    return text + (f"; the cache that is read has {size_text(told['cache_bytes'])}" if told["cache_bytes"] else "")


def _hours(told: dict[str, float]) -> str:
    return (
        f"time    {_time(told['total'])}: {_time(told['steps'])} of steps, {_time(told['before'])} of questions to the "
        f"teachers before them, {_time(told['measures'])} of held-out measures"
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"


def _advice(suggestions: list[dict[str, Any]]) -> list[str]:
    if not suggestions:
        return ["no setting is known that would make it cheaper"]
    lines = ["what would make it cheaper, with the share of a step that it saves:"]
    for one in suggestions:
        saves = "needed" if one["saves"] is None else f"{one['saves']:.0%}"
        lines += [f"{saves:>6}  {shlex.join(one['give']) or '(nothing to change)'}", f"        {one['why']}"]
    return lines
