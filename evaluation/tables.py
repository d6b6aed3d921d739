"""Scores of several runs as tables: mean and deviation over seeds. Tables 1, 3, 5 and 6."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.files import read_json, replacing, write_json

MEASURES = {  # of a score, where it has them: key -> heading, digits
    "macs_ratio": ("MACs ratio", 3),
    "seconds": ("s/image", 3),
    "distance": ("distance ↓", 4),
    "distance_exchanged": ("exchanged", 4),
    "distance_static": ("one code", 4),
    "frechet": ("Fréchet ↓", 1),
    "mmd": ("MMD ↓", 2),
    "r1": ("R@1 ↑", 3),
    "r5": ("R@5 ↑", 3),
    "style": ("style ↑", 3),
    "fid": ("FID ↓", 2),
    "clip_score": ("CLIP score ↑", 2),
    "cmmd": ("CMMD ↓", 3),
    "pick_score": ("PickScore ↑", 3),
}

TABLE_3 = ("uni-arch", "contrastive", "transport", "aptp")  # the ablation, in its order


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
        for key in MEASURES:
            values = [member[key] for member in members if key in member]
            if values:
                line[key] = statistics.fmean(values)
                line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        found.append(line)
    return found


def markdown(title: str, lines: Sequence[dict[str, Any]]) -> str:
    """Aggregated lines as a Markdown table with its title."""
    present = {key: m for key, m in MEASURES.items() if any(key in line for line in lines)}
    words = {"method": "method", "split": "split"}
    if any(line["steps_in_all"] for line in lines):  # cells of a comparison, not of one run
        words |= {"seeds": "seeds", "steps_in_all": "fine-tuning steps"}

    def cell(line: dict[str, Any], key: str, digits: int) -> str:
        value, spread = line.get(key), line.get(f"{key}_std", math.nan)
        text = "" if value is None else f"{value:.{digits}f}"
        return text if math.isnan(spread) else f"{text} ± {spread:.{digits}f}"

    table = tabulate(
        [
            [line[key] for key in words]
            + [cell(line, key, digits) for key, (_, digits) in present.items()]
            for line in lines
        ],
        [*words.values(), *(heading for heading, _ in present.values())],
        tablefmt="github",
        disable_numparse=True,
    )
    return f"### {title}\n\n{table}\n"


def as_numbers(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what JSON cannot say: no deviation of a single seed."""
    return [
        {k: v for k, v in line.items() if not (isinstance(v, float) and math.isnan(v))}
        for line in lines
    ]


def collect(folder: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The scores of all cells of a comparison so far, each with its method, seed and steps.

    Args:
        folder: of the comparison.
        methods: every method's name, in the order of the tables.
    """
    rows = []
    for path in folder.glob("*@*/report/metrics.json"):
        run = path.parent.parent
        name, steps = run.name.rsplit("@", 1)
        method, seed = name.rsplit("-", 1)
        in_all = int(steps) * read_json(run / "summary.json")["num_experts"]
        cell = {"seed": int(seed), "steps": int(steps), "steps_in_all": in_all}
        own = (method, f"{method}-exchanged")  # the latter is a control: wrong experts
        rows += [row | cell for row in read_json(path)["rows"] if row["method"] in own]
    place = {method: 2 * k for k, method in enumerate(methods)}
    place |= {f"{method}-exchanged": k + 1 for method, k in place.items()}
    return sorted(
        rows, key=lambda r: (r["split"], r["steps_in_all"], place[r["method"]], r["seed"])
    )


def write_tables(folder: Path, methods: Sequence[str]) -> None:
    """Write metrics.json, tables.md and tables.csv of a comparison from its cells so far."""
    rows = collect(folder, methods)
    lines = aggregate(rows)
    write_json(folder / "metrics.json", {"cells": rows, "means": as_numbers(lines)})
    scores = [line for line in lines if line["split"] != "prompts"]
    parts = {"Table 1: methods at one budget": scores}
    ablation = [line for line in scores if line["method"] in TABLE_3]
    if {"contrastive", "transport"} & {line["method"] for line in ablation}:
        ablation.sort(key=lambda line: (line["split"], TABLE_3.index(line["method"])))
        parts["Table 3: ablation"] = ablation
    if len({line["steps_in_all"] for line in scores if line["method"] != "dense"}) > 1:
        parts["Table 5: by fine-tuning steps"] = sorted(
            scores, key=lambda line: (line["split"], line["method"], line["steps_in_all"])
        )
    parts["Table 6: free prompts"] = [line for line in lines if line["split"] == "prompts"]
    with replacing(folder / "tables.md") as temporary:
        text = "\n".join(markdown(title, part) for title, part in parts.items() if part)
        temporary.write_text(text, encoding="utf-8")
    keys = sorted({key for line in lines for key in line}, key=lambda key: (key != "method", key))
    with (
        replacing(folder / "tables.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, ["table", *keys])
        writer.writeheader()
        for title, part in parts.items():
            writer.writerows({"table": title.split(":")[0]} | line for line in part)


def print_experts(summary: dict[str, Any]) -> None:
    """The experts of a run, one a line."""
    print(
        f"{'expert':>6}  {'MACs ratio':>10}  {'parameters':>10}  {'prompts':>7}  most frequent "
        f"words"
    )
    for expert in summary["experts"]:
        cost = f"{expert['macs_ratio']:>10.3f}  {expert['params'] / 1e6:>8.2f} M"
        words = ", ".join(expert["words"])
        print(f"{expert['id']:>6}  {cost}  {expert['usage_train']:>7.1%}  {words}")
    used = sum(share > 0 for share in summary["usage_validation"])
    print(
        f"mean MACs ratio over training prompts {summary['macs_ratio_mean']:.4f} (budget "
        f"{summary['budget']:g}); "
        f"{used} of {summary['num_experts']} experts get validation prompts"
    )
