"""The sections that say what was run: the headline, and the facts at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoulders.report.gather import Told
from shoulders.report.markup import (
    Html,
    element,
    in_words,
    listed,
    missing,
    paragraph,
    section,
    short,
    span,
    table,
)
from shoulders.report.results import METRICS, Line

METHOD = (
    "The base stays frozen; a light adapter in it or beside it learns. On unlabelled images the student learns to say "
    "what each teacher says, and all teachers meet in one standardized space, so that none drowns out another."
)


def headline(told: Told, found: Sequence[Line], parameters: Mapping[str, int]) -> Html:
    """What was distilled from whom, and the numbers that one wants first.

    Args:
        parameters: of the student's encoder: ``base`` and ``adapter``; {} where it is not there.
    """
    names = told.teachers
    title = f"{in_words(len(names)).capitalize()} teacher{'s' * (len(names) != 1)}, one student"
    base = str((told.tree.get("student") or {}).get("base", "its base")).rstrip("/").rsplit("/", 1)[-1]
    arrived = "is now in" if told.config else "is on its way into"
    lede = paragraph(
        "What ",
        element("b", listed(names) or "no teacher"),
        f" know{'s' * (len(names) < 2)} {arrived} one encoder, built on ",
        element("b", base),
        ". No label was used.",
        class_="lede",
    )
    facts = [
        element("div", element("dt", name), element("dd", element("b", value), rest))
        for name, value, rest in _first_numbers(told, found, parameters)
    ]
    eyebrow = paragraph("shoulders", element("span", told.folder.resolve().name), class_="eyebrow")
    numbers = [element("dl", *facts, class_="facts")] if facts else []
    return element("header", eyebrow, element("h1", title), lede, paragraph(METHOD), *numbers, id="top")


def _first_numbers(told: Told, found: Sequence[Line], parameters: Mapping[str, int]) -> list[tuple[str, str, str]]:
    facts = []
    if parameters:
        both, trained = parameters["base"] + parameters["adapter"], parameters["adapter"]
        facts.append(("Encoder", short(both), f"parameters, {short(trained)} of them trained"))
    train = told.tree.get("train") or {}
    steps = told.steps
    if steps and "batch" in train:
        facts.append(("Seen", short(steps * train["batch"]), "views of images, no labels"))
    if told.seconds:
        facts.append(("Time", span(told.seconds), _where(told)))
    kept = [f"{100 * line.retention:.0f}" for line in found if line.retention is not None]
    if kept:
        ends = list(dict.fromkeys((min(kept, key=int), max(kept, key=int))))
        facts.append(("Kept", f"{' to '.join(ends)} %", "of the teachers’ scores, by their own heads"))
    both_probed = [line.cells for line in found if {"student_probe", "base_probe"} <= set(line.cells)]
    if both_probed:
        gain = sum(cells["student_probe"].value - cells["base_probe"].value for cells in both_probed) / len(both_probed)
        of = f"mean of {len(both_probed)} probes" if len(both_probed) > 1 else "by a probe"
        facts.append(("Gained", f"{100 * gain:+.0f}", f"points over the base, {of}"))
    return facts


def _where(told: Told) -> str:
    around = told.environment
    if not around:
        return "to distil"
    device, threads = str(around.get("device", "cpu")), around.get("threads", 1)
    if device.startswith("cuda"):
        many = around.get("processes", 1)
        return f"to distil on {many} GPU{'s' * (many != 1)}"
    return f"to distil on {threads} CPU thread{'s' * (threads != 1)}"


def run(told: Told) -> Html:
    """What was run, on what, by which licenses it is bound, and everything else that was written down."""
    facts = [Html(element("dt", name) + element("dd", value)) for name, value in _facts(told) if value]
    note = missing("This run did not note its machine, memory and versions; a new one does:", "shoulders distill")
    recipe = element(
        "details",
        element("summary", "The recipe, complete"),
        element("pre", element("code", told.text), tabindex="0", role="region", aria_label="The recipe"),
    )
    return section(
        "run",
        "What was run",
        element("dl", *facts, class_="pairs"),
        *([] if told.environment else [note]),
        *_licences(told),
        _measurements(told),
        recipe,
    )


def _facts(told: Told) -> list[tuple[str, str]]:
    around, tree = told.environment, told.tree
    train, images = (tree.get(part) or {} for part in ("train", "images"))
    memory, speed = told.of_training("peak_gib"), told.images_per_s
    counted = [
        (around.get("processes", 1), "process", "es"),
        (around.get("cpus", 0), "CPU", "s"),
        (around.get("threads", 0), "thread", "s"),
    ]
    machine = [str(around["device"])] if "device" in around else []
    machine += [f"{many} {word}{more * (many != 1)}" for many, word, more in counted if many and around]
    versions = [f"{key} {around[key]}" for key in ("shoulders", "torch", "transformers", "python") if key in around]
    size = images.get("size", "?")
    return [
        ("method", str(tree.get("method", ""))),
        ("training", f"{train.get('steps', '?')} steps of {train.get('batch', '?')} images of {size} px"),
        ("time", span(told.seconds) if told.seconds else ""),
        ("speed", f"{speed:.0f} images a second, teachers and student together" if speed else ""),
        ("peak memory", f"{max(memory):.1f} GiB" if memory else ""),
        ("machine", ", ".join(machine)),
        ("versions", ", ".join(versions)),
    ]


def _licences(told: Told) -> list[Html]:
    whose = told.config.get("teachers") or {}
    if not whose:
        command = f"shoulders distill {told.folder / 'recipe.yaml'} --resume"
        return [missing("No student is here yet; it comes from", command)]
    rows = [
        [name, facts.get("source") or "–", str(facts.get("revision") or "–")[:12], facts.get("license") or "unknown"]
        for name, facts in whose.items()
    ]
    return [
        table("The teachers and the base", ["name", "source", "revision", "license"], rows),
        paragraph("The student holds what these models know: the licenses of all of them bind it."),
    ]


def _measurements(told: Told) -> Html:
    """Every number that was measured, those of single classes apart."""
    rows = [
        [
            ", ".join(str(row[key]) for key in ("model", "head", "kind") if row.get(key)),
            str(row["task"]),
            str(row["metric"]),
            element("td", f"{row['value']:.4f}", class_="number"),
            str(row.get("n", "–")),
        ]
        for row in told.rows
        if row.get("task") in METRICS and "/" not in str(row["metric"]) and row.get("value") is not None
    ]
    if not rows:
        return Html()
    whole = table("All measurements", ["model, head", "task", "metric", "value", "images"], rows)
    return element("details", element("summary", f"All {len(rows)} measurements"), whole)
