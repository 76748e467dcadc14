"""The two settings of the benchmark: recipe, data sets, and the teacher, task and metrics of each data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoulders.tasks import TASKS, Metric
from shoulders.world import write_world

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("teacher", "teacher_head", "student_probe", "base_probe", "scratch")


@dataclass(frozen=True)
class Job:
    """One task on one data set.

    Args:
        dataset: name of the data set in rows and tables.
        task: a name in ``shoulders.tasks.TASKS``.
        teacher: name of the teacher of this task.
        labels: folder of the labelled images, inside the folder of the scenes or DATA.
    """

    dataset: str
    task: str
    teacher: str
    labels: str

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of its rows, by name."""
        return {metric.name: metric for metric in TASKS[self.task].metrics}


@dataclass(frozen=True)
class Setting:
    """A recipe, and the jobs that its student is evaluated on.

    Args:
        name: of the folder of its runs.
        recipe: the recipe file.
        jobs: one for each task.
        sources: {source of the recipe: path of its images inside DATA}; empty for drawn scenes.
    """

    name: str
    recipe: Path
    jobs: tuple[Job, ...]
    sources: dict[str, str]

    def overrides(self, data: Path | None) -> list[str]:
        """Changes to the recipe that set the paths of the images."""
        return [f"images.sources.{name}.path={data / path}" for name, path in self.sources.items()] if data else []

    def labels(self, work: Path, data: Path | None) -> Path:
        """The folder of the labels of all jobs; scenes that do not exist yet are drawn."""
        if not self.sources:
            write_world(work / "scenes")
            return work / "scenes"
        if data is None:
            raise SystemExit("give --data DATA, or --only world")
        return data


SETTINGS = {
    "world": Setting(
        "world",
        ROOT / "recipes" / "world.yaml",
        (
            Job("world/studio", "classification", "classifier", "studio/classification"),
            Job("world/neon", "detection", "detector", "neon/instances"),
            Job("world/paper", "semantic", "segmenter", "paper/semantic"),
            Job("world/ink", "instance", "instances", "ink/instances"),
        ),
        {},
    ),
    "real": Setting(
        "real",
        ROOT / "recipes" / "real_four.yaml",
        (
            Job("cifar10", "classification", "classifier", "cifar10"),
            Job("bccd", "detection", "detector", "bccd"),
            Job("camvid", "semantic", "segmenter", "camvid"),
            Job("pennfudan", "instance", "instance_segmenter", "pennfudan"),
        ),
        {
            "cifar10": "cifar10/train.parquet",
            "camvid": "camvid/images/train",
            "bccd": "bccd/train",
            "pennfudan": "pennfudan/train",
        },
    ),
}


def name_in_rows(metric: Metric, kind: str) -> str | None:
    """The name of a metric in rows of one kind; None if this kind does not have the metric."""
    return metric.in_probes if kind.endswith("_probe") else metric.in_heads
