"""The parts of a distillation: what is trained, its optimizers, checks before it, measures during it."""
