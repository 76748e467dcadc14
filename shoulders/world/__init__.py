"""The small world: procedural scenes with labels for all four tasks, and the teachers trained on them."""

from pathlib import Path
from typing import NamedTuple

from shoulders.world.files import SCENES_PER_SPLIT, SPLITS, split_seed, write_world
from shoulders.world.scenes import SIZE, Scene, draw
from shoulders.world.shapes import CLASSES
from shoulders.world.source import WorldImages, unlabelled
from shoulders.world.styles import STYLES

TEACHERS = Path(__file__).parent / "teachers"  # folders in transformers format, one for each teacher and the base


class TeacherTask(NamedTuple):
    """What a teacher was trained for.

    Args:
        task: a name in `shoulders.tasks.TASKS`.
        style: the only style it was trained on.
        labels: the folder of a style that holds labels of the task.
    """

    task: str
    style: str
    labels: str


TEACHER_TASKS = {
    "classifier": TeacherTask("classification", "studio", "classification"),
    "detector": TeacherTask("detection", "neon", "instances"),
    "segmenter": TeacherTask("semantic", "paper", "semantic"),
    "instances": TeacherTask("instance", "ink", "instances"),
}

__all__ = [
    "CLASSES",
    "SCENES_PER_SPLIT",
    "SIZE",
    "SPLITS",
    "STYLES",
    "TEACHERS",
    "TEACHER_TASKS",
    "Scene",
    "TeacherTask",
    "WorldImages",
    "draw",
    "split_seed",
    "unlabelled",
    "write_world",
]
