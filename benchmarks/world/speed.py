"""Scenes per second of one core, by style: drawn alone, and drawn and written with all labels.

    OMP_NUM_THREADS=1 python benchmarks/world/speed.py

Writes speed.json beside this file. The yardstick is decoding in the same process: JPEGs of 500 x 400 px by Pillow,
round by round.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from shoulders.world import STYLES, draw, write_world

ROUNDS, SCENES = 3, 200


def rate(work: Callable[[], object], count: int) -> float:
    """How many per second."""
    begun = time.perf_counter()
    work()
    return count / (time.perf_counter() - begun)


def decode(encoded: bytes) -> None:
    for _ in range(SCENES):
        Image.open(io.BytesIO(encoded)).convert("RGB").load()


def write(style: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_world(folder, [style], {"train": SCENES})


def main() -> None:
    file = io.BytesIO()
    Image.fromarray(draw("paper", 0, 0, 512).image).crop((0, 0, 500, 400)).save(file, "JPEG", quality=90)
    told: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        told.setdefault("decode a JPEG of 500 x 400 px", []).append(rate(lambda: decode(file.getvalue()), SCENES))
        for style in STYLES:
            drawn = rate(lambda style=style: [draw(style, 9, index) for index in range(SCENES)], SCENES)  # type: ignore[misc]
            told.setdefault(f"draw {style}", []).append(drawn)
            told.setdefault(f"draw and write {style}", []).append(rate(lambda style=style: write(style), SCENES))  # type: ignore[misc]
    rows = [
        {
            "what": what,
            "per_s": round(statistics.median(each), 1),
            "least": round(min(each), 1),
            "most": round(max(each), 1),
        }
        for what, each in told.items()
    ]
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
