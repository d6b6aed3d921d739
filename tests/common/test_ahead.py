"""Batches that are prepared ahead of the steps that use them."""

import threading
import time

import pytest
import torch

from common.ahead import ahead
from common.errors import UserError

CPU = torch.device("cpu")


def test_the_next_batch_is_made_while_this_one_is_used():
    made, threads = [], set()

    def make(step):
        threads.add(threading.get_ident())
        made.append(step)
        return step * step

    seen = []
    for square in ahead(make, range(3, 8), CPU):
        seen.append(square)
        following = len(seen) + 1
        deadline = time.time() + 10
        while len(made) < min(following, 5) and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == list(range(3, 3 + min(following, 5)))  # one ahead, and no more
    assert seen == [9, 16, 25, 36, 49]
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(ahead(make, range(0), CPU)) == []


def test_an_error_comes_at_its_own_step():
    def make(step):
        if step == 2:
            raise UserError("image 2 is gone")
        return step

    seen = []
    with pytest.raises(UserError, match="image 2"):
        for step in ahead(make, range(5), CPU):
            seen.append(step)
    assert seen == [0, 1]
