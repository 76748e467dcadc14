"""All pictures of a page. The student and its teachers run in this module, on a few images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image as Pillow
from torch import Tensor

from shoulders.config.section import as_size
from shoulders.config.sections import TeacherSpec
from shoulders.distributed.device import this_device
from shoulders.errors import ShouldersError
from shoulders.features import Features
from shoulders.images import central_view, render
from shoulders.images.pictures import pca_pictures
from shoulders.model import ShouldersModel, load
from shoulders.report.choose import GivenImages, ShownImages, choose_images
from shoulders.report.inline import jpeg, png
from shoulders.report.markup import Image
from shoulders.report.predictions import PredictionPair, predict_pairs
from shoulders.report.record import RunRecord
from shoulders.teachers import Teacher, load_teacher
from shoulders.teachers.heads import Head, load_head
from shoulders.teachers.heads.post_process import needs_prompts

THUMBNAIL_PX = 160  # longer side


@dataclass(frozen=True)
class PictureColumn:
    """Pictures of all images, for one model.

    Args:
        name: of the model, or "image" for the images themselves.
        pictures: one for each image.
    """

    name: str
    pictures: list[Image]


@dataclass(frozen=True)
class TapPictures:
    """Features of one tap of a teacher.

    Args:
        tap: name of the tap.
        teacher: the teacher's own features.
        student: the student's prediction of them.
    """

    tap: str
    teacher: PictureColumn
    student: PictureColumn


@dataclass
class Figures:
    """All pictures of a page, and what is missing.

    Attributes:
        latent: the images, and the latent with the adapter and without.
        teachers: {name: features of one of its taps}.
        pairs: predictions of the heads.
        notes: a sentence for each picture that is missing.
        shape: (h, w) of the images whose features are drawn, in proportion.
        fault: why the student could not be loaded; "" if it was loaded.
    """

    latent: list[PictureColumn] = field(default_factory=list)
    teachers: dict[str, TapPictures] = field(default_factory=dict)
    pairs: list[PredictionPair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shape: tuple[int, int] = (1, 1)
    fault: str = ""


def draw_figures(record: RunRecord, images: GivenImages) -> Figures:
    """Draw features and predictions of the student, its base and the available teachers, for a few images.

    One teacher is in memory at a time.

    Args:
        record: the run.
        images: see `choose_images`.
    """
    figures = Figures()
    if not record.student_config:
        return Figures(fault="This run has no student yet.")
    try:
        student = load(record.folder).to(this_device())
    except ShouldersError as error:
        return Figures(fault=f"The student could not be loaded: {error}.")
    shown = choose_images(record, _usable_heads(student, figures), images)
    figures.notes += shown.notes
    with torch.no_grad():
        predicted = _draw_latent(student, shown.features, figures) if shown.features else {}
        specs = record.recipe.teachers if record.recipe else {}
        for name in dict.fromkeys((*specs, *shown.predictions)):
            _draw_teacher(name, specs.get(name), student, predicted, shown, figures)
    return figures


def _usable_heads(student: ShouldersModel, figures: Figures) -> list[str]:
    """The kept heads that can be loaded and take nothing but an image."""
    usable = []
    for name in student.heads:
        try:
            if not needs_prompts(student.head(name)):
                usable.append(name)
        except ShouldersError as error:
            figures.notes.append(f"{error}.")
    return usable


def _draw_latent(student: ShouldersModel, images: list[Tensor], figures: Figures) -> dict[str, Features]:
    """Draw the latent with the adapter and without; return the student's predictions of all taps."""
    figures.shape = as_size(tuple(student.config.image_size))
    pixels = _batch(images, figures.shape, figures.shape).to(student.device)
    latent = student.encoder(pixels)["latent"]
    base = student.encoder.base_features(pixels)["latent"]
    photos = [Pillow.fromarray((image * 255).byte().permute(1, 2, 0).cpu().numpy()) for image in pixels]
    figures.latent = [
        PictureColumn("image", [jpeg(photo, f"held-out image {i}", THUMBNAIL_PX) for i, photo in enumerate(photos, 1)]),
        PictureColumn("student", _draw_features(latent, "student")),
        PictureColumn("base", _draw_features(base, "base", latent)),
    ]
    return student.predict_teacher_features(pixels)


def _batch(images: list[Tensor], size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The largest central box of each image in the proportions of ``shape``, as a batch (B, 3, h, w) in [0, 1].

    All models get the same box, whatever their input size.
    """
    views = [central_view((image.shape[1], image.shape[2]), shape) for image in images]
    return torch.stack([render(image, view, size) for image, view in zip(images, views, strict=True)]) / 255


def _draw_features(features: Features, name: str, like: Features | None = None) -> list[Image]:
    """Pictures of features with one px for each token; the page enlarges them."""
    h, w = features.grid
    pictures = pca_pictures(features.map(Tensor.float), (w, h), like)
    return [png(picture, f"features of the {name}, image {i}") for i, picture in enumerate(pictures, 1)]


def _draw_teacher(
    name: str,
    spec: TeacherSpec | None,
    student: ShouldersModel,
    predicted: Mapping[str, Features],
    shown: ShownImages,
    figures: Figures,
) -> None:
    """Draw the features of a teacher and the predictions of its head; only the latter if it has no ``spec``."""
    teacher: Teacher | None = None
    head: Head | None = None
    try:
        if spec is not None:
            teacher = load_teacher(name, spec).to(this_device())
            if shown.features:
                _draw_tap(name, teacher, predicted, shown.features, figures)
            if name in shown.predictions:
                head = load_head(name, spec, teacher).to(this_device())
    except (ShouldersError, OSError) as error:
        figures.notes.append(f"The teacher {name} could not be loaded ({' '.join(str(error).split())}).")
    try:
        figures.pairs += predict_pairs(name, student, teacher, head, shown.predictions.get(name, []))
    except ShouldersError as error:
        figures.notes.append(f"The head of {name} could not run ({error}).")


def _draw_tap(
    name: str, teacher: Teacher, predicted: Mapping[str, Features], images: list[Tensor], figures: Figures
) -> None:
    """Draw the features of one tap of a teacher and the student's prediction of them, in the same colours."""
    w, h = figures.latent[1].pictures[0].size  # the student's grid
    grids = {tap: tap_.grid for tap, tap_ in teacher.taps.items() if tap_.spatial and f"{name}/{tap}" in predicted}
    if not grids:
        figures.notes.append(f"{name} has no spatial features to draw.")
        return
    # the tap whose grid is nearest to that of the student: neither the easiest nor the hardest to predict
    tap = min(grids, key=lambda each: abs(math.log(math.prod(grids[each]) / (w * h))))
    own = teacher(_batch(images, teacher.size, figures.shape).to(teacher.mean.device))[tap]
    figures.teachers[name] = TapPictures(
        tap,
        PictureColumn("teacher", _draw_features(own, f"teacher {name}")),
        PictureColumn(
            "student", _draw_features(predicted[f"{name}/{tap}"], f"student in place of the teacher {name}", own)
        ),
    )
