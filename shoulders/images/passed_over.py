"""Files of a source that are not used as images, counted for one line of warning."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

# text that describes images, beside them in many data sets; it is not worth a warning
COMPANIONS = (".cls", ".csv", ".html", ".json", ".jsonl", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")
MAX_KINDS = 8  # in the line
MAX_NAMES = 3  # of each kind that is named
MAX_EXTENSION = 12  # characters; what is longer is no extension


class PassedOver:
    """Counts of files by kind: their extension, or what else they are.

    Attributes:
        counts: files by kind.
        names: the first few of each kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[bytes]] = {}

    def add(self, name: bytes) -> None:
        """Count a file by its extension, unless it is one of `COMPANIONS` or hidden."""
        last = name.rpartition(b"/")[2]
        extension = os.fsdecode(last[last.rfind(b".") :].lower()) if b"." in last else ""
        if last.startswith(b".") or extension in COMPANIONS:
            return
        kind = repr(extension)[1:-1] if 0 < len(extension) <= MAX_EXTENSION else "without an extension"
        self._count(kind, name)

    def add_named(self, kind: str, names: Sequence[bytes]) -> None:
        """Count files or folders of another kind."""
        for name in names:
            self._count(kind, name)

    def _count(self, kind: str, name: bytes) -> None:
        self.counts[kind] += 1
        named = self.names.setdefault(kind, [])
        if len(named) < MAX_NAMES:
            named.append(name)

    def __len__(self) -> int:
        return self.counts.total()

    def describe(self) -> str:
        """Counts by kind with up to three names each, such as ``.heic: 4 ('a.heic', 'b.heic', 'c.heic', ..)``."""
        kinds = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_KINDS]
        parts = [f"{kind}: {count} ({list_names(self.names[kind], count)})" for kind, count in kinds]
        others = len(self.counts) - len(kinds)
        return ", ".join(parts) + (f", and {others} other kinds" if others else "")


def list_names(names: Sequence[bytes], total: int) -> str:
    """Up to three names, each quoted and escaped, with dots where there are more."""
    shown = [repr(os.fsdecode(name)) for name in names[:MAX_NAMES]]
    return ", ".join(shown) + (", .." if total > len(shown) else "")
