"""The config and the weights of a pretrained model, through transformers: safetensors only, strictly, quietly."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from shoulders.errors import DataError
from shoulders.hub.files import Pretrained
from shoulders.hub.weight_files import INDEX, WEIGHTS, check_weight_files, weight_paths
from shoulders.storage.tensor_files import check_header

# AttributeError and ImportError come from a model's own code
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".npy", ".h5", ".msgpack", ".zip", ".tar")
LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError)


def read_config(pretrained: Pretrained, *, remote_code: bool = False) -> PreTrainedConfig:
    """The config as its transformers class, with the defaults that ``config.json`` leaves out.

    Raises:
        RecipeError: ``config.json`` does not fit the class.
    """
    source, revision = pretrained.source, pretrained.revision
    try:
        with quiet():
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=remote_code)
    except (*LOAD_ERRORS, StrictDataclassError) as error:
        raise pretrained.error(f"has a config.json that is not valid: {_one_line(error)}") from error


def check_weights(pretrained: Pretrained) -> None:
    """Refuse a local folder without safetensors, and any model whose files name other weights than its own.

    Whether a hub model has safetensors is found out when its weights are loaded.

    Raises:
        RecipeError: the folder has no weights, or a pickle of them, which the message says how to convert; or as
            `check_weight_files`.
    """
    check_weight_files(pretrained)
    folder = Path(pretrained.source)
    if not folder.is_dir() or any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return
    if any(folder.glob("pytorch_model*.bin")):
        model_class = (pretrained.config.get("architectures") or ["AutoModel"])[0]
        raise pretrained.error(
            "has its weights only as pytorch_model.bin, a pickle, which is never read; if you trust it, convert it "
            f'once: python -c "import transformers; transformers.{model_class}.from_pretrained'
            f"('{folder}').save_pretrained('{folder}')\""
        )
    if others := sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS):
        raise pretrained.error(
            f"has its weights only as {others[0]}, and nothing but safetensors is read; if you trust it, convert it "
            "once: load it with the code that wrote it, and save the model with save_pretrained"
        )
    raise pretrained.error("has no model.safetensors; give a folder with weights")


def load_strict(
    pretrained: Pretrained,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    required_prefix: str = "",
    optional_prefixes: tuple[str, ...] = (),
    remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A model with its weights in float32; the file may hold more weights: of a head or a text tower that is not used.

    Args:
        config: the config of ``model_class``, or of the model that ``model_class`` is a part of.
        required_prefix: weights whose names begin with it must be in the file.
        optional_prefixes: weights whose names begin with one of these may be missing all the same.
        options: further arguments of the model's constructor.

    Raises:
        RecipeError: as `check_weights`.
        DataError: a weight is missing, has another shape or is not finite, or the file is damaged or not safetensors.
    """
    check_weights(pretrained)
    model_name = f"{pretrained.key}: {pretrained.source!r}"
    try:
        for path in weight_paths(pretrained):
            check_header(path)
        with quiet():
            # float32 from the start: weights are cast exactly, and buffers that the constructor computes stay exact
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
        check_finite(model)
    except (*LOAD_ERRORS, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{model_name}: weights cannot be read as {model_class.__name__}: {_one_line(error)}"
        ) from error
    required = (name for name in report["missing_keys"] if name.startswith(required_prefix))
    missing = sorted(name for name in required if not name.startswith(optional_prefixes))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{model_name}: the weights lack {', '.join(missing[:3])}{more} of {model_class.__name__}")
    return model


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: naming the first.
    """
    for name, weight in model.named_parameters():
        if weight.numel() and not all(end.isfinite() for end in weight.aminmax()):  # NaN if any value is
            raise ValueError(f"{name} holds values that are not finite")


class Quiet:
    """Silences transformers while any thread is in this context: the first one enters it, the last one restores it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.level, self.has_bar = 0, False

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.level, self.has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
                logging.set_verbosity_error()
                logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users:
                return
            logging.set_verbosity(self.level)
            if self.has_bar:
                logging.enable_progress_bar()


_QUIET = Quiet()


def quiet() -> Quiet:
    """Within this context transformers shows no progress bar and no report of weights left out on purpose."""
    return _QUIET


def _one_line(error: BaseException) -> str:
    """An exception's message in one line."""
    return " ".join(str(error).split())
