"""The small world: procedural scenes with labels for all four tasks, and the teachers trained on them."""

from shoulders.world.scenes import SIZE, Scene, draw
from shoulders.world.shapes import CLASSES
from shoulders.world.styles import STYLES

__all__ = ["CLASSES", "SIZE", "STYLES", "Scene", "draw"]
