"""Devices without float64, such as a Mac's: stood in for by one whose numbers lie on the CPU."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import train
from common.randomness import step_generator
from macs import meet_budget
from refit import refit
from run import Setup

THERE = torch.device("meta")  # what the stand-in calls itself
# what takes tensors of two devices: copies, and numbers of rows
MIXED = (
    "aten::copy_",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)


class Away(Tensor):
    """A tensor of the stand-in."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Away":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=THERE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return run_there(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.held!r})"


class Device(TorchDispatchMode):
    """While it lasts, tensors that are made on `THERE` are of the stand-in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        return run_there(func, args, kwargs or {})


def run_there(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU; results are the stand-in's, where arguments or the device are.

    As on such a device, TypeError where one is in float64, RuntimeError where devices are mixed.
    """
    device = kwargs.get("device")
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = any(isinstance(x, Away) for x in given) if device is None else device == THERE
    if device == THERE:
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif (
        away
        and func.name().split(".")[0] not in MIXED
        and any(x.ndim and not isinstance(x, Away) for x in given)
    ):
        raise RuntimeError(f"{func}: tensors of two devices")

    def unwrap(x: Any) -> Any:
        return x.held if isinstance(x, Away) else x

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func}: this device has no float64")
        return Away(x)

    if not away:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(wrap, out))


def moved(module: nn.Module) -> None:
    """`module.to(THERE)` before there is a `Device`."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            held = Away(parameter.detach())
            part._parameters[name] = nn.Parameter(held, parameter.requires_grad)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A mode is a thread's own: batches are prepared in the one that has it."""
    monkeypatch.setattr(train, "ahead", lambda make, steps, device: map(make, steps))


def pruned(setup: Setup, out: Path) -> tuple[np.ndarray, Tensor, dict[str, Tensor]]:
    """The log of a training, its binary codes, and what is refitted of the first expert."""
    setup = dataclasses.replace(setup, cfg=dataclasses.replace(setup.cfg, out=out))
    router, _ = train.optimise(setup)
    codes = meet_budget(router.codes, torch.ones(3), setup.macs, setup.cfg.budget)
    batch = setup.noised(torch.arange(8), step_generator(0, "refit"))
    weights, _ = refit(setup.teacher.unet, setup.space, codes[0], batch.inputs())
    found = {name: weight.cpu() for name, weight in weights.items()}
    return np.genfromtxt(out / "metrics.csv", delimiter=",", names=True), codes, found


def test_pruning_on_a_device_without_float64_is_pruning_on_the_cpu(setup_of, smallest, tmp_path):
    log, codes, weights = pruned(setup_of(smallest), tmp_path / "cpu")
    unet = copy.deepcopy(smallest)
    moved(unet)
    with Device():
        there = pruned(setup_of(unet), tmp_path / "there")
    assert len(log) == 3
    for name in train.TERMS:  # the resource loss is what rounding leaves of it
        assert np.allclose(log[name], there[0][name], rtol=1e-3, atol=1e-5), name
    assert (codes != there[1]).float().mean() < 0.02
    assert (weights and weights.keys() == there[2].keys()) or codes[0].ne(there[1][0]).any()


def test_such_a_device_is_one():
    """Or the test above would show nothing."""
    x = Away(torch.ones(2, requires_grad=True))
    with Device():
        assert isinstance(torch.ones(2, device=THERE) + x, Away) and not isinstance(x.cpu(), Away)
        for wrong in (lambda: x.double(), lambda: torch.ones(2).to(THERE, torch.float64)):
            with pytest.raises(TypeError, match="no float64"):
                wrong()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(2)
