"""Mutate modules in one place at a time, and list the mutants that no test kills.

    python -m tests.mutation.run                                          # every module of TESTS
    python -m tests.mutation.run transfer/fvu.py --sample 20 --seed 1

A module is mutated in memory: no file changes. Torch, transformers and other packages are imported once; each mutant
runs the tests of its module in a forked process, which imports `shoulders` and `tests` anew.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from tests.mutation.mutants import Mutant, mutants
from tests.mutation.table import EQUIVALENT, TESTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "shoulders"
OWN_PACKAGES = ("shoulders", "tests", "pytest", "_pytest", "pytest_timeout")  # imported by each mutant anew
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--disable-plugin-autoload", "-p", "pytest_timeout")
POLL_SECONDS = 0.01
BASELINE_SECONDS = 600.0  # limit of the tests without a mutation, which import everything


def import_mutated(module: str, tree: ast.Module) -> list[str]:
    """From now on this process imports ``module`` from a syntax tree; returns a list that its name then joins.

    A finder would not do: `shoulders` itself puts one in front of all others.
    """
    file = str(PACKAGE / module)
    code, get_code = compile(tree, file, "exec"), SourceFileLoader.get_code
    imported: list[str] = []

    def mutated(loader: SourceFileLoader, name: str) -> CodeType | None:
        if loader.path != file:
            return get_code(loader, name)
        imported.append(name)
        return code

    SourceFileLoader.get_code = mutated  # type: ignore[method-assign, assignment]
    return imported


class FirstFailure:
    """A pytest plugin that keeps the name of the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"{report.nodeid} (import)"


def run_here(module: str, mutant: Mutant | None, tree: ast.Module, answer: Path) -> None:
    """Run the tests of ``module``, write {"failed": test, "imported": modules} to ``answer``, and end this process."""
    os.setsid()  # processes that the tests start end with this one
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    first, status = FirstFailure(), 1
    try:
        if mutant is not None:
            mutant.apply()
        imported = import_mutated(module, tree)
        status = int(pytest.main([*OPTIONS, *TESTS[module]], plugins=[first]))
        first.name = first.name or "" if imported else f"its tests never import {module}"
    except BaseException as error:
        first.name = first.name or repr(error)
    others = [name for name in sys.modules if name.split(".")[0] not in OWN_PACKAGES]
    answer.write_text(json.dumps({"failed": first.name or status and f"exit {status}", "imported": others}))
    os._exit(0)


def run_tests(module: str, mutant: Mutant | None, tree: ast.Module, limit_seconds: float) -> dict[str, Any]:
    """The answer of `run_here` from a process of its own, or {} where it took too long."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = os.fork()
        if not child:
            run_here(module, mutant, tree, answer)
        end = time.monotonic() + limit_seconds
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {}
            time.sleep(POLL_SECONDS)
        return json.loads(answer.read_text()) if answer.exists() else {"failed": "(the process died)"}


def preload(module: str, tree: ast.Module) -> None:
    """Import in this process what the tests of ``module`` import from other packages.

    Raises:
        SystemExit: if one of the tests fails without a mutation, before these imports or after them.
    """
    for _ in range(2):
        answer = run_tests(module, None, tree, BASELINE_SECONDS)
        if answer.get("failed", "time limit"):
            raise SystemExit(f"{module}: fails without a mutation: {answer.get('failed', 'time limit')}")
        for name in answer["imported"]:
            with contextlib.suppress(Exception):  # modules that a program made up as it ran
                importlib.import_module(name)


def run_module(module: str, rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the mutants of a module that no row of an earlier run shows to be killed; yields the row of each."""
    tree = ast.parse((PACKAGE / module).read_text())
    todo = mutants(tree)
    if options.sample and options.sample < len(todo):
        todo = random.Random(options.seed).sample(todo, options.sample)  # noqa: S311
    todo = [mutant for mutant in todo if rows.get(key(vars(mutant)), {}).get("result") != "killed"]
    if todo:
        preload(module, tree)
    for mutant in todo:
        started_at = time.monotonic()
        failed = run_tests(module, mutant, tree, options.limit).get("failed")
        result = "timeout" if failed is None else "killed" if failed else "survived"
        names = {name: value for name, value in vars(mutant).items() if name != "apply"}
        seconds = round(time.monotonic() - started_at, 2)
        yield {"file": module, **names, "result": result, "killed_by": failed or None, "seconds": seconds}


def key(mutant: Mapping[str, Any]) -> str:
    """Identifies a mutant of a module, whatever the lines above it are."""
    return "|".join(str(mutant[name]) for name in ("function", "operator", "before", "after", "occurrence"))


def is_equivalent(row: Mapping[str, Any]) -> bool:
    """Whether a mutant survived that `EQUIVALENT` lists."""
    return row["result"] == "survived" and tuple(row[n] for n in ("file", "function", "before", "after")) in EQUIVALENT


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of counts per module; "survived" are those that `EQUIVALENT` does not list."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        result = "equivalent" if is_equivalent(row) else row["result"]
        for name in (row["file"], "all"):
            counts[name].update({result: 1, "mutants": 1, "minutes": row["seconds"] / 60})
    lines = [
        "| module | mutants | killed | time limit | equivalent | survived | killed of the rest | minutes |",
        "|" + "---|" * 8,
    ]
    for name, count in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        dead = count["killed"] + count["timeout"]
        share = dead / max(count["mutants"] - count["equivalent"], 1)
        lines.append(
            f"| {name} | {count['mutants']} | {count['killed']} | {count['timeout']} | {count['equivalent']} "
            f"| {count['survived']} | {share:.1%} | {count['minutes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="below shoulders/; all of TESTS by default")
    parser.add_argument("--sample", type=int, default=0, help="run so many mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that the tests of one mutant may take")
    parser.add_argument("--out", type=Path, default=Path("mutation.json"), help="rows; a later run skips killed ones")
    options = parser.parse_args()
    os.chdir(ROOT)
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    for module in options.modules:
        source = hashlib.sha256((PACKAGE / module).read_bytes()).hexdigest()
        if held.get(module, {}).get("source") != source:
            held[module] = {"source": source, "rows": {}}
        rows = held[module]["rows"]
        for row in run_module(module, rows, options):
            rows[key(row)] = row
            options.out.write_text(json.dumps(held, indent=1))
            if row["result"] == "survived" and not is_equivalent(row):
                print(f"{module}:{row['line']} {row['function']}: {row['before']}  ->  {row['after']}", flush=True)
    print(summary(row for module in options.modules for row in held[module]["rows"].values()))


if __name__ == "__main__":
    main()
