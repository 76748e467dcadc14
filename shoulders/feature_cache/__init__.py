"""Teacher features on disk: computed once, verified, and read by every run instead of running the teachers."""

from shoulders.feature_cache.build import BuildSettings
from shoulders.feature_cache.commands import build_cache, info_cache, verify_cache
from shoulders.feature_cache.estimate import estimate_cache
from shoulders.feature_cache.read import CachedTeachers, open_cache

__all__ = [
    "BuildSettings",
    "CachedTeachers",
    "build_cache",
    "estimate_cache",
    "info_cache",
    "open_cache",
    "verify_cache",
]
