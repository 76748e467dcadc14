"""What the commands found, as a table and a few lines for people."""

from __future__ import annotations

from typing import Any

from shoulders.storage.atomic import size_text

Table = tuple[list[str], list[list[str]], list[str]]  # titles, rows, and what is said below


def show_plan(told: dict[str, Any]) -> Table:
    """Of `shoulders.feature_cache.plan_cache`."""
    rows = [
        [row["teacher"], str(row["views"]), str(row["bytes_per_view"]), f"{row['s_per_view']:.2g}"]
        for row in told["teachers"]
    ]
    disk, free, memory = (size_text(told[f"{what}_bytes"]) for what in ("disk", "free", "memory"))
    below = f"{disk} on disk ({free} free), {memory} of memory, {told['minutes']:.1f} minutes for one process"
    return ["teacher", "views to make", "bytes per view", "s per view"], rows, [below]


def show_contents(told: dict[str, Any]) -> Table:
    """Of `shoulders.feature_cache.info_cache` and those that answer like it."""
    rows = [
        [
            f"{row['teacher']}/{tap['tap']}/{tap['part']}",
            f"{tap['tokens']} x {tap['width']} {row['dtype']}",
            str(tap["bytes_per_view"]),
            f"{tap['reconstruction_fvu']:.1e}",
        ]
        for row in told["teachers"]
        for tap in row["taps"]
    ]
    below = []
    for row in told["teachers"]:
        done = "whole" if row["finished"] else f"{row['shards_done']} of {row['shards']} shards"
        bad = f" ({row['undecodable']} without an image that could be decoded)" if row["undecodable"] else ""
        below.append(f"{row['folder']}: {row['views']} views{bad}, {done}, {size_text(row['bytes'])}")
    return (
        ["teacher / tap / part", "stored as", "bytes per view", "fvu lost"],
        rows,
        [
            *below,
            f"{told['path']}: {size_text(told['bytes'])}",
        ],
    )
