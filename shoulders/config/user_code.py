"""Code of the user's own, named in a recipe as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


def check_function(path: str) -> None:
    """Refuse a name that cannot be called, as far as can be known without running any of it.

    Raises:
        ValueError: saying what is wrong.
    """
    module, _ = _split(path)
    with _current_folder_importable():
        try:
            found = find_spec(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or ""):
                raise ValueError(f"importing what {module} is in fails: {error}") from error
            found = None
        except Exception as error:  # finding it runs the packages that it is in
            raise ValueError(f"importing what {module} is in fails: {type(error).__name__}: {error}") from error
    if found is None:
        raise ValueError(f"no Python module {module!r} here or among the installed packages")


def call_function(path: str, **settings: Any) -> Any:
    """What the function returns.

    Raises:
        ValueError: it cannot be imported or called, or it raised.
    """
    check_function(path)
    module_name, function_name = _split(path)
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # it is the user's code: whatever it raises is reported as theirs
            raise ValueError(f"importing {module_name} fails: {type(error).__name__}: {error}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"{module_name} has no function {function_name!r}")
        try:
            return function(**settings)
        except Exception as error:
            raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error


def _split(path: str) -> tuple[str, str]:
    module, colon, function = path.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{path!r} must be written package.module:function")
    return module, function


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Modules in the current folder can be imported, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
