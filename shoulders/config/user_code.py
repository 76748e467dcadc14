"""Functions of the user that a recipe names as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


def check_function(path: str) -> None:
    """Refuse a name that cannot be imported, without running the module itself.

    Raises:
        ValueError: naming what is wrong.
    """
    module, _ = _split(path)
    with _current_folder_importable():
        if _find_module(module) is None:
            raise ValueError(f"no Python module {module!r} in the current folder or among the installed packages")


def call_function(path: str, **settings: Any) -> Any:
    """Import a function and call it with these keyword arguments.

    Returns:
        What the function returns.

    Raises:
        ValueError: it cannot be imported or called, or it raised.
    """
    check_function(path)
    module_name, function_name = _split(path)
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # user code may raise anything: the message names the module
            raise ValueError(f"importing {module_name} fails: {type(error).__name__}: {error}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"{module_name} has no function {function_name!r}")
        try:
            return function(**settings)
        except Exception as error:
            raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error


def _find_module(module: str) -> ModuleSpec | None:
    """The spec of a module; finding it imports the packages that contain it.

    Raises:
        ValueError: importing one of these packages fails.
    """
    try:
        return find_spec(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or ""):
            return None  # the module itself, or a package that should contain it
        raise ValueError(f"importing a package of {module} fails: {error}") from error
    except Exception as error:
        raise ValueError(f"importing a package of {module} fails: {type(error).__name__}: {error}") from error


def _split(path: str) -> tuple[str, str]:
    module, colon, function = path.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{path!r} must be written package.module:function")
    return module, function


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Let modules in the current folder be imported, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
