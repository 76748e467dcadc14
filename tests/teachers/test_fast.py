"""Every row of the table in bf16: quick teachers say what slow ones say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoulders.config.recipe import TeacherSpec
from shoulders.features import Features
from shoulders.hub import fast
from shoulders.teachers import FAMILIES, Teacher, load_teacher


@torch.no_grad()
def said(teacher: Teacher, pixels: torch.Tensor, bf16: bool) -> dict[str, Features]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return teacher(pixels)


def off(one: dict[str, Features], other: dict[str, Features]) -> float:
    """The largest relative difference of a part of a tap."""
    pairs = [(one[tap].parts()[part], x) for tap, answer in other.items() for part, x in answer.parts().items()]
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in pairs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_quick_teachers_say_what_slow_ones_say(
    model_type: str, write_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = None if FAMILIES[model_type].fixed else 224  # of 7, 14, 16 and 32 px alike
    teacher = load_teacher("t", TeacherSpec(model=str(write_tiny(model_type)), size=size))
    pixels = torch.rand(2, 3, *teacher.size, generator=torch.Generator().manual_seed(0))
    exact, quick = said(teacher, pixels, bf16=False), said(teacher, pixels, bf16=True)
    monkeypatch.setattr(fast, "_in_bf16_on_cpu", lambda x: False)
    monkeypatch.setattr(fast, "FEW", 0)
    slow = said(teacher, pixels, bf16=True)
    assert off(quick, exact) < 2 * off(slow, exact) + 1e-2
