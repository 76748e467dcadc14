"""All one-place mutations of a module's syntax tree.

Not mutated is what computes nothing: annotations, type aliases, docstrings, strings, messages of errors, imports, and
``strict=`` of zip, which asserts that lengths are equal.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

# Each operator -> the one that replaces it.
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitXor: ast.BitOr},
    **{ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
# Functions and methods that replace each other, in both directions.
PAIRS = (
    *(("mean", "sum"), ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum")),
    *(("clamp_min", "clamp_max"), ("any", "all"), ("floor", "ceil"), ("sqrt", "square"), ("zeros", "ones")),
    *(("zeros_", "ones_"), ("zeros_like", "ones_like"), ("new_zeros", "new_ones")),
)
SWAPS = dict(PAIRS) | {second: first for first, second in PAIRS}
# Methods whose call is left out: x.detach() -> x.
REMOVABLE = ("detach", "clone", "abs", "sqrt", "square", "clamp_min", "clamp_max", "transpose", "contiguous")
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list")
ALIASES = ("Callable", "Mapping", "Literal", "dict", "tuple")


@dataclass(frozen=True)
class Mutant:
    """One mutation.

    Args:
        function: qualified name of the function or class around it, or "<module>".
        before, after: source of the expression or statement.
        occurrence: counts, from 0, the mutants of a function that look the same.
        apply: inserts the mutation into the tree that `mutants` was given.
    """

    line: int
    function: str
    operator: str
    before: str
    after: str
    occurrence: int
    apply: Callable[[], None]


@dataclass(frozen=True)
class _Place:
    """Where a node stands: in a field of its parent, and at an index where the field is a list."""

    parent: ast.AST
    field: str
    index: int | None
    function: str

    def put(self, node: ast.AST, parent: ast.AST | None = None) -> None:
        held = getattr(self.parent, self.field)
        new = node if self.index is None else [*held[: self.index], node, *held[self.index + 1 :]]
        setattr(parent or self.parent, self.field, new)

    def source(self, node: ast.AST) -> str:
        """The source of ``node`` at this place; of a constant or a name, with the expression around it."""
        if isinstance(node, ast.Constant | ast.Name) and isinstance(self.parent, ast.expr | ast.keyword):
            around = copy.copy(self.parent)
            self.put(node, around)
            node = around
        lines = ast.unparse(node).strip().splitlines()
        block = isinstance(node, ast.FunctionDef | ast.If | ast.While | ast.With)
        return lines[0] if block else " ".join(map(str.strip, lines))


def mutants(tree: ast.Module) -> list[Mutant]:
    """All mutants of ``tree``, in the order of its nodes; applying one changes ``tree`` itself."""
    rows: list[Mutant] = []
    equals: Counter[tuple[str, ...]] = Counter()
    for node, place in _nodes(tree, "<module>"):
        for operator, changed in _variants(node):
            line: int = getattr(node, "lineno", getattr(place.parent, "lineno", 0))
            names = (place.function, operator, place.source(node), place.source(changed))
            ast.fix_missing_locations(ast.copy_location(changed, node))
            rows.append(Mutant(line, *names, equals[names], partial(place.put, changed)))
            equals[names] += 1
    return rows


def _nodes(parent: ast.AST, function: str) -> Iterator[tuple[ast.AST, _Place]]:
    """Every node that may be mutated, with its place; parents before children."""
    for field, value in ast.iter_fields(parent):
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if field in SKIPPED_FIELDS or not isinstance(node, ast.AST) or _computes_nothing(node):
                continue
            yield node, _Place(parent, field, index, function)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield from _nodes(node, f"{function}.{node.name}".removeprefix("<module>."))
            elif not isinstance(node, ast.Raise):
                yield from _nodes(node, function)


def _computes_nothing(node: ast.AST) -> bool:
    """Imports, docstrings, texts, type aliases, and ``strict=`` of zip."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    value = node.value if isinstance(node, ast.Assign) else None
    alias = isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name) and value.value.id in ALIASES
    strict = isinstance(node, ast.keyword) and node.arg == "strict"
    return alias or strict or isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr)


def _variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name of the rule, changed node) of everything that may replace ``node``."""
    for rule in (_operator, _constant, _slice, _unary, _method, _condition, _statement):
        for changed in rule(node):
            yield rule.__name__.strip("_"), changed


def _with(node: Any, **fields: Any) -> Any:
    """A copy of the node alone, with other fields; its children are shared."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _operator(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        yield _with(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:i], OPERATORS[type(op)](), *node.ops[i + 1 :]])


def _constant(node: ast.AST) -> Iterator[ast.AST]:
    """n -> n + 1, x -> 2 x (0.0 -> 1.0), True -> False: among them defaults, dimensions and bounds of slices."""
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1 if isinstance(value, int) else 2 * value or 1.0)


def _slice(node: ast.AST) -> Iterator[ast.AST]:
    """Bounds that are not constants move by one."""
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(node, name)
            if bound is not None and not isinstance(bound, ast.Constant):
                yield _with(node, **{name: ast.BinOp(bound, ast.Add(), ast.Constant(1))})


def _unary(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand


def _method(node: ast.AST) -> Iterator[ast.AST]:
    """Another function of the same signature; a method, or ``.T``, left out of a chain."""
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPS:
        yield _with(node, func=ast.Name(SWAPS[node.func.id], ast.Load()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in SWAPS:
            yield _with(node, func=_with(node.func, attr=SWAPS[node.func.attr]))
        if node.func.attr in REMOVABLE and ast.unparse(node.func.value) not in ("math", "torch", "np"):
            yield node.func.value


def _condition(node: ast.AST) -> Iterator[ast.AST]:
    """The opposite condition; one of two values alone; a comprehension without its condition."""
    if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call | ast.BoolOp):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))  # other tests have operators of their own
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    if isinstance(node, ast.comprehension) and node.ifs:
        yield _with(node, ifs=[])


def _statement(node: ast.AST) -> Iterator[ast.AST]:
    """A statement left out, where no name is missing then; a block without its context; decorators ``no_grad``."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    removable = isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete)
    if removable or isinstance(target, ast.Attribute | ast.Subscript):
        yield ast.Pass()
    if isinstance(node, ast.With) and not any(item.optional_vars for item in node.items):
        yield ast.If(ast.Constant(True), node.body, [])
    if isinstance(node, ast.Break | ast.Continue):
        yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    if isinstance(node, ast.FunctionDef):
        kept = [decorator for decorator in node.decorator_list if "no_grad" not in ast.unparse(decorator)]
        if len(kept) < len(node.decorator_list):
            yield _with(node, decorator_list=kept)
