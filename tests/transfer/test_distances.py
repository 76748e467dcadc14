"""Distances in closed form."""

from __future__ import annotations

import pytest
import torch

from shoulders.transfer.distances import distance

# one image of two tokens with three channels; differences 0.5, 0, 2 and 0, 0, -1
PREDICTION = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]])
TARGET = torch.tensor([[[0.5, 0.0, 0.0], [0.0, 3.0, 1.0]]])
COSINE = ((1 - 1 / 5**0.5) + (1 - 3 / 10**0.5)) / 2
SMOOTH_L1 = (0.125 + 0 + 1.5 + 0 + 0 + 0.5) / 6  # half the square up to a difference of 1, then the difference - .5
MSE = (0.25 + 0 + 4 + 0 + 0 + 1) / 6


@pytest.mark.parametrize(
    ("kind", "weight", "expected"),
    [
        ("cosine", 0.9, COSINE),
        ("smooth_l1", 0.9, SMOOTH_L1),
        ("mse", 0.9, MSE),
        ("cosine_smooth_l1", 0.25, 0.25 * COSINE + 0.75 * SMOOTH_L1),
    ],
)
def test_distances_are_means_over_tokens_and_channels(kind: str, weight: float, expected: float) -> None:
    other = torch.randn(1, 2, 3)
    prediction, target = torch.cat([PREDICTION, other]), torch.cat([TARGET, other])
    assert distance(kind, weight)(prediction, target).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_a_summary_is_one_vector() -> None:
    assert float(distance("mse")(PREDICTION[:, 0], TARGET[:, 0])) == pytest.approx(4.25 / 3)
    assert float(distance("cosine")(PREDICTION[:, 0], TARGET[:, 0])) == pytest.approx(1 - 1 / 5**0.5)


def test_the_cosine_has_nine_tenths_of_the_weight_by_default() -> None:
    """Theia, arXiv 2407.20179."""
    assert float(distance("cosine_smooth_l1")(PREDICTION, TARGET)) == pytest.approx(0.9 * COSINE + 0.1 * SMOOTH_L1)
