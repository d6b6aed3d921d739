"""The state of a training as one file: its modules, its optimizers and where it was.

    checkpoint = Checkpoint(path, {"router": router, "optimizer": optimizer}, settings, minutes=15)
    first = checkpoint.restore().get("step", 0)     # {} where there is no file yet
    for step in checkpoint.steps(range(first, steps)):
        loss.backward()
        checkpoint.guard(step, loss.item(), router.parameters(), "try a lower --lr")
        optimizer.step()

A restored training goes on exactly as one that was never stopped. The state is copied between two
steps, and written by a thread while the next ones run, under a temporary name that then replaces
the last file. So a kill at any moment leaves a whole file, and costs at most the minutes between
two of them, and those of a write. SIGTERM and Ctrl-C cost nothing.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from common.files import load_tensors, save_tensors
from common.processes import is_first, largest


@dataclass(frozen=True)
class Checkpoint:
    """Modules and optimizers that are saved and restored together.

    Args:
        path: the safetensors file.
        parts: name -> module or optimizer; the names are prefixes in the file.
        settings: what a restored training must have in common with the saved one (JSON values).
        minutes: between two saves of `steps`.
    """

    path: Path
    parts: Mapping[str, nn.Module | Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    minutes: float = 0

    def save(self, **meta: Any) -> None:
        """Write the parts, the settings and `meta` (JSON values), whole or not at all."""
        save_tensors(self.path, self.tensors(), meta | {"settings": self.settings})

    def tensors(self) -> dict[str, Tensor]:
        """The state of all parts, as it is now."""
        found: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            state = part.state_dict() if isinstance(part, nn.Module) else moments(part)
            found |= {f"{name}/{key}": tensor for key, tensor in state.items()}
        return found

    def steps(self, numbers: Iterable[int], **meta: Any) -> Iterator[int]:
        """The numbers of steps; between two of them, the state is saved where it is due.

        SIGTERM or Ctrl-C, in any of the processes that share the training, stops all of them after
        the step, once it is saved; a second one stops at once. Process 0 writes.

        Args:
            meta: saved beside `step`, the number of steps that are done.
        """
        last, stopped_by, written = time.monotonic(), 0, Future[None]()
        written.set_result(None)
        with signals_held() as held, ThreadPoolExecutor(1) as writer:
            for step in numbers:
                yield step
                stopped_by = largest(max(held, default=0))
                due = time.monotonic() - last >= 60 * self.minutes
                if is_first() and (due or stopped_by):
                    written.result()  # raises what the last write did
                    tensors = {
                        k: tensor.detach().to("cpu", copy=True)
                        for k, tensor in self.tensors().items()
                    }
                    now = copy.deepcopy(meta | {"step": step + 1, "settings": self.settings})
                    written = writer.submit(save_tensors, self.path, tensors, now)
                    last = time.monotonic()
                if stopped_by:
                    break
            written.result()
        if stopped_by:
            signal.raise_signal(stopped_by)
            raise KeyboardInterrupt  # where its handler has only taken note

    def restore(self) -> dict[str, Any]:
        """Put the saved state into the parts, in place, and give the saved `meta`.

        Nothing happens where there is no file; the result is then empty.

        Raises:
            UserError: the file is damaged, or was saved under other settings.
        """
        if not self.path.exists():
            return {}
        tensors, meta = load_tensors(self.path)
        refuse_other_settings(self.path, meta.pop("settings", {}), self.settings)
        for name, part in self.parts.items():
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if isinstance(part, nn.Module):
                part.load_state_dict(state)
            else:
                load_moments(part, state)
        return meta

    def guard(
        self, step: int, loss: float, parameters: Iterable[nn.Parameter], advice: str
    ) -> None:
        """Check a step before the optimizer takes it.

        Args:
            step: its number.
            loss: its loss.
            parameters: those whose gradients it has computed.
            advice: what the user can try; the end of the message.

        Raises:
            UserError: the loss or the norm of the gradient is not finite.
        """
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            good = f"the last good state is in {self.path}"
            raise UserError(
                f"the loss became {loss:.3g} and its gradient {norm:.3g} at step {step}; "
                f"{good if self.path.exists() else 'nothing was saved'}; {advice}"
            )


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """A list that grows by each SIGTERM and SIGINT (Ctrl-C); a second one acts as it did before.

    Those that are ignored stay so. A thread other than the main one can hold none.
    """
    held: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {k: how for k, how in found.items() if how not in (signal.SIG_IGN, None)}

    def hold(number: int, _: Any) -> None:
        held.append(number)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, hold)
        yield held
    finally:
        for number, how in before.items():
            signal.signal(number, how)


def refuse_other_settings(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises `UserError` where `path` was made with other settings than those asked for now."""
    changed = [
        f"{key}: {old.get(key)}, now {value}" for key, value in new.items() if old.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(changed)}); "
            "use those again, choose another place, or delete it"
        )


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors; hyperparameters come from the configuration."""
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, slots in optimizer.state_dict()["state"].items()
        for key, value in slots.items()
    }


def load_moments(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `moments` back, each in its parameter's memory layout.

    A fused optimizer walks through parameter and moments in storage order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
