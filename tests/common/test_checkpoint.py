"""A checkpoint: what is restored goes on as if nothing had happened; what is not finite stops."""

import pytest
import torch
from torch import nn

from common.checkpoint import Checkpoint
from common.errors import UserError


class Training:
    """A small model under an optimizer, with a buffer that a step changes."""

    def __init__(self, path, kind="adamw", settings=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
        self.model.to(memory_format=torch.channels_last)
        parameters = self.model.parameters()
        self.optimizer = {
            "adamw": lambda: torch.optim.AdamW(parameters, lr=0.1),
            "fused": lambda: torch.optim.AdamW(parameters, lr=0.1, fused=True),
            "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        }[kind]()
        parts = {"model": self.model, "optimizer": self.optimizer}
        self.checkpoint = Checkpoint(path, parts, settings or {})

    def step(self, step):
        self.optimizer.zero_grad()
        images = torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
        self.model(images).square().mean().backward()
        self.optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "fused", "momentum"])
def test_a_restored_training_goes_on_as_the_undisturbed_one(tmp_path, kind):
    whole, stopped = (Training(tmp_path / name, kind) for name in ("whole", "stopped"))
    assert stopped.checkpoint.restore() == {}
    for step in range(6):
        whole.step(step)
    for step in range(3):
        stopped.step(step)
    stopped.checkpoint.save(step=3, seconds={"joint": 1.5})
    stopped.step(99)  # a step that is lost
    again = Training(tmp_path / "stopped", kind)
    for training in (again, stopped):  # in a new process, and in place
        assert training.checkpoint.restore() == {"step": 3, "seconds": {"joint": 1.5}}
        for step in range(3, 6):
            training.step(step)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(training.model.state_dict()[name], tensor), name


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "c.safetensors"
    Training(path, settings={"lr": 0.1, "seed": 0}).checkpoint.save(step=1)
    Training(path, settings={"lr": 0.1, "seed": 0}).checkpoint.restore()
    with pytest.raises(UserError, match=r"c\.safetensors .*seed: 0, now 1"):
        Training(path, settings={"lr": 0.1, "seed": 1}).checkpoint.restore()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"c\.safetensors is damaged"):
        Training(path, settings={"lr": 0.1, "seed": 0}).checkpoint.restore()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_the_training(tmp_path, value):
    training = Training(tmp_path / "c.safetensors")
    training.step(0)
    first, *_ = parameters = list(training.model.parameters())
    parameters[-1].grad = None  # as of a part that is not used
    training.checkpoint.guard(0, 1.0, parameters, "advice")
    with pytest.raises(UserError, match=r"loss became .* at step 7; nothing was saved; try this"):
        training.checkpoint.guard(7, value, parameters, "try this")
    training.checkpoint.save(step=7)
    first.grad[0, 1, 1, 2] = value
    with pytest.raises(UserError, match=r"became 1 and its gradient .*c\.safetensors; try"):
        training.checkpoint.guard(7, 1.0, parameters, "try this")
