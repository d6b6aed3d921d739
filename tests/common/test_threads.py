"""Parts done side by side: in order, at the same time, and as if one after the other."""

import threading
import time

import pytest
import torch

from common import threads

CPU = torch.device("cpu")


@pytest.fixture
def four_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_parts(four_cores):
    def work(k: int) -> int:
        time.sleep(0.02 * (5 - k))  # the first ends last
        return k * k

    assert threads.side_by_side(work, range(6), CPU) == [0, 1, 4, 9, 16, 25]
    assert threads.side_by_side(work, [], CPU) == []


@pytest.mark.parametrize(("parts", "share"), [(2, 2), (4, 1), (9, 1)])
def test_parts_run_at_the_same_time_and_share_the_cores(four_cores, parts, share):
    workers = min(parts, 4)
    meeting = threading.Barrier(workers, timeout=20)  # passes once `workers` parts have come

    def work(k: int) -> int:
        if k < workers:
            meeting.wait()
        return torch.get_num_threads()

    assert threads.side_by_side(work, range(parts), CPU) == [share] * parts
    assert torch.get_num_threads() == 4
    assert threads.side_by_side(lambda _: torch.get_num_threads(), [0], CPU) == [4]  # one: all


def test_a_gpu_gets_one_at_a_time():
    assert threads.slots(torch.device("cuda")) == 1
    named = threads.side_by_side(lambda _: threading.get_ident(), range(3), torch.device("cuda"))
    assert named == [threading.get_ident()] * 3


def test_a_failure_is_raised_and_the_threads_are_given_back(four_cores):
    def work(k: int) -> int:
        if k == 1:
            raise ValueError("the second")
        return k

    with pytest.raises(ValueError, match="the second"):
        threads.side_by_side(work, range(4), CPU)
    assert torch.get_num_threads() == 4
