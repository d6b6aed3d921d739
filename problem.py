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
from tqdm import tqdm

import losses
from common.files import save_tensors, write_json
from common.processes import add_up, own_rows, pick_device, rank, start_processes
from common.randomness import batch_rows, step_generator
from evaluation.analysis import frequent_words
from gates import ArchSpace
from macs import MacsModel, check_budget, measure_macs, meet_budget, skeleton
from prune_unet import attach_gates, cut_in_place
from router import PromptEncoder, PromptRouter, content_map
from settings import PAPER_PIXELS, Pruning
from targets.emoji import EMOJI_SIZE
from targets.images import CaptionedImages, load_target, spread
from teacher.encoded import Encoded, encode_target
from teacher.model import Noised, Teacher, add_noise, load_teacher

TAYLOR_BATCHES = 16  # that importance is taken over
INTERVALS = 20  # of the noise schedule, by which importance weighs timesteps
LEAST_LOSS = 0.05  # of the highest interval's; gradients of intervals below it do not count
DISTANCE_ROWS = 512
WORDINGS_OF = 300  # images whose captions tell content from wording
START_SPREAD, START_LIMIT = 1.5, 4.0  # of logits that start at the importance


@dataclass(frozen=True)
class Problem:
    """What a pruning method is given."""

    cfg: Pruning
    teacher: Teacher
    space: ArchSpace
    macs: MacsModel  # at the teacher's own resolution, where experts will be used
    data: CaptionedImages
    validation: CaptionedImages
    encoder: PromptEncoder
    z: Tensor  # embeddings of the training prompts, (rows, dz)
    content: Tensor  # what of them counts for routing, (dz, dz)
    encoded: Encoded  # the training rows as the U-Net reads them
    seconds: float  # that encoding took

    def start_router(self) -> PromptRouter:
        """An untrained router on the teacher's device."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        router = PromptRouter(
            self.z.shape[1],
            self.space.size,
            cfg.num_experts,
            center=cfg.center,
            shared=cfg.shared,
            own_keys=cfg.own_keys,
            open_logit=cfg.open_logit,
        )
        if cfg.center:
            router.mean_z.copy_(self.z.mean(0))
        router.content.copy_(self.content)
        return router.to(self.teacher.device)

    def noised(
        self,
        rows: Tensor,
        generator: torch.Generator,
        own: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Noised:
        """Training rows at random timesteps.

        Args:
            rows: row numbers, (b,).
            own: their places in a batch of `batch_size`, (b,), of which each process has a part;
                absent where `rows` are a batch of their own.
            dropout: share of captions replaced by the empty one.
        """
        latents, conditions = self.encoded.batch(rows)
        B = len(rows) if own is None else self.cfg.batch_size
        assert B
        if dropout:
            dropped = torch.rand(B, generator=generator) < dropout
            dropped = dropped if own is None else dropped[own]
            conditions = conditions.drop(dropped, self.teacher.empty_conditions().to("cpu"))
        return add_noise(self.teacher, latents, conditions, generator, own, B)


def prepare(cfg: Pruning) -> Problem:
    """Load the teacher and the target, and encode the target's training rows.

    Raises `UserError`.
    """
    assert cfg.teacher and cfg.prompt_encoder
    device = start_processes(pick_device(cfg.device))

    def load_splits(pixels: int) -> list[CaptionedImages]:
        where: dict[str, Any] = {"data_dir": cfg.data_dir, "resolution": pixels, "seed": cfg.seed}
        return [
            load_target(cfg.target, "train", limit=cfg.limit, **where),
            load_target(cfg.target, "validation", **where),
        ]

    pixels = cfg.resolution or (EMOJI_SIZE if cfg.target == "emoji" else PAPER_PIXELS)
    splits = load_splits(pixels)  # data first, since what is missing there is found at once
    teacher = load_teacher(cfg.teacher, device, precision=cfg.precision, resolution=cfg.resolution)
    if cfg.resolution is None:
        teacher = replace(teacher, pixels=min(PAPER_PIXELS, teacher.resolution))
    if teacher.resolution != pixels:
        splits = load_splits(teacher.resolution)
    data, validation = splits
    if cfg.checkpointing:
        teacher.unet.enable_gradient_checkpointing()
    space = ArchSpace.from_unet(teacher.unet, cfg.depth)
    used_at = replace(teacher, pixels=teacher.own_pixels or teacher.resolution)
    macs = measure_macs(
        teacher.unet, space, latent_size=used_at.latent_size, text_tokens=teacher.text_tokens
    )
    check_budget(cfg.budget, macs)
    clock = time.time()
    encoder = PromptEncoder(cfg.prompt_encoder, teacher.device)
    z = encoder.embeddings(data.captions)  # (rows, dz)
    content = torch.eye(z.shape[1])
    if cfg.by_content:
        wordings, images = data.wordings(WORDINGS_OF)
        content = content_map(encoder.embeddings(wordings), images)
    encoded = encode_target(teacher, data, cache_latents=cfg.cache_latents)
    seconds = time.time() - clock
    return Problem(
        cfg, teacher, space, macs, data, validation, encoder, z, content, encoded, seconds
    )


def taylor_importance(
    problem: Problem, clusters: Tensor | None = None, batches: int | None = None
) -> Tensor:
    """Mean |dL/da| at open gates a sample, summed over the schedule's intervals, (K, D).

    L is the denoising loss: to first order, and but for the sign, what it changes by as the unit is
    removed. Intervals where it is below `LEAST_LOSS` of the highest do not count.

    Args:
        clusters: a number below K for each training row, (rows,), to tell rows apart; one cluster
            if absent.
        batches: training batches to look at; `TAYLOR_BATCHES` if absent.
    """
    cfg, teacher, D = problem.cfg, problem.teacher, problem.space.size
    assert cfg.batch_size
    if clusters is None:
        clusters = torch.zeros(len(problem.z), dtype=torch.long)
    K = int(clusters.max()) + 1
    timesteps = teacher.noise_schedule().config.num_train_timesteps
    loss, count = torch.zeros(INTERVALS), torch.zeros(K * INTERVALS)
    change = torch.zeros(K * INTERVALS, D)
    own = own_rows(cfg.batch_size)
    gates = attach_gates(teacher.unet, problem.space)
    try:
        bar = range(batches or TAYLOR_BATCHES)
        for step in tqdm(bar, desc="Taylor importance", unit="batch", disable=rank() > 0):
            rows = batch_rows(len(problem.z), cfg.batch_size, cfg.seed, step)[own]
            batch = problem.noised(rows, step_generator(cfg.seed, "taylor", step), own)
            for places in torch.arange(len(rows)).split(cfg.micro_batch or len(rows)):
                part = batch.part(places)
                a = torch.ones(len(places), D, device=teacher.device, requires_grad=True)
                gates.set_gates(a)
                output = teacher.unet(**part.inputs()).sample
                per_sample = losses.denoising_loss(output, part.target)  # (b,)
                (gradient,) = torch.autograd.grad(per_sample.sum(), a)  # (b, D), a row a sample
                interval = (part.t * INTERVALS // timesteps).cpu()
                loss.index_add_(0, interval, per_sample.detach().cpu())
                cell = clusters[rows[places]] * INTERVALS + interval
                change.index_add_(0, cell, gradient.abs().cpu())
                count += torch.bincount(cell, minlength=K * INTERVALS)
    finally:
        gates.detach()
    sums = [tensor.to(teacher.device) for tensor in (loss, count, change)]
    add_up(*sums)
    loss, count, change = (tensor.cpu() for tensor in sums)
    mean_loss = loss / count.view(K, INTERVALS).sum(0).clamp(min=1)  # (INTERVALS,)
    counts = mean_loss > LEAST_LOSS * mean_loss.max()
    return (change / count.clamp(min=1)[:, None]).view(K, INTERVALS, D)[:, counts].sum(1)


def importance_logits(scores: Tensor) -> Tensor:
    """Where logits start: the logarithm of importance, standardised and limited, (..., D)."""
    logits = scores.clamp(min=1e-12).log()
    logits = START_SPREAD * (logits - logits.mean()) / logits.std().clamp(min=1e-6)
    return logits.clamp(-START_LIMIT, START_LIMIT)


@torch.no_grad()
def output_distances(
    teacher: Teacher, data: CaptionedImages, codes: Tensor, experts: Tensor, macs: MacsModel
) -> dict[str, float]:
    """Mean squared distance to the teacher's output, before any fine-tuning, over some rows.

    `distance` is that of each prompt's own expert. Its controls: `distance_exchanged`, of the next
    expert instead; `distance_static`, of one code for all, made of the codes' mean.

    Args:
        data: a split; `DISTANCE_ROWS` of its rows, spread evenly, are used.
        codes: binary codes, (N, D).
        experts: expert of each row of the split, (rows,).
    """
    rows = torch.tensor(spread(len(data), DISTANCE_ROWS))
    encoded = encode_target(teacher, data.take(rows.tolist()))
    N, own = len(codes), experts[rows]
    shares = torch.bincount(own, minlength=N).double() / len(own)
    mean = (shares[:, None] * codes.double()).sum(0, keepdim=True).float()
    budget = (shares @ macs(codes)).item() / macs.dense
    found = {"distance": codes[own]}
    if N > 1:
        static = meet_budget(mean, torch.ones(1), macs, budget)
        found["distance_exchanged"] = codes[(own + 1) % N]
        found["distance_static"] = static[torch.zeros_like(own)]
    totals, gates = dict.fromkeys(found, 0.0), attach_gates(teacher.unet, macs.space)
    try:
        parts = torch.arange(len(rows)).split(64)
        for step, part in enumerate(tqdm(parts, desc="distance to the teacher", unit="batch")):
            generator = step_generator(0, "distance", step)
            inputs = add_noise(teacher, *encoded.batch(part), generator).inputs()
            gates.set_gates(None)
            expected = teacher.unet(**inputs).sample
            for name, gated in found.items():
                gates.set_gates(gated[part].to(teacher.device))
                output = teacher.unet(**inputs).sample
                totals[name] += losses.output_distillation_loss(output, expected).sum().item()
    finally:
        gates.detach()
    return {name: total / len(rows) for name, total in totals.items()}


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
        "macs_resolution": problem.teacher.own_pixels or problem.teacher.resolution,
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
