"""One page with all that is known of a finished run: Sec. 4.2, App. E.4.

`python evaluate.py` scores a run and hands over what it found as `Inputs`. The figures come from
`figures.py`, the page and its captions from `report.html.j2`. The page is one file that needs no
other: images are inside, there is no script, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from common.errors import UserError
from common.files import read_json, replacing
from evaluation import figures
from evaluation.analysis import (
    Routed,
    expert_order,
    group_costs,
    perplexity,
    read_log,
    shares,
    shorten,
    words_table,
)
from evaluation.generated import Example
from evaluation.grids import save_figure
from evaluation.tables import SCORES, budget_text, latency_error, latency_line

TEMPLATE = Path(__file__).with_name("report.html.j2")

HEADS = {key: heading for key, (heading, _) in SCORES.items()} | {"nmi": "NMI"}


@dataclass(frozen=True)
class Inputs:
    """What a report is made of."""

    summary: dict[str, Any]
    """The run's summary.json."""
    train: Routed
    """All training prompts of the run, in the target's order."""
    validation: Routed
    """The validation prompts."""
    ratios: Sequence[float]
    """MACs ratio of each expert, (N,)."""
    macs_dense: float
    """MACs of one forward of the teacher's U-Net."""
    blocks: Sequence[str]
    """Names of the U-Net's blocks in the order of computation."""
    kept: np.ndarray
    """Share of each block's prunable MACs that each expert keeps, (blocks, N)."""
    batch: tuple[Sequence[int], Sequence[int]] | None = None
    """The last training batch: its rows, (B,), and their experts by transport; None without one."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """metrics.json.

    Each list of flat dictionaries in it becomes a table: `rows` are the scores, `nmi` says how much
    expert and group have in common ("split", "nmi" and "shuffled", the control).
    """
    samples: Sequence[Example] = ()
    """Images of routed prompts."""
    same_prompt: Sequence[Example] = ()
    """Images of one prompt, or of a few, by every expert, from one seed."""
    without_transport: Path | None = None
    """Folder of a run trained without transport on the same prompts, to compare with."""


# ---- tables ----


class Table(NamedTuple):
    """Text of a table, as the page shows it."""

    columns: list[tuple[str, str]]  # heading, and `number` or `text`
    cells: list[list[str]]


def cell(value: Any) -> str:
    """A value of a table as people write it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "\N{EN DASH}"
    if isinstance(value, int):
        return f"{value:,}" if not isinstance(value, bool) else "yes" if value else "no"
    if isinstance(value, float):
        decimals = 3 if abs(value) < 10 else 2 if abs(value) < 1e4 else 0
        return f"{value:,.{decimals}f}" if abs(value) > 1e-3 else f"{value:.3g}"
    return str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Flat dictionaries as a table, a row each; its columns are all of their keys."""
    kinds = {key: "number" for row in rows for key in row}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, str) and any(character.isalpha() for character in value):
                kinds[key] = "text"
    columns = [(HEADS.get(key, key.replace("_", " ")), kind) for key, kind in kinds.items()]
    return Table(columns, [[cell(row.get(key)) for key in kinds] for row in rows])


def groups_table(train: Routed, ratios: Sequence[float]) -> Table:
    """What each group of training prompts costs."""
    costs = group_costs(train, ratios)
    mean = sum(row.mean * row.prompts for row in costs) / max(1, len(train.captions))
    return table(
        [
            {
                "group": shorten(row.group, 60) or "(no group)",
                "prompts": row.prompts,
                "mean MACs ratio": f"{row.mean:.4f}",
                "± 95 %": f"{1.96 * row.error:.4f}" if row.prompts > 1 else None,
                "against all prompts": f"{row.mean - mean:+.4f}",
            }
            for row in costs
        ]
    )


def blocks_table(inputs: Inputs) -> Table:
    """What each expert keeps of each block."""
    order = expert_order(inputs.ratios)
    return table(
        [
            {"block": figures.block_label(block)} | {f"expert {i}": f"{row[i]:.2f}" for i in order}
            for block, row in zip(inputs.blocks, inputs.kept, strict=True)
        ]
    )


def latency_table(summary: Mapping[str, Any]) -> Table:
    """How long each expert takes, where the budget is one of time."""

    def milliseconds(value: float | None) -> str | None:
        return None if value is None else f"{value * 1e3:.4g}"

    return table(
        [
            {
                "expert": expert["id"],
                "MACs ratio": expert["macs_ratio"],
                "latency ratio": expert["latency_ratio"],
                "predicted, ms": milliseconds(expert["latency_predicted"]),
                "measured, ms": milliseconds(expert["latency_measured"]),
                "error": latency_error(expert),
            }
            for expert in summary["experts"]
        ]
    )


# ---- figures ----

Panel = tuple[str, Sequence[int], Sequence[float]]  # of `figures.assignment_map`


def assignments(run: Path, inputs: Inputs) -> list[Panel]:
    """Fig. 9: the last batch's experts by transport, by nearest code, and in the other run.

    Raises `UserError` where the run to compare with has other prompts.
    """
    assert inputs.batch
    rows, transported = inputs.batch
    nearest = [inputs.train.experts[row] for row in rows]
    panels: list[Panel] = [
        ("by transport, as in training", transported, inputs.ratios),
        ("by nearest code, as at test time", nearest, inputs.ratios),
    ]
    if other := inputs.without_transport:
        experts = read_json(other / "assignments.json")["train"]
        if len(experts) != len(inputs.train.captions):
            raise UserError(
                f"{other} has {len(experts)} training prompts, {run} {len(inputs.train.captions)}; "
                "compare runs on the same target, seed and limit"
            )
        ratios = [expert["macs_ratio"] for expert in read_json(other / "summary.json")["experts"]]
        panels.append(("trained without transport", [experts[row] for row in rows], ratios))
    return panels


def losses(run: Path, inputs: Inputs) -> tuple[Figure, str]:
    """Fig. 8 and its text. Raises `UserError` where a log is missing or damaged."""
    config, curves = read_json(run / "config.json"), figures.CURVES
    name = "without transport" if config.get("transport") is False else "with transport"
    own = read_log(run / "metrics.csv")
    logs = {name: own}
    if inputs.without_transport:
        logs["without transport"] = read_log(inputs.without_transport / "metrics.csv")
    last = slice(-max(1, len(own["step"]) // 10), None)
    shown = {key: own[key] for key in curves if key in own and key != "perplexity"}
    figure = figures.loss_curves(
        logs,
        warmup_steps=config.get("warmup_steps") or 0,
        budget=inputs.summary["budget"],
        num_experts=len(inputs.ratios),
    )
    return figure, "; ".join(
        f"{curves[key]} from {y[0]:.3g} to {y[last].mean():.3g}" for key, y in shown.items()
    )


def all_figures(
    run: Path, inputs: Inputs, panels: list[Panel]
) -> Iterator[tuple[str, Figure, str]]:
    """Every figure of the report: its name, itself, and its text for those who cannot see it."""
    train, validation, ratios, kept = inputs.train, inputs.validation, inputs.ratios, inputs.kept
    if inputs.samples:
        alt = "A row an expert: " + ", ".join(shorten(s.prompt, 60) for s in inputs.samples)
        yield "samples", figures.sample_grid(inputs.samples), alt
    if inputs.same_prompt:
        alt = "By every expert: " + ", ".join(dict.fromkeys(s.prompt for s in inputs.same_prompt))
        yield "through-every-expert", figures.through_every_expert(inputs.same_prompt), alt
    costs = group_costs(train, ratios)
    mean = sum(row.mean * row.prompts for row in costs) / max(1, len(train.captions))
    alt = "; ".join(f"{row.group or 'no group'} {row.mean:.3f}" for row in costs[:30])
    figure = figures.difficulty({"training": train, "validation": validation}, ratios)
    yield "difficulty", figure, f"Mean MACs ratio by group, {mean:.3f} over all: {alt}"
    share = shares(train.experts, len(ratios))
    alt = ", ".join(f"expert {i} {share[i]:.1%}" for i in expert_order(ratios))
    yield "shares", figures.share_bars(train.experts, validation.experts, ratios), alt
    if panels:
        alt = "; ".join(f"{title}: {len(set(e))} of {len(r)} experts" for title, e, r in panels)
        yield "assignment", figures.assignment_map(panels), alt
    least = figures.block_label(inputs.blocks[kept.mean(1).argmin()])
    alt = f"{len(kept)} blocks by {len(ratios)} experts, {kept.min():.2f} to {kept.max():.2f} "
    alt += f"kept; on average least of {least}. Numbers in the table below."
    yield "retained", figures.retained_heatmap(inputs.blocks, kept, ratios), alt
    if (run / "metrics.csv").exists():
        yield "losses", *losses(run, inputs)


class Embedded(NamedTuple):
    """A figure inside the page."""

    data: str  # PNG, in base64
    alt: str
    width: int  # CSS pixels
    height: int


def embed(path: Path, figure: Figure, alt: str) -> Embedded:
    """Write a figure to `path` as PNG; the page gets the same bytes."""
    save_figure(figure, path)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Embedded(base64.b64encode(path.read_bytes()).decode(), shorten(alt, 600), width, height)


# ---- page ----


def printable(value: Any) -> Any:
    """Text from the data with spaces for what cannot be printed; the page escapes it afterwards."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() else " " for c in value)


def write_report(run: Path, inputs: Inputs) -> Path:
    """Make all figures of a finished run and put them on one page, with the tables.

    Writes `run/report/*.png` and `run/report/report.html`, which needs no other file.

    Returns:
        The page's path.

    Raises:
        UserError: the run, or the one to compare with, is incomplete or of other prompts.
    """
    folder, train, validation = run / "report", inputs.train, inputs.validation
    panels = assignments(run, inputs) if inputs.batch else []
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE.name).render(
        summary=inputs.summary,
        method=inputs.summary.get("method", "aptp"),
        num_experts=len(inputs.ratios),
        macs_dense=inputs.macs_dense,
        train=len(train.captions),
        validation=len(validation.captions),
        used=len(set(validation.experts)),
        perplexity=perplexity(shares(train.experts, len(inputs.ratios))),
        same=sum(a == b for a, b in zip(panels[0][1], panels[1][1], strict=True)) if panels else 0,
        batch_size=len(panels[0][1]) if panels else 0,
        compared=inputs.without_transport is not None,
        figures={
            name: embed(folder / f"{name}.png", figure, alt)
            for name, figure, alt in all_figures(run, inputs, panels)
        },
        scores={k: table(v) for k, v in inputs.metrics.items() if isinstance(v, list) and v},
        words=table(words_table(train, validation, inputs.ratios)),
        groups=groups_table(train, inputs.ratios),
        blocks=blocks_table(inputs),
        budget=budget_text(inputs.summary),
        latency=latency_table(inputs.summary) if "latency" in inputs.summary else None,
        latency_line=latency_line(inputs.summary) if "latency" in inputs.summary else "",
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page + "\n", encoding="utf-8")
    return folder / "report.html"
