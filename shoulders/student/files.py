"""The files of a student's folder: checked before they are loaded, and listed in its manifest when they are written."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from shoulders.errors import DataError, RecipeError
from shoulders.hub import Pretrained, check_weight_files, read_json, weight_paths, why_refused
from shoulders.storage.atomic import use_umask
from shoulders.storage.manifest import MANIFEST, check_manifest, write_manifest
from shoulders.storage.tensor_files import check_header

# the files that a student consists of; its card, and whatever else lies beside them, may be changed and added
STUDENT_FILES = (
    "config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "heads/*/*.json",
    "heads/*/*.safetensors",
)
# arguments of transformers' ``from_pretrained`` with which it reads other files than those that are checked
OTHER_WEIGHTS = ("variant", "gguf_file")


def finish_folder(folder: Path) -> None:
    """Give the weights in a student's folder the usual permissions, and write its manifest."""
    use_umask(folder, "*.safetensors")
    write_manifest(folder, STUDENT_FILES)


def check_files(
    source: str | os.PathLike[str] | None = None, verify: bool = True, subfolder: str = "", **kwargs: Any
) -> None:
    """Refuse a student whose files are damaged, lead to other weights than its own, or describe too large a model.

    Args:
        source: a folder, or a hub id, whose manifest is not read: the hub's cache has the files of one commit.
        verify: compare the files with the manifest.
        subfolder, kwargs: further arguments of transformers' ``from_pretrained``.

    Raises:
        DataError: naming the file, or the argument that names other weights.
    """
    source = kwargs.get("pretrained_model_name_or_path", source)
    if source is None:
        return
    folder = Path(source, subfolder)
    if given := [name for name in OTHER_WEIGHTS if kwargs.get(name)]:
        argument = f"{given[0]}={kwargs[given[0]]!r}"
        raise DataError(f"{source}: {argument} names other weights; a student has one set: leave it out")
    if subfolder and not folder.is_dir():
        message = f"no folder {subfolder!r} in it; of a hub model, download the folder and give its path"
        raise DataError(f"{source}: {message}")
    if folder.is_dir():
        source = folder
        if verify:
            _check_manifest(folder)
    config = kwargs.get("config")
    try:
        pretrained = Pretrained("student", str(source), kwargs.get("revision"))
        content = config.to_dict() if isinstance(config, PreTrainedConfig) else read_json(pretrained, "config.json")
        if reason := why_refused(content or {}):
            raise pretrained.error(f"has a config.json whose {reason}")
        check_weight_files(replace(pretrained, config=content or {}))
        for path in weight_paths(pretrained):
            check_header(path)
    except (RecipeError, ValueError) as error:
        raise DataError(str(error)) from error


def _check_manifest(folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        warnings.warn(
            f"{folder}: has no {MANIFEST}, so that damage goes unnoticed; save_pretrained writes one", stacklevel=4
        )
        return
    try:
        check_manifest(folder, STUDENT_FILES)
    except DataError as error:
        raise DataError(
            f"{error}; copy the whole folder again, or load it with verify=False (predict --no-verify)"
        ) from error
