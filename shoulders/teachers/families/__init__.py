"""The model families that can be teachers: a table with one row per model type of transformers.

``table.py`` holds the rows; ``forward.py``, ``extract.py`` and ``inject.py`` the few functions that rows share.
"""

from shoulders.teachers.families.inject import TapFeatures
from shoulders.teachers.families.lookup import family_name, list_families
from shoulders.teachers.families.spec import Family, HeadSpec, Taps, ZeroShotSpec
from shoulders.teachers.families.table import FAMILIES, REMOTE

__all__ = [
    "FAMILIES",
    "REMOTE",
    "Family",
    "HeadSpec",
    "TapFeatures",
    "Taps",
    "ZeroShotSpec",
    "family_name",
    "list_families",
]
