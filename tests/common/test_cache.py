"""The cache: parts on disk are what was computed, and are computed once."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from common.cache import cache_folder, kept_rows, mapped_rows, rows_key
from common.errors import UserError
from common.hub import content_hash, model_folder, refuse_pickles


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "aptp" / "squares"


def test_a_cache_has_a_place_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
    assert cache_folder() == tmp_path / "given" / "aptp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "aptp"

    own = Path(tempfile.gettempdir()) / f"aptp-{os.getuid()}"
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != Path("/"))  # root may write
    for home in ("/", "/nonexistent/home", "/dev/null"):
        monkeypatch.setenv("HOME", home)
        assert cache_folder() == own
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user id
    assert cache_folder() == own and own.is_absolute()


def test_what_killed_writers_left_anywhere_in_the_cache_goes_once_something_is_kept(folder):
    left = [folder, folder.parent / "other rows", folder.parent / "unreadable" / "toy" / "key"]
    for place in left:
        (place / ".000000.safetensors.1a2b.tmp").mkdir(parents=True)
        (place / ".000000.safetensors.1a2b.tmp" / "000000.safetensors").touch()
    keep(3, Squares())
    assert not list(folder.parent.rglob("*.tmp"))
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]


class Squares:
    """Rows of (n, n^2), and which were asked for."""

    def __init__(self, stop=None):
        self.asked, self.stop = [], stop

    def __call__(self, batches):
        for rows in batches:
            if self.stop is not None and len(self.asked) >= self.stop:
                raise KeyboardInterrupt
            self.asked += rows.tolist()
            yield torch.stack([rows, rows**2], 1).float()


def keep(rows, compute, part=10, batch=4):
    options = {"part": part, "batch": batch, "what": "squares"}
    return torch.cat(kept_rows("squares", rows, compute, **options))


def expected(rows):
    return torch.stack([torch.arange(rows), torch.arange(rows) ** 2], 1).float()


@pytest.mark.parametrize("rows", [1, 9, 10, 11, 35])
def test_rows_are_computed_once_and_read_afterwards(folder, rows):
    first, second = Squares(), Squares()
    assert torch.equal(keep(rows, first), expected(rows))
    assert first.asked == list(range(rows))
    assert torch.equal(keep(rows, second), expected(rows))
    assert second.asked == []


def test_a_stopped_run_loses_only_the_part_it_was_at(folder):
    with pytest.raises(KeyboardInterrupt):
        keep(35, Squares(stop=24))
    assert sorted(path.name for path in folder.iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
    ]
    rest = Squares()
    assert torch.equal(keep(35, rest), expected(35))
    assert rest.asked == list(range(20, 35))


@pytest.mark.parametrize("harm", ["cut", "empty", "flip", "text", "other rows", "gone"])
def test_a_damaged_part_is_computed_again(folder, harm):
    keep(35, Squares())
    path = folder / "000001.safetensors"
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-8])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "flip":  # one bit of one number
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif harm == "text":
        path.write_text(json.dumps({"rows": 3}))
    elif harm == "other rows":
        (folder / "000003.safetensors").replace(path)
    else:
        path.unlink()
    again = Squares()
    assert torch.equal(keep(35, again), expected(35))
    lost = list(range(30, 35)) if harm == "other rows" else []
    assert again.asked == list(range(10, 20)) + lost


@pytest.mark.parametrize("rows", [9, 35])
def test_joined_parts_are_one_file(folder, rows):
    """A damaged one is made again."""
    options = {"part": 10, "batch": 4, "what": "squares"}

    def mapped(compute):
        return mapped_rows("squares", rows, compute, **options)

    first, second, third = Squares(), Squares(), Squares()
    assert torch.equal(mapped(first), expected(rows))
    (path,) = folder.iterdir()
    assert torch.equal(mapped(second), expected(rows)) and second.asked == []
    path.unlink()
    path.write_bytes(b"")
    assert torch.equal(mapped(third), expected(rows)) and third.asked == list(range(rows))


@given(*[st.lists(st.text(max_size=3), max_size=4)] * 2, st.text(max_size=3))
def test_keys_differ_where_lines_differ(lines, others, fact):
    assert (rows_key(fact, lines=lines) == rows_key(fact, lines=others)) == (lines == others)
    assert rows_key(fact, lines=lines) != rows_key(fact + "x", lines=lines)


def test_keys_of_lines_that_only_join_alike():
    assert rows_key("a", lines=["b c", "d"]) != rows_key("a", lines=["b", "c d"])
    assert rows_key("a", lines=["b\nc"]) != rows_key("a", lines=["b", "c"])
    assert len(rows_key("a", lines=["\ud800"])) == 24  # a lone surrogate is a name, too


def test_content_decides_the_hash_of_a_model_and_its_place_does_not(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "pooling").mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_bytes(b"weights")
        (tmp_path / place / "pooling" / "config.json").write_text("{}")
    there, same = tmp_path / "a", tmp_path / "b"
    before = content_hash(there)
    for name in (".cache/x.json", "onnx/model.json", "README.md"):  # no part of the model
        (same / name).parent.mkdir(exist_ok=True)
        (same / name).write_text("{}")
    assert content_hash(same) == before
    for name in ("model.safetensors", "pooling/config.json"):
        (same / name).write_bytes(b"[]")
        assert content_hash(same) != before
        (same / name).write_bytes((there / name).read_bytes())
    (same / "pooling" / "config.json").rename(same / "config.json")
    assert content_hash(same) != before


def test_pickles_are_refused_where_nothing_else_is(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"--x: .*dense/pytorch_model.bin is a pickle"):
        refuse_pickles(tmp_path, "--x")
    (tmp_path / "dense" / "model.safetensors").touch()
    refuse_pickles(tmp_path, "--x")


def test_what_stopped_a_download_is_told_apart(monkeypatch):
    def fail_with(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)

    fail_with(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        model_folder("some/model", "--x", ["*"], "nothing")
    for error, why in (
        (ConnectionResetError(104, "reset by\npeer"), "reset by peer"),
        (LocalEntryNotFoundError("no such entry"), "HF_HUB_OFFLINE"),
    ):
        fail_with(error)
        with pytest.raises(UserError, match=f"--x some/model .*{why}.*hf download some/model"):
            model_folder("some/model", "--x", ["*"], "nothing")
