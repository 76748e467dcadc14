"""Sheets of pictures: predictions of a teacher and of its head on the student for labelled images, and the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import Job, Setting
from PIL import Image, ImageDraw, ImageFont
from tables import retention, short
from torch import Tensor

from shoulders.config.recipe import read_recipe
from shoulders.config.section import as_size
from shoulders.config.sections import TeacherSpec
from shoulders.distributed.device import this_device
from shoulders.images import MAX_PIXELS, WHOLE_IMAGE, render
from shoulders.images.pictures import draw_prediction
from shoulders.model import ShouldersModel, load
from shoulders.tasks import TASKS
from shoulders.tasks.data.labelled import LabelledSplits
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head
from shoulders.teachers.heads.post_process import post_process

NUM_IMAGES = 8  # in two blocks of four
SCORE_THRESHOLD = 0.5
CELL, SMALL_CELL = 256, 192  # px of the longer side of a picture; the second for images that are no larger
DOCS_WIDTH = 1400  # px of a sheet in the documentation
GAP, MARGIN, TITLE, HEADING, LEGEND = 6, 16, 44, 24, 30
WHITE, INK, QUIET, RIGHT, WRONG = (255, 255, 255), (30, 30, 30), (120, 120, 120), (0, 140, 110), (205, 70, 50)
# of the classes, by index; they differ more than those of `shoulders.images.pictures`, which depend on names alone
COLOURS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (247, 140, 205),
    (240, 210, 40),
    (160, 240, 60),
    (23, 190, 207),
    (0, 50, 110),
    (110, 110, 110),
)

Prediction = list[dict[str, Any]]
Colours = Mapping[str, tuple[int, int, int]]


def draw_sheets(
    setting: Setting, run: Path, labels: Path, rows: Sequence[dict[str, Any]], docs: Path | None = None
) -> None:
    """``side_by_side/DATASET.png`` in the run folder for each job; with ``docs`` also ``four-tasks-NAME.jpg`` in it.

    Args:
        rows: measurements for the title.
    """
    student, recipe = load(run).to(this_device()), read_recipe(setting.recipe)
    folder = run / "side_by_side"
    folder.mkdir(exist_ok=True)
    for job in setting.jobs:
        images, truths, classes = choose_images(job, labels)
        of_teacher = predict_with_teacher(job.teacher, recipe.teachers[job.teacher], images)
        of_student = predict_with_student(student, job.teacher, images)
        examples = list(zip(images, of_teacher, of_student, truths, strict=True))
        sheet = draw_sheet(job, title(job, rows), classes, examples)
        sheet.save(folder / f"{job.dataset.replace('/', '-')}.png")
        if docs is not None:
            name = f"four-tasks-{job.dataset.split('/')[-1]}.jpg"
            sheet.resize((DOCS_WIDTH, DOCS_WIDTH * sheet.height // sheet.width)).save(
                docs / name, quality=72, optimize=True
            )


def choose_images(job: Job, labels: Path) -> tuple[list[Tensor], list[Prediction], list[str]]:
    """Images (3, H, W) uint8 of val (or test, if there is no val), their labels as predictions, and the classes.

    For classification there is one image of each class; for other tasks the images are evenly spaced.
    """
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    split = splits.val or splits.test
    if isinstance(splits, LabelledSplits):
        members = [np.flatnonzero(split.labels() == number) for number in range(min(NUM_IMAGES, splits.n_classes))]
        chosen = [int(rows[len(rows) // 2]) for rows in members if len(rows)]
    else:
        chosen = np.linspace(0, len(split.indices) - 1, NUM_IMAGES + 2).round().astype(int)[1:-1].tolist()
    images = [split.images.pixels(int(split.indices[row]), MAX_PIXELS, None)[0] for row in chosen]
    classes = list(splits.classes)
    return images, [TASKS[job.task].labels_as_predictions(split, row, classes) for row in chosen], classes


@torch.no_grad()
def predict_with_teacher(name: str, spec: TeacherSpec, images: Sequence[Tensor]) -> list[Prediction]:
    """Predictions of the teacher, one image at a time, because images differ in size."""
    teacher = load_teacher(name, spec).to(this_device())
    head = load_head(name, spec, teacher).to(this_device())
    predictions: list[Prediction] = []
    for image in images:
        pixels = (render(image, WHOLE_IMAGE, teacher.size)[None] / 255).to(this_device())
        predictions += post_process(head, head(teacher(pixels)), [(image.shape[1], image.shape[2])], SCORE_THRESHOLD)
    return predictions


def predict_with_student(student: ShouldersModel, name: str, images: Sequence[Tensor]) -> list[Prediction]:
    """Predictions of the teacher head on the student."""
    size = as_size(tuple(student.config.image_size))
    predictions: list[Prediction] = []
    for image in images:
        pixels = (render(image, WHOLE_IMAGE, size)[None] / 255).to(student.device)
        predictions += student.predict(name, pixels, [(image.shape[1], image.shape[2])], SCORE_THRESHOLD)
    return predictions


def title(job: Job, rows: Sequence[dict[str, Any]]) -> str:
    """``bccd, detection: box AP .623 of the teacher, .410 of the teacher head on the student``, as far as measured."""
    metric = next(iter(job.metrics))
    measured = {
        kind: [row for row in rows if (row["dataset"], row["metric"], row["kind"]) == (job.dataset, metric, kind)]
        for kind in ("teacher", "teacher_head")
    }
    if retention(measured["teacher"], measured["teacher_head"]) is None:
        return f"{job.dataset}, {job.task}"
    teacher, student = (short(rows_of_kind[0]["value"]) for rows_of_kind in measured.values())
    prefix = f"{job.dataset}, {job.task}: {job.metrics[metric].title}"
    return f"{prefix} {teacher} of the teacher, {student} of the teacher head on the student"


def draw_sheet(
    job: Job,
    heading: str,
    classes: Sequence[str],
    examples: Sequence[tuple[Tensor, Prediction, Prediction, Prediction]],
) -> Image.Image:
    """Two blocks of lines of image, teacher, student and labels, with a title and a legend."""
    names = [name for name in classes if name != "background"]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    size = cell_size([image for image, *_ in examples])
    bars = not TASKS[job.task].needs_spatial
    columns = ("image", "teacher", "student", "labels")[: 3 if bars else 4]
    blocks = [examples[: len(examples) // 2], examples[len(examples) // 2 :]]
    width = len(columns) * (size[0] + GAP) - GAP
    height = TITLE + HEADING + max(map(len, blocks)) * (size[1] + GAP) + (LEGEND if len(names) > 1 and not bars else 0)
    paper = Image.new("RGB", (2 * width + 3 * MARGIN, height), WHITE)
    pen = ImageDraw.Draw(paper)
    pen.text((MARGIN, 12), heading, INK, ImageFont.load_default(size=19))
    for left, block in zip((MARGIN, width + 2 * MARGIN), blocks, strict=True):
        for column, name in enumerate(columns):
            x = left + column * (size[0] + GAP)
            pen.text((x, TITLE), name, QUIET, ImageFont.load_default(size=15))
            for line, (image, *predictions) in enumerate(block):
                prediction = predictions[column - 1] if column else None
                if bars and prediction:
                    cell = draw_scores(prediction, predictions[2], size)
                else:
                    cell = draw_cell(image, prediction, colours, size)
                paper.paste(cell, (x, TITLE + HEADING + line * (size[1] + GAP)))
    if not bars and len(names) > 1:
        draw_legend(pen, names, colours, height - LEGEND + 4)
    return paper


def cell_size(images: Sequence[Tensor]) -> tuple[int, int]:
    """(width, height) in px of a picture, in the median proportions of the images."""
    aspect = float(np.median([image.shape[2] / image.shape[1] for image in images]))
    side = CELL if max(images[0].shape) > SMALL_CELL else SMALL_CELL
    return (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)


def draw_cell(image: Tensor, prediction: Prediction | None, colours: Colours, size: tuple[int, int]) -> Image.Image:
    """An image of any shape in the middle of a cell, with a prediction; boxes and masks with their scores."""
    original = Image.fromarray(image.permute(1, 2, 0).numpy())
    if prediction and "mask" in prediction[0]:
        original = original.convert("L")  # so that all colours are those of classes
        if len(colours) == 1:
            prediction, colours = colour_objects(prediction)
    drawn = original.convert("RGB") if prediction is None else draw_prediction(original, prediction, colours)
    scale = min(size[0] / original.width, size[1] / original.height)
    small = drawn.resize((round(original.width * scale), round(original.height * scale)), Image.Resampling.LANCZOS)
    for item in reversed(prediction or ()):  # the highest score on top, like its box
        if item["score"] is not None and ("box" in item or "mask" in item) and item["score"] < 1:
            draw_score(small, item, colours[item["label"]], scale)
    paper = Image.new("RGB", size, (244, 244, 244))
    paper.paste(small, ((size[0] - small.width) // 2, (size[1] - small.height) // 2))
    return paper


def colour_objects(prediction: Prediction) -> tuple[Prediction, Colours]:
    """The same objects, each with its own label and colour."""
    named = [{**item, "label": str(number)} for number, item in enumerate(prediction)]
    return named, {item["label"]: COLOURS[number % len(COLOURS)] for number, item in enumerate(named)}


def draw_score(image: Image.Image, item: Mapping[str, Any], colour: tuple[int, int, int], scale: float) -> None:
    """Draw the score of an object, at the top left of its box or in the middle of its mask, in place."""
    pen, font, text = ImageDraw.Draw(image), ImageFont.load_default(size=11), short(item["score"])[:3]
    width = round(pen.textlength(text, font=font)) + 4
    if "box" in item:
        x, y = item["box"]["xmin"] * scale, item["box"]["ymin"] * scale
    else:
        rows, columns = torch.nonzero(item["mask"], as_tuple=True)
        if not len(rows):
            return
        x, y = columns.float().mean().item() * scale - width / 2, rows.float().mean().item() * scale - 6
    x, y = min(max(x, 0), image.width - width), min(max(y, 0), image.height - 13)
    pen.rectangle((x, y, x + width, y + 13), fill=colour)
    bright = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 140
    pen.text((x + 2, y), text, INK if bright else WHITE, font)


def draw_scores(prediction: Prediction, truth: Prediction, size: tuple[int, int]) -> Image.Image:
    """The three best classes with their scores as bars, the true class in green."""
    true = truth[0]["label"]
    paper = Image.new("RGB", size, (244, 244, 244))
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=14)
    for line, item in enumerate(prediction[:3]):
        y = size[1] // 2 - 66 + 46 * line
        colour = RIGHT if item["label"] == true else WRONG if line == 0 else QUIET
        pen.text((12, y), item["label"], INK if item["label"] == true else QUIET, font)
        value = f"{item['score']:.2f}"
        pen.text((size[0] - 12 - pen.textlength(value, font=font), y), value, INK, font)
        pen.rectangle((12, y + 22, 12 + max(2, (size[0] - 24) * item["score"]), y + 30), fill=colour)
    return paper


def draw_legend(pen: ImageDraw.ImageDraw, names: Sequence[str], colours: Colours, y: int) -> None:
    """Draw the colours of the classes, in one line."""
    font, x = ImageFont.load_default(size=15), MARGIN
    for name in names:
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=colours[name])
        pen.text((x + 20, y), name, INK, font)
        x += 44 + round(pen.textlength(name, font=font))
