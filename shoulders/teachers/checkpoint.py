"""What a transformers checkpoint says of itself before its weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig
from transformers.utils import cached_file, extract_commit_hash, logging

from shoulders.errors import RecipeError
from shoulders.recipe import TeacherSpec
from shoulders.teachers.families import FAMILIES, REMOTE, Family
from shoulders.teachers.preprocessing import FILES, Preprocessing, read_preprocessing

COMMIT = re.compile(r"[0-9a-f]{40}")


def fault(name: str, key: str, message: str) -> RecipeError:
    """The refusal of one key of one teacher, in one line."""
    return RecipeError(f"teachers.{name}.{key}: {message}")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar and its report of the head's weights, left out on purpose."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's own description: everything but the weights.

    Args:
        source: hub id or local folder, as transformers takes it.
        config: the transformers config; ``image_config`` is the part of it that describes the image encoder.
        preprocessing: input size (legal for this family), mean and std.
        taps: the taps to use.
        revision: the commit that a hub id was resolved to; None for a folder.
    """

    source: str
    family: Family
    config: Any
    image_config: Any
    preprocessing: Preprocessing
    taps: tuple[str, ...]
    licence: str
    revision: str | None


def read_checkpoint(name: str, spec: TeacherSpec) -> Checkpoint:
    """Read and judge everything that is known before the weights.

    Raises:
        RecipeError: the model is not there, not supported or not loadable, or has no such taps or size; one
            line that begins with the recipe's key.
    """
    source = _locate(name, spec)
    tree = _read_json(name, spec, source, "config.json")
    if tree is None:
        raise _not_found(name, spec)
    revision = _commit(source, spec)
    spec = spec.model_copy(update={"revision": revision})  # all further files come from the same commit
    family = _choose_family(name, spec, tree)
    try:
        with quiet():
            remote = family is REMOTE
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=remote)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise fault(name, "model", f"{spec.model!r}: config.json is not valid: {_line(error)}") from error
    image_config = getattr(config, family.part) if family.part else config
    _check_weights(name, spec, source, tree)
    return Checkpoint(
        source=source,
        family=family,
        config=config,
        image_config=image_config,
        preprocessing=_preprocessing(name, spec, source, family, image_config),
        taps=_choose_taps(name, spec, family, image_config),
        licence=_licence(source, spec),
        revision=revision,
    )


def _locate(name: str, spec: TeacherSpec) -> str:
    """The folder or hub id, after the checks that need no file."""
    given = str(spec.model)
    folder = Path(given).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise fault(name, "model", f"{given!r} has no config.json; give a folder written by save_pretrained")
        return str(folder)
    if folder.exists():
        raise fault(name, "model", f"{given!r} is not a folder; give the folder that holds config.json")
    if given.startswith((".", "/", "~")) or given.count("/") > 1 or "\\" in given:
        raise fault(name, "model", f"no folder {given!r}; give a local folder or a hub id owner/name")
    if spec.trust_remote_code and not COMMIT.fullmatch(spec.revision or ""):
        raise fault(
            name,
            "revision",
            f"remote code runs only at a fixed commit; give 40 hex digits, got {spec.revision!r}",
        )
    return given


def _not_found(name: str, spec: TeacherSpec) -> RecipeError:
    at = f" at revision {spec.revision!r}" if spec.revision else ""
    return fault(
        name,
        "model",
        f"{spec.model!r} is no local folder, and no such hub repository could be read{at}; "
        "check the name and the network, or download it and give the folder",
    )


def _find(source: str, spec: TeacherSpec, file: str) -> Path | None:
    """A file of the checkpoint on this disk, downloaded first if it is on the hub; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / file
        return path if path.is_file() else None
    try:
        found = cached_file(source, file, revision=spec.revision)
    except (OSError, HFValidationError):
        return None
    return Path(found) if found else None


def _commit(source: str, spec: TeacherSpec) -> str | None:
    """The commit that a hub id was resolved to: the name of the cache folder that config.json came from."""
    return None if Path(source).is_dir() else extract_commit_hash(str(_find(source, spec, "config.json")), None)


def _read_json(name: str, spec: TeacherSpec, source: str, file: str) -> dict[str, Any] | None:
    path = _find(source, spec, file)
    if path is None:
        return None
    try:
        tree = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise fault(name, "model", f"{path} is not JSON ({_line(error)}); download it again") from error
    if not isinstance(tree, dict):
        raise fault(name, "model", f"{path} must hold a JSON object, got {type(tree).__name__}")
    return tree


def _choose_family(name: str, spec: TeacherSpec, tree: dict[str, Any]) -> Family:
    """The row of the table for a config.json, or REMOTE where its code is asked for and there."""
    if spec.trust_remote_code and "auto_map" in tree:
        if any("--" in str(place) for place in tree["auto_map"].values()):
            raise fault(
                name,
                "trust_remote_code",
                f"{spec.model!r} takes its code from another repository, "
                "which no revision fixes; give that repository's code in a module: of your own",
            )
        return REMOTE
    model_type = tree.get("model_type")
    if model_type not in FAMILIES:
        raise fault(
            name,
            "model",
            f"{spec.model!r} is of model type {model_type!r}, which is not supported; "
            f"known: {', '.join(sorted(FAMILIES))}; "
            "or write a function that builds it and give module: package.module:function",
        )
    backbone = tree.get("backbone_config") or {}
    uses_timm = tree.get("use_timm_backbone") or backbone.get("model_type") == "timm_backbone"
    if uses_timm and find_spec("timm") is None:
        raise fault(
            name,
            "model",
            f"{spec.model!r} has a timm backbone; install timm, "
            "or give a revision of it with a transformers backbone (for facebook/detr-*: no_timm)",
        )
    return FAMILIES[model_type]


def _check_weights(name: str, spec: TeacherSpec, source: str, tree: dict[str, Any]) -> None:
    """A local folder must hold safetensors; the hub is asked when the weights are loaded."""
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("pytorch_model*.bin")):
        model_class = (tree.get("architectures") or ["AutoModel"])[0]
        raise fault(
            name,
            "model",
            f"{spec.model!r} has its weights only as pytorch_model.bin, a pickle, which is "
            f'never read; if you trust it, convert it once: python -c "import transformers; transformers.'
            f"{model_class}.from_pretrained('{spec.model}').save_pretrained('{spec.model}')\"",
        )
    raise fault(name, "model", f"{spec.model!r} has no *.safetensors; give a folder with weights")


def _choose_taps(name: str, spec: TeacherSpec, family: Family, config: Any) -> tuple[str, ...]:
    names = family.taps.names(config)
    if spec.taps is None:
        return family.taps.chosen(config)
    unknown = [tap for tap in spec.taps if tap not in names]
    if unknown or not spec.taps:
        raise fault(name, "taps", f"no tap {', '.join(unknown) or 'given'}; {spec.model!r} has {', '.join(names)}")
    return tuple(dict.fromkeys(spec.taps))


def _preprocessing(name: str, spec: TeacherSpec, source: str, family: Family, config: Any) -> Preprocessing:
    own = _image_size(config)
    side = (family.size, family.size) if family.size else own or (224, 224)
    default = Preprocessing(side, *family.stats)
    trees = (_read_json(name, spec, source, file) for file in FILES)
    try:
        said = read_preprocessing(next((tree for tree in trees if tree), {}), default)
    except ValueError as error:
        raise fault(name, "model", f"{spec.model!r}: {' or '.join(FILES)}: {error}") from error
    step = family.step(config)
    if spec.size is not None:
        size = (spec.size, spec.size) if isinstance(spec.size, int) else spec.size
        _check_size(name, size, own if family.fixed else None, step)
    elif family.fixed and own:
        size = own
    else:  # some checkpoints resize to a shortest edge that the encoder itself would pad
        size = (_nearest(said.size[0], step), _nearest(said.size[1], step))
    return Preprocessing(size, said.mean, said.std)


def _check_size(name: str, size: tuple[int, int], only: tuple[int, int] | None, step: int) -> None:
    if only is not None and size != only:
        raise fault(name, "size", f"{size[0]} x {size[1]} given, but this model takes only {only[0]} x {only[1]}")
    for side in size:
        below, above = side // step * step, -(-side // step) * step
        if side < 1 or below != above:
            legal = " and ".join(str(s) for s in (below, max(above, step)) if s > 0)
            raise fault(name, "size", f"{side} px is not a multiple of {step}; nearest legal: {legal}")


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)


def _image_size(config: Any) -> tuple[int, int] | None:
    """The image size that a config, or the backbone's config in it, was built for."""
    for part in (config, getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if size:
            return int(size[0]), int(size[-1])
    return None


def _licence(source: str, spec: TeacherSpec) -> str:
    """``license:`` in the front matter of README.md, else "unknown"."""
    path = _find(source, spec, "README.md")
    text = path.read_text(errors="replace") if path else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        tree = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        return "unknown"
    licence = tree.get("license") if isinstance(tree, dict) else None
    if licence == "other" and isinstance(tree, dict):
        licence = tree.get("license_name", licence)
    return ", ".join(licence) if isinstance(licence, list) else str(licence or "unknown")


def _line(error: BaseException) -> str:
    """An exception's message in one line."""
    return " ".join(str(error).split())
