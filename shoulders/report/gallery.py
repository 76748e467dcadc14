"""The sections that show pictures."""

from __future__ import annotations

from shoulders.report.figures import Figures, Pair, Said, Strip
from shoulders.report.gather import Told
from shoulders.report.markup import Html, element, figure, image, missing, paragraph, section
from shoulders.report.results import TASKS

DEPTH = "Depth"


def hero(figures: Figures) -> Html:
    """A prediction of each head, side by side: all tasks out of one encoder."""
    telling = [pair for pair in reversed(figures.pairs) if pair.student.found or pair.task is None]
    best = {pair.head: pair for pair in sorted(telling, key=lambda pair: pair.agreed)}
    chosen = sorted(best.values(), key=lambda pair: [*TASKS, pair.task].index(pair.task))[:4]
    shown = [
        element(
            "figure",
            image(pair.student.image),
            element("figcaption", element("strong", TASKS.get(str(pair.task), DEPTH)), _chips(pair.student, most=2)),
        )
        for pair in chosen
    ]
    said = paragraph(
        "What this one encoder sees, through its teachers’ own heads. Of the images below, for each head the one on "
        "which it is nearest to its teacher.",
        class_="quiet",
    )
    return element("div", element("div", *shown, class_="hero"), said) if len(shown) > 1 else Html()


def heads(told: Told, figures: Figures) -> Html:
    """What the kept heads say on their teachers' features and on the student's."""
    title = "Their heads, on the student"
    if figures.fault:
        return section("heads", title, _without_student(told, figures))
    if not figures.pairs:
        return section(
            "heads",
            title,
            *_notes(figures),
            missing(
                "This student keeps no heads that could be shown; name teachers in keep_heads: of the recipe and run",
                "shoulders distill",
            ),
        )
    said = paragraph(
        "Each head is the teacher’s own, cut off its encoder; on the right it runs on the student’s features instead, "
        "with no label and no training of the head. The images are chosen by a hash of their names, not by the answer."
    )
    by_head: dict[str, list[Pair]] = {}
    for pair in figures.pairs:
        by_head.setdefault(pair.head, []).append(pair)
    shown = []
    for head, pairs in by_head.items():
        sides = [element("div", *_sides(pair), class_="sides") for pair in pairs]
        name = TASKS.get(str(pairs[0].task), DEPTH)
        shown.append(figure(element("div", *sides, class_="grid two"), name, f"head of {head}", class_="head"))
    return section("heads", title, said, *shown, *_notes(figures))


def _sides(pair: Pair) -> list[Html]:
    """Teacher and student, side by side."""
    both = {"teacher": pair.teacher, "student": pair.student}
    return [
        element(
            "div", element("p", whose, class_="whose"), image(said.image), element("p", _chips(said), class_="chips")
        )
        for whose, said in both.items()
        if said is not None
    ]


def _chips(said: Said, most: int = 99) -> Html:
    """The labels that were found, each with its colour and scores."""
    if not said.found:
        return Html("" if "depth" in said.image.alt else element("span", "nothing found", class_="quiet"))
    chips = [
        element(
            "span",
            element("i", style=f"background:{colour}") if colour else "",
            label,
            " ",
            element("b", scores) if scores else "",
            class_="chip",
        )
        for label, colour, scores in said.found[:most]
    ]
    more = said.more + len(said.found[most:])
    return Html(" ".join([*chips, *([element("span", f"+{more}", class_="quiet")] if more else [])]))


def features(told: Told, figures: Figures) -> Html:
    """Principal components of the features of student, base and teachers."""
    title = "What each of them sees"
    if figures.fault:
        return section("features", title, _without_student(told, figures))
    if not figures.latent:
        return section(
            "features",
            title,
            *_notes(figures),
            missing(
                "Maps of features need the student and the images of the recipe; both are there after",
                f"shoulders distill {told.folder / 'recipe.yaml'}",
            ),
        )
    said = paragraph(
        "The first three principal components of the features of held-out images, as red, green and blue. Student and "
        "base share the student’s components. Then each teacher’s own features and, in the same colours, what the "
        "student says in its place, the teacher absent: the more alike, the more was inherited."
    )
    latent = figure(_strips(figures.latent), "latent", "the last layer", style="--n:3")
    whose = [
        figure(_strips([own, ours]), name, tap, style="--n:2") for name, (tap, own, ours) in figures.teachers.items()
    ]
    h, w = figures.shape
    maps = element("div", latent, *whose, class_="maps", style=f"--shape:{w}/{h}")
    return section("features", title, said, maps, *([] if figures.teachers else _notes(figures)))


def _strips(strips: list[Strip]) -> Html:
    """The same images as several models see them: a row for each on narrow screens, else a column."""
    return element(
        "div",
        *(
            element(
                "div",
                element("p", strip.name, class_="whose"),
                *(image(one, "photo" if strip.name == "image" else "map") for one in strip.images),
                class_="strip",
            )
            for strip in strips
        ),
        class_="strips",
    )


def _without_student(told: Told, figures: Figures) -> Html:
    return missing(f"{figures.fault} It is written by", f"shoulders distill {told.folder / 'recipe.yaml'} --resume")


def _notes(figures: Figures) -> list[Html]:
    return [paragraph(note, class_="missing") for note in figures.notes]
