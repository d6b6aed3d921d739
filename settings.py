"""Every hyperparameter, the paper's value beside the embedded default's: App. E.1 and E.2.

Each stage has a dataclass, which is also its command line. A field says what it may be, and its
default is that of the embedded target. Whole instances with other values are the presets.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from common.errors import UserError
from common.files import check_writable
from common.hub import PAPER_ENCODER, SDXL_BASE, STABLE_DIFFUSION, lasting_name
from common.options import group, read_options
from common.ranges import (
    Budget,
    Choice,
    Count,
    Finite,
    Number,
    Pixels,
    Positive,
    Precision,
    Seed,
    Share,
    Weight,
    check,
    check_choice,
)

RUNS = Path("runs")
Depth = Annotated[str, Choice("paper", "all", "none")]


@dataclass(frozen=True)
class Pruning:
    """Pruning. Other targets than emoji have --preset coco-base's defaults, but --depth all."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "target": "what is pruned (--preset NAME sets several: see settings.py)",
        "warmup_steps": "steps and rates (App. E.2)",
        "distill": "losses (Eqs. 12-15, 25-29)",
        "transport": "transport (Eqs. 5-7)",
        "hold_budget": "departures from the paper (docs/departures.md)",
        "device": "the machine; these may differ when a run is resumed",
    }
    target: str = "emoji"
    """emoji, coco, cc3m, or a folder with metadata.jsonl."""
    teacher: str = "pocket"
    """pocket, a diffusers folder, a hub id (paper: SD 2.1), or a
    random one: sd21-random, sdxl-random."""
    budget: Budget = 0.78
    """T_d: experts' mean share of the cost (paper: 0.64 to 0.85)."""
    cost: str = "macs"
    """macs, latency (measured here), or a table made by latency.py."""
    num_experts: Count = 8
    """N, the number of architecture codes (paper: 8 or 16)."""
    data_dir: Path | None = None
    """Folder of the target's files, for coco and cc3m."""
    prompt_encoder: str = "minilm"
    """f_PE: minilm, a folder, a hub id (paper: all-mpnet-base-v2)."""
    depth: Depth = "all"
    """Layers that may be removed whole (paper: D = 1620)."""
    precision: Precision = "fp32"
    """Of the frozen teacher; the router is in fp32."""
    resolution: Pixels | None = None
    """While pruning; the teacher's, at most 256 (paper: 256)."""
    limit: Count | None = None
    """Use only this many training prompts, for a quick trial."""
    seed: Seed = 0
    """Seed of everything random."""
    warmup_steps: Number = 10
    """Steps of the predictor alone (paper: 500)."""
    joint_steps: Count = 90
    """Steps of predictor and codes (paper: 2500)."""
    batch_size: Count = 64
    """Prompts in each step (paper: 1024)."""
    lr: Positive = 0.1
    """AdamW's learning rate (paper: 2e-4)."""
    lr_warmup: Number = 10
    """Steps in which the rate rises (paper: 100)."""
    distill: bool = True
    """Distil while pruning; no: Table 3, row 3."""
    lambda_distill: Weight = 0.2
    """Weight of distillation, Eq. 15 (paper: 0.2)."""
    lambda_res: Weight = 2.0
    """Weight of the resource loss if --no-hold-budget (paper: 2.0)."""
    lambda_cont: Weight = 100.0
    """Weight of the contrastive loss (paper: 100)."""
    contrast_temp: Positive = 0.03
    """tau, temperature of the similarities, Eq. 14 (paper: 0.03)."""
    gumbel_temp: Positive = 0.4
    """gamma, temperature of the gates, Eqs. 9 and 12 (paper: 0.4)."""
    transport: bool = True
    """Assign by transport; no, and no distill: Table 3, row 2."""
    eps: Positive = 0.05
    """epsilon, entropy weight of the transport (paper: 0.05)."""
    sinkhorn_iterations: Count = 3
    """Iterations of the transport (paper: 3)."""
    hold_budget: bool = True
    """Hold T(A) at T_d in every step; no: constant lambda_res (paper)."""
    importance_start: bool = True
    """Logits start at the Taylor importance; no: at --open-logit."""
    open_logit: Finite = 2.0
    """Where logits start without importance (paper: not said)."""
    by_content: bool = True
    """Route by what captions have in common; no: by z (paper)."""
    own_keys: bool = True
    """Route by the codes as they start; no: as trained (paper)."""
    center: bool = True
    """Compare centred vectors; no: raw ones (paper)."""
    predictor_rate: Weight = 0.002
    """Rate of the predictor's weights, relative to --lr (paper: 1)."""
    lr_decay: Share = 0.5
    """Last share of steps, where the rate falls (paper: constant)."""
    block_weight: Weight = 0.0
    """Weight of the blocks within distillation, Eq. 29 (paper: 1)."""
    normalise_blocks: bool = True
    """Errors relative to the teacher's blocks; no: Eq. 28 (paper)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: Path | None = None
    """Run folder; runs/<target>-<budget> if not given."""
    micro_batch: Count = 64
    """Prompts in the U-Net at once (paper: 64)."""
    checkpointing: bool = False
    """Less memory, but one more forward in each step."""
    save_minutes: Weight = 15.0
    """Minutes between checkpoints; 0: after every step."""
    dry_run: bool = False
    """Print what the run takes and stop; no weights or data needed."""
    tflops: Positive = 125.0
    """TFLOP/s that --dry-run assumes (A100, bf16: about 125)."""


@dataclass(frozen=True)
class Finetuning:
    """Fine-tuning. Runs of other targets than emoji have the paper's steps, batch and rate."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "run": "what is fine-tuned",
        "refit": "before the first step (refit.py)",
        "steps": "training (Eq. 30, App. E.2)",
        "device": "the machine",
    }
    run: Path | None = None
    """Run folder; the newest run if not given."""
    expert: Number | None = None
    """One expert's number; all of them if not given."""
    teacher: str | None = None
    """Where the run's teacher is now, if it was moved."""
    data_dir: Path | None = None
    """Where the target's files are now, if they were moved."""
    shared: bool = False
    """One set of weights for all experts, trained through their gates."""
    refit: bool = True
    """Solve what reads pruned features anew; no: start as cut (paper)."""
    refit_images: Count = 512
    """Images of an expert's own prompts that it is solved for."""
    ridge: Positive = 0.1
    """Pull towards the cut weights, relative to the features."""
    steps: Number = 100
    """Steps an expert, or of the shared weights (paper: 30000)."""
    batch_size: Count = 32
    """Images in each step (paper: 128)."""
    lr: Positive = 2e-4
    """AdamW's learning rate (paper: 1e-5)."""
    alpha_ddpm: Weight = 1e-4
    """Weight of the denoising loss (paper: 1e-4)."""
    alpha_distill: Weight = 1.0
    """Weight of distillation (paper: 1.0)."""
    block_weight: Weight = 1.0
    """Weight of the blocks within distillation, Eq. 29 (paper: 1)."""
    normalise_blocks: bool = True
    """Errors relative to the teacher's blocks; no: Eq. 28 (paper)."""
    caption_dropout: Share = 0.1
    """Share of captions made empty, for guidance (paper: not said)."""
    seed: Seed = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """Matrix products in fp32, bf16 or fp16; weights are in fp32."""
    micro_batch: Count = 32
    """Images in the U-Nets at once."""
    checkpointing: bool = False
    """Less memory, but one more forward in each step."""
    save_minutes: Weight = 15.0
    """Minutes between checkpoints; 0: after every step."""


# ---- presets ----

EMOJI = Pruning()
PAPER = Pruning(  # for every other target; fewer and larger steps than the paper's
    target="coco",
    teacher=STABLE_DIFFUSION,
    prompt_encoder=PAPER_ENCODER,
    depth="paper",
    warmup_steps=100,
    joint_steps=400,
    batch_size=1024,
    lr=0.01,
    lr_warmup=20,
)


def as_printed(cfg: Pruning) -> Pruning:
    """Without the departures that have a switch."""
    return replace(
        cfg,
        depth="paper",
        hold_budget=False,
        importance_start=False,
        by_content=False,
        own_keys=False,
        center=False,
        predictor_rate=1.0,
        lr_decay=0.0,
        block_weight=1.0,
        normalise_blocks=False,
    )


PRESETS: dict[str, Pruning] = {  # App. E.1; the last two have all switches as the paper prints them
    "emoji": EMOJI,
    "coco-base": PAPER,
    "coco-small": replace(PAPER, budget=0.64),
    "cc3m-base": replace(PAPER, target="cc3m", budget=0.85, num_experts=16),
    "cc3m-small": replace(PAPER, target="cc3m", budget=0.66),
    # not the paper's: its hyperparameters carried over to SDXL, untested at full size
    "coco-sdxl": replace(
        PAPER, teacher=SDXL_BASE, resolution=512, micro_batch=16, out=RUNS / "coco-sdxl-0.78"
    ),
    "emoji-as-printed": replace(as_printed(EMOJI), warmup_steps=40, joint_steps=160, lr=0.05),
    "coco-as-printed": replace(
        as_printed(PAPER), warmup_steps=500, joint_steps=2500, lr=2e-4, lr_warmup=100
    ),
}
PAPER_TUNING = Finetuning(steps=30_000, batch_size=128, lr=1e-5)  # App. E.2
MACHINE = group(Pruning, "device")  # these may differ when a run is resumed
# an expert made with other values of these is another one
TUNED_BY = [*group(Finetuning, "refit"), *group(Finetuning, "steps")]


def pruning_of(target: str) -> Pruning:
    """The defaults of a target."""
    return EMOJI if target == EMOJI.target else replace(PAPER, target=target, depth=EMOJI.depth)


def finetuning_of(target: str) -> Finetuning:
    """The defaults of a run's target."""
    return Finetuning() if target == EMOJI.target else PAPER_TUNING


def resolve(cfg: Pruning) -> Pruning:
    """Choose the run folder, and refuse what cannot work. Raises `UserError`."""
    check(cfg)
    if cfg.batch_size < 2:
        raise UserError(f"--batch-size {cfg.batch_size} is too small; choose 2 or more")
    if cfg.num_experts > cfg.batch_size:
        raise UserError(
            f"--num-experts {cfg.num_experts} is more than --batch-size {cfg.batch_size}: the "
            "transport gives every expert a share of each batch; lower the one or raise the other"
        )
    if cfg.limit is not None and cfg.limit < cfg.num_experts:
        raise UserError(
            f"--limit {cfg.limit} is less than --num-experts {cfg.num_experts}; choose "
            f"{cfg.num_experts} or more"
        )
    # a run keeps paths that hold in any working directory
    known = {preset.target for preset in PRESETS.values()}
    target = cfg.target if cfg.target in known else lasting_name(cfg.target)
    out = cfg.out or RUNS / f"{Path(target).name}-{cfg.budget:g}"
    check_writable(out)
    data_dir = cfg.data_dir and Path(os.path.abspath(cfg.data_dir))
    return replace(cfg, out=out, target=target, data_dir=data_dir)


P = TypeVar("P", bound=Pruning)


def read_with_preset(config: type[P], arguments: list[str], description: str | None) -> P:
    """A configuration from arguments; a preset, or the target, sets what the others do not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    preset, rest = parser.parse_known_args(arguments)
    parser.add_argument("--target", default=EMOJI.target)
    start = pruning_of(parser.parse_known_args(arguments)[0].target)
    if preset.preset is not None:
        check_choice("preset", preset.preset, PRESETS)
        start = PRESETS[preset.preset]
    shared = {field.name: getattr(start, field.name) for field in fields(Pruning)}
    return read_options(config, description, rest, config(**shared))
