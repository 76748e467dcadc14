"""The files of a pretrained model: all from one local folder, or from one commit of a hub repository."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file, extract_commit_hash

from shoulders.errors import RecipeError

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model before its weights.

    Args:
        where: key of the recipe that names the model; begins every message.
        source: hub id or local folder, as transformers takes it.
        revision: the commit that a hub id was resolved to; None for a folder.
        tree: what ``config.json`` says.
    """

    where: str
    source: str
    revision: str | None
    tree: dict[str, Any] = field(default_factory=dict)

    def fault(self, message: str) -> RecipeError:
        """The refusal of this model, in one line."""
        return RecipeError(f"{self.where}: {self.source!r} {message}")


def locate(where: str, given: str) -> str:
    """The folder or hub id that a recipe names, after the checks that need no file of the hub.

    Raises:
        RecipeError: if it is a path, and no folder with a ``config.json`` is there.
    """
    folder = Path(given).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"{where}: {given!r} has no config.json; give a folder written by save_pretrained")
        return str(folder)
    if folder.exists():
        raise RecipeError(f"{where}: {given!r} is not a folder; give the folder that holds config.json")
    if given.startswith((".", "/", "~")) or given.count("/") > 1 or "\\" in given:
        raise RecipeError(f"{where}: no folder {given!r}; give a local folder or a hub id owner/name")
    return given


def open_pretrained(where: str, given: str, revision: str | None) -> Pretrained:
    """Find a model and read its ``config.json``; a hub id is resolved to the commit that all further files come from.

    Raises:
        RecipeError: if there is no such model, or its ``config.json`` is no JSON object.
    """
    source = locate(where, given)
    local = Path(source).is_dir()
    if local and revision:
        raise RecipeError(
            f"{where}: {given!r} is a local folder, which has no revisions; leave revision out, or start where no "
            "folder is called so"
        )
    asked = Pretrained(where, source, None if local else revision)
    path = find(asked, "config.json")
    if path is None:
        at = f" at revision {revision!r}" if revision else ""
        raise asked.fault(
            f"is no local folder, and no such hub repository could be read{at}; "
            "check the name and the network, or download it and give the folder"
        )
    # a hub's commit is the name of the cache folder that config.json came from
    commit = None if local else extract_commit_hash(str(path), None)
    return Pretrained(where, source, commit, _parse(where, path))


def find(pretrained: Pretrained, file: str) -> Path | None:
    """A file of the model on this disk, downloaded first if it is on the hub; None if there is none."""
    if Path(pretrained.source).is_dir():
        path = Path(pretrained.source) / file
        return path if path.is_file() else None
    try:
        found = cached_file(pretrained.source, file, revision=pretrained.revision)
    except (OSError, HFValidationError):
        return None
    return Path(found) if found else None


def is_unknown(pretrained: Pretrained, file: str) -> bool:
    """Whether nobody could say if the hub has a file: it is not on this disk, and the hub was not reached."""
    if Path(pretrained.source).is_dir() or find(pretrained, file):
        return False
    # where the hub has said that there is none, its cache remembers that
    return try_to_load_from_cache(pretrained.source, file, revision=pretrained.revision) is not _CACHED_NO_EXIST


def read_json(pretrained: Pretrained, file: str) -> dict[str, Any] | None:
    """A JSON file of the model, or None where the model has none.

    Raises:
        RecipeError: if it is no JSON object.
    """
    path = find(pretrained, file)
    return None if path is None else _parse(pretrained.where, path)


def license_of(pretrained: Pretrained) -> str:
    """``license:`` in the front matter of the model's README.md, else "unknown"."""
    path = find(pretrained, "README.md")
    text = path.read_text(errors="replace") if path else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        tree = yaml.safe_load(front.group(1)) if front else None
    except (yaml.YAMLError, ValueError):
        return "unknown"
    license = tree.get("license") if isinstance(tree, dict) else None
    if license == "other" and isinstance(tree, dict):
        license = tree.get("license_name", license)
    return ", ".join(map(str, license)) if isinstance(license, list) else str(license or "unknown")


def _parse(where: str, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"{where}: {path} is not JSON ({why}); download it again") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: {path} must hold a JSON object, got {type(tree).__name__}")
    return tree
