"""Write the page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shoulders.report.about import headline
from shoulders.report.about import run as about
from shoulders.report.choose import Given
from shoulders.report.curves import balance, learning
from shoulders.report.figures import Figures, draw_figures
from shoulders.report.gallery import features, heads, hero
from shoulders.report.gather import Told, read_run
from shoulders.report.markup import Html, element, text
from shoulders.report.results import lines
from shoulders.report.scores import results
from shoulders.storage.atomic import write_text

# whatever stands in the page, a browser loads nothing from elsewhere and runs no script
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LINKS = {
    "results": "Results",
    "heads": "Heads",
    "features": "Features",
    "learning": "Learning",
    "balance": "Balance",
    "run": "Run",
}


def write_report(
    run: Path | str,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    images: Given = None,
    out: Path | str | None = None,
) -> Path:
    """Write the page of a run folder, whatever of a run is there.

    Args:
        run: a run folder.
        rows: measurements for the table instead of those in ``results.json``: rows of `shoulders.evaluation.evaluate`, or of
            task, kind (a key of `shoulders.report.results.KINDS`), metric, value, seed and, where there are several
            data sets, dataset.
        images: an `ImageSource` to show, or one for each head by name; default: the test images that a head was
            scored on, where they still lie there, else held-out images of the run.
        out: the file; default: ``report.html`` in the run folder.

    Returns:
        The file.

    Raises:
        RecipeError: ``run`` is no run folder.
        DataError: a file in it is damaged.
        SpaceError: the disk is full.
    """
    run = Path(run)
    told = read_run(run, None if rows is None else [dict(row) for row in rows])
    file = run / "report.html" if out is None else Path(out)
    write_text(file, render(told, draw_figures(told, images)))
    return file


def render(told: Told, figures: Figures) -> str:
    """The page as text."""
    found = lines(told.rows)
    main = [
        headline(told, found, count_parameters(told.folder)),
        hero(figures),
        _links(),
        results(told, found),
        heads(told, figures),
        features(told, figures),
        learning(told),
        balance(told),
        about(told),
    ]
    style = resources.files("shoulders.report").joinpath("page.css").read_text()
    name = told.folder.resolve().name
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" content="light dark">'
        f"<title>{text(name)}: {text(', '.join(told.teachers))} in one student</title><style>{style}</style>"
    )
    written = "Written by ", element("code", "shoulders report"), ". Nothing here is loaded from elsewhere."
    footer = element("footer", *written)
    body = element("main", *main) + footer
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _links() -> Html:
    each = [element("a", title, href=f"#{name}") for name, title in LINKS.items()]
    return element("nav", *each, aria_label="Sections")


def count_parameters(run: Path) -> dict[str, int]:
    """``{"base": .., "adapter": ..}`` numbers in the student's encoder; {} where no student is here."""
    counts = {"base": 0, "adapter": 0}
    for file in sorted((run / "student").glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        for name, facts in header.items():
            part = name.removeprefix("encoder.").split(".")[0]
            if name.startswith("encoder.") and part in counts:
                counts[part] += math.prod(facts["shape"])
    return counts if counts["base"] else {}
