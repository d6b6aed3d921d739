"""One step of the pruning stage: Eq. 15 of one batch, and how its gradient is put together.

The router's part (assignment, resource and contrastive loss) is small and sees the whole batch. The
U-Net's part is large, and runs on a few prompts at a time, on one machine or on many. They meet in
one place: the gates, (B, D). The U-Net's part ends with its gradient with respect to them, which is
summed over the micro-batches and processes and handed to the router's part. So accumulating over
micro-batches, or sharing a batch out among GPUs, changes no result (tests/test_train.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import losses
from gates import gumbel_sigmoid
from macs import MacsModel
from processes import add_up
from prune_unet import BlockRecorder, GateHandle
from router import PromptRouter
from teacher import Noised, Teacher

if TYPE_CHECKING:
    from train import Config

TERMS = ("loss", "denoising", "distillation", "resource", "contrastive", "macs_ratio", "usage")
HALF_SCALE = 1024.0  # of a sample's loss in half precision, undone in its gradient


class PruningStep:
    """What one training step computes: Eq. 15 for one batch, as a dictionary of terms.

    The router's part sees the whole batch. The U-Net's part runs on this process's rows, a
    micro-batch at a time, forward and backward, and leaves the gradient with respect to the gates:
    the one thing in which the two parts meet.
    """

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
        # half precision has no room for gradients as small as those of a sample among many
        half = next(teacher.unet.parameters()).dtype == torch.float16
        self.scale = HALF_SCALE * cfg.batch_size if half and cfg.batch_size else 1.0

    def __call__(
        self,
        z: Tensor,
        batch: Noised,
        draw: torch.Generator,
        *,
        warmup: bool,
        own: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms, scalars.

        Args:
            z: prompt embeddings of the whole batch, (B, dz).
            batch: noised latents of the rows `own`, (b, ...).
            draw: the step's randomness, the same in every process.
            warmup: each prompt is pruned by its own architecture e'.
            own: this process's rows of the batch, (b,); all if absent.
        """
        cfg, B = self.cfg, len(z)
        e = self.router(z)  # (B, D)
        e_prime = gumbel_sigmoid(e, cfg.gumbel_temp, generator=draw)  # (B, D)
        experts: Tensor | None = None
        a = e_prime  # during warm-up, each prompt has its own architecture
        if not warmup:
            A = gumbel_sigmoid(self.router.codes, cfg.gumbel_temp, generator=draw)  # (N, D)
            experts, a = self.router.assign(
                e, A, eps=cfg.eps, iterations=cfg.sinkhorn_iterations, transport=cfg.transport
            )
        mean_macs = self.macs(a).mean()  # T(A) = sum_i B_i / B T(a_i)
        resource = losses.resource_loss(mean_macs, cfg.budget * self.macs.dense)
        contrastive = losses.contrastive_loss(z, e_prime, cfg.contrast_temp)

        weights = losses.sample_weights(experts, cfg.num_experts, B).to(a)  # (B,)
        rows = torch.arange(B) if own is None else own
        denoising, distillation, slope = self.image_losses(a.detach(), weights, batch, rows)
        loss = losses.pruning_loss(
            denoising,
            distillation,
            resource,
            contrastive,
            experts,
            cfg.num_experts,
            cfg.lambda_distill,
            cfg.lambda_res,
            cfg.lambda_cont,
        )
        loss = loss + (slope * (a - a.detach())).sum()  # zero, with the image losses' gradient
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

    def image_losses(
        self, a: Tensor, weights: Tensor, batch: Noised, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Denoising and distillation losses, and the gradient of their weighted sum.

        Args:
            a: gates of the whole batch, (B, D), without gradient.
            weights: what each sample counts, (B,).
            batch: noised latents of `rows`, (b, ...).
            rows: this process's rows, (b,).

        Returns:
            (B,), (B,) and (B, D), summed over the processes.
        """
        cfg, unet = self.cfg, self.teacher.unet
        denoising, distillation = torch.zeros_like(weights), torch.zeros_like(weights)
        slope = torch.zeros_like(a)
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
                distance = losses.distillation_loss(output, teacher_output, blocks, teacher_blocks)
                distillation[now] = distance.detach()
                image = image + cfg.lambda_distill * distance
            (self.scale * (weights[now] * image).sum()).backward()
            self.gates.set_gates(None)
            assert gates.grad is not None
            slope[now] = gates.grad / self.scale
        add_up(denoising, distillation, slope)
        return denoising, distillation, slope
