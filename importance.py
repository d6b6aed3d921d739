"""Taylor importance of a unit: how much the loss changes when it goes. Where codes start; `sp`.

A layer reads a unit's features h as W h, where W are the weights for that unit. A gate a makes this
W (a h) = (a W) h, so dL/da at a = 1 is the sum of w dL/dw over W: to first order, the change of L
when W goes to zero (Molchanov et al., 2019). A depth gate does the same for a whole branch. So one
backward pass to the gates gives the importance of all units for each sample, and no weight needs a
gradient.

Early and late timesteps have losses of different size. So |dL/da| is averaged over the samples of
an interval of the noise schedule, and the intervals' means are summed; intervals where the
denoising loss is below `LEAST_LOSS` of the highest are left out (Diff-Pruning, Fang et al., 2023,
leaves out timesteps of small loss).

| symbol | name here | shape |
|---|---|---|
| abs dL/da | `Gradients.change`, of each sample | (n, D) |
| its mean over an interval's samples | `interval_means` | (K, INTERVALS, D) |

What differs from the paper, which does not say where codes start: docs/departures.md.

A unit that matters may yet go, if the others of its layer can do its work: `surgeon_scores`.
A layer reads features x with weights W. If unit u goes, and W is solved anew for the units that are
left, as `refit.py` does, its output is off by

    cost(u) = tr(W_u P_uu^-1 W_u^T),    P = (X^T X + lambda)^-1,    W <- W - W_u P_uu^-1 P_u:

(optimal brain surgeon, Hassibi and Stork, 1993). The cheapest unit goes, P and W follow, until none
is left: of two units that do the same work the first costs nothing, the second what both did. To
compare layers, a unit's score is its importance times cost / alone, where alone is the cost if
nothing makes up for it, tr(W_u (X^T X + lambda)_uu W_u^T). Scores do not fall along the order.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import losses
from common.processes import all_reduce, local_rows, rank
from common.randomness import batch_rows, step_generator
from gates import Layer
from prune_unet import attach_gates, gated_module
from refit import solving_dtype
from run import Setup
from settings import Finetuning

INTERVALS = 20  # equal parts of the noise schedule
LEAST_LOSS = 0.05
TAYLOR_BATCHES, START_BATCHES = 16, 32  # of training rows; `START_BATCHES` for the regression of W
START_DEVIATION, START_LIMIT = 1.5, 4.0  # of the logits at the start
START_WEIGHT = 5.0  # factor of W
RIDGE, MOST_RELATIVE = 3.0, 5.0  # of W's regression: ridge, largest relative importance
IMAGES, REFIT_RIDGE = Finetuning().refit_images, Finetuning().ridge  # of a cluster, as a refit's


class Gradients(NamedTuple):
    """What this process's samples say, on the CPU."""

    rows: Tensor  # (n,), of the training split
    interval: Tensor  # (n,), of the noise schedule
    loss: Tensor  # (n,), denoising loss
    change: Tensor  # (n, D), |dL/da| at open gates


def gate_gradients(setup: Setup, batches: int) -> Gradients:
    """|dL/da| at open gates, L the denoising loss, of the samples of some training batches."""
    cfg, teacher, D = setup.cfg, setup.teacher, setup.space.size
    timesteps = teacher.noise_schedule().config.num_train_timesteps
    scale = losses.loss_scale(teacher.dtype)
    local, found = local_rows(cfg.batch_size), []
    gates = attach_gates(teacher.unet, setup.space)
    try:
        bar = range(batches)
        for step in tqdm(bar, desc="Taylor importance", unit="batch", disable=rank() > 0):
            rows = batch_rows(len(setup.z), cfg.batch_size, cfg.seed, step)[local]
            batch = setup.noised(rows, step_generator(cfg.seed, "taylor", step), local)
            for places in torch.arange(len(rows)).split(cfg.micro_batch):
                part = batch.part(places)
                a = torch.ones(len(places), D, device=teacher.device, requires_grad=True)
                gates.set_gates(a)
                loss = losses.denoising_loss(teacher.unet(**part.inputs()).sample, part.target)
                (gradient,) = torch.autograd.grad(scale * loss.sum(), a)  # (b, D)
                interval = part.t * INTERVALS // timesteps
                sample = (interval, loss.detach(), gradient.abs() / scale)
                found.append((rows[places], *(value.cpu() for value in sample)))
    finally:
        gates.detach()
    return Gradients(*(torch.cat(part) for part in zip(*found, strict=True)))


def summed(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors' sums over the processes, on the CPU."""
    moved = [tensor.to(device) for tensor in tensors]
    all_reduce(*moved)
    return [tensor.cpu() for tensor in moved]


def interval_means(
    found: Gradients, clusters: Tensor, K: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean |dL/da| of each cluster in each interval, (K, INTERVALS, D), and which intervals count.

    Args:
        clusters: of the samples, (n,), in [0, K).
        device: where processes sum.

    Returns:
        The means, 0 where a cluster has no sample, and the intervals that count, (INTERVALS,) bool.
    """
    cells, D = K * INTERVALS, found.change.shape[1]
    cell = clusters * INTERVALS + found.interval  # (n,)
    change = torch.zeros(cells, D).index_add_(0, cell, found.change)
    loss = torch.zeros(INTERVALS).index_add_(0, found.interval, found.loss)
    count = torch.bincount(cell, minlength=cells).float()
    change, loss, count = summed(device, change, loss, count)
    mean_loss = loss / count.view(K, INTERVALS).sum(0).clamp(min=1)  # (INTERVALS,)
    means = (change / count.clamp(min=1)[:, None]).view(K, INTERVALS, D)
    return means, mean_loss > LEAST_LOSS * mean_loss.max()


def taylor_importance(
    setup: Setup, clusters: Tensor | None = None, batches: int | None = None
) -> Tensor:
    """The importance of every unit to each cluster of prompts, (K, D).

    Args:
        clusters: cluster of each training row, (rows,), in [0, K); if absent, K = 1.
        batches: number of training batches; `TAYLOR_BATCHES` if absent.
    """
    if clusters is None:
        clusters = torch.zeros(len(setup.z), dtype=torch.long)
    found = gate_gradients(setup, batches or TAYLOR_BATCHES)
    K, device = int(clusters.max()) + 1, setup.teacher.device
    means, used = interval_means(found, clusters[found.rows], K, device)
    return means[:, used].sum(1)


def importance_start(setup: Setup) -> tuple[Tensor, Tensor]:
    """Where the architecture predictor starts: b, (D,), and W, (D, dz), so that e is importance.

    b is the logarithm of the units' importance, standardised and limited. W is a ridge regression,
    times `START_WEIGHT`: from a sample's prompt, C (z - mean z), it predicts |dL/da| of the sample,
    relative to the mean over samples in the same interval of the schedule.
    """
    found, device = gate_gradients(setup, START_BATCHES), setup.teacher.device
    (means,), used = interval_means(found, torch.zeros_like(found.rows), 1, device)
    scores = means[used].sum(0)  # (D,)
    relative = found.change / means[found.interval].clamp(min=1e-12)  # (n, D)
    y = relative.clamp(max=MOST_RELATIVE) - 1
    x = (setup.z[found.rows] - setup.z.mean(0)) @ setup.content.T  # (n, dz)
    count = torch.tensor(float(len(x)))
    xx, xy, sum_x, sum_y, count = summed(device, x.T @ x, x.T @ y, x.sum(0), y.sum(0), count)
    xx, xy = (s - sum_x[:, None] * t / count for s, t in ((xx, sum_x), (xy, sum_y)))
    W = torch.linalg.solve(xx + RIDGE * torch.eye(len(xx)), xy).T  # (D, dz)
    scale = START_DEVIATION / scores.clamp(min=1e-12).log().std().clamp(min=1e-6)
    return importance_logits(scores), START_WEIGHT * scale * W


def importance_logits(scores: Tensor) -> Tensor:
    """Where logits start: the logarithm of importance, standardised and limited, (..., D)."""
    logits = scores.clamp(min=1e-12).log()
    logits = START_DEVIATION * (logits - logits.mean()) / logits.std().clamp(min=1e-6)
    return logits.clamp(-START_LIMIT, START_LIMIT)


# ---- what the others can make up for ----


@torch.no_grad()
def surgeon_scores(setup: Setup, importance: Tensor, rows: Tensor) -> Tensor:
    """Scores of all units, (D,); a layer's own is its importance.

    Args:
        importance: of all units, (D,), positive.
        rows: training rows whose features count, (R,).
    """
    cfg, teacher, scores = setup.cfg, setup.teacher, importance.clone()
    grams: dict[str, Tensor] = {}
    hooks = [
        gated_module(teacher.unet, layer)[0].register_forward_pre_hook(partial(add, grams, layer))
        for layer in setup.space.width_layers
    ]
    try:
        rows = rows[batch_rows(len(rows), IMAGES, cfg.seed, 0)]
        parts = list(enumerate(rows.split(cfg.micro_batch)))
        for step, part in tqdm(parts, desc="features", unit="batch"):
            batch = setup.noised(part, step_generator(cfg.seed, "surgeon", step))
            teacher.unet(**batch.inputs())
    finally:
        for hook in hooks:
            hook.remove()
    for layer in setup.space.width_layers:
        gram = grams[layer.name]
        gram.diagonal().add_(REFIT_RIDGE * gram.diagonal().mean())
        weight = gated_module(teacher.unet, layer)[0].get_parameter("weight").to(gram)
        weight = weight.flatten(2).transpose(1, 2).flatten(0, 1) if weight.ndim == 4 else weight
        order, costs = removals(gram, weight, importance[layer.span])
        scores[layer.span][order] = torch.cummax(costs, 0).values.to(scores)
    return scores


def add(grams: dict[str, Tensor], layer: Layer, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Add a batch's X^T X to a layer's."""
    x = inputs[0]
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (B, positions, C)
    x = x.flatten(0, -2).to(solving_dtype(x.device))
    product = x.T @ x
    grams[layer.name] = grams[layer.name] + product if layer.name in grams else product


def removals(gram: Tensor, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's units in the order in which they go, (units,), and importance x cost / alone.

    Args:
        gram: X^T X, made invertible, (C, C).
        weight: (O, C).
        importance: of each unit, (units,).
    """
    units, C = len(importance), len(gram)
    channels = torch.arange(C, device=gram.device).view(units, -1)  # (units, C / units)
    P, W, left = torch.linalg.inv(gram), weight, list(range(units))
    alone = torch.stack([trace(W[:, u], gram[u][:, u]) for u in channels])
    factor = importance.to(alone) / alone.clamp(min=1e-30)
    order, costs = [], []
    while left:
        inner = [torch.linalg.inv(P[channels[u]][:, channels[u]]) for u in left]  # P_uu^-1
        lost = [trace(W[:, channels[u]], A) for u, A in zip(left, inner, strict=True)]
        values = factor[left] * torch.stack(lost)
        least = int(values.argmin())
        u = channels[left[least]]
        step = inner[least] @ P[u]  # P_uu^-1 P_u:
        W, P = W - W[:, u] @ step, P - P[:, u] @ step
        order.append(left.pop(least))
        costs.append(values[least])
    return torch.tensor(order), torch.stack(costs)


def trace(W: Tensor, A: Tensor) -> Tensor:
    """tr(W A W^T)."""
    return ((W @ A) * W).sum()
