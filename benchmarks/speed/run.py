"""Speed and memory of a training step: a straightforward implementation against the variants of this library.

    python benchmarks/speed/run.py [--batch 8 32] [--rounds 3] [--quick] [--work runs/speed]

The job: a ViT-S/16 at 224 px is distilled from three ViT-B teachers, one of them with a patch size of 14 px; then a
frozen ViT-B with an adapter from the same teachers. Weights and images are random. Each variant runs in its own
process. Every round runs all variants, so that a drift of the machine affects all of them. Each process also measures
the rate of matrix products of the machine. Only ratios are comparable across machines. Measurements are kept in
``--work``: when the command is started again, it continues. Writes results.json and table.md beside this file, unless
--quick; their rows of other batch sizes and variants stay.
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
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported, in this process and in the children
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.child:
        print(json.dumps(measure(args)))
        return
    from variants import VARIANTS, write_cache, write_world

    args.work.mkdir(parents=True, exist_ok=True)
    write_world(args.work)
    for variant in args.variants or VARIANTS:
        write_cache(variant, args.work)
    rows = rounds(args, list(args.variants or VARIANTS))
    fresh = [{"threads": args.threads, "clock": args.clock, **row} for row in summarize(rows)]
    print(table(fresh))
    if not args.quick:
        order = list(VARIANTS)
        newest = {(row["batch"], order.index(row["variant"])): row for row in [*published(), *fresh]}
        all_rows = [newest[key] for key in sorted(newest)]
        (HERE / "results.json").write_text(json.dumps({"machine": machine(), "rows": all_rows}, indent=1) + "\n")
        (HERE / "table.md").write_text(table(all_rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="minimum time of a measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a shared machine"
    )
    parser.add_argument("--quick", action="store_true", help="one short round; no results are written")
    parser.add_argument("--variants", nargs="+", help="only these; include plain and plain_bf16 for the ratios")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speed", help="models, cache and measurements")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--gflop", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.0
    return args


def rounds(args: argparse.Namespace, variants: list[str]) -> list[dict[str, Any]]:
    """One measurement per variant, batch size and round; measurements of an earlier start are reused."""
    file = args.work / "measured.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and not args.quick else []
    setting = {"threads": args.threads, "clock": args.clock}
    turns = range(args.rounds)
    wanted = [(number, batch, variant) for number in turns for batch in args.batch for variant in variants]
    measured = []
    gflop = {row["variant"]: row["gflop_per_image"] for row in [*published(), *rows]}  # the same for every batch
    for number, batch, variant in wanted:
        key = {"variant": variant, "batch": batch, "round": number, **setting}
        row = next((row for row in rows if key.items() <= row.items()), None)
        if row is None:
            row = key | measure_in_child(args, variant, batch, gflop.get(variant))
            gflop[variant] = row["gflop_per_image"]
            if not args.quick:
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
        print(f"{variant:20} batch {batch:3} round {number}: {row['images_per_s']:7.2f} images/s", file=sys.stderr)
        measured.append(row)
    return measured


def published() -> list[dict[str, Any]]:
    """The rows of results.json."""
    rows: list[dict[str, Any]] = json.loads((HERE / "results.json").read_text())["rows"]
    return rows


def measure_in_child(args: argparse.Namespace, variant: str, batch: int, gflop: float | None) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "run.py"), "--child", variant, "--batch", str(batch), "--clock", args.clock]
    command += ["--threads", str(args.threads), "--seconds", str(args.seconds), "--work", str(args.work)]
    command += [] if gflop is None else ["--gflop", str(gflop)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure images per second, peak memory, arithmetic, and the rate of matrix products, in this process."""
    import torch
    from variants import job

    from shoulders.hub.flops import count_flops

    torch.set_num_threads(args.threads)
    (batch,) = args.batch
    on_gpu = torch.cuda.is_available()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    precision = torch.float32 if args.child == "plain" else torch.bfloat16

    def timed(once: Callable[[], object]) -> float:
        start = clock()
        once()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start

    step = job(args.child, args.work, batch)
    step()  # packs weights and creates the state of the optimizer
    reset_peak(on_gpu)
    taken = [timed(step)]
    while sum(taken) < args.seconds or (len(taken) < 3 and sum(taken) < 3 * args.seconds):
        taken.append(timed(step))
    peak = peak_mb(on_gpu)
    device = "cuda" if on_gpu else "cpu"
    a, b = (torch.randn(2048, 2048, device=device, dtype=precision) for _ in range(2))
    a @ b
    gemm = 2 * 2048**3 / statistics.median(timed(lambda: a @ b) for _ in range(5))
    images_per_s = batch / statistics.median(taken)
    arithmetic = count_flops(step) / batch if args.gflop is None else args.gflop * 1e9
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "images_per_s": images_per_s,
        "peak_mb": peak,
        "gflop_per_image": arithmetic / 1e9,
        "gemm_gflops": gemm / 1e9,
        "fraction_of_gemm": images_per_s * arithmetic / gemm,
    }


def reset_peak(on_gpu: bool) -> None:
    """Reset the peak, so that the memory for building a model does not count."""
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
    """The rows as a Markdown table."""
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
