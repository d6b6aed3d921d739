"""What every number that a script takes may be: one table, by the field's name. And choices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from common.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `low` itself only unless `above`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        floor = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.high == math.inf:
            return floor if self.low > -math.inf else "a finite number"
        return f"{floor}, and at most {self.high:g}"


MANY = 10**9  # more of anything is refused
ANY, POSITIVE, WEIGHT, SHARE = Range(), Range(0, above=True), Range(0), Range(0, 1)
COUNT, NUMBER, SEED = Range(1, MANY), Range(0, MANY), Range(0, 2**62)
PIXELS, IMAGES = Range(8, 2**14), Range(2, MANY)
RANGES = {
    # pruning
    "budget": Range(0, 1, above=True),
    "num_experts": COUNT,
    "warmup_steps": NUMBER,
    "joint_steps": COUNT,
    "batch_size": COUNT,
    "micro_batch": COUNT,
    "transport_rows": NUMBER,
    "lr": POSITIVE,
    "lr_warmup": NUMBER,
    "predictor_rate": WEIGHT,
    "lr_decay": SHARE,
    "weight_decay": WEIGHT,
    "lambda_distill": WEIGHT,
    "block_weight": WEIGHT,
    "lambda_res": WEIGHT,
    "lambda_cont": WEIGHT,
    "gumbel_temp": POSITIVE,
    "contrast_temp": POSITIVE,
    "eps": POSITIVE,
    "sinkhorn_iterations": COUNT,
    "open_logit": ANY,
    "tflops": POSITIVE,
    # fine-tuning
    "expert": NUMBER,
    "alpha_ddpm": WEIGHT,
    "alpha_distill": WEIGHT,
    "caption_dropout": SHARE,
    # sampling and scoring
    "num_images": COUNT,
    "images": IMAGES,
    "steps": COUNT,
    "guidance": WEIGHT,
    "seeds": COUNT,
    "finetune_steps": NUMBER,
    "text_tokens": COUNT,
    # all
    "resolution": PIXELS,
    "limit": COUNT,
    "save_every": COUNT,
    "seed": SEED,
    # the pocket teacher's training and card
    "vae_steps": COUNT,
    "vae_batch_size": COUNT,
    "vae_lr": POSITIVE,
    "unet_steps": COUNT,
    "unet_batch_size": COUNT,
    "unet_lr": POSITIVE,
    "noisy_share": SHARE,
    "text_noise": WEIGHT,
    "sentence_share": SHARE,
    "guidance_scale": WEIGHT,
    "vae_ema_decay": SHARE,
    "unet_ema_decay": SHARE,
    "latent_noise": WEIGHT,
    "moment_weight": WEIGHT,
    "edge_weight": WEIGHT,
    "square_weight": WEIGHT,
    "train_images": IMAGES,
    "validation_images": IMAGES,
    "trial_images": IMAGES,
    "guidances": WEIGHT,
}


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises `UserError` for a value of `--name` that is not among the `known` ones."""
    if value not in known:
        raise UserError(f"--{name} {value} is unknown; choose one of: {', '.join(known)}")


def check_ranges(cfg: Any) -> None:
    """Raises `UserError` for the first number of a configuration dataclass that cannot be.

    Fields that are None are left to their defaults. A field without an entry in `RANGES` is a
    mistake in the program: KeyError.
    """
    for field in fields(cfg):
        given = getattr(cfg, field.name)
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            allowed = RANGES[field.name]
            if value not in allowed or not math.isfinite(value):
                option = f"--{field.name.replace('_', '-')}"
                shown = value if isinstance(value, int) else f"{value:g}"
                raise UserError(f"{option} {shown} is out of range; choose {allowed}")
