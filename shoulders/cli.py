"""The command line: what each command takes and prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shoulders.errors import RecipeError, ShouldersError, SpaceError

app = typer.Typer(
    help="Build a vision foundation model from models instead of labels.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=2000.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil the teachers of a recipe into one student."""
    from shoulders.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.distill import distill

    summary = distill(checked, resume=resume)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"fraction of variance unexplained, on {summary['heldout']} held-out images (0: all inherited)")
        told = {key.removeprefix("fvu/"): value for key, value in summary.items() if key.startswith("fvu/")}
        heads = {name: summary.get(f"fvu_head/{name}") for name in told}
        _print_table(["teacher / tap / part", "fvu", "fvu of the projector"],
                     [[name, f"{value:.3f}", _cell(heads[name])] for name, value in told.items()])  # fmt: skip
        print(f"\n{summary['steps']} steps in {summary['seconds']:.0f} s; the student is in {summary['out']}/student")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a student's folder.")],
    task: Annotated[str, typer.Option(help="classification, detection, semantic or instance.")],
    data: Annotated[Path, typer.Option(help="Labelled images: class folders, index masks or COCO files.")],
    models: Annotated[
        str, typer.Option(help="student, base, teachers, or teachers by name.")
    ] = "student,base,teachers",
    column: Annotated[str, typer.Option(help="The image column of parquet files.")] = "image",
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Processes or threads that decode.", min=0)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    heads: Annotated[bool, typer.Option("--heads", help="Score the kept heads instead of fitting a probe.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the student, its base and its teachers on a task."""
    from shoulders.evaluate import evaluate, evaluate_heads

    def say(name: str) -> None:
        print(f"measuring {name} ...", file=sys.stderr)

    if heads:
        rows = evaluate_heads(
            run, task, data, models.split(","), column=column, batch=batch, workers=workers, on_model=say
        )
    else:
        rows = evaluate(run, task, data, models.split(","), column=column, batch=batch, workers=workers, seed=seed,
                        on_model=say)  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    # those of single classes are told with --json alone
    metrics = list(dict.fromkeys(row["metric"] for row in rows if "/" not in row["metric"]))
    named = [(row["model"] + (f", head of {row['head']}" if heads else ""), row) for row in rows]
    names = list(dict.fromkeys(name for name, _ in named))
    values = {(name, row["metric"]): f"{100 * row['value']:.1f}" for name, row in named}
    print(f"{task}, % of {rows[0]['n']} images")
    _print_table(
        ["model", *metrics], [[name, *(values.get((name, metric), "-") for metric in metrics)] for name in names]
    )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, or a student's folder.")],
    images: Annotated[Path, typer.Argument(help="An image, or a folder, parquet or tar file of images.")],
    head: Annotated[list[str] | None, typer.Option(help="A kept head, may be repeated; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Where predictions.json and pictures go.")] = Path("predictions"),
    threshold: Annotated[float, typer.Option(help="Leave out objects of a lower score.", min=0, max=1)] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Run the heads that a student kept on images."""
    from shoulders.predict import predict

    told = predict(run, images, head or (), out, threshold=threshold)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    rows = [[image, name, _brief(answer)] for image, heads in told.items() for name, answer in heads.items()]
    _print_table(["image", "head", "answer"], rows)
    print(f"\npredictions.json and a picture for each image and head are in {out}")


@app.command()
def teachers(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe: say what each of its teachers is.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as teachers.x.size=224.")] = None,
    families: Annotated[bool, typer.Option("--families", help="List the model families that can teach.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what the teachers of a recipe are, or which families can teach."""
    if families == (recipe is not None):
        raise RecipeError("give a recipe, or --families")
    if recipe is None:
        from shoulders.teachers import families as list_families

        rows = list_families()
    else:
        from shoulders.recipe import read_recipe

        checked = read_recipe(recipe, overrides or ())
        from shoulders.teachers import describe, load_teacher

        rows = [describe(name, load_teacher(name, spec)) for name, spec in checked.teachers.items()]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


@app.command()
def world(
    folder: Annotated[Path, typer.Argument(help="Where to write; one folder for each style.")],
    style: Annotated[list[str] | None, typer.Option(help="A style, may be repeated; default: all.")] = None,
    train: Annotated[int, typer.Option(help="Scenes of each style to fit on.", min=1)] = 1000,
    val: Annotated[int, typer.Option(help="Scenes of each style to choose on.", min=0)] = 200,
    test: Annotated[int, typer.Option(help="Scenes of each style to report.", min=0)] = 500,
    size: Annotated[int, typer.Option(help="Side in px.", min=32)] = 96,
    seed: Annotated[int, typer.Option(help="Another seed, another world.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Write the small world: scenes with labels for all four tasks, as ordinary files."""
    from tqdm import tqdm

    from shoulders.world import STYLES, write_world

    styles, counts = style or list(STYLES), {"train": train, "val": val, "test": test}
    with tqdm(total=len(styles) * sum(counts.values()), unit=" scenes", leave=False, disable=None) as bar:
        written = write_world(folder, styles, counts, size, seed, on_scene=lambda: bar.update())
    if as_json:
        told = [{"style": name, "path": str(folder / name), "written": folder / name in written} for name in styles]
        print(json.dumps(told, indent=1))
        return
    rows = [[name, str(folder / name), "written" if folder / name in written else "was there"] for name in styles]
    _print_table(["style", "folder", ""], rows)
    print("\nin each: classification/ (class folders), instances/ (COCO JSON), semantic/ (index masks)")


def main() -> None:
    """The console script: runs a command and turns our errors into one line and their exit code."""
    try:
        app()
    except ShouldersError as error:
        print(f"shoulders: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MemoryError:
        print(
            "shoulders: no memory left; raise train.accumulate, or lower train.batch or images.workers", file=sys.stderr
        )
        sys.exit(SpaceError.exit_code)
    except RuntimeError as error:
        lost = next((line for line in LOST if line in str(error)), None)
        if lost is None:
            raise
        print(f"shoulders: {' '.join(str(error).split())[:300]}; {LOST[lost][1]}", file=sys.stderr)
        sys.exit(LOST[lost][0])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"shoulders: {error.filename or 'the disk'}: no space left; make room and go on with --resume",
            file=sys.stderr,
        )
        sys.exit(SpaceError.exit_code)


# what torch says when something is gone -> exit code, and what to do
LOST = {
    "DataLoader worker": (70, "a worker was lost, perhaps for want of memory: lower images.workers"),
    "out of memory": (5, "raise train.accumulate, or lower train.batch"),
}


def _print_table(titles: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in [titles, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _brief(answer: Any) -> str:
    """An answer in a few words: the first classes or objects with their scores."""
    if isinstance(answer, dict):
        return "depth map"
    scores = [f"{one['label']}" + ("" if one["score"] is None else f" {one['score']:.2f}") for one in answer]
    return ", ".join(scores[:4]) + (f" and {len(scores) - 4} more" if len(scores) > 4 else "") or "nothing found"


def _cell(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return ", ".join(map(str, value))
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
