"""Two ranks of ``shoulders distill``, forked from one process that has loaded the package; one of them may fail.

    python -m tests.distributed.ranks JOB

JOB is JSON: the recipe of each rank, a folder, and optionally a fault: rank, event, count and kind. A rank works in the
folder's folder of its number, where there is one, as on a machine of its own.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed

import shoulders.cli
from shoulders.distributed.context import DistContext, init_distributed
from shoulders.errors import DataError, NumericError
from shoulders.training import checkpoint, heldout, step

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 5  # of an exchange
PATIENCE_S = 5 * (TIMEOUT_S + 40)  # five times what is promised: the machine may be busy
SLOW_WRITE_S = 3 * TIMEOUT_S

distillation = importlib.import_module("shoulders.distillation")
# event -> owner and name of the function at which it happens
EVENTS: dict[str, tuple[Any, str]] = {
    "meet": (distributed, "init_process_group"),
    "groups": (distributed, "new_group"),
    "load": (distillation, "prepare"),
    "step": (step.TrainStep, "__call__"),
    "evaluate": (heldout.HeldOutSet, "measure"),
    "gather": (DistContext, "gather"),
    "save": (distillation.Trainer, "save"),
    "write": (checkpoint, "write_manifest"),
}


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Args:
        code: its exit code; None if it had to be killed.
        seconds: from the fault to its end; 0 without a fault.
        stderr: its lines, without those of progress.
    """

    code: int | None
    seconds: float
    stderr: list[str]


def run_ranks(folder: Path, recipes: list[Path], *options: str, **fault: Any) -> list[Ended]:
    """Run both ranks in another process; ``fault`` has the keys rank, event, count and kind."""
    job = {"folder": str(folder), "recipes": list(map(str, recipes)), "options": options, "fault": fault}
    command = [sys.executable, "-m", "tests.distributed.ranks", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S + 120)
    assert done.returncode == 0, done.stderr
    return [Ended(**one) for one in json.loads(done.stdout)]


def run_torchrun(folder: Path, recipe: Path, **fault: Any) -> tuple[int, list[str]]:
    """Run both ranks with torchrun; returns its exit code, and the lines that rank 0 wrote to stderr."""
    job = {"folder": str(folder), "recipes": [str(recipe)] * 2, "options": [], "fault": fault}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.distributed.ranks", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, (folder / "stderr.0").read_text().splitlines()


def loop() -> None:
    """Run forever without an exchange."""
    while True:
        time.sleep(1)


def fail(error: BaseException) -> None:
    """Raise an error."""
    raise error


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": loop,
    "slow": lambda: time.sleep(SLOW_WRITE_S),
    "exit": lambda: fail(SystemExit(0)),
    "bug": lambda: fail(ArithmeticError("a bug of one rank")),
    "disk": lambda: fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/file")),
    "data": lambda: fail(DataError("a/shard: damaged")),
    "nan": lambda: fail(NumericError("not finite on one rank")),
}


def install(folder: Path, event: str, count: int, kind: str) -> None:
    """Make the fault happen at an occurrence of the event in this process."""
    owner, name = EVENTS[event]
    original, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            (folder / "fault").touch()
            FAULTS[kind]()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def run_rank(rank: int, job: dict[str, Any]) -> None:
    """Run a rank in this process."""
    folder, fault = Path(job["folder"]), job["fault"]
    with (folder / f"stderr.{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the job prints its result
    if (folder / str(rank)).exists():
        os.chdir(folder / str(rank))
    distillation.init_distributed = partial(init_distributed, timeout=timedelta(seconds=TIMEOUT_S))  # type: ignore[attr-defined]
    if fault.get("rank") == rank:
        install(folder, fault["event"], fault["count"], fault["kind"])
    shoulders.cli.main(["distill", job["recipes"][rank], *job["options"]])


def start_rank(rank: int, port: int, job: dict[str, Any]) -> int:
    """Fork a rank; returns its process id."""
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(job["recipes"]))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_rank(rank, job)
    return 0


def wait_for(ranks: list[int], folder: Path, grace: float) -> list[tuple[int | None, float]]:
    """Exit code, and seconds from the fault to the end of every rank; those that remain are killed.

    Args:
        grace: seconds from the fault until the last one is killed, if all others have ended.
    """
    ended: dict[int, tuple[int | None, float]] = {}
    fault = folder / "fault"
    began = time.time()
    while len(ended) < len(ranks):
        for process in set(ranks) - ended.keys():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                seconds = time.time() - fault.stat().st_mtime if fault.exists() else 0.0
                ended[process] = os.waitstatus_to_exitcode(status), seconds
        since = time.time() - (fault.stat().st_mtime if fault.exists() else began)
        others_ended = fault.exists() and len(ended) == len(ranks) - 1
        if since > PATIENCE_S or (others_ended and since > grace):
            for process in set(ranks) - ended.keys():  # a stopped one
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                ended[process] = None, since
        time.sleep(0.05)
    return [ended[process] for process in ranks]


def main() -> None:
    """Run the job on the command line, and print how its ranks ended; as one rank where torchrun starts it."""
    job = json.loads(sys.argv[1])
    if "RANK" in os.environ:  # started by torchrun
        return run_rank(int(os.environ["RANK"]), job)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(job["folder"])
    (folder / "fault").unlink(missing_ok=True)
    ranks = [start_rank(rank, port, job) for rank in range(len(job["recipes"]))]
    grace = 0 if job["fault"].get("kind") in ("stop", "loop") else PATIENCE_S
    results = []
    for rank, (code, seconds) in enumerate(wait_for(ranks, folder, grace)):
        lines = (folder / f"stderr.{rank}").read_text().splitlines()
        results.append({"code": code, "seconds": seconds, "stderr": lines})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
