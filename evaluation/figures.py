"""Figures of a finished run: Sec. 4.2, App. E.4.

| figure of the paper | name here |
|---|---|
| Fig. 8: losses with and without transport | `loss_curves` |
| Fig. 9: assignment of a batch | `assignment_map` |
| Fig. 10: prompts per expert | `share_bars` |
| Figs. 11-12: retained MACs per block | `retained_heatmap` |
| Figs. 13-14: samples per expert | `sample_grid` |
| - : one prompt through every expert | `through_every_expert` |
| - : MACs ratio by group of prompts | `difficulty` |

Experts keep the run's numbers and stand in the order of their MACs ratio; darker is more MACs. A
figure function takes data (`analysis.py`) and returns a matplotlib `Figure`; `report.py` puts them
on one page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from evaluation.analysis import Routed, expert_order, group_costs, shares
from evaluation.generated import Example
from evaluation.grids import image_grid, label

COLOURS = matplotlib.colormaps["cividis_r"]  # even steps, also to the colour-blind; dark is much

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # of Okabe and Ito


def sheet(width: float, height: float, **grid: Any) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches with a grid of axes, (rows, columns)."""
    fig = Figure((width, height), layout="constrained")
    axes = fig.subplots(squeeze=False, **grid)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def scale_of(ratios: Sequence[float]) -> Normalize:
    """Where a MACs ratio lies between the smallest expert's and the largest's, for its colour."""
    low, high = min(ratios), max(ratios)
    room = 0.01 if high - low < 1e-6 else 0.0
    return Normalize(low - room, high + room)


def ink_on(rgba: Any) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return "black" if np.dot(rgba[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"


def expert_ticks(ax: Axes, ratios: Sequence[float]) -> list[int]:
    """Put the experts on the x axis, from the fewest MACs to the most; returns that order."""
    order = expert_order(ratios)
    ax.set_xticks(range(len(order)), [f"{i}\n{ratios[i]:.3f}" for i in order])
    ax.set_xlabel("expert, and its MACs ratio")
    return order


CURVES = {
    "resource": "resource loss (Fig. 8a)",
    "contrastive": "contrastive loss (Fig. 8b)",
    "cost_ratio": "mean share of the dense cost in a batch",
    "denoising": "denoising loss",
    "distillation": "distillation loss",
    "perplexity": "assignment perplexity",
}


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one, over fewer at the ends."""
    ones = np.ones(max(1, min(window, len(values))))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def loss_curves(
    logs: Mapping[str, Mapping[str, np.ndarray]],
    *,
    warmup_steps: int,
    budget: float,
    num_experts: int,
) -> Figure:
    """Fig. 8: the terms of Eq. 15 over the steps of the pruning stage, a line a run.

    Args:
        logs: what a line is called -> columns of that run's metrics.csv; one run or two.
        warmup_steps: before the codes and the transport come in.
    """
    fig, axes = sheet(10, 5.4, nrows=2, ncols=3, sharex=True)
    steps = max(len(log["step"]) for log in logs.values())
    styles = ((BLUE, "-"), (ORANGE, "--"))
    for ax, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        ax.axvspan(0, warmup_steps, color="#eeeeee", lw=0, label="warm-up")
        for (run, log), (colour, style) in zip(logs.items(), styles, strict=False):
            for warmup in (True, False):
                phase = (log["step"] < warmup_steps) == warmup
                if name not in log or not phase.any() or (warmup and name == "perplexity"):
                    continue  # in the warm-up every prompt has an architecture of its own
                x, y = log["step"][phase], log[name][phase]
                ax.plot(x, y, color=colour, alpha=0.3, lw=0.8)
                smooth = running_mean(y, steps // 20)
                ax.plot(x, smooth, style, color=colour, lw=1.6, label=None if warmup else run)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(0, max(1, steps))
    axes[0, 2].axhline(budget, color=GREY, lw=1, ls=":", label=f"budget {budget:g}")
    axes[1, 2].axhline(num_experts, color=GREY, lw=1, ls=":", label=f"all {num_experts} evenly")
    axes[1, 2].set_ylim(0, None)
    for ax in (axes[0, 0], axes[0, 2], axes[1, 2]):
        ax.legend(fontsize=8, frameon=False)
    for ax in axes[1]:
        ax.set_xlabel("step")
    return fig


def assignment_map(panels: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> Figure:
    """Fig. 9: a square for each prompt of a batch, its colour the MACs ratio of its expert.

    Args:
        panels: title, expert of each prompt (B,), MACs ratio of each expert (N,).
    """
    fig, axes = sheet(3.6 * len(panels) + 1.2, 4.3, ncols=len(panels))
    norm = scale_of([ratio for _, _, ratios in panels for ratio in ratios])
    for ax, (title, experts, ratios) in zip(axes.flat, panels, strict=True):
        side = max(1, math.ceil(math.sqrt(len(experts))))
        squares = np.full((max(1, math.ceil(len(experts) / side)), side), np.nan)
        for place, i in enumerate(experts):
            y, x = divmod(place, side)
            squares[y, x] = ratios[i]
            if side <= 12:
                style = {"color": ink_on(COLOURS(norm(ratios[i]))), "fontsize": 8}
                ax.text(x + 0.5, y + 0.5, str(i), ha="center", va="center", **style)
        ax.pcolormesh(squares, norm=norm, cmap=COLOURS, edgecolors="white", lw=1.5)
        used = len(set(experts))
        ax.set_title(f"{title}\n{used} of {len(ratios)} experts in use", fontsize=10)
        ax.set_aspect("equal")
        ax.invert_yaxis()
        ax.axis("off")
    key = ScalarMappable(norm, COLOURS)
    fig.colorbar(key, ax=axes, label="MACs ratio of the prompt's expert", shrink=0.8)
    return fig


def share_bars(train: Sequence[int], validation: Sequence[int], ratios: Sequence[float]) -> Figure:
    """Fig. 10: the share of prompts that each expert gets.

    Args:
        train, validation: expert of each prompt.
        ratios: MACs ratio of each expert, (N,).
    """
    fig, axes = sheet(max(6.5, 1.6 + 0.75 * len(ratios)), 3.8)
    ax, norm = axes[0, 0], scale_of(ratios)
    order = expert_ticks(ax, ratios)
    share, held_out = (shares(experts, len(ratios))[order] for experts in (train, validation))
    colours = [COLOURS(norm(ratios[i])) for i in order]
    name = f"bars: {len(train):,} training prompts"
    ax.bar(range(len(order)), share, color=colours, edgecolor=GREY, lw=0.6, label=name)
    if len(validation):
        style = {"ms": 5, "color": ORANGE, "mec": "white", "mew": 0.6}
        ax.plot(held_out, "D", **style, label=f"{len(validation):,} validation prompts")
    for x, (bar, mark) in enumerate(zip(share, held_out, strict=True)):
        place = ((x, max(bar, mark)), (0, 5), "data", "offset points")
        paper = {"fc": "white", "ec": "none", "pad": 0.6}  # hides the dotted line
        ax.annotate(f"{bar:.1%}", *place, ha="center", fontsize=8, bbox=paper)
    ax.axhline(1 / len(ratios), color=GREY, lw=1, ls=":", label="an even share")
    ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.set_ylabel("share of prompts")
    ax.set_ylim(0, 1.35 * max(share.max(), held_out.max(), 1 / len(ratios)))  # room for the legend
    handles, names = ax.get_legend_handles_labels()
    style = {"fontsize": 8, "frameon": False, "ncols": 3, "loc": "upper left"}
    ax.legend(handles[::-1], names[::-1], **style)
    return fig


def block_label(name: str) -> str:
    """`down_blocks.0.resnets.1` -> `down 0 ResBlock 1`."""
    words = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}
    words |= {"resnets": "ResBlock", "attentions": "Attention"}
    return " ".join(words.get(part, part) for part in name.split("."))


def retained_heatmap(blocks: Sequence[str], kept: np.ndarray, ratios: Sequence[float]) -> Figure:
    """Figs. 11-12: the U-Net from input (top) to output, and what each expert keeps of a block.

    Args:
        blocks: their names, in the order of computation.
        kept: the share of each block's prunable MACs that each expert keeps, (blocks, N).
        ratios: MACs ratio of each expert, (N,).
    """
    fig, axes = sheet(3.4 + 0.62 * len(ratios), 1.2 + 0.25 * len(blocks))
    ax = axes[0, 0]
    order = expert_ticks(ax, ratios)
    mesh = ax.imshow(kept[:, order], aspect="auto", cmap=COLOURS, vmin=0, vmax=1)
    for (y, x), value in np.ndenumerate(kept[:, order]):
        text = f"{value:.0f}" if value in (0, 1) else f"{value:.2f}"
        style = {"color": ink_on(COLOURS(value)), "fontsize": 7.5}
        ax.text(x, y, text, ha="center", va="center", **style)
    levels = [re.split(r"\.(?:resnets|attentions)", name)[0] for name in blocks]
    for y in range(1, len(blocks)):
        if levels[y] != levels[y - 1]:
            ax.axhline(y - 0.5, color="white", lw=3)
    ax.set_yticks(range(len(blocks)), [block_label(name) for name in blocks], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.colorbar(mesh, ax=ax, label="share of the block's prunable MACs kept", aspect=40)
    return fig


def difficulty(splits: Mapping[str, Routed], ratios: Sequence[float], most: int = 30) -> Figure:
    """MACs ratio by group of prompts: the mean and its 95 % interval, against the overall mean.

    Args:
        splits: name -> prompts, one or two; the groups are those of the first, in its order.
        ratios: MACs ratio of each expert, (N,).
        most: groups to show, the largest.
    """
    costs = {name: group_costs(routed, ratios) for name, routed in splits.items()}
    first = next(iter(costs.values()))
    largest = sorted(first, key=lambda row: -row.prompts)[:most]
    places = {row.group: y for y, row in enumerate(row for row in first if row in largest)}
    fig, axes = sheet(7.5, 1.3 + 0.42 * max(1, len(places)))
    ax = axes[0, 0]
    styles = ((BLUE, "o", -0.13), (ORANGE, "D", 0.13))
    for (name, rows), (colour, marker, shift) in zip(costs.items(), styles, strict=False):
        shown = [row for row in rows if row.group in places]
        x, y = [row.mean for row in shown], [places[row.group] + shift for row in shown]
        half = [1.96 * float(np.nan_to_num(row.error)) for row in shown]
        total = sum(row.prompts for row in rows)
        style = {"color": colour, "ms": 5, "capsize": 3, "label": f"{total:,} {name} prompts"}
        ax.errorbar(x, y, xerr=half, fmt=marker, **style)
        if total:
            overall = sum(row.mean * row.prompts for row in rows) / total
            ax.axvline(overall, color=colour, lw=1, ls=":")
    counts = {row.group: row.prompts for row in first}
    names = [f"{label(group or '(no group)', 30, 1)}  ({counts[group]:,})" for group in places]
    ax.set_yticks(range(len(places)), names)
    ax.set_ylim(max(1, len(places)) - 0.4, -1.0)
    ax.set_xlabel("mean MACs ratio of the experts that the prompts get; dotted: over all prompts")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    return fig


def sample_grid(samples: Sequence[Example], images: int = 8) -> Figure:
    """Figs. 13-14: a row an expert, each image with the teacher's beside it where there is one.

    Args:
        images: the largest number of images in a row, the teacher's counted.
    """
    wide = 2 if any(sample.teacher for sample in samples) else 1
    by_expert: dict[tuple[float, int], list[Example]] = {}
    for sample in samples:
        by_expert.setdefault((sample.macs_ratio, sample.expert), []).append(sample)
    rows = []
    for (ratio, i), own in sorted(by_expert.items()):
        cells = [([p for p in (s.image, s.teacher) if p], s.prompt) for s in own[: images // wide]]
        rows.append((f"expert {i}\n{ratio:.3f} of the MACs", cells))
    columns = max((len(cells) for _, cells in rows), default=0)
    return image_grid(rows, ("expert", "teacher") * columns if wide == 2 else ())


def through_every_expert(samples: Sequence[Example]) -> Figure:
    """One prompt and one noise through all experts: a row a prompt, a column an expert."""
    experts = sorted({(sample.macs_ratio, sample.expert) for sample in samples})
    blank = Image.new("RGB", (8, 8), "white")
    rows = []
    teacher = any(sample.teacher for sample in samples)
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        own = {sample.expert: sample for sample in samples if sample.prompt == prompt}
        images = [own[i].image if i in own else blank for _, i in experts]
        if teacher:
            images.append(next((s.teacher for s in own.values() if s.teacher), blank))
        rows.append((label(prompt, 17, 5), [([image], "") for image in images]))
    heads = [f"expert {i}\n{ratio:.3f}" for ratio, i in experts] + ["teacher\n1"] * teacher
    return image_grid(rows, heads)
