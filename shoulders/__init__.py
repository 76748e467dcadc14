"""Build a vision foundation model from models instead of labels.

The front door. Names are imported when they are first used, so that ``shoulders --help`` does not wait for torch;
transformers' Auto classes know the student as soon as both packages are imported, in whichever order.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoulders.distill import distill
    from shoulders.evaluate import evaluate
    from shoulders.features import Batch, Features
    from shoulders.model import ShouldersBackbone, ShouldersConfig, ShouldersModel, load
    from shoulders.recipe import Recipe, read_recipe
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
    "distill",
    "evaluate",
    "load",
    "read_recipe",
]

_HOME = {
    "Batch": "features", "Features": "features", "Recipe": "recipe", "ShouldersBackbone": "model",
    "ShouldersConfig": "model", "ShouldersModel": "model", "Teacher": "teachers", "load": "model",
    "read_recipe": "recipe",
}  # fmt: skip
_AUTO = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"shoulders.{_HOME[name]}"), name)
    raise AttributeError(f"module 'shoulders' has no attribute {name!r}")


class _RegisterAfter(MetaPathFinder):
    """Registers the student right after transformers' Auto classes are imported; does nothing else."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AUTO:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A module's own loader, and then the registration."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # the modelling half imports the configuration half: where it has only begun, wait for its end
        if module.__name__ == _AUTO[1] or _AUTO[1] not in sys.modules:
            importlib.import_module("shoulders.model")


if _AUTO[0] in sys.modules:
    importlib.import_module("shoulders.model")
else:
    sys.meta_path.insert(0, _RegisterAfter())
