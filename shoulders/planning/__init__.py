"""What a distillation will take, said before it is run, and what would make it cheaper."""

from shoulders.planning.estimate import plan

__all__ = ["plan"]
