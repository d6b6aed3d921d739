"""The table of experts as text, CSV and picture, and the list of ratios with their targets."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.files import replacing

PAPER = (  # Table 1: MACs by the paper's count, seconds a sample of 25 steps, A100, 768 px
    ("paper: SD 2.1", 1384.2e9, 4.0),
    ("paper: 0.78", 1076.6e9, 3.1),
)
HEADS = (
    "expert",
    "parameters",
    "MACs exact",
    "MACs paper's",
    "ratio",
    "latency",
    "IQR",
    "latency ratio",
    "speed-up",
    "peak memory",
)
COLUMNS = (  # of the CSV
    "variant",
    "expert",
    "params",
    "macs",
    "macs_paper",
    "macs_ratio",
    "latency_median",
    "latency_iqr",
    "latency_ratio",
    "speed_up",
    "peak_bytes",
)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range of some timings."""
    low, _, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    return {"latency_median": statistics.median(seconds), "latency_iqr": high - low}


def paired_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of own / other, taken one right after the other.

    A machine that speeds up or slows down over the rounds does not move it.
    """
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def measured(
    costs: dict[str, Any], seconds: Sequence[float], dense: Sequence[float]
) -> dict[str, Any]:
    """A row's figures: what is known of a U-Net, and its timings in turn with the dense one's."""
    ratio = paired_ratio(seconds, dense)
    timing = spread(seconds) | {"latency_ratio": ratio, "speed_up": 1 / ratio}
    return {**costs, **timing, "seconds": list(seconds)}


def by_variant(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Experts' rows by variant, each variant's led by the dense U-Net's.

    The dense U-Net was timed beside every expert; its latency is that of all these runs.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        seconds = [value for row in mine for value in row["dense"]["seconds"]]
        dense = mine[0]["dense"] | spread(seconds) | {"variant": variant, "expert": "dense"}
        found[variant] = [dense, *mine]
    return found


def time_text(value: float) -> str:
    """Seconds in the unit that suits them."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def cells(row: dict[str, Any], scale: float) -> tuple[str, ...]:
    """A row as `HEADS` names it."""
    unit = "G" if scale == 1e9 else "M"
    return (
        str(row["expert"]),
        f"{row['params'] / 1e6:.2f} M",
        f"{row['macs'] / scale:.2f} {unit}",
        f"{row['macs_paper'] / scale:.2f} {unit}",
        f"{row['macs_ratio']:.3f}",
        time_text(row["latency_median"]),
        time_text(row["latency_iqr"]),
        f"{row['latency_ratio']:.3f}",
        f"{row['speed_up']:.2f} x",
        f"{row['peak_bytes'] / 2**20:,.0f} MiB",
    )


def paper_cells() -> list[tuple[str, ...]]:
    """What the paper says of the same columns, elsewhere and otherwise measured."""
    (_, dense_macs, dense_time), *_ = PAPER
    return [
        (
            name,
            "",
            "",
            f"{macs / 1e9:.1f} G",
            f"{macs / dense_macs:.3f}",
            time_text(time),
            "",
            f"{time / dense_time:.3f}",
            f"{dense_time / time:.2f} x",
            "",
        )
        for name, macs, time in PAPER
    ]


def text(rows: Sequence[dict[str, Any]], title: str, source: str) -> list[str]:
    """Lines of the report: a table a variant, and what its columns mean."""
    lines = []
    for mine in by_variant(rows).values():
        scale = 1e9 if mine[0]["macs"] >= 1e10 else 1e6
        grid = [HEADS, *(cells(row, scale) for row in mine), *paper_cells()]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines += [f"{title}: {mine[1]['caption']}", ""]
        lines += ["  ".join(map(str.rjust, line, widths)).rstrip() for line in grid]
        lines += [""]
    rounds = len(rows[0]["seconds"])
    return [
        *lines,
        f"Experts: {source}.",
        "Weights are random: MACs and latency do not depend on their values.",
        f"Latency: median and interquartile range over {rounds} rounds, in turns with the dense",
        "U-Net's. The latency ratio is the median over the rounds: compare it, not the latencies.",
        "Parameters and MACs (one image, one forward) are the U-Net's. Peak memory: its weights,",
        "plus the most that the tensors of a run take at once, by PyTorch's own allocators.",
        "The paper's rows, for reference: A100, 768 px, seconds a sample of 25 steps (Table 1).",
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All variants' rows, one file."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for mine in by_variant(rows).values():
            writer.writerows(mine)


def write_png(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Latency ratio against MACs ratio, a point an expert, with the diagonal."""
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.add_subplot()
    values = [row[key] for row in rows for key in ("macs_ratio", "latency_ratio")]
    low, high = min([*values, 0.6]) - 0.05, max([*values, 1.0]) + 0.05
    axes.axline((1, 1), slope=1, color="0.6", label="latency falls as MACs do")
    for variant, (_, *mine) in by_variant(rows).items():
        points = [(row["macs_ratio"], row["latency_ratio"]) for row in mine]
        axes.scatter(*zip(*points, strict=True), label=variant, zorder=3)
        for row, point in zip(mine, points, strict=True):
            axes.annotate(f" {row['expert']}", point, fontsize=8)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal", title=title)
    axes.set_xlabel("MACs / dense U-Net's MACs")
    axes.set_ylabel("latency / dense U-Net's latency")
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def verdict(found: dict[str, Any]) -> str:
    """One ratio as a line: what it is, its value, the target and whether it is met."""
    line = f"{found['what']}: {found['ratio']:.3f}"
    if "own" in found:
        line += f" ({time_text(found['own'])} / {time_text(found['other'])})"
    if found["target"] is None:
        return line
    met = "met" if found["ratio"] <= found["target"] else "MISSED"
    return f"{line}, target {found['target']:g} at most: {met}"
