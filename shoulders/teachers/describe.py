"""A teacher's properties and cost, as plain data for tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoulders.teachers.teacher import Teacher


def describe(name: str, teacher: Teacher) -> dict[str, Any]:
    """The properties of one teacher; ``gflop_per_image`` counts a multiplication and its addition as two."""
    return {
        "name": name,
        "source": teacher.source,
        "revision": teacher.revision,
        "license": teacher.license,
        "size": teacher.size,
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "gflop_per_image": round(count_flop(teacher) / 1e9, 3),
        "taps": {tap: asdict(shape) for tap, shape in teacher.taps.items()},
    }


def count_flop(teacher: Teacher) -> int:
    """Floating-point operations of one image: matrix products, convolutions and attention."""
    blank = torch.zeros(1, 3, *teacher.size, device=teacher.mean.device)
    # the counter does not count the fused attention of CPUs, so attention runs as two matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher(blank)
    return int(counter.get_total_flops())
