"""How the output of a model becomes Features: one ``extract_*`` per form of output, shared by the rows.

Each takes (output, config, (h, w) of the pixels in px) and returns ``{tap: Features}``. Taps ``block0``.. are the
hidden states after each block, as transformers reports them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from shoulders.features import Features

Extract = Callable[[Any, Any, tuple[int, int]], dict[str, Features]]
Summary = Callable[[Any], Tensor | None]  # output -> (B, C), or None


# Summaries


def cls_summary(output: Any) -> Tensor:
    """The CLS token after the final norm."""
    return output.last_hidden_state[:, 0]


def cls_and_distillation_summary(output: Any) -> Tensor:
    """DeiT's CLS and distillation tokens after the final norm, side by side (B, 2 C)."""
    return output.last_hidden_state[:, :2].flatten(1)


def mean_summary(output: Any, prefix: int = 0) -> Tensor:
    """The mean of the patch tokens, which follow ``prefix`` other tokens."""
    return output.last_hidden_state[:, prefix:].mean(1)


def pooled_summary(output: Any) -> Tensor | None:
    """The pooler's output, (B, C), or None where the checkpoint has no pooler."""
    summary = output.pooler_output
    return summary if summary is None else summary.flatten(1)


def projected_summary(output: Any) -> Tensor:
    """The image embedding that is compared with texts, or the pooled vector where there is no projection."""
    embeds = output.get("image_embeds")
    return output.pooler_output if embeds is None else embeds


def no_summary(output: Any) -> None:
    """None: the family has no vector for the whole image."""
    return None


# Features by tap


def extract_tokens(output: Any, config: Any, size: tuple[int, int], summary: Summary) -> dict[str, Features]:
    """Plain ViTs: the patch tokens are the last H * W tokens, after CLS, distillation and register tokens."""
    patch = patch_size(config)
    grid = (size[0] // patch, size[1] // patch)
    count = grid[0] * grid[1]
    taps = {
        f"block{i}": Features(None, tokens[:, -count:], grid)
        for i, tokens in enumerate((output.get("hidden_states") or ())[1:])
    }
    taps["last"] = Features(summary(output), output.last_hidden_state[:, -count:], grid)
    return taps


def extract_tokens_with_cls(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Plain ViTs whose head takes several blocks: the CLS token is the summary of each."""
    taps = extract_tokens(output, config, size, cls_summary)
    for i, tokens in enumerate((output.get("hidden_states") or ())[1:]):
        taps[f"block{i}"] = Features(tokens[:, 0], taps[f"block{i}"].spatial, taps[f"block{i}"].grid)
    return taps


def extract_radio(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """RADIO: the selected CLS tokens side by side, and the patch tokens."""
    return extract_tokens(output, config, size, lambda out: out.summary)


def extract_remote(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Code of the model's own with the output of a ViT: last_hidden_state (B, P + N, C), maybe pooler_output."""
    return extract_tokens(output, config, size, lambda out: out.get("pooler_output"))


def extract_maps(output: Any, config: Any, size: tuple[int, int], summary: Summary) -> dict[str, Features]:
    """Hierarchical encoders whose hidden states are maps (B, C, H, W); some have the stem's map first."""
    stages = output.hidden_states[-len(config.depths) :]
    taps = {f"stage{i}": Features.from_map(maps) for i, maps in enumerate(stages)}
    taps[f"stage{len(stages) - 1}"] = Features.from_map(stages[-1], summary(output))
    return taps


def extract_swin(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Swin: maps before each downsampling; the last stage after the final norm, like the pooled vector."""
    stages = output.reshaped_hidden_states[-len(config.depths) :]
    taps = {f"stage{i}": Features.from_map(maps) for i, maps in enumerate(stages)}
    grid = (stages[-1].shape[2], stages[-1].shape[3])
    taps[f"stage{len(stages) - 1}"] = Features(output.pooler_output, output.last_hidden_state, grid)
    return taps


def extract_hiera(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Hiera: maps (B, H, W, C) put back into image order."""
    stages = output.reshaped_hidden_states[-len(config.depths) :]
    taps = {f"stage{i}": Features.from_map(maps.movedim(3, 1)) for i, maps in enumerate(stages)}
    taps[f"stage{len(stages) - 1}"] = Features.from_map(stages[-1].movedim(3, 1), output.pooler_output)
    return taps


def extract_dinov3_convnext(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """DINOv3 ConvNeXt: maps; for the last stage the normed tokens and, as the summary, their mean."""
    taps = extract_maps(output, config, size, pooled_summary)
    last = f"stage{len(config.depths) - 1}"
    taps[last] = Features(output.pooler_output, output.last_hidden_state[:, 1:], taps[last].grid)
    return taps


def extract_final_map(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Convolutional encoders of which only the final map and its pooled vector are used."""
    return {"last": Features.from_map(output.last_hidden_state, pooled_summary(output))}


def extract_feature_maps(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """A transformers backbone: the maps (B, C, H, W) that its task head takes."""
    return {f"stage{i}": Features.from_map(maps) for i, maps in enumerate(output.feature_maps)}


def extract_feature_tokens(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """A ViT backbone, whose outputs are tokens (B, 1 + N, C) with CLS first; hierarchical backbones give maps."""
    if output.feature_maps[0].ndim == 4:
        return extract_feature_maps(output, config, size)
    patch = patch_size(config)
    grid = (size[0] // patch, size[1] // patch)
    stages = enumerate(output.feature_maps)
    return {f"stage{i}": Features(tokens[:, 0], tokens[:, 1:], grid) for i, tokens in stages}


def extract_masked_map(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """RF-DETR: the projector's map (B, C, H, W), the first of a pair with its mask."""
    return {"last": Features.from_map(output[0])}


def extract_sam(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """SAM: the neck's map (B, C, H, W); blocks are (B, H, W, C)."""
    blocks = (output.get("hidden_states") or ())[1:]
    taps = {f"block{i}": Features.from_map(maps.movedim(3, 1)) for i, maps in enumerate(blocks)}
    taps["last"] = Features.from_map(output.last_hidden_state)
    return taps


def extract_sam2(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """SAM 2: the maps of the feature pyramid, finest first."""
    return {f"level{i}": Features.from_map(maps) for i, maps in enumerate(output.fpn_hidden_states)}


def extract_pyramid(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Hybrid encoders: a list of maps (B, C, H, W), finest first."""
    return {f"level{i}": Features.from_map(maps) for i, maps in enumerate(output.last_hidden_state)}


def extract_detr(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """DETR: one sequence of tokens of the backbone's last map, whose stride is a power of two."""
    tokens = output.last_hidden_state  # (B, N, C)
    grids = [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in (32, 16, 8, 64, 4)]
    grid = next(grid for grid in grids if grid[0] * grid[1] == tokens.shape[1])
    return {"last": Features(None, tokens, grid)}


def extract_deformable(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Deformable DETR: one sequence of the tokens of all levels, finest level first."""
    grids = [(int(h), int(w)) for h, w in output.encoder_kwargs["spatial_shapes_list"]]
    levels = output.last_hidden_state.split([h * w for h, w in grids], dim=1)
    pairs = enumerate(zip(levels, grids, strict=True))
    return {f"level{i}": Features(None, tokens, grid) for i, (tokens, grid) in pairs}


def patch_size(config: Any) -> int:
    """Pixels per patch; some configs write it as [p, p]."""
    patch = config.patch_size
    return int(patch if isinstance(patch, int) else patch[0])
