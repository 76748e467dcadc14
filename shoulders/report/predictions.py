"""Predictions of heads on a few images, with the features of their teachers and of the student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image as Pillow
from torch import Tensor

from shoulders.config.section import as_size
from shoulders.images import WHOLE_IMAGE, render
from shoulders.images.pictures import BACKGROUND, Colours, assign_colours, draw_prediction
from shoulders.model import ShouldersModel
from shoulders.report.inline import jpeg
from shoulders.report.markup import Image
from shoulders.tasks import task_of_head
from shoulders.teachers import Teacher
from shoulders.teachers.heads import Head
from shoulders.teachers.heads.post_process import post_process

PICTURE_PX = 400  # longer side
SCORE_THRESHOLD = 0.5  # objects with a lower score are not shown
MAX_CLASSES = 3  # of a classification
MAX_LABELS, MAX_SCORES = 5, 3  # labels below a picture, and scores of each label


@dataclass(frozen=True)
class PredictionPicture:
    """An image with a prediction drawn on it, and the labels of the prediction.

    Args:
        image: the picture.
        labels: (label, its colour as ``#rrggbb`` or "" if nothing is drawn, its scores as text).
        hidden_labels: number of labels that are not in ``labels``.
        is_depth: whether the prediction is a depth map, which has no labels.
    """

    image: Image
    labels: list[tuple[str, str, str]]
    hidden_labels: int = 0
    is_depth: bool = False


@dataclass(frozen=True)
class PredictionPair:
    """Predictions of one head for one image, with the features of its teacher and of the student.

    Args:
        head: name of the head.
        task: a name in `shoulders.tasks.TASKS`; None for another task.
        teacher: None if the teacher is not available.
        student: the prediction with the features of the student.
        agreement: fraction of the labels that both predictions have, from 0 to 1.
    """

    head: str
    task: str | None
    teacher: PredictionPicture | None
    student: PredictionPicture
    agreement: float


def predict_pairs(
    name: str,
    student: ShouldersModel,
    teacher: Teacher | None,
    head: Head | None,
    images: Sequence[tuple[str, Tensor]],
) -> Iterator[PredictionPair]:
    """Predictions of one head for several images.

    Args:
        name: of the head.
        student: the student, which keeps the head.
        teacher: the teacher of the head, and ``head`` its head; both None if it is not available.
        images: (name, pixels (3, H, W) uint8) of each.

    Raises:
        ShouldersError: the head cannot run.
    """
    size = as_size(tuple(student.config.image_size))
    for title, decoded in images:
        small = Pillow.fromarray(decoded.permute(1, 2, 0).numpy())
        small.thumbnail((PICTURE_PX, PICTURE_PX))
        sizes = [(small.height, small.width)]
        of_student = student.predict(name, _pixels(decoded, size).to(student.device), sizes, SCORE_THRESHOLD)[0]
        of_teacher = None
        if teacher is not None and head is not None:
            features = teacher(_pixels(decoded, teacher.size).to(teacher.mean.device))
            of_teacher = post_process(head, head(features), sizes, SCORE_THRESHOLD)[0]
        student_labels, teacher_labels = _count_labels(of_student), _count_labels(of_teacher)
        either = student_labels | teacher_labels
        colours = assign_colours(list(either))
        yield PredictionPair(
            name,
            task_of_head(student.head(name)),
            None
            if of_teacher is None
            else _draw(small, of_teacher, colours, f"{title}: the teacher with the head of {name}"),
            _draw(small, of_student, colours, f"{title}: the student with the head of {name}"),
            (student_labels & teacher_labels).total() / max(either.total(), 1),
        )


def _pixels(decoded: Tensor, size: tuple[int, int]) -> Tensor:
    """A whole image (3, H, W) uint8 as a batch of one, (1, 3, h, w) in [0, 1]."""
    return render(decoded, WHOLE_IMAGE, size)[None] / 255


def _count_labels(prediction: Any) -> Counter[str]:
    """The number of objects of each label; of a classification, the best label only."""
    if not isinstance(prediction, list):
        return Counter()
    return Counter(str(item["label"]) for item in (prediction if _is_drawn(prediction) else prediction[:1]))


def _is_drawn(prediction: list[dict[str, Any]]) -> bool:
    """Whether a prediction has boxes or masks."""
    return bool(prediction) and not prediction[0].keys().isdisjoint(("box", "mask"))


def _draw(image: Pillow.Image, prediction: Any, colours: Colours, alt: str) -> PredictionPicture:
    drawn = draw_prediction(image, prediction, colours)
    if isinstance(prediction, dict):
        return PredictionPicture(jpeg(drawn, f"{alt}: depth", PICTURE_PX), [], is_depth=True)
    is_drawn = _is_drawn(prediction)
    scores: dict[str, list[str]] = {}
    for item in prediction if is_drawn else prediction[:MAX_CLASSES]:
        if item["label"] != BACKGROUND:
            scores.setdefault(str(item["label"]), []).extend([] if item["score"] is None else [f"{item['score']:.2f}"])
    labels = [
        (label, "#{:02x}{:02x}{:02x}".format(*colours[label]) if is_drawn else "", _score_text(each))
        for label, each in scores.items()
    ]
    text = ", ".join(f"{label} {each}".strip() for label, _, each in labels) or "nothing found"
    hidden = max(0, len(labels) - MAX_LABELS)
    return PredictionPicture(jpeg(drawn, f"{alt}: {text}", PICTURE_PX), labels[:MAX_LABELS], hidden)


def _score_text(scores: Sequence[str]) -> str:
    """The first scores of a label, and the number of the others."""
    return " ".join([*scores[:MAX_SCORES], *([f"+{len(scores) - MAX_SCORES}"] if len(scores) > MAX_SCORES else [])])
