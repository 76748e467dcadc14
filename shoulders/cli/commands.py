"""The table of commands. Each command imports torch only when it runs, so that ``shoulders --help`` is fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from shoulders.cli.cache import cache
from shoulders.cli.demo import demo
from shoulders.cli.distill import distill
from shoulders.cli.evaluate import evaluate
from shoulders.cli.plan import plan
from shoulders.cli.predict import predict
from shoulders.cli.report import report
from shoulders.cli.teachers import teachers
from shoulders.cli.world import world

COMMANDS: tuple[Callable[..., None], ...] = (
    distill,
    plan,
    cache,
    evaluate,
    predict,
    report,
    teachers,
    demo,
    world,
)


def _task_names() -> str:
    from shoulders.tasks import TASKS

    return ", ".join(TASKS)


def _probe_names() -> str:
    from shoulders.tasks import TASKS

    return ", ".join(name for task in TASKS.values() for name in task.larger_probes)


# placeholder in the help of an option -> the names that it stands for
CHOICES = {"{tasks}": _task_names, "{probes}": _probe_names}


class CommandWithChoices(TyperCommand):
    """A command that looks up the choices of its options when its help is printed: their tables import torch."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, with placeholders replaced."""
        for option in self.params:
            text = getattr(option, "help", None) or ""
            for placeholder, names in CHOICES.items():
                if placeholder in text:
                    option.help = text = text.replace(placeholder, names())  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)


app = typer.Typer(
    help="Build a vision foundation model from models instead of labels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(cls=CommandWithChoices)(command)
