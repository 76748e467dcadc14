"""Teachers: frozen models that compute Features of pixels.

``FAMILIES`` is the table of supported transformers models. Any other PyTorch model is a ``Teacher`` returned by a
function that the recipe names as ``module: package.module:function``.
"""

from shoulders.teachers.describe import describe
from shoulders.teachers.families import FAMILIES, list_families
from shoulders.teachers.load import check_teacher, load_teacher
from shoulders.teachers.pure import check_pure, check_same_on_ranks
from shoulders.teachers.task_head import TaskHead
from shoulders.teachers.teacher import AnyTeachers, Tap, Teacher, Teachers

__all__ = [
    "FAMILIES",
    "AnyTeachers",
    "Tap",
    "TaskHead",
    "Teacher",
    "Teachers",
    "check_pure",
    "check_same_on_ranks",
    "check_teacher",
    "describe",
    "list_families",
    "load_teacher",
]
