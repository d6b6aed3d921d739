"""Every hyperparameter, the paper's value beside the embedded default's: App. E.1 and E.2.

Each stage has a dataclass, which is also its command line. Values that depend on the target are in
the tables below the dataclasses, and `resolve` fills them in.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from common.errors import UserError
from common.files import check_writable
from common.hub import PAPER_ENCODER, SDXL_BASE, STABLE_DIFFUSION
from common.options import read_options
from common.ranges import check_choice, check_ranges
from common.runs import RUNS
from gates import DEPTH_MODES
from targets.images import check_target
from teacher.model import PRECISIONS


@dataclass(frozen=True)
class Pruning:
    """Pruning. Fields that say "by target" are filled in from `settings.PRUNING`."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "target": "what is pruned (--preset coco-base|coco-small|cc3m-base|cc3m-small|coco-sdxl)",
        "warmup_steps": "steps and rates (App. E.2)",
        "distill": "losses (Eqs. 12-15, 25-29)",
        "transport": "transport (Eqs. 5-7)",
        "as_printed": "other departures from the paper (docs/departures.md)",
        "device": "the machine",
    }
    target: str = "emoji"
    """emoji, coco, cc3m, or a folder with metadata.jsonl."""
    teacher: str | None = None
    """pocket, a folder in the diffusers layout (SD 1.x, 2.x, SDXL), a hub id, or
    random weights: sd21-random, sdxl-random; by target (emoji: pocket, others: SD 2.1)."""
    budget: float = 0.78
    """T_d: the experts' mean share of the MACs (paper: 0.64 to 0.85)."""
    num_experts: int = 8
    """N, the number of architecture codes (paper: 8 or 16)."""
    data_dir: Path | None = None
    """Folder of the target's files, for coco and cc3m."""
    prompt_encoder: str | None = None
    """f_PE; by target (emoji: minilm, paper: all-mpnet-base-v2)."""
    depth: str = "paper"
    """Layers that may be removed whole: paper, all or none."""
    out: Path | None = None
    """Run folder; runs/<target>-<budget> if not given."""
    limit: int | None = None
    """Use only this many training prompts, for a quick trial."""
    dry_run: bool = False
    """Print what the run takes and stop; no weights or data needed."""
    warmup_steps: int | None = None
    """Steps of the predictor alone; by target (paper: 500)."""
    joint_steps: int | None = None
    """Steps of predictor and codes; by target (paper: 2500)."""
    batch_size: int | None = None
    """Prompts in each step; by target (paper: 1024)."""
    lr: float | None = None
    """AdamW's learning rate; by target (paper: 2e-4)."""
    lr_warmup: int | None = None
    """Steps in which the rate rises; by target (paper: 100)."""
    lr_decay: float = 0.5
    """Last share of steps, where the rate falls (paper: constant)."""
    predictor_rate: float = 0.002
    """Rate of the predictor's weights, relative to --lr (paper: 1)."""
    weight_decay: float = 0.0
    """AdamW's weight decay (paper: not said; PyTorch's is 0.01)."""
    caption_dropout: float = 0.05
    """Share of captions made empty, for guidance (paper: not said)."""
    seed: int = 0
    """Seed of everything random."""
    distill: bool = True
    """Distil while pruning; no: Table 3's third row."""
    lambda_distill: float = 0.2
    """Weight of distillation, Eq. 15 (paper: 0.2)."""
    block_weight: float = 0.0
    """Weight of the blocks within distillation, Eq. 29 (paper: 1)."""
    normalise_blocks: bool = True
    """Blocks' errors relative to the teacher's; no: Eq. 28 (paper)."""
    lambda_res: float = 2.0
    """Weight of the resource loss if --no-hold-budget (paper: 2.0)."""
    lambda_cont: float = 100.0
    """Weight of the contrastive loss (paper: 100)."""
    contrast_temp: float = 0.03
    """tau, temperature of the similarities, Eq. 14 (paper: 0.03)."""
    gumbel_temp: float = 0.4
    """gamma, temperature of the gates, Eqs. 9 and 12 (paper: 0.4)."""
    transport: bool = True
    """Assign by transport; no, and no distill: Table 3's second row."""
    eps: float = 0.05
    """epsilon, entropy weight of the transport (paper: 0.05)."""
    sinkhorn_iterations: int = 3
    """Iterations of the transport (paper: 3)."""
    transport_rows: int = 1024
    """Prompts that it balances; 0: the batch (paper: 1024)."""
    as_printed: bool = False
    """Turn all departures off; the flags below are ignored."""
    hold_budget: bool = True
    """Hold T(A) at T_d in every step; no: constant lambda_res (paper)."""
    importance_start: bool = True
    """Logits start at the Taylor importance; no: at --open-logit."""
    open_logit: float = 2.0
    """Where logits start without importance (paper: not said)."""
    shared: bool = True
    """Codes: a shared part plus their own; no: separate (paper)."""
    by_content: bool = True
    """Route by what captions have in common; no: by z (paper)."""
    own_keys: bool = True
    """Routing is fixed once codes start; no: trained on (paper)."""
    center: bool = True
    """Compare centred vectors; no: raw ones (paper)."""
    sample_noise: bool = True
    """Gates' noise for each sample; no: each code (paper: not said)."""
    common_noise: bool = True
    """One noise for a batch in Eq. 12; no: one for each prompt."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: str = "fp32"
    """Frozen teacher in fp32, bf16 or fp16; the router is in fp32."""
    resolution: int | None = None
    """Pixels while pruning; the teacher's, at most 256 (paper: 256)."""
    micro_batch: int | None = None
    """Prompts in the U-Net at once; by target (emoji: all, paper: 64)."""
    checkpointing: bool = False
    """Less memory, but one more forward in each step."""
    cache_latents: bool = False
    """Keep a large target's latents on disk."""
    save_every: int = 20
    """Steps between checkpoints."""
    tflops: float = 125.0
    """TFLOP/s that --dry-run assumes (A100, bf16: about 125)."""


@dataclass(frozen=True)
class Finetuning:
    """Fine-tuning. Fields that say "by target" are filled in from `settings.FINETUNING`."""

    HEADINGS: ClassVar[dict[str, str]] = {
        "run": "what is fine-tuned",
        "steps": "training (Eq. 30, App. E.2)",
        "device": "the machine",
    }
    run: Path | None = None
    """Run folder; the newest run if not given."""
    expert: int | None = None
    """One expert's number; all of them if not given."""
    steps: int | None = None
    """Steps an expert; by target (emoji: 100, paper: 30000)."""
    batch_size: int | None = None
    """Images in each step; by target (emoji: 32, paper: 128)."""
    lr: float | None = None
    """AdamW's learning rate; by target (emoji: 2e-4, paper: 1e-5)."""
    alpha_ddpm: float = 1e-4
    """Weight of the denoising loss (paper: 1e-4)."""
    alpha_distill: float = 1.0
    """Weight of distillation (paper: 1.0)."""
    block_weight: float = 1.0
    """Weight of the blocks within distillation, Eq. 29 (paper: 1)."""
    normalise_blocks: bool = True
    """Blocks' errors relative to the teacher's; no: Eq. 28 (paper)."""
    caption_dropout: float = 0.1
    """Share of captions made empty, for guidance (paper: not said)."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: str = "fp32"
    """Matrix products in fp32, bf16 or fp16; weights are in fp32."""
    micro_batch: int | None = None
    """Images in the U-Nets at once; by target (emoji: all, else: 32)."""
    checkpointing: bool = False
    """Less memory, but one more forward in each step."""
    save_every: int = 50
    """Steps between checkpoints."""


PRUNING: dict[str, dict[str, Any]] = {
    "emoji": {
        "teacher": "pocket",
        "prompt_encoder": "minilm",
        "warmup_steps": 10,
        "joint_steps": 90,
        "batch_size": 64,
        "lr": 0.1,
        "lr_warmup": 10,
    },
    "paper": {  # for every target that is not listed
        "teacher": STABLE_DIFFUSION,
        "prompt_encoder": PAPER_ENCODER,
        "warmup_steps": 100,
        "joint_steps": 400,
        "batch_size": 1024,
        "micro_batch": 64,
        "lr": 0.01,
        "lr_warmup": 20,
    },
}
AS_PRINTED: dict[str, Any] = {
    "hold_budget": False,
    "importance_start": False,
    "shared": False,
    "by_content": False,
    "own_keys": False,
    "predictor_rate": 1.0,
    "lr_decay": 0.0,
    "center": False,
    "sample_noise": False,
    "common_noise": False,
    "normalise_blocks": False,
    "block_weight": 1.0,
    "transport_rows": 0,
    "caption_dropout": 0.0,
    "weight_decay": 0.01,
}
PRINTED: dict[str, dict[str, Any]] = {  # what --as-printed changes in `PRUNING`
    "emoji": {"warmup_steps": 40, "joint_steps": 160, "lr": 0.05},
    "paper": {"warmup_steps": 500, "joint_steps": 2500, "lr": 2e-4, "lr_warmup": 100},  # App. E.2
}

PRESETS: dict[str, dict[str, Any]] = {  # App. E.1
    "coco-base": {"target": "coco", "budget": 0.78, "num_experts": 8},
    "coco-small": {"target": "coco", "budget": 0.64, "num_experts": 8},
    "cc3m-base": {"target": "cc3m", "budget": 0.85, "num_experts": 16},
    "cc3m-small": {"target": "cc3m", "budget": 0.66, "num_experts": 8},
    # not the paper's: its hyperparameters carried over to SDXL, untested at full size
    "coco-sdxl": {
        "target": "coco",
        "teacher": SDXL_BASE,
        "budget": 0.78,
        "num_experts": 8,
        "resolution": 512,
        "micro_batch": 16,
        "out": RUNS / "coco-sdxl-0.78",
    },
}
PAPER_PIXELS = 256
FREE = (  # may differ when a run is resumed
    "device",
    "out",
    "save_every",
    "micro_batch",
    "checkpointing",
    "cache_latents",
    "dry_run",
    "tflops",
)

FINETUNING: dict[str, dict[str, Any]] = {
    "emoji": {"steps": 100, "batch_size": 32, "lr": 2e-4},
    "paper": {"steps": 30_000, "batch_size": 128, "lr": 1e-5, "micro_batch": 32},  # App. E.2
}
IDENTITY = (  # an expert made with other values of these is another expert
    "steps",
    "batch_size",
    "lr",
    "alpha_ddpm",
    "alpha_distill",
    "block_weight",
    "normalise_blocks",
    "caption_dropout",
    "seed",
)


def filled(cfg: Any, defaults: dict[str, Any]) -> Any:
    """The configuration with `defaults` where it has None."""
    return replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})


def resolve(cfg: Pruning) -> Pruning:
    """Fill in what depends on the target, and refuse what cannot work. Raises `UserError`."""
    check_ranges(cfg)
    check_target(cfg.target)
    check_choice("depth", cfg.depth, DEPTH_MODES)
    check_choice("precision", cfg.precision, PRECISIONS)
    kind = cfg.target if cfg.target in PRUNING else "paper"
    if cfg.as_printed:
        cfg = filled(replace(cfg, **AS_PRINTED), PRINTED[kind])
    cfg = filled(cfg, PRUNING[kind])
    assert cfg.batch_size
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
    cfg = replace(cfg, out=cfg.out or RUNS / f"{Path(cfg.target).name}-{cfg.budget:g}")
    assert cfg.out
    check_writable(cfg.out)
    return cfg


def resolve_finetuning(cfg: Finetuning, target: str) -> Finetuning:
    """Fill in what depends on the target, and refuse what cannot work. Raises `UserError`."""
    check_ranges(cfg)
    check_choice("precision", cfg.precision, PRECISIONS)
    return filled(cfg, FINETUNING.get(target, FINETUNING["paper"]))


def read_pruning(arguments: list[str], description: str | None) -> Pruning:
    """`Pruning` from arguments; `--preset NAME` sets what the other arguments do not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    preset, rest = parser.parse_known_args(arguments)
    if preset.preset is not None:
        check_choice("preset", preset.preset, PRESETS)
    start = Pruning(**PRESETS.get(preset.preset, {}))
    return read_options(Pruning, description, rest, start)
