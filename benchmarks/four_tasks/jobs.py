"""What is measured on what: the two worlds, their data sets, whose head answers which task, and by which metric."""

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
        dataset: its name in rows and tables.
        task: a name in ``shoulders.tasks.TASKS``.
        teacher: whose head answers it.
        labels: folder of the labelled images, below that of the scenes or of DATA.
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
    """A recipe and the jobs that its student is measured by.

    Args:
        name: of its folder of runs.
        recipe: the recipe file.
        jobs: one for each task.
        sources: {source of the recipe: where its images lie below DATA}; empty where they are drawn.
    """

    name: str
    recipe: Path
    jobs: tuple[Job, ...]
    sources: dict[str, str]

    def overrides(self, data: Path | None) -> list[str]:
        """Changes to the recipe that say where the images are."""
        return [f"images.sources.{name}.path={data / path}" for name, path in self.sources.items()] if data else []

    def labels(self, work: Path, data: Path | None) -> Path:
        """The folder that the labels of the jobs lie in; scenes are drawn where they are not there yet."""
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
    """The name of a metric in the rows of a kind of measurement; None where it does not have it."""
    return metric.in_probes if kind.endswith("_probe") else metric.in_heads
