"""Mutants of a source tree: one small slip each, of the kinds that are made by hand, at lines that a run executes."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.MatMult: ast.Mult,
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
_NAMES = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "amax": "amin", "exp": "expm1", "sqrt": "square",
          "square": "abs", "abs": "square", "log": "log1p", "std": "var", "var": "std"}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """`what` was done at `line` of `file`, whose text becomes `source`."""

    file: str
    line: int
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def mutants(root: Path, executed: Mapping[str, set[int]], count: int, seed: int) -> list[Mutant]:
    """`count` of all that there are at executed lines of files below `root`, drawn without replacement."""
    sites = [(file, place, kind) for file in sorted(executed) for place, kind in _sites(root / file, executed[file])]
    chosen = random.Random(seed).sample(sites, min(count, len(sites)))
    return [made for file, place, kind in chosen if (made := _made(root, file, place, kind)) is not None]


def _sites(path: Path, lines: set[int]) -> Iterator[tuple[int, int]]:
    """(number of the node in the walk, number of the change) of every change to an executed line."""
    for place, node in enumerate(_nodes(ast.parse(path.read_text()))):
        if getattr(node, "lineno", 0) in lines:
            yield from ((place, kind) for kind in range(len(_changes(node))))


def _nodes(tree: ast.Module) -> list[ast.AST]:
    """All but annotations, docstrings, what is raised, and what stands at the top of a module."""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        found.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise):
                continue
            for child in value if isinstance(value, list) else [value]:
                is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if isinstance(child, ast.AST) and not is_docstring:
                    visit(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node not in found:
            for child in node.body:
                visit(child)
    return found


def _changes(node: ast.AST) -> list[tuple[str, ast.AST]]:
    """What can be done to a node: a text, and the node in its place."""
    found: list[tuple[str, ast.AST]] = []

    def change(what: str, **fields: object) -> None:
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        found.append((f"{ast.unparse(node)[:60]} → {what or ast.unparse(new)[:60]}", new))

    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        change("", op=_BINARY[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        found.append((f"{ast.unparse(node)[:60]} → without its sign", node.operand))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        change("", ops=[_COMPARE[type(node.ops[0])]()])
    elif isinstance(node, ast.BoolOp):
        change("", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        change("", value=node.value + 1 if type(node.value) is int else 1.1 * node.value + 0.1 * (node.value == 0))
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        change("", attr=_NAMES[node.attr])
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("detach", "double", "abs"):
            found.append((f"{ast.unparse(node)[:60]} → without .{node.func.attr}()", node.func.value))
        same = [ast.unparse(a) for a in node.args[:2]]
        if len(set(same)) == 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            change("", args=[node.args[1], node.args[0], *node.args[2:]])
        named = [k for k in node.keywords if k.arg and isinstance(k.value, ast.Name | ast.Attribute)]
        if len(named) >= 2:
            one, other = named[0].arg, named[1].arg
            values = {one: named[1].value, other: named[0].value}
            keywords = [ast.keyword(k.arg, values.get(k.arg, k.value)) for k in node.keywords]
            change(f"{one} and {other} exchanged", keywords=keywords)
    return found


def _made(root: Path, file: str, place: int, kind: int) -> Mutant | None:
    tree = ast.parse((root / file).read_text())
    node = _nodes(tree)[place]
    what, new = _changes(node)[kind]
    line = getattr(node, "lineno", 0)
    ast.copy_location(new, node)
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(child is node for child in value):
                setattr(parent, name, [new if child is node else child for child in value])
    try:
        source = ast.unparse(ast.fix_missing_locations(tree))
    except Exception:  # what cannot be written is no slip that anyone makes
        return None
    return Mutant(file, line, what.replace("\n", " "), source)


def listed(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of a table in Markdown."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
