"""``shoulders demo``: the method in minutes, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.options import AsJson, expand_home, print_json
from shoulders.cli.tables import print_table


def demo(
    out: Annotated[
        Path, typer.Option(help="Run folder; finished parts in it are not repeated.", callback=expand_home)
    ] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="About a minute; the scores mean nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the method in minutes. Four tiny teachers, one student, four tasks, one page."""
    from shoulders.demo import KINDS, demo

    rows = demo(out, quick)
    if as_json:
        print_json(rows)
        return
    values = {(row["task"], row["kind"]): 100 * row["value"] for row in rows}
    metrics = {row["task"]: row["metric"] for row in rows}
    print("scores in %, on scenes that were used for nothing else; the student was trained without labels")
    print_table(
        ["task", *KINDS.values()],
        [[f"{task} ({metric})", *(f"{values[task, kind]:.1f}" for kind in KINDS)] for task, metric in metrics.items()],
    )
    print(f"\nthe page: {out / 'report.html'}")
