"""Whether a teacher is a function of the pixels of one image: the only kind of model that a student can learn from.

A teacher in train mode, with dropout, with statistics of the batch or with a state of its own gives other features for
the same image every time, and a student is trained on their mean without a word.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoulders.errors import RecipeError
from shoulders.features import Features
from shoulders.teachers.teacher import Teacher, Teachers

IMAGES = 3
BRIGHTNESS = (1.0, 0.5, 0.1)  # of the random images: what depends on the brightness of an image differs among them
# Shares of the spread of the features. Run again, or in a batch of the same size with other images, all families give
# the same bits on a CPU; the limit leaves room for sums in any order on a GPU. In a batch of another size other kernels
# run: they differ by up to 1e-6 in float32 and 6e-3 in bfloat16.
MAX_DIFFERENCE = 0.001
MAX_ROUNDING = 0.02
VALUES_PER_TAP = 256  # compared between ranks

AGAIN = (
    "the same pixels give other features when they are run again; turn off dropout and anything else that is random or "
    "counts"
)
ALONE = (
    "an image gives other features alone, or beside other images, than in a batch; use no statistics over the batch (a "
    "BatchNorm without running statistics, or a net that eval() does not reach), and keep the order of the images and "
    "the grid"
)

Output = dict[str, Features]
Gather = Callable[[object], list]  # the values of all ranks


def check_pure(name: str, teacher: Teacher) -> None:
    """Refuse a teacher that is not in evaluation mode, or whose features of an image depend on more than its pixels.

    Args:
        name: the teacher's name in the recipe.
        teacher: run on three random images, twice together, each alone, and one in a batch of itself.

    Raises:
        RecipeError: naming what differed.
    """
    if training := next((path for path, module in teacher.named_modules() if module.training), None):
        kind = type(teacher.get_submodule(training)).__name__
        raise _error(name, f"{training} ({kind}) stays in train mode; its train() must follow eval()")
    images = _random_images(teacher)
    together = teacher(images)
    beside_others = teacher(images[:1].expand_as(images))
    alone = [teacher(images[i : i + 1]) for i in range(IMAGES)]
    # the last of all runs: what changes a little with each has changed most
    _compare(name, together, teacher(images), AGAIN, MAX_DIFFERENCE)
    _compare(name, _rows(together, 0, name), _rows(beside_others, 0, name), ALONE, MAX_DIFFERENCE)
    for i, output in enumerate(alone):
        _compare(name, _rows(together, i, name), output, ALONE, MAX_ROUNDING)


def check_same_on_ranks(teachers: Teachers, gather: Gather) -> None:
    """Refuse teachers whose features of the same image differ between the ranks of a run.

    Args:
        teachers: live ones; each is run on one random image.
        gather: a function from the value of this rank to those of all ranks.

    Raises:
        RecipeError: on every rank, naming the teacher and the ranks.
    """
    for name, taps in teachers.selected.items():
        teacher = teachers[name]
        output = teacher(_random_images(teacher)[:1])
        first, *others = gather({tap: _sample(output[tap]) for tap in taps})
        for rank, other in enumerate(others, 1):
            for tap, values in first.items():
                if (
                    tap not in other
                    or other[tap].shape != values.shape
                    or _difference(values, other[tap]) > MAX_ROUNDING  # ranks may have other processors
                ):
                    raise _error(
                        name,
                        f"tap {tap!r} differs between ranks 0 and {rank}: each rank must build the same teacher; "
                        "read its weights from a file, or set a seed where they are made",
                    )


def _random_images(teacher: Teacher) -> Tensor:
    """(3, 3, h, w) in [0, 1], the same everywhere."""
    pixels = torch.rand(IMAGES, 3, *teacher.size, generator=torch.Generator().manual_seed(0))
    return (pixels * torch.tensor(BRIGHTNESS).view(-1, 1, 1, 1)).to(teacher.mean.device)


def _rows(output: Output, image: int, name: str) -> Output:
    """The features of one image, (1, ..)."""
    try:
        return {tap: features.map(lambda x: x[image : image + 1]) for tap, features in output.items()}
    except ValueError as error:
        raise _error(name, ALONE) from error


def _compare(name: str, one: Output, other: Output, reason: str, limit: float) -> None:
    if one.keys() != other.keys():
        tap = sorted(one.keys() ^ other.keys())[0]
        raise _error(name, f"its taps change: {tap!r} is in one output and not in the next; return the same always")
    for tap, features in one.items():
        expected, got = features.components(), other[tap].components()
        if {part: x.shape for part, x in expected.items()} != {part: x.shape for part, x in got.items()}:
            raise _error(name, f"tap {tap!r} has another shape: {reason}")
        for part, x in expected.items():
            difference = _difference(x, got[part])
            if difference > limit:
                raise _error(name, f"{part} of tap {tap!r} differs by {difference:.2%} of its spread: {reason}")


def _difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over that of the variation; what is not finite is found elsewhere and counts as 0."""
    x, y = (values.double().nan_to_num(0, 0, 0) for values in (one, other))
    spread = (x - x.mean()).norm() + 1e-5 * x.norm()
    return float((x - y).norm() / spread.clamp_min(1e-12))


def _sample(features: Features) -> Tensor:
    """Some values of every component, in float32 on the CPU."""
    values = torch.cat([x.flatten().float().cpu() for x in features.components().values()])
    return values[:: max(1, len(values) // VALUES_PER_TAP)]


def _error(name: str, reason: str) -> RecipeError:
    return RecipeError(f"teachers.{name}: is not a function of the pixels alone: {reason}")
