"""A teacher's properties and cost, as plain data for tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from shoulders.hub.flops import count_flops
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
        "gflop_per_image": round(flops_per_image(teacher) / 1e9, 3),
        "taps": {tap: asdict(shape) for tap, shape in teacher.taps.items()},
    }


def flops_per_image(teacher: Teacher) -> int:
    """FLOPs of a teacher for one image: matrix products, convolutions and attention."""
    blank = torch.zeros(1, 3, *teacher.size, device=teacher.mean.device)
    return count_flops(lambda: teacher(blank))
