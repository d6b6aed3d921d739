"""Targets by name; every row has its own image; rows without are dropped and counted."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_data import (
    BROKEN,
    jpeg,
    make_coco,
    make_folder,
    make_shards,
    make_tsv,
    number_in,
    png_of,
    write,
)

from common.errors import UserError
from targets import __main__ as command
from targets.decoding import Unreadable
from targets.images import CaptionedImages, evenly_spaced, load_target


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- images of rows ----


def numbered(image_ids: list[int], broken: int | None = None) -> CaptionedImages:
    """Rows that show these images, 1 x 1, whose red is their number."""

    def read(row: int) -> np.ndarray:
        if image_ids[row] == broken:
            raise Unreadable(f"image {broken}: no")
        return np.full((1, 1, 3), image_ids[row], np.uint8)

    empty = [""] * len(image_ids)
    captions = [f"{k}" for k in image_ids]
    return CaptionedImages("test", captions, empty, empty, np.array(image_ids), read)


def reds(images: torch.Tensor) -> list[float]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist()


@given(
    image_ids=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    asked=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=12), max_size=5),
    ahead=st.integers(0, 3),
)
def test_batches_are_of_exactly_the_rows_asked_for(image_ids, asked, ahead):
    data = numbered(image_ids)
    batches = [[row % len(data) for row in rows] for rows in asked]
    found = [reds(images) for images in data.batches(map(torch.tensor, batches), ahead)]
    assert found == [[image_ids[row] for row in rows] for rows in batches]
    assert found == [reds(data.images(rows)) for rows in batches]


def test_an_image_that_fails_afterwards_is_one_line():
    data = numbered([0, 1, 2, 3], broken=2)
    assert reds(data.images([3, 0])) == [3, 0]
    with pytest.raises(UserError, match=r"^image 2: no; .*check them again .*--verify$"):
        data.images([1, 2])


# ---- rows that are dropped ----


def break_some(folder: Path) -> None:
    """Spoil images 2 to 5 of `make_coco`, each in its way, and remove image 7."""
    names = sorted((folder / "train2014").iterdir())
    write(names[2], BROKEN)
    write(names[3], b"")
    write(names[4], jpeg(4, (400, 300))[:-900])  # cut short
    write(names[5], png_of(50_000, 50_000))
    names[7].unlink()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_rows_of_broken_files_are_dropped_whatever_is_read_first(tmp_path, order):
    make_coco(tmp_path, images=12, captions=2)
    break_some(tmp_path)
    data = load_target("coco", "train", data_dir=tmp_path, resolution=16)
    left = [0, 1, 6, 8, 9, 10, 11]
    assert data.captions == [f"picture {k}, caption {j}" for j in range(2) for k in left]
    assert data.image_ids.tolist() == left * 2
    rows = torch.arange(len(data))
    orders = {"forwards": rows, "backwards": rows.flip(0), "shuffled": torch.randperm(len(data))}
    for some in orders[order].split(5):
        images = data.images(some)
        assert images.shape[1:] == (3, 16, 16) and images.dtype == torch.float32
        assert [number_in(image) for image in images] == data.image_ids[some].tolist()
    assert set(data.skipped) == {2, 3, 4, 5} and list(data.notes.values()) == [2]
    assert "pixels" in data.skipped[5]
    report = data.report()
    assert "14 rows; 4 unreadable images skipped" in report
    assert "image missing (first 'COCO_train2014_000000000007.jpg'; " in report
    assert "train2014/COCO_train2014_000000000002.jpg" in report and "\n" not in report


@pytest.mark.usefixtures("cache")
def test_enlarged_images_are_told(tmp_path):
    """Of four images two have a side below 20 pixels."""
    rows = [(f"{k}.jpg", f"picture {k}") for k in range(8)]
    make_folder(tmp_path, rows)
    for k, size in enumerate([(40, 19), (20, 20), (12, 64), (64, 20)] * 2):
        write(tmp_path / f"{k}.jpg", jpeg(k, size))
    splits = [load_target(str(tmp_path), split, resolution=20) for split in ("train", "validation")]
    sides = [(40, 19), (20, 20), (12, 64), (64, 20)] * 2
    for data in splits:
        data.note_enlarged(20)
        small = sum(min(sides[int(text.split()[1])]) < 20 for text in data.captions)
        told = f"enlarged to 20 px, of {len(data)} looked at: {small}"
        assert (told in data.report()) == (small > 0)
    assert sum(len(data) for data in splits) == 8


@pytest.mark.usefixtures("cache")
def test_a_limit_comes_before_the_check(tmp_path):
    make_coco(tmp_path, images=12, captions=2)
    break_some(tmp_path)
    data = load_target("coco", "train", data_dir=tmp_path, limit=6)  # of images 0, 3 and 8, twice
    assert data.captions == [f"picture {k}, caption {j}" for j in range(2) for k in (0, 8)]
    assert set(data.skipped) == {3}  # of the other broken ones nothing is known


@pytest.mark.usefixtures("cache")
def test_a_target_without_readable_images(tmp_path):
    make_coco(tmp_path, images=3)
    for path in (tmp_path / "train2014").iterdir():
        write(path, BROKEN)
    with pytest.raises(UserError, match=r"none of the 3 images of coco .*train2014/COCO_train2014"):
        load_target("coco", "train", data_dir=tmp_path)


@pytest.mark.usefixtures("cache")
def test_verify_finds_what_broke_after_the_check(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path, images=12, captions=2)
    data = load_target("coco", "train", data_dir=tmp_path, limit=4)
    path = tmp_path / "train2014" / "COCO_train2014_000000000000.jpg"
    stat = path.stat()
    write(path, BROKEN.ljust(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # nothing tells that it has changed
    with pytest.raises(UserError, match=r"000000000000\.jpg: .*check them again"):
        data.images([0])
    assert not load_target("coco", "train", data_dir=tmp_path, limit=4).skipped
    run(monkeypatch, "coco", "--data-dir", tmp_path, "--verify")
    assert "1 unreadable image skipped" in capsys.readouterr().out
    assert set(load_target("coco", "train", data_dir=tmp_path, limit=4).skipped) == {0}


@pytest.mark.usefixtures("cache")
def test_wordings_are_all_captions_of_an_image(tmp_path):
    make_coco(tmp_path, images=8, captions=3)
    captions, numbers = load_target("coco", "train", data_dir=tmp_path).wordings(4)
    assert len(captions) == 12 and sorted(set(numbers.tolist())) == [0, 2, 4, 6]
    assert [int(caption.split()[1][:-1]) for caption in captions] == numbers.tolist()


def test_emoji_know_more_wordings_than_their_rows_have():
    emoji = load_target("emoji", "train")  # one row an image
    captions, numbers = emoji.wordings(50)
    assert len(set(numbers.tolist())) == 50 and len(captions) > 120
    assert sum(emoji.captions[k] in captions for k in set(numbers.tolist())) > 45


# ---- what the rows are ----


def identities(folder: Path) -> dict[str, str]:
    """The identity of small targets in every layout, each below `folder`."""
    found = {}
    for target in ("coco", "cc3m", str(folder / "mine")):
        for data_dir in (folder, folder / "shards") if target == "cc3m" else (folder,):
            data = load_target(target, "train", data_dir=data_dir)
            found[f"{Path(target).name} {data_dir.name}"] = data.identity()
    return found


@pytest.fixture
def layouts(tmp_path, cache):
    make_coco(tmp_path, images=4)
    make_tsv(tmp_path, rows=4)
    make_shards(tmp_path / "shards", rows=4)
    rows = [*((f"train/{k}.jpg", f"picture {k}") for k in range(4)), ("validation/9.jpg", "x")]
    make_folder(tmp_path / "mine", rows)
    return tmp_path


def test_an_identity_is_the_rows_alone(layouts, monkeypatch, tmp_path):
    """Not the process's folder, the way to the data, the resolution, nor how often it is read."""
    before = identities(layouts)
    assert len(set(before.values())) == 4 == len(before)
    monkeypatch.chdir(layouts / "mine")
    assert load_target(".", "train").identity() == before[f"mine {tmp_path.name}"]
    monkeypatch.chdir(layouts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    assert [*identities(Path("shards") / "..").values()] == [*before.values()]
    large = load_target("coco", "train", data_dir=layouts, resolution=128)
    assert large.identity() == before[f"coco {tmp_path.name}"]
    annotations = layouts / "annotations" / "captions_train2014.json"
    content = json.loads(annotations.read_bytes())
    content["images"].reverse()  # which gives images other numbers, and rows nothing else
    write(annotations, json.dumps(content))
    os.utime(annotations, ns=(0, 0))
    assert identities(layouts) == before


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def edit(path: Path, old: str, new: str) -> None:
    write(path, path.read_text().replace(old, new, 1))


def reverse(path: Path) -> None:
    write(path, "\n".join(reversed(path.read_text().splitlines())))


def other_bytes(path: Path) -> None:
    write(path, path.read_bytes() + b"\0")


CHANGES = {
    "coco caption": lambda f: edit(f / "annotations/captions_train2014.json", "picture 1", "a"),
    "coco image": lambda f: other_bytes(f / "train2014" / "COCO_train2014_000000000003.jpg"),
    "coco time": lambda f: touch(f / "train2014" / "COCO_train2014_000000000000.jpg"),
    "mine rows reversed": lambda f: reverse(f / "mine" / "metadata.jsonl"),
    "mine caption": lambda f: edit(f / "mine" / "metadata.jsonl", "picture 3", "picture 4"),
    "mine image": lambda f: other_bytes(f / "mine" / "train" / "2.jpg"),
    "mine name": lambda f: (
        edit(f / "mine" / "metadata.jsonl", "train/2", "train/7"),
        (f / "mine" / "train" / "2.jpg").rename(f / "mine" / "train" / "7.jpg"),
    ),
    "mine image gone": lambda f: (f / "mine" / "train" / "0.jpg").unlink(),
    "cc3m caption": lambda f: [
        edit(path, "picture 1 ", "picture 7 ")
        for path in (f / "Train_GCC-training.tsv", f / "train" / "00000" / "000000001.txt")
    ],
    "cc3m image": lambda f: other_bytes(f / "train" / "00000" / "000000003.jpg"),
    "shards time": lambda f: touch(f / "shards" / "train" / "00001.tar"),
    "shards renamed": lambda f: (f / "shards/train/00001.tar").rename(f / "shards/train/00003.tar"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_of_a_target_alone_changes_its_identity(layouts, change):
    before = identities(layouts)
    CHANGES[change](layouts)
    after = identities(layouts)
    other = {name for name in before if before[name] != after[name]}
    assert len(other) == 1 and change.split()[0] in other.pop()


def test_without_states_files_may_be_copied(layouts):
    def identity() -> str:
        return load_target(str(layouts / "mine"), "train").identity(states=False)

    before = identity()
    for path in (layouts / "mine").rglob("*.jpg"):
        touch(path)
    assert identity() == before
    reverse(layouts / "mine" / "metadata.jsonl")
    assert identity() != before


def test_parts_of_a_target_have_identities_of_their_own():
    emoji = load_target("emoji", "validation")
    parts = [emoji, emoji.take([3, 4]), emoji.take([4, 3]), load_target("emoji", "train")]
    parts += [load_target("emoji", "validation", seed=1), numbered([0, 1]), numbered([1, 0])]
    assert len({part.identity() for part in parts}) == len(parts)
    assert emoji.take([4, 3]).take([1, 0]).identity() == emoji.take([3, 4]).identity()
    assert numbered([0, 1]).identity() == numbered([0, 1]).identity()
    names = [name for name, _ in emoji.stamps()]
    assert len(set(names)) == len(emoji) and names[0].endswith((" flat", " outlined"))


def test_an_image_of_other_pixels_is_another_one_where_nothing_else_is_known():
    data = numbered([0, 1, 2])
    other = replace(data, read=lambda row: data.read(row) + np.uint8(row == 1))
    changed = [one != two for one, two in zip(data.stamps(), other.stamps(), strict=True)]
    assert changed == [False, True, False] and data.identity() != other.identity()


# ---- a target by name ----


def test_limit_takes_rows_spread_over_the_target():
    everything, few = load_target("emoji", "train"), load_target("emoji", "train", limit=10)
    assert len(few) == 10 and set(few.captions) <= set(everything.captions)
    row = everything.captions.index(few.captions[7])
    assert np.array_equal(few.read(7), everything.read(row))
    assert few.image_ids[7] == everything.image_ids[row]
    assert len(set(few.groups)) > 3


@given(st.integers(1, 50), st.none() | st.integers(1, 60))
def test_evenly_spaced(rows, limit):
    got = evenly_spaced(rows, limit)
    assert len(got) == min(rows, limit or rows) and sorted(set(got)) == got
    assert got[0] == 0 and got[-1] < rows
    assert max(np.diff([*got, rows])) - min(np.diff([*got, rows])) <= 1


def test_unknown_target(tmp_path):
    with pytest.raises(UserError, match=r"imagenet.*emoji"):
        load_target("imagenet", "train")
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match="unknown"):
        load_target(str(tmp_path / "file"), "train")


@pytest.mark.parametrize("target", ["coco", "cc3m"])
def test_missing_data_is_one_helpful_line(target, tmp_path):
    with pytest.raises(
        UserError, match=rf"python -m targets {target} --download.*emoji needs noth"
    ):
        load_target(target, "train")
    with pytest.raises(UserError) as refused:
        load_target(target, "train", data_dir=tmp_path)
    line = str(refused.value)
    assert "\n" not in line and str(tmp_path) in line and "emoji needs nothing" in line
    assert f"`python -m targets {target} --download --data-dir {tmp_path}`" in line
    assert {"coco": "annotations/captions_train2014.json", "cc3m": "training.tsv"}[target] in line


# ---- python -m targets ----


def run(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["targets", *map(str, arguments)])
    command.main()


@pytest.mark.usefixtures("cache")
def test_the_command_line_describes_a_target(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path, images=12, captions=2)
    write(tmp_path / "train2014" / "COCO_train2014_000000000005.jpg", BROKEN)
    run(monkeypatch, "coco", "--data-dir", tmp_path)
    out = capsys.readouterr().out
    assert "train: 12 images, e.g. 'picture 0, caption 0'" in out
    assert "checked 12 of them; coco: 24 rows; 1 unreadable image skipped" in out
    assert "validation: 3 images" in out
    monkeypatch.setattr(command, "QUICK_CHECK", 4)
    run(monkeypatch, "coco", "--data-dir", tmp_path)
    assert "checked 4 of them; coco: 24 rows; 0 unreadable" in capsys.readouterr().out
    run(monkeypatch, "coco", "--data-dir", tmp_path, "--verify")
    out = capsys.readouterr().out
    assert "checked 12 of them" in out
    assert "unreadable: train2014/COCO_train2014_000000000005.jpg: " in out


@pytest.mark.parametrize("arguments", [["emoji"], ["coco"], ["."]])
def test_nothing_to_download(arguments, monkeypatch):
    with pytest.raises(UserError, match=r"coco, cc3m.*--data-dir"):
        run(monkeypatch, *arguments, "--download")
