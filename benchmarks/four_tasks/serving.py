"""What it costs to answer four tasks: one encoder with all inherited heads, against all the teachers.

    OMP_NUM_THREADS=1 python benchmarks/four_tasks/serving.py [--only world|real|large] [--rounds 5]

Asks the students that run.py left in its --work, and for `large` one that is made here, of teachers as large as those
of a hub, with random weights (large.py); how long they were trained changes nothing here. Both sides go from pixels in
[0, 1], drawn at the size that each model wants, to the outputs of the heads; the student runs its encoder once, then
all projectors and heads. What comes after the heads is the same for both and told apart. They take turns in one
process, round by round; peak memory is that of a process of its own for each. Writes serving.json and serving.md
beside this file, and the table in docs/four_tasks.md.
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
from kept import Row, publish
from large import large_run
from tables import DOC, insert, line_of
from torch import Tensor

from shoulders.config.recipe import as_size, read_recipe
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
LEAST = 1.0  # seconds of a measurement

Ask = Callable[[int], object]  # answers a batch of so many images


def teachers_side(run: Path) -> Ask:
    """All teachers of a run, each with its own head."""
    device = this_device()
    specs = read_recipe(run / "recipe.yaml").teachers
    loaded = {name: load_teacher(name, spec).to(device) for name, spec in specs.items()}
    pairs = [(teacher, load_head(name, specs[name], teacher).to(device)) for name, teacher in loaded.items()]
    return torch.no_grad()(lambda count: [head(teacher(_pixels(count, teacher.size))) for teacher, head in pairs])


def student_side(run: Path) -> Ask:
    """The student of a run with all its heads."""
    student, size = _student(run)
    return lambda count: run_heads(student, list(student.heads), _pixels(count, size))[1]


def projectors_side(run: Path) -> Ask:
    """The student as far as the features that the heads read."""
    student, size = _student(run)
    return torch.no_grad()(lambda count: student.predict_teacher_features(_pixels(count, size)))


def encoder_side(run: Path) -> Ask:
    """The student's encoder alone."""
    student, size = _student(run)
    return torch.no_grad()(lambda count: student.forward_features(_pixels(count, size)))


def after_side(run: Path) -> Ask:
    """What comes after the heads of the student: boxes, masks and classes out of their outputs."""
    student, size = _student(run)
    heads = list(student.heads)
    outputs = cache(lambda count: run_heads(student, heads, _pixels(count, size))[1])
    return lambda count: [post_process(student.head(name), outputs(count)[name], [size] * count) for name in heads]


TEACHERS, AFTER = "all teachers with their heads", "after the heads"
SIDES: dict[str, Callable[[Path], Ask]] = {
    TEACHERS: teachers_side,
    "student with all heads": student_side,
    "encoder and projectors of it": projectors_side,
    "encoder of it": encoder_side,
    AFTER: after_side,
}


def _student(run: Path) -> tuple[ShouldersModel, tuple[int, int]]:
    student = load(run).to(this_device())
    return student, as_size(tuple(student.config.image_size))


@cache
def _pixels(count: int, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) of noise: a head finds something in it."""
    noise = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(this_device())


def measure(name: str, run: Path, rounds: int) -> list[Row]:
    """Rows of side, batch and round: images a second by the clock, and milliseconds of processor for an image."""
    asked = {side: make(run) for side, make in SIDES.items()}
    rows = []
    for batch in BATCHES:
        repeats = {side: _repeats(partial(ask, batch)) for side, ask in asked.items()}
        for number in range(rounds):
            for side, ask in asked.items():
                clock, processor = time.perf_counter(), time.process_time()
                for _ in range(repeats[side]):
                    ask(batch)
                _wait()
                images = batch * repeats[side]
                spent = time.perf_counter() - clock
                rows.append(
                    {
                        "dataset": name,
                        "side": side,
                        "batch": batch,
                        "round": number,
                        "images_per_s": images / spent,
                        "cpu_ms": 1000 * (time.process_time() - processor) / images,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def _repeats(ask: Callable[[], object]) -> int:
    ask()
    _wait()
    begun = time.perf_counter()
    ask()
    _wait()
    return max(1, round(LEAST / (time.perf_counter() - begun)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peaks(name: str, run: Path) -> list[Row]:
    """Rows of side and batch: the most memory in MiB of a process that holds this side alone."""
    rows = []
    for side in SIDES:
        for batch in BATCHES:
            command = [sys.executable, str(HERE / "serving.py"), "--peak", side, str(run), str(batch)]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  (its own words)
            rows.append({"dataset": name, "side": side, "batch": batch} | json.loads(told.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


def peak(side: str, run: Path, batch: int) -> None:
    """Print the peak of this process, and what it held before any model was loaded."""
    before = _resident()
    ask = SIDES[side](run)
    for _ in range(3):
        ask(batch)
    told = {"peak_mib": _resident(), "before_mib": before}
    if torch.cuda.is_available():
        told["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(told))


def _resident() -> float:
    """The most MiB that this process held so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(rows: Sequence[Row]) -> str:
    """A line for each setting, batch and side: median and spread over the rounds, and the gain over the teachers."""
    titles = [
        "students of",
        "images at a time",
        "side",
        "images/s",
        "CPU ms per image",
        "against all teachers",
        "peak MiB",
        "of it models and activations",
    ]
    lines = [line_of(titles), "|---" * len(titles) + "|"]
    for setting in NAMES:
        for batch in BATCHES:
            of_batch = [row for row in rows if (row["dataset"], row["batch"]) == (setting, batch)]
            theirs = [row["cpu_ms"] for row in of_batch if row["side"] == TEACHERS and "round" in row]
            for side in SIDES if theirs else ():
                timed = [row for row in of_batch if row["side"] == side and "round" in row]
                held = next(row for row in of_batch if row["side"] == side and "peak_mib" in row)
                gain = statistics.median(their / row["cpu_ms"] for their, row in zip(theirs, timed, strict=True))
                lines.append(
                    line_of(
                        [
                            setting,
                            str(batch),
                            side,
                            spread([row["images_per_s"] for row in timed]),
                            spread([row["cpu_ms"] for row in timed]),
                            "-" if side == AFTER else f"{gain:.2f}x",
                            f"{held['peak_mib']:.0f}",
                            f"{held['peak_mib'] - held['before_mib']:.0f}",
                        ]
                    )
                )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """``12.3 (11.9 to 12.8)``: median, least and most."""
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
    given = parser.parse_args()
    if given.peak:
        side, run, batch = given.peak
        return peak(side, Path(run), int(batch))
    rows: list[Row] = []
    for name in [given.only] if given.only else NAMES:
        run = large_run(given.work) if name == LARGE else given.work / name / f"seed-{given.seed}"
        rows += measure(name, run, given.rounds) + peaks(name, run)
    told = table(publish(rows, given.out / "serving.json"))
    write_text(given.out / "serving.md", told)
    insert("serving", told, given.doc)
    print(told)


if __name__ == "__main__":
    main()
