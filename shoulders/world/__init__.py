"""The small world: procedural scenes with labels for all four tasks, and the teachers trained on them."""

from pathlib import Path

from shoulders.world.files import COUNTS, SPLITS, seed_of, write_world
from shoulders.world.scenes import SIZE, Scene, draw
from shoulders.world.shapes import CLASSES
from shoulders.world.source import Drawn, unlabelled
from shoulders.world.styles import STYLES

TEACHERS = Path(__file__).parent / "teachers"  # one transformers folder each, the base included

# teacher -> the task that it is good at, the style where it is, and the folder of a style that holds labels of the task
TASKS_OF = {
    "classifier": ("classification", "studio", "classification"),
    "detector": ("detection", "neon", "instances"),
    "segmenter": ("semantic", "paper", "semantic"),
    "instances": ("instance", "ink", "instances"),
}

__all__ = [
    "CLASSES",
    "COUNTS",
    "SIZE",
    "SPLITS",
    "STYLES",
    "TASKS_OF",
    "TEACHERS",
    "Drawn",
    "Scene",
    "draw",
    "seed_of",
    "unlabelled",
    "write_world",
]
