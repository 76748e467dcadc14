"""Heads on disk: a folder without an encoder beside the student."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from shoulders.errors import DataError
from shoulders.hub import quiet
from shoulders.teachers import Tap
from shoulders.teachers.families import row_of
from shoulders.teachers.heads import (
    HEADS,
    Head,
    Names,
    TeacherHead,
    ZeroShot,
    head_class,
    open_zero_shot,
    read_processor,
)


def save_head(graft: Head, folder: Path) -> None:
    """Write a head without its encoder: config.json, model.safetensors, the image processor, and head.json.

    Of an image-text teacher the class names are kept, as embeddings, and no tower.
    """
    folder.mkdir(parents=True)
    with quiet():
        graft.model.config.save_pretrained(folder)
        if graft.processor is not None:
            graft.processor.save_pretrained(folder)
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in _weights(graft).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    taps = {tap: [facts.summary, facts.spatial, list(facts.grid)] for tap, facts in graft.taps.items()}
    more = {"names": asdict(graft.names)} if isinstance(graft, ZeroShot) else {"size": list(graft.size)}
    (folder / "head.json").write_text(json.dumps(more | {"taps": taps}) + "\n")


def open_head(folder: Path) -> Head:
    """A head as `save_head` left it.

    Raises:
        DataError: something is missing or does not fit.
    """
    try:
        told = json.loads((folder / "head.json").read_text())
        taps = {tap: Tap(summary, spatial, tuple(grid)) for tap, (summary, spatial, grid) in told["taps"].items()}
        if "names" in told:
            kept = told["names"]
            names = Names(tuple(kept["classes"]), tuple(kept["prompts"]), kept["source"], kept["revision"])
            return open_zero_shot(folder, names, taps)
        with quiet():
            config = AutoConfig.from_pretrained(folder)
            model = head_class(config)(config)
        h, w = told["size"]
        graft = TeacherHead(model, HEADS[row_of(config.to_dict())], taps, (h, w), read_processor(str(folder)))
        missing = graft.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
        absent = [name for name in missing if name in _weights(graft)]
        if absent:
            raise ValueError(f"the weights lack {absent[0]}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: not a sound head: {' '.join(str(error).split())[:300]}") from error
    return graft


def _weights(graft: Head) -> dict[str, Tensor]:
    """The weights by name, one of each group that shares its memory."""
    seen: set[int] = set()
    weights = {}
    for name, value in graft.state_dict().items():
        if value.data_ptr() not in seen or value.numel() == 0:
            weights[name] = value
        seen.add(value.data_ptr())
    return weights
