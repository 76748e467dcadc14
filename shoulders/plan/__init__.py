"""What a distillation will take, said before it is run, and what would make it cheaper."""

from shoulders.plan.estimate import plan
from shoulders.plan.show import show_plan

__all__ = ["plan", "show_plan"]
