"""The pruning stage: Sec. 3.3.1 and App. E.2, Eq. 15.

    python train.py                          # emoji, pocket teacher, 0.78 of its MACs, 8 experts
    python train.py --budget 0.6 --num-experts 4

Warm-up: each prompt is pruned by its own predicted architecture e' (Eq. 12). Then the codes start
from the embeddings' clusters, and codes and predictor are trained jointly, prompts being assigned
by optimal transport. The U-Net's weights stay frozen throughout, and the teacher is the same U-Net
with its gates open. At the end the codes become binary, so that the experts' mean MACs over the
training prompts meet the budget. A killed run goes on with the same command.

Departures from the paper:
- On `emoji`, far fewer and larger steps than the paper's 3000 at 2e-4: the defaults depend on the
  target, and `--help` gives both.
- Latents are the autoencoder's means, encoded once, instead of fresh samples from its posterior.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import trange

import losses
from data import TARGETS, CaptionedImages, load_target
from gates import DEPTH_MODES, ArchSpace, gumbel_sigmoid
from prune_unet import (
    BlockRecorder,
    GateHandle,
    MacsModel,
    attach_gates,
    check_budget,
    cut_expert,
    measure_macs,
    meet_budget,
)
from router import PromptEncoder, PromptRouter
from runfolder import (
    RUNS,
    MetricsLog,
    UserError,
    as_json,
    batch_rows,
    claim,
    command_line,
    load_optimizer,
    load_tensors,
    optimizer_tensors,
    pick_device,
    read_json,
    save_tensors,
    step_generator,
    write_json,
)
from teacher import TEACHERS, Noised, Teacher, add_noise, encode_target, load_teacher


@dataclass(frozen=True)
class Config:
    """The pruning stage. Fields that say "by target" are filled in from `PRESETS`."""

    target: str = "emoji"
    """Captioned images to prune on."""
    teacher: str = "pocket"
    """The text-to-image model to prune."""
    budget: float = 0.78
    """T_d.

    Mean MACs of the experts over the training prompts, as a share of the teacher's (paper: 0.64 to
    0.85).
    """
    num_experts: int = 8
    """N, the number of architecture codes (paper: 8 or 16)."""
    data_dir: Path | None = None
    """Folder of the target's files; `emoji` needs none."""
    warmup_steps: int | None = None
    """Steps in which only the predictor is trained; by target (emoji: 40, paper: 500)."""
    joint_steps: int | None = None
    """Steps in which predictor and codes are trained; by target (emoji: 160, paper: 2500)."""
    batch_size: int | None = None
    """Prompts a step; by target (emoji: 64, paper: 1024)."""
    lr: float | None = None
    """AdamW's learning rate of predictor and codes; by target (emoji: 0.05, paper: 2e-4)."""
    lr_warmup: int | None = None
    """Steps of linear learning-rate warm-up; by target (emoji: 10, paper: 100)."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: Path | None = None
    """Run folder; runs/<target>-<budget> if not given."""
    lambda_distill: float = 0.2
    """Weight of distillation in Eq. 15 (paper: 0.2)."""
    lambda_res: float = 2.0
    """Weight of the resource loss (paper: 2.0)."""
    lambda_cont: float = 100.0
    """Weight of the contrastive loss (paper: 100)."""
    gumbel_temp: float = 0.4
    """gamma, temperature of the Gumbel-sigmoid (paper: 0.4)."""
    contrast_temp: float = 0.03
    """tau, temperature of the contrastive similarities (paper: 0.03)."""
    eps: float = 0.05
    """Entropy weight of the transport (paper: 0.05)."""
    sinkhorn_iterations: int = 3
    """Iterations of the transport (paper: 3)."""
    open_logit: float = 2.0
    """Where logits start; the paper does not say."""
    center: bool = True
    """Route on centred vectors; --no-center is the paper's letter."""
    depth: str = "paper"
    """Which layers may be removed: paper, all or none."""
    limit: int | None = None
    """Use only this many training prompts, for a quick trial; all if not given."""
    save_every: int = 20
    """Steps between checkpoints."""


PRESETS: dict[str, dict[str, Any]] = {
    "emoji": {
        "warmup_steps": 40,
        "joint_steps": 160,
        "batch_size": 64,
        "lr": 0.05,
        "lr_warmup": 10,
    },
}


def resolve(cfg: Config) -> Config:
    """Fill in what depends on the target, and refuse what cannot work. Raises `UserError`."""
    if cfg.target not in TARGETS:
        raise UserError(f"--target {cfg.target} is unknown; choose one of: {', '.join(TARGETS)}")
    if cfg.teacher not in TEACHERS:
        raise UserError(f"--teacher {cfg.teacher} is unknown; choose one of: {', '.join(TEACHERS)}")
    if not 0 < cfg.budget <= 1:
        raise UserError(
            f"--budget {cfg.budget} is not a share of the dense model's MACs; "
            "choose a number in (0, 1]"
        )
    if cfg.depth not in DEPTH_MODES:
        raise UserError(f"--depth {cfg.depth} is unknown; choose one of: {', '.join(DEPTH_MODES)}")
    given = {key: value for key, value in asdict(cfg).items() if value is not None}
    cfg = replace(cfg, **{key: given.get(key, value) for key, value in PRESETS[cfg.target].items()})
    assert (
        cfg.warmup_steps is not None and cfg.joint_steps is not None and cfg.batch_size is not None
    )
    for name, value, least in (
        ("num-experts", cfg.num_experts, 1),
        ("batch-size", cfg.batch_size, 2),
        ("warmup-steps", cfg.warmup_steps, 0),
        ("joint-steps", cfg.joint_steps, 1),
        ("save-every", cfg.save_every, 1),
        ("limit", cfg.num_experts if cfg.limit is None else cfg.limit, cfg.num_experts),
    ):
        if value < least:
            raise UserError(f"--{name} {value} is too small; choose {least} or more")
    if cfg.num_experts > cfg.batch_size:
        raise UserError(
            f"--num-experts {cfg.num_experts} is more than --batch-size {cfg.batch_size}: the "
            "transport gives every expert a share of each batch; lower the one or raise the other"
        )
    return replace(cfg, out=cfg.out or RUNS / f"{cfg.target}-{cfg.budget:g}")


class PruningStep:
    """What one training step computes: Eq. 15 for one batch, as a dictionary of terms."""

    def __init__(
        self,
        cfg: Config,
        teacher: Teacher,
        router: PromptRouter,
        gates: GateHandle,
        macs: MacsModel,
    ) -> None:
        self.cfg, self.teacher, self.router = cfg, teacher, router
        self.gates, self.macs = gates, macs
        self.blocks = BlockRecorder(teacher.unet)

    def __call__(
        self, z: Tensor, batch: Noised, draw: torch.Generator, *, warmup: bool
    ) -> dict[str, Tensor]:
        """Prompt embeddings (B, dz) and their noised latents -> the loss and its terms, scalars."""
        cfg, B = self.cfg, len(z)
        e = self.router(z)  # (B, D)
        e_prime = gumbel_sigmoid(e, cfg.gumbel_temp, generator=draw)  # (B, D)
        experts: Tensor | None = None
        a = e_prime  # during warm-up, each prompt has its own architecture
        if not warmup:
            A = gumbel_sigmoid(self.router.codes, cfg.gumbel_temp, generator=draw)  # (N, D)
            experts, a = self.router.assign(e, A, eps=cfg.eps, iterations=cfg.sinkhorn_iterations)
        mean_macs = self.macs(a).mean()  # T(A) = sum_i B_i / B T(a_i)

        self.gates.set_gates(None)
        with torch.no_grad():
            teacher_output = self.teacher.unet(**batch.inputs()).sample
        teacher_blocks = self.blocks.take()
        self.gates.set_gates(a)
        student_output = self.teacher.unet(**batch.inputs()).sample
        student_blocks = self.blocks.take()
        self.gates.set_gates(None)

        denoising = losses.denoising_loss(student_output, batch.target)  # (B,)
        distillation = losses.distillation_loss(
            student_output, teacher_output, student_blocks, teacher_blocks
        )  # (B,)
        resource = losses.resource_loss(mean_macs, cfg.budget * self.macs.dense)
        contrastive = losses.contrastive_loss(z, e_prime, cfg.contrast_temp)
        weights = (cfg.lambda_distill, cfg.lambda_res, cfg.lambda_cont)
        loss = losses.pruning_loss(
            denoising, distillation, resource, contrastive, experts, cfg.num_experts, *weights
        )
        share = torch.full((B,), 1 / B)  # of the prompts, by architecture
        if experts is not None:
            share = torch.bincount(experts.cpu(), minlength=cfg.num_experts) / B
        return {
            "loss": loss,
            "denoising": denoising.mean(),
            "distillation": distillation.mean(),
            "resource": resource,
            "contrastive": contrastive,
            "macs_ratio": mean_macs / self.macs.dense,
            "usage": torch.exp(-(share * share.clamp(min=1e-12).log()).sum()),
        }


TERMS = ("loss", "denoising", "distillation", "resource", "contrastive", "macs_ratio", "usage")


def train(cfg: Config) -> dict[str, Any]:
    """Run (or go on with) the pruning stage.

    Gives the run's summary. Raises `UserError` for what the user can mend.
    """
    cfg = resolve(cfg)
    assert (
        cfg.out
        and cfg.warmup_steps is not None
        and cfg.joint_steps
        and cfg.batch_size
        and cfg.lr
        and cfg.lr_warmup is not None
    )
    settings = as_json(cfg)
    claim(cfg.out, settings, free=("device", "out", "save_every"))
    if (cfg.out / "summary.json").exists():
        print(f"{cfg.out} is complete; --out names another folder")
        return read_json(cfg.out / "summary.json")
    device = pick_device(cfg.device)
    teacher = load_teacher(cfg.teacher, device)
    space = ArchSpace.from_unet(teacher.unet, cfg.depth)
    macs = measure_macs(
        teacher.unet, space, latent_size=teacher.latent_size, text_tokens=teacher.text_tokens
    )
    check_budget(cfg.budget, macs)
    data = load_target(cfg.target, "train", seed=cfg.seed, limit=cfg.limit)
    validation = load_target(cfg.target, "validation", seed=cfg.seed)
    write_json(cfg.out / "config.json", settings)

    clock = time.time()
    encoder = PromptEncoder(device=device)
    z = encoder(data.captions)  # (rows, dz)
    encoded = encode_target(teacher, data)
    seconds = {"encode": time.time() - clock, "warmup": 0.0, "joint": 0.0}

    torch.manual_seed(cfg.seed)
    router = PromptRouter(
        z.shape[1], space.size, cfg.num_experts, center=cfg.center, open_logit=cfg.open_logit
    ).to(device)
    router.mean_z.copy_(z.mean(0))
    optimizer = torch.optim.AdamW(router.parameters(), lr=cfg.lr)
    path, first = cfg.out / "checkpoint.safetensors", 0
    if path.exists():
        tensors, meta = load_tensors(path)
        router.load_state_dict(
            {k.removeprefix("router/"): v for k, v in tensors.items() if k.startswith("router/")}
        )
        load_optimizer(optimizer, tensors)
        first, seconds = meta["step"], meta["seconds"]
    steps = cfg.warmup_steps + cfg.joint_steps
    gates = attach_gates(teacher.unet, space)
    step_of = PruningStep(cfg, teacher, router, gates, macs)
    log = MetricsLog(cfg.out / "metrics.csv", list(TERMS), first)
    bar = trange(first, steps, initial=first, total=steps, desc="pruning")
    for step in bar:
        clock = time.time()
        warmup = step < cfg.warmup_steps
        if step == cfg.warmup_steps:
            router.start_codes(z, seed=cfg.seed)
        draw = step_generator(cfg.seed, "train", step)
        rows = batch_rows(len(data), cfg.batch_size, cfg.seed, step)
        batch = add_noise(teacher, encoded.latents[rows], encoded.text[rows], draw)
        terms = step_of(z[rows].to(device), batch, draw, warmup=warmup)
        values = {name: terms[name].item() for name in TERMS}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss became {values['loss']} at step {step}; the last good state is in "
                f"{path}; try a lower --lr"
            )
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.lr_warmup))
        optimizer.step()
        log.write(step, values)
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        seconds["warmup" if warmup else "joint"] += time.time() - clock
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            state = {f"router/{k}": v for k, v in router.state_dict().items()}
            state |= optimizer_tensors(optimizer)
            save_tensors(path, state, {"step": step + 1, "seconds": seconds})
    log.close()
    gates.detach()
    summary = finish(
        cfg, teacher, router, macs, data, validation, z, encoder(validation.captions), seconds
    )
    path.unlink()
    return summary


def finish(
    cfg: Config,
    teacher: Teacher,
    router: PromptRouter,
    macs: MacsModel,
    data: CaptionedImages,
    validation: CaptionedImages,
    z_train: Tensor,
    z_validation: Tensor,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Route every prompt as at test time, make the codes binary, and write the run's results.

    `summary.json` comes last.
    """
    assert cfg.out
    routed = {"train": router.route(z_train).cpu(), "validation": router.route(z_validation).cpu()}
    usage = {
        split: torch.bincount(experts, minlength=cfg.num_experts) / len(experts)
        for split, experts in routed.items()
    }
    codes = meet_budget(router.codes, usage["train"], macs, cfg.budget)
    ratios = macs(codes) / macs.dense  # (N,)
    save_tensors(
        cfg.out / "router.safetensors",
        router.state_dict(),
        {**router.settings(), "prompt_encoder": "minilm"},
    )
    save_tensors(
        cfg.out / "codes.safetensors", {"codes": codes.to(torch.uint8)}, {"depth": cfg.depth}
    )
    write_json(
        cfg.out / "assignments.json", {split: experts.tolist() for split, experts in routed.items()}
    )
    experts = []
    for i in range(cfg.num_experts):
        captions = [
            data.captions[row] for row in (routed["train"] == i).nonzero().flatten().tolist()
        ]
        experts.append(
            {
                "id": i,
                "macs_ratio": ratios[i].item(),
                "params": sum(
                    p.numel() for p in cut_expert(teacher.unet, codes[i], macs.space).parameters()
                ),
                "usage_train": usage["train"][i].item(),
                "words": frequent_words(captions, data.captions),
            }
        )
    summary = {
        "target": cfg.target,
        "teacher": cfg.teacher,
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
    write_json(cfg.out / "summary.json", summary)
    return summary


def frequent_words(captions: Sequence[str], everything: Sequence[str], count: int = 6) -> list[str]:
    """The most frequent of the words that are at least twice as common here as in the target."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    def shares(lines: Sequence[str]) -> dict[str, float]:
        words = Counter(w for line in lines for w in set(re.findall(r"[a-z]{3,}", line.lower())))
        return {word: n / len(lines) for word, n in words.most_common()}

    overall = shares(everything)
    return [
        word
        for word, n in shares(captions).items()
        if n > 2 * overall[word] and word not in ENGLISH_STOP_WORDS
    ][:count]


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


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    print_table(train(cfg))


if __name__ == "__main__":
    command_line(main)
