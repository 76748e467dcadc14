"""How features become the output of a replaced encoder: one ``inject_*`` per form of output, shared by the rows.

Each takes (features of the head's taps, finest first; the encoder's output for a blank image) and returns an output of
that form which holds the features: the inverse of the family's ``extract_*``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoulders.features import Features

TapFeatures = Mapping[str, Features]
Inject = Callable[[TapFeatures, Any], Any]


def inject_pooled(taps: TapFeatures, stub: Any) -> Any:
    """The pooled vector alone, in the shape in which the family gives it."""
    summary = _last(taps).components()["summary"]
    return _replace_fields(stub, pooler_output=summary.view(len(summary), *stub.pooler_output.shape[1:]))


def inject_tokens(taps: TapFeatures, stub: Any) -> Any:
    """Tokens (B, P + N, C): those of the summary first, patch tokens last; the tokens between, which no head uses, stay
    the stub's. Where the summary is the mean of the patch tokens, a head computes it from these."""
    parts, tokens = _last(taps).components(), stub.last_hidden_state.clone()
    first = parts["summary"].unflatten(1, (-1, tokens.shape[2]))  # (B, 1, C), or (B, 2, C) for two tokens
    tokens[:, : first.shape[1]] = first
    if "spatial" in parts:
        tokens[:, -parts["spatial"].shape[1] :] = parts["spatial"]
    return _replace_fields(stub, last_hidden_state=tokens)


def inject_hidden_maps(taps: TapFeatures, stub: Any) -> Any:
    """Maps (B, C, H, W) as hidden states."""
    return _replace_fields(stub, hidden_states=_maps(taps.values(), stub.hidden_states))


def inject_hidden_tokens(taps: TapFeatures, stub: Any) -> Any:
    """Tokens (B, 1 + N, C) of some blocks as hidden states, of which the first is the input of all blocks."""
    hidden = list(stub.hidden_states)
    for tap, features in taps.items():
        index = 1 + int(tap.removeprefix("block"))
        hidden[index] = _with_cls(features, hidden[index])
    return _replace_fields(stub, hidden_states=tuple(hidden))


def inject_feature_maps(taps: TapFeatures, stub: Any) -> Any:
    """Maps (B, C, H, W) as the output of a backbone."""
    return _replace_fields(stub, feature_maps=_maps(taps.values(), stub.feature_maps))


def inject_feature_tokens(taps: TapFeatures, stub: Any) -> Any:
    """Tokens (B, 1 + N, C) as the output of a ViT backbone; maps as that of a hierarchical one."""
    if stub.feature_maps[0].ndim == 4:
        return inject_feature_maps(taps, stub)
    return _replace_fields(stub, feature_maps=tuple(map(_with_cls, taps.values(), stub.feature_maps)))


def inject_sequence(taps: TapFeatures, stub: Any) -> Any:
    """The tokens of all levels in one sequence (B, N, C), finest level first."""
    return _replace_fields(stub, last_hidden_state=torch.cat([tap.components()["spatial"] for tap in taps.values()], 1))


def inject_pyramid(taps: TapFeatures, stub: Any) -> Any:
    """A list of maps (B, C, H, W)."""
    return _replace_fields(stub, last_hidden_state=list(_maps(taps.values(), stub.last_hidden_state)))


def inject_map(taps: TapFeatures, stub: Any) -> Any:
    """One map (B, C, H, W)."""
    return _replace_fields(stub, last_hidden_state=_maps([_last(taps)], [stub.last_hidden_state])[0])


def inject_bare_map(taps: TapFeatures, stub: Any) -> Any:
    """One map (B, C, H, W), as the output of a submodule that returns one tensor."""
    return _maps([_last(taps)], [stub])[0]


def inject_patch_tokens(taps: TapFeatures, stub: Any) -> Any:
    """The patch tokens (B, N, C) alone, as the output of a submodule that returns one tensor."""
    return _last(taps).components()["spatial"]


def inject_masked_map(taps: TapFeatures, stub: Any) -> Any:
    """One map (B, C, H, W) and the stub's mask of the pixels that belong to an image."""
    return _maps([_last(taps)], stub[:1])[0], stub[1]


def inject_fpn(taps: TapFeatures, stub: Any) -> Any:
    """The pyramid of SAM 2, whose position encodings depend on the shapes alone."""
    return _replace_fields(stub, fpn_hidden_states=_maps(taps.values(), stub.fpn_hidden_states))


def _last(taps: TapFeatures) -> Features:
    return list(taps.values())[-1]


def _replace_fields(stub: Any, **fields: Any) -> Any:
    """The stub output with some of its fields replaced."""
    return type(stub)(**{**stub, **fields})


def _with_cls(features: Features, stub: Tensor) -> Tensor:
    """(B, 1 + N, C), the summary first; the stub's CLS token where the head takes none."""
    parts = features.components()
    cls = parts["summary"][:, None] if "summary" in parts else stub[:, :1]
    return torch.cat([cls, parts["spatial"]], 1)


def _maps(taps: Iterable[Features], stubs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Maps (B, C, H, W) in the memory layout of the encoder's own: another layout is rounded differently."""
    maps = []
    for tap, stub in zip(taps, stubs, strict=True):
        one = stub[:1]  # the batch is one image expanded, with a stride of 0
        last = one.is_contiguous(memory_format=torch.channels_last) and not one.is_contiguous()
        maps.append(tap.to_map().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))
    return tuple(maps)
