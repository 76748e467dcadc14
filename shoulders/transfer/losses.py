"""One function per training method, and the table that ``method:`` in the recipe chooses from.

Every method returns one loss and its named terms. Terms of a tap are computed over the images of its teacher,
``Features.rows``, and have shape (b,):

``s2t/<tap>/<component>``: distance between the student's prediction of a teacher's features and these features.
``t2s/<name>/<component>``: distance between the student's latent and a latent that is predicted from teacher features.

The base is a teacher called ``base``, weighted by ``preserve`` and never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoulders.features import Features, align_pair
from shoulders.transfer.distances import Distance
from shoulders.transfer.projectors import scatter_rows, teacher_name

BASE = "base"
Terms = dict[str, Tensor]
Rows = Mapping[str, Tensor | None]  # {teacher: (b,) the images of the batch that it has features of; None: all}
Balance = Callable[[Tensor, Tensor], Tensor]  # losses (B, T), teacher_mask (B, T) -> weights (B, T)
LatentTargets = Callable[[Mapping[str, Tensor]], Mapping[str, Features]]


@dataclass(frozen=True)
class Settings:
    """The numbers of a loss; ``transfer:`` in the recipe describes them."""

    preserve: float
    t2s: str
    t2s_weight: float
    t2s_grad_to: str


class Method(Protocol):
    """A training method: features and settings to one loss and its terms."""

    def __call__(
        self,
        latent: Features,
        predictions: Mapping[str, Features],
        targets: Mapping[str, Features],
        latent_targets: LatentTargets,
        distance: Distance,
        balance: Balance,
        settings: Settings,
    ) -> tuple[Tensor, Terms]:
        """One loss and its named terms.

        Args:
            latent: of the student, for all images of the batch.
            predictions: {tap: the student's prediction of the teacher's features}, standardized.
            targets: {tap: teacher features}, standardized; ``base/...`` where the base is preserved. Predictions have
                the same rows.
            latent_targets: {tap: (B,) 1 where the teacher takes part in the image, else 0} -> {name: latent predicted
                from teacher features} (t2s); called unless t2s is ``none``.
            distance: of `shoulders.transfer.distances`.
            balance: of `shoulders.transfer.balance`; of the teachers other than the base.

        Returns:
            loss: scalar, the mean over images.
            terms: {name: scalar}, unweighted means, detached; nan for a term without images.
        """
        ...


def kpu(
    latent: Features,
    predictions: Mapping[str, Features],
    targets: Mapping[str, Features],
    latent_targets: LatentTargets,
    distance: Distance,
    balance: Balance,
    settings: Settings,
) -> tuple[Tensor, Terms]:
    """Knowledge preservation and unification (arXiv 2508.14707): s2t and t2s terms, balanced over teachers.

    The loss of an image is the sum over its teachers of weight x mean of the teacher's terms. Arguments and results are
    those of :class:`Method`.
    """
    rows: Rows = {teacher_name(tap): features.rows for tap, features in targets.items()}
    s2t = s2t_terms(predictions, targets, distance)
    losses = teacher_losses(s2t, rows, latent.batch_size)  # (B, T)
    weights = teacher_weights(losses, rows, balance, settings.preserve)  # (B, T)
    per_image = (weights * losses).sum(1)  # (B,)
    t2s: Terms = {}
    if settings.t2s != "none":
        teacher_mask = {tap: (weights[:, list(rows).index(teacher_name(tap))] > 0).float() for tap in targets}
        t2s = t2s_terms(latent, latent_targets(teacher_mask), distance, settings.t2s_grad_to)
        if settings.t2s == "each":
            t2s_losses = (weights * teacher_losses(t2s, rows, latent.batch_size)).sum(1)
        else:
            masked = [any_teacher_mask(name, targets, teacher_mask) * value for name, value in t2s.items()]
            t2s_losses = torch.stack(masked).mean(0)
        per_image = per_image + settings.t2s_weight * t2s_losses
    terms = {name: value.detach().mean() for name, value in (s2t | t2s).items()}
    return per_image.mean(), terms


# what `method:` in the recipe chooses from; a method of another paper is a function above and a row here
METHODS: dict[str, Method] = {"kpu": kpu}


def s2t_terms(predictions: Mapping[str, Features], targets: Mapping[str, Features], distance: Distance) -> Terms:
    """Distances between the prediction and the target of each tap, both on the smaller grid."""
    terms = {}
    for tap, features in targets.items():
        prediction, target = align_pair(predictions[tap], features)
        for component, x in target.components().items():
            terms[f"s2t/{tap}/{component}"] = distance(prediction.components()[component], x)
    return terms


def t2s_terms(latent: Features, latent_targets: Mapping[str, Features], distance: Distance, grad_to: str) -> Terms:
    """Distances between the layer-normalised latent and each latent predicted from teacher features.

    Args:
        latent_targets: {name: Features}; their ``rows`` are the images that they are compared for.
        grad_to: ``both``; ``student``: no gradient for the predicted latents; ``projector``: none for the latent.
    """
    normalised = layer_normalised(latent)
    if grad_to == "projector":
        normalised = normalised.map(torch.Tensor.detach)
    terms = {}
    for name, target in latent_targets.items():
        if grad_to == "student":
            target = target.map(torch.Tensor.detach)
        ours = normalised.take(target.rows).components()
        for component, x in target.components().items():
            terms[f"t2s/{name}/{component}"] = distance(ours[component], x)
    return terms


def layer_normalised(latent: Features) -> Features:
    """Every vector of the latent layer-normalised, without learned scale: all teachers then aim at one magnitude."""
    return latent.map(lambda x: F.layer_norm(x, x.shape[-1:]))


def teacher_losses(terms: Terms, rows: Rows, batch_size: int) -> Tensor:
    """The mean of each teacher's terms: (B, T), in the order of ``rows``; 0 where a teacher has no features."""
    columns = []
    for teacher, its_rows in rows.items():
        values = [value for name, value in terms.items() if teacher_name(name.split("/", 1)[1]) == teacher]
        columns.append(scatter_rows(torch.stack(values).mean(0), batch_size, its_rows))
    return torch.stack(columns, 1)


def teacher_weights(losses: Tensor, rows: Rows, balance: Balance, preserve: float) -> Tensor:
    """The weights (B, T) of losses (B, T): ``preserve`` for the base, those of ``balance`` for the other teachers."""
    teacher_mask = torch.ones_like(losses)
    for column, its_rows in enumerate(rows.values()):
        if its_rows is not None:
            teacher_mask[:, column] = losses.new_zeros(len(losses)).index_fill(0, its_rows, 1)
    others = [column for column, teacher in enumerate(rows) if teacher != BASE]
    weights = torch.full_like(losses, preserve)
    weights[:, others] = balance(losses[:, others].detach(), teacher_mask[:, others])
    return weights


def any_teacher_mask(name: str, targets: Mapping[str, Features], teacher_mask: Mapping[str, Tensor]) -> Tensor:
    """(B,) 1 where at least one teacher takes part with the component of the term ``name``, else 0."""
    component = name.rsplit("/", 1)[1]
    masks = [teacher_mask[tap] for tap, features in targets.items() if component in features.components()]
    return torch.stack(masks).amax(0)
