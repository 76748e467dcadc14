"""Teacher weights in closed form."""

from __future__ import annotations

import torch

from shoulders.transfer import balance


def test_unic_keeps_a_teacher_with_probability_one_half() -> None:
    """UNIC, arXiv 2408.05088: a teacher that is not the worst is kept where its uniform number is below .5."""
    losses = torch.tensor([[2.0, 1.0]]).expand(4, 2)
    numbers = torch.tensor([[0.9, 0.0], [0.9, 0.49], [0.9, 0.5], [0.9, 0.99]])
    weights = balance.dropping(losses, torch.ones(4, 2), numbers)
    assert weights.tolist() == [[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [2.0, 0.0]]


def test_the_probability_to_keep_a_teacher_is_its_frequency() -> None:
    numbers = torch.arange(100).view(100, 1) / 100
    losses = torch.stack([torch.ones(100), torch.zeros(100)], 1)
    numbers = numbers.expand(100, 2)
    for keep in (0.0, 0.3, 0.5, 1.0):
        kept = balance.dropping(losses, torch.ones(100, 2), numbers, keep)[:, 1] > 0
        assert int(kept.sum()) == round(100 * keep)
    assert torch.equal(
        balance.dropping(losses, torch.ones(100, 2), numbers),
        balance.dropping(losses, torch.ones(100, 2), numbers, 0.5),
    )
