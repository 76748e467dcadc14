"""Write the page of a run as one HTML file without other files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shoulders.errors import DataError
from shoulders.report.choose import GivenImages
from shoulders.report.curves import balance_section, training_section
from shoulders.report.details import run_section
from shoulders.report.figures import Figures, draw_figures
from shoulders.report.gallery import features_section, heads_section, hero
from shoulders.report.headline import headline
from shoulders.report.markup import Html, element, text
from shoulders.report.record import RunRecord, read_run
from shoulders.report.results import table_lines
from shoulders.report.scores import results_section
from shoulders.storage.atomic import write_text
from shoulders.storage.tensor_files import read_header

# the browser loads nothing and runs no script, whatever the page contains
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LINKS = {
    "results": "Results",
    "heads": "Heads",
    "features": "Features",
    "training": "Training",
    "balance": "Balance",
    "run": "Run",
}


def write_report(
    run: Path | str,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    images: GivenImages = None,
    out: Path | str | None = None,
) -> Path:
    """Write the page of a run folder; parts that the run does not have are named with the command that produces them.

    Args:
        run: a run folder.
        rows: measurements for the table instead of those in ``results.json``: rows of `shoulders.evaluation.evaluate`,
            or rows of task, kind (a key of `shoulders.report.results.KINDS`), metric, value, seed and, for several
            data sets, dataset.
        images: an `ImageSource` for all heads, or one for each head by name. Default: the test images that a head was
            evaluated on, if they still exist, else held-out images of the run.
        out: the file; default: ``report.html`` in the run folder.

    Returns:
        The path of the file.

    Raises:
        RecipeError: ``run`` is no run folder.
        DataError: a file in it is damaged.
        SpaceError: the disk is full.
    """
    run = Path(run)
    record = read_run(run, None if rows is None else [dict(row) for row in rows])
    file = run / "report.html" if out is None else Path(out)
    write_text(file, render(record, draw_figures(record, images)))
    return file


def render(record: RunRecord, figures: Figures) -> str:
    """The page as HTML text."""
    lines = table_lines(record.rows)
    main = [
        headline(record, lines, count_parameters(record.folder)),
        hero(figures),
        _links(),
        results_section(record, lines),
        heads_section(record, figures),
        features_section(record, figures),
        training_section(record),
        balance_section(record),
        run_section(record),
    ]
    style = resources.files("shoulders.report").joinpath("page.css").read_text()
    name = record.folder.resolve().name
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">'
        f"<title>{text(name)}: {text(', '.join(record.teachers))} in one student</title><style>{style}</style>"
    )
    footer = element("footer", "Written by ", element("code", "shoulders report"), ". This page loads no other files.")
    body = element("main", *main) + footer
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _links() -> Html:
    links = [element("a", title, href=f"#{name}") for name, title in LINKS.items()]
    return element("nav", *links, aria_label="Sections")


def count_parameters(run: Path) -> dict[str, int]:
    """Numbers of parameters of the student's encoder, ``{"base": .., "adapter": ..}``; {} without a student."""
    counts = {"base": 0, "adapter": 0}
    for file in sorted((run / "student").glob("*.safetensors")):
        try:
            shapes = {name: entry["shape"] for name, entry in read_header(file).items() if name.startswith("encoder.")}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: damaged weights ({' '.join(str(error).split())})") from error
        for name, shape in shapes.items():
            part = name.split(".")[1]
            if part in counts:
                counts[part] += math.prod(shape)
    return counts if counts["base"] else {}
