"""COCO, CC3M and folders on disk: every caption beside its own image, every fault in one line."""

import csv
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import (
    jpeg,
    make_coco,
    make_folder,
    make_shards,
    make_tsv,
    number_in,
    write,
)

from common.errors import UserError
from targets.images import CaptionedImages, load_target
from targets.layouts import MAX_CAPTION_CHARACTERS, safe_name, splits_of


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def numbers(data: CaptionedImages) -> list[int]:
    """What the captions say."""
    return [int(caption.split()[1].strip(",")) for caption in data.captions]


def shown(data: CaptionedImages) -> list[int]:
    """What the images show."""
    return [number_in(image) for image in data.images(range(len(data)))]


def refused(target: str | Path, data_dir: Path | None, *words: str, split: str = "train") -> None:
    """Loading must fail in one line that holds these words."""
    with pytest.raises(UserError) as error:
        load_target(str(target), split, data_dir=data_dir)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


# ---- coco ----


def captions_file(folder: Path) -> Path:
    return folder / "annotations" / "captions_train2014.json"


def test_coco_has_a_row_a_caption(tmp_path):
    make_coco(tmp_path, images=5, captions=3, validation=2)
    train, validation = (load_target("coco", s, data_dir=tmp_path) for s in ("train", "validation"))
    assert train.name == "coco" and len(train) == 15 and len(validation) == 6
    assert numbers(train) == shown(train) == [*range(5)] * 3
    assert numbers(validation) == shown(validation) == [5, 6] * 3
    assert train.captions[0] == "picture 0, caption 0"  # the line feed is gone
    assert train.groups == train.styles == [""] * 15


def test_coco_without_some_images_or_captions(tmp_path):
    make_coco(tmp_path, images=6, captions=2)
    (tmp_path / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    content = json.loads(captions_file(tmp_path).read_text())
    content["annotations"][3]["caption"] = " \n\t"
    content["annotations"].append({"id": 1, "image_id": 77, "caption": "of no image"})
    write(captions_file(tmp_path), json.dumps(content))
    data = load_target("coco", "train", data_dir=tmp_path)
    assert numbers(data) == shown(data) == [0, 2, 4, 5, 0, 2, 3, 4, 5]
    gone, *others = data.notes.items()
    assert gone[0].startswith("image missing (first 'COCO_train2014_000000000001.jpg'; ")
    assert gone[1] == 2 and dict(others) == {"caption empty": 1, "image not listed": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not JSON"]),
        (b'{"images": [}', ["not JSON", "line 1"]),
        (b'{"images": [], "annotations": "\xe9"}', ["not UTF-8", "line 1", "0xe9"]),
        (b"[1, 2]", ["COCO's layout"]),
        (b'{"images": [{"id": 1}], "annotations": []}', ["COCO's layout", "file_name"]),
        (b'{"images": [], "annotations": []}', ["no captioned images", "no rows"]),
        (
            b'{"images": [{"id": 1, "file_name": "COCO_train2014_000000000000.jpg"}],'
            b' "annotations": [{"image_id": 1, "caption": 5}]}',
            ["COCO's layout"],
        ),
        (
            b'{"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": []}',
            ["../x.jpg", "refused"],
        ),
        (b"[" * 100_000, ["not JSON"]),
    ],
)
def test_a_bad_file_of_coco_captions(content, words, tmp_path):
    make_coco(tmp_path, images=1)
    write(captions_file(tmp_path), content)
    refused("coco", tmp_path, "captions_train2014.json", *words)


def test_coco_without_any_image(tmp_path):
    make_coco(tmp_path, images=2)
    for path in (tmp_path / "train2014").iterdir():
        path.unlink()
    refused("coco", tmp_path, "no captioned images", "train2014 has no files): 4")
    (tmp_path / "train2014").rmdir()
    refused("coco", tmp_path, "train2014", "--download")


# ---- cc3m, TSV and folder ----


def test_a_row_of_the_tsv_belongs_to_the_image_of_its_number(tmp_path):
    make_tsv(tmp_path, rows=8)
    for k in (0, 3):
        (tmp_path / "train" / "00000" / f"{k:09d}.jpg").unlink()
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert numbers(data) == shown(data) == [1, 2, 4, 5, 6, 7]
    assert data.captions[0] == "picture 1 , by the sea"
    ((reason, count),) = data.notes.items()
    assert count == 2 and "(first '000000000.jpg'; " in reason and "'000000001.jpg'" in reason
    assert len(load_target("cc3m", "validation", data_dir=tmp_path)) == 8


def test_rows_from_ten_thousand_on_are_in_the_next_folder(tmp_path):
    tsv = tmp_path / "Train_GCC-training.tsv"
    write(tsv, "".join(f"picture {k}\thttp://x/{k}\n" for k in range(20_003)))
    for k in (1, 10_000, 20_002):
        write(tmp_path / "train" / f"{k // 10_000:05d}" / f"{k:09d}.jpg", jpeg(k))
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert data.captions == ["picture 1", "picture 10000", "picture 20002"]
    assert shown(data) == [1, 10_000 % 256, 20_002 % 256]


def test_a_header_and_blank_lines_are_no_rows(tmp_path):
    make_tsv(tmp_path, rows=4)
    tsv = tmp_path / "Train_GCC-training.tsv"
    lines = tsv.read_text().splitlines()
    write(tsv, "\ufeffcaption\turl\r\n" + "\r\n\r\n".join(lines))
    data = load_target("cc3m", "train", data_dir=tmp_path)
    assert numbers(data) == shown(data) == [0, 1, 2, 3]


def test_images_of_another_list_are_noticed(tmp_path):
    make_tsv(tmp_path, rows=4)
    tsv = tmp_path / "Train_GCC-training.tsv"
    write(tsv, "one more\thttp://x\n" + tsv.read_text())
    refused("cc3m", tmp_path, "000000000.txt", "line 1", "another list")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no rows"]),
        (b"\n \n", ["no rows"]),
        (b"picture 0 , by the sea\thttp://x\nno url\n", ["line 2", "no tab"]),
        (b"picture 0 , by the sea\thttp://x\ncaf\xe9\thttp://x\n", ["line 2", "0xe9", "UTF-8"]),
        ("picture 0\thttp://x\n".encode("utf-16"), ["line 1", "0xff", "UTF-8"]),
    ],
)
def test_a_bad_tsv(content, words, tmp_path):
    make_tsv(tmp_path, rows=1)
    write(tmp_path / "Train_GCC-training.tsv", content)
    refused("cc3m", tmp_path, "Train_GCC-training.tsv", *words)


def test_a_tsv_without_its_images(tmp_path):
    write(tmp_path / "Train_GCC-training.tsv", "a caption\thttp://x\n")
    refused("cc3m", tmp_path, "train/", "--download")
    (tmp_path / "train").mkdir()
    refused("cc3m", tmp_path, "image missing (first '000000000.jpg'; ", "00000 has no files): 1")


def test_shards_come_before_the_tsv(tmp_path):
    make_tsv(tmp_path, rows=4)
    make_shards(tmp_path, rows=8, rows_each=3)
    for split in ("train", "validation"):
        data = load_target("cc3m", split, data_dir=tmp_path)
        assert numbers(data) == shown(data) == [*range(8)]
        assert data.captions[5] == "picture 5, in a shard"


# ---- a folder ----


def rows_of(count: int, captions: int = 2, folder: str = "") -> list[tuple[str, str]]:
    return [
        (f"{folder}{k}.jpg", f"picture {k}, {j}") for j in range(captions) for k in range(count)
    ]


def test_a_folder_is_split_by_its_subfolders(tmp_path):
    make_folder(tmp_path / "train", rows_of(5))
    make_folder(tmp_path / "validation", rows_of(3))
    train, validation = (load_target(str(tmp_path), split) for split in ("train", "validation"))
    assert numbers(train) == shown(train) == [0, 1, 2, 3, 4] * 2
    assert numbers(validation) == shown(validation) == [0, 1, 2] * 2
    assert train.name == tmp_path.name


def test_a_folder_is_split_by_where_its_files_are(tmp_path):
    make_folder(tmp_path, [*rows_of(5, folder="train/"), ("validation/9.jpg", "picture 9, 0")])
    assert set(numbers(load_target(str(tmp_path), "train"))) == {0, 1, 2, 3, 4}
    assert numbers(load_target(str(tmp_path), "validation")) == [9]


def test_a_folder_is_split_by_hash_and_by_image(tmp_path):
    make_folder(tmp_path, rows_of(60, captions=3, folder="a/b/"))
    train, validation = (load_target(str(tmp_path), split) for split in ("train", "validation"))
    held_out = {  # the tenth with the smallest hashes, counted independently
        k
        for k in range(60)
        if int(hashlib.sha256(f"a/b/{k}.jpg".encode()).hexdigest()[:12], 16) < 16**12 // 10
    }
    assert set(numbers(validation)) == held_out and set(numbers(train)) == {*range(60)} - held_out
    assert len(train) + len(validation) == 180
    assert shown(train) == numbers(train) and shown(validation) == numbers(validation)
    assert 0 < len(held_out) < 15


@given(st.lists(st.text("ab/.", min_size=1, max_size=6), min_size=2, max_size=40, unique=True))
def test_both_parts_have_images_and_membership_is_the_names_alone(names):
    splits = splits_of(names)
    assert set(splits) <= {"train", "validation"} and "validation" in splits
    assert splits == splits_of(names[::-1])[::-1]
    if splits.count("validation") > 1:  # more images move none of those that were held out
        assert splits_of([*names, *(f"c{k}" for k in range(200))])[: len(names)] == splits


def test_a_csv_is_read_like_jsonl(tmp_path):
    texts = {0: "picture 0, in\na column", 1: 'picture 1, "quoted"', 2: "picture 2, ü一"}
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)  # which ends lines with CRLF
        rows.writerow(["id", "text", "file_name"])
        for k, text in texts.items():
            rows.writerow([k, text, f"{k}.jpg"])
        file.write("\r\n")
    for part in ("train", "validation"):
        write(tmp_path / part / "metadata.csv", (tmp_path / "rows.csv").read_bytes())
        for k in texts:
            write(tmp_path / part / f"{k}.jpg", jpeg(k))
    for part in ("train", "validation"):
        data = load_target(str(tmp_path), part)
        assert data.captions == [" ".join(text.split()) for text in texts.values()]
        assert shown(data) == [0, 1, 2] and not data.notes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no rows"]),
        (b"file_name;text\n0.jpg;a\n", ["line 2", "has file_name;text", "needs file_name"]),
        (b"file_name,caption\n0.jpg,a\n", ["text missing", "file_name, caption): 1"]),
        (b"file_name,text\n0.jpg\n", ["caption empty: 1"]),
        (b"file_name,text\n0.jpg,caf\xe9\n", ["line 2", "0xe9", "UTF-8"]),
        (b"file_name,text\n0.jpg,'" + b"x" * 200_000 + b"\n", ["after line 1", "field"]),
    ],
)
def test_a_bad_csv(content, words, tmp_path):
    write(tmp_path / "0.jpg", jpeg(0))
    write(tmp_path / "metadata.csv", content)
    refused(tmp_path, None, "metadata.csv", *words)


def test_a_parquet_file_is_said_to_be_one(tmp_path):
    write(tmp_path / "train" / "metadata.parquet", b"PAR1")
    refused(tmp_path, None, "no metadata.jsonl or metadata.csv", "it has train;", "read_parquet")


@pytest.mark.parametrize(
    ("listed", "there", "words"),
    [
        ("1.png", "1.PNG", ["first '1.png'", "has '1.PNG'"]),
        ("\u00e4.jpg", "a\u0308.jpg", [r"first '\xe4.jpg'", r"has 'a\u0308.jpg'"]),
        ("train/1.jpg", "1.jpg", ["first 'train/1.jpg'", "train/train has no files"]),
        ("1.jpg", "images/1.jpg", ["first '1.jpg'", "train has 'images', 'metadata.jsonl'"]),
    ],
)
def test_a_name_that_is_not_there_is_shown_beside_those_that_are(listed, there, words, tmp_path):
    for part in ("train", "validation"):
        make_folder(tmp_path / part, [("9.jpg", "picture 9")])
    row = json.dumps({"file_name": listed, "text": "picture 1"})
    write(tmp_path / "train" / "metadata.jsonl", row)
    (tmp_path / "train" / "9.jpg").unlink()
    write(tmp_path / "train" / there, jpeg(1))
    refused(tmp_path, None, "image missing", *words)


@given(
    faults=st.lists(st.sampled_from(["", "gone", "empty", "no text", "third"]), max_size=30),
    cut=st.integers(0, 2),
)
def test_every_row_is_used_or_counted(tmp_path_factory, faults, cut):
    folder = tmp_path_factory.mktemp("counted")
    faults = [*faults, ""]
    lines = [json.dumps({"file_name": "validation/0.jpg", "text": "x"})]
    write(folder / "validation" / "0.jpg", jpeg(0))
    for k, fault in enumerate(faults):
        name = f"{'test' if fault == 'third' else 'train'}/{k}.jpg"
        if fault != "gone":
            write(folder / name, b"" if k < cut and not fault and k + 1 < len(faults) else jpeg(k))
        text = {} if fault == "no text" else {"text": " " if fault == "empty" else f"picture {k}"}
        lines.append(json.dumps({"file_name": name} | text))
    write(folder / "metadata.jsonl", "\n".join(lines))
    data = load_target(str(folder), "train")
    assert len(data) + len(data.skipped) + sum(data.notes.values()) == len(faults)
    assert len(data) + len(data.skipped) == faults.count("")
    kinds = {"gone": "image missing", "empty": "caption empty", "no text": "text missing"}
    for fault, reason in (kinds | {"third": "image in neither"}).items():
        counted = [count for note, count in data.notes.items() if note.startswith(reason)]
        assert sum(counted) == faults.count(fault)
    assert numbers(data) == shown(data)


def test_names_that_mean_the_same_file_are_one_image(tmp_path):
    names = ["1.jpg", "./1.jpg", ".//1.jpg"]
    make_folder(tmp_path, [(name, "picture 1") for name in names])
    assert load_target(str(tmp_path), "train").image_ids.tolist() == [0, 0, 0]
    refused(tmp_path, None, "no image for validation", split="validation")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no rows"]),
        (b'{"file_name": "0.jpg", "text": "a"}\n{"file_name": \n', ["line 2", "not JSON"]),
        (b'\n\n{"file_name": "0.jpg", "text": "caf\xe9"}\n', ["line 3", "0xe9", "UTF-8"]),
        (b'["0.jpg", "a"]\n', ["line 1", "file_name", "text"]),
        (b'{"file_name": "0.jpg", "text": ["a"]}\n', ["line 1", "text"]),
        (b'{"caption": "a", "image": 3}\n', ["line 1", "caption, image", "needs file_name"]),
        (b'{"file_name": null, "text": "a"}\n', ["line 1", "file_name 'None' is refused"]),
        (b'{"file_name": "../0.jpg", "text": "a"}\n', ["line 1", "'../0.jpg' is refused"]),
        (b'{"file_name": "a/../../0.jpg", "text": "a"}\n', ["refused"]),
        (b'{"file_name": "/etc/passwd", "text": "a"}\n', ["'/etc/passwd' is refused"]),
        (b'{"file_name": "C:/x.jpg", "text": "a"}\n', ["refused"]),
        (b'{"file_name": "a\\\\0.jpg", "text": "a"}\n', ["refused", "with /"]),
        (b'{"file_name": "a\\u0000.jpg", "text": "a"}\n', ["refused"]),
        (b'{"file_name": "0.jpg", "caption": "a"}\n', ["text missing", "file_name, caption): 1"]),
        (b'{"file_name": "0.jpg", "text": null}\n', ["caption empty: 1"]),
        (b'{"file_name": "9.jpg", "text": "a"}\n', ["image missing (first '9.jpg'; ", "'0.jpg'"]),
        (b"[" * 100_000, ["line 1", "not JSON"]),
    ],
)
def test_bad_metadata(content, words, tmp_path):
    write(tmp_path / "0.jpg", jpeg(0))
    write(tmp_path / "metadata.jsonl", content)
    refused(tmp_path, None, "metadata.jsonl", *words)


def test_a_folder_without_metadata(tmp_path):
    refused(tmp_path, None, "no metadata.jsonl", '{"file_name": ')
    make_folder(tmp_path / "train", rows_of(2))
    refused(tmp_path, None, "validation/; it has train;")


@given(st.text())
def test_a_safe_name_stays_below_the_folder(name):
    try:
        path = safe_name(name, "here")
    except UserError as error:
        assert "here" in str(error)
        return
    folder = os.path.abspath("/folder")
    assert os.path.abspath(os.path.join(folder, path)).startswith(folder + os.sep)


def test_symbolic_links_are_followed_and_pipes_skipped(tmp_path):
    make_folder(tmp_path / "f", [(f"{k}.jpg", f"picture {k}") for k in range(20)])
    write(tmp_path / "elsewhere.jpg", jpeg(3))
    (tmp_path / "f" / "3.jpg").unlink()
    (tmp_path / "f" / "3.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "f" / "4.jpg").unlink()
    (tmp_path / "f" / "4.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "f" / "5.jpg").unlink()
    os.mkfifo(tmp_path / "f" / "5.jpg")  # which would block whoever opens it
    (tmp_path / "f" / "6.jpg").unlink()
    (tmp_path / "f" / "6.jpg").mkdir()
    data = load_target(str(tmp_path / "f"), "train")
    assert numbers(data) == shown(data) and 3 in numbers(data)
    skipped = {why.partition(":")[0] for why in data.skipped.values()}
    assert skipped == {"4.jpg", "5.jpg", "6.jpg"}


def test_long_and_odd_captions(tmp_path):
    captions = ["word " * 10_000, "a\u2028b\x00c", "lone \ud800 surrogate", "  \u3000 "]
    make_folder(tmp_path, [(f"{k}.jpg", text) for k, text in enumerate(captions)])
    make_folder(tmp_path / "train", [(f"{k}.jpg", text) for k, text in enumerate(captions)])
    make_folder(tmp_path / "validation", [("0.jpg", "x")])
    data = load_target(str(tmp_path), "train")
    assert data.captions[0] == ("word " * 10_000)[:MAX_CAPTION_CHARACTERS]
    assert data.captions[1:] == ["a b c", "lone ? surrogate"]
    assert data.notes == {"caption clipped": 1, "caption empty": 1}
    assert "caption clipped: 1" in data.report()
