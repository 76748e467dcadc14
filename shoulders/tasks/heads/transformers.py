"""Heads of transformers on frozen features: their own models, with a small pyramid in place of the backbone.

Lengths are fractions of the image's sides, so that an image may be drawn at any aspect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from shoulders.hub import quiet
from shoulders.tasks.heads.object_loss import ObjectTarget


@dataclass(frozen=True)
class HeadSize:
    """The size of a head.

    Args:
        width: of the pyramid and of what follows it.
        layers: of the decoders.
        queries: of the decoders.
        denoising_queries: that RT-DETR adds in training: noised boxes that it has to correct.
        mask_points: of a mask at which Mask2Former's loss is computed.
    """

    width: int = 128
    layers: int = 3
    queries: int = 100
    denoising_queries: int = 100
    mask_points: int = 2048


DEFAULT_SIZE = HeadSize()


class Pyramid(nn.Module):
    """Features (B, C, H, W) as maps of one width at 4, 2, 1 and 1/2 times their grid (arXiv 2203.16527).

    An odd side of the grid is first made even, so that each map is twice the next.

    Args:
        width: C.
        levels: how many of them, the coarsest ones.
        out_width: channels of the maps.
    """

    def __init__(self, width: int, levels: int, out_width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, out_width, 1))
        self.coarser = _block(nn.Conv2d(out_width, out_width, 3, stride=2, padding=1), out_width)
        self.finer = nn.ModuleList(
            _block(nn.ConvTranspose2d(out_width, out_width, 2, stride=2), out_width) for _ in range(levels - 2)
        )

    def forward(self, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``feature_maps``, finest first, as a backbone of transformers outputs them."""
        even = (features.shape[2] + features.shape[2] % 2, features.shape[3] + features.shape[3] % 2)
        same = F.interpolate(self.trunk(features), even, mode="bilinear", align_corners=False)
        maps = [self.coarser(same), same]
        for finer in self.finer:
            maps.append(finer(maps[-1]))
        return SimpleNamespace(feature_maps=tuple(reversed(maps)), hidden_states=None, attentions=None)

    forward_with_filtered_kwargs = forward


def _block(layer: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(layer, nn.GroupNorm(8, width), nn.GELU())


class UperNet(nn.Module):
    """UperNet (arXiv 1807.10221): (B, C, H, W) -> logits (B, K, 4 H, 4 W)."""

    def __init__(self, width: int, n_classes: int, size: HeadSize = DEFAULT_SIZE) -> None:
        super().__init__()
        config = hf.UperNetConfig(
            backbone_config=_placeholder_backbone(4, size.width),
            hidden_size=size.width,
            use_auxiliary_head=False,
            num_labels=n_classes,
        )
        self.model = hf.UperNetForSemanticSegmentation(config)
        self.model.backbone = Pyramid(width, 4, size.width)

    def forward(self, maps: Tensor) -> Tensor:
        """The logits at the finest level."""
        return self.model.decode_head(self.model.backbone(maps).feature_maps)


class RTDetr(nn.Module):
    """RT-DETR v2 (arXiv 2407.17140): (B, C, H, W) -> its own output, with ``logits`` and ``pred_boxes``."""

    def __init__(self, width: int, n_classes: int, size: HeadSize = DEFAULT_SIZE) -> None:
        super().__init__()
        config = hf.RTDetrV2Config(
            backbone_config=_placeholder_backbone(3, size.width),
            freeze_backbone_batch_norms=False,
            encoder_in_channels=[size.width] * 3,
            encoder_hidden_dim=size.width,
            d_model=size.width,
            decoder_in_channels=[size.width] * 3,
            encoder_ffn_dim=2 * size.width,
            decoder_ffn_dim=2 * size.width,
            decoder_layers=size.layers,
            num_queries=size.queries,
            num_labels=n_classes,
            hidden_expansion=0.5,
            num_denoising=size.denoising_queries,
        )
        self.model = hf.RTDetrV2ForObjectDetection(config)
        self.model.model.backbone.model = Pyramid(width, 3, size.width)
        with quiet():  # it warns that torchvision is absent
            self.processor = hf.RTDetrImageProcessor()

    def forward(self, maps: Tensor) -> Any:
        """The model's output at inference."""
        return self.model(pixel_values=maps)

    def loss(self, maps: Tensor, targets: Sequence[ObjectTarget]) -> Tensor:
        """The model's own: matched one to one, varifocal, L1 and generalized IoU; groups are left out."""
        return self.model(pixel_values=maps, labels=[_labels(target, maps) for target in targets]).loss


class Mask2Former(nn.Module):
    """Mask2Former (arXiv 2112.01527): (B, C, H, W) -> its own output, with logits of classes and masks (4 H, 4 W)."""

    def __init__(self, width: int, n_classes: int, size: HeadSize = DEFAULT_SIZE) -> None:
        super().__init__()
        with quiet():  # it warns of an unknown backbone, and that torchvision is absent
            config = hf.Mask2FormerConfig(
                backbone_config=_placeholder_backbone(4, size.width),
                feature_size=size.width,
                mask_feature_size=size.width,
                hidden_dim=size.width,
                encoder_feedforward_dim=2 * size.width,
                dim_feedforward=4 * size.width,
                encoder_layers=size.layers,
                decoder_layers=1 + size.layers,
                num_queries=size.queries,
                num_labels=n_classes,
                train_num_points=size.mask_points,
            )
            self.model = hf.Mask2FormerForUniversalSegmentation(config)
            self.processor = hf.Mask2FormerImageProcessor()
        self.model.model.pixel_level_module.encoder = Pyramid(width, 4, size.width)

    def forward(self, maps: Tensor) -> Any:
        """The model's output at inference."""
        return self.model(pixel_values=maps)

    def loss(self, maps: Tensor, targets: Sequence[ObjectTarget]) -> Tensor:
        """The model's own: matched one to one, cross-entropy, and for masks Dice; groups are left out."""
        labels = [_labels(target, maps) for target in targets]
        return self.model(
            pixel_values=maps,
            class_labels=[one["class_labels"] for one in labels],
            mask_labels=[one["masks"] for one in labels],
        ).loss


def transformers_loss(head: RTDetr | Mask2Former, maps: Tensor, targets: Sequence[ObjectTarget]) -> Tensor:
    """The loss of a head that has one of its own."""
    return head.loss(maps, targets)


def _labels(target: ObjectTarget, maps: Tensor) -> dict[str, Tensor]:
    """Classes (n,), boxes (n, 4) as centres and sides in fractions of the image, and masks where there are some."""
    anchors = torch.tensor([2 * maps.shape[3], 2 * maps.shape[2]]).repeat(2)
    low, high = (target.boxes[~target.crowd] / anchors).clamp(0, 1).chunk(2, 1)
    labels = {"class_labels": target.classes[~target.crowd], "boxes": torch.cat([(low + high) / 2, high - low], 1)}
    if target.masks is not None:
        labels["masks"] = target.masks[~target.crowd].float()
    return {name: value.to(maps.device) for name, value in labels.items()}


def _placeholder_backbone(levels: int, width: int) -> Any:
    """The smallest backbone with maps of this width: the models are built with it, then the pyramid replaces it."""
    stages = [f"stage{number}" for number in range(5 - levels, 5)]
    return hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[width] * 4, depths=[1] * 4, layer_type="basic", out_features=stages
    )
