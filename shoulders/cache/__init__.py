"""Teachers' features on disk: asked once, and read in place of the teachers ever after."""

from shoulders.cache.commands import build_cache, info_cache, verify_cache
from shoulders.cache.estimate import plan_cache
from shoulders.cache.read import AnyTeachers, CachedTeachers, open_cache
from shoulders.cache.show import show_contents, show_plan

__all__ = [
    "AnyTeachers",
    "CachedTeachers",
    "build_cache",
    "info_cache",
    "open_cache",
    "plan_cache",
    "show_contents",
    "show_plan",
    "verify_cache",
]
