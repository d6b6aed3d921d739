"""The pruning stage: Sec. 3.3.1 and App. E.2, Eq. 15.

    python train.py                          # emoji, pocket teacher, 0.78 of its MACs, 8 experts
    python train.py --budget 0.5 --num-experts 4
    python train.py --preset coco-base --data-dir D  # coco-small, cc3m-base, cc3m-small, coco-sdxl
    torchrun --nproc-per-node 8 train.py --preset coco-base --data-dir D --precision bf16

Warm-up: each prompt is pruned by its own predicted architecture e' (Eq. 12). Then the codes start
from the embeddings' clusters, and codes and predictor are trained jointly, prompts being assigned
by optimal transport. The U-Net's weights stay frozen throughout, and the teacher is the same U-Net
with its gates open. At the end the codes become binary. A killed run goes on with the same command.

The router's part of a step (assignment, resource and contrastive loss) is small and sees the whole
batch. The U-Net's part is large, and runs on a few prompts at a time, on one machine or on many.
The two parts meet only in the gates, (B, D). So a result does not depend on the number of
micro-batches or GPUs that a batch is divided among.

| symbol | name here | shape |
|---|---|---|
| bold a | `a`, soft gates of each sample; a code of logits is a row of `router.codes` | (B, D) |
| T(A), T_d | `mean_macs`, `target` | scalar |
| lambda_res | `lambda_res`: the multiplier that holds the budget, or a constant | scalar |
| dL/da | `gate_gradient`, L being the image losses, weighted and summed | (B, D) |

Departures from the paper, each with a switch; `--as-printed` turns all of them off:
- `--hold-budget`. T(A) equals T_d in every step: one number is added to b, the part that all logits
  share, and lambda_res is the Lagrange multiplier for which Eq. 15's gradient keeps T(A). With all
  losses as printed the soft gates end at 0.80 instead of 0.5, and the rest is cut untrained.
- `--importance-start`. Logits start at the units' Taylor importance, and the predictor's weights at
  a regression of that importance on the prompt, so that e is the prompt's architecture from the
  first step. The paper does not say where they start.
- `--sample-noise`, `--common-noise`. Eq. 9's noise is one for each sample, not each code; in the
  contrastive loss it is one for all: noise of their own makes e' dissimilar even if all e agree.
- `--caption-dropout`. Some captions are empty, as guidance will ask the experts about them.
- `--block-weight`. Pruning distils from the teacher's output alone. Its blocks' outputs would be an
  aim of their own: an expert may compute the same image by way of other features.
- `--transport-rows`. The transport balances a batch among as many prompts as the paper's batch has;
  forced on the 64 of the embedded default alone, equal shares contradict the nearest code.
- `--lr`, `--lr-decay`, `--predictor-rate`, `--weight-decay`: far fewer and larger steps than the
  paper's 3000 at 2e-4, which move a logit by 0.6 at most; a rate that falls to 0; for the
  predictor's weights the paper's, since larger steps bury the regression in noise; no decay to 0.
- Latents are the autoencoder's means instead of fresh samples from its posterior (no switch).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

import losses
from common.checkpoint import Checkpoint
from common.errors import command_line
from common.files import MetricsLog, read_json, write_json
from common.processes import add_up, own_rows, rank, stop_processes, wait
from common.randomness import batch_rows, step_generator
from common.runs import as_json, claim
from evaluation.tables import print_experts
from gates import gumbel_noise, gumbel_sigmoid
from macs import MacsModel, budget_shift
from plan import plan
from problem import Problem, importance_start, prepare, write_results
from prune_unet import GateHandle, attach_gates
from router import PromptRouter
from settings import FREE, Pruning, read_pruning, resolve
from teacher.blocks import BlockRecorder
from teacher.model import Noised, Teacher

TERMS = ["loss", "denoising", "distillation", "resource", "contrastive", "macs_ratio"]
TERMS += ["lambda_res", "perplexity"]
HALF_SCALE = 1024.0  # multiplies a sample's loss in half precision; gradients are divided by it
CHECKPOINT = "checkpoint.safetensors"


# ---- one step ----


class PruningStep:
    """What one training step computes: Eq. 15 for one batch, as a dictionary of terms."""

    def __init__(
        self,
        cfg: Pruning,
        teacher: Teacher,
        router: PromptRouter,
        gates: GateHandle,
        macs: MacsModel,
    ) -> None:
        self.cfg, self.teacher, self.router = cfg, teacher, router
        self.gates, self.macs, self.target = gates, macs, cfg.budget * macs.dense
        self.blocks = BlockRecorder(teacher.unet)
        # half precision has no room for gradients as small as those of a sample among many
        half = next(teacher.unet.parameters()).dtype == torch.float16
        self.scale = HALF_SCALE * cfg.batch_size if half and cfg.batch_size else 1.0

    def __call__(
        self,
        z: Tensor,
        batch: Noised,
        generator: torch.Generator,
        *,
        warmup: bool,
        own: Tensor | None = None,
        others: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms, scalars. With a held budget, moves b so that T(A) = T_d first.

        Args:
            z: prompt embeddings of the whole batch, (B, dz).
            batch: noised latents of the rows `own`, (b, ...).
            generator: the step's randomness, the same in every process.
            warmup: each prompt is pruned by its own architecture e'.
            own: numbers of this process's rows of the batch, (b,); all if absent.
            others: embeddings of further prompts for the transport, (P, dz).
            experts: of the prompts, (B,); the transport assigns them if absent.
        """
        cfg, B = self.cfg, len(z)
        if not warmup and experts is None:
            with torch.no_grad():
                further = None if others is None else self.router(others)
                balance = (cfg.eps, cfg.sinkhorn_iterations, cfg.transport)
                experts, _ = self.router.assign(self.router(z), further, *balance)
        noise, contrast_noise = self.noise(B, experts, generator)
        if cfg.hold_budget:
            noisy = self.logits(z, experts).detach() + noise
            self.router.shift(budget_shift(noisy, cfg.gumbel_temp, self.macs, self.target))
        a = gumbel_sigmoid(self.logits(z, experts), cfg.gumbel_temp, noise=noise)  # (B, D)
        e_prime = gumbel_sigmoid(self.router(z), cfg.gumbel_temp, noise=contrast_noise)  # (B, D)
        contrastive = losses.contrastive_loss(z, e_prime, cfg.contrast_temp, cfg.center)
        weights = losses.sample_weights(experts, cfg.num_experts, B).to(a)  # (B,)
        rows = torch.arange(B) if own is None else own
        denoising, distillation, gate_gradient = self.image_losses(a.detach(), weights, batch, rows)
        mean_macs = self.macs(a).mean()  # T(A) = sum_i B_i / B T(a_i)
        resource = losses.resource_loss(mean_macs, self.target)
        lambda_res = torch.tensor(cfg.lambda_res)
        if cfg.hold_budget:  # R = |log T / T_d| is 0 and has no gradient; without | | it has one
            resource = torch.log(mean_macs / self.target)
            (price,) = torch.autograd.grad(resource, a, retain_graph=True)  # (B, D)
            lambda_res = losses.budget_multiplier(gate_gradient, price, a.detach(), cfg.gumbel_temp)
        lambda_cont = 0.0 if cfg.own_keys and not warmup else cfg.lambda_cont
        terms = (denoising, distillation, resource, contrastive)
        lambdas = (cfg.lambda_distill, lambda_res, lambda_cont)
        loss = losses.pruning_loss(*terms, experts, cfg.num_experts, *lambdas)
        # The U-Net's graph is gone by now. This term is zero, and its gradient with respect to a is
        # `gate_gradient`: through it, backward carries the image losses on into the router.
        loss = loss + (gate_gradient * (a - a.detach())).sum()
        share = torch.full((B,), 1 / B)  # of the prompts, for each architecture: (B,) or (N,)
        if experts is not None:
            share = torch.bincount(experts.cpu(), minlength=cfg.num_experts) / B
        return {
            "loss": loss,
            "denoising": denoising.mean(),
            "distillation": distillation.mean(),
            "resource": resource.abs(),
            "contrastive": contrastive,
            "macs_ratio": mean_macs / self.macs.dense,
            "lambda_res": lambda_res,
            "perplexity": torch.exp(-(share * share.clamp(min=1e-12).log()).sum()),
        }

    def logits(self, z: Tensor, experts: Tensor | None) -> Tensor:
        """Logits of each sample's gates: e in the warm-up, afterwards its code, (B, D)."""
        return self.router(z) if experts is None else self.router.codes[experts]

    def noise(
        self, B: int, experts: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Gumbel noise of the gates, (B, D), and of e' in the contrastive loss, (1 or B, D)."""
        cfg, (N, D) = self.cfg, self.router.own.shape
        device = self.router.own.device
        by_prompt = gumbel_noise((B, D), generator=generator, device=device)
        common = gumbel_noise((1, D), generator=generator, device=device)
        noise = by_prompt
        if experts is not None and not cfg.sample_noise:
            noise = gumbel_noise((N, D), generator=generator, device=device)[experts]
        return noise, common if cfg.common_noise else by_prompt

    def image_losses(
        self, a: Tensor, weights: Tensor, batch: Noised, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Denoising and distillation losses, and their weighted sum's gradient for the gates.

        Args:
            a: gates of the whole batch, (B, D), without gradient.
            weights: of each sample in Eq. 15, (B,).
            batch, rows: noised latents of this process's rows, (b, ...), and those rows, (b,).

        Returns:
            (B,), (B,) and (B, D), summed over the micro-batches and processes.
        """
        cfg, unet = self.cfg, self.teacher.unet
        denoising, distillation = torch.zeros_like(weights), torch.zeros_like(weights)
        gate_gradient = torch.zeros_like(a)
        for part in torch.arange(len(rows)).split(cfg.micro_batch or len(a)):
            now, inputs = rows[part].to(a.device), batch.part(part)
            teacher_output, teacher_blocks = None, []
            if cfg.distill:
                self.gates.set_gates(None)
                with torch.no_grad():
                    teacher_output = unet(**inputs.inputs()).sample
                teacher_blocks = self.blocks.take()
            gates = a[now].requires_grad_()
            self.gates.set_gates(gates)  # until after backward, which checkpointing needs
            output = unet(**inputs.inputs()).sample
            blocks = self.blocks.take()
            image = losses.denoising_loss(output, inputs.target)  # (b,)
            denoising[now] = image.detach()
            if teacher_output is not None:
                how = (cfg.normalise_blocks, cfg.block_weight)
                distance = losses.distillation_loss(
                    output, teacher_output, blocks, teacher_blocks, *how
                )
                distillation[now] = distance.detach()
                image = image + cfg.lambda_distill * distance
            (self.scale * (weights[now] * image).sum()).backward()
            self.gates.set_gates(None)
            assert gates.grad is not None
            gate_gradient[now] = gates.grad / self.scale
        add_up(denoising, distillation, gate_gradient)
        return denoising, distillation, gate_gradient


# ---- all steps ----


def train(cfg: Pruning) -> dict[str, Any]:
    """Run (or go on with) the pruning stage.

    Gives the run's summary. Raises `UserError` for what the user can mend.
    """
    cfg = resolve(cfg)
    assert cfg.out
    settings = as_json(cfg)
    claim(cfg.out, settings, free=FREE)
    if (cfg.out / "summary.json").exists():
        (cfg.out / CHECKPOINT).unlink(missing_ok=True)  # where a kill came just before
        print(f"{cfg.out} is complete; --out names another folder")
        return read_json(cfg.out / "summary.json")
    problem = prepare(cfg)
    if rank() == 0:
        write_json(cfg.out / "config.json", settings)
    router, seconds = optimise(problem)
    if rank() == 0:
        write_results(cfg, problem, router, seconds)
        if problem.data.skipped or problem.data.notes:
            print(problem.data.report())
        (cfg.out / CHECKPOINT).unlink()
    stop_processes()
    return read_json(cfg.out / "summary.json")


def optimise(
    problem: Problem, given: Tensor | None = None
) -> tuple[PromptRouter, dict[str, float]]:
    """Train a router, from the last checkpoint: the router and the seconds of each phase.

    For controls, `given` has the expert of each training row, (rows,), which is then not learned.
    Raises `UserError` where the loss is no longer finite.
    """
    cfg, teacher, z = problem.cfg, problem.teacher, problem.z
    assert cfg.out and cfg.batch_size and cfg.lr
    assert cfg.warmup_steps is not None and cfg.joint_steps and cfg.lr_warmup is not None
    steps = cfg.warmup_steps + cfg.joint_steps
    router = problem.start_router()
    optimizer = torch.optim.AdamW(
        [
            {"params": [router.predictor.weight], "rate": cfg.predictor_rate * cfg.lr},
            {"params": [router.predictor.bias, router.own], "rate": cfg.lr},
        ],
        weight_decay=cfg.weight_decay,
    )
    checkpoint = Checkpoint(cfg.out / CHECKPOINT, {"router": router, "optimizer": optimizer})
    meta = checkpoint.restore()
    first = meta.get("step", 0)
    seconds = meta.get("seconds", {"encode": problem.seconds, "warmup": 0.0, "joint": 0.0})
    if not meta and cfg.importance_start:
        clock = time.time()
        router.start(*(start.to(teacher.device) for start in importance_start(problem)))
        seconds["importance"] = time.time() - clock
    wait()  # all have read the checkpoint before it is written again
    gates = attach_gates(teacher.unet, problem.space)
    step_of = PruningStep(cfg, teacher, router, gates, problem.macs)
    log = MetricsLog(cfg.out / "metrics.csv", TERMS, first) if rank() == 0 else None
    own = own_rows(cfg.batch_size)
    bar = trange(first, steps, initial=first, total=steps, desc="pruning", disable=rank() > 0)
    try:
        for step in bar:
            clock = time.time()
            warmup = step < cfg.warmup_steps
            if step == cfg.warmup_steps and cfg.num_experts > 1:
                router.start_codes(z, seed=cfg.seed, transport=cfg.transport, given=given)
            # keys are fixed in the joint phase; so that routing is too, W stays as it is
            router.predictor.weight.requires_grad_(warmup or not cfg.own_keys)
            generator = step_generator(cfg.seed, "train", step)
            rows = batch_rows(len(z), cfg.batch_size, cfg.seed, step)
            others = torch.randperm(len(z), generator=generator)
            others = others[: max(0, cfg.transport_rows - len(rows))]
            batch = problem.noised(rows[own], generator, own, cfg.caption_dropout)
            terms = step_of(
                z[rows].to(teacher.device),
                batch,
                generator,
                warmup=warmup,
                own=own,
                others=z[others].to(teacher.device),
                experts=None if warmup or given is None else given[rows].to(teacher.device),
            )
            values = {name: terms[name].item() for name in TERMS}
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            advice = "try a lower --lr or --precision fp32, and another --out"
            checkpoint.guard(step, values["loss"], router.parameters(), advice)
            rise = (step + 1) / max(1, cfg.lr_warmup)
            fall = (steps - step) / max(1.0, cfg.lr_decay * steps)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1.0, rise, fall)
            optimizer.step()
            seconds["warmup" if warmup else "joint"] += time.time() - clock
            if log is None:
                continue
            log.write(step, values)
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
                checkpoint.save(step=step + 1, seconds=seconds)
    finally:
        gates.detach()
        step_of.blocks.detach()
        if log is not None:
            log.close()
    return router, seconds


def main() -> None:
    cfg = read_pruning(sys.argv[1:], __doc__)
    if cfg.dry_run:
        print(plan(resolve(cfg)))
        return
    summary = train(cfg)
    if rank() == 0:
        print_experts(summary)


if __name__ == "__main__":
    command_line(main)
