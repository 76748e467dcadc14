"""The sections with pictures: predictions and features."""

from __future__ import annotations

from shoulders.report.figures import Figures, PictureColumn
from shoulders.report.markup import Html, element, figure, image, missing, paragraph, section
from shoulders.report.predictions import PredictionPair, PredictionPicture
from shoulders.report.record import RunRecord
from shoulders.tasks import TASKS

DEPTH = "Depth"
MAX_HERO_PICTURES = 4
MAX_HERO_LABELS = 2  # below a picture


def hero(figures: Figures) -> Html:
    """One prediction of each head on the student, side by side; nothing if there are fewer than two."""
    pairs = [pair for pair in reversed(figures.pairs) if pair.student.labels or pair.student.is_depth]
    best = {pair.head: pair for pair in sorted(pairs, key=lambda pair: pair.agreement)}
    chosen = sorted(best.values(), key=lambda pair: [*TASKS, pair.task].index(pair.task))[:MAX_HERO_PICTURES]
    if len(chosen) < 2:
        return Html()
    pictures = [
        element(
            "figure",
            image(pair.student.image),
            element("figcaption", element("strong", _task_title(pair)), _labels(pair.student, MAX_HERO_LABELS)),
        )
        for pair in chosen
    ]
    caption = paragraph(
        "Predictions of the teachers’ heads on the student’s features: for each head, the one of its images below on "
        "which student and teacher agree most.",
        class_="quiet",
    )
    return element("div", element("div", *pictures, class_="hero"), caption)


def heads_section(record: RunRecord, figures: Figures) -> Html:
    """Predictions of the kept heads with the features of their teachers and of the student."""
    title = "Teacher heads on the student"
    if figures.fault:
        return section("heads", title, _without_student(record, figures))
    if not figures.pairs:
        no_heads = missing(
            "This student has no head that can be shown; name teachers under keep_heads: in the recipe and run",
            "shoulders distill",
        )
        return section("heads", title, *_notes(figures), no_heads)
    text = paragraph(
        "Each head is the head of a teacher, separated from its encoder. On the left it runs on the features of its "
        "teacher, on the right on those of the student: without labels, and without training of the head. The images "
        "are chosen by a hash of their names, not by the predictions."
    )
    by_head: dict[str, list[PredictionPair]] = {}
    for pair in figures.pairs:
        by_head.setdefault(pair.head, []).append(pair)
    shown = []
    for head, pairs in by_head.items():
        sides = [element("div", *_sides(pair), class_="sides") for pair in pairs]
        grid = element("div", *sides, class_="grid two")
        shown.append(figure(grid, _task_title(pairs[0]), f"head of {head}", class_="head"))
    return section("heads", title, text, *shown, *_notes(figures))


def _task_title(pair: PredictionPair) -> str:
    return TASKS[pair.task].title if pair.task in TASKS else DEPTH


def _sides(pair: PredictionPair) -> list[Html]:
    """The predictions of teacher and student, side by side."""
    sides = {"teacher": pair.teacher, "student": pair.student}
    return [
        element(
            "div",
            element("p", model, class_="model"),
            image(prediction.image),
            element("p", _labels(prediction), class_="labels"),
        )
        for model, prediction in sides.items()
        if prediction is not None
    ]


def _labels(prediction: PredictionPicture, most: int | None = None) -> Html:
    """The labels of a prediction with their colours and scores, at most so many."""
    if prediction.is_depth:
        return Html()
    if not prediction.labels:
        return element("span", "nothing found", class_="quiet")
    shown = [
        element(
            "span",
            element("i", style=f"background:{colour}") if colour else "",
            label,
            " ",
            element("b", scores) if scores else "",
            class_="label-chip",
        )
        for label, colour, scores in prediction.labels[:most]
    ]
    hidden = prediction.hidden_labels + len(prediction.labels) - len(shown)
    return Html(" ".join([*shown, *([element("span", f"+{hidden}", class_="quiet")] if hidden else [])]))


def features_section(record: RunRecord, figures: Figures) -> Html:
    """Principal components of the features of student, base and teachers."""
    title = "Features"
    if figures.fault:
        return section("features", title, _without_student(record, figures))
    if not figures.latent:
        no_features = missing(
            "Features can only be drawn with the student and the images of the recipe; both exist after",
            f"shoulders distill {record.folder / 'recipe.yaml'}",
        )
        return section("features", title, *_notes(figures), no_features)
    text = paragraph(
        "The first three principal components of the features of held-out images, as red, green and blue. Student and "
        "base are drawn with the components of the student. For each teacher, the student’s prediction of its features "
        "is beside them, drawn with the components of the teacher: the more similar the colours, the better the "
        "prediction."
    )
    latent = figure(_columns(figures.latent), "latent", "the last layer", style="--n:3")
    taps = [
        figure(_columns([pictures.teacher, pictures.student]), name, pictures.tap, style="--n:2")
        for name, pictures in figures.teachers.items()
    ]
    h, w = figures.shape
    maps = element("div", latent, *taps, class_="maps", style=f"--shape:{w}/{h}")
    return section("features", title, text, maps, *([] if figures.teachers else _notes(figures)))


def _columns(columns: list[PictureColumn]) -> Html:
    """The pictures of several models: a column for each, or a row on narrow screens."""
    return element(
        "div",
        *(
            element(
                "div",
                element("p", column.name, class_="model"),
                *(image(picture, "photo" if column.name == "image" else "map") for picture in column.pictures),
                class_="column",
            )
            for column in columns
        ),
        class_="columns",
    )


def _without_student(record: RunRecord, figures: Figures) -> Html:
    return missing(f"{figures.fault} It is written by", f"shoulders distill {record.folder / 'recipe.yaml'} --resume")


def _notes(figures: Figures) -> list[Html]:
    return [paragraph(note, class_="missing") for note in figures.notes]
