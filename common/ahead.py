"""The next batch is prepared in a thread while a step runs, so that the step does not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def ahead(make: Callable[[int], T], steps: Iterable[int], device: torch.device) -> Iterator[T]:
    """`make` of each step, in order; that of the next one runs while the caller uses this one.

    Args:
        make: runs in one thread, which works on `device`.
        device: where batches go.
    """
    # a new thread would begin on the first GPU, whichever is this process's own
    start = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=start) as pool:
        waiting: Future[T] | None = None
        for step in steps:
            following = pool.submit(make, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; to a GPU through pinned memory, without waiting for the copy."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
