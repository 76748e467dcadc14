"""How fast a step is, and how much memory it takes: the obvious way, and the ways of this library.

    python benchmarks/speed/run.py [--batch 8 32] [--rounds 3] [--quick] [--work runs/speed]

The job: a ViT-S/16 at 224 px that learns from three ViT-B teachers, one of them with patches of 14 px; then the same
teachers for a frozen ViT-B with an adapter. Weights and images are random. Each variant runs in a process of its own,
and every round runs all of them, so that drift of the machine hits all alike; each process measures the machine's own
rate of matrix products too. Only ratios mean anything. What is measured already is kept in ``--work``: started again,
the command goes on. Writes results.json and table.md here, unless --quick; what they hold of other batches and variants
stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    asked = arguments()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # before torch is imported, here and in the children
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.child:
        print(json.dumps(measure(asked)))
        return
    from variants import VARIANTS, write_cache, write_world

    asked.work.mkdir(parents=True, exist_ok=True)
    write_world(asked.work)
    for variant in asked.variants or VARIANTS:
        write_cache(variant, asked.work)
    rows = rounds(asked, list(asked.variants or VARIANTS))
    fresh = [{"threads": asked.threads, "clock": asked.clock, **row} for row in summarize(rows)]
    print(table(fresh))
    if not asked.quick:
        order = list(VARIANTS)
        newest = {(row["batch"], order.index(row["variant"])): row for row in [*published(), *fresh]}
        told = [newest[key] for key in sorted(newest)]
        (HERE / "results.json").write_text(json.dumps({"machine": machine(), "rows": told}, indent=1) + "\n")
        (HERE / "table.md").write_text(table(told))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="that each process measures: three steps, or thrice")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use")
    parser.add_argument("--quick", action="store_true", help="one short round, and nothing is written here")
    parser.add_argument("--variants", nargs="+", help="only these; plain and plain_bf16 among them, for the ratios")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speed", help="models, cache and measurements")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--gflop", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.seconds = 1, 0.0
    return asked


def rounds(asked: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    """One measurement per variant, batch and round; those that were made before are not made again."""
    kept = asked.work / "measured.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() and not asked.quick else []
    setting = {"threads": asked.threads, "clock": asked.clock}
    turns = range(asked.rounds)
    wanted = [(number, batch, variant) for number in turns for batch in asked.batch for variant in variants]
    measured = []
    gflop = {row["variant"]: row["gflop_per_image"] for row in [*published(), *rows]}  # the same for every batch
    for number, batch, variant in wanted:
        what = {"variant": variant, "batch": batch, "round": number, **setting}
        row = next((row for row in rows if what.items() <= row.items()), None)
        if row is None:
            row = what | ask_child(asked, variant, batch, gflop.get(variant))
            gflop[variant] = row["gflop_per_image"]
            if not asked.quick:
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        print(f"{variant:20} batch {batch:3} round {number}: {row['images_per_s']:7.2f} images/s", file=sys.stderr)
        measured.append(row)
    return measured


def published() -> list[dict[str, Any]]:
    """The rows of results.json."""
    rows: list[dict[str, Any]] = json.loads((HERE / "results.json").read_text())["rows"]
    return rows


def ask_child(asked: argparse.Namespace, variant: str, batch: int, gflop: float | None) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "run.py"), "--child", variant, "--batch", str(batch), "--clock", asked.clock]
    command += ["--threads", str(asked.threads), "--seconds", str(asked.seconds), "--work", str(asked.work)]
    command += [] if gflop is None else ["--gflop", str(gflop)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: images per second, peak memory, arithmetic, and the machine's own rate."""
    import torch
    from variants import count_arithmetic, job

    torch.set_num_threads(asked.threads)
    (batch,) = asked.batch
    on_gpu = torch.cuda.is_available()
    clock = time.process_time if asked.clock == "cpu" else time.perf_counter
    precision = torch.float32 if asked.child == "plain" else torch.bfloat16

    def timed(once: Callable[[], object]) -> float:
        begun = clock()
        once()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - begun

    step = job(asked.child, asked.work, batch)
    step()  # weights are packed, moments of the optimizer made
    forget_peak(on_gpu)
    taken = [timed(step)]
    while sum(taken) < asked.seconds or (len(taken) < 3 and sum(taken) < 3 * asked.seconds):
        taken.append(timed(step))
    peak = peak_mb(on_gpu)
    device = "cuda" if on_gpu else "cpu"
    a, b = (torch.randn(2048, 2048, device=device, dtype=precision) for _ in range(2))
    a @ b
    gemm = 2 * 2048**3 / statistics.median(timed(lambda: a @ b) for _ in range(5))
    images_per_s = batch / statistics.median(taken)
    arithmetic = count_arithmetic(step) / batch if asked.gflop is None else asked.gflop * 1e9
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "images_per_s": images_per_s,
        "peak_mb": peak,
        "gflop_per_image": arithmetic / 1e9,
        "gemm_gflops": gemm / 1e9,
        "fraction_of_gemm": images_per_s * arithmetic / gemm,
    }


def forget_peak(on_gpu: bool) -> None:
    """What was needed to build a model does not count."""
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(on_gpu: bool) -> float:
    """Peak of resident memory, or of the GPU's, in MB."""
    if on_gpu:
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1.024e-3


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds; ratios are taken within each round."""
    plain = {(row["variant"], row["batch"], row["round"]): row["images_per_s"] for row in rows}
    summary = []
    for variant, batch in dict.fromkeys((row["variant"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["batch"]) == (variant, batch)]
        one = {"variant": variant, "device": mine[0]["device"], "batch": batch, "rounds": len(mine)}
        for name in ("images_per_s", "peak_mb", "gflop_per_image", "gemm_gflops", "fraction_of_gemm"):
            one[name] = statistics.median(row[name] for row in mine)
        speeds = [row["images_per_s"] for row in mine]
        one["spread"] = (max(speeds) - min(speeds)) / one["images_per_s"]
        for base in ("plain", "plain_bf16"):
            pairs = [(row["images_per_s"], plain.get((base, batch, row["round"]))) for row in mine]
            one[f"ratio_{base}"] = statistics.median([mine / theirs for mine, theirs in pairs if theirs] or [0.0])
        summary.append(one)
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = (
        "variant",
        "batch",
        "images/s",
        "spread",
        "to plain fp32",
        "to plain bf16",
        "peak MB",
        "GFLOP/image",
        "of GEMM rate",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            row["variant"],
            str(row["batch"]),
            f"{row['images_per_s']:.2f}",
            f"{row['spread']:.0%}",
            *(f"{row[ratio]:.2f}" if row[ratio] else "-" for ratio in ("ratio_plain", "ratio_plain_bf16")),
            f"{row['peak_mb']:.0f}",
            f"{row['gflop_per_image']:.1f}",
            f"{row['fraction_of_gemm']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The processor, as it names itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return f"{names[0].partition(': ')[2] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
