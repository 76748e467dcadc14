"""How the models of a family are called: one ``forward_*`` per way, shared by the rows of the table.

Each takes (model, normalized pixels (B, 3, h, w), whether hidden states are needed) and returns the model's own output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor, bool], Any]


def forward_model(model: nn.Module, pixels: Tensor, hidden_states: bool, **options: bool) -> Any:
    """The model's own forward."""
    return model(pixels, **{"output_hidden_states": hidden_states, **options})


def forward_pixels_only(model: nn.Module, pixels: Tensor, hidden_states: bool) -> Any:
    """The forward of a model with code of its own, which may take no argument beside the pixels."""
    return model(pixels)


_STOPPING = threading.Lock()  # the hook that stops a model is on the model, which several threads may run


class _EncoderReached(Exception):
    """Carries the keyword arguments and the output of a submodule out of the forward that runs it."""

    def __init__(self, kwargs: dict[str, Any], output: Any) -> None:
        super().__init__()
        self.kwargs = kwargs
        self.output = output


def forward_until_encoder(model: nn.Module, pixels: Tensor, hidden_states: bool) -> Any:
    """Run a detector up to ``model.encoder`` and stop: what follows (queries, decoder, heads) never runs.

    Stopping inside the model's own forward keeps its masks and position embeddings exact, whatever they are.
    """

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        raise _EncoderReached(kwargs, output)

    with _STOPPING:
        handle = model.get_submodule("encoder").register_forward_hook(stop, with_kwargs=True)
        try:
            model(pixels)
        except _EncoderReached as reached:
            return SimpleNamespace(encoder_kwargs=reached.kwargs, last_hidden_state=reached.output.last_hidden_state)
        finally:
            handle.remove()
    raise RuntimeError(f"{type(model).__name__} never ran its encoder")


def forward_swinv2(model: Any, pixels: Tensor, hidden_states: bool) -> Any:
    """Swin v2 with every stage at its own resolution, for which Swinv2Model's forward has no option."""
    tokens, grid = model.embeddings(pixels, interpolate_pos_encoding=True)
    output = model.encoder(tokens, grid, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    tokens = model.layernorm(output.last_hidden_state)  # (B, N, C)
    return SimpleNamespace(
        last_hidden_state=tokens,
        pooler_output=tokens.mean(1),
        reshaped_hidden_states=output.reshaped_hidden_states,
    )


def forward_patches(model: Any, pixels: Tensor, hidden_states: bool) -> Any:
    """SigLIP 2, which takes flat patches (B, N, p * p * 3), a mask of the real ones, and the grid of each image."""
    p = model.config.patch_size
    h, w = pixels.shape[2] // p, pixels.shape[3] // p
    patches = pixels.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), h * w, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)  # (B, N)
    grids = torch.tensor([[h, w]], device=pixels.device).expand(len(pixels), 2)  # (B, 2)
    return model(patches, pixel_attention_mask=mask, spatial_shapes=grids, output_hidden_states=hidden_states)


def forward_with_mask(model: nn.Module, pixels: Tensor, hidden_states: bool) -> Any:
    """An encoder that also takes a mask of the pixels that belong to an image: here all of them."""
    return model(pixels, torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.long, device=pixels.device))
