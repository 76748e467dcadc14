"""The tap names of the families, computed from their configs."""

from __future__ import annotations

from typing import Any

from shoulders.teachers.families.spec import Taps


def _blocks(config: Any) -> tuple[str, ...]:
    return (*(f"block{i}" for i in range(config.num_hidden_layers)), "last")


def _dpt_blocks(config: Any) -> tuple[str, ...]:
    # the first two of a hybrid DPT stand for maps of its convolutional stem
    indices = config.backbone_out_indices[2 if config.is_hybrid else 0 :]
    return tuple(f"block{i}" for i in sorted(indices))


def _beit_blocks(config: Any) -> tuple[str, ...]:
    # the head takes the hidden states out_indices - 1, and the first hidden state is before all blocks
    return tuple(f"block{i - 2}" for i in sorted(config.out_indices) if i > 1)


def _stages(config: Any) -> tuple[str, ...]:
    return tuple(f"stage{i}" for i in range(len(config.depths)))


def _backbone_stages(config: Any) -> tuple[str, ...]:
    return _stages(config.backbone_config)


def _outputs(config: Any) -> tuple[str, ...]:
    return tuple(f"stage{i}" for i in range(len(config.out_features)))


def _backbone_outputs(config: Any) -> tuple[str, ...]:
    return _outputs(config.backbone_config)


def _levels(config: Any) -> tuple[str, ...]:
    return tuple(f"level{i}" for i in range(config.num_feature_levels))


def _hybrid_levels(config: Any) -> tuple[str, ...]:
    return tuple(f"level{i}" for i in range(len(config.encoder_in_channels)))


BLOCKS = Taps("block0..blockN-1, last", _blocks)
DPT_BLOCKS = Taps("block0..blockN-1, last", _blocks, "head", _dpt_blocks)
BEIT_BLOCKS = Taps("block0..blockN-1, last", _blocks, "head", _beit_blocks)
LAST = Taps("last", lambda config: ("last",))
STAGES = Taps("stage0..stageN-1", _stages)
ALL_STAGES = Taps("stage0..stageN-1", _stages, "all")
OUTPUTS = Taps("stage0..stageN-1 (the backbone's outputs)", _outputs, "all")
BACKBONE_OUTPUTS = Taps("stage0..stageN-1 (the backbone's outputs)", _backbone_outputs, "all")
BACKBONE_STAGES = Taps("stage0..stageN-1 (the backbone's stages)", _backbone_stages, "all")
LEVELS = Taps("level0..levelN-1", _levels, head=_levels)
ALL_LEVELS = Taps("level0..levelN-1", _levels, "all")
HYBRID_LEVELS = Taps("level0..levelN-1", _hybrid_levels, "all")
