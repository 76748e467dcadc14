"""Grafts: a teacher's own head, cut off its encoder and run on features, those of the teacher or of a student.

``HEADS`` is the table of where heads begin; an image-text teacher keeps class names instead (`ZeroShot`).
"""

from shoulders.teachers.heads.cuts import HEADS, HeadSpec, Taps
from shoulders.teachers.heads.head import TeacherHead, taps_of_teacher
from shoulders.teachers.heads.load import Head, check_head, head_class, load_head, read_processor
from shoulders.teachers.heads.zero_shot import PADDING, Names, ZeroShot, open_zero_shot

__all__ = [
    "HEADS",
    "PADDING",
    "HeadSpec",
    "TeacherHead",
    "Head",
    "Names",
    "Taps",
    "ZeroShot",
    "check_head",
    "head_class",
    "load_head",
    "open_zero_shot",
    "read_processor",
    "taps_of_teacher",
]
