"""Randomness as a function of (seed, purpose, step).

So a checkpoint needs no random state, and a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def step_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose, step) alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@lru_cache(maxsize=2)  # a batch may lie in two epochs; for millions of rows, an order takes 0.1 s
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of rows in an epoch, (rows,): a function of (seed, epoch). Not to be changed."""
    return torch.randperm(rows, generator=step_generator(seed, "order", epoch))


def batch_rows(rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The rows of batch `step`, (batch_size,), from an endless chain of shuffled epochs."""
    start = step * batch_size
    parts = []
    for position in range(start // rows, (start + batch_size - 1) // rows + 1):
        first = max(start, position * rows) - position * rows
        last = min(start + batch_size, (position + 1) * rows) - position * rows
        parts.append(epoch_order(rows, seed, position)[first:last])
    return torch.cat(parts)
