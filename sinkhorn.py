"""Optimal-transport assignment of prompts to experts: Sec. 3.2.2, Eqs. 5-7.

| symbol | name here | shape |
|---|---|---|
| A^T E | `scores`, similarity of each code with each embedding | (N, B) |
| Q* | the result, the transport plan | (N, B) |
| epsilon | `eps`, weight of the entropy H(Q) | scalar |
| m, n | `log_m`, `log_n`, scalings of rows and columns, as logarithms | (N, 1), (1, B) |

Departures from the paper: none in the equations. The iterations run on logarithms, because exp(scores / eps) with
eps = 0.05 overflows single precision at a similarity of 4.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
    """Solve the entropic transport problem of Eq. 5 by Sinkhorn-Knopp: Q* = diag(m) exp(scores / eps) diag(n) [Eq. 5] [Eq. 7]

    Every column of Q* sums to 1/B exactly; every row sums to 1/N in the limit of many iterations (Eq. 6). Works in any
    floating-point type, internally in float32 or wider, and does not propagate gradients.

    Args:
        scores: similarities of N codes and B embeddings, (N, B), finite.
        eps: entropy weight, > 0; the smaller, the closer the columns of B Q* are to one-hot. The paper's value is 0.05.
        iterations: of row and column scaling, >= 1. The paper's value is 3.

    Returns:
        Q*, (N, B), in the type of `scores`.

    Raises:
        ValueError: `scores` is not a matrix or is empty, `eps` <= 0 or `iterations` < 1.
    """
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be a non-empty (N, B) matrix, got shape {tuple(scores.shape)}")
    if not eps > 0 or iterations < 1:
        raise ValueError(f"eps must be > 0 and iterations >= 1, got {eps} and {iterations}")
    N, B = scores.shape
    work = torch.promote_types(scores.dtype, torch.float32)
    log_kernel = scores.detach().to(work) / eps  # (N, B)
    log_n = log_kernel.new_zeros(1, B)
    for _ in range(iterations):
        log_m = -math.log(N) - torch.logsumexp(log_kernel + log_n, dim=1, keepdim=True)  # rows sum to 1/N   (N, 1)
        log_n = -math.log(B) - torch.logsumexp(log_kernel + log_m, dim=0, keepdim=True)  # columns sum to 1/B   (1, B)
    return torch.exp(log_kernel + log_m + log_n).to(scores.dtype)


def equipartition_error(Q: Tensor) -> Tensor:
    """Largest relative violation of Q 1_B = 1/N and Q^T 1_N = 1/B, a scalar [Eq. 6]"""
    N, B = Q.shape
    rows, columns = (Q.sum(1) * N - 1).abs().max(), (Q.sum(0) * B - 1).abs().max()
    return torch.maximum(rows, columns)
