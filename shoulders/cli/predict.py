"""``shoulders predict``: heads and probes on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.options import AsJson, RunOrStudent, expand_home, print_json
from shoulders.cli.tables import print_table, summarize_prediction
from shoulders.errors import printable


def predict(
    run: RunOrStudent,
    images: Annotated[Path, typer.Argument(help="An image, or a folder, parquet or tar file of images.")],
    head: Annotated[list[str] | None, typer.Option(help="A kept head, may be repeated; default: all.")] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="A probe that evaluate has fitted, such as student/semantic; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for predictions.json and pictures.", callback=expand_home)] = Path(
        "predictions"
    ),
    threshold: Annotated[float, typer.Option(help="Minimum score of an object.", min=0, max=1)] = 0.5,
    max_pixels: Annotated[int, typer.Option(help="Skip images that have more pixels.", min=1)] = 50_000_000,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Write predictions.json alone.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare student, heads and probes with their manifests.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the kept heads of a student, or probes, on images."""
    from shoulders.prediction import predict

    predictions = predict(
        run,
        images,
        head or (),
        out,
        probes=probe or (),
        threshold=threshold,
        max_pixels=max_pixels,
        pictures=not no_pictures,
        verify=not no_verify,
    )
    if as_json:
        print_json(predictions)
        return
    rows = [
        [image, name, summarize_prediction(prediction)]
        for image, by_head in predictions.items()
        for name, prediction in by_head.items()
    ]
    print_table(["image", "head", "prediction"], rows)
    kinds = "predictions.json is" if no_pictures else "predictions.json and one picture per image and head are"
    print(f"\n{kinds} in {printable(out)}")
