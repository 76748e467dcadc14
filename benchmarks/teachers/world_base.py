"""Train the small world's base: a small vision transformer, on scenes of all styles, no labels.

A transformer this small takes long to learn shapes by itself; a convolutional network does not. So a small
convolutional guide is trained first, with the objective of base.py, on tiles of scenes. Then the transformer is trained
to predict the guide's tokens and their mean, from a picture in other colours, with more noise and with some tokens left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import base
import common
import torch
import torch.nn.functional as F
import world_data
import world_views
from torch import Tensor, nn
from transformers import AutoModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from shoulders.world import CLASSES, SIZE, STYLES

PATCH, SCENES, WIDTH = 8, 6000, 128
GRID = SIZE // PATCH
TILE = 48  # px of a view of a tile
GUIDE_STEPS, STEPS, BATCH, TOKENS_KEPT = 600, 1800, 256, 64


def build_model() -> Dinov2Model:
    """Six layers, 128 wide, patches of 8 px, 96 px images."""
    return Dinov2Model(
        Dinov2Config(patch_size=PATCH, image_size=SIZE, hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=4)
    )


def build_guide() -> ResNetModel:
    """Two stages of basic blocks; one token of its map is 8 px, as in the transformer."""
    return ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=[64, WIDTH], depths=[1, 2], layer_type="basic"))


class GuideEncoder(nn.Module):
    """The guide as tokens (B, 1 + k, C): the mean of its map, and the tokens `keep` (B, k)."""

    def __init__(self, model: ResNetModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        tokens = self.model(images).last_hidden_state.flatten(2).transpose(1, 2)
        kept = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat([tokens.mean(1, keepdim=True), kept], 1)


def run_guide(guide: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return guide(images, keep).float()


class WindowEncoder(nn.Module):
    """The transformer on views that cover a window of its grid: CLS token and the tokens `keep`, (B, 1 + k, C)."""

    def __init__(self, model: Dinov2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, keep: Tensor, corner: Tensor) -> Tensor:
        """Views (B, 3, h, w), kept tokens of the window (B, k), its top left token in the grid (B, 2)."""
        embeddings, wide = self.model.embeddings, images.shape[3] // PATCH
        tokens = embeddings.patch_embeddings(images)
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        index = (keep // wide + corner[:, :1]) * GRID + keep % wide + corner[:, 1:]
        positions = embeddings.position_embeddings[0]
        summary = (embeddings.cls_token[0] + positions[:1]).expand(len(tokens), 1, -1)
        tokens = torch.cat([summary, tokens + positions[1 + index]], 1)
        return self.model.layernorm(self.model.encoder(tokens).last_hidden_state)


def tile_views(pixels: Tensor, step: int, generator: torch.Generator) -> base.Views:
    """Views of one tile of each scene, with all tokens."""
    tile = world_views.tiles(pixels, generator)
    views, spots = [], []
    for _ in range(base.VIEWS):
        frame = world_views.frames(tile, generator)
        views.append(common.normalize(world_views.recolour(world_views.render(pixels, frame, TILE), generator)))
        spots.append(world_views.spots(frame, TILE // PATCH))
    return base.Views(torch.cat(views), torch.stack(spots), all_tokens(base.VIEWS * len(pixels), TILE))


def all_tokens(count: int, side: int) -> Tensor:
    """The indices of all tokens of views `side` px wide (count, N)."""
    return torch.arange((side // PATCH) ** 2).expand(count, -1)


def train_on_guide(
    model: Dinov2Model, guide: GuideEncoder, images: Tensor, steps: int, work: Path, evaluate: Callable[[], None]
) -> float:
    """Train the transformer to predict the guide's tokens, of tiles and of scenes in turn; returns the minutes."""
    encoder, heads = WindowEncoder(model), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
    guide.eval()
    both = nn.ModuleDict({"model": model, "heads": heads})
    matrices = [weight for weight in both.parameters() if weight.ndim == 2 and min(weight.shape) > 1]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in both.parameters() if id(weight) not in chosen]
    optimizers = common.Optimizers(matrices, rest, lr=0.02, rest_lr=1e-3, decay=0.05)
    progress = common.Progress(work, steps, 20, {"model": both, "optimizers": optimizers})
    for step, batch in common.epoch_batches(len(images), BATCH, base.SEED, progress.start, steps):
        generator = torch.Generator().manual_seed(base.SEED * 10**6 + step)
        clean, keep, corner = one_view(images[batch], step % 2 == 1, generator)
        with torch.no_grad():
            targets = run_guide(guide, common.normalize(clean), keep)
        tokens = base.encode(encoder, common.normalize(world_views.recolour(clean, generator)), keep, corner)
        summary = F.mse_loss(heads[0](tokens[:, 0]), standard(targets[:, 0]))
        spatial = F.mse_loss(heads[1](tokens[:, 1:].flatten(0, 1)), standard(targets[:, 1:].flatten(0, 1)))
        (summary + spatial).backward()
        optimizers.step(base.hold_then_cool(step, steps))
        progress.line(step, summary=float(summary.detach()), spatial=float(spatial.detach()))
        if (step + 1) % 200 == 0:
            evaluate()
        progress.save(step, 100)
    return progress.minutes()


def one_view(pixels: Tensor, whole: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A view of each scene or of a tile of it in [0, 1] (B, 3, h, h), the tokens kept, and its corner in the grid."""
    count, side = len(pixels), SIZE if whole else TILE
    tile = world_views.whole(count) if whole else world_views.tiles(pixels, generator)
    keep = all_tokens(count, side)
    if whole:
        keep = torch.rand(keep.shape, generator=generator).argsort(1)[:, :TOKENS_KEPT]
    corner = torch.randint(GRID - side // PATCH + 1, (count, 2), generator=generator)
    return world_views.render(pixels, world_views.frames(tile, generator), side), keep, corner


def standard(values: Tensor) -> Tensor:
    """Mean 0 and deviation 1 of each channel over the batch."""
    return (values - values.mean(0)) / (values.std(0) + 1e-3)


def as_encoder(model: nn.Module, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function from whole scenes, uint8 (B, 3, H, W), to tokens (B, 1 + N, C), with the model in eval mode."""

    @torch.no_grad()
    def tokens(pixels: Tensor) -> Tensor:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            parts = [encode(common.render(part, SIZE, SIZE)).float() for part in pixels.split(250)]
        model.train()
        return torch.cat(parts)

    return tokens


def encode_with_base(model: Dinov2Model) -> Callable[[Tensor], Tensor]:
    return as_encoder(model, lambda images: model(pixel_values=images).last_hidden_state)


def encode_with_guide(guide: GuideEncoder) -> Callable[[Tensor], Tensor]:
    return as_encoder(guide, lambda images: guide(images, all_tokens(len(images), SIZE)))


def token_iou(train: Tensor, classes: Tensor, test: Tensor, test_classes: Tensor) -> float:
    """mIoU in percent of a linear map on tokens (n, C), whose class is that of most of their pixels."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-4)
    layer, kinds = nn.Linear(train.shape[1], 1 + len(CLASSES)), 1 + len(CLASSES)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        batch = torch.randint(len(train), (4096,), generator=generator)
        loss = F.cross_entropy(layer((train[batch] - mean) / deviation), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predictions = layer((test - mean) / deviation).argmax(1)
    table = torch.bincount(test_classes * kinds + predictions, minlength=kinds**2).view(kinds, kinds)
    both = table.diagonal()
    return 100 * float((both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean())


def token_classes(semantic: Tensor) -> Tensor:
    """Maps (B, H, W) to the class of most pixels of each token (B, N)."""
    pixels = F.one_hot(semantic.long(), 1 + len(CLASSES)).unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH))
    return pixels.sum((2, 4)).argmax(-1).flatten(1)


def measure(
    encode: Callable[[Tensor], Tensor], train_set: list[world_data.Scenes], test_set: list[world_data.Scenes]
) -> dict[str, float]:
    """Scores of probes on frozen tokens of all styles together, in percent: summaries by class, tokens by map."""
    sets = (train_set, test_set)
    train, test = (torch.cat([encode(part.images) for part in parts]) for parts in sets)
    labels, test_labels = (torch.cat([part.labels for part in parts]) for parts in sets)
    classes, test_classes = (torch.cat([token_classes(part.semantic) for part in parts]) for parts in sets)
    return {
        "k-NN": base.knn_top1(train[:, 0], labels, test[:, 0], test_labels),
        "linear": base.linear_top1(train[:, 0], labels, test[:, 0], test_labels),
        "linear on the mean of patch tokens": base.linear_top1(
            train[:, 1:].mean(1), labels, test[:, 1:].mean(1), test_labels
        ),
        "mIoU": token_iou(
            train[:, 1:].flatten(0, 1), classes.flatten(), test[:, 1:].flatten(0, 1), test_classes.flatten()
        ),
    }


def load(split: str, count: int, work: Path) -> list[world_data.Scenes]:
    return [world_data.load_scenes(style, split, count, work) for style in STYLES]


def train_world(out: Path, work: Path, steps: int | None = None) -> None:
    """Train and save the base in the folder `out`; its scratch state and its scenes are in `work`."""
    steps = steps or STEPS
    torch.manual_seed(base.SEED)
    images = torch.cat([part.images for part in load("train", SCENES, work)])
    # the labels of these are for evaluation alone
    probe_set, val_set = load("train", 750, work), load("val", 250, work)
    guide = GuideEncoder(build_guide().to(memory_format=torch.channels_last).train())

    def evaluate(encode: Callable[[Tensor], Tensor]) -> None:
        scores = measure(encode, probe_set, val_set)
        print("  ".join(f"{name} {value:.1f}" for name, value in scores.items()), flush=True)

    guide_minutes = base.train(
        guide,
        WIDTH,
        images,
        GUIDE_STEPS,
        work / "guide",
        tile_views,
        lambda: evaluate(encode_with_guide(guide)),
        0.5,
        run_guide,
        (2, 4),
    )
    model = build_model().train()
    model.set_attn_implementation("eager")  # faster than sdpa's backward on this CPU

    def evaluate_and_save() -> None:
        evaluate(encode_with_base(model))
        common.save_teacher(model, out, SIZE, SIZE, "ViTImageProcessor")

    minutes = guide_minutes + train_on_guide(model, guide, images, steps, work, evaluate_and_save)
    common.save_teacher(model, out, SIZE, SIZE, "ViTImageProcessor")
    saved = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    probe_set, test_set = load("train", 2000, work), load("test", 1000, work)
    torch.manual_seed(base.SEED)
    scores, chance = (measure(encode_with_base(each), probe_set, test_set) for each in (saved, build_model()))
    summary = ", ".join(f"{name} {scores[name]:.1f} (random weights {chance[name]:.1f})" for name in scores)
    entries = {
        "architecture": f"Dinov2Model, 6 layers, {WIDTH} wide, 4 heads, patches of {PATCH} px, {SIZE}x{SIZE} px, "
        f"grid {GRID}x{GRID}, {common.count_parameters(saved)} parameters",
        "data": f"{len(images):,} scenes of the small world, all styles ({', '.join(STYLES)}), no labels",
        "recipe": f"a convolutional guide (ResNet, {GUIDE_STEPS} steps of {base.BATCH} x {base.VIEWS} views of tiles, "
        "contrastive on summaries and patch tokens), then "
        f"{steps} steps of {BATCH} views, half of tiles, half of whole scenes, {TOKENS_KEPT} of {GRID**2} patch tokens "
        "kept, regressing the patch features of the guide and their mean; Muon on matrices, AdamW on the rest; bf16",
        "score": f"test split of all styles, frozen, in %: {summary}",
    }
    world_data.write_card(out, "base: a small vision transformer, no labels", minutes, base.SEED, entries)
    print(summary, flush=True)
