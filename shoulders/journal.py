"""What a run says while it runs: a progress bar, ``metrics.jsonl``, and TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from shoulders.checkpoint import write_text
from shoulders.errors import DataError
from shoulders.ranks import this_device
from shoulders.recipe import Train


def keep_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a ``results.json``: they replace those of the same measurement and leave all others."""

    def same(row: dict[str, Any]) -> tuple[Any, ...]:
        settings = row.get("settings", {})
        how = (settings.get("tune"), settings.get("head"))  # the probe
        return *how, *(row.get(key) for key in ("model", "head", "task", "data", "metric", "seed"))

    new = {same(row) for row in rows}
    with FileLock(path.with_name(f".{path.name}.lock")):  # two processes may measure at once
        before = read_rows(path)
        write_text(path, json.dumps([row for row in before if same(row) not in new] + rows, indent=1))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``results.json``; none where there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); move it out of the way, and measure again") from error
    return rows


def surroundings() -> dict[str, Any]:
    """What a process runs on: versions of what it is made of, device, CPUs and processes."""
    device = this_device(int(os.environ.get("LOCAL_RANK", "0")))
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {name: _version(name) for name in ("shoulders", "torch", "transformers")} | {
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({named})",
        "cpus": cpus,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def peak_memory() -> float:
    """The most memory that this process has held, in GiB: of its GPU where it has one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Journal:
    """Writes rows ``{"step": .., "kind": "run" | "train" | "evaluation", ..}``; silent except on the main rank.

    Args:
        out: the run folder.
        first_step: where this process starts; rows of later steps, left by a killed run, are dropped.
    """

    def __init__(self, out: Path, first_step: int, train: Train, is_main: bool):
        self.path = out / "metrics.jsonl"
        self.is_main = is_main
        often = 0.1 if sys.stderr.isatty() else 10  # s between two bars: a log file keeps them all
        self.bar = tqdm(
            total=train.steps,
            initial=first_step,
            disable=not is_main,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0.05,
            mininterval=often,
        )
        self.state: dict[str, str] = {}
        self.writer: Any = None
        self.images, self.since = 0, time.perf_counter()
        if is_main:
            self._keep_rows_up_to(first_step)
            if train.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else 0)
        self._write({"step": first_step, "kind": "run", **surroundings()})

    def advance(self, images: int) -> None:
        """One step is done, on this many images."""
        self.images += images
        self.bar.update()

    def train(self, step: int, terms: Mapping[str, float], lr: float, gradient_norm: float) -> None:
        """Log a training step: its loss, and the named terms of it but those that are not numbers."""
        now = time.perf_counter()
        speed = self.images / (now - self.since)
        self.images, self.since = 0, now
        row = {"images_per_s": speed, "peak_gib": peak_memory(), "lr": lr, "gradient_norm": gradient_norm}
        row |= {name: value for name, value in terms.items() if not math.isnan(value)}
        self._write({"step": step, "kind": "train"} | row)
        self._show(**{"img/s": f"{speed:.0f}", "loss": f"{terms['loss']:.3f}"})

    def evaluation(self, step: int, numbers: Mapping[str, float], per_teacher: Mapping[str, float]) -> None:
        """Log held-out measures; the bar shows fvu per teacher."""
        self._write({"step": step, "kind": "evaluation", **numbers})
        self._show(**{f"fvu {teacher}": f"{value:.3f}" for teacher, value in per_teacher.items()})
        self.since = time.perf_counter()  # images/s is of training alone
        self.images = 0

    def last_evaluation(self) -> dict[str, float]:
        """The newest held-out measures that are logged; {} where there are none."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines if math.isfinite(_step_of(line))]
        measured = [row for row in rows if row["kind"] == "evaluation"]
        return {name: value for name, value in measured[-1].items() if name.startswith("fvu")} if measured else {}

    def __enter__(self) -> Journal:
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
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def _keep_rows_up_to(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step] if step else []
        if len(kept) != len(lines):
            write_text(self.path, "".join(line + "\n" for line in kept))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the half line of a killed run
        return float("inf")
