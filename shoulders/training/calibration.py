"""Fit the student's standardizers on the teacher features of the first images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from shoulders.errors import DataError, NumericError
from shoulders.features import Features
from shoulders.model import ShouldersModel
from shoulders.transfer.projectors import teacher_name
from shoulders.transfer.standardize import Moments

MIN_IMAGES = 4  # of a statistic


def fit_standardizers(student: ShouldersModel, features: Iterable[Mapping[str, Features]], images: int) -> None:
    """Fit every standardizer of a student.

    Args:
        features: {tap: Features} of one batch after another.
        images: in all batches together, for messages.

    Raises:
        DataError: a teacher has features of too few images.
        NumericError: features are not finite.
    """
    moments: dict[str, dict[str, Moments]] = {}
    counts: Counter[str] = Counter()  # images by tap
    for by_tap in features:
        for tap, one in by_tap.items():
            counts[tap] += one.batch_size
            for component, x in one.components().items():
                moments.setdefault(tap, {}).setdefault(component, Moments(x.shape[-1])).update(x)
    for tap in student.taps:
        if counts[tap] < MIN_IMAGES:
            raise DataError(
                f"teachers.{teacher_name(tap)}.sources: only {counts[tap]} of the {images} images for calibration come "
                "from these sources; raise transfer.calibration_images, or the share of these sources"
            )
        if not all(one.mean.isfinite().all() for one in moments[tap].values()):
            raise NumericError(f"{tap}: the teacher's features are not finite; check its weights and its input size")
        student.standardizer(tap).fit(moments[tap])
