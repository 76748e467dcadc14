"""A teacher's own head, separated from its encoder and run on features: the teacher's, or those of a student.

Where a head begins stands in its family's row of the table (`shoulders.teachers.families`). The head of an image-text
teacher is a set of class names (`ZeroShot`), that of a teacher of your own any module (`ModuleHead`).
"""

from shoulders.teachers.heads.head import ClassScores, TeacherHead, taps_of_teacher
from shoulders.teachers.heads.load import Head, check_head, head_class, load_head, read_processor
from shoulders.teachers.heads.module_head import ModuleHead, load_module_head
from shoulders.teachers.heads.zero_shot import ClassNames, ZeroShot, open_zero_shot

__all__ = [
    "ClassNames",
    "ClassScores",
    "Head",
    "ModuleHead",
    "TeacherHead",
    "ZeroShot",
    "check_head",
    "head_class",
    "load_head",
    "load_module_head",
    "open_zero_shot",
    "read_processor",
    "taps_of_teacher",
]
