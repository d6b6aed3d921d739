"""The same budget for every method, side by side: Tables 1, 3, 5 and 6.

Behind `python evaluate.py --methods ...`. A cell is a method, a seed and a number of fine-tuning
steps; it is an ordinary run folder, `<method>-<seed>` for the pruning and `<method>-<seed>@<steps>`
with the fine-tuned experts and scores, so any script works on it. Methods differ in their codes
alone: cutting, fine-tuning, drawing and scoring are the same functions, and a method with one
expert fine-tunes it for as many steps as all of APTP's experts together.

| method | codes |
|---|---|
| `aptp` | the whole method |
| `contrastive` | Table 3's second row: without transport, without distillation while pruning |
| `transport` | Table 3's third row: with transport, without distillation while pruning |
| `norm`, `sp`, `bksdm`, `random`, `uni-arch`, `dense` | `baselines.py` |
"""

from __future__ import annotations

import csv
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import finetune
import train
from results import write_results
from router import PromptRouter
from runfolder import UserError, as_json, claim, read_json, replacing, write_json

APTP: dict[str, dict[str, Any]] = {
    "aptp": {},
    "contrastive": {"transport": False, "distill": False},
    "transport": {"distill": False},
}
METHODS = (*APTP, *baselines.METHODS)
TABLE_3 = ("uni-arch", "contrastive", "transport", "aptp")
RUN_FILES = (  # of the pruning stage
    "config.json",
    "router.safetensors",
    "codes.safetensors",
    "assignments.json",
    "metrics.csv",
    "summary.json",
)
MEASURES = (  # of a score, where it has them: key, heading, digits
    ("macs_ratio", "MACs ratio", 3),
    ("seconds", "s/picture", 3),
    ("frechet", "Fréchet ↓", 1),
    ("mmd", "MMD ↓", 2),
    ("r1", "R@1 ↑", 3),
    ("r5", "R@5 ↑", 3),
    ("style", "style ↑", 3),
    ("fid", "FID ↓", 2),
    ("clip_score", "CLIP ↑", 2),
    ("cmmd", "CMMD ↓", 3),
    ("pick_score", "PickScore ↑", 3),
)


def parse_methods(text: str) -> list[str]:
    """Methods named with commas between. Raises `UserError` for one that does not exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name} is unknown; choose among: {', '.join(METHODS)}")
    if not names:
        raise UserError(f"--methods names none; choose among: {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def prune(method: str, cfg: train.Config) -> None:
    """Make the run folder `cfg.out` of a method, unless it is there. Raises `UserError`."""
    if method in APTP:
        train.train(replace(cfg, **APTP[method]))
        return
    depth = baselines.DEPTHS.get(method, cfg.depth)
    cfg = train.resolve(replace(cfg, num_experts=1, depth=depth))
    assert cfg.out
    settings = as_json(cfg) | {"method": method}
    claim(cfg.out, settings, free=train.FREE)
    if (cfg.out / "summary.json").exists():
        return
    problem = train.prepare(cfg)
    write_json(cfg.out / "config.json", settings)
    code = baselines.METHODS[method](problem)  # (1, D)
    router = PromptRouter(problem.z.shape[1], problem.space.size, 1)
    write_results(cfg, problem, router, {}, codes=code, method=method)


def finetuned(run: Path, method: str, steps: int, cfg: finetune.Config) -> Path:
    """A copy of a pruned run whose experts are fine-tuned for `steps` steps each."""
    folder = run.with_name(f"{run.name}@{steps}")
    if not (folder / "summary.json").exists():
        for name in RUN_FILES:  # the summary last: a folder without it is copied again
            if (run / name).exists():
                with replacing(folder / name) as temporary:
                    shutil.copyfile(run / name, temporary)
    if method != "dense":
        finetune.finetune(replace(cfg, run=folder, steps=steps))
    return folder


def compare(
    folder: Path,
    methods: Sequence[str],
    seeds: int,
    steps: int,
    pruning: train.Config,
    tuning: finetune.Config,
    score: Callable[[Path], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Make and score every cell that is missing; write the tables after each.

    Args:
        folder: of the comparison.
        methods: of `METHODS`.
        seeds: how many of each.
        steps: fine-tuning steps of one of APTP's experts.
        pruning, tuning: settings that all cells share.
        score: scores a run folder: its metrics.json.

    Returns:
        The scores of all cells, flat dictionaries.
    """
    cells = [(method, seed) for seed in range(seeds) for method in methods]
    for number, (method, seed) in enumerate(cells, start=1):
        print(f"--- cell {number} of {len(cells)}: {method}, seed {seed}", flush=True)
        run = folder / f"{method}-{seed}"
        prune(method, replace(pruning, seed=seed, out=run))
        experts = read_json(run / "summary.json")["num_experts"]
        own = steps * pruning.num_experts // experts
        done = finetuned(run, method, own, replace(tuning, seed=seed))
        if not (done / "report" / "metrics.json").exists():
            score(done)
        write_tables(folder)
    return collect(folder)


def collect(folder: Path) -> list[dict[str, Any]]:
    """The scores of all cells that are there, each with its method, seed and steps."""
    rows = []
    for path in sorted(folder.glob("*@*/report/metrics.json")):
        name, steps = path.parent.parent.name.rsplit("@", 1)
        method, seed = name.rsplit("-", 1)
        experts = read_json(path.parent.parent / "summary.json")["num_experts"]
        for row in read_json(path)["rows"]:
            if row["method"] == method:
                cell = {
                    "seed": int(seed),
                    "steps": int(steps),
                    "steps_in_all": int(steps) * experts,
                }
                rows.append(row | cell)
    order = {method: place for place, method in enumerate(METHODS)}
    return sorted(
        rows, key=lambda r: (r["split"], r["steps_in_all"], order[r["method"]], r["seed"])
    )


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
        for key, _, _ in MEASURES:
            values = [member[key] for member in members if key in member]
            if values:
                line[key] = statistics.fmean(values)
                line[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        found.append(line)
    return found


def markdown(title: str, lines: Sequence[dict[str, Any]]) -> str:
    """Aggregated lines as a Markdown table with its title."""
    present = [m for m in MEASURES if any(m[0] in line for line in lines)]
    cells = any(line["steps_in_all"] for line in lines)  # of a comparison, not of one run
    head = ["method", "split", *(["seeds", "fine-tuning steps"] if cells else [])]
    head += [name for _, name, _ in present]
    text = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        row = [line["method"], line["split"]]
        row += [str(line["seeds"]), str(line["steps_in_all"])] if cells else []
        for key, _, digits in present:
            value, spread = line.get(key), line.get(f"{key}_std", math.nan)
            cell = "" if value is None else f"{value:.{digits}f}"
            row.append(cell if math.isnan(spread) else f"{cell} ± {spread:.{digits}f}")
        text.append("| " + " | ".join(row) + " |")
    return "\n".join(text) + "\n"


def write_tables(folder: Path) -> None:
    """Write metrics.json, tables.md and tables.csv of a comparison from its cells so far."""
    rows = collect(folder)
    lines = aggregate(rows)
    write_json(folder / "metrics.json", {"cells": rows, "means": as_numbers(lines)})
    pictures = [line for line in lines if line["split"] != "prompts"]
    parts = {"Table 1: methods at one budget": pictures}
    ablation = [line for line in pictures if line["method"] in TABLE_3]
    if {"contrastive", "transport"} & {line["method"] for line in ablation}:
        place = {method: k for k, method in enumerate(TABLE_3)}
        ablation.sort(key=lambda line: (line["split"], place[line["method"]]))
        parts["Table 3: ablation"] = ablation
    if len({line["steps_in_all"] for line in pictures if line["method"] != "dense"}) > 1:
        by_steps = sorted(
            pictures, key=lambda line: (line["split"], line["method"], line["steps_in_all"])
        )
        parts["Table 5: by fine-tuning steps"] = by_steps
    prompts = [line for line in lines if line["split"] == "prompts"]
    if prompts:
        parts["Table 6: free prompts"] = prompts
    with replacing(folder / "tables.md") as temporary:
        text = "\n".join(markdown(title, part) for title, part in parts.items() if part)
        temporary.write_text(text, encoding="utf-8")
    columns = sorted(
        {key for line in lines for key in line}, key=lambda key: (key != "method", key)
    )
    with (
        replacing(folder / "tables.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, ["table", *columns])
        writer.writeheader()
        for title, part in parts.items():
            writer.writerows({"table": title.split(":")[0]} | line for line in part)


def as_numbers(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what JSON cannot say: no deviation of a single seed."""
    return [
        {k: v for k, v in line.items() if not (isinstance(v, float) and math.isnan(v))}
        for line in lines
    ]
