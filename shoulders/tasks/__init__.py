"""Tasks: one file per task, each with one row, and the table of the rows."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from shoulders.errors import RecipeError
from shoulders.tasks import classification, detection, instance, semantic
from shoulders.tasks.task import FinetuneTask, Metric, ProbeHead, Row, Task
from shoulders.teachers.heads import ModuleHead

# in the order of tables; everything that depends on a task reads its row
TASKS: dict[str, Task] = {
    task.name: task for task in (classification.TASK, detection.TASK, semantic.TASK, instance.TASK)
}


def find_task(name: str) -> Task:
    """The row of a task.

    Raises:
        RecipeError: there is no task of this name.
    """
    if name not in TASKS:
        raise RecipeError(f"--task: {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name]


def task_of_head(head: Any) -> str | None:
    """The name of the task that a teacher's head does, by the name of its transformers class; None for another."""
    if isinstance(head, ModuleHead):
        return head.task
    name = type(head.model).__name__
    return next((task.name for task in TASKS.values() if name.endswith(task.head_classes)), None)


def check_probe(task: Task, name: str, finetune: str | None = None) -> None:
    """Refuse a probe that the task does not have, that cannot be fitted on this machine, or not be finetuned.

    Raises:
        RecipeError: naming the probes of the task, or the package to install.
    """
    default = task.probe_head.name
    allowed = (default, *task.larger_probes)
    if name not in allowed:
        raise RecipeError(f"--probe: {name!r} is none of {', '.join(allowed)}, the probes of {task.name}")
    if finetune and name != default:
        raise RecipeError(f"--probe: {name} is fitted on frozen features only; leave --finetune or --probe out")
    package = task.probe_packages.get(name)
    if package and find_spec(package) is None:
        raise RecipeError(f'--probe: the loss of {name} needs {package}; install it with pip install "shoulders[det]"')


__all__ = ["TASKS", "FinetuneTask", "Metric", "ProbeHead", "Row", "Task", "check_probe", "find_task", "task_of_head"]
