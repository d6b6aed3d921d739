"""What a finished pruning stage leaves in its run folder: Sec. 3.4, Eq. 22, Tables 2 and 4.

Every method ends here, so that fine-tuning, sampling and evaluation read one kind of folder: each
prompt's expert, binary codes that meet the budget, and a summary.

Departures from the paper: of an expert's words, those are listed that its prompts use over twice as
often as the target's do, because what is frequent everywhere ("emoji") says nothing. The paper does
not say how it chose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data import CaptionedImages, load_target
from macs import meet_budget, skeleton
from prune_unet import cut_in_place
from router import PromptRouter
from runfolder import save_tensors, write_json

if TYPE_CHECKING:
    from train import Config, Problem


def frequent_words(captions: Sequence[str], everything: Sequence[str], count: int = 6) -> list[str]:
    """The most frequent of the words that are over twice as common here as in the target.

    Words of three letters or more; words equally frequent stand in the alphabet's order.

    Args:
        captions: of the expert; they are among `everything`.
        everything: the target's captions.
        count: most words to give.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    def word_shares(lines: Sequence[str]) -> dict[str, float]:
        words = Counter(w for line in lines for w in set(re.findall(r"[a-z]{3,}", line.lower())))
        ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))
        return {word: n / len(lines) for word, n in ranked}

    overall = word_shares(everything)
    return [
        word
        for word, n in word_shares(captions).items()
        if n > 2 * overall[word] and word not in ENGLISH_STOP_WORDS
    ][:count]


def load_split(settings: dict[str, Any], split: str, resolution: int) -> CaptionedImages:
    """A split of the target that a run was trained on.

    Args:
        settings: the run's config.json.
        resolution: pixels a side.
    """
    return load_target(
        settings["target"],
        split,
        seed=settings["seed"],
        limit=settings["limit"] if split == "train" else None,
        data_dir=settings["data_dir"] and Path(settings["data_dir"]),
        resolution=resolution,
    )


def write_results(
    cfg: Config,
    problem: Problem,
    router: PromptRouter,
    seconds: dict[str, float],
    *,
    codes: Tensor | None = None,
    method: str = "aptp",
) -> None:
    """Route every prompt as at test time, make the codes binary, and write the run's results.

    `summary.json` comes last.

    Args:
        cfg: `train.Config`, with what depends on the target filled in.
        problem: `train.Problem`.
        router: trained, or, of a method with one expert, any.
        seconds: what the stages took.
        codes: binary codes of another method, (N, D); the router's, made binary, if absent.
        method: its name.
    """
    assert cfg.out
    run, macs, data = cfg.out, problem.macs, problem.data
    z_validation = problem.encoder(problem.validation.captions)
    routed = {
        split: torch.cat([router.route(part).cpu() for part in z.split(8192)])
        for split, z in (("train", problem.z), ("validation", z_validation))
    }
    usage = {
        split: torch.bincount(experts, minlength=cfg.num_experts) / len(experts)
        for split, experts in routed.items()
    }
    if codes is None:
        codes = meet_budget(router.codes, usage["train"], macs, cfg.budget)
    ratios = macs(codes) / macs.dense  # (N,)
    save_tensors(
        run / "router.safetensors",
        router.state_dict(),
        {**router.settings(), "prompt_encoder": problem.encoder.name},
    )
    save_tensors(run / "codes.safetensors", {"codes": codes.to(torch.uint8)}, {"depth": cfg.depth})
    write_json(
        run / "assignments.json", {split: experts.tolist() for split, experts in routed.items()}
    )
    experts = []
    for i in range(cfg.num_experts):
        captions = [
            data.captions[row] for row in (routed["train"] == i).nonzero().flatten().tolist()
        ]
        cut = skeleton(problem.teacher.unet)  # shapes are enough to count parameters
        cut_in_place(cut, macs.space, codes[i])
        experts.append(
            {
                "id": i,
                "macs_ratio": ratios[i].item(),
                "params": sum(p.numel() for p in cut.parameters()),
                "usage_train": usage["train"][i].item(),
                "words": frequent_words(captions, data.captions),
            }
        )
    summary = {
        "method": method,
        "target": cfg.target,
        "teacher": problem.teacher.name,
        "resolution": problem.teacher.resolution,
        "budget": cfg.budget,
        "num_experts": cfg.num_experts,
        "units": macs.space.size,
        "macs_dense": macs.dense,
        "macs_ratio_mean": (usage["train"].double() @ ratios).item(),
        "usage_train": usage["train"].tolist(),
        "usage_validation": usage["validation"].tolist(),
        "experts": experts,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }
    write_json(run / "summary.json", summary)


def print_table(summary: dict[str, Any]) -> None:
    """The experts of a run, one a line."""
    print(
        f"{'expert':>6}  {'MACs ratio':>10}  {'parameters':>10}  {'prompts':>7}  most frequent "
        f"words"
    )
    for expert in summary["experts"]:
        cost = f"{expert['macs_ratio']:>10.3f}  {expert['params'] / 1e6:>8.2f} M"
        words = ", ".join(expert["words"])
        print(f"{expert['id']:>6}  {cost}  {expert['usage_train']:>7.1%}  {words}")
    used = sum(share > 0 for share in summary["usage_validation"])
    print(
        f"mean MACs ratio over training prompts {summary['macs_ratio_mean']:.4f} (budget "
        f"{summary['budget']:g}); "
        f"{used} of {summary['num_experts']} experts get validation prompts"
    )
