"""Webdataset shards: found again at their offsets, indexed once, again when they change."""

import io
import os
import tarfile

import pytest
from PIL import Image
from small_data import BROKEN, colour, jpeg, make_shard, make_shards, number_in, sample

from common.errors import UserError
from targets import shards
from targets.images import load_target
from targets.shards import read_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and the number of shards walked through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    walked = []
    walk = shards.read_shard
    monkeypatch.setattr(shards, "read_shard", lambda path: walked.append(path.name) or walk(path))
    return walked


def test_every_caption_is_beside_its_image(tmp_path):
    make_shards(tmp_path, rows=8, rows_each=3)
    paths = sorted((tmp_path / "train").glob("*.tar"))
    assert len(paths) == 3
    captions, images, notes = read_shards(paths)
    assert captions == [f"picture {k}, in a shard" for k in range(8)] and not notes
    assert [images.open(k).read() for k in range(8)] == [jpeg(k) for k in range(8)]
    assert images.label(4).startswith("00001.tar at byte ")


def test_a_byte_order_mark_is_no_text(tmp_path):
    make_shard(tmp_path / "0.tar", sample(0) | {"000000000.txt": b"\xef\xbb\xbfpicture 0"})
    for _ in range(2):  # read, and from the cache
        assert read_shards([tmp_path / "0.tar"])[0] == ["picture 0"]


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, cache):
    path = tmp_path / "00000.tar"
    make_shard(path, sample(0) | sample(1))
    for _ in range(2):
        assert read_shards([path])[0] == ["picture 0, in a shard", "picture 1, in a shard"]
    assert cache == ["00000.tar"]
    before = path.stat()
    make_shard(path, sample(2) | sample(1))  # of the same size
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read_shards([path])[0][0] == "picture 2, in a shard"
    make_shard(path, sample(3) | {"README": bytes(10_000)})  # of the same time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read_shards([path])[0] == ["picture 3, in a shard"]
    assert len(cache) == 3
    (index,) = (tmp_path / "cache" / "aptp" / "shards").iterdir()
    index.write_bytes(index.read_bytes()[:-5])  # damaged
    assert read_shards([path])[0] == ["picture 3, in a shard"] and len(cache) == 4
    assert read_shards([path])[0] == ["picture 3, in a shard"] and len(cache) == 4


def test_what_is_left_out_is_counted(tmp_path):
    files = sample(0) | sample(1) | sample(2) | sample(3) | sample(4)
    del files["000000000.txt"], files["000000001.jpg"]
    files["000000002.txt"] = b"caf\xe9"
    files["000000003.txt"] = b"\n"
    files |= {"README": b"no sample", "a.b/000000009.JPG": jpeg(9), "a.b/000000009.txt": b"last"}
    make_shard(tmp_path / "train" / "x.tar", files)
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert data.captions == ["picture 4, in a shard", "last"]
    assert [number_in(image) for image in data.images([0, 1])] == [4, 9]
    assert data.notes == {
        "caption missing or not UTF-8": 2,
        "image missing": 1,
        "caption empty": 1,
    }


def test_every_sample_is_used_or_counted(tmp_path):
    """A link, a file without its partner, a key twice, a kind that Pillow reads as well."""
    path = tmp_path / "train" / "0.tar"
    gif, notes = Image.new("RGB", (40, 30), colour(0)), io.BytesIO()
    gif.save(notes, "GIF")
    files = {"a.gif": notes.getvalue(), "a.txt": b"picture 0", "only.json": b"{}", "README": b""}
    make_shard(path, files | sample(1) | {"b.jpg": jpeg(2), "c.xyz": b"no sample's file"})
    with tarfile.open(path, "a") as archive:
        for name, content in sample(1).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name in ("d.jpg", "e"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert [number_in(image) for image in data.images([0, 1])] == [0, 1] and len(data) == 2
    assert data.notes == {
        "image missing": 2,  # of only.json and of the link d.jpg
        "caption missing or not UTF-8": 1,
        "file twice": 3,
    }


def test_same_keys_in_two_shards_are_two_rows(tmp_path):
    for shard, k in ((0, 5), (1, 6)):
        files = {f"000.{kind.partition('.')[2]}": content for kind, content in sample(k).items()}
        make_shard(tmp_path / "train" / f"{shard}.tar", files)
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert [number_in(image) for image in data.images([0, 1])] == [5, 6]


def test_a_shard_cut_short_at_any_byte_gives_what_is_whole(tmp_path):
    path = tmp_path / "whole.tar"
    make_shard(path, sample(0) | sample(1) | sample(2))
    whole = path.read_bytes()
    captions = [f"picture {k}, in a shard".encode() for k in range(3)]
    ends = [whole.index(text + b"\0") + len(text) for text in captions]  # a sample's last file
    for length in [*range(0, len(whole), 331), *ends, *(end - 1 for end in ends)]:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        index, notes = shards.read_shard(cut)
        whole_samples = sum(length >= end for end in ends)
        assert len(index["end"]) == len(index["place"]) == whole_samples, length
        ended = length >= ends[-1] and not whole[max(0, length - 512) : length].strip(b"\0")
        assert ended or notes["shard cut short"] == 1


def test_no_whole_sample_at_all(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(b"")
    (tmp_path / "train" / "1.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(UserError, match=r"no captioned images.*shard cut short: 2"):
        load_target("cc3m", "train", data_dir=tmp_path)


def test_an_unreadable_image_in_a_shard_is_skipped(tmp_path):
    files = sample(0) | sample(1) | sample(2)
    files["000000001.jpg"] = BROKEN
    make_shard(tmp_path / "train" / "0.tar", files)
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert data.captions == ["picture 0, in a shard", "picture 2, in a shard"]
    assert [number_in(image) for image in data.images([0, 1])] == [0, 2]
    assert data.image_ids.tolist() == [0, 2] and data.skipped[1].startswith("0.tar at byte ")


def test_a_mended_shard_is_checked_again(tmp_path):
    path = tmp_path / "train" / "0.tar"
    files = sample(0) | sample(1)
    make_shard(path, files | {"000000001.jpg": BROKEN.ljust(len(files["000000001.jpg"]))})
    before = path.stat()
    assert len(load_target("cc3m", "train", data_dir=tmp_path)) == 1
    make_shard(path, files)  # of the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert len(load_target("cc3m", "train", data_dir=tmp_path)) == 2


def test_an_enormous_image_is_not_read(tmp_path, monkeypatch):
    make_shard(tmp_path / "train" / "0.tar", sample(0))
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(UserError, match="bytes are more than 10"):
        load_target("cc3m", "train", data_dir=tmp_path)
