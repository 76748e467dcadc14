"""The sections that show how a run went: losses and fvu over the steps, and the balance of the teachers."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.report.charts import SMALL, Series, line_chart
from shoulders.report.gather import BASE, Points, Told
from shoulders.report.markup import Html, element, figure, missing, paragraph, section

COLOURS = 8  # that the style sheet has for teachers


def classes(told: Told) -> dict[str, str]:
    """The class that gives each teacher its colour and dash; the base has its own."""
    return {name: f"t{number % COLOURS + 1}" for number, name in enumerate(told.teachers)} | {BASE: "base"}


def learning(told: Told) -> Html:
    """Loss and fvu of each teacher over the steps."""
    losses, small = _losses(told), _each(told)
    if not losses and not small:
        command = f"shoulders distill {told.folder / 'recipe.yaml'}"
        return section("learning", "Learning", missing("This run keeps no metrics.jsonl; it is written by", command))
    said = paragraph(
        "fvu is the fraction of a teacher’s variance that the student does not hold, on held-out images: at 0 it holds "
        "everything, at 1 it knows no more than the mean. ",
        element("b", "Projector"),
        " is what the student’s own projector says of the teacher’s features; ",
        element("b", "latent"),
        " what a fresh linear map reads from the student’s last layer alone.",
    )
    parts = [element("div", *losses, class_="grid two")] if losses else []
    parts += [said, element("div", *small, class_="grid three")] if small else []
    return section("learning", "Learning", *parts)


def _losses(told: Told) -> list[Html]:
    train, colour = told.curves("train"), classes(told)
    terms: dict[str, list[Points]] = {}
    for name, points in train.items():
        if name.startswith("s2t/"):
            terms.setdefault(name.split("/")[1], []).append(points)
    shown = []
    if "loss" in train:
        chart = line_chart([Series("loss", train["loss"], "student")], "Training loss", low=0)
        shown.append(figure(chart, "Training loss", "all terms together"))
    if terms:
        series = [Series(name, _mean(curves), colour.get(name, BASE)) for name, curves in terms.items()]
        shown.append(
            figure(line_chart(series, "Loss by teacher", low=0), "Loss by teacher", "distance to its features")
        )
    return shown


def _each(told: Told) -> list[Html]:
    """A small chart for each teacher, of its fvu by the latent and by the projector."""
    held, colour = told.curves("evaluation"), classes(told)
    shown = []
    for name in [*told.teachers, BASE]:
        projectors = [points for key, points in held.items() if key.startswith(f"fvu_projector/{name}/")]
        curves = {"latent": held.get(f"fvu/{name}", []), "projector": _mean(projectors)}
        series = [Series(which, points, f"{colour[name]} {which}") for which, points in curves.items() if points]
        if series:
            chart = line_chart(series, f"fvu of {name} over the steps", SMALL, low=0, high=1, top=1)
            shown.append(figure(chart, name, "to be kept" if name == BASE else ""))
    return shown


def balance(told: Told) -> Html:
    """The teachers against each other over the steps."""
    held, colour = told.curves("evaluation"), classes(told)
    series = [Series(n, held[f"fvu/{n}"], colour[n]) for n in [*told.teachers, BASE] if f"fvu/{n}" in held]
    if not series:
        command = f"shoulders distill {told.folder / 'recipe.yaml'}"
        return section(
            "balance", "Balance", missing("Nothing was measured on held-out images; that is done by", command)
        )
    chart = line_chart(series, "fvu of all teachers", low=0)
    shown = [figure(chart, "All teachers", "fvu of the latent; lower is better")]
    if "fvu_spread" in held:
        chart = line_chart([Series("spread", held["fvu_spread"], "student")], "Spread of fvu", low=1)
        shown.append(figure(chart, "Spread", "highest fvu over lowest; 1 is balanced"))
    said = paragraph(_how_balanced(told))
    return section("balance", "Balance", said, element("div", *shown, class_="grid two"))


def _how_balanced(told: Told) -> str:
    """What the run does about imbalanced transfer."""
    plain = "A plain distillation loss favours the teachers with large or simple features and starves the others."
    if (told.tree.get("transfer") or {}).get("standardize") == "none":
        return f"{plain} This run does not standardize its teachers: the distance between these curves is the price."
    return f"{plain} Here each is standardized first; what imbalance is left is how far these curves lie apart."


def _mean(curves: Sequence[Points]) -> Points:
    """The mean of curves at each step."""
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in by_step.items()]
