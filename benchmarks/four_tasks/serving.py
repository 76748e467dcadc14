"""The cost of inference for four tasks: one encoder with all teacher heads against all teachers.

    OMP_NUM_THREADS=1 python benchmarks/four_tasks/serving.py [--only world|real|large] [--rounds 5]

Runs the students that run.py left in WORK and, for `large`, a student of teachers of the size of hub models, with
random weights (large.py); training does not change the cost. Both sides go from pixels in [0, 1], at the size that
each model takes, to the outputs of the heads: the student runs its encoder once, then all projectors and heads. The
post-processing after the heads is the same for both and measured separately. All sides take turns in one process,
round by round; peak memory is measured in a separate process for each. Writes serving.json and serving.md in this
folder, and the table in docs/four_tasks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from jobs import SETTINGS
from large import large_run
from row_file import Row, publish
from tables import DOC, insert, line_of
from torch import Tensor

from shoulders.config.recipe import read_recipe
from shoulders.config.section import as_size
from shoulders.distributed.device import this_device
from shoulders.inference import run_heads
from shoulders.model import ShouldersModel, load
from shoulders.storage.atomic import write_text
from shoulders.teachers import load_teacher
from shoulders.teachers.heads import load_head
from shoulders.teachers.heads.post_process import post_process

HERE = Path(__file__).resolve().parent
LARGE = "large"
NAMES = (*SETTINGS, LARGE)
BATCHES = (1, 8)
MIN_SECONDS = 1.0  # of a measurement

Forward = Callable[[int], object]  # runs the models on a batch of so many images


def build_teachers(run: Path) -> Forward:
    """All teachers of a run, each with its head."""
    device = this_device()
    specs = read_recipe(run / "recipe.yaml").teachers
    loaded = {name: load_teacher(name, spec).to(device) for name, spec in specs.items()}
    pairs = [(teacher, load_head(name, specs[name], teacher).to(device)) for name, teacher in loaded.items()]
    return torch.no_grad()(lambda count: [head(teacher(_pixels(count, teacher.size))) for teacher, head in pairs])


def build_student(run: Path) -> Forward:
    """The student of a run with all its heads."""
    student, size = _load_student(run)
    return lambda count: run_heads(student, list(student.heads), _pixels(count, size))[1]


def build_projectors(run: Path) -> Forward:
    """The student up to the input features of the heads."""
    student, size = _load_student(run)
    return torch.no_grad()(lambda count: student.predict_teacher_features(_pixels(count, size)))


def build_encoder(run: Path) -> Forward:
    """The encoder of the student."""
    student, size = _load_student(run)
    return torch.no_grad()(lambda count: student.forward_features(_pixels(count, size)))


def build_post_processing(run: Path) -> Forward:
    """The post-processing of the heads of the student: from their outputs to boxes, masks and classes."""
    student, size = _load_student(run)
    heads = list(student.heads)
    outputs = cache(lambda count: run_heads(student, heads, _pixels(count, size))[1])
    return lambda count: [post_process(student.head(name), outputs(count)[name], [size] * count) for name in heads]


TEACHERS, POST_PROCESSING = "all teachers with their heads", "post-processing"
SIDES: dict[str, Callable[[Path], Forward]] = {
    TEACHERS: build_teachers,
    "student with all heads": build_student,
    "student: encoder and projectors": build_projectors,
    "student: encoder": build_encoder,
    POST_PROCESSING: build_post_processing,
}


def _load_student(run: Path) -> tuple[ShouldersModel, tuple[int, int]]:
    student = load(run).to(this_device())
    return student, as_size(tuple(student.config.image_size))


@cache
def _pixels(count: int, size: tuple[int, int]) -> Tensor:
    """Noise (B, 3, h, w) in [0, 1], in which detectors find objects."""
    noise = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(this_device())


def measure(name: str, run: Path, rounds: int) -> list[Row]:
    """Rows of side, batch and round: images per second, and milliseconds of processor time per image."""
    forwards = {side: build(run) for side, build in SIDES.items()}
    rows = []
    for batch in BATCHES:
        repeats = {side: _repeats(partial(forward, batch)) for side, forward in forwards.items()}
        for number in range(rounds):
            for side, forward in forwards.items():
                clock, processor = time.perf_counter(), time.process_time()
                for _ in range(repeats[side]):
                    forward(batch)
                _synchronize()
                images = batch * repeats[side]
                seconds = time.perf_counter() - clock
                rows.append(
                    {
                        "dataset": name,
                        "side": side,
                        "batch": batch,
                        "round": number,
                        "images_per_s": images / seconds,
                        "cpu_ms": 1000 * (time.process_time() - processor) / images,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def _repeats(forward: Callable[[], object]) -> int:
    """The number of calls that take about `MIN_SECONDS`."""
    forward()
    _synchronize()
    started_at = time.perf_counter()
    forward()
    _synchronize()
    return max(1, round(MIN_SECONDS / (time.perf_counter() - started_at)))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_peaks(name: str, run: Path) -> list[Row]:
    """Rows of side and batch: the peak memory in MiB of a process that runs this side alone."""
    rows = []
    for side in SIDES:
        for batch in BATCHES:
            command = [sys.executable, str(HERE / "serving.py"), "--peak", side, str(run), str(batch)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  (this script)
            rows.append({"dataset": name, "side": side, "batch": batch} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


def print_peak(side: str, run: Path, batch: int) -> None:
    """Print the peak memory of this process, and its peak before any model was loaded."""
    before = _peak_mib()
    forward = SIDES[side](run)
    for _ in range(3):
        forward(batch)
    memory = {"peak_mib": _peak_mib(), "before_mib": before}
    if torch.cuda.is_available():
        memory["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(memory))


def _peak_mib() -> float:
    """The peak resident memory of this process so far, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(rows: Sequence[Row]) -> str:
    """A line for each setting, batch and side: median and range of the rounds, and the speed-up over the teachers."""
    titles = [
        "setting",
        "batch",
        "side",
        "images/s",
        "CPU ms per image",
        "speed-up over all teachers",
        "peak MiB",
        "of which models and activations",
    ]
    lines = [line_of(titles), "|---" * len(titles) + "|"]
    for setting in NAMES:
        for batch in BATCHES:
            of_batch = [row for row in rows if (row["dataset"], row["batch"]) == (setting, batch)]
            teachers_ms = [row["cpu_ms"] for row in of_batch if row["side"] == TEACHERS and "round" in row]
            for side in SIDES if teachers_ms else ():
                timed = [row for row in of_batch if row["side"] == side and "round" in row]
                memory = next(row for row in of_batch if row["side"] == side and "peak_mib" in row)
                ratios = [teacher_ms / row["cpu_ms"] for teacher_ms, row in zip(teachers_ms, timed, strict=True)]
                lines.append(
                    line_of(
                        [
                            setting,
                            str(batch),
                            side,
                            median_and_range([row["images_per_s"] for row in timed]),
                            median_and_range([row["cpu_ms"] for row in timed]),
                            "-" if side == POST_PROCESSING else f"{statistics.median(ratios):.2f}x",
                            f"{memory['peak_mib']:.0f}",
                            f"{memory['peak_mib'] - memory['before_mib']:.0f}",
                        ]
                    )
                )
    return "\n".join(lines) + "\n"


def median_and_range(values: Sequence[float]) -> str:
    """``12.3 (11.9 to 12.8)``: median, smallest and largest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/four_tasks"))
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0, help="of the student")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--peak", nargs=3, metavar=("SIDE", "RUN", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        side, run, batch = args.peak
        return print_peak(side, Path(run), int(batch))
    rows: list[Row] = []
    for name in [args.only] if args.only else NAMES:
        run = large_run(args.work) if name == LARGE else args.work / name / f"seed-{args.seed}"
        rows += measure(name, run, args.rounds) + measure_peaks(name, run)
    text = table(publish(rows, args.out / "serving.json"))
    write_text(args.out / "serving.md", text)
    insert("serving", text, args.doc)
    print(text)


if __name__ == "__main__":
    main()
