"""Shared code of the two instance segmenters: model, set loss, loop, detections; and training for the small world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
import world_data
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import (
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    ResNetConfig,
)

from shoulders.tasks.average_precision import Detections, Matches, average_precision, interval, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations, encode
from shoulders.world import CLASSES, SIZE

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, H, W), classes (B, n) with -1 for none, covered (B, n, h, w)

STYLE, SCENES, STEPS, BATCH, SEED = "ink", 12_000, 2000, 32, 0
MAX_OBJECTS = 6  # in a scene
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT, NO_OBJECT = 2.0, 5.0, 5.0, 0.1
BY_ADAMW = ("class_predictor", "queries_", "level_embed", "sampling_offsets", "attention_weights")


def build_model(classes: Sequence[str]) -> Mask2FormerForUniversalSegmentation:
    """A small Mask2Former: a ResNet of 4 stages, one deformable layer, 3 decoder layers, masks at stride 4."""
    names = dict(enumerate(classes))
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 64, 96, 128],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=1,
        encoder_feedforward_dim=128,
        decoder_layers=4,  # the first of them is the bare queries
        dim_feedforward=256,
        num_attention_heads=4,
        num_queries=16,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # the family's initial value, 0.02, is meant for a pretrained backbone
    return model


def split_weights(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and convolutions for Muon; class layer, queries, sampling, norms and biases for AdamW."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim >= 2 and not any(part in name for part in BY_ADAMW)]
    chosen = {id(weight) for weight in matrices}
    return matrices, [weight for _, weight in named if id(weight) not in chosen]


def predict(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (L, B, Q, K + 1) and mask logits (L, B, Q, h, w) after each decoder layer."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values=images, output_auxiliary_logits=True)
    layers = [*output.auxiliary_logits, output]
    classes = torch.stack([layer["class_queries_logits"] for layer in layers])
    masks = torch.stack([layer["masks_queries_logits"] for layer in layers])
    return classes.float(), masks.float()


@torch.no_grad()
def assign(classes: Tensor, masks: Tensor, labels: Tensor, covered: Tensor) -> Tensor:
    """The query of each object at the least total cost (Cheng et al., Mask2Former, 2022), over all pixels of the masks.

    Args:
        classes: (L, B, Q, K + 1) logits.
        masks: (L, B, Q, h, w) logits.
        labels: (B, n) classes, -1 for none.
        covered: (B, n, h, w) fraction of each mask pixel that an object covers.

    Returns:
        (L, B, n) query indices, 0 where there is no object.
    """
    logits, truth = masks.flatten(3), covered.flatten(2).transpose(1, 2)  # (L, B, Q, N), (B, N, n)
    inside = logits.sigmoid()
    area = inside.sum(-1)[..., None] + truth.sum(1)[:, None]  # (L, B, Q, n)
    dice = 1 - (2 * inside @ truth + 1) / (area + 1)
    entropy = (F.softplus(logits).sum(-1)[..., None] - logits @ truth) / logits.shape[-1]
    kind = labels.clamp(min=0)[None, :, None].expand(*dice.shape)
    likely = classes.softmax(-1).gather(-1, kind)
    costs = (DICE_WEIGHT * dice + MASK_WEIGHT * entropy - CLASS_WEIGHT * likely).numpy()
    counts, queries = (labels >= 0).sum(1).tolist(), np.zeros((len(classes), *labels.shape), dtype=np.int64)
    for layer, image in np.ndindex(*costs.shape[:2]):
        query, obj = linear_sum_assignment(costs[layer, image, :, : counts[image]])
        queries[layer, image, obj] = query
    return torch.from_numpy(queries)


def set_loss(classes: Tensor, masks: Tensor, labels: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the classes and of the masks, summed over the decoder layers.

    `covered` may be finer than the mask logits, which are then upsampled as in `to_detections`.
    """
    layers = len(classes)
    query = assign(classes, masks, labels, F.interpolate(covered, size=masks.shape[-2:], mode="area"))
    layer, image, obj = (labels >= 0).expand(layers, *labels.shape).nonzero(as_tuple=True)  # (M,) each
    chosen = query[layer, image, obj]
    targets = torch.full(classes.shape[:3], classes.shape[-1] - 1)
    targets[layer, image, chosen] = labels[image, obj]
    weight = torch.ones(classes.shape[-1])
    weight[-1] = NO_OBJECT
    class_loss = F.cross_entropy(classes.flatten(0, 2), targets.flatten(), weight)
    logits = masks[layer, image, chosen][:, None]
    logits = F.interpolate(logits, size=covered.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    truth, inside = covered[image, obj].flatten(1), logits.sigmoid()  # (M, h * w)
    dice = 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    mask_loss = (MASK_WEIGHT * entropy + DICE_WEIGHT * dice).mean()
    return layers * CLASS_WEIGHT * class_loss, layers * mask_loss


def train(
    model: nn.Module,
    count: int,
    batch: int,
    steps: int,
    work: Path,
    make: Callable[[Tensor, torch.Generator], Batch],
    score: Callable[[], float],
    best: common.Best,
    lr: float = 0.01,
) -> float:
    """Train in place on batches that `make` builds from shuffled indices below `count`; returns the minutes spent."""
    optimizers = common.Optimizers(*split_weights(model), lr=lr, rest_lr=lr / 10, decay=0.05)
    progress = common.Progress(work, steps, 50, {"model": model, "optimizers": optimizers, "best": best})
    for step, index in common.epoch_batches(count, batch, SEED, progress.start, steps):
        images, labels, covered = make(index, torch.Generator().manual_seed(SEED * 10**6 + step))
        class_loss, mask_loss = set_loss(*predict(model, images), labels, covered)
        (class_loss + mask_loss).backward()
        optimizers.step(common.one_cycle(step, steps, warmup=0.1))
        progress.line(step, classes=float(class_loss.detach()), masks=float(mask_loss.detach()))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            value = score()
            print(f"val mask AP {value:.3f}", flush=True)
            best.update(value)
        progress.save(step, 250)
    return progress.minutes()


def to_detections(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> Detections:
    """The objects of one image of `size` (H, W), of class logits (Q, K + 1) and mask logits (Q, h, w).

    As in the family's image processor: the Q best pairs of query and class; the score is the
    probability of the class times the mean probability of the mask's pixels. Boxes are tight around the masks.
    """
    likely = classes.float().softmax(-1)[:, :-1]
    best, at = likely.flatten().topk(len(likely))
    logits = F.interpolate(masks.float()[None], size=size, mode="bilinear", align_corners=False)[0]
    inside = logits > 0  # (Q, H, W)
    sure = (logits.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    query = at // likely.shape[1]
    present = inside.any(2).any(1)[query]
    query, kinds, scores = query[present], (at % likely.shape[1])[present], (best * sure[query])[present]
    return Detections(kinds.numpy(), scores.double().numpy(), tight(inside[query]), encode(inside[query].numpy()))


def tight(masks: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Left, top, right, bottom (n, 4) of masks (n, H, W), right and bottom exclusive."""
    sides = []
    for line in (masks.any(1).byte(), masks.any(2).byte()):  # (n, W), (n, H)
        sides.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).double().numpy()


@torch.no_grad()
def detect(model: PreTrainedModel, pixels: Sequence[Tensor], size: tuple[int, int], part: int = 50) -> list[Detections]:
    """The objects of images (3, H, W) uint8 of any size, each resized to `size` (H, W) px for the model."""
    model.eval()
    detections = []
    for start in range(0, len(pixels), part):
        these = pixels[start : start + part]
        output = model(pixel_values=torch.cat([common.render(image[None], *size) for image in these]))
        for image, classes, masks in zip(these, output.class_queries_logits, output.masks_queries_logits, strict=True):
            detections.append(to_detections(classes, masks, (image.shape[1], image.shape[2])))
    model.train()
    return detections


def to_pictures(scenes: world_data.Scenes) -> list[AnnotatedImage]:
    """Scenes as annotated images."""
    pictures = []
    for index, (classes, boxes) in enumerate(zip(scenes.each_classes(), scenes.each_boxes(), strict=True)):
        masks = scenes.masks(index).numpy()
        areas, crowd = masks.sum((1, 2)).astype(np.float64), np.zeros(len(masks), dtype=bool)
        corners = boxes.double().numpy()
        pictures.append(
            AnnotatedImage(f"{index}.png", (SIZE, SIZE), classes.numpy(), corners, areas, crowd, encode(masks))
        )
    return pictures


def pad(classes: Sequence[Tensor], most: int) -> Tensor:
    """Classes (n,) of each image as one table (B, most), -1 past the last."""
    return torch.stack([F.pad(each, (0, most - len(each)), value=-1) for each in classes])


def to_covered(owner: Tensor, most: int) -> Tensor:
    """Maps (B, H, W), 0 background, i + 1 where object i is visible, to fractions (B, most, H / 2, W / 2)."""
    numbers = torch.arange(1, most + 1)[:, None, None]
    return F.avg_pool2d((owner[:, None] == numbers).float(), 2)


def turn(pixels: Tensor, owner: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of the eight flips and quarter turns of a batch and its maps."""
    across, down, swap = torch.randint(2, (3,), generator=generator).tolist()
    flips = [-1] * across + [-2] * down
    pixels, owner = pixels.flip(flips), owner.flip(flips)
    return (pixels.mT, owner.mT) if swap else (pixels, owner)


def train_world(out: Path, work: Path, steps: int | None = None) -> None:
    """Train and save the small world's instance segmenter in the folder `out`; its scratch state is in `work`."""
    steps = steps or STEPS
    torch.manual_seed(SEED)
    model = build_model(CLASSES).train()
    train_set, val_set, test_set = (
        world_data.load_scenes(STYLE, split, count, work)
        for split, count in (("train", SCENES), ("val", 300), ("test", 1000))
    )
    classes = pad(train_set.each_classes(), MAX_OBJECTS)

    def make(index: Tensor, generator: torch.Generator) -> Batch:
        pixels, owner = turn(train_set.images[index], train_set.instances[index], generator)
        return common.normalize(pixels.float() / 255), classes[index], to_covered(owner, MAX_OBJECTS)

    def matched(model: PreTrainedModel, scenes: world_data.Scenes) -> Matches:
        truth = Annotations(CLASSES, tuple(to_pictures(scenes)))
        return match(truth, detect(model, list(scenes.images), (SIZE, SIZE)), "masks")

    minutes = train(
        model,
        len(train_set),
        BATCH,
        steps,
        work,
        make,
        lambda: average_precision(matched(model, val_set))["AP"],
        common.Best(lambda: common.save_teacher(model, out, SIZE, SIZE, "Mask2FormerImageProcessor")),
    )
    saved = AutoModelForUniversalSegmentation.from_pretrained(out, dtype=torch.float32)
    result = matched(saved, test_set)
    scores, (low, high) = average_precision(result), interval(result)
    summary = f"{scores['AP']:.3f} mask AP (95 % of resamplings {low:.3f} to {high:.3f}), AP50 {scores['AP50']:.3f}"
    entries = {
        "architecture": f"{describe(saved)}, {SIZE}x{SIZE} px",
        "data": f"{len(train_set):,} scenes of the small world, style {STYLE}, with the masks of their objects",
        "recipe": f"{steps} steps, batch {BATCH}, Muon on matrices and convolutions, AdamW on the rest, one cycle; "
        "quarter turns, flips; set loss over whole masks; bf16 autocast; the best weights on 300 other scenes are "
        "selected",
        "score": f"{summary}, on {len(test_set):,} scenes of the test split (COCO AP over IoU .50 to .95, "
        f"{len(CLASSES)} classes)",
    }
    world_data.write_card(out, "instances: a small Mask2Former, ten shapes", minutes, SEED, entries)
    print(f"test {summary}", flush=True)


def describe(model: PreTrainedModel) -> str:
    """The architecture in words, for the card."""
    config = model.config
    widths = "/".join(map(str, config.backbone_config.hidden_sizes))
    return (
        f"{type(model).__name__} on a ResNet {widths} wide, {config.hidden_dim} wide, {config.num_queries} queries, "
        f"{config.decoder_layers - 1} decoder layers, masks at stride 4, {common.count_parameters(model)} parameters"
    )
