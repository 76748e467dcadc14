"""Functions of the user that a recipe names as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import product
from pathlib import Path
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
    with _current_folder_importable():
        function = import_code(path)
        try:
            return function(**settings)
        except Exception as error:  # user code may raise anything
            raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error


def import_code(path: str, refused: Sequence[Path] = ()) -> Callable[..., Any]:
    """Import a function or class.

    Args:
        path: ``package.module:name``.
        refused: folders whose code is never imported.

    Raises:
        ValueError: it cannot be imported, or lies in one of these folders.
    """
    module_name, name = _split(path)
    with _current_folder_importable():
        if refused:
            _check_outside(module_name.partition(".")[0], refused)
        check_function(path)
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # user code may raise anything: the message names the module
            raise ValueError(f"importing {module_name} fails: {type(error).__name__}: {error}") from error
        if not callable(code := getattr(module, name, None)):
            raise ValueError(f"{module_name} has no function {name!r}")
        return code


def code_name(kind: type) -> str:
    """``package.module:Class``, by which `import_code` finds a class again.

    Raises:
        ValueError: it cannot be found by its name.
    """
    path = f"{kind.__module__}:{kind.__qualname__}"
    advice = "define it at the top level of a module that can be imported, not in a function or a script that is run"
    try:
        found = None if kind.__module__ == "__main__" else import_code(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported ({error}); {advice}") from error
    if found is not kind:
        raise ValueError(f"{path} cannot be imported; {advice}")
    return path


def _check_outside(package: str, folders: Sequence[Path]) -> None:
    """Refuse a top-level module of Python itself, or in one of these folders, without importing it.

    Raises:
        ValueError: naming it.
    """
    if package in sys.stdlib_module_names:
        raise ValueError(f"{package} is a module of Python itself")
    spec = _find_module(package)
    places = () if spec is None else (*(spec.submodule_search_locations or ()), spec.origin)
    for place, folder in product(places, folders):
        if place is not None and Path(place).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{package} lies in {folder}; code that comes with a student is not run")


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
