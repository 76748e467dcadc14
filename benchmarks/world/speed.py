"""Scenes per second of one core, by style: drawn alone, and drawn and written with all labels.

    OMP_NUM_THREADS=1 python benchmarks/world/speed.py

Writes speed.json in this folder. For comparison, each round also decodes JPEGs of 500 x 400 px by Pillow in the same
process.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from shoulders.world import STYLES, draw, write_world

ROUNDS, SCENES = 3, 200


def rate(work: Callable[[], object], count: int) -> float:
    """Items per second of a function that processes ``count`` items."""
    started_at = time.perf_counter()
    work()
    return count / (time.perf_counter() - started_at)


def decode(encoded: bytes) -> None:
    for _ in range(SCENES):
        Image.open(io.BytesIO(encoded)).convert("RGB").load()


def draw_scenes(style: str) -> None:
    for index in range(SCENES):
        draw(style, 9, index)


def write(style: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_world(folder, [style], {"train": SCENES})


def main() -> None:
    file = io.BytesIO()
    Image.fromarray(draw("paper", 0, 0, 512).image).crop((0, 0, 500, 400)).save(file, "JPEG", quality=90)
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        rates.setdefault("decode a JPEG of 500 x 400 px", []).append(rate(partial(decode, file.getvalue()), SCENES))
        for style in STYLES:
            rates.setdefault(f"draw {style}", []).append(rate(partial(draw_scenes, style), SCENES))
            rates.setdefault(f"draw and write {style}", []).append(rate(partial(write, style), SCENES))
    rows = [
        {
            "operation": operation,
            "per_s": round(statistics.median(each), 1),
            "min": round(min(each), 1),
            "max": round(max(each), 1),
        }
        for operation, each in rates.items()
    ]
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
