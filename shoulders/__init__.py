"""Build a vision foundation model from models instead of labels.

The front door: every public name of the package is listed in `PUBLIC`, and imported when it is first used, so that
``import shoulders`` and ``shoulders --help`` do not wait for torch::

    import shoulders

    shoulders.distill("recipes/real_small.yaml")
    student = shoulders.load("runs/real_small")

The Auto classes of transformers know the student as soon as both packages are imported, in either order.
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
    from shoulders.distillation import distill
    from shoulders.feature_cache import build_cache as cache
    from shoulders.features import Batch, Features
    from shoulders.model import ShouldersBackbone, ShouldersConfig, ShouldersModel, load
    from shoulders.planning import plan
    from shoulders.prediction import predict
    from shoulders.teachers import TaskHead, Teacher
    from shoulders.training.supervised_baseline import evaluate_with_baseline as evaluate

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Features",
    "Recipe",
    "ShouldersBackbone",
    "ShouldersConfig",
    "ShouldersModel",
    "TaskHead",
    "Teacher",
    "cache",
    "distill",
    "evaluate",
    "load",
    "plan",
    "predict",
    "read_recipe",
]

# public name -> "module:name" where it is defined; no submodule has one of these names, which would hide it
PUBLIC = {
    "Batch": "shoulders.features:Batch",
    "Features": "shoulders.features:Features",
    "Recipe": "shoulders.config.recipe:Recipe",
    "ShouldersBackbone": "shoulders.model:ShouldersBackbone",
    "ShouldersConfig": "shoulders.model:ShouldersConfig",
    "ShouldersModel": "shoulders.model:ShouldersModel",
    "TaskHead": "shoulders.teachers:TaskHead",
    "Teacher": "shoulders.teachers:Teacher",
    "cache": "shoulders.feature_cache:build_cache",
    "distill": "shoulders.distillation:distill",
    "evaluate": "shoulders.training.supervised_baseline:evaluate_with_baseline",
    "load": "shoulders.model:load",
    "plan": "shoulders.planning:plan",
    "predict": "shoulders.prediction:predict",
    "read_recipe": "shoulders.config.recipe:read_recipe",
}
AUTO_CLASSES = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'shoulders' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})


class RegistrationFinder(MetaPathFinder):
    """Registers the student with transformers once its Auto classes are imported, and then removes itself.

    It waits until no module of either package is partly imported: ``shoulders.model`` needs all of them.
    """

    def __init__(self) -> None:
        self.imports_in_progress = 0

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual spec of a module of either package, with a loader that counts."""
        if not name.startswith(("transformers.", "shoulders.")):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = CountingLoader(spec.loader, self)
        return spec

    def register_when_ready(self) -> None:
        """Import the module that registers the student, if nothing is partly imported."""
        if self.imports_in_progress == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module("shoulders.model")


class CountingLoader(Loader):
    """A module's own loader; it counts the imports that are in progress."""

    def __init__(self, loader: Loader, finder: RegistrationFinder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, counted."""
        self.finder.imports_in_progress += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.imports_in_progress -= 1
        self.finder.register_when_ready()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_source, get_data and what else a loader has


if AUTO_CLASSES in sys.modules:
    importlib.import_module("shoulders.model")
else:
    sys.meta_path.insert(0, RegistrationFinder())
