"""``shoulders distill``: train a student."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoulders.cli.options import AsJson, Overrides, RecipeFile, print_json
from shoulders.cli.tables import cell, print_table

FVU_ABOVE_1 = (
    "an fvu above 1 is worse than the mean of the teacher's features: the map from the latent overfits to the first "
    "half of the held-out images (raise images.holdout), or the projector is hardly trained (raise train.steps)"
)


def distill(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the latest valid checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil the teachers of a recipe into one student."""
    from shoulders.config.recipe import read_recipe

    checked = read_recipe(recipe, overrides or ())
    from shoulders.distillation import distill

    summary = distill(checked, resume=resume)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)


def _print_summary(summary: dict[str, Any]) -> None:
    """Print the fvu of each component of each tap, and where the student is."""
    fvu = {key.removeprefix("fvu/"): value for key, value in summary.items() if key.startswith("fvu/")}
    print(f"fraction of variance unexplained (fvu) on {summary['heldout']} held-out images; 0 is perfect, 1 the mean")
    print_table(
        ["teacher / tap / component", "fvu", "fvu of the projector"],
        [[name, f"{value:.3f}", cell(summary.get(f"fvu_projector/{name}"))] for name, value in fvu.items()],
    )
    if any(value > 1 for key, value in summary.items() if key.startswith("fvu") and key != "fvu_spread"):
        print(FVU_ABOVE_1)
    print(f"\n{summary['steps']} steps in {summary['seconds']:.0f} s; the student is in {summary['out']}/student")
