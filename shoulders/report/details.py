"""The section with the details of a run: machine, versions, licenses, all measurements, the recipe."""

from __future__ import annotations

from shoulders.report.markup import Html, element, missing, paragraph, section, table, time_text
from shoulders.report.record import RunRecord
from shoulders.tasks import TASKS

MAX_NAMES = 3  # of images


def run_section(record: RunRecord) -> Html:
    """All details of a run."""
    facts = [Html(element("dt", name) + element("dd", value)) for name, value in _facts(record) if value]
    no_environment = missing(
        "The machine and the versions of this run were not recorded; a new run does:", "shoulders distill"
    )
    recipe = element(
        "details",
        element("summary", "The complete recipe"),
        element("pre", element("code", record.recipe_text), tabindex="0", role="region", aria_label="The recipe"),
    )
    return section(
        "run",
        "Run",
        element("dl", *facts, class_="pairs"),
        *([] if record.environment else [no_environment]),
        *_licenses(record),
        _measurements(record),
        recipe,
    )


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    environment = record.environment
    train, images = record.section("train"), record.section("images")
    memory, speed = record.training_values("peak_gib"), record.images_per_s
    counts = [
        (environment.get("processes", 1), "process", "es"),
        (environment.get("cpus", 0), "CPU", "s"),
        (environment.get("threads", 0), "thread", "s"),
    ]
    machine = [str(environment["device"])] if "device" in environment else []
    machine += [f"{count} {noun}{plural * (count != 1)}" for count, noun, plural in counts if count and environment]
    packages = ("shoulders", "torch", "transformers", "python")
    return [
        ("method", str(record.tree.get("method", ""))),
        (
            "training",
            f"{train.get('steps', '?')} steps of {train.get('batch', '?')} images of {images.get('size', '?')} px",
        ),
        ("time", time_text(record.training_seconds) if record.training_seconds else ""),
        ("speed", f"{speed:.0f} images per second, including the teachers" if speed else ""),
        ("peak memory", f"{max(memory):.1f} GiB" if memory else ""),
        ("features that are not finite", _not_finite(record)),
        ("steps without an update", _skipped_steps(record)),
        ("machine", ", ".join(machine)),
        ("versions", ", ".join(f"{name} {environment[name]}" for name in packages if name in environment)),
    ]


def _not_finite(record: RunRecord) -> str:
    """How many images each teacher is left out for, with some of their names."""
    names: dict[str, list[str]] = {}
    for row in record.not_finite:
        names.setdefault(row["teacher"], []).append(row["name"])
    return "; ".join(
        f"{teacher}: {len(images)} image{'s' * (len(images) > 1)} "
        f"({', '.join(images[:MAX_NAMES])}{', ..' * (len(images) > MAX_NAMES)})"
        for teacher, images in names.items()
    )


def _skipped_steps(record: RunRecord) -> str:
    """How many steps changed no weight; an empty text for none."""
    count = max(record.training_values("skipped_steps"), default=0)
    return f"{count:.0f}: their loss or gradients were not finite" if count else ""


def _licenses(record: RunRecord) -> list[Html]:
    models = record.student_config.get("teachers") or {}
    if not models:
        command = f"shoulders distill {record.folder / 'recipe.yaml'} --resume"
        return [missing("This run has no student yet; it is written by", command)]
    rows = [
        [name, model.get("source") or "–", str(model.get("revision") or "–")[:12], model.get("license") or "unknown"]
        for name, model in models.items()
    ]
    return [
        table("The teachers and the base", ["name", "source", "revision", "license"], rows),
        paragraph("The student is bound by the licenses of all these models."),
    ]


def _measurements(record: RunRecord) -> Html:
    """All measurements, except those of single classes."""
    rows = [
        [
            ", ".join(str(row[key]) for key in ("model", "head", "kind") if row.get(key)),
            str(row["task"]),
            str(row["metric"]),
            element("td", f"{row['value']:.4f}", class_="number"),
            str(row.get("n", "–")),
        ]
        for row in record.rows
        if row.get("task") in TASKS and "/" not in str(row["metric"]) and row.get("value") is not None
    ]
    if not rows:
        return Html()
    measurements = table("All measurements", ["model, head", "task", "metric", "value", "images"], rows)
    return element("details", element("summary", f"All {len(rows)} measurements"), measurements)
