"""What each part of the method is worth: one thing is changed at a time. Sec. 4.3, Fig. 5.

    python -m docs.ladder                            # every row, at 0.5 of the MACs: hours on a CPU
    python -m docs.ladder --rows aptp,experts-16,by-group --seed 1

A row is pruned, and not fine-tuned: distances to the teacher's output are measured right after it.
A killed row goes on, and a finished one is skipped. `docs/results/ladder-0.5/no-center-0.json` says
what was found with `--no-center`, seed 0; `python -m docs.results` makes a table of all such files.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import baselines
import train
from common.errors import UserError, command_line
from common.files import write_json
from common.randomness import step_generator
from common.runs import RUNS, as_json, claim
from docs.results import RESULTS
from evaluate import APTP
from evaluation.analysis import perplexity, read_log, shares
from macs import meet_budget
from problem import Problem, prepare
from settings import AS_PRINTED, FREE, PRINTED, Pruning, resolve

OFF = (  # switches of the first table in docs/departures.md
    *("hold_budget", "importance_start", "shared", "by_content", "own_keys", "center"),
    *("sample_noise", "common_noise"),
)
ROWS: dict[str, dict[str, Any]] = {  # name -> settings of `train.py`
    "aptp": {},
    "uni-arch": {"num_experts": 1},
    "contrastive": APTP["contrastive"],
    "transport": APTP["transport"],
    **{f"experts-{N}": {"num_experts": N} for N in (2, 4, 16, 32)},
    "random-clusters": {},
    "by-group": {},
    **{f"no-{name.replace('_', '-')}": {name: False} for name in OFF},
    "lambda-distill-1": {"lambda_distill": 1.0},
    "transport-rows-0": {"transport_rows": 0},
    "predictor-rate-1": {"predictor_rate": 1.0},
    "blocks-0.2": {"block_weight": 0.2},
    "blocks-1": {"block_weight": 1.0},
    "plain-blocks-0.2": {"block_weight": 0.2, "normalise_blocks": False},
    "distill-as-printed": {"block_weight": 1.0, "normalise_blocks": False},
    "lr-decay-0": {"lr_decay": 0.0},
    "weight-decay-0.01": {"weight_decay": 0.01},
    "caption-dropout-0": {"caption_dropout": 0.0},
    "paper-target-steps": {"warmup_steps": 100, "joint_steps": 400, "lr": 0.01, "lr_warmup": 20},
    "depth-all": {"depth": "all"},
    "depth-none": {"depth": "none"},
    "as-printed": {"as_printed": True},
    "as-printed-without-blocks": AS_PRINTED | PRINTED["emoji"] | {"block_weight": 0.0},
}
SAME = ("seed", "depth", "by_content", "prompt_encoder")  # settings that `prepare` depends on


def clusters(row: str, problem: Problem) -> Tensor | None:
    """The expert of each training row, (rows,), where a control sets it; None where it is learned.

    `random-clusters` gives every prompt a random one, `by-group` one for each Unicode group.
    """
    if row == "random-clusters":
        generator = step_generator(problem.cfg.seed, "random clusters")
        return torch.randint(problem.cfg.num_experts, (len(problem.z),), generator=generator)
    if row == "by-group":
        names = sorted(set(problem.data.groups))
        return torch.tensor([names.index(group) for group in problem.data.groups])
    return None


def measure(row: str, problem: Problem) -> dict[str, Any]:
    """Prune as the row asks, and measure: distances, routing, and the budget while training."""
    cfg, data, macs, run = problem.cfg, problem.data, problem.macs, problem.cfg.out
    assert run
    given = clusters(row, problem)
    if given is not None:
        cfg = replace(cfg, num_experts=int(given.max()) + 1)
    if row == "uni-arch":
        codes = baselines.uni_arch(problem, problem.start_router())
        experts = torch.zeros(len(data), dtype=torch.long)  # (rows,)
    else:
        router, _ = train.optimise(replace(problem, cfg=cfg), given)
        experts = router.route(problem.z).cpu() if given is None else given
        share = torch.bincount(experts, minlength=cfg.num_experts) / len(experts)  # (N,)
        codes = meet_budget(router.codes, share, macs, cfg.budget)
    log = read_log(run / "metrics.csv")["macs_ratio"]
    used = shares(experts.tolist(), len(codes))  # (N,)
    found: dict[str, Any] = {
        "row": row,
        "seed": cfg.seed,
        "budget": cfg.budget,
        **baselines.output_distances(problem.teacher, data, codes.cpu(), experts, macs),
        "soft_ratio": float(log[-max(1, len(log) // 4) :].mean()),  # over the last quarter
        "ratios": (macs(codes.cpu()) / macs.dense).tolist(),
        "shares": used.tolist(),
        "perplexity": perplexity(used),
    }
    if given is None and row != "uni-arch":
        found["agreement"] = agreement(router, problem)
    return found


@torch.no_grad()
def agreement(router: train.PromptRouter, problem: Problem) -> float:
    """Share of 2,048 training prompts whose expert is the one that the transport gives them."""
    order = torch.randperm(len(problem.z), generator=step_generator(0, "agreement"))[:2048]
    e = router(problem.z[order].to(problem.teacher.device))  # (2048, D)
    eps, iterations = problem.cfg.eps, problem.cfg.sinkhorn_iterations
    assigned = [router.transport_assignment(part, eps, iterations) for part in e.split(1024)]
    return (torch.cat(assigned) == router.nearest(e)).float().mean().item()


def climb(rows: list[str], budget: float, seed: int, out: Path = RESULTS) -> None:
    """Measure rows that have no file yet. Raises `UserError` for a row that does not exist."""
    if unknown := next((row for row in rows if row not in ROWS), None):
        raise UserError(f"--rows {unknown} is unknown; choose among: {', '.join(ROWS)}")
    loaded: dict[tuple[Any, ...], Problem] = {}  # the last problem, as loading takes a minute
    for number, row in enumerate(rows, start=1):
        path = out / f"ladder-{budget:g}" / f"{row}-{seed}.json"
        print(f"--- row {number} of {len(rows)}: {row}, seed {seed}", flush=True)
        if path.exists():
            continue
        run = RUNS / f"ladder-{budget:g}" / f"{row}-{seed}"
        cfg = resolve(replace(Pruning(budget=budget, seed=seed, out=run), **ROWS[row]))
        settings = as_json(cfg) | {"row": row}
        claim(run, settings, FREE)
        key = tuple(getattr(cfg, name) for name in SAME)
        if key not in loaded:
            loaded = {key: prepare(cfg)}
        write_json(run / "config.json", settings)
        write_json(path, measure(row, replace(loaded[key], cfg=cfg)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="names with commas between")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    climb(args.rows.split(","), args.budget, args.seed)


if __name__ == "__main__":
    command_line(main)
