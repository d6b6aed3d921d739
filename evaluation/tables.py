"""Scores of several runs as tables: mean and deviation over seeds. Tables 1, 3, 5 and 6."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

MEASURES = (  # of a score, where it has them: key, heading, digits
    ("macs_ratio", "MACs ratio", 3),
    ("seconds", "s/picture", 3),
    ("frechet", "Fréchet ↓", 1),
    ("mmd", "MMD ↓", 2),
    ("r1", "R@1 ↑", 3),
    ("r5", "R@5 ↑", 3),
    ("style", "style ↑", 3),
    ("fid", "FID ↓", 2),
    ("clip_score", "CLIP ↑", 2),
    ("cmmd", "CMMD ↓", 3),
    ("pick_score", "PickScore ↑", 3),
)


def aggregate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method, split and number of steps.

    The deviation is the sample's (n - 1), nan for a single seed.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cell = (row["split"], row.get("steps_in_all", 0), row["method"])
        groups.setdefault(cell, []).append(row)
    found = []
    for (split, steps, method), members in groups.items():
        line: dict[str, Any] = {"split": split, "method": method, "steps_in_all": steps}
        line["seeds"] = len(members)
        for key, _, _ in MEASURES:
            values = [member[key] for member in members if key in member]
            if values:
                line[key] = statistics.fmean(values)
                line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        found.append(line)
    return found


def markdown(title: str, lines: Sequence[dict[str, Any]]) -> str:
    """Aggregated lines as a Markdown table with its title."""
    present = [m for m in MEASURES if any(m[0] in line for line in lines)]
    cells = any(line["steps_in_all"] for line in lines)  # of a comparison, not of one run
    head = ["method", "split", *(["seeds", "fine-tuning steps"] if cells else [])]
    head += [name for _, name, _ in present]
    text = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        row = [line["method"], line["split"]]
        row += [str(line["seeds"]), str(line["steps_in_all"])] if cells else []
        for key, _, digits in present:
            value, spread = line.get(key), line.get(f"{key}_std", math.nan)
            cell = "" if value is None else f"{value:.{digits}f}"
            row.append(cell if math.isnan(spread) else f"{cell} ± {spread:.{digits}f}")
        text.append("| " + " | ".join(row) + " |")
    return "\n".join(text) + "\n"


def as_numbers(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what JSON cannot say: no deviation of a single seed."""
    return [
        {k: v for k, v in line.items() if not (isinstance(v, float) and math.isnan(v))}
        for line in lines
    ]
