"""Processes that share a batch: two real ones, and how rows are shared out."""

import pytest
import torch
from small_processes import start

from common.errors import UserError
from common.processes import local_rows
from common.randomness import batch_rows

PROCESS = """
import os, sys, torch
from torch import distributed
from common.cache import kept_rows, mapped_rows
from common.errors import UserError
from common.processes import all_reduce, check_agreement, rank, start_processes

device = start_processes(torch.device("cpu"))
check_agreement(7, "something")
total = torch.tensor([1.0 + rank()])
all_reduce(total)
assert total.item() == 3

def compute(batches):
    return (rows.float()[:, None] for rows in batches)

def rows(place):
    return torch.cat(kept_rows(place, 7, compute, part=2, batch=1, what="rows")).flatten().tolist()

assert rows("shared") == list(range(7))
for count in (1, 7):  # fewer than processes, and several for each
    whole = mapped_rows(f"whole-{count}", count, compute, part=2, batch=1, what="rows")
    assert whole.flatten().tolist() == list(range(count))
os.environ["XDG_CACHE_HOME"] += f"/{rank()}"
for fault in (lambda: check_agreement(10 * rank(), "the step"), lambda: rows("apart")):
    try:
        fault()
        print("went on")
    except UserError as error:
        print(error)
distributed.destroy_process_group()
"""


def test_two_processes_notice_where_they_differ(tmp_path):
    """Each says so, and none waits for the other."""
    processes = start(PROCESS, XDG_CACHE_HOME=str(tmp_path))
    for rank, process in enumerate(processes):
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        step, cache = said.splitlines()
        assert "differ in the step (0 and 10)" in step and "share" in step
        part = tmp_path / str(rank) / "aptp" / "apart" / f"{1 - rank:06d}.safetensors"
        assert cache.startswith(f"{part} is missing") and "XDG_CACHE_HOME" in cache


def test_every_process_has_rows_and_all_of_them_are_had(monkeypatch):
    for batch_size, size in ((7, 1), (7, 3), (3, 3)):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        rows = []
        for rank in range(size):
            monkeypatch.setenv("RANK", str(rank))
            rows.append(local_rows(batch_size))
        assert all(len(own) for own in rows)
        assert torch.cat(rows).sort().values.tolist() == list(range(batch_size))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes.*3 samples.*start 3 or fewer"):
        local_rows(3)


def test_a_data_set_smaller_than_the_number_of_processes_gives_each_its_rows(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    shares = []
    for rank in range(5):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(batch_rows(3, 6, seed=0, step=4)[local_rows(6)])
    assert all(len(rows) for rows in shares)
    assert sorted(torch.cat(shares).tolist()) == [0, 0, 1, 1, 2, 2]
