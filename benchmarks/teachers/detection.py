"""Shared code of the two detectors: a small RT-DETR v2 (arXiv 2407.17140), its training and its detections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import world_data
from detection_loss import detection_loss, to_centre, to_corners
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

from shoulders.tasks.average_precision import Detections, average_precision, interval, match
from shoulders.tasks.data.coco import AnnotatedImage, Annotations
from shoulders.world import CLASSES, SIZE

STYLE, SCENES, STEPS, BATCH, SEED = "neon", 12_000, 3000, 32, 0
PROCESSOR = "RTDetrImageProcessor"

BACKBONE: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 112],  # strides 4, 8, 16
    "depths": [1, 2, 2],
    "layer_type": "basic",
    "out_indices": [2, 3],
}
SHAPE: dict[str, Any] = {
    "freeze_backbone_batch_norms": False,
    "encoder_hidden_dim": 96,
    "encoder_in_channels": [64, 112],
    "decoder_in_channels": [96, 96],
    "feat_strides": [8, 16],
    "encode_proj_layers": [1],
    "encoder_ffn_dim": 192,
    "encoder_attention_heads": 6,
    "hidden_expansion": 0.5,
    "d_model": 96,
    "decoder_ffn_dim": 192,
    "num_feature_levels": 2,
    "decoder_n_levels": 2,
    "decoder_layers": 3,
    "decoder_attention_heads": 6,
    "num_queries": 24,
    "num_denoising": 12,
}
BY_ADAMW = ("sampling_offsets", "attention_weights", "class_embed", "score_head", "denoising", "embedder.0.", "bbox")


@dataclass(frozen=True)
class Labelled:
    """B images and their objects, padded to the most objects M that one of them has.

    Args:
        pixels: uint8 (B, 3, H, W).
        classes: int64 (B, M), -1 past the last object.
        boxes: float32 (B, M, 4), left, top, right, bottom in fractions of the image.
    """

    pixels: Tensor
    classes: Tensor
    boxes: Tensor


def build_model(classes: list[str], **changes: Any) -> RTDetrV2ForObjectDetection:
    """RT-DETR v2 of 1.4 M parameters on maps at strides 8 and 16; `changes` to its configuration."""
    names = dict(enumerate(classes))
    config = RTDetrV2Config(
        backbone_config=RTDetrResNetConfig(**BACKBONE),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        **{**SHAPE, **changes},
    )
    model = RTDetrV2ForObjectDetection(config)
    heads = model.model.decoder
    model.class_embed, model.bbox_embed = heads.class_embed, heads.bbox_embed  # the family keeps an unused copy
    start_weights(model)
    return model


@torch.no_grad()
def start_weights(model: RTDetrV2ForObjectDetection) -> None:
    """Usual initial values: those of the family are for a pretrained backbone, with norms near zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and not any(part in name for part in BY_ADAMW):
            nn.init.xavier_uniform_(module.weight)
    for head in (model.model.enc_bbox_head, *model.model.decoder.bbox_embed):
        for layer in head.layers[:-1]:
            nn.init.xavier_uniform_(layer.weight)
    last = model.model.enc_bbox_head.layers[-1]
    nn.init.zeros_(last.weight)
    last.bias.copy_(torch.tensor([0.0, 0.0, 1.7, 1.7]))  # anchors of a fifth of the image instead of a twentieth


def split_weights(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and convolutions for Muon; heads, offsets, first layer, norms and biases for AdamW."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim > 1 and not any(part in name for part in BY_ADAMW)]
    chosen = {id(weight) for weight in matrices}
    return matrices, [weight for _, weight in named if id(weight) not in chosen]


def forward(model: RTDetrV2ForObjectDetection, images: Tensor, classes: Tensor, truth: Tensor) -> Any:
    """The model's own forward in training, maps in bf16, queries and boxes in fp32."""
    core = model.model
    with torch.autocast("cpu", torch.bfloat16):
        stages = core.backbone.model(images.contiguous(memory_format=torch.channels_last)).feature_maps
        levels = [project(stage) for project, stage in zip(core.encoder_input_proj, stages, strict=True)]
        maps = [level.float() for level in core.encoder(levels).last_hidden_state]
    real = classes >= 0
    labels = [{"class_labels": c[r], "boxes": b[r]} for c, b, r in zip(classes, truth, real, strict=True)]
    return core(None, inputs_embeds=maps[0], encoder_outputs=(maps,), labels=labels)


def train(
    model: RTDetrV2ForObjectDetection,
    train_set: Labelled,
    steps: int,
    batch_size: int,
    lr: float,
    anchors: int,
    work: Path,
    view: Callable[[Labelled, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]],
    evaluate: Callable[[], float],
    best: common.Best,
) -> float:
    """Train in place; returns the minutes spent.

    Args:
        anchors: how many anchors of the encoder are assigned to each object.
        view: (training set, indices, generator) -> images, classes and boxes of a batch.
        evaluate: computes the AP, every 500 steps.
    """
    optimizers = common.Optimizers(*split_weights(model), lr=lr, rest_lr=lr / 10, decay=0.02)
    progress = common.Progress(work, steps, 50, {"model": model, "optimizers": optimizers, "best": best})
    for step, batch in common.epoch_batches(len(train_set.pixels), batch_size, SEED, progress.start, steps):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        torch.manual_seed(SEED * 10**6 + step)  # noise of the denoising queries
        images, classes, boxes = view(train_set, batch, generator)
        truth = to_centre(boxes)
        loss = detection_loss(forward(model, images, classes, truth), classes, truth, anchors)
        loss.backward()
        optimizers.step(common.one_cycle(step, steps, warmup=0.1))
        progress.line(step, loss=float(loss.detach()))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            score = evaluate()
            print(f"val AP {score:.3f}", flush=True)
            best.update(score)
        progress.save(step, 500)
    return progress.minutes()


@torch.no_grad()
def detect(model: nn.Module, pixels: Tensor, height: int, width: int) -> list[Detections]:
    """The Q best pairs of query and class in each of the images uint8 (B, 3, H, W), boxes in their px."""
    model.eval()
    scale = torch.tensor([pixels.shape[3], pixels.shape[2]]).repeat(2)
    detections = []
    for part in pixels.split(50):
        output = model(pixel_values=common.render(part, height, width))
        queries, kinds = output.logits.shape[1:]
        scores, flat = output.logits.sigmoid().flatten(1).topk(queries)
        boxes = to_corners(output.pred_boxes).gather(1, (flat // kinds)[..., None].expand(-1, -1, 4)) * scale
        for each in zip(flat % kinds, scores.double(), boxes.double(), strict=True):
            detections.append(Detections(*(part.numpy() for part in each)))
    model.train()
    return detections


def scene_objects(scenes: world_data.Scenes) -> Labelled:
    """Scenes as a batch with padded boxes."""
    padded = [nn.utils.rnn.pad_sequence(part, True, -1) for part in (scenes.each_classes(), scenes.each_boxes())]
    return Labelled(scenes.images, padded[0], padded[1].clamp(min=0) / SIZE)


def scene_truth(scenes: world_data.Scenes) -> Annotations:
    """The annotations of scenes, for the average precision."""
    pictures = []
    for index, (classes, boxes) in enumerate(zip(scenes.each_classes(), scenes.each_boxes(), strict=True)):
        areas = scenes.masks(index).sum((1, 2)).double().numpy()
        crowd = torch.zeros(len(classes), dtype=torch.bool).numpy()
        pictures.append(AnnotatedImage(str(index), (SIZE, SIZE), classes.numpy(), boxes.double().numpy(), areas, crowd))
    return Annotations(CLASSES, tuple(pictures))


def mirrored(boxes: Tensor, axis: int) -> Tensor:
    """Corners in fractions of the image after a flip from left to right (axis 0) or upside down (axis 1)."""
    boxes = boxes.clone()
    boxes[..., [axis, axis + 2]] = 1 - boxes[..., [axis + 2, axis]]
    return boxes


def turn(train_set: Labelled, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized images, classes and boxes of a batch, all flipped and turned in the same way."""
    images, boxes = train_set.pixels[batch], train_set.boxes[batch]
    left_right, up_down, turned = torch.rand(3, generator=generator) < 0.5
    if left_right:
        images, boxes = images.flip(3), mirrored(boxes, 0)
    if up_down:
        images, boxes = images.flip(2), mirrored(boxes, 1)
    if turned:
        images, boxes = images.transpose(2, 3), boxes[..., [1, 0, 3, 2]]
    return common.normalize(images.float() / 255), train_set.classes[batch], boxes


def train_world(out: Path, work: Path, steps: int | None = None) -> None:
    """Train and save the small world's detector in the folder `out`; its scratch state and its scenes are in `work`."""
    steps = steps or STEPS
    torch.manual_seed(SEED)
    model = build_model(list(CLASSES)).train()
    train_set, val_set, test_set = (
        world_data.load_scenes(STYLE, split, count, work)
        for split, count in (("train", SCENES), ("val", 300), ("test", 1000))
    )

    def evaluate() -> float:
        return average_precision(match(scene_truth(val_set), detect(model, val_set.images, SIZE, SIZE)))["AP"]

    best = common.Best(lambda: common.save_teacher(model, out, SIZE, SIZE, PROCESSOR))
    minutes = train(model, scene_objects(train_set), steps, BATCH, 0.01, 6, work, turn, evaluate, best)
    saved = AutoModelForObjectDetection.from_pretrained(out, dtype=torch.float32)
    matched = match(scene_truth(test_set), detect(saved, test_set.images, SIZE, SIZE))
    scores, (low, high) = average_precision(matched), interval(matched)
    entries = {
        "architecture": f"RTDetrV2ForObjectDetection, ResNet of 3 stages, maps at strides 8 and 16, 96 wide, 3 decoder "
        f"layers, {SHAPE['num_queries']} queries, {SIZE}x{SIZE} px, {common.count_parameters(saved)} parameters",
        "data": f"{SCENES:,} scenes of the small world, style {STYLE}, with their boxes",
        "recipe": f"{steps} steps, batch {BATCH}, flips and turns, Muon on matrices, AdamW on the rest, one cycle; "
        "maps in bf16, queries and boxes in fp32; the best weights on 300 other scenes are selected",
        "score": f"{scores['AP']:.3f} box AP (.50:.95) on 1,000 scenes of the test split, 95 % interval over images "
        f"{low:.3f} to {high:.3f}; AP50 {scores['AP50']:.3f}, AP75 {scores['AP75']:.3f}",
    }
    world_data.write_card(out, "detector: a small RT-DETR v2, ten shapes in neon", minutes, SEED, entries)
    print(f"test AP {scores['AP']:.3f} ({low:.3f} to {high:.3f})", flush=True)
