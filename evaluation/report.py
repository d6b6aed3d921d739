"""One page with all that is known of a finished run: Sec. 4.2, App. E.4.

Behind `python evaluate.py`, which has scored the run and hands over what it knows as `Inputs`;
`figures.py` draws. The page is one file that needs no other: pictures are inside, there is no
script, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import html
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from common.errors import UserError
from common.files import read_json, replacing
from evaluation.analysis import (
    Routed,
    clip,
    expert_order,
    group_costs,
    last_batch,
    perplexity,
    read_log,
    retained,
    shares,
    words_table,
)
from evaluation.figures import (
    CURVES,
    DPI,
    Sample,
    assignment_map,
    block_label,
    difficulty,
    loss_curves,
    retained_heatmap,
    sample_grid,
    through_every_expert,
    usage_bars,
)
from macs import MacsModel


@dataclass(frozen=True)
class Inputs:
    """What a report is made of."""

    summary: dict[str, Any]
    """The run's summary.json."""
    train: Routed
    """All training prompts of the run, in the target's order."""
    validation: Routed
    """The validation prompts."""
    codes: Tensor
    """The run's binary codes, (N, D)."""
    macs: MacsModel
    """T(a) of the teacher's U-Net, with its architecture space."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """metrics.json.

    Each list of flat dictionaries in it becomes a table: `rows` are the scores, `nmi` says how much
    expert and group have in common ("split", "nmi" and "shuffled", the control).
    """
    samples: Sequence[Sample] = ()
    """Drawings of routed prompts."""
    same_prompt: Sequence[Sample] = ()
    """Drawings of one prompt, or of a few, by every expert, from one seed."""
    without_transport: Path | None = None
    """Folder of a run trained without transport on the same prompts, to compare with."""


# ---- page ----

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5a6470; --paper: #fdfdfc;
  --line: #d8dde3; --link: #0b62a8; --head: #f1f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8eb; --soft: #a3adb8; --paper: #15181b;
  --line: #3a424a; --link: #7db9ee; --head: #20252a; } }
body { margin: 0 auto; max-width: 68rem; padding: 1rem clamp(0.75rem, 3vw, 2rem) 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 3rem; }
a, summary { color: var(--link); }
header p, figcaption, nav { max-width: 46rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; list-style: none; }
figure { margin: 1rem 0 1.5rem; }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.5rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--link); }
img { display: block; height: auto; background: #fff; border-radius: 4px; }
table { border-collapse: collapse; width: max-content; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; max-width: 16rem; }
th { background: var(--head); }
.number { text-align: right; white-space: nowrap; }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

HEADS = {
    "macs_ratio": "MACs ratio",
    "frechet": "Fréchet ↓",
    "fid": "FID ↓",
    "mmd": "MMD ↓",
    "cmmd": "CMMD ↓",
    "clip_score": "CLIP score ↑",
    "pick_score": "PickScore ↑",
    "r1": "R@1 ↑",
    "r5": "R@5 ↑",
    "style": "style ↑",
    "nmi": "NMI",
    "params": "parameters",
    "seconds": "s/image",
}

CAPTIONS = {  # HTML, by table or figure
    "rows": """↓: lower is better, ↑: higher is better. MACs ratio: mean over the drawings. R@k: the
        picture that was asked for is among the k real ones of its style that look most like the
        drawing. Style: share of drawings that a classifier takes to be of the style asked for.""",
    "nmi": """Normalised mutual information between a prompt's expert and its group, beside the
        same after shuffling the experts among the prompts. 0 is independent, 1 the same partition.
        Training never sees the groups.""",
    "words": """<b>As Tables 2 and 4.</b> Frequent words: over twice as common in the expert's
        training prompts as in all of them.""",
    "samples": """<b>As Figs. 13 and 14.</b> Drawings of prompts that the router sent to each
        expert, a row an expert, beside the unpruned teacher's drawing from the same noise where
        there is one. <i>How to read it:</i> the more alike a pair, the less the pruning cost. An
        expert without drawings has no row.""",
    "through-every-expert": """<b>Not in the paper.</b> The same prompt and the same noise through
        every expert, whatever the router says. <i>How to read it:</i> where all pictures agree,
        the experts have hardly specialised.""",
    "difficulty": """<b>Not in the paper</b>, which argues it from Tables 2 and 4 (Sec. 4.2). How
        many MACs the router gives to the prompts of each group (in brackets: training prompts).
        <i>How to read it:</i> it treats the groups on top as hard. Bars are 95 % intervals of the
        mean that take prompts as independent of each other. They are not quite, so small
        differences mean little.""",
    "groups": "The training prompts in numbers.",
    "usage": """<b>As Fig. 10.</b> The share of prompts that the router sends to each expert at
        test time. <i>How to read it:</i> the dotted line is an even share.""",
    "assignment": """<b>As Fig. 9.</b> The last training batch: a square is a prompt, in the same
        place on each side, its number is its expert's, its colour that expert's MACs ratio.
        <i>How to read it:</i> transport spreads a batch over the experts; at test time each prompt
        takes the nearest code, whatever the others do.""",
    "retained": """<b>As Figs. 11 and 12.</b> The share of its prunable MACs that an expert keeps
        of each ResBlock and attention block, from the U-Net's input (top) to its output.
        <i>How to read it:</i> 1 is untouched, 0 removed whole; a row that changes from left to
        right is where experts differ. Blocks are numbered as in diffusers: down 0 ResBlock 1 is
        <code>down_blocks.0.resnets.1</code>.""",
    "blocks": "Share of its prunable MACs that each expert keeps of a block.",
    "losses": """<b>As Fig. 8</b>, whose two curves come first. The terms of the pruning objective
        at each step (thin) and their running mean (thick). <i>How to read it:</i> in the grey
        warm-up each prompt has an architecture of its own; then codes and transport come in. The
        resource loss should fall to zero, that is the MACs ratio to the budget, while the
        contrastive loss stays low.""",
    "alone": " No run without transport was given to compare with: this shows the one run alone.",
}


def escape(value: Any) -> str:
    """Anything as text in HTML; what cannot be printed becomes a space."""
    return html.escape("".join(c if c.isprintable() else " " for c in str(value)))


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


def figure(content: str, caption: str, name: str) -> str:
    """HTML of something that scrolls where the window is narrow, with its caption (HTML) below."""
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">\n'
        f"{content}</div>\n<figcaption>{caption}</figcaption></figure>\n"
    )


def table(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Flat dictionaries as a table, a row each; its columns are all of their keys."""
    columns = {key: "number" for row in rows for key in row}
    for row in rows:
        for key, value in row.items():
            if any(character.isalpha() for character in str(value)) and isinstance(value, str):
                columns[key] = "text"
    titles = {key: HEADS.get(key, key.replace("_", " ")) for key in columns}
    lines = [
        "".join(f'<th scope="col" class="{columns[k]}">{escape(titles[k])}</th>' for k in columns)
    ]
    for row in rows:
        cells = {key: escape(cell(row.get(key))) for key in columns}
        lines.append("".join(f'<td class="{columns[k]}">{cells[k]}</td>' for k in columns))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return figure(f"<table>\n{body}\n</table>", CAPTIONS.get(name, escape(name)), name)


def picture(folder: Path, name: str, drawn: Figure, alt: str, more: str = "") -> str:
    """Write a figure to `folder` as PNG; gives HTML with the same bytes inside.

    Args:
        name: of the file, and of the caption.
        alt: plain text; it is escaped here.
        more: HTML that follows the caption.
    """
    with replacing(folder / f"{name}.png") as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a prompt in a script without font
        drawn.savefig(temporary, format="png", dpi=DPI)
    data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    width, height = (round(96 * inches) for inches in drawn.get_size_inches())
    image = (
        f'<img src="data:image/png;base64,{data}" alt="{escape(clip(alt, 600))}" width="{width}" '
        f'height="{height}" style="max-width: max(100%, {0.6 * width:.0f}px)">'
    )
    return figure(image, f"{CAPTIONS[name]}{more} <small>({name}.png)</small>", name)


def sections(run: Path, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Title and HTML of each part of the page; writes the figures on the way."""
    folder, train, validation = run / "report", inputs.train, inputs.validation
    ratios = (inputs.macs(inputs.codes) / inputs.macs.dense).tolist()
    order, config = expert_order(ratios), read_json(run / "config.json")
    scores = {k: v for k, v in inputs.metrics.items() if isinstance(v, list) and v}
    if scores:
        yield "Scores", "".join(table(rows, name) for name, rows in scores.items())
    yield "Experts and their prompts", table(words_table(train, validation, ratios), "words")
    if inputs.samples:
        alt = "A row an expert: " + ", ".join(clip(s.prompt, 60) for s in inputs.samples)
        drawn = sample_grid(inputs.samples)
        yield "Samples of each expert", picture(folder, "samples", drawn, alt)
    if inputs.same_prompt:
        alt = "By every expert: " + ", ".join(dict.fromkeys(s.prompt for s in inputs.same_prompt))
        text = picture(
            folder, "through-every-expert", through_every_expert(inputs.same_prompt), alt
        )
        yield "One prompt through every expert", text

    costs = group_costs(train, ratios)
    mean = sum(row.mean * row.prompts for row in costs) / max(1, len(train.captions))
    alt = "; ".join(f"{row.group or 'no group'} {row.mean:.3f}" for row in costs[:30])
    drawn = difficulty({"training": train, "validation": validation}, ratios)
    numbers: list[dict[str, Any]] = [
        {
            "group": clip(row.group, 60) or "(no group)",
            "prompts": row.prompts,
            "mean MACs ratio": f"{row.mean:.4f}",
            "± 95 %": f"{1.96 * row.error:.4f}" if row.prompts > 1 else None,
            "against all prompts": f"{row.mean - mean:+.4f}",
        }
        for row in costs
    ]
    alt = f"Mean MACs ratio by group, {mean:.3f} over all: {alt}"
    text = picture(folder, "difficulty", drawn, alt) + table(numbers, "groups")
    yield "Which prompts get more", text

    usage = shares(train.experts, len(ratios))
    alt = ", ".join(f"expert {i} {usage[i]:.1%}" for i in order)
    more = f" The training prompts are as diverse as {perplexity(usage):.1f} experts used evenly."
    drawn = usage_bars(train.experts, validation.experts, ratios)
    yield "Prompts of each expert", picture(folder, "usage", drawn, alt, more)
    if len(ratios) > 1:
        yield "Assignment of a batch", assignment_part(run, inputs, ratios)

    blocks, kept = retained(inputs.codes, inputs.macs)
    names = [block_label(block) for block in blocks]
    alt = f"{len(blocks)} blocks by {len(ratios)} experts, {kept.min():.2f} to {kept.max():.2f} "
    alt += f"kept; on average least of {names[kept.mean(1).argmin()]}. Numbers in the table below."
    numbers = [
        {"block": name} | {f"expert {i}": f"{share[i]:.2f}" for i in order}
        for name, share in zip(names, kept, strict=True)
    ]
    yield (
        "What is left of the U-Net",
        picture(folder, "retained", retained_heatmap(blocks, kept, ratios), alt)
        + f"<details><summary>The same as a table</summary>{table(numbers, 'blocks')}</details>",
    )
    if (run / "metrics.csv").exists():
        yield "Training", training_part(run, inputs, config, len(ratios))


def assignment_part(run: Path, inputs: Inputs, ratios: Sequence[float]) -> str:
    """HTML with Fig. 9. Raises `UserError` where the run to compare with has other prompts."""
    rows, transported = last_batch(run, inputs.train.captions)
    nearest = [inputs.train.experts[row] for row in rows]
    panels = [("by transport, as in training", transported, ratios)]
    panels += [("by nearest code, as at test time", nearest, ratios)]
    if other := inputs.without_transport:
        experts = read_json(other / "assignments.json")["train"]
        if len(experts) != len(inputs.train.captions):
            raise UserError(
                f"{other} has {len(experts)} training prompts, {run} {len(inputs.train.captions)}; "
                "compare runs on the same target, seed and limit"
            )
        others = [expert["macs_ratio"] for expert in read_json(other / "summary.json")["experts"]]
        panels.append(("trained without transport", [experts[row] for row in rows], others))
    same = sum(a == b for a, b in zip(transported, nearest, strict=True))
    more = f" {same} of the {len(rows)} prompts get the same expert both ways."
    alt = "; ".join(f"{title}: {len(set(e))} of {len(r)} experts" for title, e, r in panels)
    more += "" if other else CAPTIONS["alone"]
    return picture(run / "report", "assignment", assignment_map(panels), alt, more)


def training_part(run: Path, inputs: Inputs, config: dict[str, Any], num_experts: int) -> str:
    """HTML with Fig. 8."""
    name = "without transport" if config.get("transport") is False else "with transport"
    logs, other = {name: read_log(run / "metrics.csv")}, inputs.without_transport
    if other:
        logs["without transport"] = read_log(other / "metrics.csv")
    last = slice(-max(1, len(logs[name]["step"]) // 10), None)
    shown = {key: logs[name][key] for key in CURVES if key in logs[name] and key != "usage"}
    ends = [f"{CURVES[key]} from {y[0]:.3g} to {y[last].mean():.3g}" for key, y in shown.items()]
    drawn = loss_curves(
        logs,
        warmup_steps=config.get("warmup_steps") or 0,
        budget=inputs.summary["budget"],
        num_experts=num_experts,
    )
    more = "" if other else CAPTIONS["alone"]
    return picture(run / "report", "losses", drawn, "; ".join(ends), more)


def write_report(run: Path, inputs: Inputs) -> Path:
    """Draw all figures of a finished run and put them on one page, with the tables.

    Writes `run/report/*.png` and `run/report/report.html`, which needs no other file: pictures are
    inside, there is no script, and nothing is loaded from elsewhere.

    Returns:
        The page's path.

    Raises:
        UserError: the run, or the one to compare with, is incomplete or of other prompts.
    """
    summary, N = inputs.summary, len(inputs.codes)
    parts = list(sections(run, inputs))
    used = len(set(inputs.validation.experts))
    what = f"{summary.get('method', 'aptp')} on {summary['target']}"
    title = escape(f"{what} at {summary['budget']:g} of the MACs")
    links, body = "", ""
    for k, (name, text) in enumerate(parts):
        links += f'<li><a href="#part-{k}">{escape(name)}</a></li>'
        body += f'<section id="part-{k}">\n<h2>{escape(name)}</h2>\n{text}</section>\n'
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1>
<p>{N} expert{"s" * (N > 1)}, cut out of the teacher <i>{escape(summary["teacher"])}</i>
({inputs.macs.dense / 1e9:.4g} G MACs a forward) for the target <i>{escape(summary["target"])}</i>.
Over the {len(inputs.train.captions):,} training prompts their mean MACs ratio is
{summary["macs_ratio_mean"]:.4f} (budget {summary["budget"]:g}); {used} of {N} experts get prompts
of the {len(inputs.validation.captions):,} for validation.</p>
<p>A MACs ratio is a share of the teacher's MACs. Experts keep the run's numbers and stand in the
order of their MACs ratio; in figures, darker is more. Captions name the figure or table of the
paper that a part corresponds to.</p></header>
<nav aria-label="Parts"><ul>{links}</ul></nav>
<main>
{body}</main>
</body>
</html>
"""
    path = run / "report" / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
