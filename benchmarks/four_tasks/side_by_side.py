"""Sheets of pictures: what a teacher and its head on the student say of the same labelled images, and what is true."""

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

from shoulders.config.recipe import TeacherSpec, as_size, read_recipe
from shoulders.distributed.device import this_device
from shoulders.images import View, render
from shoulders.images.pictures import draw_prediction
from shoulders.model import ShouldersModel, load
from shoulders.tasks import TASKS
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head
from shoulders.teachers.heads.post_process import post_process

SHOWN = 8  # images, in two blocks of four
THRESHOLD = 0.5
WHOLE = View(0.0, 0.0, 1.0, 1.0)
MAX_PIXELS = 50_000_000
CELL, SMALL_CELL = 256, 192  # px, the longer side of a picture; small ones are of images that are no larger
DOCS = 1400  # px, the width of a sheet in the documentation
GAP, MARGIN, TITLE, HEADING, LEGEND = 6, 16, 44, 24, 30
WHITE, INK, QUIET, RIGHT, WRONG = (255, 255, 255), (30, 30, 30), (120, 120, 120), (0, 140, 110), (205, 70, 50)
# of the classes in their order: further apart than those of `shoulders.images.pictures`, which knows no order
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

Answer = list[dict[str, Any]]
Colours = Mapping[str, tuple[int, int, int]]


def draw_sheets(
    setting: Setting, run: Path, labels: Path, rows: Sequence[dict[str, Any]], docs: Path | None = None
) -> None:
    """``side_by_side/DATASET.png`` in the run folder for each job; with `docs` also ``four-tasks-NAME.jpg`` there.

    Args:
        rows: what was measured, for the title.
    """
    student, recipe = load(run).to(this_device()), read_recipe(setting.recipe)
    folder = run / "side_by_side"
    folder.mkdir(exist_ok=True)
    for job in setting.jobs:
        images, truths, classes = shown(job, labels)
        theirs = ask_teacher(job.teacher, recipe.teachers[job.teacher], images)
        ours = ask_student(student, job.teacher, images)
        drawn = sheet(job, title(job, rows), classes, list(zip(images, theirs, ours, truths, strict=True)))
        drawn.save(folder / f"{job.dataset.replace('/', '-')}.png")
        if docs is not None:
            name = f"four-tasks-{job.dataset.split('/')[-1]}.jpg"
            drawn.resize((DOCS, DOCS * drawn.height // drawn.width)).save(docs / name, quality=72, optimize=True)


def shown(job: Job, labels: Path) -> tuple[list[Tensor], list[Answer], list[str]]:
    """Images (3, H, W) uint8 out of val (or test, where there is none), what is true of them, and the classes.

    They are spread evenly; where an image has a class, each is of another.
    """
    splits = TASKS[job.task].find_splits(labels / job.labels, "image")
    split = splits.val or splits.test
    if job.task == "classification":
        members = [np.flatnonzero(split.labels() == number) for number in range(min(SHOWN, splits.n_classes))]
        chosen = [int(rows[len(rows) // 2]) for rows in members if len(rows)]
    else:
        chosen = np.linspace(0, len(split.indices) - 1, SHOWN + 2).round().astype(int)[1:-1].tolist()
    images = [split.images.pixels(int(split.indices[row]), MAX_PIXELS, None)[0] for row in chosen]
    classes = [str(name) for name in (split.images.classes if job.task == "classification" else splits.classes)]
    return images, [TASKS[job.task].labels_as_predictions(split, row, classes) for row in chosen], classes


@torch.no_grad()
def ask_teacher(name: str, spec: TeacherSpec, images: Sequence[Tensor]) -> list[Answer]:
    """What the teacher says, one image at a time: they differ in size."""
    teacher = load_teacher(name, spec).to(this_device())
    head = load_head(name, spec, teacher).to(this_device())
    told = []
    for image in images:
        pixels = (render(image, WHOLE, teacher.size)[None] / 255).to(this_device())
        told += post_process(head, head(teacher(pixels)), [(image.shape[1], image.shape[2])], THRESHOLD)
    return told


def ask_student(student: ShouldersModel, name: str, images: Sequence[Tensor]) -> list[Answer]:
    """What the teacher's head says on the student."""
    size = as_size(tuple(student.config.image_size))
    told: list[Answer] = []
    for image in images:
        pixels = (render(image, WHOLE, size)[None] / 255).to(student.device)
        told += student.predict(name, pixels, [(image.shape[1], image.shape[2])], THRESHOLD)
    return told


def title(job: Job, rows: Sequence[dict[str, Any]]) -> str:
    """``bccd, detection: box AP .623 by the teacher, .410 by its head on the student``, as far as it was measured."""
    metric = next(iter(job.metrics))
    found = {
        kind: [row for row in rows if (row["dataset"], row["metric"], row["kind"]) == (job.dataset, metric, kind)]
        for kind in ("teacher", "teacher_head")
    }
    if retention(found["teacher"], found["teacher_head"]) is None:
        return f"{job.dataset}, {job.task}"
    theirs, ours = (short(found[kind][0]["value"]) for kind in found)
    what = f"{job.dataset}, {job.task}: {job.metrics[metric].title}"
    return f"{what} {theirs} by the teacher, {ours} by its head on the student"


def sheet(
    job: Job, heading: str, classes: Sequence[str], told: Sequence[tuple[Tensor, Answer, Answer, Answer]]
) -> Image.Image:
    """Two blocks of lines of image, teacher, student and truth, with a title and what the colours mean."""
    names = [name for name in classes if name != "background"]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    size = cell_size([image for image, *_ in told])
    bars = job.task == "classification"
    columns = ("image", "teacher", "student", "truth")[: 3 if bars else 4]
    blocks = [told[: len(told) // 2], told[len(told) // 2 :]]
    width = len(columns) * (size[0] + GAP) - GAP
    height = TITLE + HEADING + max(map(len, blocks)) * (size[1] + GAP) + (LEGEND if len(names) > 1 and not bars else 0)
    paper = Image.new("RGB", (2 * width + 3 * MARGIN, height), WHITE)
    pen = ImageDraw.Draw(paper)
    pen.text((MARGIN, 12), heading, INK, ImageFont.load_default(size=19))
    for left, block in zip((MARGIN, width + 2 * MARGIN), blocks, strict=True):
        for column, name in enumerate(columns):
            x = left + column * (size[0] + GAP)
            pen.text((x, TITLE), name, QUIET, ImageFont.load_default(size=15))
            for line, (image, *said) in enumerate(block):
                answer = said[column - 1] if column else None
                drawn = scores(answer, said[2], size) if bars and answer else cell(image, answer, colours, size)
                paper.paste(drawn, (x, TITLE + HEADING + line * (size[1] + GAP)))
    if not bars and len(names) > 1:
        legend(pen, names, colours, height - LEGEND + 4)
    return paper


def cell_size(images: Sequence[Tensor]) -> tuple[int, int]:
    """(width, height) in px that the shapes of most images fill."""
    aspect = float(np.median([image.shape[2] / image.shape[1] for image in images]))
    side = CELL if max(images[0].shape) > SMALL_CELL else SMALL_CELL
    return (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)


def cell(image: Tensor, answer: Answer | None, colours: Colours, size: tuple[int, int]) -> Image.Image:
    """An image of any shape in the middle of a cell, with what is said of it; boxes with their scores."""
    original = Image.fromarray(image.permute(1, 2, 0).numpy())
    if answer and "mask" in answer[0]:
        original = original.convert("L")  # the colours are those of the classes alone
        if len(colours) == 1:
            answer, colours = apart(answer)
    drawn = original.convert("RGB") if answer is None else draw_prediction(original, answer, colours)
    scale = min(size[0] / original.width, size[1] / original.height)
    small = drawn.resize((round(original.width * scale), round(original.height * scale)), Image.Resampling.LANCZOS)
    for one in reversed(answer or ()):  # the surest on top, as its box is
        if one["score"] is not None and ("box" in one or "mask" in one) and one["score"] < 1:
            tag(small, one, colours[one["label"]], scale)
    paper = Image.new("RGB", size, (244, 244, 244))
    paper.paste(small, ((size[0] - small.width) // 2, (size[1] - small.height) // 2))
    return paper


def apart(answer: Answer) -> tuple[Answer, Colours]:
    """Objects of one class told apart: each under a name and colour of its own."""
    named = [{**one, "label": str(number)} for number, one in enumerate(answer)]
    return named, {one["label"]: COLOURS[number % len(COLOURS)] for number, one in enumerate(named)}


def tag(image: Image.Image, one: Mapping[str, Any], colour: tuple[int, int, int], scale: float) -> None:
    """The score of an object, at the top left of its box or in the middle of its mask; in place."""
    pen, font, text = ImageDraw.Draw(image), ImageFont.load_default(size=11), short(one["score"])[:3]
    width = round(pen.textlength(text, font=font)) + 4
    if "box" in one:
        x, y = one["box"]["xmin"] * scale, one["box"]["ymin"] * scale
    else:
        rows, columns = torch.nonzero(one["mask"], as_tuple=True)
        if not len(rows):
            return
        x, y = columns.float().mean().item() * scale - width / 2, rows.float().mean().item() * scale - 6
    x, y = min(max(x, 0), image.width - width), min(max(y, 0), image.height - 13)
    pen.rectangle((x, y, x + width, y + 13), fill=colour)
    bright = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 140
    pen.text((x + 2, y), text, INK if bright else WHITE, font)


def scores(answer: Answer, truth: Answer, size: tuple[int, int]) -> Image.Image:
    """The three best classes with bars as long as their scores, the true one green."""
    true = truth[0]["label"]
    paper = Image.new("RGB", size, (244, 244, 244))
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=14)
    for line, one in enumerate(answer[:3]):
        y = size[1] // 2 - 66 + 46 * line
        colour = RIGHT if one["label"] == true else WRONG if line == 0 else QUIET
        pen.text((12, y), one["label"], INK if one["label"] == true else QUIET, font)
        value = f"{one['score']:.2f}"
        pen.text((size[0] - 12 - pen.textlength(value, font=font), y), value, INK, font)
        pen.rectangle((12, y + 22, 12 + max(2, (size[0] - 24) * one["score"]), y + 30), fill=colour)
    return paper


def legend(pen: ImageDraw.ImageDraw, names: Sequence[str], colours: Colours, y: int) -> None:
    """What the colours mean, in one line."""
    font, x = ImageFont.load_default(size=15), MARGIN
    for name in names:
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=colours[name])
        pen.text((x + 20, y), name, INK, font)
        x += 44 + round(pen.textlength(name, font=font))
