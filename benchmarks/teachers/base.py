"""Train the general-purpose base: a small DINOv2-shaped vision transformer, self-supervised, no labels.

Several cheap views are made of each image (random crop, flip, colours, most tokens left out). A contrastive loss on
summaries separates the views of an image from those of all other images (SimCLR, Chen et al. 2020, with several
views); another on patch tokens separates tokens of two views that show the same spot from all other tokens (DenseCL,
Wang et al. 2021).

    python benchmarks/teachers/base.py --data DATA --out benchmarks/teachers/base
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from base_views import GRID, PATCH, SIZE, load_images, make_views
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, Dinov2Config, Dinov2Model

VIEWS, BATCH, SEED = 4, 128, 0


@dataclass(frozen=True)
class Views:
    """The input of one step: V views of B images, view by view.

    Args:
        images: (V*B, 3, h, w), normalized.
        spots: (V, B, N, 2), the position in the image that each token shows, in coordinates from -1 to 1.
        keep: (V*B, k), indices of the tokens that are kept.
        more: further inputs of the encoder.
    """

    images: Tensor
    spots: Tensor
    keep: Tensor
    more: tuple[Tensor, ...] = ()


def build_model() -> Dinov2Model:
    """Six layers, 192 wide, patches of 8 px, 64 px images."""
    return Dinov2Model(
        Dinov2Config(patch_size=PATCH, image_size=SIZE, hidden_size=192, num_hidden_layers=6, num_attention_heads=3)
    )


class Heads(nn.Module):
    """Projectors used in training only: one for summaries, one for patch tokens."""

    def __init__(self, width: int, hidden: int = 1024, latent: int = 128) -> None:
        super().__init__()
        self.summary = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, latent, bias=False),
            nn.BatchNorm1d(latent, affine=False),
        )
        self.spatial = nn.Sequential(
            nn.Linear(width, hidden // 2, bias=False),
            nn.BatchNorm1d(hidden // 2),
            nn.ReLU(),
            nn.Linear(hidden // 2, latent, bias=False),
        )


class Encoder(nn.Module):
    """The model on the CLS token and the patch tokens `keep` (B, k) alone: tokens (B, 1 + k, C)."""

    def __init__(self, model: Dinov2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        tokens = self.model.embeddings(images)
        index = torch.cat([torch.zeros(len(keep), 1, dtype=torch.long), keep + 1], 1)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
        return self.model.layernorm(self.model.encoder(tokens).last_hidden_state)


def encode(encoder: nn.Module, *inputs: Tensor) -> Tensor:
    """Run in bf16 throughout, on a bf16 copy of the fp32 weights: 1.5 times as fast as autocast on this CPU."""
    weights = {name: weight.bfloat16() for name, weight in encoder.named_parameters()}
    images, *more = inputs
    return functional_call(encoder, weights, (images.bfloat16(), *more)).float()


def summary_term(latent: Tensor, views: int, temperature: float) -> Tensor:
    """Cross entropy of identifying the other views of an image among all views; latent (V*B, D), view by view."""
    unit = F.normalize(latent, dim=1)
    logits = unit @ unit.T / temperature
    count = len(latent)
    same = torch.arange(count) % (count // views)
    itself = torch.eye(count, dtype=torch.bool)
    positive = (same[:, None] == same) & ~itself
    others = logits.masked_fill(positive | itself, -torch.inf).logsumexp(1, keepdim=True)
    # each positive competes with the negatives alone, not with the other positives
    return (torch.logaddexp(logits, others) - logits)[positive].mean()


def matching_tokens(
    spots: Tensor, other: Tensor, keep: Tensor, limit: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Flat indices of pairs of kept tokens of two views that show the same spot, `limit` of them at random."""
    first = spots.gather(1, keep[0][..., None].expand(-1, -1, 2))
    second = other.gather(1, keep[1][..., None].expand(-1, -1, 2))
    distance, nearest = torch.cdist(first, second).min(2)  # (B, k)
    close = (distance < 0.6 / GRID).flatten().nonzero()[:, 0]
    close = close[torch.randperm(len(close), generator=generator)[:limit]]
    partner = nearest + torch.arange(len(nearest))[:, None] * second.shape[1]
    return close, partner.flatten()[close]


def spatial_term(
    head: nn.Module,
    tokens: Tensor,
    spots: Tensor,
    keep: Tensor,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Cross entropy of identifying the tokens of view 2i + 1 that show the same spot as those of view 2i, and back."""
    views = len(tokens)
    losses = []
    for first in range(0, views, 2):
        i, j = matching_tokens(spots[first], spots[first + 1], keep[first : first + 2], 768, generator)
        a = F.normalize(head(tokens[first].flatten(0, 1)[i]).float(), dim=1)
        b = F.normalize(head(tokens[first + 1].flatten(0, 1)[j]).float(), dim=1)
        logits = a @ b.T / temperature
        target = torch.arange(len(logits))
        losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


@torch.no_grad()
def summaries(model: nn.Module, pixels: Tensor, side: int = SIZE) -> Tensor:
    """The summary (B, C) of each image, rendered as at inference."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [model(pixel_values=common.render(part, side, side)).pooler_output for part in pixels.split(500)]
    return torch.cat(parts).float()


def knn_top1(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20) -> float:
    """Top-1 in percent by the k nearest training summaries (n, C), votes weighted by exp(cosine / 0.07)."""
    bank, hits = F.normalize(train, dim=1), 0
    for part, part_labels in zip(F.normalize(test, dim=1).split(1000), test_labels.split(1000), strict=True):
        close, index = (part @ bank.T).topk(k)
        votes = torch.zeros(len(part), int(labels.max()) + 1).scatter_add_(1, labels[index], (close / 0.07).exp())
        hits += int((votes.argmax(1) == part_labels).sum())
    return 100 * hits / len(test_labels)


def linear_top1(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Top-1 in percent of a linear map fitted on frozen, standardized summaries (L-BFGS, light decay)."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-4)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    layer = nn.Linear(train.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), labels) + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return 100 * float((layer(test).argmax(1) == test_labels).float().mean())


def hold_then_cool(step: int, steps: int, warmup: int = 100, cool: float = 0.4) -> float:
    """Factor of the peak learning rate: up, constant, then linearly to zero over the last `cool` of the run.

    The constant part does not depend on `steps`, so a run may be resumed with another length before it cools.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (cool * steps))


def take_views(pixels: Tensor, keep_tokens: int, generator: torch.Generator) -> Views:
    """Views of uint8 images (B, 3, 64, 64), each with `keep_tokens` tokens at random."""
    pairs = [make_views(pixels, generator) for _ in range(VIEWS)]
    keep = torch.rand(VIEWS * len(pixels), GRID**2, generator=generator).argsort(1)[:, :keep_tokens]
    return Views(torch.cat([view for view, _ in pairs]), torch.stack([spots for _, spots in pairs]), keep)


def train(
    encoder: nn.Module,
    width: int,
    images: Tensor,
    steps: int,
    work: Path,
    make: Callable[[Tensor, int, torch.Generator], Views],
    evaluate: Callable[[], None],
    spatial_weight: float = 0.3,
    run: Callable[..., Tensor] = encode,
    matrix_dims: tuple[int, ...] = (2,),
) -> float:
    """Train an encoder (images, kept tokens, ...) -> tokens (B, 1 + k, width) in place; returns the minutes spent."""
    heads = Heads(width)
    both = nn.ModuleDict({"model": encoder.get_submodule("model"), "heads": heads})
    matrices = [
        weight for weight in both.parameters() if weight.ndim in matrix_dims and min(weight.flatten(1).shape) > 1
    ]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in both.parameters() if id(weight) not in chosen]
    optimizers = common.Optimizers(matrices, rest, lr=0.02, rest_lr=1e-3, decay=0.05)
    progress = common.Progress(work, steps, 20, {"model": both, "optimizers": optimizers})
    for step, batch in common.epoch_batches(len(images), BATCH, SEED, progress.start, steps):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        views = make(images[batch], step, generator)
        tokens = run(encoder, views.images, views.keep, *views.more)
        shape = views.spots.shape[:2]
        with torch.autocast("cpu", torch.bfloat16):
            summary = summary_term(heads.summary(tokens[:, 0]).float(), shape[0], 0.2)
            spatial = spatial_term(
                heads.spatial,
                tokens[:, 1:].unflatten(0, shape),
                views.spots,
                views.keep.unflatten(0, shape),
                0.2,
                generator,
            )
        (summary + spatial_weight * spatial).backward()
        optimizers.step(hold_then_cool(step, steps))
        progress.line(step, summary=float(summary.detach()), spatial=float(spatial.detach()))
        if (step + 1) % 100 == 0:
            evaluate()
        progress.save(step, 100)
    return progress.minutes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/teachers/base"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--keep", type=int, default=24, help="tokens of 64 that each view keeps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = build_model().train()
    images = load_images(args.data, SEED)
    pixels, labels = common.load_cifar10(args.data, "train")  # the labels are for evaluation alone

    def make(images: Tensor, step: int, generator: torch.Generator) -> Views:
        return take_views(images, args.keep, generator)

    def evaluate() -> None:
        features = summaries(model, pixels[:4000])
        score = knn_top1(features[:3000], labels[:3000], features[3000:], labels[3000:4000])
        print(f"k-NN top-1 with 3,000 neighbours {score:.1f} %", flush=True)

    model.set_attn_implementation("eager")  # twice as fast as sdpa's backward on so few tokens
    minutes = train(Encoder(model), model.config.hidden_size, images, args.steps, args.work, make, evaluate)
    common.save_teacher(model, args.out, SIZE, SIZE, "ViTImageProcessor")
    saved = AutoModel.from_pretrained(args.out, dtype=torch.float32).eval()
    test_pixels, test_labels = common.load_cifar10(args.data, "test")
    features = summaries(saved, pixels), labels, summaries(saved, test_pixels), test_labels
    knn, linear = knn_top1(*features), linear_top1(*features)
    entries = {
        "architecture": f"Dinov2Model, 6 layers, 192 wide, 3 heads, patches of {PATCH} px, {SIZE}x{SIZE} px, "
        f"grid {GRID}x{GRID}, {common.count_parameters(saved)} parameters",
        "data": f"{len(images):,} images, no labels: CIFAR-10 train (50,000), random boxes of CamVid train, "
        "BCCD train, Penn-Fudan train and 1,000 photos",
        "recipe": f"{args.steps} steps of {BATCH} images x {VIEWS} views, {args.keep} of {GRID**2} tokens "
        "kept; contrastive on summaries and (weight 0.3) on matching tokens; Muon on matrices, AdamW on the "
        "rest; bf16",
        "score": "CIFAR-10 test top-1 on frozen summaries (the last CLS token): linear probe "
        f"{linear:.2f} %, k-NN (k = 20) {knn:.2f} %",
    }
    terms = (
        "CIFAR-10 (Krizhevsky 2009), CamVid (Brostow 2008), Penn-Fudan (Wang 2007) and the photos (ImageNet "
        "samples) are distributed for research, BCCD under MIT"
    )
    common.write_card(args.out, "base: a small vision transformer, no labels", minutes, SEED, terms, entries)
    print(f"test: linear probe {linear:.2f} %, k-NN {knn:.2f} %", flush=True)


if __name__ == "__main__":
    main()
