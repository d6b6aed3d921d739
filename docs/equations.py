"""The paper's equations, and the definitions of the code that carry their tags.

The function that is an equation ends the first line of its docstring with `[Eq. n]`, and no other
function does. `equations.md` holds the equations themselves. Eqs. 16-19 are background; no
function at the top level is one of them.
"""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"^## Eq\. (\d+): ([^\n]+) \(([^\n]+)\)\n\n```math\n(.+?)\n```", re.M | re.S)
TAG = re.compile(r" ?\[Eq\. (\d+)\]")
CONSTANTS = "constants"


@dataclass(frozen=True)
class Equation:
    """An equation as the paper prints it."""

    number: int
    title: str
    section: str
    latex: str


@dataclass(frozen=True)
class Definition:
    """A function, a method, a class up to its first method, or a run of constants."""

    module: str  # the file's stem
    name: str
    line: int
    docstring: str  # without tags
    equations: tuple[int, ...]
    code: str  # without the docstring


def equations(path: Path = ROOT / "docs" / "equations.md") -> dict[int, Equation]:
    """The equations by number, in the paper's order."""
    found = ENTRY.findall(path.read_text(encoding="utf-8"))
    return {int(number): Equation(int(number), *rest) for number, *rest in found}


def definitions(path: Path) -> list[Definition]:
    """What a module defines, in the file's order; nested functions belong to the outer one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[Definition] = []

    def add(node: ast.stmt, name: str, last: int) -> None:
        documented = isinstance(node, ast.FunctionDef | ast.ClassDef)
        docstring = ast.get_docstring(node) if documented else None  # type: ignore[arg-type]
        text = node.body[0] if docstring else None  # type: ignore[attr-defined]
        dropped = range(text.lineno, text.end_lineno + 1) if text else ()
        first = first_line(node)
        if name == CONSTANTS and found and found[-1].name == CONSTANTS:
            first = found.pop().line
        code = [lines[n - 1] for n in range(first, last + 1) if n not in dropped]
        summary, _, rest = (docstring or "").partition("\n")
        found.append(
            Definition(
                path.stem,
                name,
                first,
                TAG.sub("", summary) + "\n" + rest,
                tuple(int(number) for number in TAG.findall(summary)),
                textwrap.dedent("\n".join(code)).strip("\n"),
            )
        )

    for node in ast.parse("\n".join(lines)).body:
        assert node.end_lineno
        if isinstance(node, ast.Assign | ast.AnnAssign):
            add(node, CONSTANTS, node.end_lineno)
        elif isinstance(node, ast.FunctionDef):
            add(node, node.name, node.end_lineno)
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            add(node, node.name, first_line(methods[0]) - 1 if methods else node.end_lineno)
            for child in methods:
                assert child.end_lineno
                add(child, f"{node.name}.{child.name}", child.end_lineno)
    return found


def first_line(node: ast.stmt) -> int:
    """Where a statement starts, its decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def implementations(root: Path, known: dict[int, Equation]) -> dict[int, Definition]:
    """The definition of each equation, in the paper's order.

    Raises `UserError` where an equation is not tagged exactly once, or a tag is of none.
    """
    found: dict[int, list[Definition]] = {number: [] for number in known}
    for path in sorted(root.glob("*.py")):
        for definition in definitions(path):
            for number in definition.equations:
                found.setdefault(number, []).append(definition)
    for number, places in found.items():
        where = ", ".join(f"{place.module}.py:{place.line}" for place in places) or "nowhere"
        if number not in known:
            raise UserError(f"[Eq. {number}] at {where} is no equation of docs/equations.md")
        if len(places) != 1:
            raise UserError(f"[Eq. {number}] must be tagged exactly once; it is at {where}")
    return {number: places[0] for number, places in found.items()}
