"""Teacher weights in closed form."""

from __future__ import annotations

import torch

from shoulders.transfer import balance

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


def test_the_weights_of_an_image_sum_to_the_number_of_teachers() -> None:
    expected = [[1.0, 1.0, 1.0], [3.0, 0.0, 0.0], [0.0, 1.5, 1.5], [0.0, 0.0, 0.0]]
    assert balance.uniform(torch.rand(4, 3), MASK).tolist() == expected
    fixed = [[0.5 * a, 2.0 * b, 0.0 * c] for a, b, c in expected]
    assert balance.fixed(torch.rand(4, 3), MASK, [0.5, 2.0, 0.0]).tolist() == fixed


def test_the_probability_to_keep_a_teacher_is_its_frequency() -> None:
    numbers = (torch.arange(100) / 100)[:, None].expand(100, 2)
    losses = torch.tensor([[1.0, 0.0]]).expand(100, 2)
    for keep in (0.0, 0.3, 0.5, 1.0):
        kept = balance.dropping(losses, torch.ones(100, 2), numbers, keep)[:, 1] > 0
        assert int(kept.sum()) == round(100 * keep)


def test_teachers_without_features_are_never_kept() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0], [0.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    kept = [[1.0, 1.0, 1.0], [3.0, 0.0, 0.0], [0.0, 1.5, 1.5], [0.0, 0.0, 0.0]]
    assert balance.dropping(losses, MASK, torch.zeros(4, 3)).tolist() == kept
    worst = [[0.0, 0.0, 3.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    assert balance.dropping(losses, MASK, torch.full((4, 3), 0.9)).tolist() == worst
