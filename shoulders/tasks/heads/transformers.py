"""Heads of transformers on frozen features: the models are theirs, with a small pyramid where their backbone was.

Lengths are shares of the image's sides, so that an image may be drawn at any aspect.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from shoulders.hub import quiet
from shoulders.tasks.data.dense import IGNORED
from shoulders.tasks.heads.objects import Target

WIDTH = 128  # of the pyramid and of what follows it
LAYERS = 3  # of the decoders
QUERIES = 100
DENOISED = 100  # queries more that RT-DETR trains with, noised boxes that it is to put right
POINTS = 2048  # of a mask that Mask2Former's loss looks at


class Pyramid(nn.Module):
    """Features (B, C, H, W) as maps of width `WIDTH` at 4, 2, 1 and 1/2 times their grid (arXiv 2203.16527).

    An odd side of the grid is first made even, so that each map is twice the next.

    Args:
        width: C.
        levels: how many of them, the coarsest ones.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, WIDTH, 1))
        self.coarser = _block(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1))
        self.finer = nn.ModuleList(_block(nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)) for _ in range(levels - 2))

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``feature_maps``, finest first, as a backbone of transformers gives them."""
        even = (features.shape[2] + features.shape[2] % 2, features.shape[3] + features.shape[3] % 2)
        same = F.interpolate(self.trunk(features), even, mode="bilinear", align_corners=False)
        maps = [self.coarser(same), same]
        for finer in self.finer:
            maps.append(finer(maps[-1]))
        return SimpleNamespace(feature_maps=tuple(reversed(maps)), hidden_states=None, attentions=None)

    forward_with_filtered_kwargs = forward


def _block(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.GroupNorm(8, WIDTH), nn.GELU())


class Segmenter(nn.Module):
    """UperNet (arXiv 1807.10221): (B, C, H, W) -> logits (B, K, 4 H, 4 W)."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        config = hf.UperNetConfig(
            backbone_config=_stand_in(4), hidden_size=WIDTH, use_auxiliary_head=False, num_labels=n_classes
        )
        self.model = hf.UperNetForSemanticSegmentation(config)
        self.model.backbone = Pyramid(width, levels=4)

    def forward(self, maps: Tensor) -> Tensor:
        """The logits at the finest level."""
        return self.model.decode_head(self.model.backbone(maps).feature_maps)

    def loss(self, maps: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Cross entropy with masks (4 H, 4 W), the mean over the pixels that are labelled."""
        truth = torch.stack(list(targets)).long().to(maps.device)
        logits = F.interpolate(self(maps), truth.shape[1:], mode="bilinear", align_corners=False)
        summed = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        return summed / (truth != IGNORED).sum().clamp(min=1)


class Detector(nn.Module):
    """RT-DETR v2 (arXiv 2407.17140): (B, C, H, W) -> its own output, with ``logits`` and ``pred_boxes``."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        config = hf.RTDetrV2Config(
            backbone_config=_stand_in(3),
            freeze_backbone_batch_norms=False,
            encoder_in_channels=[WIDTH] * 3,
            encoder_hidden_dim=WIDTH,
            d_model=WIDTH,
            decoder_in_channels=[WIDTH] * 3,
            encoder_ffn_dim=2 * WIDTH,
            decoder_ffn_dim=2 * WIDTH,
            decoder_layers=LAYERS,
            num_queries=QUERIES,
            num_labels=n_classes,
            hidden_expansion=0.5,
            num_denoising=DENOISED,
        )
        self.model = hf.RTDetrV2ForObjectDetection(config)
        self.model.model.backbone.model = Pyramid(width, levels=3)
        with quiet():  # it would say what it does without torchvision
            self.processor = hf.RTDetrImageProcessor()

    def forward(self, maps: Tensor) -> Any:
        """What the model says, at inference."""
        return self.model(pixel_values=maps)

    def loss(self, maps: Tensor, targets: Sequence[Target]) -> Tensor:
        """The model's own: matched one to one, varifocal, L1 and generalized IoU; groups are left out."""
        return self.model(pixel_values=maps, labels=[_labels(target, maps) for target in targets]).loss


class MaskFinder(nn.Module):
    """Mask2Former (arXiv 2112.01527): (B, C, H, W) -> its own output, with logits of classes and masks (4 H, 4 W)."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        with quiet():  # it would say that it does not know our backbone, and what it does without torchvision
            config = hf.Mask2FormerConfig(
                backbone_config=_stand_in(4),
                feature_size=WIDTH,
                mask_feature_size=WIDTH,
                hidden_dim=WIDTH,
                encoder_feedforward_dim=2 * WIDTH,
                dim_feedforward=4 * WIDTH,
                encoder_layers=LAYERS,
                decoder_layers=1 + LAYERS,
                num_queries=QUERIES,
                num_labels=n_classes,
                train_num_points=POINTS,
            )
            self.model = hf.Mask2FormerForUniversalSegmentation(config)
            self.processor = hf.Mask2FormerImageProcessor()
        self.model.model.pixel_level_module.encoder = Pyramid(width, levels=4)

    def forward(self, maps: Tensor) -> Any:
        """What the model says, at inference."""
        return self.model(pixel_values=maps)

    def loss(self, maps: Tensor, targets: Sequence[Target]) -> Tensor:
        """The model's own: matched one to one, cross entropy, and for masks Dice; groups are left out."""
        labels = [_labels(target, maps) for target in targets]
        return self.model(
            pixel_values=maps,
            class_labels=[one["class_labels"] for one in labels],
            mask_labels=[one["masks"] for one in labels],
        ).loss


def _labels(target: Target, maps: Tensor) -> dict[str, Tensor]:
    """Classes (n,), boxes (n, 4) as centres and sides in shares of the image, and masks where there are some."""
    places = torch.tensor([2 * maps.shape[3], 2 * maps.shape[2]]).repeat(2)
    low, high = (target.boxes[~target.crowd] / places).clamp(0, 1).chunk(2, 1)
    told = {"class_labels": target.classes[~target.crowd], "boxes": torch.cat([(low + high) / 2, high - low], 1)}
    if target.masks is not None:
        told["masks"] = target.masks[~target.crowd].float()
    return {name: value.to(maps.device) for name, value in told.items()}


def _stand_in(levels: int) -> Any:
    """The smallest backbone whose maps have the pyramid's widths: the models are built around it, then it goes."""
    stages = [f"stage{number}" for number in range(5 - levels, 5)]
    return hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[WIDTH] * 4, depths=[1] * 4, layer_type="basic", out_features=stages
    )
