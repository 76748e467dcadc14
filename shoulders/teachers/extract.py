"""How families are asked, and how their answers become Features: the few shared ways behind the table.

A *call* takes (model, pixels, deep) and gives the model's own output, with hidden states where ``deep``.
A *read* takes (output, config, size) and gives ``{tap: Features}``; ``size`` is the pixels' (h, w).
Taps ``block0``.. are the hidden states after each block as transformers reports them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.features import Features

Call = Callable[[nn.Module, Tensor, bool], Any]
Read = Callable[[Any, Any, tuple[int, int]], dict[str, Features]]
Summary = Callable[[Any], Tensor | None]


# Calls


def ask(model: nn.Module, pixels: Tensor, deep: bool, **options: bool) -> Any:
    """The model's own forward on pixels (B, 3, h, w)."""
    return model(pixels, **{"output_hidden_states": deep, **options})


def ask_plainly(model: nn.Module, pixels: Tensor, deep: bool) -> Any:
    """A model of unknown code gets pixels (B, 3, h, w) and nothing else."""
    return model(pixels)


class _Reached(Exception):
    """Carries a submodule's keyword arguments and output out of the forward that runs it."""

    def __init__(self, given: dict[str, Any], output: Any) -> None:
        super().__init__()
        self.given = given
        self.output = output


def ask_until_encoder(model: nn.Module, pixels: Tensor, deep: bool) -> Any:
    """Run a detector up to ``model.encoder`` and stop: what follows (queries, decoder, heads) never runs.

    Stopping inside the model's own forward keeps its masks and position embeddings exact, whatever they are.
    """

    def stop(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        raise _Reached(given, output)

    handle = model.get_submodule("encoder").register_forward_hook(stop, with_kwargs=True)
    try:
        model(pixels)
    except _Reached as reached:
        return SimpleNamespace(given=reached.given, last_hidden_state=reached.output.last_hidden_state)
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} never ran its encoder")


def ask_swinv2(model: Any, pixels: Tensor, deep: bool) -> Any:
    """Swin v2 with every stage at its own resolution, which Swinv2Model's forward has no option for."""
    tokens, grid = model.embeddings(pixels, interpolate_pos_encoding=True)
    output = model.encoder(tokens, grid, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    tokens = model.layernorm(output.last_hidden_state)  # (B, N, C)
    return SimpleNamespace(
        last_hidden_state=tokens,
        pooler_output=tokens.mean(1),
        reshaped_hidden_states=output.reshaped_hidden_states,
    )


def ask_in_patches(model: Any, pixels: Tensor, deep: bool) -> Any:
    """SigLIP 2 takes flat patches (B, N, p * p * 3), a mask of real ones, and the grid of each image."""
    p = model.config.patch_size
    h, w = pixels.shape[2] // p, pixels.shape[3] // p
    patches = pixels.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), h * w, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    shapes = torch.tensor([[h, w]], device=pixels.device).expand(len(pixels), 2)
    return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes, output_hidden_states=deep)


def ask_masked(model: nn.Module, pixels: Tensor, deep: bool) -> Any:
    """An encoder that also takes where the batch is image: everywhere."""
    return model(pixels, torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.long, device=pixels.device))


# Summaries


def cls_token(output: Any) -> Tensor:
    """The CLS token after the final norm."""
    return output.last_hidden_state[:, 0]


def pooled(output: Any) -> Tensor | None:
    """The pooler's output, (B, C), or None where the checkpoint has no pooler."""
    summary = output.pooler_output
    return summary if summary is None else summary.flatten(1)


def projected(output: Any) -> Tensor:
    """The image embedding that is compared with texts, or the pooled vector where there is no projection."""
    embeds = output.get("image_embeds")
    return output.pooler_output if embeds is None else embeds


def no_summary(output: Any) -> None:
    """The family has no vector for the whole image."""
    return None


# Reads


def read_tokens(output: Any, config: Any, size: tuple[int, int], summary: Summary) -> dict[str, Features]:
    """Plain ViTs: patch tokens are the last H * W ones, behind CLS, distillation and register tokens."""
    patch = patch_size(config)
    grid = (size[0] // patch, size[1] // patch)
    places = grid[0] * grid[1]
    taps = {
        f"block{i}": Features(None, tokens[:, -places:], grid)
        for i, tokens in enumerate((output.get("hidden_states") or ())[1:])
    }
    taps["last"] = Features(summary(output), output.last_hidden_state[:, -places:], grid)
    return taps


def read_tokens_with_cls(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Plain ViTs whose head reads inner blocks: CLS is the summary of each of them."""
    taps = read_tokens(output, config, size, cls_token)
    for i, tokens in enumerate((output.get("hidden_states") or ())[1:]):
        taps[f"block{i}"] = Features(tokens[:, 0], taps[f"block{i}"].spatial, taps[f"block{i}"].grid)
    return taps


def read_radio(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """RADIO: the chosen CLS tokens side by side, and the tokens behind all prefix tokens."""
    return read_tokens(output, config, size, lambda out: out.summary)


def read_remote(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Unknown code that answers like a ViT: last_hidden_state (B, P + N, C), maybe pooler_output."""
    return read_tokens(output, config, size, lambda out: out.get("pooler_output"))


def read_maps(output: Any, config: Any, size: tuple[int, int], summary: Summary) -> dict[str, Features]:
    """Hierarchical encoders whose hidden states are maps (B, C, H, W), a stem first in some of them."""
    stages = output.hidden_states[-len(config.depths) :]
    taps = {f"stage{i}": Features.from_map(maps) for i, maps in enumerate(stages)}
    taps[f"stage{len(stages) - 1}"] = Features.from_map(stages[-1], summary(output))
    return taps


def read_swin(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Swin: maps before each downsampling; the last stage after the final norm, as the pooled vector is."""
    stages = output.reshaped_hidden_states[-len(config.depths) :]
    taps = {f"stage{i}": Features.from_map(maps) for i, maps in enumerate(stages)}
    grid = (stages[-1].shape[2], stages[-1].shape[3])
    taps[f"stage{len(stages) - 1}"] = Features(output.pooler_output, output.last_hidden_state, grid)
    return taps


def read_hiera(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Hiera: maps (B, H, W, C) put back into image order."""
    stages = output.reshaped_hidden_states[-len(config.depths) :]
    taps = {f"stage{i}": Features.from_map(maps.movedim(3, 1)) for i, maps in enumerate(stages)}
    taps[f"stage{len(stages) - 1}"] = Features.from_map(stages[-1].movedim(3, 1), output.pooler_output)
    return taps


def read_dinov3_convnext(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """DINOv3 ConvNeXt: maps, and for the last stage the normed tokens behind their mean."""
    taps = read_maps(output, config, size, pooled)
    last = f"stage{len(config.depths) - 1}"
    taps[last] = Features(output.pooler_output, output.last_hidden_state[:, 1:], taps[last].grid)
    return taps


def read_final_map(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Convolutional encoders of which only the final map and its pooled vector are used."""
    return {"last": Features.from_map(output.last_hidden_state, pooled(output))}


def read_feature_maps(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """A transformers backbone: the maps (B, C, H, W) that its task head reads."""
    return {f"stage{i}": Features.from_map(maps) for i, maps in enumerate(output.feature_maps)}


def read_feature_tokens(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """A ViT backbone that hands on (B, 1 + N, C): tokens with CLS first; hierarchical ones hand on maps."""
    if output.feature_maps[0].ndim == 4:
        return read_feature_maps(output, config, size)
    patch = patch_size(config)
    grid = (size[0] // patch, size[1] // patch)
    stages = enumerate(output.feature_maps)
    return {f"stage{i}": Features(tokens[:, 0], tokens[:, 1:], grid) for i, tokens in stages}


def read_masked_map(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """RF-DETR: the projector's map (B, C, H, W), which comes with a mask."""
    return {"last": Features.from_map(output[0])}


def read_sam(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """SAM: the neck's map (B, C, H, W); blocks are (B, H, W, C)."""
    blocks = (output.get("hidden_states") or ())[1:]
    taps = {f"block{i}": Features.from_map(maps.movedim(3, 1)) for i, maps in enumerate(blocks)}
    taps["last"] = Features.from_map(output.last_hidden_state)
    return taps


def read_sam2(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """SAM 2: the maps of the feature pyramid, finest first."""
    return {f"level{i}": Features.from_map(maps) for i, maps in enumerate(output.fpn_hidden_states)}


def read_pyramid(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Hybrid encoders: a list of maps (B, C, H, W), finest first."""
    return {f"level{i}": Features.from_map(maps) for i, maps in enumerate(output.last_hidden_state)}


def read_detr(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """DETR: one sequence over the backbone's last map, whose stride is a power of two."""
    tokens = output.last_hidden_state  # (B, N, C)
    grids = [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in (32, 16, 8, 64, 4)]
    grid = next(grid for grid in grids if grid[0] * grid[1] == tokens.shape[1])
    return {"last": Features(None, tokens, grid)}


def read_deformable(output: Any, config: Any, size: tuple[int, int]) -> dict[str, Features]:
    """Deformable DETR: the levels lie one after another in one sequence, finest first."""
    grids = [(int(h), int(w)) for h, w in output.given["spatial_shapes_list"]]
    levels = output.last_hidden_state.split([h * w for h, w in grids], dim=1)
    pairs = enumerate(zip(levels, grids, strict=True))
    return {f"level{i}": Features(None, tokens, grid) for i, (tokens, grid) in pairs}


def patch_size(config: Any) -> int:
    """Pixels per patch; some configs write it as [p, p]."""
    patch = config.patch_size
    return int(patch if isinstance(patch, int) else patch[0])
