"""The sections with the curves of training: losses and fvu over the steps, and the balance of the teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoulders.report.charts import SMALL_SIZE, Series, line_chart
from shoulders.report.markup import Html, element, figure, missing, paragraph, section
from shoulders.report.record import BASE, Points, RunRecord

TEACHER_COLOURS = 8  # in the style sheet
MAX_FVU = 2.0  # of the axis: untrained projectors have values far above 1


def colour_classes(record: RunRecord) -> dict[str, str]:
    """{teacher or base: its class in the style sheet, for colour and dashes}."""
    return {name: f"t{number % TEACHER_COLOURS + 1}" for number, name in enumerate(record.teachers)} | {BASE: "base"}


def training_section(record: RunRecord) -> Html:
    """Loss and fvu of each teacher over the steps."""
    losses, fvus = _loss_charts(record), _fvu_charts(record)
    if not losses and not fvus:
        command = f"shoulders distill {record.folder / 'recipe.yaml'}"
        return section("training", "Training", missing("This run has no metrics.jsonl; it is written by", command))
    text = paragraph(
        "fvu is the fraction of the variance of a teacher’s features that the student does not explain, on held-out "
        "images: 0 is perfect, 1 is as good as predicting the mean, and above 1 is worse. ",
        element("b", "Projector"),
        " is the student’s own projector for this teacher; ",
        element("b", "latent"),
        " is a linear map fitted to the student’s last layer alone.",
        " An arrow marks the last value of a curve that ends above the axis." * any("↑" in chart for chart in fvus),
    )
    parts = [element("div", *losses, class_="grid two")] if losses else []
    parts += [text, element("div", *fvus, class_="grid three")] if fvus else []
    return section("training", "Training", *parts)


def _loss_charts(record: RunRecord) -> list[Html]:
    train, colours = record.curves("train"), colour_classes(record)
    by_teacher: dict[str, list[Points]] = {}
    for name, points in train.items():
        if name.startswith("s2t/"):
            by_teacher.setdefault(name.split("/")[1], []).append(points)
    charts = []
    if "loss" in train:
        chart = line_chart([Series("loss", train["loss"], "student")], "Training loss", low=0)
        charts.append(figure(chart, "Training loss", "sum of all terms"))
    if by_teacher:
        series = [Series(name, _mean(curves), colours.get(name, BASE)) for name, curves in by_teacher.items()]
        chart = line_chart(series, "Loss by teacher", low=0)
        charts.append(figure(chart, "Loss by teacher", "distance between prediction and features"))
    return charts


def _fvu_charts(record: RunRecord) -> list[Html]:
    """A small chart for each teacher, with fvu by the latent and by the projector."""
    evaluation, colours = record.curves("evaluation"), colour_classes(record)
    charts = []
    for name in [*record.teachers, BASE]:
        projector = [points for key, points in evaluation.items() if key.startswith(f"fvu_projector/{name}/")]
        curves = {"latent": evaluation.get(f"fvu/{name}", []), "projector": _mean(projector)}
        series = [Series(kind, points, f"{colours[name]} {kind}") for kind, points in curves.items() if points]
        if series:
            chart = line_chart(series, f"fvu of {name} over the steps", SMALL_SIZE, low=0, high=_fvu_axis(curves))
            charts.append(figure(chart, name, "preserved" if name == BASE else ""))
    return charts


def _fvu_axis(curves: Mapping[str, Points]) -> float:
    """The end of the axis: 1, or more where the last value of a curve is above 1."""
    last = [points[-1][1] for points in curves.values() if points]
    return max(1.0, *(value for value in last if value <= MAX_FVU), 0.0)


def balance_section(record: RunRecord) -> Html:
    """The fvu of all teachers in one chart, and their spread."""
    evaluation, colours = record.curves("evaluation"), colour_classes(record)
    names = [name for name in [*record.teachers, BASE] if f"fvu/{name}" in evaluation]
    if not names:
        command = f"shoulders distill {record.folder / 'recipe.yaml'}"
        return section("balance", "Balance", missing("This run has no held-out metrics; they are written by", command))
    series = [Series(name, evaluation[f"fvu/{name}"], colours[name]) for name in names]
    chart = line_chart(series, "fvu of all teachers", low=0)
    charts = [figure(chart, "All teachers", "fvu of the latent; lower is better")]
    if "fvu_spread" in evaluation:
        chart = line_chart([Series("spread", evaluation["fvu_spread"], "student")], "Spread of fvu", low=1)
        charts.append(figure(chart, "Spread", "highest fvu over lowest fvu; 1 is balanced"))
    text = paragraph(_balance_text(record))
    return section("balance", "Balance", text, element("div", *charts, class_="grid two"))


def _balance_text(record: RunRecord) -> str:
    problem = "A loss on raw features favours teachers with large or simple features, and the others are learned less."
    if record.section("transfer").get("standardize") == "none":
        return f"{problem} This run does not standardize features; the gaps between the curves show the imbalance."
    return (
        f"{problem} This run standardizes the features of each teacher first; the gaps between the curves show the "
        "imbalance that is left."
    )


def _mean(curves: Sequence[Points]) -> Points:
    """The mean of several curves at each step."""
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in by_step.items()]
