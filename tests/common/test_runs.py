"""Run folders: nothing half-written, nothing unpickled, randomness by step."""

import csv

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.files import MetricsLog, load_tensors, read_json, replacing, save_tensors, write_json
from common.processes import pick_device
from common.randomness import batch_rows, step_generator
from run import newest_run


@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 100),
    steps=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_batches_walk_through_whole_epochs(rows, batch, steps, seed):
    seen = torch.cat([batch_rows(rows, batch, seed, step) for step in range(steps)])
    assert len(seen) == steps * batch
    for epoch in seen[: len(seen) // rows * rows].view(-1, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


def test_generators_differ_by_seed_purpose_and_step():
    keys = [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]
    draws = {torch.rand(4, generator=step_generator(*key)).tolist()[0] for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(
        torch.rand(4, generator=step_generator(*keys[0])),
        torch.rand(4, generator=step_generator(*keys[0])),
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_round_trip_and_damage_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(6.0).view(2, 3).T}, {"step": 3})
    tensors, meta = load_tensors(path)
    assert torch.equal(tensors["x"], torch.arange(6.0).view(2, 3).T) and meta == {"step": 3}
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:20], b"", b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.safetensors"):
            load_tensors(path)
    with pytest.raises(UserError, match="missing"):
        load_tensors(tmp_path / "b.safetensors")


def test_a_reopened_log_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsLog(path, ["loss"], 0)
    for step in range(5):
        log.write(step, {"loss": step * 0.5})
    log.close()
    log = MetricsLog(path, ["loss"], 3)
    log.write(3, {"loss": 9})
    log.close()
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "loss"],
            ["0", "0"],
            ["1", "0.5"],
            ["2", "1"],
            ["3", "9"],
        ]


def test_no_run_yet(tmp_path):
    with pytest.raises(UserError, match=r"train\.py"):
        newest_run(tmp_path)
    write_json(tmp_path / "a" / "summary.json", {})
    assert newest_run(tmp_path) == tmp_path / "a"


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="warp"):
        pick_device("warp")
