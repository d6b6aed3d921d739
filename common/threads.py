"""Work that is done side by side in threads, on a CPU.

A forward of a small U-Net is mostly many short operators, which a few cores together do hardly
faster than one alone. Several forwards, each on its share of the cores, use the cores better. A GPU
gets one forward at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST = 4  # forwards side by side, as each needs memory of its own

Part = TypeVar("Part")
Result = TypeVar("Result")


def slots(device: torch.device) -> int:
    """How many parts are done at the same time."""
    return min(MOST, torch.get_num_threads()) if device.type == "cpu" else 1


def side_by_side(
    work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device
) -> list[Result]:
    """`work` of each part, in the parts' order. Ctrl-C ends it after the parts under way."""
    workers = min(slots(device), len(parts))
    if workers < 2:
        return [work(part) for part in parts]
    threads = torch.get_num_threads()
    share = (threads // workers,)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=share) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # a worker's number is also that of threads started later
