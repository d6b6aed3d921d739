"""Many processes, one batch: what `torchrun train.py` needs. App. E.2 trains on 16 GPUs.

Every process holds all prompt embeddings and draws the same random numbers, so each computes the
router's part of a step for the whole batch: transport, contrastive loss and resource loss see every
prompt, and no embedding is sent around. The U-Net's part is shared out by rows. What is summed over
the processes is the image losses and their gradient with respect to the gates, (B, D) numbers; from
there on every process takes the same step, and their routers stay equal.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed

from common.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu.

    Raises `UserError` for a device that this machine does not have.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not available here; use auto, cpu, or cuda on a machine with a GPU"
        ) from None


PATIENCE = timedelta(minutes=30)  # without a word from the others, before a process gives up


def start_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; nothing happens where there is only one.

    Args:
        device: `cuda` becomes the process's own GPU.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    if count() == 1:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node is more than this machine's {torch.cuda.device_count()} GPUs; "
                "start one process a GPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    return device


def stop_processes() -> None:
    """Leave the group, once every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0; process 0 writes the files."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rows(batch_size: int) -> Tensor:
    """The rows of a batch that this process takes through the U-Net, (b,): every `count()`th."""
    return torch.arange(rank(), batch_size, count())


def wait() -> None:
    """Come together: nobody goes on before all are here."""
    if distributed.is_initialized():
        distributed.barrier()


def add_up(*tensors: Tensor) -> None:
    """Sum each tensor over the processes, in place."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def everybodys(values: Tensor, own: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Whole numbers of which each process knows those of its own rows, (b,) -> all, (B,).

    Args:
        values: at `own`, (b,).
        own: this process's rows, (b,).
        batch_size: B.
        device: where the processes talk.
    """
    everything = torch.zeros(batch_size, dtype=values.dtype, device=device)
    everything[own.to(device)] = values.to(everything)
    add_up(everything)
    return everything.cpu()
