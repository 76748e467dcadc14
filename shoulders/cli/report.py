"""``shoulders report``: a run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.options import AsJson, expand_home, print_json


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the run folder.", callback=expand_home)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file about a run: scores, pictures and curves."""
    from shoulders.report import write_report

    page = write_report(run, out=out)
    if as_json:
        print_json({"report": str(page)})
    else:
        print(f"{page}, {page.stat().st_size / 1e6:.1f} MB; open it in a browser")
