"""A command line made from a configuration dataclass: parsed by tyro, explained here.

A field's help is the string below it. A class variable `HEADINGS` maps the first field of each
group to the group's heading. tyro's own help gives a field two to four lines, and groups fields of
nested dataclasses only; this gives it one line, its default in a column of its own.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from common.ranges import Choice, allowed

T = TypeVar("T")
WIDTH = 100
METAVARS = {"Path": " PATH", "int": " N", "float": " X", "str": " TEXT"}


def read_options(
    config: type[T], module: str | None, args: Sequence[str] | None = None, default: T | None = None
) -> T:
    """The configuration that the command line asks for; `--help` prints `help_text` and ends.

    Args:
        config: a dataclass whose fields all have defaults.
        module: docstring of the script.
        args: without the program's name; those of the process if absent.
        default: what fields are that the arguments do not set; `config()` if absent.
    """
    args = sys.argv[1:] if args is None else args
    if {"-h", "--help"} & set(args):
        print(help_text(config, module or ""))
        sys.exit(0)
    return tyro.cli(config, args=args, default=config() if default is None else default)


def help_text(config: type, module: str) -> str:
    """What a script does, its options by group, a line each, and its examples.

    Args:
        config: the dataclass of its options.
        module: its docstring: the first line is the title, the first indented block the examples.
    """
    title, *rest = module.strip().split("\n\n")
    hints = get_type_hints(config, include_extras=True)
    rows = [(f.name, flag(f, hints[f.name]), shown(f.default)) for f in fields(config)]
    texts = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for base in reversed(config.__mro__[:-1])
        for parameter in docstring_parser.parse_from_object(base).params
    }
    left = max(len(name) for _, name, _ in rows) + 2
    middle = max(len("default"), *(len(value) for *_, value in rows)) + 2
    headings = getattr(config, "HEADINGS", {rows[0][0]: "options"})
    lines = [f"usage: {program()} [options], each shown with its default", "", title]
    about = paragraph(config.__doc__ or "")
    lines += ["", *about] if about != [title] else []
    for name, written, value in rows:
        if name in headings:
            lines += ["", f"{headings[name]}:"]
        start = f"  {written:<{left}}{value:<{middle}}"
        lines += textwrap.wrap(
            texts[name], WIDTH, initial_indent=start, subsequent_indent=" " * len(start)
        )
    examples = next((part for part in rest if part.startswith("    ")), "")
    return "\n".join([*lines, "", "examples:", examples] if examples else lines)


def paragraph(text: str) -> list[str]:
    """A docstring's paragraphs, filled anew."""
    parts = [textwrap.fill(" ".join(part.split()), WIDTH) for part in text.split("\n\n")]
    return "\n\n".join(parts).splitlines()


def flag(field: Field[Any], hint: Any) -> str:
    """How an option is written: `--lr X`, `--[no-]dense`, or PROMPTS where it has no name."""
    kind, bounds = str(hint), allowed(hint)
    if "Positional" in kind:
        return field.name.upper() + " ..." * ("tuple" in kind)
    name = field.name.replace("_", "-")
    if hint is bool:
        return f"--[no-]{name}"
    if isinstance(bounds, Choice):
        return f"--{name} {'|'.join(bounds)}"
    return f"--{name}{next(text for known, text in METAVARS.items() if known in kind)}"


def group(config: type, first: str) -> list[str]:
    """The fields of the group that begins with the field `first` (see `HEADINGS`)."""
    names, headings = [field.name for field in fields(config)], getattr(config, "HEADINGS", {})
    start = names.index(first)
    end = next((k for k in range(start + 1, len(names)) if names[k] in headings), len(names))
    return names[start:end]


def shown(value: Any) -> str:
    """A default in its column; nothing where a field is filled in later."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, Path) and value.is_absolute():
        value = value.relative_to(Path(__file__).resolve().parent.parent)
    return f"{value:g}" if isinstance(value, float) else str(value)


def program() -> str:
    """`python train.py`, or `python -m targets`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return f"python -m {name}" if spec else f"python {name}"
