"""What a pruning method is given, and what it leaves in its run folder. Sec. 3.4, Eq. 22, App. E.

`prepare` loads a `Problem`: teacher, architecture space, costs, target, prompt embeddings. Every
method ends in `write_results`, so that fine-tuning, sampling and evaluation read one kind of
folder: each prompt's expert, binary codes that meet the budget, and a summary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import losses
from common.errors import UserError
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
from targets.images import CaptionedImages, load_target
from teacher.encoded import Encoded, encode_target
from teacher.model import Noised, Teacher, add_noise, load_teacher

TAYLOR_BATCHES = 16  # batches that importance is averaged over
INTERVALS = 20  # equal parts of the noise schedule; importance is averaged in each, then summed
LEAST_LOSS = 0.05  # intervals whose loss is below this share of the highest are left out
WORDINGS_OF = 300  # images whose captions `content_map` compares
START_SPREAD, START_LIMIT, START_WEIGHT = 1.5, 4.0, 5.0  # logits' deviation, limit; factor of W
START_BATCHES, RIDGE, LIMIT = 32, 3.0, 5.0  # batches, ridge, largest value of W's regression


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
    content: Tensor  # C, the map of `content_map`, (dz, dz)
    encoded: Encoded  # the training rows as the U-Net reads them
    seconds: float  # spent on encoding

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
            own: their places in the whole batch of `batch_size` rows, (b,), of which each process
                has a part; if absent, `rows` are the whole batch.
            dropout: share of captions replaced by the empty one.
        """
        latents, conditions = self.encoded.batch(rows)
        B = len(rows) if own is None else self.cfg.batch_size
        assert B
        if dropout:
            dropped = torch.rand(B, generator=generator) < dropout  # (B,)
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


def gate_gradients(problem: Problem, batches: int) -> Iterator[tuple[Tensor, ...]]:
    """|dL/da| at open gates, L the denoising loss, of this process's samples of some batches.

    To first order, L changes by this much, up or down, when a unit is removed.

    Yields:
        Of a micro-batch the row numbers, (b,), the intervals of the schedule that the timesteps lie
        in, (b,), L, (b,), and |dL/da|, (b, D), on the CPU.
    """
    cfg, teacher, D = problem.cfg, problem.teacher, problem.space.size
    assert cfg.batch_size
    timesteps = teacher.noise_schedule().config.num_train_timesteps
    own = own_rows(cfg.batch_size)
    gates = attach_gates(teacher.unet, problem.space)
    try:
        bar = range(batches)
        for step in tqdm(bar, desc="Taylor importance", unit="batch", disable=rank() > 0):
            rows = batch_rows(len(problem.z), cfg.batch_size, cfg.seed, step)[own]
            batch = problem.noised(rows, step_generator(cfg.seed, "taylor", step), own)
            for places in torch.arange(len(rows)).split(cfg.micro_batch or len(rows)):
                part = batch.part(places)
                a = torch.ones(len(places), D, device=teacher.device, requires_grad=True)
                gates.set_gates(a)
                output = teacher.unet(**part.inputs()).sample
                loss = losses.denoising_loss(output, part.target)  # (b,)
                (gradient,) = torch.autograd.grad(loss.sum(), a)  # (b, D), one row a sample
                interval = part.t * INTERVALS // timesteps
                yield rows[places], interval.cpu(), loss.detach().cpu(), gradient.abs().cpu()
    finally:
        gates.detach()


def summed(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors' sums over the processes, on the CPU."""
    moved = [tensor.to(device) for tensor in tensors]
    add_up(*moved)
    return [tensor.cpu() for tensor in moved]


def taylor_importance(
    problem: Problem, clusters: Tensor | None = None, batches: int | None = None
) -> Tensor:
    """|dL/da| at open gates, averaged over an interval's samples, summed over intervals, (K, D).

    Intervals where the denoising loss L is below `LEAST_LOSS` of the highest do not count.

    Args:
        clusters: cluster of each training row, (rows,), in [0, K); if absent, K = 1.
        batches: number of training batches; `TAYLOR_BATCHES` if absent.
    """
    if clusters is None:
        clusters = torch.zeros(len(problem.z), dtype=torch.long)
    K, D = int(clusters.max()) + 1, problem.space.size
    loss, count = torch.zeros(INTERVALS), torch.zeros(K * INTERVALS)  # (intervals,), (cells,)
    change = torch.zeros(K * INTERVALS, D)  # (cells, D); a cell is an interval of a cluster
    for rows, interval, sample_loss, gradient in gate_gradients(problem, batches or TAYLOR_BATCHES):
        loss.index_add_(0, interval, sample_loss)
        cell = clusters[rows] * INTERVALS + interval  # (b,)
        change.index_add_(0, cell, gradient)
        count += torch.bincount(cell, minlength=K * INTERVALS)
    loss, count, change = summed(problem.teacher.device, loss, count, change)
    mean_loss = loss / count.view(K, INTERVALS).sum(0).clamp(min=1)  # (INTERVALS,)
    used = mean_loss > LEAST_LOSS * mean_loss.max()  # (intervals,)
    return (change / count.clamp(min=1)[:, None]).view(K, INTERVALS, D)[:, used].sum(1)  # (K, D)


def importance_start(problem: Problem) -> tuple[Tensor, Tensor]:
    """Where the architecture predictor starts: b, (D,), and W, (D, dz), so that e is importance.

    b is the logarithm of the units' importance, standardised and limited. W is a ridge regression,
    times `START_WEIGHT`: from a sample's prompt, C (z - mean z), it predicts |dL/da| of the sample,
    relative to the mean over samples in the same interval of the schedule.
    """
    found = gate_gradients(problem, START_BATCHES)
    rows, interval, loss, gradient = (torch.cat(part) for part in zip(*found, strict=True))
    device = problem.teacher.device
    sums = torch.zeros(INTERVALS, gradient.shape[1]).index_add_(0, interval, gradient)
    loss_sums = torch.zeros(INTERVALS).index_add_(0, interval, loss)
    counts = torch.bincount(interval, minlength=INTERVALS).float()
    sums, loss_sums, counts = summed(device, sums, loss_sums, counts)
    mean = sums / counts.clamp(min=1)[:, None]  # (INTERVALS, D)
    mean_loss = loss_sums / counts.clamp(min=1)
    scores = mean[mean_loss > LEAST_LOSS * mean_loss.max()].sum(0)  # (D,)
    relative = (gradient / mean[interval].clamp(min=1e-12)).clamp(max=LIMIT) - 1  # (n, D)
    x = (problem.z[rows] - problem.z.mean(0)) @ problem.content.T  # (n, dz)
    xx, xy, sum_x, sum_y = summed(device, x.T @ x, x.T @ relative, x.sum(0), relative.sum(0))
    xx, xy = (s - sum_x[:, None] * t / counts.sum() for s, t in ((xx, sum_x), (xy, sum_y)))
    W = torch.linalg.solve(xx + RIDGE * torch.eye(len(xx)), xy).T  # (D, dz)
    scale = START_SPREAD / scores.clamp(min=1e-12).log().std().clamp(min=1e-6)
    return importance_logits(scores), START_WEIGHT * scale * W


def importance_logits(scores: Tensor) -> Tensor:
    """Where logits start: the logarithm of importance, standardised and limited, (..., D)."""
    logits = scores.clamp(min=1e-12).log()
    logits = START_SPREAD * (logits - logits.mean()) / logits.std().clamp(min=1e-6)
    return logits.clamp(-START_LIMIT, START_LIMIT)


def load_split(
    settings: dict[str, Any], assigned: dict[str, list[int]], split: str, resolution: int
) -> CaptionedImages:
    """A split of a run's target. Raises `UserError` where its rows have changed since the run.

    Args:
        settings: the run's config.json.
        assigned: the run's assignments.json.
        resolution: pixels a side.
    """
    data = load_target(
        settings["target"],
        split,
        seed=settings["seed"],
        limit=settings["limit"] if split == "train" else None,
        data_dir=settings["data_dir"] and Path(settings["data_dir"]),
        resolution=resolution,
    )
    if len(data) != len(assigned[split]):
        raise UserError(
            f"{data.report()}; the run's assignments have {len(assigned[split]):,} rows of "
            f"{split}: give its images back as they were, or prune again with train.py"
        )
    return data


def write_results(
    cfg: Pruning,
    problem: Problem,
    router: PromptRouter,
    seconds: dict[str, float],
    *,
    codes: Tensor | None = None,
    method: str = "aptp",
    given: dict[str, Tensor] | None = None,
) -> None:
    """Route every prompt as at test time, make the codes binary, and write the run's results.

    `summary.json` comes last.

    Args:
        cfg: what `settings.resolve` returns.
        problem: what the method was given.
        router: trained; for a method with one expert, any router.
        seconds: time of each stage.
        codes: binary codes of another method, (N, D); if absent, the router's, made binary.
        method: its name.
        given: for a control, the expert of each row by split, whatever the router says.
    """
    assert cfg.out
    run, macs, data = cfg.out, problem.macs, problem.data
    z_validation = problem.encoder(problem.validation.captions)
    routed = given or {
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
