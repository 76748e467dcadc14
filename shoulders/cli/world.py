"""``shoulders world``: drawn scenes with labels, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.options import AsJson, expand_home, print_json
from shoulders.cli.tables import print_table


def world(
    folder: Annotated[Path, typer.Argument(help="Where to write; one folder per style.", callback=expand_home)],
    style: Annotated[list[str] | None, typer.Option(help="A style, may be repeated; default: all.")] = None,
    train: Annotated[int, typer.Option(help="Training scenes of each style.", min=1)] = 1000,
    val: Annotated[int, typer.Option(help="Validation scenes of each style.", min=0)] = 200,
    test: Annotated[int, typer.Option(help="Test scenes of each style.", min=0)] = 500,
    size: Annotated[int, typer.Option(help="Side length in px.", min=32)] = 96,
    seed: Annotated[int, typer.Option(help="Each seed gives other scenes.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Write the small world as files. It has drawn scenes with labels for all four tasks."""
    from tqdm import tqdm

    from shoulders.world import STYLES, write_world

    styles, counts = style or list(STYLES), {"train": train, "val": val, "test": test}
    with tqdm(total=len(styles) * sum(counts.values()), unit=" scenes", leave=False, disable=None) as bar:
        written = write_world(folder, styles, counts, size, seed, on_scene=lambda: bar.update())
    if as_json:
        print_json(
            [{"style": name, "path": str(folder / name), "written": folder / name in written} for name in styles]
        )
        return
    rows = [[name, str(folder / name), "written" if folder / name in written else "exists"] for name in styles]
    print_table(["style", "folder", ""], rows)
    print("\neach holds classification/ (class folders), instances/ (COCO JSON) and semantic/ (index masks)")
