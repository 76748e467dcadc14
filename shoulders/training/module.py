"""What a run trains: the student, and the projectors from teacher features to its latent (t2s)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from shoulders.config.recipe import Recipe
from shoulders.features import Features
from shoulders.model import ShouldersModel
from shoulders.transfer import balance
from shoulders.transfer.distances import distance
from shoulders.transfer.losses import BASE, METHODS, Balance, Settings, Terms
from shoulders.transfer.projectors import FeatureDims, JointToStudent, TeacherToStudent, teacher_name


class DistillationModule(nn.Module):
    """Student and t2s projectors behind one forward, so that DDP sees every trainable parameter."""

    def __init__(self, student: ShouldersModel, recipe: Recipe):
        super().__init__()
        transfer = recipe.transfer
        self.student = student
        self.t2s = build_t2s(student, recipe)
        self.method = METHODS[recipe.method]
        self.distance = distance(transfer.distance, transfer.cosine_weight)
        self.settings = Settings(transfer.preserve, transfer.t2s, transfer.t2s_weight, transfer.t2s_grad_to)
        self.balance = transfer.balance
        self.weights = [
            recipe.teachers[name].weight if name in recipe.teachers else 1.0
            for name in student.config.teachers
            if name != BASE
        ]  # of the T teachers

    def forward(
        self,
        pixels: Tensor,
        teacher_features: Mapping[str, Features],
        drop_uniforms: Tensor,
        forward_features: Callable[..., dict[str, Features]] | None = None,
    ) -> tuple[Tensor, Terms]:
        """The loss of a batch and its named terms.

        Args:
            pixels: (B, 3, h, w) in [0, 1].
            teacher_features: {tap: Features} of these images, ``base/...`` among them, in each teacher's own space.
            drop_uniforms: (B, T) uniform numbers in [0, 1) for teacher dropping.
            forward_features: the student's method of this name, compiled; default: the method itself.
        """
        base = {tap.removeprefix(f"{BASE}/"): f for tap, f in teacher_features.items() if teacher_name(tap) == BASE}
        student_features = (forward_features or self.student.forward_features)(pixels, base)
        return self.compute_loss(student_features, teacher_features, drop_uniforms)

    def compute_loss(
        self,
        student_features: Mapping[str, Features],
        teacher_features: Mapping[str, Features],
        drop_uniforms: Tensor,
    ) -> tuple[Tensor, Terms]:
        """As :meth:`forward`, from {layer: Features} of the student: projectors, distances, balance."""
        targets = self.student.standardize({tap: teacher_features[tap] for tap in self.student.taps})
        predictions = self.student.project(student_features, targets)
        latent = as_float(student_features["latent"])
        predictions = {tap: as_float(features) for tap, features in predictions.items()}

        def latent_targets(teacher_mask: Mapping[str, Tensor]) -> Mapping[str, Features]:
            if isinstance(self.t2s, JointToStudent):
                return {"joint": as_float(self.t2s(targets, latent.grid, teacher_mask))}
            return {tap: as_float(features) for tap, features in self.t2s(targets, latent.grid).items()}  # type: ignore[misc]

        balance = self._balance(drop_uniforms)
        loss, terms = self.method(latent, predictions, targets, latent_targets, self.distance, balance, self.settings)
        # a component that no teacher has, such as a summary, gets a gradient of zeros: DDP and checkpoints need one
        predicted = {component for features in predictions.values() for component in features.components()}
        for features in student_features.values():
            for component, x in features.components().items():
                if component not in predicted:
                    loss = loss + 0 * x.float().sum()
        return loss, terms

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _balance(self, drop_uniforms: Tensor) -> Balance:
        kinds: dict[str, Balance] = {
            "uniform": balance.uniform,
            "fixed": partial(balance.fixed, weights=self.weights),
            "dropping": partial(balance.dropping, drop_uniforms=drop_uniforms),
        }
        return kinds[self.balance]


def as_float(features: Features) -> Features:
    """The same Features in float32, which distances need."""
    return features.map(torch.Tensor.float)


def build_t2s(student: ShouldersModel, recipe: Recipe) -> TeacherToStudent | JointToStudent | None:
    """The projectors from teacher features to the latent that ``transfer.t2s`` names."""
    transfer, d = recipe.transfer, student.encoder.width
    taps = {tap: FeatureDims(spec["summary"], spec["spatial"]) for tap, spec in (student.config.taps or {}).items()}
    kinds: dict[str, Callable[..., TeacherToStudent | JointToStudent]] = {
        "each": TeacherToStudent,
        "joint": JointToStudent,
    }
    if transfer.t2s == "none":
        return None
    t2s = kinds[transfer.t2s](d, taps, transfer.projector_width or 2 * d)
    if transfer.t2s_grad_to == "student":
        t2s.requires_grad_(False)  # no gradient reaches it, and DDP must not wait for one
    return t2s
