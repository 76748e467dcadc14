"""``shoulders evaluate``: scores on labelled data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shoulders.cli.options import AsJson, RunOrStudent, expand_home, print_json
from shoulders.cli.tables import print_table
from shoulders.errors import RecipeError

Rows = list[dict[str, Any]]


def evaluate(
    run: RunOrStudent,
    task: Annotated[str, typer.Option(help="One of {tasks}.")],
    data: Annotated[Path, typer.Option(help="Labelled images: class folders, index masks or COCO files.")],
    models: Annotated[
        str | None,
        typer.Option(
            help="Of student, base, teachers, names of teachers, concatenated (all teachers side by side), scratch; "
            "default: student,base,teachers."
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="The image column of parquet files.")] = "image",
    batch: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    workers: Annotated[int, typer.Option(help="Processes or threads that decode images.", min=0)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything that is fitted.", min=0)] = 0,
    heads: Annotated[
        bool, typer.Option("--heads", help="Evaluate the kept teacher heads instead of fitting a probe.")
    ] = False,
    classes: Annotated[
        Path | None,
        typer.Option(help="With --heads: a JSON file with the head's class for each class of the data."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Input size of student and base in px, N or H,W; default: that of training.")
    ] = None,
    finetune: Annotated[
        str | None, typer.Option(help="adapter: train it together with the fitted probe (student and base).")
    ] = None,
    scratch_steps: Annotated[
        int | None, typer.Option(help="Steps of scratch; default: the training FLOPs of the distillation.", min=1)
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="A larger head to fit: {probes}; default: linear, or a small dense one.")
    ] = None,
    max_unreadable: Annotated[
        float | None,
        typer.Option(help="Maximum fraction of unreadable images; default: the recipe's images.max_unreadable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the student, its base and its teachers on a task."""
    if classes and not heads:
        raise RecipeError("--classes: names the classes of kept heads; give --heads too")
    _check_heads(heads, {"--probe": probe, "--finetune": finetune, "--scratch-steps": scratch_steps})
    input_size = _parse_size(size)
    names = models.split(",") if models else None
    settings: dict[str, Any] = {"column": column, "batch": batch, "workers": workers, "size": input_size}
    settings |= {"on_model": _show_progress, "max_unreadable": max_unreadable}
    if heads:
        rows = _evaluate_heads(run, task, data, names, settings | {"classes": expand_home(classes)})
    else:
        settings |= {"seed": seed, "finetune": finetune, "probe": probe}
        rows = _evaluate_probes(run, task, data, names, scratch_steps, settings)
    if as_json:
        print_json(rows)
    else:
        print(f"{task}: scores in %, {_count_images(rows[0])}" + (f", {finetune} finetuned" if finetune else ""))
        print_table(*_score_table(rows))


def _evaluate_heads(run: Path, task: str, data: Path, names: list[str] | None, settings: dict[str, Any]) -> Rows:
    from shoulders.evaluation.models import MODELS
    from shoulders.evaluation.teacher_heads import evaluate_heads

    return evaluate_heads(run, task, data, names or MODELS, **settings)


def _evaluate_probes(
    run: Path, task: str, data: Path, names: list[str] | None, scratch_steps: int | None, settings: dict[str, Any]
) -> Rows:
    from shoulders.training.supervised_baseline import evaluate_with_baseline

    return evaluate_with_baseline(run, task, data, names, scratch_steps=scratch_steps, **settings)


def _check_heads(heads: bool, fit_options: dict[str, Any]) -> None:
    given = [option for option, value in fit_options.items() if value is not None]
    if heads and given:
        raise RecipeError(f"{', '.join(given)}: --heads fits nothing; leave out --heads or {', '.join(given)}")


def _show_progress(model: str) -> None:
    print(f"evaluating {model} ...", file=sys.stderr)


def _count_images(row: dict[str, Any]) -> str:
    """The test images of a score, and those that were skipped."""
    skipped = row["settings"].get("skipped_test", 0)
    if not skipped:
        return f"{row['n']} images"
    return f"{row['n']} of {row['n'] + skipped} images; skipped: {row['settings']['skipped_reasons']}"


def _score_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row per model, a column per metric. Scores of single classes are in the JSON output alone."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows if "/" not in row["metric"]))
    named = [(row["model"] + (f", head of {row['head']}" if "head" in row else ""), row) for row in rows]
    values = {(name, row["metric"]): f"{100 * row['value']:.1f}" for name, row in named}
    names = dict.fromkeys(name for name, _ in named)
    return ["model", *metrics], [[name, *(values.get((name, metric), "-") for metric in metrics)] for name in names]


def _parse_size(size: str | None) -> tuple[int, int] | None:
    """(h, w) of ``96`` or ``96,128``."""
    if size is None:
        return None
    sides = size.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise RecipeError(f"--size: {size!r} is neither N nor H,W in px, such as 224 or 96,128")
    return int(sides[0]), int(sides[-1])
