"""The top of the page: what was distilled, and the most important numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoulders.report.markup import Html, element, large_number_text, list_text, number_word, paragraph, time_text
from shoulders.report.record import RunRecord
from shoulders.report.results import Line

HIGH_RETENTION, LOW_RETENTION = 0.8, 0.5  # the student can replace its teachers from the first, cannot below the second
METHOD = (
    "The base is frozen. A small adapter inside or beside it is trained on unlabelled images, so that the features of "
    "every teacher can be predicted from those of the student."
)
STANDARDIZED = " The features of each teacher are standardized first, so that no teacher dominates the training."


def headline(record: RunRecord, lines: Sequence[Line], parameters: Mapping[str, int]) -> Html:
    """The top of the page.

    Args:
        record: the run.
        lines: of the results table.
        parameters: numbers of parameters of the student's encoder, ``base`` and ``adapter``; {} without a student.
    """
    count = len(record.teachers)
    title = f"{number_word(count).capitalize()} teacher{'s' * (count != 1)}, one student"
    standardized = record.section("transfer").get("standardize") != "none"
    facts = [
        element("div", element("dt", name), element("dd", element("b", value), rest))
        for name, value, rest in _key_facts(record, lines, parameters)
    ]
    return element(
        "header",
        paragraph("shoulders", element("span", record.folder.resolve().name), class_="eyebrow"),
        element("h1", title),
        _lede(record, lines),
        paragraph(METHOD + STANDARDIZED * standardized),
        *([element("dl", *facts, class_="facts")] if facts else []),
        id="top",
    )


def _lede(record: RunRecord, lines: Sequence[Line]) -> Html:
    base = str(record.section("student").get("base", "its base")).rstrip("/").rsplit("/", 1)[-1]
    names = element("b", list_text(record.teachers) or "no teacher")
    verb, end = ("distilled", "") if record.student_config else ("distils", f" It is at step {record.steps:,}.")
    return paragraph(
        f"This run {verb} ",
        names,
        " into one encoder, built on ",
        element("b", base),
        ", without labels.",
        end,
        _retention_sentence(record, lines),
        class_="lede",
    )


def _retention_sentence(record: RunRecord, lines: Sequence[Line]) -> str:
    """How well the teachers' heads work with the student's features, as far as it was measured."""
    values = [line.retention for line in lines if line.retention is not None]
    if not values:
        return ""
    kept = f"{_percent_range(values)} of their scores"
    if len(values) < len(record.teachers):
        return f" On its features, the teachers’ heads measured so far keep {kept}."
    if min(values) >= HIGH_RETENTION:
        return f" The student can replace its teachers: on its features, their heads keep {kept}."
    if max(values) < LOW_RETENTION:
        return f" The student cannot replace its teachers yet: on its features, their heads keep only {kept}."
    return f" On its features, the teachers’ heads keep {kept}."


def _percent_range(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{100 * value:.0f}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} %"


def _key_facts(record: RunRecord, lines: Sequence[Line], parameters: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of each."""
    facts = []
    if parameters:
        total, trained = parameters["base"] + parameters["adapter"], parameters["adapter"]
        facts.append(("Encoder", large_number_text(total), f"parameters, {large_number_text(trained)} of them trained"))
    batch = record.section("train").get("batch")
    if record.steps and batch:
        facts.append(("Training data", large_number_text(record.steps * batch), "views of images, without labels"))
    if record.training_seconds:
        facts.append(("Training time", time_text(record.training_seconds), _hardware(record)))
    retention = [line.retention for line in lines if line.retention is not None]
    if retention:
        facts.append(("Retention", _percent_range(retention), "of the teachers’ scores, by their heads on the student"))
    probed = [line.cells for line in lines if {"student_probe", "base_probe"} <= set(line.cells)]
    if probed:
        gain = sum(cells["student_probe"].value - cells["base_probe"].value for cells in probed) / len(probed)
        probes = f"mean of {len(probed)} probes" if len(probed) > 1 else "by one probe"
        facts.append(("Gain", f"{100 * gain:+.0f}", f"points over the base, {probes}"))
    return facts


def _hardware(record: RunRecord) -> str:
    environment = record.environment
    if not environment:
        return ""
    if str(environment.get("device", "cpu")).startswith("cuda"):
        count = environment.get("processes", 1)
        return f"on {count} GPU{'s' * (count != 1)}"
    count = environment.get("threads", 1)
    return f"on {count} CPU thread{'s' * (count != 1)}"
