"""Grafts: a teacher's own head, cut off its encoder and run on features, those of the teacher or of a student.

``CUTS`` is the table of where heads begin; an image-text teacher keeps class names instead (`ZeroShot`).
"""

from shoulders.grafts.cuts import CUTS, Cut, Taps
from shoulders.grafts.graft import Graft, taps_of
from shoulders.grafts.load import Head, check_graft, head_class, load_graft, read_processor
from shoulders.grafts.zero_shot import PADDING, Names, ZeroShot, open_zero_shot

__all__ = [
    "CUTS",
    "PADDING",
    "Cut",
    "Graft",
    "Head",
    "Names",
    "Taps",
    "ZeroShot",
    "check_graft",
    "head_class",
    "load_graft",
    "open_zero_shot",
    "read_processor",
    "taps_of",
]
