"""Train the small world's base: a small vision transformer, on scenes of all styles, no labels.

A transformer this small takes long to find shapes by itself; convolutions do not. So a small convolutional guide is
trained first, with the objective of base.py, on tiles of scenes. Then the transformer is trained to predict the
features of the guide, at each token and for the whole image, from an image in other colours, with more grain and with
tokens left out.
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
GUIDE_STEPS, STEPS, BATCH, WHOLE_KEEP = 600, 1800, 256, 64


def build_model() -> Dinov2Model:
    """Six layers, 128 wide, patches of 8 px, 96 px images."""
    return Dinov2Model(
        Dinov2Config(patch_size=PATCH, image_size=SIZE, hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=4)
    )


def build_guide() -> ResNetModel:
    """Two stages of basic blocks; one cell of its map is 8 px, as in the transformer."""
    return ResNetModel(ResNetConfig(embedding_size=32, hidden_sizes=[64, WIDTH], depths=[1, 2], layer_type="basic"))


class GuideEncoder(nn.Module):
    """The guide as tokens (B, 1 + k, C): the mean of its map, and the cells `keep` (B, k)."""

    def __init__(self, model: ResNetModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        cells = self.model(images).last_hidden_state.flatten(2).transpose(1, 2)
        kept = cells.gather(1, keep[..., None].expand(-1, -1, cells.shape[-1]))
        return torch.cat([cells.mean(1, keepdim=True), kept], 1)


def run_guide(guide: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return guide(images, keep).float()


class WindowEncoder(nn.Module):
    """The transformer on views that cover a window of its grid: CLS token and tokens `keep`, (B, 1 + k, C)."""

    def __init__(self, model: Dinov2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, keep: Tensor, corner: Tensor) -> Tensor:
        """Views (B, 3, h, w), kept tokens of the window (B, k), its top left cell in the grid (B, 2)."""
        embeddings, wide = self.model.embeddings, images.shape[3] // PATCH
        tokens = embeddings.patch_embeddings(images)
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        position = (keep // wide + corner[:, :1]) * GRID + keep % wide + corner[:, 1:]
        positions = embeddings.position_embeddings[0]
        summary = (embeddings.cls_token[0] + positions[:1]).expand(len(tokens), 1, -1)
        tokens = torch.cat([summary, tokens + positions[1 + position]], 1)
        return self.model.layernorm(self.model.encoder(tokens).last_hidden_state)


def look(pixels: Tensor, step: int, generator: torch.Generator) -> base.ViewBatch:
    """Views of one tile of each scene, all tokens kept."""
    tile = world_views.tiles(pixels, generator)
    views, points = [], []
    for _ in range(base.VIEWS):
        frame = world_views.frames(tile, generator)
        views.append(common.normalize(world_views.disguise(world_views.show(pixels, frame, TILE), generator)))
        points.append(world_views.token_points(frame, TILE // PATCH))
    return base.ViewBatch(torch.cat(views), torch.stack(points), all_tokens(base.VIEWS * len(pixels), TILE))


def all_tokens(count: int, side: int) -> Tensor:
    """Every token of views `side` px wide (count, N)."""
    return torch.arange((side // PATCH) ** 2).expand(count, -1)


def follow(
    model: Dinov2Model, guide: GuideEncoder, images: Tensor, steps: int, work: Path, watch: Callable[[], None]
) -> float:
    """Train the transformer to predict the guide's features of tiles and, in every other step, of scenes; minutes."""
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
            truth = run_guide(guide, common.normalize(clean), keep)
        tokens = base.encode(encoder, common.normalize(world_views.disguise(clean, generator)), keep, corner)
        summary = F.mse_loss(heads[0](tokens[:, 0]), standard(truth[:, 0]))
        spatial = F.mse_loss(heads[1](tokens[:, 1:].flatten(0, 1)), standard(truth[:, 1:].flatten(0, 1)))
        (summary + spatial).backward()
        optimizers.step(base.hold_then_cool(step, steps))
        progress.line(step, summary=float(summary.detach()), spatial=float(spatial.detach()))
        if (step + 1) % 200 == 0:
            watch()
        progress.save(step, 100)
    return progress.minutes()


def one_view(pixels: Tensor, whole: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A view of each scene or of a tile of it in [0, 1] (B, 3, h, h), the tokens kept, and its corner in the grid."""
    count, side = len(pixels), SIZE if whole else TILE
    tile = world_views.full_tiles(count) if whole else world_views.tiles(pixels, generator)
    keep = all_tokens(count, side)
    if whole:
        keep = torch.rand(keep.shape, generator=generator).argsort(1)[:, :WHOLE_KEEP]
    corner = torch.randint(GRID - side // PATCH + 1, (count, 2), generator=generator)
    return world_views.show(pixels, world_views.frames(tile, generator), side), keep, corner


def standard(values: Tensor) -> Tensor:
    """Mean 0 and deviation 1 of each channel over the batch."""
    return (values - values.mean(0)) / (values.std(0) + 1e-3)


def reader(model: nn.Module, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """From whole scenes, uint8 (B, 3, H, W), to tokens (B, 1 + N, C), in evaluation mode."""

    @torch.no_grad()
    def tokens(pixels: Tensor) -> Tensor:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            parts = [encode(common.render(part, SIZE, SIZE)).float() for part in pixels.split(250)]
        model.train()
        return torch.cat(parts)

    return tokens


def read_base(model: Dinov2Model) -> Callable[[Tensor], Tensor]:
    return reader(model, lambda images: model(pixel_values=images).last_hidden_state)


def read_guide(guide: GuideEncoder) -> Callable[[Tensor], Tensor]:
    return reader(guide, lambda images: guide(images, all_tokens(len(images), SIZE)))


def token_iou(train: Tensor, classes: Tensor, test: Tensor, truth: Tensor) -> float:
    """mIoU in percent over tokens (n, C) whose class is that of most of their pixels, of a linear map."""
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
    predicted = layer((test - mean) / deviation).argmax(1)
    table = torch.bincount(truth * kinds + predicted, minlength=kinds**2).view(kinds, kinds)
    both = table.diagonal()
    return 100 * float((both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean())


def token_classes(semantic: Tensor) -> Tensor:
    """Maps (B, H, W) to the class of most pixels of each token (B, N)."""
    shares = F.one_hot(semantic.long(), 1 + len(CLASSES)).unflatten(2, (GRID, PATCH)).unflatten(1, (GRID, PATCH))
    return shares.sum((2, 4)).argmax(-1).flatten(1)


def measure(
    encode: Callable[[Tensor], Tensor], train: list[world_data.Scenes], test: list[world_data.Scenes]
) -> dict[str, float]:
    """Probes of frozen tokens on all styles together, in percent: summaries by class, tokens by map."""
    tokens, test_tokens = (torch.cat([encode(part.images) for part in parts]) for parts in (train, test))
    labels, truth = (torch.cat([part.labels for part in parts]) for parts in (train, test))
    classes, test_classes = (torch.cat([token_classes(part.semantic) for part in parts]) for parts in (train, test))
    return {
        "k-NN": base.knn_top1(tokens[:, 0], labels, test_tokens[:, 0], truth),
        "linear": base.linear_top1(tokens[:, 0], labels, test_tokens[:, 0], truth),
        "linear on the mean of patch tokens": base.linear_top1(
            tokens[:, 1:].mean(1), labels, test_tokens[:, 1:].mean(1), truth
        ),
        "mIoU": token_iou(
            tokens[:, 1:].flatten(0, 1), classes.flatten(), test_tokens[:, 1:].flatten(0, 1), test_classes.flatten()
        ),
    }


def load(split: str, count: int, work: Path) -> list[world_data.Scenes]:
    return [world_data.load_scenes(style, split, count, work) for style in STYLES]


def train_world(out: Path, work: Path, steps: int | None = None) -> None:
    """Train and save the base in the folder `out`; its scratch state and its scenes lie in `work`."""
    steps = steps or STEPS
    torch.manual_seed(base.SEED)
    images = torch.cat([part.images for part in load("train", SCENES, work)])
    known, watched = (
        load("train", 750, work),
        load("val", 250, work),
    )  # labels are used for measuring, never for training
    guide = GuideEncoder(build_guide().to(memory_format=torch.channels_last).train())

    def watch(encode: Callable[[Tensor], Tensor]) -> None:
        print("  ".join(f"{name} {value:.1f}" for name, value in measure(encode, known, watched).items()), flush=True)

    guide_minutes = base.train(
        guide,
        WIDTH,
        images,
        GUIDE_STEPS,
        work / "guide",
        look,
        lambda: watch(read_guide(guide)),
        0.5,
        run_guide,
        (2, 4),
    )
    model = build_model().train()
    model.set_attn_implementation("eager")  # its backward pass is faster than that of sdpa

    def keep_and_watch() -> None:
        watch(read_base(model))
        common.save_teacher(model, out, SIZE, SIZE, "ViTImageProcessor")

    minutes = guide_minutes + follow(model, guide, images, steps, work, keep_and_watch)
    common.save_teacher(model, out, SIZE, SIZE, "ViTImageProcessor")
    saved = AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    train_scenes, test_scenes = load("train", 2000, work), load("test", 1000, work)
    torch.manual_seed(base.SEED)
    scores, chance = (measure(read_base(each), train_scenes, test_scenes) for each in (saved, build_model()))
    score_text = ", ".join(f"{name} {scores[name]:.1f} (random weights {chance[name]:.1f})" for name in scores)
    card = {
        "architecture": f"Dinov2Model, 6 layers, {WIDTH} wide, 4 heads, patches of {PATCH} px, {SIZE}x{SIZE} px, "
        f"grid {GRID}x{GRID}, {common.count_parameters(saved)} parameters",
        "data": f"{len(images):,} scenes of the small world, all styles ({', '.join(STYLES)}), no labels",
        "recipe": f"a convolutional guide (ResNet, {GUIDE_STEPS} steps of {base.BATCH} x {base.VIEWS} views of tiles, "
        "contrastive on summaries and patch tokens), then "
        f"{steps} steps of {BATCH} views, half of tiles, half of whole scenes, {WHOLE_KEEP} of {GRID**2} patch tokens "
        "kept, regressing the patch features of the guide and their mean; Muon on matrices, AdamW on the rest; bf16",
        "score": f"test split of all styles, frozen, in %: {score_text}",
    }
    world_data.write_card(out, "base: a small vision transformer, no labels", minutes, base.SEED, card)
    print(score_text, flush=True)
