"""Images of which a teacher's features are not finite: it is masked for them, and they are listed up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shoulders.config.recipe import Recipe
from shoulders.distributed.context import DistContext
from shoulders.errors import NumericError
from shoulders.features import Batch, Features
from shoulders.images import Collection as ImageCollection
from shoulders.storage.json_lines import append_lines, read_lines
from shoulders.transfer.projectors import teacher_name

FILE = "not_finite.jsonl"
MAX_NAMES = 3  # of a teacher's images in a message


class Masked(NamedTuple):
    """A teacher, and the id of an image of which its features are not finite."""

    teacher: str
    image: int


def masked_images(features: Mapping[str, Features], batch: Batch, sources: Mapping[str, Sequence[int]]) -> list[Masked]:
    """The images of a batch of which a teacher has no features, although they come from its sources.

    Args:
        features: {tap: Features} of `shoulders.teachers.AnyTeachers`.
        batch: the images.
        sources: of `shoulders.teachers.AnyTeachers`.
    """
    masked = []
    for teacher, rows in {teacher_name(tap): one.rows for tap, one in features.items()}.items():
        if rows is None:
            continue
        given = batch.rows_of(sources.get(teacher))
        expected = range(len(batch)) if given is None else given.tolist()
        if len(rows) < len(expected):  # only then wait for the device
            masked += [Masked(teacher, int(batch.ids[row])) for row in sorted({*expected} - {*rows.tolist()})]
    return masked


class MaskReport:
    """A JSON-lines file with one line per teacher and masked image; an image is counted once for each teacher.

    Args:
        path: of the list.
        totals: {teacher: number of its images}.
        limit: maximum fraction of a teacher's images.
        name_of: the name of the image with an id.
        log: prints one line.
        write: whether this process writes the list; of several ranks one writes and all count.

    Attributes:
        names: {teacher: names of the images}.
    """

    def __init__(
        self,
        path: Path,
        totals: Mapping[str, int],
        limit: float,
        name_of: Callable[[int], str],
        log: Callable[[str], None],
        write: bool = True,
    ) -> None:
        self.path, self.totals, self.limit, self.name_of = path, totals, limit, name_of
        self.log, self.write = log, write
        self.names: dict[str, dict[str, None]] = {}

    def resume(self) -> None:
        """Continue an existing list, so that no image is counted twice.

        Raises:
            DataError: the file is not such a list.
        """
        for row in read_lines(self.path, ("teacher", "name"), truncate=self.write):
            self.names.setdefault(row["teacher"], {})[row["name"]] = None

    def restart(self) -> None:
        """Remove an existing list."""
        self.names.clear()
        if self.write:
            self.path.unlink(missing_ok=True)

    def add(self, masked: Iterable[Masked]) -> None:
        """Append the images that are not in the list yet; the first ones of a teacher are logged.

        Raises:
            NumericError: a teacher is masked for more than ``limit`` of its images.
        """
        named = dict.fromkeys((one.teacher, self.name_of(one.image)) for one in masked)
        new = [(teacher, name) for teacher, name in named if name not in self.names.get(teacher, {})]
        if not new:
            return
        known = set(self.names)
        for teacher, name in new:
            self.names.setdefault(teacher, {})[name] = None
        if self.write:
            append_lines(self.path, [{"teacher": teacher, "name": name} for teacher, name in new])
        for teacher, names in self.names.items():
            if len(names) > self.limit * self.totals[teacher]:
                raise NumericError(self._error_message(teacher))
            if teacher not in known:
                self.log(f"{self.describe(teacher)}; it is left out for these images, which are listed in {self.path}")

    def log_counts(self) -> None:
        """Print a line for each teacher that was masked for any image."""
        for teacher in self.names:
            self.log(self.describe(teacher))

    def describe(self, teacher: str) -> str:
        """How many images a teacher is masked for, and three of their names."""
        names = self.names[teacher]
        return (
            f"teachers.{teacher}: its features are not finite for {len(names)} of {self.totals[teacher]} images so far "
            f"({_shortened(names)})"
        )

    def _error_message(self, teacher: str) -> str:
        needed = min(1.0, len(self.names[teacher]) / self.totals[teacher] * 2)
        return (
            f"{self.describe(teacher)}, more than transfer.max_not_finite={self.limit:g} allows; check its weights, "
            f"input size and train.precision, or continue with transfer.max_not_finite={needed:.2g}"
        )


def check_finite(masked: Iterable[Masked], batch: Batch, name_of: Callable[[int], str]) -> None:
    """Refuse a teacher whose features are not finite for most images of a batch.

    Raises:
        NumericError: naming it.
    """
    names: dict[str, list[str]] = {}
    for teacher, image in masked:
        names.setdefault(teacher, []).append(name_of(image))
    for teacher, images in names.items():
        if 2 * len(images) > len(batch):
            raise not_finite(teacher, len(batch) - len(images), len(batch), images)


def not_finite(teacher: str, count: int, images: int, masked: Collection[str]) -> NumericError:
    """The refusal of a teacher with finite features of too few images.

    Args:
        teacher: its name.
        count: images with finite features.
        images: of all.
        masked: names of images without.
    """
    return NumericError(
        f"teachers.{teacher}: its features are finite for {count} of {images} images only (not for "
        f"{_shortened(masked)}); check its weights, its input size and train.precision"
    )


def mask_report(recipe: Recipe, taps: Iterable[str], images: ImageCollection, dist: DistContext) -> MaskReport:
    """The report of a run; nothing is read or written yet.

    Args:
        recipe: of the run.
        taps: of the student.
        images: of the run.
        dist: this process.
    """
    totals = count_images(map(teacher_name, taps), recipe.teacher_sources, images)
    limit = recipe.transfer.max_not_finite
    return MaskReport(recipe.out / FILE, totals, limit, images.name_of_id, dist.log, dist.is_main)


def count_images(names: Iterable[str], sources: Mapping[str, Sequence[str]], images: ImageCollection) -> dict[str, int]:
    """{teacher: number of images of its sources} for the teachers with these names."""
    return {
        name: len(images.indices_from(sources[name], images.ids)) if name in sources else len(images)
        for name in dict.fromkeys(names)
    }


def _shortened(names: Collection[str]) -> str:
    return ", ".join([*names][:MAX_NAMES]) + ", .." * (len(names) > MAX_NAMES)
