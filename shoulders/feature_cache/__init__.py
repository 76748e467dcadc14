"""Teachers' features on disk: asked once, and read in place of the teachers ever after."""

from shoulders.feature_cache.commands import build_cache, info_cache, verify_cache
from shoulders.feature_cache.estimate import plan_cache
from shoulders.feature_cache.read import AnyTeachers, CachedTeachers, open_cache

__all__ = [
    "AnyTeachers",
    "CachedTeachers",
    "build_cache",
    "info_cache",
    "open_cache",
    "plan_cache",
    "verify_cache",
]
