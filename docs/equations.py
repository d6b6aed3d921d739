"""README's table of equations, made from the tags `[Eq. n]` in the modules' docstrings.

    python -m docs.equations            # rewrites the table between its markers
    python -m docs.equations --check    # exit code 1 if it is not current

The function that is an equation carries its tag in the first line of its docstring, and no other
function does. Eqs. 16-19 are background that nothing here computes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.errors import UserError, command_line
from common.files import replacing

ROOT = Path(__file__).resolve().parent.parent

START, END = "<!-- equations -->", "<!-- /equations -->"

EQUATIONS = {
    1: "denoising loss",
    2: "prompt router: prompt to expert",
    3: "prompt encoder",
    4: "architecture predictor",
    5: "entropic transport problem",
    6: "equipartition of a batch among the experts",
    7: "its solution by Sinkhorn-Knopp",
    8: "router while training",
    9: "soft gates of a code",
    10: "width pruning",
    11: "depth pruning",
    12: "soft gates of an embedding",
    13: "contrastive loss",
    14: "similarity distributions of a batch",
    15: "pruning objective",
    20: "expert of each prompt, while training",
    21: "code of each prompt, while training",
    22: "router at test time",
    23: "depth pruning in the encoder",
    24: "depth pruning in the decoder",
    25: "pruning objective (Eq. 15 again)",
    26: "resource loss",
    27: "distillation of the output",
    28: "distillation of the blocks",
    29: "distillation, both",
    30: "fine-tuning objective",
    31: "resource loss (Eq. 26 again)",
}


@dataclass(frozen=True)
class Config:
    """Rewrites README's table of equations."""

    check: bool = False
    """Change nothing; end with exit code 1 if the table is not current."""
    readme: Path = ROOT / "README.md"
    """The file that holds the table."""


@dataclass(frozen=True)
class Place:
    """Where an equation is: `function` of `module`, which starts at `line`."""

    module: str
    function: str
    line: int


def definitions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, str, int]]:
    """(qualified name, first line of the docstring, line) of each function and class in `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{owner}{child.name}"
            yield name, (ast.get_docstring(child) or "").partition("\n")[0], child.lineno
            yield from definitions(child, f"{name}.")
        else:
            yield from definitions(child, owner)


def tagged(root: Path) -> dict[int, list[Place]]:
    """The places of each tagged equation in the modules of the folder `root`."""
    places: dict[int, list[Place]] = {}
    for path in sorted(root.glob("*.py")):
        for name, summary, line in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            for number in re.findall(r"\[Eq\. (\d+)\]", summary):
                places.setdefault(int(number), []).append(Place(path.name, name, line))
    return places


def equation_table(root: Path) -> str:
    """The table as Markdown. Raises `UserError` where an equation is not tagged exactly once."""
    places = tagged(root)
    for number in sorted(EQUATIONS.keys() | places.keys()):
        found = [f"{place.module}:{place.line}" for place in places.get(number, [])]
        if number not in EQUATIONS:
            raise UserError(f"[Eq. {number}] at {', '.join(found)} is no equation of the method")
        if len(found) != 1:
            where = ", ".join(found) or "nowhere"
            raise UserError(f"[Eq. {number}] must be tagged exactly once; it is at {where}")
    lines = ["| Eq. | what it is | function |", "|---|---|---|"]
    for number, title in EQUATIONS.items():
        place = places[number][0]
        function = f"{Path(place.module).stem}.{place.function}"
        lines.append(f"| {number} | {title} | [`{function}`]({place.module}#L{place.line}) |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """`text` with `table` between the markers. Raises `UserError` where it lacks them."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"the README has no place for the table; it needs {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    try:
        text = cfg.readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--readme {cfg.readme} does not exist") from None
    current = with_table(text, equation_table(ROOT))
    if cfg.check and current != text:
        print(f"{cfg.readme.name}'s table of equations is not current; run `make docs`")
        sys.exit(1)
    if not cfg.check:
        with replacing(cfg.readme) as temporary:
            temporary.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    command_line(main)
