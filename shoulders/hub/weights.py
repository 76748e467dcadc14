"""The config and the weights of a pretrained model, through transformers: safetensors only, strictly, quietly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from shoulders.errors import DataError
from shoulders.hub.files import Pretrained

FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError)  # the last two of a model's own code
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def read_config(pretrained: Pretrained, *, remote_code: bool = False) -> PreTrainedConfig:
    """The config as its transformers class, with the defaults that ``config.json`` leaves out.

    Raises:
        RecipeError: if ``config.json`` does not fit the class.
    """
    source, revision = pretrained.source, pretrained.revision
    try:
        with quiet():
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=remote_code)
    except (*FAULTS, StrictDataclassError) as error:
        raise pretrained.fault(f"has a config.json that is not valid: {_line(error)}") from error


def check_weights(pretrained: Pretrained) -> None:
    """Refuse a local folder without safetensors; the hub is asked when the weights are loaded.

    Raises:
        RecipeError: with the way to convert weights that are there as a pickle.
    """
    folder = Path(pretrained.source)
    if not folder.is_dir() or any((folder / name).is_file() for name in WEIGHTS):
        return
    if any(folder.glob("pytorch_model*.bin")):
        model_class = (pretrained.tree.get("architectures") or ["AutoModel"])[0]
        raise pretrained.fault(
            "has its weights only as pytorch_model.bin, a pickle, which is never read; if you trust it, convert it "
            f'once: python -c "import transformers; transformers.{model_class}.from_pretrained'
            f"('{folder}').save_pretrained('{folder}')\""
        )
    raise pretrained.fault("has no model.safetensors; give a folder with weights")


def load_strict(
    pretrained: Pretrained,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    inside: str = "",
    apart_from: tuple[str, ...] = (),
    remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A model with its weights in float32; weights left over are fine: a head or a text tower that is not read.

    Args:
        config: of ``model_class``, or of the whole that it is a part of.
        inside: beginning of the names of the weights that must be there.
        apart_from: beginnings of the names of those that may be missing all the same.
        options: further arguments of the model's constructor.

    Raises:
        DataError: if a weight is missing or of another shape, or the file is damaged or no safetensors.
    """
    where = f"{pretrained.where}: {pretrained.source!r}"
    try:
        with quiet():
            # float32 at once: weights are cast exactly, and tables computed at birth keep their precision
            model, report = model_class.from_pretrained(
                pretrained.source,
                config=config,
                revision=pretrained.revision,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=remote_code,
                **options,
            )
    except (*FAULTS, RuntimeError, SafetensorError) as error:
        raise DataError(f"{where}: weights cannot be read as {model_class.__name__}: {_line(error)}") from error
    needed = (key for key in report["missing_keys"] if key.startswith(inside))
    missing = sorted(key for key in needed if not key.startswith(apart_from))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{where}: the weights lack {', '.join(missing[:3])}{more} of {model_class.__name__}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar and its report of the weights that are left out on purpose."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    """An exception's message in one line."""
    return " ".join(str(error).split())
