"""Estimate the time, memory and disk of a distillation before it runs, and suggest how to reduce them."""

from shoulders.planning.estimate import plan

__all__ = ["plan"]
