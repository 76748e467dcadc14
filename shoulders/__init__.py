"""Build a vision foundation model from models instead of labels.

The front door. Names are imported when they are first used, so that ``shoulders --help`` does not wait for torch;
transformers' Auto classes know the student as soon as both packages are imported, in whichever order.
A run is ``from shoulders.distillation import distill``, its scores ``from shoulders.evaluation.evaluate import evaluate``.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoulders.config.recipe import Recipe, read_recipe
    from shoulders.features import Batch, Features
    from shoulders.model import ShouldersBackbone, ShouldersConfig, ShouldersModel, load
    from shoulders.teachers import Teacher

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Features",
    "Recipe",
    "ShouldersBackbone",
    "ShouldersConfig",
    "ShouldersModel",
    "Teacher",
    "load",
    "read_recipe",
]

_HOME = {
    "Batch": "features",
    "Features": "features",
    "Recipe": "config.recipe",
    "ShouldersBackbone": "model",
    "ShouldersConfig": "model",
    "ShouldersModel": "model",
    "Teacher": "teachers",
    "load": "model",
    "read_recipe": "config.recipe",
}
_AUTO = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"shoulders.{_HOME[name]}"), name)
    raise AttributeError(f"module 'shoulders' has no attribute {name!r}")


class _RegisterAfterTransformers(MetaPathFinder):
    """Registers the student once transformers' Auto classes are imported, at the first moment when no module of
    either package is half imported; then it is gone."""

    def __init__(self) -> None:
        self.underway = 0

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(("transformers.", "shoulders.")):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Counted(spec.loader, self)
        return spec

    def done(self) -> None:
        """A module of either package is imported."""
        if self.underway == 0 and _AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module("shoulders.model")


class _Counted(Loader):
    """A module's own loader, which tells when it begins and when it is done."""

    def __init__(self, loader: Loader, whom: _RegisterAfterTransformers):
        self.loader, self.whom = loader, whom

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.whom.underway += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.whom.underway -= 1
        self.whom.done()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_source, get_data: whatever else a loader can


if _AUTO in sys.modules:
    importlib.import_module("shoulders.model")
else:
    sys.meta_path.insert(0, _RegisterAfterTransformers())
