"""Losses of the pruning and the fine-tuning stage: Eqs. 1, 13-15, 25-31.

Image losses give one value for each sample, (B,), so that Eq. 15 can weight them by expert.

| symbol | name here | shape |
|---|---|---|
| z, bold e' | `z`, `e_prime`: prompt embeddings, architecture vectors | (B, dz), (B, D) |
| log r, log s | `similarity_distribution` of z, of bold e' | (B, B) |
| tau | `contrast_temp` | scalar |
| T(A), T_d | `cost`, `budget`: MACs or seconds | scalar |
| B^(i) | `counts`: how often i is in `experts` | (N,) |
| eps (Eq. 1), theta | not here: the caller passes `prediction` and `target` | - |

What differs from the paper: docs/departures.md#losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def loss_scale(dtype: torch.dtype) -> float:
    """What a loss is multiplied by before its backward pass, and gradients divided by after it.

    Half precision has no room for gradients as small as those of one unit.
    """
    return 1024.0 if dtype == torch.float16 else 1.0


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample, (B, ...) -> (B,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def denoising_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """||prediction - target||^2 of each sample, (B, C, h, w) -> (B,) [Eq. 1]"""
    return per_sample_mse(prediction, target)


def similarity_distribution(vectors: Tensor, contrast_temp: float = 0.03) -> Tensor:
    """log r or log s: row i: log-softmax of cosine(x_i, x_j) / tau, (B, D) -> (B, B) [Eq. 14]"""
    unit = F.normalize(vectors.float(), dim=-1)  # (B, D)
    return F.log_softmax(unit @ unit.T / contrast_temp, dim=1)  # (B, B)


def contrastive_loss(
    z: Tensor, e_prime: Tensor, contrast_temp: float = 0.03, center: bool = True
) -> Tensor:
    """Binary cross-entropy of the architectures' similarities s under the prompts' r [Eq. 13]

    -1/B^2 sum_ij r_ij log s_ij + (1 - r_ij) log(1 - s_ij), a scalar; docs/departures.md#losses
    explains the sign.

    Args:
        z: prompt embeddings, (B, dz); no gradient flows to them.
        e_prime: architecture vectors, (B, D).
        contrast_temp: tau; the paper's value is 0.03.
        center: compare e' minus its mean over the batch, as routing does; otherwise e' itself,
            exactly as printed.
    """
    if center:
        e_prime = e_prime - e_prime.mean(0)
    r = similarity_distribution(z.detach(), contrast_temp).exp()  # (B, B)
    log_s = similarity_distribution(e_prime, contrast_temp)  # (B, B)
    # log(1 - s), where s stops short of 1: a prompt that resembles only itself has s_ii = 1
    log_not_s = torch.log1p(-log_s.exp().clamp(max=1 - 1e-6))  # (B, B)
    return -(r * log_s + (1 - r) * log_not_s).mean()


def resource_loss(cost: Tensor, budget: float) -> Tensor:
    """R(x, y) = log(max(x, y) / min(x, y)) = |log x / y|, a scalar [Eq. 26] [Eq. 31]

    Args:
        cost: T(A), the mean over the batch, a scalar.
        budget: T_d, in the same unit.
    """
    return torch.log(cost / budget).abs()


def budget_multiplier(image: Sequence[Tensor], cost: Sequence[Tensor]) -> Tensor:
    """lambda_res as a Lagrange multiplier: -<g, h> / <h, h>, a scalar >= 0.

    With g the gradient of the image losses and h that of log T(A), g + lambda_res h is at right
    angles to h: a small step along it neither raises nor lowers T.

    Args:
        image, cost: g and h, a tensor for each trained parameter.
    """
    pairs = list(zip(image, cost, strict=True))
    gh = torch.stack([(g * h).sum() for g, h in pairs]).sum()
    hh = torch.stack([h.square().sum() for _, h in pairs]).sum()
    return (-gh / hh.clamp(min=1e-30)).clamp(min=0)


def output_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||teacher - student||^2 of the U-Nets' outputs, (B, C, h, w) -> (B,) [Eq. 27]"""
    return per_sample_mse(student, teacher.detach())


def block_distillation_loss(
    student_blocks: Sequence[Tensor], teacher_blocks: Sequence[Tensor], normalise: bool = True
) -> Tensor:
    """||teacher^b - student^b||^2 over blocks, lists of (B, C_b, h_b, w_b) -> (B,) [Eq. 28]

    Args:
        normalise: divide each by ||teacher^b||^2 and take the mean over blocks; otherwise their
            plain sum, exactly as printed.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(student_blocks) != len(teacher_blocks):
        lengths = f"{len(student_blocks)} student blocks but {len(teacher_blocks)} teacher blocks"
        raise ValueError(lengths)
    pairs = zip(student_blocks, teacher_blocks, strict=True)
    errors = torch.stack([per_sample_mse(s, t.detach()) for s, t in pairs])  # (blocks, B)
    if not normalise:
        return errors.sum(0)
    squares = torch.stack([per_sample_mse(t.detach(), torch.zeros_like(t)) for t in teacher_blocks])
    return (errors / squares.clamp(min=1e-12)).mean(0)  # (blocks, B) -> (B,)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    student_blocks: Sequence[Tensor],
    teacher_blocks: Sequence[Tensor],
    normalise: bool = True,
    block_weight: float = 1.0,
) -> Tensor:
    """Output level plus block level, (B,) [Eq. 29]

    Args:
        normalise: as in Eq. 28.
        block_weight: of the block level; the paper's value is 1.
    """
    loss = output_distillation_loss(student, teacher)  # (B,)
    if block_weight:
        blocks = block_distillation_loss(student_blocks, teacher_blocks, normalise)  # (B,)
        loss = loss + block_weight * blocks
    return loss


def finetuning_loss(
    denoising: Tensor, distillation: Tensor, alpha_ddpm: float = 1e-4, alpha_distill: float = 1.0
) -> Tensor:
    """alpha_DDPM L_DDPM + alpha_distill L_distill, batch mean: (B,), (B,) -> scalar [Eq. 30]"""
    return (alpha_ddpm * denoising + alpha_distill * distillation).mean()


def sample_weights(experts: Tensor | None, num_experts: int, batch_size: int) -> Tensor:
    """Weight of each sample in Eq. 15's image losses: 1 / (N B^(i)), or 1 / B in warm-up, (B,).

    Each expert has the total weight 1 / N, however many samples it got.

    Args:
        experts: of each sample, (B,), int64, in [0, N); None in the warm-up.
        num_experts: N.
        batch_size: B.
    """
    if experts is None:
        return torch.full((batch_size,), 1 / batch_size)
    counts = torch.bincount(experts, minlength=num_experts)  # (N,)
    return 1 / (num_experts * counts[experts]).float()


def pruning_loss(
    *,
    denoising: Tensor,
    distillation: Tensor,
    resource: Tensor,
    contrastive: Tensor,
    experts: Tensor | None,
    num_experts: int,
    lambda_distill: float = 0.2,
    lambda_res: float | Tensor = 2.0,
    lambda_cont: float = 100.0,
) -> Tensor:
    """Expert-wise mean of the image losses + resource + contrastive, a scalar [Eq. 15] [Eq. 25]

    Args:
        denoising, distillation: per-sample losses, (B,).
        resource, contrastive: scalars.
        experts: of each sample, (B,), int64; None in the warm-up (a plain mean).
        num_experts: N, the number of codes.
        lambda_distill, lambda_res, lambda_cont: weights; the defaults are the paper's.
    """
    image = denoising + lambda_distill * distillation  # (B,)
    weights = sample_weights(experts, num_experts, len(image)).to(image)  # (B,)
    mean = (weights * image).sum()
    return mean + lambda_res * resource.to(mean.dtype) + lambda_cont * contrastive
