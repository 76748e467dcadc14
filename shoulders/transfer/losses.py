"""The KPU objective (arXiv 2508.14707): pure functions with named terms, each (B,).

``s2t/<tap>/<part>``: what the student says of a teacher's features, against what the teacher says.
``t2s/...``: the latent that the teachers call for, against the student's own.
The base is a teacher called ``base``, weighted by ``preserve`` and never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.features import EVERYBODY, Asked, Features, align_pair
from shoulders.transfer.distances import Distance
from shoulders.transfer.projectors import spread, teacher_name

BASE = "base"
Terms = dict[str, Tensor]
Balance = Callable[[Tensor, Tensor], Tensor]  # losses (B, T), 1 where asked (B, T) -> weights (B, T)


def s2t_terms(told: Mapping[str, Features], taught: Mapping[str, Features], distance: Distance) -> Terms:
    """Distances between what the student tells of each tap and what is taught, both on the smaller grid."""
    terms = {}
    for tap, theirs in taught.items():
        ours, theirs = align_pair(told[tap], theirs)
        for part, target in theirs.parts().items():
            terms[f"s2t/{tap}/{part}"] = distance(ours.parts()[part], target)
    return terms


def t2s_terms(
    latent: Features, guesses: Mapping[str, Features], distance: Distance, gradient: str, asked: Asked
) -> Terms:
    """Distances between the layer-normalised latent and each guess of it.

    Args:
        gradient: ``both``; ``student``: only the latent moves; ``projector``: only the guesses move.
    """
    goal = normalised(latent)
    if gradient == "projector":
        goal = goal.map(torch.Tensor.detach)
    terms = {}
    for name, guess in guesses.items():
        if gradient == "student":
            guess = guess.map(torch.Tensor.detach)
        for part, x in guess.parts().items():
            terms[f"t2s/{name}/{part}"] = distance(goal.take(asked.get(teacher_name(name))).parts()[part], x)
    return terms


def normalised(latent: Features) -> Features:
    """Every vector of the latent layer-normalised, without learned scale: all teachers then aim at one magnitude."""
    return latent.map(lambda x: F.layer_norm(x, x.shape[-1:]))


def per_teacher(terms: Terms, teachers: Sequence[str], images: int, asked: Asked) -> Tensor:
    """The mean of each teacher's terms: (B, T), in the order of ``teachers``; 0 where it was not asked."""
    columns = []
    for teacher in teachers:
        own = [value for name, value in terms.items() if teacher_name(name.split("/", 1)[1]) == teacher]
        columns.append(spread(torch.stack(own).mean(0), images, asked.get(teacher)))
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class Settings:
    """The numbers of the objective; ``transfer:`` in the recipe says what they mean."""

    preserve: float
    t2s: str
    t2s_weight: float
    t2s_grad_to: str


def kpu(
    latent: Features,
    told: Mapping[str, Features],
    taught: Mapping[str, Features],
    unify: Callable[[Mapping[str, Tensor]], Mapping[str, Features]],
    distance: Distance,
    balance: Balance,
    settings: Settings,
    asked: Asked = EVERYBODY,
) -> tuple[Tensor, Terms]:
    """One loss and its named terms.

    Args:
        latent: the student's, at its last place.
        told: {tap: what the student's projectors say}, in standardized space.
        taught: {tap: what the teachers say}, standardized; ``base/...`` where the base is preserved.
        asked: of which images each teacher says it; `told` is of the same.
        unify: {tap: (B,) present or not} -> {name: guess of the latent} (t2s); called unless t2s is ``none``.
        balance: of `shoulders.transfer.balance`; of the teachers other than the base.

    Returns:
        loss: scalar, the mean over images; sum over teachers of weight x mean of its terms.
        terms: {name: scalar}, unweighted means, detached; not a number where no image was asked about.
    """
    teachers = list(dict.fromkeys(teacher_name(tap) for tap in taught))
    s2t = s2t_terms(told, taught, distance)
    images = latent.images
    losses = per_teacher(s2t, teachers, images, asked)  # (B, T)
    weights = _weights(losses, teachers, balance, settings.preserve, asked)  # (B, T)
    per_image = (weights * losses).sum(1)
    t2s: Terms = {}
    if settings.t2s != "none":
        present = {tap: (weights[:, teachers.index(teacher_name(tap))] > 0).float() for tap in taught}
        t2s = t2s_terms(latent, unify(present), distance, settings.t2s_grad_to, asked)
        if settings.t2s == "each":
            per_image = per_image + settings.t2s_weight * (weights * per_teacher(t2s, teachers, images, asked)).sum(1)
        else:
            calls = [_anyone(name, taught, present) * value for name, value in t2s.items()]
            per_image = per_image + settings.t2s_weight * torch.stack(calls).mean(0)
    terms = {name: value.detach().mean() for name, value in (s2t | t2s).items()}
    return per_image.mean(), terms


def _weights(losses: Tensor, teachers: list[str], balance: Balance, preserve: float, asked: Asked) -> Tensor:
    taught_by = [i for i, teacher in enumerate(teachers) if teacher != BASE]
    weights = torch.full_like(losses, preserve)
    here = torch.ones_like(losses)
    for i in taught_by:
        if (rows := asked.get(teachers[i])) is not None:
            here[:, i] = here.new_zeros(len(here)).index_fill(0, rows, 1)
    weights[:, taught_by] = balance(losses[:, taught_by].detach(), here[:, taught_by])
    return weights


def _anyone(name: str, taught: Mapping[str, Features], present: Mapping[str, Tensor]) -> Tensor:
    """(B,) 1 where at least one teacher speaks of this part of the image; else nothing calls for a latent."""
    part = name.rsplit("/", 1)[1]
    return torch.stack([present[tap] for tap, features in taught.items() if part in features.parts()]).amax(0)
