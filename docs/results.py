"""The comparisons' finished cells, kept in `docs/results/cells.jsonl`, and what is said of them.

    python -m docs.results --keep runs      # add the cells that `compare.py` has finished
    python -m docs.results                  # write the tables of README.md and docs/results.md

`cells.jsonl` has a line for each cell, with the name of its comparison's folder. A comparison with
settings of its own (`compare.py --out runs/compare-emoji-depth-paper-0.5`) has a variant: what
stands in the name between target and budget.

In a page, a table stands between two comments, `<!-- table KIND: WHICH -->` and `<!-- end -->`; a
test holds pages and file together. WHICH is a comparison, or one `less` another. Differences come
with an interval: a bootstrap that samples captions and seeds, both paired.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from common.errors import UserError, command_line
from common.files import replacing
from compare import METHODS, key_of, read_cells
from evaluation.figures import sheet
from evaluation.tables import AS_CUT, SCORES, aggregate, markdown, rows_of

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGES = (DOCS / "results.md", DOCS.parent / "README.md")
RESAMPLES = 10_000
SPLITS = ("validation", "train")  # held-out captions first
SHOWN = ("distance", "distance_exchanged", "r1", "frechet")  # of SCORES, in the page
SHARES = ("macs_ratio", "latency_ratio")  # of the dense U-Net's, over training prompts
LATENCY = "cost latency"  # variant of a comparison whose budget is of latency
ALL = "refit-4096"  # one expert on as many images as eight have
FIRST = "aptp"  # what the others are compared with
MAIN = (FIRST, "uni-arch", "sp", "obs", "routed-obs", "dense")  # in README
Cell = dict[str, Any]


def kept_cells() -> dict[tuple[Any, ...], Cell]:
    """The cells in cells.jsonl, by comparison, method, seed and tuning."""
    path = RESULTS / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(cell["comparison"], *key_of(cell)): cell for cell in map(json.loads, lines)}


def keep(runs: Path) -> int:
    """Add the finished cells of all comparisons below `runs` to cells.jsonl: how many there are.

    A cell does not replace one of which more sets of images were scored. Of single captions' scores
    those are kept that are compared.
    """
    cells, found = kept_cells(), set()
    for folder in sorted(runs.glob("**/compare-*")):
        for key, cell in read_cells(folder).items():
            place = (folder.name, *key)
            found.add(place)
            if place not in cells or scored_sets(cell) >= scored_sets(cells[place]):
                scores = [row | {"captions": compared_captions(row)} for row in cell["scores"]]
                cells[place] = cell | {"comparison": folder.name, "scores": scores}
    lines = [json.dumps(cell, ensure_ascii=False) + "\n" for _, cell in sorted(cells.items())]
    with replacing(RESULTS / "cells.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return len(found)


def scored_sets(cell: Cell) -> int:
    """How many sets of images were scored: none of a cell of distances alone."""
    return sum("r1" in row for row in cell["scores"])


def compared_captions(row: dict[str, Any]) -> dict[str, list[float]]:
    """The scores of single captions that `COMPARED` names."""
    keys = {key for key, _ in COMPARED}
    return {key: values for key, values in row.get("captions", {}).items() if key in keys}


def place_of(cell: Cell) -> tuple[Any, ...]:
    """Where a cell stands among those of its comparison."""
    base = cell["method"].partition(":")[0]
    return cell["steps_in_all"], METHODS.index(base), cell["method"], cell["tuning"], cell["seed"]


def comparisons() -> dict[tuple[str, float], list[Cell]]:
    """The kept cells by variant and budget: no variant first, the largest budget first."""
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in sorted(kept_cells().values(), key=place_of):
        _, _target, *variant, budget = cell["comparison"].split("-")
        found.setdefault((" ".join(variant), float(budget)), []).append(cell)
    if not found:
        raise UserError(f"there is no cell in {RESULTS}; --keep runs copies finished ones")
    return dict(sorted(found.items(), key=lambda pair: (bool(pair[0][0]), pair[0][0], -pair[0][1])))


# ---- tables ----


def heading(variant: str, budget: float) -> str:
    """What a comparison is called: `0.5 of the MACs, depth paper`, `0.5 of the latency`."""
    rest, what = variant.removeprefix(LATENCY).strip(), "MACs"
    if variant.startswith(LATENCY):
        what = "latency"
    return f"{budget:g} of the {what}" + (f", {rest}" if rest else "")


def scores(cells: Sequence[Cell], shown: Sequence[str] = SHOWN, needed: str = "distance") -> str:
    """A comparison's scores: a line for each method and tuning, both splits side by side.

    Args:
        shown: keys of `SCORES`.
        needed: lines without this score are left out.
    """
    rows = [row for row in rows_of(cells) if row["split"] in SPLITS]
    by_split: dict[tuple[str, str], dict[str, Any]] = {}  # method, tuning -> split -> its line
    for line in aggregate(rows):
        by_split.setdefault((line["method"], line["tuning"]), {})[line["split"]] = line
    table = []
    for (method, tuning), of_split in by_split.items():
        line = of_split.get("train", next(iter(of_split.values())))
        if needed not in line:
            continue
        cost = f"{line['processor_seconds']:.0f}" if "processor_seconds" in line else ""
        shares = [f"{line[key]:.2f}" if key in line else "" for key in SHARES]
        values = [number(of_split.get(split, {}), key) for key in shown for split in SPLITS]
        table.append([method, tuning, line["steps_in_all"], line["seeds"], *shares, cost, *values])
    heads = ["method", "tuning", "steps in all", "seeds", "MACs", "latency", "processor s"]
    heads += [f"{SCORES[key][0]} {split}" for key in shown for split in ("val.", "train")]
    return tabulate(table, heads, tablefmt="github", disable_numparse=True)


def summary(cells: Sequence[Cell]) -> str:
    """The scores of images alone, of `MAIN` methods, refitted on as many images in all."""
    shown = [cell for cell in cells if cell["method"] in MAIN]
    alike = [cell for cell in shown if refitted_alike(cell) or cell["method"] == "dense"]
    return scores([cell for cell in alike if scored_sets(cell)], ("r1", "frechet"), "r1")


def refitted_alike(cell: Cell) -> bool:
    """Whether experts were refitted on as many images in all as APTP's eight, then tuned or not."""
    return cell["tuning"].partition("+")[0] == ("refit" if cell["num_experts"] > 1 else ALL)


def number(line: dict[str, Any], key: str) -> str:
    """A mean and its deviation over seeds, where there are several."""
    if key not in line:
        return ""
    digits = SCORES[key][1]
    spread = line[f"{key}_std"]
    return f"{line[key]:.{digits}f}" + ("" if np.isnan(spread) else f" ± {spread:.{digits}f}")


Captions = dict[int, list[float]]  # seed -> a score of each caption


def captions_of(cells: Sequence[Cell], split: str, key: str) -> dict[tuple[str, str], Captions]:
    """Method and tuning -> a score of each caption, by seed."""
    found: dict[tuple[str, str], Captions] = {}
    for cell in cells:
        for row in cell["scores"]:
            if row["split"] == split and key in row.get("captions", {}):
                of_seeds = found.setdefault((row["method"], cell["tuning"]), {})
                of_seeds[cell["seed"]] = row["captions"][key]
    return found


def interval(difference: np.ndarray) -> tuple[float, float, float]:
    """A mean difference and its 95 % interval, by a bootstrap over seeds and captions.

    Args:
        difference: of paired scores, (seeds, captions).
    """
    generator = np.random.default_rng(0)
    S, C = difference.shape
    seeds = generator.multinomial(S, np.full(S, 1 / S), RESAMPLES)  # (resamples, S)
    captions = generator.multinomial(C, np.full(C, 1 / C), RESAMPLES)  # (resamples, C)
    means = ((seeds @ difference) * captions).sum(1) / (S * C)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def kind_of(tuning: str) -> str:
    """How experts were tuned, whatever the steps and images."""
    return next((kind for kind in ("refit", "shared") if tuning.startswith(kind)), "as cut")


def paired(own: Captions, other: Captions, key: str, most: int) -> str:
    """The mean difference of the seeds that both have, with its interval; bold where 0 is outside.

    Nothing where they have no seed in common; their number where it is not the line's.

    Args:
        most: seeds that the line has.
    """
    seeds, digits = sorted(own.keys() & other.keys()), SCORES[key][1]
    if not seeds:
        return ""
    values = np.array([np.subtract(own[seed], other[seed]) for seed in seeds])
    mean, low, high = interval(values)
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    text = f"**{text}**" if low * high > 0 else text
    return text if len(seeds) == most else f"{text} ({len(seeds)})"


Named = tuple[str, str]  # method, tuning
COMPARED = [(key, split) for key in ("distance", "r1", "frechet") for split in SPLITS]


def held_against(
    cells: Sequence[Cell], others: Sequence[Cell], pairs: Sequence[tuple[Named, Named]]
) -> str:
    """A line for each pair: scores of the first, in `cells`, less those of the second."""
    own, theirs = (
        {compared: captions_of(part, compared[1], compared[0]) for compared in COMPARED}
        for part in (cells, others)
    )
    table = []
    for first, second in pairs:
        both = [(own[c].get(first, {}), theirs[c].get(second, {}), c[0]) for c in COMPARED]
        seeds = len(both[0][0].keys() & both[0][1].keys())
        if seeds:
            table.append(
                [*first, ", ".join(second), seeds, *(paired(*pair, seeds) for pair in both)]
            )
    heads = ["method", "tuning", "less", "seeds"]
    heads += [
        f"{SCORES[key][0]} {'val.' if split == 'validation' else split}" for key, split in COMPARED
    ]
    return tabulate(table, heads, tablefmt="github", disable_numparse=True)


def less(cells: Sequence[Cell], others: Sequence[Cell]) -> str:
    """A comparison's scores less another's, of the same method, tuning, seeds and captions."""
    names = dict.fromkeys((cell["method"], cell["tuning"]) for cell in cells)
    return held_against(cells, others, [(name, name) for name in names])


def differences(cells: Sequence[Cell]) -> str:
    """APTP less each other method that was tuned alike, over the seeds that both have."""
    alike = {
        (cell["method"], cell["tuning"]): (kind_of(cell["tuning"]), cell["steps_in_all"])
        for cell in cells
    }
    pairs = [
        (own, other)
        for own, how in alike.items()
        for other, same in alike.items()
        if own[0] == FIRST and other[0] not in (FIRST, "dense") and same == how
    ]
    return held_against(cells, cells, pairs)


def ablations(cells: Sequence[Cell]) -> str:
    """Codes as they were cut, in the order of their distance on held-out captions."""
    rows = [row for row in rows_of(cells) if row["tuning"] == "cut"]
    lines = [line for line in aggregate(rows) if line["split"] == "validation"]
    text = markdown("", sorted(lines, key=lambda line: line["distance"]), AS_CUT)
    return text.removeprefix("### \n\n").strip()


TABLES: dict[str, Callable[[Sequence[Cell]], str]] = {
    "scores": scores,
    "summary": summary,
    "differences": differences,
    "as cut": ablations,
}
MARK = re.compile(r"(<!-- table (\w[\w ]*?): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with its tables made anew: `<!-- table scores: 0.5 of the MACs -->`."""
    known = {heading(*key): cells for key, cells in comparisons().items()}

    def made(match: re.Match[str]) -> str:
        opening, kind, which, end = match.groups()
        parts = which.split(" less ")
        if kind not in TABLES or not set(parts) <= set(known):
            raise UserError(
                f"no table {kind}: {which}; choose among {', '.join(TABLES)} and {', '.join(known)}"
            )
        make = less if len(parts) > 1 else TABLES[kind]
        return f"{opening}\n{make(*(known[part] for part in parts))}\n\n{end}"

    return MARK.sub(made, page)


# ---- figures ----

STEPS, SECONDS = "fine-tuning steps in all", "processor seconds in all"
PANELS = (  # x, its name, score, split
    ("steps_in_all", STEPS, "r1", "validation"),
    ("steps_in_all", STEPS, "r1", "train"),
    ("processor_seconds", SECONDS, "distance", "validation"),
    ("processor_seconds", SECONDS, "distance", "train"),
)
SHOWN_AT = 0.5  # of the MACs: the curve
DRAWN = ("aptp", "uni-arch")  # methods that were run at several points
MARKS = {"as cut": ("o", ":"), "refit": ("s", "-"), "shared": ("D", "--")}


def curve(cells: Sequence[Cell]) -> Figure:
    """Scores at one budget, by fine-tuning steps and by the processor's seconds."""
    figure, panels = sheet(16, 4, ncols=4)
    alike = [c for c in cells if kind_of(c["tuning"]) != "refit" or refitted_alike(c)]
    lines = aggregate(rows_of(alike))
    for axes, (x, title, score, split) in zip(panels[0], PANELS, strict=True):
        shown: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for line in sorted(lines, key=lambda line: line[x]):
            if line["split"] == split and score in line:
                shown.setdefault((line["method"], kind_of(line["tuning"])), []).append(line)
        for (method, kind), points in shown.items():
            if method == "dense":
                axes.axhline(points[0][score], color="grey", label="teacher")
            elif method in DRAWN:
                marker, style = MARKS[kind]
                axes.errorbar(
                    [line[x] for line in points],
                    [line[score] for line in points],
                    np.nan_to_num([line[f"{score}_std"] for line in points]),
                    label=f"{method}, {kind}",
                    color=f"C{METHODS.index(method)}",
                    marker=marker,
                    linestyle=style,
                    capsize=2,
                )
        captions = "held-out" if split == "validation" else "training"
        axes.set(xlabel=title, title=f"{SCORES[score][0]}, {captions} captions", ylim=(0, None))
    panels[0, 2].legend(frameon=False, fontsize=8)
    return figure


def by_latency(groups: dict[tuple[str, float], list[Cell]]) -> Figure:
    """Scores of refitted experts, by their measured latency; a line for what was budgeted."""
    figure, panels = sheet(16, 4, ncols=4)
    keys = [(key, split) for key in ("distance", "r1") for split in SPLITS]
    shown: dict[tuple[str, str], list[dict[str, Any]]] = {}  # method, budget of -> its lines
    for (variant, budget), cells in groups.items():
        what = heading(variant, budget).partition(" of the ")[2]
        refitted = [c for c in cells if refitted_alike(c) and not c["steps_in_all"]]
        for line in aggregate(rows_of(refitted)):
            if line["method"] in DRAWN and "latency_ratio" in line:
                shown.setdefault((line["method"], what), []).append(line)
    for axes, (score, split) in zip(panels[0], keys, strict=True):
        for (method, what), lines in shown.items():
            lines = sorted(lines, key=lambda line: line["latency_ratio"])
            points = [line for line in lines if line["split"] == split and score in line]
            axes.errorbar(
                [line["latency_ratio"] for line in points],
                [line[score] for line in points],
                np.nan_to_num([line[f"{score}_std"] for line in points]),
                label=f"{method}, budget of {what}",
                color=f"C{METHODS.index(method)}",
                marker={"latency": "o", "MACs": "s"}.get(what, "^"),
                linestyle="-" if what == "latency" else ":",
                capsize=2,
            )
        captions = "held-out" if split == "validation" else "training"
        title = f"{SCORES[score][0]}, {captions} captions"
        axes.set(xlabel="measured latency, share of the teacher's", title=title, ylim=(0, None))
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder of runs whose finished cells are copied")
    runs = parser.parse_args().keep
    if runs is not None:
        print(f"kept {keep(runs)} cells in {RESULTS}")
    for page in PAGES:
        text = filled(page.read_text(encoding="utf-8"))
        with replacing(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    matplotlib.rcParams["svg.hashsalt"] = "aptp"  # the same file from the same cells
    groups = comparisons()
    made = {"curve.svg": curve(groups["", SHOWN_AT]), "latency.svg": by_latency(groups)}
    for name, figure in made.items():
        with replacing(RESULTS / name) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    print(f"wrote the tables of {' and '.join(page.name for page in PAGES)}, {', '.join(made)}")


if __name__ == "__main__":
    command_line(main)
