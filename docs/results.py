"""The comparison's finished cells, kept in `docs/results/`, as a table and a curve.

    python -m docs.results --keep runs      # copy what `evaluate.py --methods ...` has finished
    python -m docs.results                  # write docs/results/tables.md and curve.svg

A cell is a run folder, `compare-emoji-0.5/aptp-0@100` say: of 0.5 of the MACs, seed 0, each expert
fine-tuned for 100 steps. Of each its scores and its summary are kept.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from common.errors import UserError, command_line
from common.files import replacing
from evaluate import METHODS
from evaluation.tables import aggregate, collect, markdown

RESULTS = Path(__file__).parent / "results"
KEPT = ("summary.json", "report/metrics.json")
PANELS = (("distance", "distance to the teacher before fine-tuning"), ("r1", "R@1, training"))


def keep(runs: Path) -> int:
    """Copy the finished cells of all comparisons below `runs`: how many there are."""
    found = sorted(runs.glob("compare-*/*@*/report/metrics.json"))
    for path in found:
        cell = path.parent.parent
        for name in KEPT:
            target = RESULTS / cell.parent.name / cell.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cell / name, target)
    return len(found)


def cells() -> list[dict[str, Any]]:
    """The scores of all kept cells, each with its budget and steps an expert."""
    rows = []
    for folder in sorted(RESULTS.glob("compare-*")):
        budget = float(folder.name.rsplit("-", 1)[1])
        rows += [row | {"budget": budget} for row in collect(folder, METHODS)]
    if not rows:
        raise UserError(f"there is no cell in {RESULTS}; --keep runs copies finished ones")
    return rows


def curve(rows: list[dict[str, Any]]) -> Figure:
    """Scores against MACs on training captions, a line a method, mean and deviation over seeds."""
    figure = Figure((9, 3.8), layout="constrained")
    teacher = [row["r1"] for row in rows if row["method"] == "dense"]
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for number, method in enumerate(m for m in METHODS if m != "dense"):
            points = []
            for budget in sorted({row["budget"] for row in rows}):
                own = [r for r in rows if r["method"] == method and r["budget"] == budget]
                values = [row[key] for row in own if key in row]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    points.append((budget, statistics.fmean(values), spread))
            if points:
                x, y, error = zip(*points, strict=True)
                colour = matplotlib.colormaps["tab10"](number)
                style = "-" if method in ("aptp", "routed-sp") else "--"
                axes.errorbar(
                    x, y, error, label=method, color=colour, marker="o", linestyle=style, capsize=2
                )
        if key == "r1" and teacher:
            axes.axhline(statistics.fmean(teacher), color="grey", label="teacher")
            axes.axhline(
                0.9 * statistics.fmean(teacher), color="grey", linestyle=":", label="0.9 of it"
            )
        axes.set(xlabel="share of the teacher's MACs", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for each budget. Seconds are left out: cells were run on several machines."""
    parts = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        at = [row for row in rows if row["budget"] == budget and row["split"] != "prompts"]
        timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in at]
        parts.append(markdown(f"{budget:g} of the MACs", aggregate(timeless)))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder of runs whose finished cells are copied")
    runs = parser.parse_args().keep
    if runs is not None:
        print(f"kept {keep(runs)} cells in {RESULTS}")
    rows = cells()
    matplotlib.rcParams["svg.hashsalt"] = "aptp"  # the same file from the same cells
    with replacing(RESULTS / "curve.svg") as temporary:
        curve([row for row in rows if row["split"] == "train" and row["steps"] <= 100]).savefig(
            temporary, format="svg", metadata={"Date": None}
        )
    with replacing(RESULTS / "tables.md") as temporary:
        temporary.write_text(tables(rows), encoding="utf-8")
    print(f"wrote {RESULTS / 'tables.md'} and curve.svg from {len(rows)} rows")


if __name__ == "__main__":
    command_line(main)
