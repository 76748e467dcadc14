"""A task: one row that holds everything that commands, the report and the benchmarks need of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from torch import Tensor, nn

from shoulders.errors import DataError
from shoulders.features import Features, FeaturesOf, Skipped
from shoulders.images import View
from shoulders.tasks.class_match import ClassMap
from shoulders.tasks.frame import ModelInput

Size = tuple[int, int]  # (h, w) in px


class Row(TypedDict):
    """One evaluated metric, ready for ``results.json``.

    ``value`` is a fraction from 0 to 1, ``n`` the number of images, ``seconds`` the time to fit and evaluate,
    ``settings`` what the value depends on.
    """

    task: str
    metric: str
    value: float
    n: int
    seconds: float
    settings: dict[str, float | int | str]


@dataclass(frozen=True)
class Metric:
    """A metric of a task, and its names.

    Args:
        name: in the tables of benchmarks, such as ``box_AP``.
        title: in text, such as ``box AP``.
        in_probes: its name in the rows of probes.
        in_heads: its name in the rows of teacher heads and of finetuned models; None where they do not have it.
        in_rows: all of its names in rows, the preferred one first.
    """

    name: str
    title: str
    in_probes: str
    in_heads: str | None
    in_rows: tuple[str, ...]


@dataclass(frozen=True)
class ProbeHead:
    """The head of a task's default probe: how it is built again from a saved one, and run.

    Args:
        name: kind of the head.
        build: (C, K) -> a fresh head for features of width C and K classes.
        width: a head -> C.
        post_process: (head, K class names, Features, (h, w) of the B original images in px, minimum score of an
            object) -> predictions for each image, in the form of the transformers pipeline of the task.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    width: Callable[[Any], int]
    post_process: Callable[[Any, Sequence[str], Features, Sequence[Size], float], list[Any]]


class HeadWithInput(Protocol):
    """A teacher's head together with the model that computes its input; see `shoulders.inference.HeadInput`."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the head's classes, by index."""
        ...

    @property
    def class_map(self) -> ClassMap:
        """The head's class for some classes of the data, see `match_classes`."""
        ...

    @property
    def processor(self) -> Any:
        """The image processor of the head's teacher."""
        ...

    @property
    def input_description(self) -> str:
        """What `draw` does with an image, for the settings of a score."""
        ...

    @property
    def min_side(self) -> int | None:
        """Both sides of a decoded image need this many px; None: images are decoded at their full size."""
        ...

    def draw(self, pixels: Tensor, size: Size) -> ModelInput:
        """The input for a decoded image (3, H, W) uint8 of ``size`` = (h, w) px in full."""
        ...

    @property
    def compute_output(self) -> Callable[..., Any]:
        """A batch of the tensors of `draw`, by their names -> the head's own output."""
        ...


class FinetuneTask(Protocol):
    """A task with its images, for training from pixels to labels."""

    @property
    def task(self) -> str:
        """The name of the task."""
        ...

    @property
    def metric(self) -> str:
        """The one of the metrics of `evaluate` that hyperparameters are selected by."""
        ...

    @property
    def whole_images(self) -> bool:
        """Whether images are evaluated whole, squeezed to the input size; else their centre."""
        ...

    @property
    def splits(self) -> Any:
        """The images, as the task finds them."""
        ...

    def build_head(self, width: int) -> nn.Module:
        """A fresh head for features of width C."""
        ...

    def read_image(self, split: Any, position: int, min_side: int) -> tuple[Tensor, Size] | Skipped:
        """A decoded image (3, H, W) uint8, no smaller than ``min_side`` px needs, and its size in the annotations."""
        ...

    def target(self, split: Any, position: int, view: View, grid: tuple[int, int]) -> Any:
        """The target of a view of an image; ``grid`` is that of the features."""
        ...

    def loss(self, head: nn.Module, features: Features, targets: Sequence[Any]) -> Tensor:
        """The training loss of B images, a scalar."""
        ...

    def evaluate(
        self, head: nn.Module, features_of: FeaturesOf, split: Any, size: Size, batch: int, workers: int
    ) -> tuple[dict[str, float], int]:
        """Values by metric, as a probe's, and the number of images."""
        ...


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: on the command line, in rows and in folders.
        title: in the report.
        metrics: the first is the headline.
        find_splits: (path, image column of parquet files, fit=) -> the splits found there; with ``fit=False``, a split
            to evaluate on is enough.
        needs_spatial: whether features need a spatial component.
        fit_probe: fits and evaluates the default probe: (features_of, splits, input sizes, batch, workers, seed,
            on_head=, step_fraction=) -> rows. ``on_head`` is called with the fitted head, ``step_fraction`` shortens
            the fit. Without ``needs_spatial``, also widths=, see `LabelledVectors`, for several models side by side.
        probe_head: the head of the default probe.
        finetune: splits -> the task for training from pixels to labels.
        evaluate_head: evaluates a teacher's head: (head, splits, batch, workers) -> rows.
        head_classes: how the names of the transformers classes end whose heads do this task.
        labels_as_predictions: (split, position, K class names) -> the labels of an image in the form of predictions, to
            draw both alike.
        larger_probes: {name: like ``fit_probe``} for larger heads that can take the place of the default probe.
        probe_packages: {name of a larger probe: a package that its loss needs}.
        zero_shot: whether heads that choose among class names do this task.
        folders: names of data folders that name the task instead of the data.
        image_paths: of the images of a split below the folder of the data, with ``{split}`` for its name.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    find_splits: Callable[..., Any]
    needs_spatial: bool
    fit_probe: Callable[..., list[Row]]
    probe_head: ProbeHead
    finetune: Callable[[Any], FinetuneTask]
    evaluate_head: Callable[[HeadWithInput, Any, int, int], list[Row]]
    head_classes: tuple[str, ...]
    labels_as_predictions: Callable[[Any, int, Sequence[str]], list[dict[str, Any]]]
    larger_probes: Mapping[str, Callable[..., list[Row]]] = field(default_factory=dict)
    probe_packages: Mapping[str, str] = field(default_factory=dict)
    zero_shot: bool = False
    folders: tuple[str, ...] = ()
    image_paths: tuple[str, ...] = ("{split}",)

    @property
    def metric(self) -> Metric:
        """The headline metric."""
        return self.metrics[0]


def rows_of(
    task: str, values: Mapping[str, float], n: int, seconds: float, settings: dict[str, float | int | str]
) -> list[Row]:
    """A row for each metric.

    Raises:
        DataError: there is no value, because no test image that can be read has a label.
    """
    if not values:
        why = f"; skipped: {settings['skipped_reasons']}" if "skipped_reasons" in settings else ""
        raise DataError(f"{task}: none of the {n} test images that can be read has a label{why}; repair or add some")
    return [
        Row(task=task, metric=metric, value=value, n=n, seconds=seconds, settings=settings)
        for metric, value in values.items()
    ]
