"""The comparisons' finished cells, kept in `docs/results/`, as tables and a curve.

    python -m docs.results --keep runs      # copy the cells that `compare.py` has finished
    python -m docs.results                  # write docs/results/tables.md and curve.svg

`cells.jsonl` has a line for each cell, with the name of its comparison's folder. A comparison with
settings of its own (`compare.py --out runs/compare-emoji-4-experts-0.5`) gets a table of its own.
Cells and ablations of earlier versions lie in folders, a file or two for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tabulate import tabulate

from common.errors import UserError, command_line
from common.files import read_json, replacing
from compare import METHODS, key_of, read_cells
from evaluation.figures import sheet
from evaluation.tables import AS_CUT, aggregate, markdown, rows_of

RESULTS = Path(__file__).parent / "results"
STEPS = 100  # an expert, by the paper's protocol
BUDGET = 0.5  # where methods differ
PANELS = (
    ("distance", "distance to the teacher, not fine-tuned"),
    ("r1", f"R@1, {STEPS} fine-tuning steps an expert"),
    ("r1", f"R@1 at {BUDGET} of the MACs"),
)


def kept_cells() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The cells in cells.jsonl, by comparison, method, seed and steps."""
    path = RESULTS / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(cell["comparison"], *key_of(cell)): cell for cell in map(json.loads, lines)}


def keep(runs: Path) -> int:
    """Add the finished cells of all comparisons below `runs` to cells.jsonl: how many there are."""
    found = {
        (folder.name, *key): cell | {"comparison": folder.name}
        for folder in sorted(runs.glob("compare-*"))
        for key, cell in read_cells(folder).items()
    }
    lines = [
        json.dumps(cell, ensure_ascii=False) + "\n"
        for _, cell in sorted((kept_cells() | found).items())
    ]
    with replacing(RESULTS / "cells.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return len(found)


def earlier_cells() -> Iterator[dict[str, Any]]:
    """The cells of earlier versions: `compare-emoji-0.5/aptp-0@100/report/metrics.json`."""
    for path in sorted(RESULTS.glob("compare-*/*@*/report/metrics.json")):
        run = path.parent.parent
        name, steps = run.name.rsplit("@", 1)
        method, seed = name.rsplit("-", 1)
        own = (method, f"{method}-exchanged")  # the latter is a control: wrong experts
        yield {
            "comparison": run.parent.name,
            "method": method,
            "seed": int(seed),
            "finetune_steps": int(steps),
            "steps_in_all": int(steps) * read_json(run / "summary.json")["num_experts"],
            "scores": [row for row in read_json(path)["rows"] if row["method"] in own],
        }


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands among those of its comparison."""
    method = row["method"].removesuffix("-exchanged")
    base = method.partition(":")[0]
    number = METHODS.index(base) if base in METHODS else len(METHODS)
    wrong = row["method"] != method
    return row["split"], row["steps_in_all"], number, method, wrong, row["seed"]


def cells() -> list[dict[str, Any]]:
    """The scores of all kept cells, each with its budget, variant and steps an expert."""
    rows = []
    for cell in [*kept_cells().values(), *earlier_cells()]:
        _, _target, *variant, budget = cell["comparison"].split("-")
        where = {"variant": " ".join(variant), "budget": float(budget)}
        rows += [row | where for row in rows_of([cell])]
    if not rows:
        raise UserError(f"there is no cell in {RESULTS}; --keep runs copies finished ones")
    return sorted(rows, key=place_of)


def curve(rows: list[dict[str, Any]]) -> Figure:
    """Scores on training captions, a line a method, mean and deviation over seeds.

    By MACs with `STEPS` steps an expert, and at `BUDGET` by the number of steps in all.
    """
    figure, panels = sheet(12, 3.6, ncols=3)
    rows = [row for row in rows if row["split"] == "train" and not row["variant"]]
    usual = by_comparison([row for row in rows if row["finetune_steps"] == STEPS])
    macs = [(budget, line) for (_, budget), at in usual.items() for line in aggregate(at)]
    at_budget = aggregate([row for row in rows if row["budget"] == BUDGET])
    steps = [(line["steps_in_all"], line) for line in at_budget if line["method"] != "dense"]
    teacher = statistics.fmean(row["r1"] for row in rows if row["method"] == "dense")
    for axes, (key, title), lines in zip(panels[0], PANELS, (macs, macs, steps), strict=True):
        for number, method in enumerate(m for m in METHODS if m != "dense"):
            points = [
                (x, line[key], line[f"{key}_std"])  # no bar where the deviation is nan
                for x, line in sorted(lines, key=lambda pair: pair[0])
                if line["method"] == method
            ]
            if points:
                style = {"color": f"C{number}", "marker": "o", "capsize": 2}
                style["linestyle"] = "-" if method == "aptp" else "--"
                axes.errorbar(*zip(*points, strict=True), label=method, **style)
        if key == "r1":
            axes.axhline(teacher, color="grey", label="teacher")
            axes.axhline(0.9 * teacher, color="grey", linestyle=":", label="0.9 of it")
        axes.set(xlabel="share of the teacher's MACs", title=title)
    panels[0, 0].set_yscale("log")
    known = panels[0, 1].get_legend_handles_labels()
    panels[0, 0].legend(*known, frameon=False, fontsize=8, loc="lower left")
    ticks = sorted({count for count, _ in steps})
    panels[0, 2].set_xscale("log")
    panels[0, 2].set_xticks(ticks, [f"{count:,}" for count in ticks])
    panels[0, 2].minorticks_off()
    panels[0, 2].set(xlabel="fine-tuning steps, those of all experts together")
    return figure


def by_comparison(
    rows: list[dict[str, Any]],
) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows of each variant and budget: no variant first, the largest budget first."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (len(row["variant"]), row["variant"], -row["budget"])):
        found.setdefault((row["variant"], row["budget"]), []).append(row)
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for each comparison. Seconds are left out: cells were run on several machines."""
    parts = []
    for (variant, budget), at in by_comparison(rows).items():
        timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in at]
        title = f"{budget:g} of the MACs" + (f": {variant}" if variant else "")
        parts.append(markdown(title, aggregate(timeless)))
    return "\n".join(parts + ladders())


def ladders() -> list[str]:
    """A table of each budget's ablations of earlier versions: one seed, then several."""
    parts = []
    for folder in sorted(RESULTS.glob("ladder-*")):
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.json")):
            row = read_json(path)
            found.setdefault(row["row"], []).append(row)
        first = {row["row"]: [row] for rows in found.values() for row in rows if row["seed"] == 0}
        several = {name: rows for name, rows in found.items() if len(rows) > 1}
        title = f"Ladder at {folder.name.rsplit('-', 1)[1]} of the MACs, training captions"
        for rows, what in ((first, "seed 0"), (several, "means over seeds")):
            if rows:
                parts.append(ladder(f"{title}, {what}", rows))
    return parts


def ladder(title: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Ablations, each with its seeds, as a table in the order of distances."""

    def cell(rows: list[dict[str, Any]], key: str, digits: int) -> str:
        values = [row[key] for row in rows if key in row]
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    def distance(name: str) -> float:
        return statistics.fmean(row["distance"] for row in found[name])

    lines = [
        [name, len(found[name]), *(cell(found[name], key, n) for key, (_, n) in AS_CUT.items())]
        for name in sorted(found, key=distance)
    ]
    heads = ["row", "seeds", *(heading for heading, _ in AS_CUT.values())]
    return f"### {title}\n\n{tabulate(lines, heads, tablefmt='github', disable_numparse=True)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder of runs whose finished cells are copied")
    runs = parser.parse_args().keep
    if runs is not None:
        print(f"kept {keep(runs)} cells in {RESULTS}")
    rows = cells()
    matplotlib.rcParams["svg.hashsalt"] = "aptp"  # the same file from the same cells
    with replacing(RESULTS / "curve.svg") as temporary:
        curve(rows).savefig(temporary, format="svg", metadata={"Date": None})
    with replacing(RESULTS / "tables.md") as temporary:
        temporary.write_text(tables(rows), encoding="utf-8")
    print(f"wrote {RESULTS / 'tables.md'} and curve.svg from {len(rows)} rows")


if __name__ == "__main__":
    command_line(main)
