"""The log of a run: a progress bar, ``metrics.jsonl``, and TensorBoard on request."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shoulders.config.sections import Train
from shoulders.distributed.device import environment, peak_memory_gib
from shoulders.storage.atomic import append_text, write_text
from shoulders.storage.json_text import parse_json


class MetricLogger:
    """Writes rows ``{"step": .., "kind": "run" | "train" | "evaluation", ..}``; silent except on the main rank.

    Args:
        out: the run folder.
        first_step: where this process starts; rows of later steps, left by a killed run, are dropped.
    """

    def __init__(self, out: Path, first_step: int, train: Train, is_main: bool):
        self.path = out / "metrics.jsonl"
        self.is_main = is_main
        self.state: dict[str, str] = {}
        self.writer: Any = None
        self.images, self.since = 0, time.perf_counter()
        if is_main:
            self._keep_rows_up_to(first_step)
            if train.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else 0)
        self._write({"step": first_step, "kind": "run", **environment()})
        interval = 0.1 if sys.stderr.isatty() else 10  # s between two bars: a log file keeps them all
        self.bar = tqdm(
            total=train.steps,
            initial=first_step,
            disable=not is_main,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0.05,
            mininterval=interval,
        )

    def advance(self, images: int) -> None:
        """Count a finished step of so many images."""
        self.images += images
        self.bar.update()

    def train(self, step: int, terms: Mapping[str, float], lr: float, gradient_norm: float) -> None:
        """Log a training step: its loss and its terms, without those that are not finite."""
        now = time.perf_counter()
        speed = self.images / (now - self.since)
        self.images, self.since = 0, now
        row = {"images_per_s": speed, "peak_gib": peak_memory_gib(), "lr": lr, "gradient_norm": gradient_norm}
        row = {name: value for name, value in (row | dict(terms)).items() if math.isfinite(value)}
        self._write({"step": step, "kind": "train"} | row)
        self._show(**{"img/s": f"{speed:.0f}", "loss": f"{terms['loss']:.3f}"})

    def evaluation(self, step: int, numbers: Mapping[str, float], per_teacher: Mapping[str, float]) -> None:
        """Log held-out measures; the bar shows fvu per teacher."""
        self._write({"step": step, "kind": "evaluation", **numbers})
        self._show(**{f"fvu {teacher}": f"{value:.3f}" for teacher, value in per_teacher.items()})
        self.since = time.perf_counter()  # images/s is of training alone
        self.images = 0

    def last_evaluation(self) -> dict[str, float]:
        """The latest held-out measures in the log; {} where there are none."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [parse_json(line) for line in lines if math.isfinite(_step_of(line))]
        measured = [row for row in rows if row["kind"] == "evaluation"]
        return {name: value for name, value in measured[-1].items() if name.startswith("fvu")} if measured else {}

    def __enter__(self) -> MetricLogger:
        self.since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _show(self, **state: str) -> None:
        self.state |= state
        self.bar.set_postfix(self.state)

    def _write(self, row: dict[str, Any]) -> None:
        if not self.is_main:
            return
        append_text(self.path, json.dumps(row) + "\n")
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def _keep_rows_up_to(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step] if step else []
        if len(kept) != len(lines):
            write_text(self.path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return parse_json(line)["step"]
    except (ValueError, KeyError):  # an incomplete line of a killed run
        return float("inf")
