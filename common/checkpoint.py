"""A training's state as tensors: what is saved in a checkpoint beside the model's weights."""

from __future__ import annotations

import torch
from torch import Tensor


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> dict[str, Tensor]:
    """An optimizer's moments as flat tensors.

    Hyperparameters are not among them: they come from the configuration.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{key}": torch.as_tensor(value)
        for index, slots in state.items()
        for key, value in slots.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer"
) -> None:
    """Put the moments of `optimizer_tensors` back, each in its parameter's memory layout.

    A fused optimizer walks through parameter and moments in storage order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "/"):
            _, index, key = name.rsplit("/", 2)
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
