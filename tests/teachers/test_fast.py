"""Every family in bf16: the optimized teacher computes the same features as the plain one, up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoulders.config.sections import TeacherSpec
from shoulders.features import Features
from shoulders.teachers import FAMILIES, Teacher, load_teacher


@torch.no_grad()
def compute(teacher: Teacher, pixels: torch.Tensor, bf16: bool) -> dict[str, Features]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return teacher(pixels)


def largest_difference(features: dict[str, Features], expected: dict[str, Features]) -> float:
    """The largest relative difference of a component of a tap."""
    pairs = [
        (features[tap].components()[part], y) for tap, one in expected.items() for part, y in one.components().items()
    ]
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_optimized_teachers_compute_the_features_of_plain_ones(
    model_type: str, write_tiny: Callable[..., Path]
) -> None:
    size = None if FAMILIES[model_type].fixed_size else 224  # divisible by 7, 14, 16 and 32
    spec = TeacherSpec(model=str(write_tiny(model_type)), size=size)
    optimized, plain = load_teacher("t", spec), load_teacher("t", spec, optimize=False)
    pixels = torch.rand(2, 3, *optimized.size, generator=torch.Generator().manual_seed(0))
    exact = compute(plain, pixels, bf16=False)
    error, plain_error = (largest_difference(compute(one, pixels, bf16=True), exact) for one in (optimized, plain))
    assert error < 2 * plain_error + 1e-2
    assert largest_difference(compute(optimized, pixels, bf16=False), exact) == 0  # in fp32 bit for bit
