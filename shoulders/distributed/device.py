"""The device of a process, its precision and memory, and the environment that a run records."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """The environment of this process: package versions, system, device, and numbers of CPUs, threads and processes."""
    device = this_device(int(os.environ.get("LOCAL_RANK", "0")))
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {name: _version(name) for name in ("shoulders", "torch", "transformers")} | {
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({device_name})",
        "cpus": cpus,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: on its GPU where there is one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_main_memory() / 2**30


def peak_main_memory() -> int:
    """Peak main memory of this process in bytes; 0 on Windows, where Python cannot tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def this_device(local: int = 0) -> torch.device:
    """The GPU number ``local`` where this machine has GPUs, else the CPU."""
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16; ``auto`` uses it where the hardware supports it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # absent in older torch
    capabilities = get_capabilities() if get_capabilities else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
