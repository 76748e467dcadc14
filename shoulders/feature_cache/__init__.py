"""Teachers' features on disk: asked once, and read in place of the teachers ever after."""

from shoulders.feature_cache.commands import build_cache, info_cache, verify_cache
from shoulders.feature_cache.estimate import estimate_cache
from shoulders.feature_cache.read import CachedTeachers, open_cache

__all__ = [
    "CachedTeachers",
    "build_cache",
    "info_cache",
    "open_cache",
    "estimate_cache",
    "verify_cache",
]
