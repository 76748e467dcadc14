"""What student, base and teachers see in the same images, and what heads say of them: the models run here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from shoulders.config.recipe import TeacherSpec, as_size
from shoulders.distributed.device import this_device
from shoulders.errors import ShouldersError
from shoulders.features import Features
from shoulders.images import View, central_view, render
from shoulders.images.pictures import Colours, assign_colours, draw_prediction, pca_pictures
from shoulders.model import ShouldersModel, load
from shoulders.report.choose import Asked, Given, choose
from shoulders.report.gather import Told
from shoulders.report.inline import jpeg, png
from shoulders.report.markup import Image
from shoulders.teachers import Teacher, load_teacher
from shoulders.teachers.heads import Head, load_head
from shoulders.teachers.heads.post_process import needs_prompts, post_process, task_of

SIDE, TILE = 400, 160  # px of the longer side of a prediction, and of a small picture
WHOLE = View(0, 0, 1, 1)
THRESHOLD = 0.5
FOUND, SCORES = 5, 3  # labels that are written below a picture, and scores of each
CLASSES = 3  # of a classification


@dataclass(frozen=True)
class Strip:
    """The same images as one model sees them."""

    name: str
    images: list[Image]


@dataclass(frozen=True)
class Said:
    """An image with a head's answer drawn on it, and that answer.

    Args:
        found: (label, its colour as ``#rrggbb`` or "" where nothing is drawn, scores).
        more: labels that were found beside them.
    """

    image: Image
    found: list[tuple[str, str, str]]
    more: int = 0


@dataclass(frozen=True)
class Pair:
    """A head's answer to one image on its teacher's features (None where the teacher is not here) and the student's.

    Args:
        task: a name in `shoulders.tasks.TASKS`; None for another.
        agreed: the share of labels that both gave, from 0 to 1.
    """

    head: str
    task: str | None
    teacher: Said | None
    student: Said
    agreed: float


@dataclass
class Figures:
    """All pictures of a page, and what is missing from them, in a sentence each.

    Attributes:
        latent: the images, and the latent with and without the adapter.
        teachers: by name: the tap, its own features, and the student's account of them.
        shape: (h, w) of the images whose features are drawn, in proportion.
        fault: why the student cannot be asked; "" where it can.
    """

    latent: list[Strip] = field(default_factory=list)
    teachers: dict[str, tuple[str, Strip, Strip]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shape: tuple[int, int] = (1, 1)
    fault: str = ""


def draw_figures(told: Told, images: Given) -> Figures:
    """Ask the student, its base and the teachers that are here about a few images; one teacher is in memory at a time.

    Args:
        images: see `choose`.
    """
    figures = Figures()
    if not told.config:
        return Figures(fault="No student is here yet.")
    try:
        student = load(told.folder).to(this_device())
    except ShouldersError as error:
        return Figures(fault=f"The student cannot be asked: {error}.")
    asked = choose(told, _kept_heads(student, figures), images)
    figures.notes += asked.notes
    with torch.no_grad():
        seen = _draw_latent(student, asked.maps, figures) if asked.maps else {}
        specs = told.recipe.teachers if told.recipe else {}
        for name in dict.fromkeys((*specs, *asked.heads)):
            _draw_teacher(name, specs.get(name), student, seen, asked, figures)
    return figures


def _kept_heads(student: ShouldersModel, figures: Figures) -> list[str]:
    """The heads that need nothing but an image, of those that can be loaded."""
    found = []
    for name in student.heads:
        try:
            if not needs_prompts(student.head(name)):
                found.append(name)
        except ShouldersError as error:
            figures.notes.append(f"{error}.")
    return found


def _draw_latent(student: ShouldersModel, images: list[Tensor], figures: Figures) -> dict[str, Features]:
    """Draw the latent with and without the adapter; answers what the student says of each tap."""
    figures.shape = as_size(tuple(student.config.image_size))
    pixels = _batch(images, figures.shape, figures.shape).to(student.device)
    latent = student.encoder(pixels)["latent"]
    with student.encoder.adapters_disabled():
        base = student.encoder(pixels)["latent"]
    photos = [Pillow.fromarray((one * 255).byte().permute(1, 2, 0).cpu().numpy()) for one in pixels]
    figures.latent = [
        Strip("image", [jpeg(photo, f"held-out image {i}", TILE) for i, photo in enumerate(photos, 1)]),
        Strip("student", _maps(latent, "student")),
        Strip("base", _maps(base, "base", latent)),
    ]
    return student.predict_teacher_features(pixels)


def _batch(images: list[Tensor], size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) in [0, 1]: of each image the largest central box of this shape, whoever looks at it."""
    views = [central_view((one.shape[1], one.shape[2]), shape) for one in images]
    return torch.stack([render(one, view, size) for one, view in zip(images, views, strict=True)]) / 255


def _maps(features: Features, name: str, like: Features | None = None) -> list[Image]:
    """Pictures of features, one pixel a place: the page enlarges them."""
    h, w = features.grid
    pictures = pca_pictures(features.map(Tensor.float), (w, h), like)
    return [png(one, f"features of the {name}, image {i}") for i, one in enumerate(pictures, 1)]


def _draw_teacher(
    name: str,
    spec: TeacherSpec | None,
    student: ShouldersModel,
    seen: Mapping[str, Features],
    asked: Asked,
    figures: Figures,
) -> None:
    """What there is to show of a teacher, or of its head alone."""
    teacher: Teacher | None = None
    head: Head | None = None
    try:
        if spec is not None:
            teacher = load_teacher(name, spec).to(this_device())
            if asked.maps:
                _compare(name, teacher, seen, asked.maps, figures)
            if name in asked.heads:
                head = load_head(name, spec, teacher).to(this_device())
    except (ShouldersError, OSError) as error:
        figures.notes.append(f"The teacher {name} is not here, or not as it was ({' '.join(str(error).split())}).")
    try:
        figures.pairs += _pairs(name, student, teacher, head, asked.heads.get(name, []))
    except ShouldersError as error:
        figures.notes.append(f"The head of {name} cannot answer ({error}).")


def _compare(name: str, teacher: Teacher, seen: Mapping[str, Features], images: list[Tensor], figures: Figures) -> None:
    """Draw a teacher's features and the student's account of them in the same colours."""
    w, h = figures.latent[1].images[0].size  # of the student's grid
    grids = {tap: tap_.grid for tap, tap_ in teacher.taps.items() if tap_.spatial and f"{name}/{tap}" in seen}
    if not grids:
        figures.notes.append(f"{name} says nothing of places that the student could inherit.")
        return
    # the tap whose grid is nearest to the student's own: neither the easiest nor the hardest to inherit
    tap = min(grids, key=lambda one: abs(math.log(math.prod(grids[one]) / (w * h))))
    own = teacher(_batch(images, teacher.size, figures.shape).to(teacher.mean.device))[tap]
    ours = seen[f"{name}/{tap}"]
    figures.teachers[name] = (
        tap,
        Strip("teacher", _maps(own, f"teacher {name}")),
        Strip("student", _maps(ours, f"student in place of {name}", own)),
    )


def _pairs(
    name: str,
    student: ShouldersModel,
    teacher: Teacher | None,
    head: Head | None,
    images: Sequence[tuple[str, Tensor]],
) -> Iterator[Pair]:
    """A head's answers to images, on its teacher's features and on the student's."""
    size = as_size(tuple(student.config.image_size))
    for title, decoded in images:
        shown = Pillow.fromarray(decoded.permute(1, 2, 0).numpy())
        shown.thumbnail((SIDE, SIDE))
        sizes = [(shown.height, shown.width)]
        ours = student.predict(name, _pixels(decoded, size).to(student.device), sizes, THRESHOLD)[0]
        theirs = None
        if teacher is not None and head is not None:
            said = teacher(_pixels(decoded, teacher.size).to(teacher.mean.device))
            theirs = post_process(head, head(said), sizes, THRESHOLD)[0]
        labels = _labels(ours), _labels(theirs)
        both = labels[0] | labels[1]
        colours = assign_colours(list(both))
        yield Pair(
            name,
            task_of(student.head(name)),
            None if theirs is None else _said(shown, theirs, colours, f"{title}: the teacher with the head of {name}"),
            _said(shown, ours, colours, f"{title}: the student with the head of {name}"),
            (labels[0] & labels[1]).total() / max(both.total(), 1),
        )


def _pixels(decoded: Tensor, size: tuple[int, int]) -> Tensor:
    """A whole image (3, H, W) uint8 as one of a batch, (1, 3, h, w) in [0, 1]."""
    return render(decoded, WHOLE, size)[None] / 255


def _labels(answer: Any) -> Counter[str]:
    """How often each label occurs in an answer; of classes, the best one."""
    if not isinstance(answer, list):
        return Counter()
    return Counter(str(one["label"]) for one in (answer if _is_drawn(answer) else answer[:1]))


def _is_drawn(answer: list[dict[str, Any]]) -> bool:
    """Whether an answer says where things are."""
    return bool(answer) and not answer[0].keys().isdisjoint(("box", "mask"))


def _few(scores: Sequence[str]) -> str:
    """The first scores of a label, and how many more there are."""
    return " ".join([*scores[:SCORES], *([f"+{len(scores) - SCORES}"] if len(scores) > SCORES else [])])


def _said(image: Pillow.Image, answer: Any, colours: Colours, alt: str) -> Said:
    drawn = draw_prediction(image, answer, colours)
    if isinstance(answer, dict):
        return Said(jpeg(drawn, f"{alt}: depth", SIDE), [])
    is_drawn = _is_drawn(answer)
    scores: dict[str, list[str]] = {}
    for one in answer if is_drawn else answer[:CLASSES]:
        if one["label"] != "background":
            scores.setdefault(str(one["label"]), []).extend([] if one["score"] is None else [f"{one['score']:.2f}"])
    found = [
        (label, "#{:02x}{:02x}{:02x}".format(*colours[label]) if is_drawn else "", _few(each))
        for label, each in scores.items()
    ]
    words = ", ".join(f"{label} {each}".strip() for label, _, each in found) or "nothing found"
    return Said(jpeg(drawn, f"{alt}: {words}", SIDE), found[:FOUND], max(0, len(found) - FOUND))
