"""The device of a process: which one, what it computes in, its memory and its environment."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def environment() -> dict[str, Any]:
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


def peak_memory_gib() -> float:
    """The most memory that this process has held, in GiB: of its GPU where it has one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def this_device(local: int = 0) -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: with ``auto``, where the hardware has it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ask = getattr(torch.cpu, "get_capabilities", None)  # older torch cannot tell
    capabilities = ask() if ask else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
