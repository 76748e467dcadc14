"""The files of a pretrained model: all from one local folder, or from one commit of a hub repository."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file, extract_commit_hash

from shoulders.errors import RecipeError
from shoulders.hub.config_limits import why_refused
from shoulders.storage.json_text import parse_json

COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model whose weights are not loaded yet.

    Args:
        key: the key of the recipe that names the model, such as ``student.base``; every message begins with it.
        source: hub id or local folder, as transformers takes it.
        revision: the commit that a hub id was resolved to; None for a folder.
        config: the content of ``config.json``.
    """

    key: str
    source: str
    revision: str | None
    config: dict[str, Any] = field(default_factory=dict)

    def error(self, message: str) -> RecipeError:
        """An error about this model, in one line."""
        return RecipeError(f"{self.key}: {self.source!r} {message}")


def resolve_source(key: str, model: str) -> str:
    """The folder or hub id that a recipe names, after the checks that need no file of the hub.

    Args:
        key: the key of the recipe that names the model.
        model: its value: a local folder or a hub id.

    Raises:
        RecipeError: ``model`` is a path, and no folder with a ``config.json`` is at it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"{key}: {model!r} has no config.json; give a folder written by save_pretrained")
        return str(folder)
    if folder.exists():
        raise RecipeError(f"{key}: {model!r} is not a folder; give the folder that holds config.json")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise RecipeError(f"{key}: no folder {model!r}; give a local folder or a hub id owner/name")
    return model


def open_pretrained(key: str, model: str, revision: str | None) -> Pretrained:
    """Find a model and read its ``config.json``; a hub id is resolved to the commit that all further files come from.

    Args:
        key: the key of the recipe that names the model.
        model: a local folder or a hub id.
        revision: a branch, tag or commit of the hub repository; None: its main branch.

    Raises:
        RecipeError: there is no such model, its ``config.json`` is not a JSON object, or it describes a model that is
            too large, or code of others.
    """
    source = resolve_source(key, model)
    is_local = Path(source).is_dir()
    if is_local and revision:
        raise RecipeError(
            f"{key}: {model!r} is a local folder, which has no revisions; leave revision out, or start in a folder "
            "that has none of this name"
        )
    pretrained = Pretrained(key, source, None if is_local else revision)
    path = find_file(pretrained, "config.json")
    if path is None:
        at = f" at revision {revision!r}" if revision else ""
        raise pretrained.error(
            f"is no local folder, and no such hub repository could be read{at}; "
            "check the name and the network, or download it and give the folder"
        )
    # the commit is part of the path of config.json in the hub's cache folder
    commit = None if is_local else extract_commit_hash(str(path), None)
    pretrained = Pretrained(key, source, commit, _parse(key, path))
    if reason := why_refused(pretrained.config):
        raise pretrained.error(f"has a config.json whose {reason}")
    return pretrained


def find_file(pretrained: Pretrained, file: str) -> Path | None:
    """The path of a file of the model, downloaded first if it is on the hub; None if the model has no such file."""
    if Path(pretrained.source).is_dir():
        path = Path(pretrained.source) / file
        return path if path.is_file() else None
    try:
        path = cached_file(pretrained.source, file, revision=pretrained.revision)
    except (OSError, HFValidationError):
        return None
    return Path(path) if path else None


def may_exist_on_hub(pretrained: Pretrained, file: str) -> bool:
    """Whether the hub may have a file that could not be read: it is not on this disk, and the hub was not reached."""
    if Path(pretrained.source).is_dir() or find_file(pretrained, file):
        return False
    # the hub's cache records that the repository has no such file
    return try_to_load_from_cache(pretrained.source, file, revision=pretrained.revision) is not _CACHED_NO_EXIST


def read_json(pretrained: Pretrained, file: str) -> dict[str, Any] | None:
    """A JSON file of the model, or None where the model has no such file.

    Raises:
        RecipeError: it is not a JSON object.
    """
    path = find_file(pretrained, file)
    return None if path is None else _parse(pretrained.key, path)


def read_license(pretrained: Pretrained) -> str:
    """``license:`` in the front matter of the model's README.md, else "unknown"."""
    path = find_file(pretrained, "README.md")
    text = path.read_text(errors="replace") if path else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(front.group(1)) if front else None
    except (yaml.YAMLError, ValueError):
        return "unknown"
    license = metadata.get("license") if isinstance(metadata, dict) else None
    if license == "other" and isinstance(metadata, dict):
        license = metadata.get("license_name", license)
    return ", ".join(map(str, license)) if isinstance(license, list) else str(license or "unknown")


def _parse(key: str, path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text())
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{key}: {path} is not JSON ({reason}); download it again") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{key}: {path} must hold a JSON object, got {type(content).__name__}")
    return content
