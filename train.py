"""The pruning stage: Sec. 3.3.1 and App. E.2, Eq. 15.

    python train.py                          # emoji, pocket teacher, 0.78 of its MACs, 8 experts
    python train.py --budget 0.5 --num-experts 4
    python train.py --preset coco-base --data-dir D  # coco-small, cc3m-base, cc3m-small, coco-sdxl
    torchrun --nproc-per-node 8 train.py --preset coco-base --data-dir D --precision bf16

Warm-up: each prompt is pruned by its own predicted architecture e' (Eq. 12). Then the codes start
from the embeddings' clusters, and are trained jointly with the predictor, prompts being assigned by
optimal transport. The U-Net's weights stay frozen throughout, and the teacher is the same U-Net
with its gates open. At the end the codes become binary.

`PruningStep.__call__` is the paper's step. Its helpers make it fit on machines: the router's part
is small and sees the whole batch; the U-Net's part is large, and runs on a few prompts at a time,
in one process or in many. The two parts meet only in the gates, (B, D), so the result does not
depend on how a batch is divided.

| symbol | name here | shape |
|---|---|---|
| bold a | `a`, soft gates of each sample; a code of logits is a row of `router.codes` | (B, D) |
| T(A), T_d | `mean_cost`, `T_d` | scalar |
| lambda_res | `lambda_res`: the multiplier that holds the budget, or a constant | scalar |
| dL/da | `dL_da`, L being the image losses, weighted and summed | (B, D) |

What differs from the paper: docs/departures.md#train; `--preset emoji-as-printed` undoes what has a
switch here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import trange

import losses
from common.ahead import ahead, to_device
from common.checkpoint import Checkpoint
from common.errors import command_line
from common.files import MetricsLog, read_json
from common.processes import (
    all_reduce,
    barrier,
    check_agreement,
    local_rows,
    rank,
    stop_processes,
)
from common.randomness import batch_rows, step_generator
from evaluation.tables import print_experts
from gates import gumbel_noise, gumbel_sigmoid
from importance import importance_start
from macs import CostModel, budget_shift
from prune_unet import BlockRecorder, GateHandle, attach_gates
from router import PromptRouter
from run import Setup, as_json, check_resumable, prepare, start_folder, write_results
from settings import Pruning, read_with_preset, resolve
from targets.images import check_target
from teacher.model import Noised, Teacher

TERMS = ["loss", "denoising", "distillation", "resource", "contrastive", "cost_ratio"]
TERMS += ["lambda_res", "perplexity"]
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
        cost: CostModel,
    ) -> None:
        self.cfg, self.teacher, self.router = cfg, teacher, router
        self.gates, self.cost, self.T_d = gates, cost, cfg.budget * cost.dense
        self.blocks = BlockRecorder(teacher.unet)

    def __call__(
        self,
        z: Tensor,
        batch: Noised,
        noise: Tensor,
        *,
        warmup: bool,
        experts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms, scalars. A held budget moves the router to T(A) = T_d first.

        Args:
            z: prompt embeddings of the whole batch, (B, dz).
            batch: noised latents of this process's rows of it (`local_rows`), (b, ...).
            noise: of Gumbel, for the whole batch, (B, D), the same in every process.
            warmup: each prompt is pruned by its own architecture e'.
            experts: of the prompts, (B,); the transport assigns them if absent.
        """
        cfg, router, (B, N) = self.cfg, self.router, (len(z), self.cfg.num_experts)
        e = router(z)  # (B, D), Eq. 4
        if not warmup and experts is None:
            experts = router.assign(  # (B,), Eqs. 7, 20
                e, eps=cfg.eps, iterations=cfg.sinkhorn_iterations, transport=cfg.transport
            )
        logits = e if experts is None else router.codes_of(experts)  # (B, D), Eqs. 8, 21
        shift = self.hold_budget(logits + noise)
        e_prime = gumbel_sigmoid(e + shift, cfg.gumbel_temp, noise=noise)  # (B, D), Eq. 12
        a = gumbel_sigmoid(logits + shift, cfg.gumbel_temp, noise=noise)  # (B, D), Eq. 9
        denoising, distillation, dL_da = self.image_losses(a, batch, experts)  # Eqs. 1, 27
        mean_cost = self.cost(a).mean()  # T(A) = sum_i B_i / B T(a_i)
        resource, lambda_res = self.weighted_resource(mean_cost, a, dL_da)  # Eq. 26
        contrastive = losses.contrastive_loss(z, e_prime, cfg.contrast_temp, cfg.center)  # Eq. 13
        # keys are where the codes started: from then on embeddings have nothing to be trained for
        lambda_cont = 0.0 if cfg.own_keys and not warmup else cfg.lambda_cont
        loss = losses.pruning_loss(  # Eq. 15
            denoising=denoising,
            distillation=distillation,
            resource=resource,
            contrastive=contrastive,
            experts=experts,
            num_experts=N,
            lambda_distill=cfg.lambda_distill,
            lambda_res=lambda_res,
            lambda_cont=lambda_cont,
        )
        return {
            "loss": loss + zero_of_gradient(dL_da, a),
            "denoising": denoising.mean(),
            "distillation": distillation.mean(),
            "resource": resource.abs(),
            "contrastive": contrastive,
            "cost_ratio": mean_cost / self.cost.dense,
            "lambda_res": lambda_res,
            "perplexity": perplexity(torch.arange(B).to(e.device) if experts is None else experts),
        }

    def hold_budget(self, noisy_logits: Tensor) -> Tensor:
        """Move the router so that T(A) = T_d: by how much e and all codes have risen, a scalar."""
        if not self.cfg.hold_budget:
            return noisy_logits.new_zeros(())
        shift = budget_shift(noisy_logits.detach(), self.cfg.gumbel_temp, self.cost, self.T_d)
        self.router.shift(shift)
        return shift

    def weighted_resource(
        self, mean_cost: Tensor, a: Tensor, dL_da: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The resource loss and lambda_res: the paper's constant, or a Lagrange multiplier.

        Where the budget is held, R = |log T / T_d| is 0 and has no slope; log T / T_d has one. Its
        multiplier is the one for which a step along Eq. 15's gradient keeps T(A).
        """
        if not self.cfg.hold_budget:
            lambda_res = mean_cost.new_full((), self.cfg.lambda_res)
            return losses.resource_loss(mean_cost, self.T_d), lambda_res
        trained = [p for p in self.router.parameters() if p.requires_grad]

        how: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        log_ratio = torch.log(mean_cost / self.T_d)
        image = torch.autograd.grad((dL_da * a).sum(), trained, **how)
        cost = torch.autograd.grad(log_ratio, trained, **how)
        return log_ratio, losses.budget_multiplier(image, cost)

    def image_losses(
        self, a: Tensor, batch: Noised, experts: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Denoising and distillation losses, and their weighted sum's gradient for the gates.

        Args:
            a: gates of the whole batch, (B, D).
            batch: noised latents, (b, ...), of the batch's rows `rows`.
            experts: of each sample, (B,); None in the warm-up.
            rows: row numbers in the whole batch, (b,); this process's (`local_rows`) if absent.

        Returns:
            (B,), (B,) and (B, D), without gradient, summed over micro-batches and processes.
        """
        cfg, unet = self.cfg, self.teacher.unet
        rows = local_rows(len(a)) if rows is None else rows
        weights = losses.sample_weights(experts, cfg.num_experts, len(a)).to(a)  # (B,)
        # as a sample is one among many, so is its gradient
        scale = losses.loss_scale(next(unet.parameters()).dtype) * len(a)
        denoising, distillation = torch.zeros_like(weights), torch.zeros_like(weights)
        dL_da = torch.zeros_like(a)
        for part in torch.arange(len(rows)).split(cfg.micro_batch):
            now, inputs = rows[part].to(a.device), batch.part(part)
            teacher_output, teacher_blocks = None, []
            if cfg.distill:
                self.gates.set_gates(None)
                with torch.no_grad():
                    teacher_output = unet(**inputs.inputs()).sample
                teacher_blocks = self.blocks.take()
            gates = a[now].detach().requires_grad_()
            self.gates.set_gates(gates)  # until after backward, which checkpointing needs
            output = unet(**inputs.inputs()).sample
            blocks = self.blocks.take()
            image = losses.denoising_loss(output, inputs.target)  # (b,)
            denoising[now] = image.detach()
            if teacher_output is not None:
                distance = losses.distillation_loss(
                    output,
                    teacher_output,
                    blocks,
                    teacher_blocks,
                    normalise=cfg.normalise_blocks,
                    block_weight=cfg.block_weight,
                )
                distillation[now] = distance.detach()
                image = image + cfg.lambda_distill * distance
            (scale * (weights[now] * image).sum()).backward()
            self.gates.set_gates(None)
            assert gates.grad is not None
            dL_da[now] = gates.grad / scale
        all_reduce(denoising, distillation, dL_da)
        return denoising, distillation, dL_da

    def detach(self) -> None:
        """Remove the hooks."""
        self.gates.detach()
        self.blocks.detach()


def zero_of_gradient(gradient: Tensor, a: Tensor) -> Tensor:
    """Zero, whose gradient with respect to `a` is `gradient`; a scalar.

    The image losses' graph through the U-Net is gone by the time of the step's backward pass. This
    term carries them on into the router.
    """
    return (gradient * (a - a.detach())).sum()


def perplexity(architectures: Tensor) -> Tensor:
    """The exponential of the entropy of how often each architecture is used, (B,) -> scalar."""
    share = torch.bincount(architectures) / len(architectures)
    return torch.special.entr(share).sum().exp()


# ---- all steps ----


class Batch(NamedTuple):
    """What a step is given: see `PruningStep`."""

    z: Tensor
    noised: Noised
    noise: Tensor
    experts: Tensor | None


def batches(setup: Setup, steps: range, clusters: Tensor | None = None) -> Iterator[Batch]:
    """The batch of each step, a function of (seed, step); the next is prepared while one runs.

    Args:
        clusters: the expert of each training row, (rows,), if it is not learned.
    """
    cfg, z, device = setup.cfg, setup.z, setup.teacher.device
    local, D = local_rows(cfg.batch_size), setup.space.size

    def make(step: int) -> Batch:
        generator = step_generator(cfg.seed, "train", step)
        rows = batch_rows(len(z), cfg.batch_size, cfg.seed, step)
        noised = setup.noised(rows[local], generator, local)
        noise = gumbel_noise((len(rows), D), generator=generator)
        given = None if clusters is None or step < cfg.warmup_steps else clusters[rows]
        experts = None if given is None else to_device(given, device)
        return Batch(to_device(z[rows], device), noised, to_device(noise, device), experts)

    return ahead(make, steps, device)


def train(cfg: Pruning) -> dict[str, Any]:
    """Run (or go on with) the pruning stage.

    Gives the run's summary. Raises `UserError` for what the user can mend.
    """
    cfg = resolve(cfg)
    check_target(cfg.target)
    assert cfg.out
    settings = as_json(cfg)
    check_resumable(cfg.out, settings)
    if (cfg.out / "summary.json").exists():
        (cfg.out / CHECKPOINT).unlink(missing_ok=True)  # where a kill came just before
        print(f"{cfg.out} is complete; --out names another folder")
        return read_json(cfg.out / "summary.json")
    setup = prepare(cfg)
    if rank() == 0:
        start_folder(setup, settings)
    router, seconds = optimise(setup)
    if rank() == 0:
        write_results(setup, router, seconds)
        if setup.data.skipped or setup.data.notes:
            print(setup.data.report())
        (cfg.out / CHECKPOINT).unlink()
    stop_processes()
    return read_json(cfg.out / "summary.json")


def optimise(setup: Setup, clusters: Tensor | None = None) -> tuple[PromptRouter, dict[str, float]]:
    """Train a router, from the last checkpoint: the router and the seconds of each phase.

    For controls, `clusters` says the expert of each training row, (rows,); it is then not learned.
    Raises `UserError` where the loss is no longer finite.
    """
    cfg, teacher, z = setup.cfg, setup.teacher, setup.z
    assert cfg.out
    steps, router = cfg.warmup_steps + cfg.joint_steps, setup.start_router()
    optimizer = optimizer_of(router, cfg)
    same = {"data": setup.identities.get("train"), "teacher": teacher.identity}
    parts: dict[str, Any] = {"router": router, "optimizer": optimizer}
    checkpoint = Checkpoint(cfg.out / CHECKPOINT, parts, same, cfg.save_minutes)
    meta = checkpoint.restore()
    first = meta.get("step", 0)
    check_agreement(first, "the step of their checkpoints")
    seconds = meta.get("seconds", {"encode": setup.seconds, "warmup": 0.0, "joint": 0.0})
    if not meta and cfg.importance_start:
        clock = time.time()
        router.start(*(start.to(teacher.device) for start in importance_start(setup)))
        seconds["importance"] = time.time() - clock
    barrier()  # all have read the checkpoint before it is written again
    step_of = PruningStep(cfg, teacher, router, attach_gates(teacher.unet, setup.space), setup.cost)
    log = MetricsLog(cfg.out / "metrics.csv", TERMS, first) if rank() == 0 else None
    prepared = batches(setup, range(first, steps), clusters)
    bar = trange(first, steps, initial=first, total=steps, desc="pruning", disable=rank() > 0)
    try:
        for step in checkpoint.steps(bar, seconds=seconds):
            clock, warmup = time.time(), step < cfg.warmup_steps
            if step == cfg.warmup_steps:
                router.start_codes(z, seed=cfg.seed, transport=cfg.transport, clusters=clusters)
            # keys are fixed in the joint phase; so that routing is too, W stays as it is
            router.predictor.weight.requires_grad_(warmup or not cfg.own_keys)
            batch = next(prepared)
            terms = step_of(
                batch.z, batch.noised, batch.noise, warmup=warmup, experts=batch.experts
            )
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            found = torch.stack([terms[name].detach() for name in TERMS])  # copied at once
            values = dict(zip(TERMS, found.tolist(), strict=True))
            advice = "try a lower --lr or --precision fp32, and another --out"
            checkpoint.guard(step, values["loss"], router.parameters(), advice)
            rise, fall = (step + 1) / max(1, cfg.lr_warmup), steps - step
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1.0, rise, fall / max(1.0, cfg.lr_decay * steps))
            optimizer.step()
            seconds["warmup" if warmup else "joint"] += time.time() - clock
            if log is not None:
                log.write(step, values)
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        if log is not None:
            checkpoint.save(step=steps, seconds=seconds)
    finally:
        step_of.detach()
        if log is not None:
            log.close()
    return router, seconds


def optimizer_of(router: PromptRouter, cfg: Pruning) -> torch.optim.AdamW:
    """AdamW; a group's `rate` is its learning rate after the warm-up of rates."""
    slow, fast = [router.predictor.weight], [router.predictor.bias, router.codes]
    return torch.optim.AdamW(
        [{"params": slow, "rate": cfg.predictor_rate * cfg.lr}, {"params": fast, "rate": cfg.lr}]
    )


def main() -> None:
    cfg = read_with_preset(Pruning, sys.argv[1:], __doc__)
    if cfg.dry_run:
        from bench.plan import plan

        print(plan(resolve(cfg)))
        return
    summary = train(cfg)
    if rank() == 0:
        print_experts(summary)


if __name__ == "__main__":
    command_line(main, goes_on=True)
