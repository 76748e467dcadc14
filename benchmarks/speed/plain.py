"""A straightforward implementation of distilling three ViTs into one, which the library is compared with.

Every teacher is run in every step. An MLP per teacher at every block of the student predicts its class token, another
one its patches (as in UNIC, arXiv 2408.05088). Features are standardized by running statistics; the loss is cosine
and smooth-L1, the optimizer AdamW. Nothing is optimized for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ladder(nn.Module):
    """One teacher's projector: an MLP at every block, summed."""

    def __init__(self, blocks: int, d: int, hidden: int, width: int):
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(blocks)
        )

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        return torch.stack([mlp(x) for mlp, x in zip(self.mlps, blocks, strict=True)]).sum(0)


class Plain(nn.Module):
    """Student, teachers and projectors; :meth:`step` is one update.

    Args:
        student: a ViT of transformers; all of it is trained.
        teachers: ViTs of transformers, by name.
        hidden: width between the two layers of an MLP.
        bf16: run under autocast.
    """

    def __init__(self, student: Any, teachers: dict[str, Any], hidden: int, bf16: bool):
        super().__init__()
        self.student, self.bf16 = student, bf16
        self.teachers = nn.ModuleDict(teachers).eval().requires_grad_(False)
        depth, d = student.config.num_hidden_layers, student.config.hidden_size
        widths = {name: teacher.config.hidden_size for name, teacher in teachers.items()}
        self.cls = nn.ModuleDict({name: Ladder(depth, d, hidden, width) for name, width in widths.items()})
        self.patch = nn.ModuleDict({name: Ladder(depth, d, hidden, width) for name, width in widths.items()})
        for name, width in widths.items():
            for part in ("cls", "patch"):
                self.register_buffer(f"{name}_{part}_mean", torch.zeros(width))
                self.register_buffer(f"{name}_{part}_std", torch.ones(width))
        self.adamw = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    def step(self, images: Tensor) -> float:
        """Images (B, 3, h, w) -> the loss."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            student_features = self.student(images, output_hidden_states=True).hidden_states[1:]
            tokens = student_features[0].shape[1] - 1
            loss: Tensor = torch.zeros((), device=images.device)
            for name, teacher in self.teachers.items():
                with torch.no_grad():
                    teacher_features = teacher(images).last_hidden_state
                    cls = self.standardize(f"{name}_cls", teacher_features[:, 0].float())
                    patch = self.standardize(f"{name}_patch", to_grid(teacher_features[:, 1:].float(), tokens))
                loss = loss + distance(self.cls[name]([x[:, 0] for x in student_features]), cls)
                loss = loss + distance(self.patch[name]([x[:, 1:] for x in student_features]), patch)
            loss = loss / (2 * len(self.teachers))
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()
        return loss.item()

    def standardize(self, name: str, x: Tensor) -> Tensor:
        """(.., C) by running statistics, which it brings up to date."""
        mean, std = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_std")
        rows = x.flatten(0, -2)
        mean.lerp_(rows.mean(0), 0.01)
        std.lerp_(rows.std(0), 0.01)
        return (x - mean) / (std + 1e-6)


def to_grid(patches: Tensor, tokens: int) -> Tensor:
    """(B, N, C) on a square grid -> (B, tokens, C) on the student's."""
    if patches.shape[1] == tokens:
        return patches
    old, new = round(patches.shape[1] ** 0.5), round(tokens**0.5)
    maps = patches.transpose(1, 2).unflatten(2, (old, old))
    return F.interpolate(maps, (new, new), mode="bilinear").flatten(2).transpose(1, 2)


def distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Half cosine, half smooth-L1."""
    ours = ours.float()
    return 0.5 * (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean() + 0.5 * F.smooth_l1_loss(ours, theirs)
