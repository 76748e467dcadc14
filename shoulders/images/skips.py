"""The list of unreadable images of a run, and the limit that stops it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from shoulders.errors import DataError
from shoulders.features import Skipped
from shoulders.storage.json_lines import append_lines, read_lines

MAX_REASONS = 10  # in the error message


class SkipReport:
    """A JSON-lines file with one line per unreadable image; an image is counted once, however often it is skipped.

    Args:
        path: of the list. An existing list is continued, so that a resumed run does not count an image twice.
        total: number of images in the run.
        max_unreadable: maximum fraction of unreadable images.
        write: whether this process writes the list; of several ranks one writes and all count.

    Raises:
        DataError: the existing file is not such a list.
    """

    def __init__(self, path: Path, total: int, max_unreadable: float, write: bool = True) -> None:
        self.path, self.total, self.max_unreadable, self.write = path, total, max_unreadable, write
        # by name of the image
        self.reasons = {row["name"]: row["reason"] for row in read_lines(path, ("name", "reason"), truncate=write)}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Append the images that are not in the list yet.

        Raises:
            DataError: more than ``max_unreadable * total`` images are unreadable.
        """
        new = {image.name: image.reason for image in skipped if image.name not in self.reasons}
        if not new:
            return
        self.reasons.update(new)
        if self.write:
            append_lines(self.path, [{"name": name, "reason": reason} for name, reason in new.items()])
        if len(self.reasons) > self.max_unreadable * self.total:
            raise DataError(self._error_message())

    def counts(self) -> list[tuple[str, int]]:
        """Number of images per kind of reason, the most frequent kind first."""
        kinds = Counter(reason.partition(":")[0] for reason in self.reasons.values())
        return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))

    def _error_message(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts()[:MAX_REASONS])
        needed = min(1.0, len(self.reasons) / max(self.total, 1) * 2)
        return (
            f"{len(self.reasons)} of {self.total} images cannot be used ({kinds}), more than "
            f"images.max_unreadable={self.max_unreadable:g} allows; they are listed in {self.path}: repair them, "
            f"or continue with images.max_unreadable={needed:.2g}"
        )
