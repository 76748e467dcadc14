"""Fit the student's standardizers on the teacher features of the first images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from shoulders.errors import DataError, NumericError
from shoulders.features import Features
from shoulders.model import ShouldersModel
from shoulders.training.masked import not_finite
from shoulders.transfer.projectors import teacher_name
from shoulders.transfer.standardize import Moments

MIN_IMAGES = 4  # of a statistic


def fit_standardizers(
    student: ShouldersModel,
    features: Iterable[Mapping[str, Features]],
    images: int,
    masked: Mapping[str, Collection[str]],
) -> None:
    """Fit every standardizer of a student.

    Args:
        features: {tap: Features} of one batch after another.
        images: in all batches together, for messages.
        masked: {teacher: images of which its features are not finite}, which is complete after the last batch.

    Raises:
        DataError: a teacher has features of too few images, because of its sources.
        NumericError: because they are not finite.
    """
    moments: dict[str, dict[str, Moments]] = {}
    counts: Counter[str] = Counter()  # images by tap
    for by_tap in features:
        for tap, one in by_tap.items():
            counts[tap] += one.batch_size
            for component, x in one.components().items():
                moments.setdefault(tap, {}).setdefault(component, Moments(x.shape[-1])).update(x)
    for tap in student.taps:
        bad = masked.get(teacher_name(tap), ())
        if counts[tap] < max(MIN_IMAGES, len(bad)):
            raise _too_few(teacher_name(tap), counts[tap], images, bad)
        student.standardizer(tap).fit(moments[tap])


def _too_few(teacher: str, count: int, images: int, masked: Collection[str]) -> DataError | NumericError:
    if masked:
        return not_finite(teacher, count, images, masked)
    return DataError(
        f"teachers.{teacher}.sources: only {count} of the {images} images for calibration come from these sources; "
        "raise transfer.calibration_images, or the share of these sources"
    )
