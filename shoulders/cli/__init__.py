"""The command line: what each command takes and prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.tables import brief, cell, print_table
from shoulders.errors import DataError, RecipeError, ShouldersError, SpaceError

app = typer.Typer(
    help="Build a vision foundation model from models instead of labels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _at_home(path: Path | None) -> Path | None:
    """~ is one's own folder also where the shell did not say so, as in --out=~/page.html."""
    return None if path is None else Path(os.path.expanduser(path))  # one of nobody stays as it is


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=2000.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil the teachers of a recipe into one student."""
    from shoulders.config.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.distillation import distill

    summary = distill(checked, resume=resume)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"fraction of variance unexplained, on {summary['heldout']} held-out images (0: all inherited)")
        told = {key.removeprefix("fvu/"): value for key, value in summary.items() if key.startswith("fvu/")}
        heads = {name: summary.get(f"fvu_projector/{name}") for name in told}
        print_table(
            ["teacher / tap / part", "fvu", "fvu of the projector"],
            [[name, f"{value:.3f}", cell(heads[name])] for name, value in told.items()],
        )
        print(f"\n{summary['steps']} steps in {summary['seconds']:.0f} s; the student is in {summary['out']}/student")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as train.batch=64.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a distillation will take, and what would make it cheaper, from a few steps of it."""
    from shoulders.config.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.cli.plan_tables import show_plan
    from shoulders.planning import plan

    told = plan(checked)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    titles, rows, below = show_plan(told)
    print_table(titles, rows)
    print("", *below, sep="\n")


@app.command()
def cache(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML) with cache.path and a number of images.views.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes, such as cache.path=FOLDER.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what disk, time and memory it takes.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only read every byte of it, to be sure.")] = False,
    info: Annotated[bool, typer.Option("--info", help="Only say what it holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Store what the teachers of a recipe say, so that runs read it instead of asking them."""
    if plan + verify + info > 1:
        raise RecipeError("give one of --plan, --verify and --info, or none of them to make the cache")
    from shoulders.config.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.cli.cache_tables import show_contents, show_plan
    from shoulders.feature_cache import build_cache, info_cache, plan_cache, verify_cache

    ask = plan_cache if plan else verify_cache if verify else info_cache if info else build_cache
    told = ask(checked)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    titles, rows, below = (show_plan if plan else show_contents)(told)
    print_table(titles, rows)
    print("", *below, *(["every byte is as it was written"] if verify else []), sep="\n")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a student's folder.")],
    task: Annotated[str, typer.Option(help="classification, detection, semantic or instance.")],
    data: Annotated[Path, typer.Option(help="Labelled images: class folders, index masks or COCO files.")],
    models: Annotated[
        str | None, typer.Option(help="student, base, teachers, teachers by name, scratch; default: the first three.")
    ] = None,
    column: Annotated[str, typer.Option(help="The image column of parquet files.")] = "image",
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Processes or threads that decode.", min=0)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    heads: Annotated[bool, typer.Option("--heads", help="Score the kept heads instead of fitting a probe.")] = False,
    size: Annotated[
        str | None, typer.Option(help="What student and base see, in px: N or H,W; default: as trained.")
    ] = None,
    tune: Annotated[
        str | None, typer.Option(help="adapter: train it together with the probe; of student and base.")
    ] = None,
    scratch_steps: Annotated[
        int | None, typer.Option(help="Of scratch; default: at equal training FLOPs.", min=1)
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="upernet, rt_detr_v2 or mask2former; default: linear, or a small dense one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the student, its base and its teachers on a task."""
    fits = {"--probe": probe, "--tune": tune, "--scratch-steps": scratch_steps}
    if heads and (given := [option for option, value in fits.items() if value is not None]):
        raise RecipeError(f"{', '.join(given)}: with --heads nothing is fitted; leave one or the other out")
    seen_at, asked = _sides(size), models.split(",") if models else None
    from shoulders.evaluation.evaluate import WHO, evaluate, evaluate_heads

    def say(name: str) -> None:
        print(f"measuring {name} ...", file=sys.stderr)

    if heads:
        rows = evaluate_heads(
            run, task, data, asked or WHO, column=column, batch=batch, workers=workers, size=seen_at, on_model=say
        )
    else:
        rows = evaluate(
            run,
            task,
            data,
            asked,
            column=column,
            batch=batch,
            workers=workers,
            seed=seed,
            size=seen_at,
            tune=tune,
            scratch_steps=scratch_steps,
            probe=probe,
            on_model=say,
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    # those of single classes are told with --json alone
    metrics = list(dict.fromkeys(row["metric"] for row in rows if "/" not in row["metric"]))
    named = [(row["model"] + (f", head of {row['head']}" if "head" in row else ""), row) for row in rows]
    names = list(dict.fromkeys(name for name, _ in named))
    values = {(name, row["metric"]): f"{100 * row['value']:.1f}" for name, row in named}
    print(f"{task}, % of {rows[0]['n']} images" + (f", {tune} tuned" if tune else ""))
    print_table(
        ["model", *metrics], [[name, *(values.get((name, metric), "-") for metric in metrics)] for name in names]
    )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder, or a student's folder.")],
    images: Annotated[Path, typer.Argument(help="An image, or a folder, parquet or tar file of images.")],
    head: Annotated[list[str] | None, typer.Option(help="A kept head, may be repeated; default: all.")] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="A probe that evaluate fitted, such as student/semantic; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where predictions.json and pictures go.", callback=_at_home)] = Path(
        "predictions"
    ),
    threshold: Annotated[float, typer.Option(help="Leave out objects of a lower score.", min=0, max=1)] = 0.5,
    max_pixels: Annotated[int, typer.Option(help="Leave out images of more.", min=1)] = 50_000_000,
    as_json: AsJson = False,
) -> None:
    """Run the heads that a student kept, or probes, on images."""
    from shoulders.prediction import predict

    told = predict(run, images, head or (), out, probes=probe or (), threshold=threshold, max_pixels=max_pixels)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    rows = [[image, name, brief(answer)] for image, heads in told.items() for name, answer in heads.items()]
    print_table(["image", "head", "answer"], rows)
    print(f"\npredictions.json and a picture for each image and head are in {out}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the run folder.", callback=_at_home)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run: scores, pictures and curves in one file."""
    from shoulders.report import write_report

    page = write_report(run, out=out)
    if as_json:
        print(json.dumps({"report": str(page)}, indent=1))
    else:
        print(f"{page}, {page.stat().st_size / 1e6:.1f} MB; open it in a browser")


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
        from shoulders.teachers import list_families

        rows = list_families()
    else:
        from shoulders.config.recipe import read_recipe

        checked = read_recipe(recipe, overrides or ())
        from shoulders.teachers import describe, load_teacher

        rows = [describe(name, load_teacher(name, spec)) for name, spec in checked.teachers.items()]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Where everything goes; what is there already is not run again.", callback=_at_home)
    ] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A minute's worth; the scores mean nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the whole idea in minutes: four tiny teachers, one student, four tasks, one page."""
    from shoulders.demo import KINDS, demo

    rows = demo(out, quick)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    values = {(row["task"], row["kind"]): row for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    print("in %, on scenes that nobody has seen; no label was shown to the student")
    print_table(
        ["task", *KINDS.values()],
        [
            [
                f"{task} ({values[task, 'teacher']['metric']})",
                *(f"{100 * values[task, kind]['value']:.1f}" for kind in KINDS),
            ]
            for task in tasks
        ],
    )
    print(f"\nthe page: {out / 'report.html'}")


@app.command()
def world(
    folder: Annotated[Path, typer.Argument(help="Where to write; one folder for each style.", callback=_at_home)],
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
    print_table(["style", "folder", ""], rows)
    print("\nin each: classification/ (class folders), instances/ (COCO JSON), semantic/ (index masks)")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command, and turn errors into one line on stderr and an exit code.

    Args:
        args: command and its arguments; default: those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    main_rank = os.environ.get("RANK", "0") == "0"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    warnings.formatwarning = lambda message, *where: f"shoulders: {message}\n"  # a line, as of errors
    try:
        with nullcontext() if main_rank else redirect_stdout(None):  # of several processes one tells the outcome
            app(args)
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
            print(f"shoulders: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
            sys.exit(DataError.exit_code)
        print(
            f"shoulders: {error.filename or 'the disk'}: no space left; make room and start it again",
            file=sys.stderr,
        )
        sys.exit(SpaceError.exit_code)
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGINT:
            print("shoulders: stopped; start it again: what is finished is kept", file=sys.stderr)
        raise


# what torch says when something is gone -> exit code, and what to do
LOST = {
    "DataLoader worker": (70, "a worker was lost, perhaps for want of memory: lower images.workers"),
    "out of memory": (5, "raise train.accumulate, or lower train.batch"),
    "can't allocate memory": (5, "raise train.accumulate, or lower train.batch"),
}


def _sides(size: str | None) -> tuple[int, int] | None:
    """(h, w) of ``96`` or ``96,128``."""
    if size is None:
        return None
    sides = size.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise RecipeError(f"--size: {size!r} is neither N nor H,W in px, such as 224 or 96,128")
    return int(sides[0]), int(sides[-1])
