"""Scores of several runs as tables: mean and deviation over seeds. Tables 1, 3, 5 and 6, Fig. 5."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common.files import replacing

SCORES = {  # of a split's captions, where a row has them: key -> heading, digits
    "macs_ratio": ("MACs ratio", 3),
    "latency_ratio": ("latency ratio", 3),
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
ROUTING = {  # of a run
    "processor_seconds": ("processor s", 0),
    "soft_ratio": ("soft MACs ratio", 3),
    "agreement": ("agreement", 3),
    "perplexity": ("perplexity", 2),
}
AS_CUT = {k: v for k, v in SCORES.items() if k.startswith("distance")} | ROUTING

TABLE_3 = ("uni-arch", "aptp:contrastive", "aptp:transport", "aptp")  # the ablation, in its order


def aggregate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method, split and tuning.

    The deviation is the sample's (n - 1), nan for a single seed.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        group = (row["split"], row.get("tuning", ""), row["method"])
        groups.setdefault(group, []).append(row)
    found = []
    for (split, tuning, method), members in groups.items():
        line: dict[str, Any] = {"split": split, "method": method, "tuning": tuning}
        line["steps_in_all"] = members[0].get("steps_in_all", 0)
        line["seeds"] = len(members)
        for key in SCORES | ROUTING:
            values = [member[key] for member in members if key in member]
            if values:
                line[key] = statistics.fmean(values)
                line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        found.append(line)
    return found


def markdown(
    title: str,
    lines: Sequence[dict[str, Any]],
    measures: dict[str, tuple[str, int]] = SCORES,
) -> str:
    """Aggregated lines as a Markdown table with its title."""
    present = {key: m for key, m in measures.items() if any(key in line for line in lines)}
    words = {"method": "method", "split": "split"}
    if any(line["tuning"] for line in lines):  # of a comparison
        words |= {"tuning": "tuning", "steps_in_all": "steps in all", "seeds": "seeds"}

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


def rows_of(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scores in a comparison's cells, each with what its cell says of the run."""
    shared = ("seed", "budget", "tuning", "steps_in_all", "latency_ratio", *ROUTING)
    rows = []
    for cell in cells:
        of_cell = {key: cell[key] for key in shared if key in cell}
        of_cell["processor_seconds"] = sum(cell["processor_seconds"].values())
        for row in cell["scores"]:
            rows.append({k: v for k, v in row.items() if k != "captions"} | of_cell)
    return sorted(rows, key=lambda row: (row["split"] != "validation", row["steps_in_all"]))


def write_tables(folder: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Write tables.md and tables.csv of a comparison from its cells so far."""
    lines = aggregate(rows_of(cells))
    scores = [line for line in lines if line["split"] != "prompts"]
    parts = {"Table 1: methods at one budget": scores}
    ablation = [line for line in scores if line["method"] in TABLE_3]
    if {"aptp:contrastive", "aptp:transport"} & {line["method"] for line in ablation}:
        ablation.sort(
            key=lambda line: (line["split"] != "validation", TABLE_3.index(line["method"]))
        )
        parts["Table 3: ablation"] = ablation
    if len({line["steps_in_all"] for line in scores if line["method"] != "dense"}) > 1:
        parts["Table 5: by fine-tuning steps"] = sorted(
            scores,
            key=lambda line: (line["split"] != "validation", line["method"], line["steps_in_all"]),
        )
    parts["Table 6: free prompts"] = [line for line in lines if line["split"] == "prompts"]
    text = [markdown(title, part) for title, part in parts.items() if part]
    cut = [line for line in scores if line["tuning"] == "cut" and line["split"] == "train"]
    if any(":" in line["method"] for line in cut):
        ranked = sorted(cut, key=lambda line: line["distance"])
        text.append(markdown("As cut: ablations, Fig. 5", ranked, AS_CUT))
    with replacing(folder / "tables.md") as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
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
    timed = "latency" in summary
    print(
        f"{'expert':>6}  {'MACs ratio':>10}  {'latency ratio  (error)  ' * timed}"
        f"{'parameters':>10}  {'prompts':>7}  most frequent words"
    )
    for expert in summary["experts"]:
        time = f"{latency_text(expert):>22}  " if timed else ""
        cost = f"{expert['macs_ratio']:>10.3f}  {time}{expert['params'] / 1e6:>8.2f} M"
        words = ", ".join(expert["words"])
        print(f"{expert['id']:>6}  {cost}  {expert['usage_train']:>7.1%}  {words}")
    used = sum(share > 0 for share in summary["usage_validation"])
    print(
        f"mean MACs ratio over training prompts {summary['macs_ratio_mean']:.4f} (budget "
        f"{budget_text(summary)}); "
        f"{used} of {summary['num_experts']} experts get validation prompts"
    )
    if timed:
        print(latency_line(summary))


def budget_text(summary: dict[str, Any]) -> str:
    """A run's budget, and what it is of: `0.5 of the latency`."""
    return f"{summary['budget']:g} of the {'latency' if 'latency' in summary else 'MACs'}"


def latency_text(expert: dict[str, Any]) -> str:
    """An expert's latency ratio, and the error of its prediction."""
    return f"{expert['latency_ratio']:.3f} ({latency_error(expert)})"


def latency_error(expert: dict[str, Any]) -> str:
    """By how much the prediction of an expert's latency is off."""
    measured = expert["latency_measured"]
    return f"{expert['latency_predicted'] / measured - 1:+.1%}" if measured else "not measured"


def latency_line(summary: dict[str, Any]) -> str:
    """What a run's latency ratio is, and of what."""
    of = summary["latency"]
    how = (
        "measured" if summary["experts"][0]["latency_measured"] else "predicted, not measured here"
    )
    return (
        f"mean latency ratio over training prompts {summary['latency_ratio_mean']:.4f} (budget "
        f"{summary['budget']:g}, {how}), of {of['dense'] * 1e3:.3g} ms a forward on "
        f"{of['device']}, {of['precision']}, batch {of['batch']}, {of['pixels']} px, "
        f"{of['runtime']}"
    )
