"""A small dense head that finds objects: one box and one score a class at every place, and masks if asked for.

Boxes as in FCOS (arXiv 1904.01355), scores that say how well the box fits (arXiv 2006.04388), masks as sums of
prototypes (YOLACT, arXiv 1904.02689). Lengths are in *places* of twice the grid of the features, p of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, FINE_WIDTH = 128, 64
PROTOTYPES = 24
RADIUS = 1.5  # places; how far from the centre of an object a place may still answer for it
CANDIDATES = 300  # of an image, before those that overlap are dropped
FOUND = 100  # of an image
LOWEST_SCORE = 0.01
OVERLAP = 0.6  # IoU above which the lower of two boxes of a class is dropped


@dataclass(frozen=True)
class Answer:
    """What the head says of B images; p places, row-major.

    Args:
        scores: (B, p, K) logits.
        boxes: (B, p, 4) left, top, right, bottom in places.
        embeddings: (B, p, E), or None where no masks are asked for.
        prototypes: (B, E, 4 H, 4 W), or None.
    """

    scores: Tensor
    boxes: Tensor
    embeddings: Tensor | None = None
    prototypes: Tensor | None = None


class ObjectHead(nn.Module):
    """Features (B, C, H, W) to an `Answer` at 2 H x 2 W places.

    Args:
        width: C.
        n_classes: K.
        masks: whether to answer with embeddings and prototypes.
    """

    def __init__(self, width: int, n_classes: int, masks: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Conv2d(width, WIDTH, 1),
            *_block(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), WIDTH),
            *_block(nn.ConvTranspose2d(WIDTH, FINE_WIDTH, 2, stride=2), FINE_WIDTH),
            *_block(nn.Conv2d(FINE_WIDTH, FINE_WIDTH, 3, padding=1), FINE_WIDTH),
        )
        self.scores = _linear(n_classes, bias=-4.0)  # most places are background
        self.sides = _linear(4, bias=1.0)
        self.embeddings = nn.Conv2d(FINE_WIDTH, PROTOTYPES, 1) if masks else None
        self.prototypes = (
            nn.Sequential(
                *_block(nn.ConvTranspose2d(FINE_WIDTH, FINE_WIDTH // 2, 2, stride=2), FINE_WIDTH // 2),
                nn.Conv2d(FINE_WIDTH // 2, PROTOTYPES, 3, padding=1),
            )
            if masks
            else None
        )

    def forward(self, maps: Tensor) -> Answer:
        fine = self.trunk(maps)  # (B, 64, 2 H, 2 W)
        scores = self.scores(fine).flatten(2).transpose(1, 2)  # (B, p, K)
        sides = self.sides(fine).flatten(2).transpose(1, 2).clamp(max=6).exp()  # (B, p, 4)
        middle = centres((fine.shape[2], fine.shape[3]), fine.device)  # (p, 2)
        boxes = torch.cat([middle - sides[..., :2], middle + sides[..., 2:]], 2)
        if self.embeddings is None or self.prototypes is None:
            return Answer(scores, boxes)
        return Answer(scores, boxes, self.embeddings(fine).flatten(2).transpose(1, 2), self.prototypes(fine))


def _linear(answers: int, bias: float) -> nn.Module:
    layer = nn.Conv2d(FINE_WIDTH, answers, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.get_parameter("bias"), bias)
    return layer


def _block(layer: nn.Module, width: int) -> list[nn.Module]:
    return [layer, nn.GroupNorm(8, width), nn.ReLU()]


def centres(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(p, 2) x and y of the middle of each place."""
    y, x = torch.meshgrid(*(torch.arange(side, device=device) + 0.5 for side in grid), indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1)


def assign(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(p,) which of the boxes (n, 4) each place answers for, the smallest that claims it; -1 for none."""
    middle = centres(grid, boxes.device)  # (p, 2)
    if not len(boxes):
        return torch.full((len(middle),), -1, device=boxes.device)
    inside = ((middle > boxes[:, None, :2]) & (middle < boxes[:, None, 2:])).all(2)  # (n, p)
    away = (middle - (boxes[:, None, :2] + boxes[:, None, 2:]) / 2).abs().amax(2)  # (n, p)
    claims = inside & (away < RADIUS)
    claims[torch.arange(len(boxes)), away.argmin(1)] = True  # an object smaller than a place has one, too
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)  # (n,)
    smallest, owner = torch.where(claims, areas[:, None], torch.inf).min(0)
    return torch.where(smallest < torch.inf, owner, -1)


def ious(one: Tensor, other: Tensor, general: bool = False) -> Tensor:
    """IoU of boxes (..., 4) that can be broadcast; or the generalized one, from -1 to 1 (arXiv 1902.09630)."""

    def area(boxes: Tensor) -> Tensor:
        return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)

    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    shared = area(torch.cat([low, high], -1))
    union = (area(one) + area(other) - shared).clamp(min=1e-9)
    if not general:
        return shared / union
    low, high = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    around = area(torch.cat([low, high], -1)).clamp(min=1e-9)
    return shared / union - (around - union) / around


def nms(boxes: Tensor, scores: Tensor, classes: Tensor, overlap: float = OVERLAP) -> Tensor:
    """Positions to keep of (q, 4), (q,), (q,), the best first: none overlaps a better one of its class."""
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    alike = (ious(boxes[:, None], boxes) > overlap) & (classes[:, None] == classes)  # (q, q)
    keep = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for place in range(len(order)):
        if keep[place]:
            keep[place + 1 :] &= ~alike[place, place + 1 :]
    return order[keep]


@dataclass(frozen=True)
class Objects:
    """Objects of one image, the best first: classes, scores (q,), boxes (q, 4) in places, (q, 4 H, 4 W) logits."""

    classes: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor | None

    def take(self, rows: Tensor) -> Objects:
        """Some of them: (q,) bool."""
        masks = None if self.masks is None else self.masks[rows]
        return Objects(self.classes[rows], self.scores[rows], self.boxes[rows], masks)


def pick(answer: Answer, image: int) -> Objects:
    """The objects of one of the B images."""
    n_classes = answer.scores.shape[2]
    scores, order = answer.scores[image].sigmoid().flatten().sort(descending=True, stable=True)
    order = order[:CANDIDATES][scores[:CANDIDATES] > LOWEST_SCORE]
    scores, classes, places = scores[: len(order)], order % n_classes, order // n_classes
    boxes = answer.boxes[image, places]
    kept = nms(boxes.cpu(), scores.cpu(), classes.cpu()).to(boxes.device)[:FOUND]
    masks = None
    if answer.embeddings is not None and answer.prototypes is not None:
        masks = torch.einsum("qe,eyx->qyx", answer.embeddings[image, places[kept]], answer.prototypes[image])
    return Objects(classes[kept], scores[kept], boxes[kept], masks)


@dataclass(frozen=True)
class Target:
    """The objects of one image: classes (n,), boxes (n, 4) in places, crowd (n,), (n, 4 H, 4 W) bool or None."""

    classes: Tensor
    boxes: Tensor
    crowd: Tensor
    masks: Tensor | None


def losses(answer: Answer, targets: list[Target], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Terms ``score``, ``box`` and, with masks, ``mask``; ``grid`` is that of the places."""
    score, box, mask = [], [], []
    for image, target in enumerate(targets):
        single, groups = ~target.crowd, target.boxes[target.crowd]
        classes, boxes = target.classes[single], target.boxes[single]
        owner = assign(boxes, grid)  # (p,)
        at = (owner >= 0).nonzero()[:, 0]  # (m,) places that answer for an object
        truth = boxes[owner[at]]  # (m, 4)
        box.append(1 - ious(answer.boxes[image, at], truth, general=True))
        wanted = torch.zeros_like(answer.scores[image])  # (p, K)
        wanted[at, classes[owner[at]]] = ious(answer.boxes[image, at].detach(), truth)
        loss = quality_loss(answer.scores[image], wanted)  # (p, K)
        score.append(loss * ~(in_group(groups, grid) & (owner < 0))[:, None])
        if target.masks is not None and answer.embeddings is not None and answer.prototypes is not None:
            logits = torch.einsum("me,eyx->myx", answer.embeddings[image, at], answer.prototypes[image])
            mask.append(mask_loss(logits, target.masks[single][owner[at]], truth))  # (m,)
    answering = max(1, sum(len(part) for part in box))
    terms = {"score": torch.stack(score).sum() / answering, "box": torch.cat(box).sum() / answering}
    return terms | ({"mask": torch.cat(mask).sum() / answering} if mask else {})


def quality_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy with a wanted score in [0, 1], weighed by the squared miss (arXiv 2006.04388)."""
    miss = (logits.detach().sigmoid() - wanted).square()
    return miss * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def in_group(groups: Tensor, grid: tuple[int, int]) -> Tensor:
    """(p,) places inside one of the boxes (g, 4) of groups: what is found there is neither right nor wrong."""
    middle = centres(grid, groups.device)
    return ((middle > groups[:, None, :2]) & (middle < groups[:, None, 2:])).all(2).any(0)


def mask_loss(logits: Tensor, truth: Tensor, boxes: Tensor) -> Tensor:
    """(m,) cross entropy and Dice (arXiv 1606.04797) of (m, 4 H, 4 W) inside the boxes (m, 4), in places."""
    middle = centres((logits.shape[1], logits.shape[2]), logits.device) / 2  # mask pixels are half a place
    inside = ((middle > boxes[:, None, :2] - 0.5) & (middle < boxes[:, None, 2:] + 0.5)).all(2)  # (m, pixels)
    flat, wanted = logits.flatten(1), truth.flatten(1).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(flat, wanted, reduction="none") * inside
    chance = flat.sigmoid() * inside
    dice = 1 - (2 * (chance * wanted).sum(1) + 1) / (chance.sum(1) + (wanted * inside).sum(1) + 1)
    return entropy.sum(1) / inside.sum(1).clamp(min=1) + dice
