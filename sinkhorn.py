"""Optimal-transport assignment of prompts to experts: Sec. 3.2.2, Eqs. 5-7.

| symbol | name here | shape |
|---|---|---|
| A^T E | `scores`, similarity of each code with each embedding | (N, B) |
| Q* | the result, the transport plan | (N, B) |
| epsilon | `eps`, weight of the entropy H(Q) | scalar |
| m, n | not stored: the factors that the two `log_softmax` apply to rows and columns | (N,), (B,) |

Departures from the paper: none in the equations. The iterations run on log Q, because
exp(scores / eps) with eps = 0.05 overflows single precision at a similarity of 4.4. To scale a row
of Q so that it sums to 1 is a log-softmax of that row of log Q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
    """Q* = diag(m) exp(scores / eps) diag(n), by Sinkhorn-Knopp [Eq. 5] [Eq. 6] [Eq. 7]

    The transport plan that maximises Eq. 5 under the equipartition constraints of Eq. 6. Every
    column of Q* sums to 1/B exactly; every row sums to 1/N in the limit of many iterations. Works
    in any floating-point type, internally in float32 or wider, and propagates no gradients.

    Args:
        scores: similarities of N codes and B embeddings, (N, B), finite.
        eps: entropy weight, > 0; the smaller, the closer the columns of B Q* are to one-hot. The
            paper's value is 0.05.
        iterations: of row and column scaling, >= 1. The paper's value is 3.

    Returns:
        Q*, (N, B), in the type of `scores`.

    Raises:
        ValueError: `scores` is not a matrix or is empty, `eps` <= 0 or `iterations` < 1.
    """
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be a non-empty (N, B) matrix, got {tuple(scores.shape)}")
    if not eps > 0 or iterations < 1:
        raise ValueError(f"eps must be > 0 and iterations >= 1, got {eps} and {iterations}")
    work = torch.promote_types(scores.dtype, torch.float32)
    log_Q = scores.detach().to(work) / eps  # (N, B)
    for _ in range(iterations):
        log_Q = F.log_softmax(log_Q, dim=1)  # m: all rows of B Q have the same sum
        log_Q = F.log_softmax(log_Q, dim=0)  # n: each column of B Q sums to 1
    return (log_Q.exp() / scores.shape[1]).to(scores.dtype)  # (N, B), B Q divided by B
