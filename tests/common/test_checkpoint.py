"""A checkpoint: what is restored goes on as if nothing had happened; what is not finite stops."""

import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import checkpoint as checkpoint_module
from common.checkpoint import Checkpoint
from common.errors import UserError
from common.files import load_tensors, save_tensors


class Training:
    """A small model under an optimizer, with a buffer that a step changes."""

    def __init__(self, path, kind="adamw", settings=None, minutes=0):
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
        self.checkpoint = Checkpoint(path, parts, settings or {}, minutes)

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


# ---- when it is saved ----


@pytest.fixture
def clock(monkeypatch) -> Iterator[SimpleNamespace]:
    """The minutes on the clock that says when a save is due."""
    now = SimpleNamespace(minutes=1000.0)
    clock = SimpleNamespace(monotonic=lambda: 60 * now.minutes)
    monkeypatch.setattr(checkpoint_module, "time", clock)
    return now


def went_on_from(path) -> int:
    return Training(path).checkpoint.restore().get("step", 0)


@pytest.mark.parametrize(("stop", "kept"), [(6, 0), (7, 7), (13, 7), (14, 14), (40, 35)])
def test_a_fault_costs_at_most_the_minutes_between_two_saves(tmp_path, clock, stop, kept):
    """Steps of 2.2 minutes: a save is due after every seventh."""
    training = Training(tmp_path / "c.safetensors", minutes=15)
    with pytest.raises(ZeroDivisionError):
        for step in training.checkpoint.steps(range(50)):
            if step == stop:
                raise ZeroDivisionError
            clock.minutes += 2.2
    assert went_on_from(tmp_path / "c.safetensors") == kept


def test_a_training_that_is_over_before_a_save_is_due_writes_nothing(tmp_path, clock):
    training = Training(tmp_path / "c.safetensors", minutes=15)
    assert list(training.checkpoint.steps(range(3, 9))) == [3, 4, 5, 6, 7, 8]
    assert not list(tmp_path.iterdir())


def test_steps_go_on_while_the_state_of_an_earlier_one_is_written(tmp_path, clock, monkeypatch):
    """The write is held until three more steps are done; the file has none of them."""
    path, done = tmp_path / "c.safetensors", threading.Event()

    def slowly(*arguments) -> None:
        assert done.wait(60) and threading.current_thread() is not threading.main_thread()
        save_tensors(*arguments)

    monkeypatch.setattr(checkpoint_module, "save_tensors", slowly)
    training, seconds = Training(path, minutes=15), {"joint": 0.0}
    for step in training.checkpoint.steps(range(6), seconds=seconds):
        training.step(step)
        seconds["joint"] += 1
        clock.minutes += 15 if step == 2 else 0
        if step == 5:
            assert not path.exists()
            done.set()
    one = Training(path)
    for step in range(3):
        one.step(step)
    assert load_tensors(path)[1] == {"step": 3, "seconds": {"joint": 3.0}, "settings": {}}
    stopped = Training(path)
    stopped.checkpoint.restore()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(stopped.model.state_dict()[name], tensor), name


def test_a_write_that_fails_is_told(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint_module, "save_tensors", full)
    with pytest.raises(UserError, match="the disk is full"):
        for step in Training(tmp_path / "c").checkpoint.steps(range(9)):
            assert step < 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_a_second_one_at_once(tmp_path, clock, number):
    path, before = tmp_path / "c.safetensors", signal.getsignal(number)

    def stop(*_) -> None:
        raise InterruptedError

    signal.signal(number, stop)
    try:
        for times in (1, 2):
            training, done = Training(path, minutes=15), []
            first = training.checkpoint.restore().get("step", 0)
            with pytest.raises(InterruptedError):
                for step in training.checkpoint.steps(range(first, 9)):
                    for _ in range(times if step == first + 3 else 0):
                        signal.raise_signal(number)
                    done.append(step)
            assert signal.getsignal(number) is stop
            assert done == ([0, 1, 2, 3] if times == 1 else [4, 5, 6])
            assert went_on_from(path) == 4
    finally:
        signal.signal(number, before)
