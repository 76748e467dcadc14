"""The list of images that could not be used, and when there are too many of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from shoulders.errors import DataError
from shoulders.features import Skipped


class SkipReport:
    """A JSON-lines file with one line per unusable image, counted once however often it comes up.

    Args:
        path: of the list; one that exists is continued, so that a resumed run does not count twice.
        total: images that training draws from.
        max_unreadable: fraction of them that is put up with.
        write: whether this process is the one of several that writes the list; all of them count.
    """

    def __init__(self, path: Path, total: int, max_unreadable: float, write: bool = True) -> None:
        self.path, self.total, self.max_unreadable, self.write = path, total, max_unreadable, write
        self.reasons: dict[str, str] = {}
        if path.exists():
            self._continue()

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Append what is new to the list.

        Raises:
            DataError: more than ``max_unreadable * total`` images are bad.
        """
        new = {image.name: image.reason for image in skipped if image.name not in self.reasons}
        if not new:
            return
        self.reasons.update(new)
        if self.write:
            lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in new.items()]
            with self.path.open("a", encoding="ascii") as file:
                file.writelines(lines)
        if len(self.reasons) > self.max_unreadable * self.total:
            raise DataError(self._explain())

    def counts(self) -> list[tuple[str, int]]:
        """How many images there are of each kind of reason, the most frequent first."""
        kinds = Counter(reason.partition(":")[0] for reason in self.reasons.values())
        return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))

    def _continue(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content) and self.write:  # the run was killed while writing the last line
            os.truncate(self.path, len(whole))
        try:
            for line in whole.splitlines():
                image = json.loads(line)
                self.reasons[image["name"]] = image["reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: not a list of skipped images; move it out of the way") from error

    def _explain(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts()[:10])
        needed = min(1.0, len(self.reasons) / max(self.total, 1) * 2)
        return (
            f"{len(self.reasons)} of {self.total} images cannot be used ({kinds}), more than "
            f"images.max_unreadable={self.max_unreadable:g} allows; they are listed in {self.path}: repair them, "
            f"or go on with images.max_unreadable={needed:.2g}"
        )
