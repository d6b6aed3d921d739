"""What a pruning method is given, and what it leaves in its run folder. Sec. 3.4, Eq. 22, App. E.

`prepare` loads a `Problem`: teacher, architecture space, costs, target, prompt embeddings. Every
method ends in `write_results`, so that fine-tuning, sampling and evaluation read one kind of
folder: each prompt's expert, binary codes that meet the budget, and a summary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import save_tensors, write_json
from common.processes import pick_device, start_processes
from evaluation.analysis import frequent_words
from gates import ArchSpace
from macs import MacsModel, check_budget, measure_macs, meet_budget, skeleton
from prune_unet import cut_in_place
from router import PromptEncoder, PromptRouter
from settings import PAPER_PIXELS, Pruning
from targets.emoji import EMOJI_SIZE
from targets.images import CaptionedImages, load_target
from teacher.encoded import Encoded, encode_target
from teacher.model import Teacher, load_teacher


@dataclass(frozen=True)
class Problem:
    """What a pruning method is given."""

    cfg: Pruning
    teacher: Teacher
    space: ArchSpace
    macs: MacsModel
    data: CaptionedImages
    validation: CaptionedImages
    encoder: PromptEncoder
    z: Tensor  # embeddings of the training prompts, (rows, dz)
    encoded: Encoded  # the training rows as the U-Net reads them
    seconds: float  # that encoding took


def prepare(cfg: Pruning) -> Problem:
    """Load the teacher and the target, and encode the target's training rows.

    Raises `UserError`.
    """
    assert cfg.teacher and cfg.prompt_encoder
    device = start_processes(pick_device(cfg.device))

    def load_split(split: str, pixels: int) -> CaptionedImages:
        limit = cfg.limit if split == "train" else None
        where: dict[str, Any] = {"data_dir": cfg.data_dir, "resolution": pixels}
        return load_target(cfg.target, split, seed=cfg.seed, limit=limit, **where)

    pixels = cfg.resolution or (EMOJI_SIZE if cfg.target == "emoji" else PAPER_PIXELS)
    splits = [load_split(split, pixels) for split in ("train", "validation")]
    teacher = load_teacher(cfg.teacher, device, precision=cfg.precision, resolution=cfg.resolution)
    if cfg.resolution is None:
        teacher = replace(teacher, pixels=min(PAPER_PIXELS, teacher.resolution))
    if teacher.resolution != pixels:  # data first, since what is missing there is found at once
        splits = [load_split(split, teacher.resolution) for split in ("train", "validation")]
    data, validation = splits
    if cfg.checkpointing:
        teacher.unet.enable_gradient_checkpointing()
    space = ArchSpace.from_unet(teacher.unet, cfg.depth)
    macs = measure_macs(
        teacher.unet, space, latent_size=teacher.latent_size, text_tokens=teacher.text_tokens
    )
    check_budget(cfg.budget, macs)
    clock = time.time()
    encoder = PromptEncoder(cfg.prompt_encoder, teacher.device)
    z = encoder.embeddings(data.captions)  # (rows, dz)
    encoded = encode_target(teacher, data, cache_latents=cfg.cache_latents)
    seconds = time.time() - clock
    return Problem(cfg, teacher, space, macs, data, validation, encoder, z, encoded, seconds)


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
    cfg: Pruning,
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
        cfg: `Pruning`, with what depends on the target filled in.
        problem: `problem.Problem`.
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
