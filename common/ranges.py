"""What a setting may be, said on its field: `lr: Positive`, `depth: Annotated[str, Choice(...)]`.

`check(cfg)` holds every field of a configuration dataclass against what its annotation allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

from common.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; not `low` itself if `above`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        floor = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.high == math.inf:
            return floor if self.low > -math.inf else "a finite number"
        return f"{floor}, and at most {self.high:g}"


class Choice(tuple[str, ...]):
    """The words that a field may be."""

    def __new__(cls, *words: str) -> Choice:
        return super().__new__(cls, words)


MANY = 10**9  # more of anything is refused
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
Weight = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Budget = Annotated[float, Range(0, 1, above=True)]
Count = Annotated[int, Range(1, MANY)]
Number = Annotated[int, Range(0, MANY)]
Images = Annotated[int, Range(2, MANY)]
Pixels = Annotated[int, Range(8, 2**14)]
Seed = Annotated[int, Range(0, 2**62)]
Precision = Annotated[str, Choice("fp32", "bf16", "fp16")]


def allowed(annotation: Any) -> Range | Choice | None:
    """The range or the choice within an annotation; None where there is neither."""
    if isinstance(annotation, Range | Choice):
        return annotation
    nested = (allowed(part) for part in get_args(annotation))  # of Annotated: type, then metadata
    return next((found for found in nested if found is not None), None)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises `UserError` for a value of `--name` that is not among the `known` ones."""
    if value not in known:
        raise UserError(f"--{name} {value} is unknown; choose one of: {', '.join(known)}")


def check(cfg: Any) -> None:
    """Raises `UserError` for the first field of a configuration dataclass that cannot be.

    A field that is None is not set. A number whose annotation names no range is a mistake in the
    program: AssertionError.
    """
    hints = get_type_hints(type(cfg), include_extras=True)
    for field in fields(cfg):
        given, option = getattr(cfg, field.name), field.name.replace("_", "-")
        bounds = allowed(hints[field.name])
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, str) and isinstance(bounds, Choice):
                check_choice(option, value, bounds)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            assert isinstance(bounds, Range), f"{field.name} has no range"
            if value not in bounds or not math.isfinite(value):
                shown = value if isinstance(value, int) else f"{value:g}"
                raise UserError(f"--{option} {shown} is out of range; choose {bounds}")
