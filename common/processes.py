"""Processes that share a batch, each on its device: `torchrun train.py`. App. E.2 uses 16 GPUs.

Every process holds all prompt embeddings and the same random numbers, so each computes the router's
part of a step for the whole batch. The U-Net's part is shared out by rows. The processes sum the
image losses and their gradient with respect to the gates, (B, D) numbers. From there on every
process takes the same step, and their routers stay equal.

`finetune.py` only shares out its experts, which have nothing in common.

These are the few calls of `torch.distributed` that this needs; with one process they do nothing.
(`accelerate.PartialState` would replace two of them, and it chooses the device by itself.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from common.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # without a word from the others, before a process gives up


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu.

    Raises `UserError` for a device that this machine does not have.
    """
    if name == "auto":
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, available in here.items() if available), "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not available here; use auto, cpu, or cuda on a machine with a GPU"
        ) from None


def start_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; `cuda` becomes the process's own GPU.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    if world_size() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node is more than this machine's {torch.cuda.device_count()} GPUs; "
                "start one process a GPU"
            )
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    return device


def stop_processes() -> None:
    """Leave the others, once every process has come here."""
    barrier()
    leave_processes()


def leave_processes() -> None:
    """Leave the others at once; what they do from here on is their own."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0; process 0 writes the files."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes the files of those that it shares its work with."""
    return rank() == 0 or not distributed.is_initialized()


def local_rows(batch_size: int) -> Tensor:
    """The rows of a batch that this process takes through the U-Net, (b,): every `world_size`th.

    Raises `UserError` where a process would have none.
    """
    if world_size() > batch_size:
        raise UserError(
            f"--nproc_per_node gives {world_size()} processes, more than the {batch_size} samples "
            f"of a batch; start {batch_size} or fewer"
        )
    return torch.arange(rank(), batch_size, world_size())


def barrier() -> None:
    """Go on once all processes have come here."""
    if distributed.is_initialized():
        distributed.barrier()


def all_reduce(*tensors: Tensor) -> None:
    """Sum each tensor over the processes, in place."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def from_first(make: Callable[[], T]) -> T:
    """What process 0 makes, in all of them."""
    if not distributed.is_initialized():
        return make()
    made: list[Any] = [make() if rank() == 0 else None]
    distributed.broadcast_object_list(made)
    return made[0]


def largest(number: int) -> int:
    """The largest of the processes' numbers, in all of them."""
    if not distributed.is_initialized():
        return number
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor(number, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def check_agreement(number: int, what: str) -> None:
    """Raises `UserError` in every process where `number` is not the same in all of them."""
    most, least = largest(number), -largest(-number)
    if most != least:
        raise UserError(
            f"the processes differ in {what} ({least} and {most}): the target's files, the run "
            f"folder and the cache must be the same for all; put them on a disk that all machines "
            f"share"
        )
