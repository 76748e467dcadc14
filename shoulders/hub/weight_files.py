"""Which files transformers would read the weights of a model from: safetensors of the model's own, nothing else.

An index file may name any file and ``config.json`` another one; transformers opens a name without ``.safetensors`` as a
pickle, which runs code, and it follows names out of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from shoulders.hub.files import Pretrained, find_file, read_json

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"


def check_weight_files(pretrained: Pretrained) -> None:
    """Refuse a model whose files lead to a pickle, out of the model's folder, or to the weights of another model.

    Raises:
        RecipeError: naming the file and the name in it.
    """
    if find_file(pretrained, ADAPTER):
        raise pretrained.error(
            f"has an {ADAPTER}, with which transformers loads the weights of another model where peft is installed; "
            "merge the adapter into the model and save that"
        )
    for name in _named_in_config(pretrained.config):
        if name != WEIGHTS:
            raise pretrained.error(
                f"has a config.json whose transformers_weights names {name!r}; only {WEIGHTS} and its index are read: "
                "rename the file and leave the key out"
            )
    # transformers prefers the single file; of a hub model it is not downloaded only to know
    folder = Path(pretrained.source)
    if not (folder.is_dir() and (folder / WEIGHTS).is_file()):
        _check_index(pretrained)


def weight_paths(pretrained: Pretrained) -> list[Path]:
    """The safetensors files that hold the weights of a model, downloaded first if it is on the hub.

    Raises:
        RecipeError: the model has none, or lacks one that its index names.
    """
    single = find_file(pretrained, WEIGHTS)
    index = None if single else read_json(pretrained, INDEX)
    names = sorted(set(index["weight_map"].values())) if index else [WEIGHTS]
    paths = {name: find_file(pretrained, name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise pretrained.error(f"has no {', '.join(missing)}; give a folder with weights")
    return [path for path in paths.values() if path]


def _check_index(pretrained: Pretrained) -> None:
    index = read_json(pretrained, INDEX)
    if index is None:
        return
    names = index.get("weight_map")
    if not isinstance(names, Mapping) or not names or not all(isinstance(file, str) for file in names.values()):
        raise pretrained.error(f"has a {INDEX} without a weight_map from weights to files; download it again")
    for file in sorted(set(names.values())):
        if reason := _why_refused(file):
            raise pretrained.error(f"has a {INDEX} whose weight_map names {file!r}, which {reason}; save it again")


def _why_refused(file: str) -> str:
    """Why no weights are read from a file of this name, or ""."""
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in _paths(file)):
        return "is not in the folder of the model"
    return "" if file.endswith(".safetensors") else "is not a safetensors file: a pickle is never read"


def _paths(file: str) -> tuple[PurePosixPath | PureWindowsPath, ...]:
    return PurePosixPath(file), PureWindowsPath(file)


def _named_in_config(config: Mapping[str, Any]) -> Iterator[Any]:
    """Every ``transformers_weights`` of a config and of the configs in it."""
    if config.get("transformers_weights") is not None:
        yield config["transformers_weights"]
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _named_in_config(part)
