"""Which prompts get more MACs, and are these the harder ones? Tables 2 and 4.

    python -m docs.needs runs/compare-emoji-0.5/aptp-?     # writes docs/results/needs.md

Each of some thousand training prompts, at a random timestep, has two measures of how hard it is:

- its **need**: the MACs of the code that an oracle would give to it alone. The oracle closes units
  whose Taylor importance for this sample is below one threshold, the same for all samples, chosen
  so that the mean over samples costs the budget.
- the teacher's denoising **loss** for it.

Both depend on the timestep above all. So importance and loss are relative to their means in the
same interval of the noise schedule. They are correlated with the MACs of the prompt's expert.

Training captions say a style; whoever asks for "a giraffe" does not. So for `emoji` it is counted
how many bare names find an expert of the thing: that of its flat or of its outlined drawing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor

from common.errors import command_line
from common.files import replacing
from common.runs import read_run
from docs.results import RESULTS
from evaluation.analysis import perplexity
from finetune import load_codes
from macs import MacsModel
from problem import INTERVALS, Problem, gate_gradients, prepare
from sample import APTPPipeline
from settings import Pruning
from targets.emoji import STYLES, TARGET_PHRASINGS, Emoji, split_drawings, with_article

BATCHES = 128


def interval_means(values: Tensor, interval: Tensor) -> Tensor:
    """Each sample's mean over all samples in its interval, (n,)."""
    sums = torch.zeros(INTERVALS).index_add_(0, interval, values)
    return (sums / torch.bincount(interval, minlength=INTERVALS).clamp(min=1))[interval]


def needs(importance: Tensor, macs: MacsModel, budget: float) -> Tensor:
    """MACs ratio of each sample's oracle code, (n, D) -> (n,), on average `budget`."""
    scores = importance.log()  # (n, D)
    low, high = scores.min().item(), scores.max().item()
    for _ in range(40):
        threshold = (low + high) / 2
        ratios = macs((scores > threshold).float()) / macs.dense  # (n,)
        low, high = (threshold, high) if ratios.mean() > budget else (low, threshold)
    return ratios


def measure(problem: Problem, batches: int = BATCHES) -> tuple[Tensor, Tensor, Tensor]:
    """Of samples of training prompts: their rows, their needs and their losses, (n,) each."""
    found = gate_gradients(problem, batches)
    rows, interval, loss, gradient = (torch.cat(part) for part in zip(*found, strict=True))
    mean = interval_means(gradient.mean(1), interval)  # (n,)
    importance = (gradient / mean[:, None]).clamp(min=1e-12)  # (n, D)
    need = needs(importance, problem.macs, problem.cfg.budget)
    return rows, need, loss / interval_means(loss, interval)


def table(what: str, keys: list[str], spent: Tensor, need: Tensor, loss: Tensor) -> str:
    """Means of the samples that have the same key, the cheapest first."""
    lines = []
    for key in sorted(set(keys)):
        own = torch.tensor([other == key for other in keys])
        lines.append([key, int(own.sum()), *(v[own].mean().item() for v in (spent, need, loss))])
    lines.sort(key=lambda line: line[2])
    heads = [what, "samples", "MACs of their experts", "need", "relative loss"]
    return tabulate(lines, heads, tablefmt="github", floatfmt=".3f")


def bare_names(route: Callable[[list[str]], list[int]], drawings: Sequence[Emoji]) -> str:
    """How often a bare name's expert is that of its flat or of its outlined form.

    Beside it what chance would give: an expert drawn as often as bare names get it.

    Args:
        route: the expert of each prompt.
        drawings: whose names are asked for.
    """
    things = [with_article(drawing.name, drawing.group) for drawing in drawings]
    with_style, _, without = TARGET_PHRASINGS
    bare = route([without.format(thing=thing) for thing in things])
    styled = [route([with_style.format(thing=t, style=style) for t in things]) for style in STYLES]
    forms = [set(pair) for pair in zip(*styled, strict=True)]
    hits = sum(i in own for i, own in zip(bare, forms, strict=True)) / len(bare)
    often = Counter(bare)
    chance = sum(often[i] for own in forms for i in own) / len(bare) ** 2
    spread = perplexity(np.array(list(often.values())) / len(bare))
    return (
        f"{hits:.1%} of {len(bare)} bare validation names go to the expert of their flat or "
        f"outlined form (by chance {chance:.1%}); the perplexity of their experts is {spread:.2f}."
    )


def report(run: Path) -> str:
    """The tables of a run. Raises `UserError` where it is not one."""
    settings, assigned, summary = read_run(run, "config.json", "assignments.json", "summary.json")
    known: dict[str, Any] = {field.name: settings[field.name] for field in fields(Pruning)}
    known |= {name: known[name] and Path(known[name]) for name in ("data_dir", "out")}
    problem = prepare(Pruning(**known))
    codes = load_codes(run, problem.space)
    rows, need, loss = measure(problem)
    experts = torch.tensor(assigned["train"])[rows]  # (n,)
    spent = (problem.macs(codes) / problem.macs.dense)[experts]  # (n,)
    lines = []
    for name, one, other in (
        ("MACs of the expert, need", spent, need),
        ("MACs of the expert, loss", spent, loss),
        ("need, loss", need, loss),
    ):
        correlation = spearmanr(one.numpy(), other.numpy()).statistic
        order = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
        shuffled = spearmanr(one[order].numpy(), other.numpy()).statistic
        lines.append([name, correlation, shuffled])
    heads = ["rank correlation of", f"{len(rows):,} samples", "shuffled"]
    words = [
        [e["id"], e["macs_ratio"], f"{e['usage_train']:.1%}", ", ".join(e["words"])]
        for e in sorted(summary["experts"], key=lambda e: e["macs_ratio"])
    ]
    word_heads = ["expert", "MACs ratio", "prompts", "most frequent words"]
    groups = [problem.data.groups[row] for row in rows.tolist()]
    parts = [
        f"### {run.name}: what experts are for, at {summary['budget']:g} of the MACs",
        tabulate(words, word_heads, tablefmt="github", floatfmt=".3f"),
        tabulate(lines, heads, tablefmt="github", floatfmt=".3f"),
        table("expert", [str(i) for i in experts.tolist()], spent, need, loss),
        table("group", groups, spent, need, loss),
    ]
    if settings["target"] == "emoji":
        pipeline = APTPPipeline.from_pretrained(run)
        parts.append(bare_names(pipeline.route, split_drawings("validation")))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of train.py")
    text = "\n".join(report(run) for run in parser.parse_args().runs)
    with replacing(RESULTS / "needs.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    command_line(main)
