"""The layouts of captioned images on disk: COCO 2014, CC3M, and your own folder. App. E.1.

| target | captions | images |
|---|---|---|
| `coco` | `annotations/captions_{train,val}2014.json` | `train2014/`, `val2014/` |
| `cc3m` | `key.txt` in webdataset shards `{train,validation}/*.tar` | `key.jpg` beside it |
| `cc3m` | `Train_GCC-training.tsv`, `Validation_GCC-1.1.0-Validation.tsv` | see below |
| a folder | `text` in `metadata.jsonl` or `metadata.csv`, a row a caption | `file_name` there |

The image of row r of a TSV (the first is row 0) is `{train,validation}/SSSSS/RRRRRRRRR.jpg`: r with
nine digits, in a folder named r // 10000 with five. These are img2dataset's names, for files and
for shards; it makes either from the official TSV (`python -m targets cc3m --download` says how).
Where `RRRRRRRRR.txt` is beside the image, one of each folder is compared with the TSV.

Your own folder is split by `train/` and `validation/`, each with its metadata, or by these two at
the start of file names. Without them, a tenth of the images is held out: those whose name has the
smallest hashes, so all captions of an image are in one split. A `file_name` is a path below the
folder of its metadata; symbolic links are followed.

Text is UTF-8. White space is folded, and captions are clipped to 10,000 characters. Rows that
cannot be used are left out, and `CaptionedFiles.notes` counts every one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from common.files import one_line, read_lines, read_text
from targets.decoding import ImageFiles
from targets.shards import read_shards

MAX_CAPTION_CHARACTERS = 10_000  # far more than any text encoder reads
VALIDATION_SHARE = 0.1  # of a folder's images
COCO = {"train": "train2014", "validation": "val2014"}
CC3M = {"train": "Train_GCC-training.tsv", "validation": "Validation_GCC-1.1.0-Validation.tsv"}
CC3M_SHARD = 10_000  # rows in a folder, img2dataset's default
METADATA = ("metadata.jsonl", "metadata.csv")  # the first that is there is read


@dataclass(frozen=True)
class CaptionedFiles:
    """One split: a caption a row, and the number of the image that it shows."""

    captions: list[str]
    image_ids: np.ndarray  # (rows,) int64
    files: ImageFiles  # by image_ids
    notes: Counter[str]  # why rows were left out or changed -> how many


def gather(
    pairs: Iterable[tuple[int | str, str]],
    files: ImageFiles,
    source: Path,
    notes: Counter[str] | None = None,
) -> CaptionedFiles:
    """A row for each (image's number, caption); text instead of a number: why it is left out.

    Raises:
        UserError: no row is left.
    """
    captions, image_ids, notes = [], array("q"), Counter(notes or {})
    for image_id, text in pairs:
        caption = one_line(text)
        if isinstance(image_id, str):
            notes[image_id] += 1
        elif not caption:
            notes["caption empty"] += 1
        else:
            notes["caption clipped"] += len(caption) > MAX_CAPTION_CHARACTERS
            captions.append(caption[:MAX_CAPTION_CHARACTERS])
            image_ids.append(image_id)
    notes = +notes  # without zeros
    if not captions:
        why = ", ".join(f"{reason}: {count:,}" for reason, count in notes.items())
        raise UserError(f"{source} gives no captioned images ({why or 'it has no rows'})")
    return CaptionedFiles(captions, np.frombuffer(image_ids, np.int64), files, notes)


def missing(target: str, what: str, data_dir: Path) -> UserError:
    """The error that says what is missing, from where, and how to get it."""
    return UserError(
        f"target {target} needs {what}, which is not in {data_dir.resolve()}; get it with `python "
        f"-m targets {target} --download --data-dir {data_dir}`; target emoji needs nothing"
    )


# ---- names of files ----


def safe_name(name: Any, where: str) -> str:
    """A file's name in the folder, with `/`.

    Raises:
        UserError: it is no relative path, or leads out of the folder.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    bad = not path.name or path.is_absolute() or ".." in path.parts
    if bad or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise UserError(
            f"{where}: file_name {str(name)[:80]!r} is refused; give a path below the folder, "
            f"with / and without .."
        )
    return str(path)


def listed(folder: Path) -> set[str]:
    """The names in a folder; none if there is no such folder."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def why_missing(folder: Path, names: list[str]) -> list[str]:
    """Why each of these files is missing; empty for those that are there.

    Each folder is listed once. The reason names the first file that is missing, and what is there
    instead: often the same name in another spelling.
    """
    list_once = cache(lambda parent: listed(folder / parent))
    parts = [name.rpartition("/") for name in names]
    there = [base in list_once(parent) for parent, _, base in parts]
    if all(there):
        return [""] * len(names)
    first = there.index(False)
    parent, _, base = parts[first]
    alike = [name for name in list_once(parent) if spelling(name) == spelling(base)]
    shown = ascii if alike else repr  # as repr, two spellings may look the same
    few = ", ".join(shown(name) for name in sorted(alike or list_once(parent))[:3])
    place = f"{folder / parent} has {few or 'no files'}"
    reason = f"image missing (first {shown(names[first])}; {place})"
    return ["" if found else reason for found in there]


def spelling(name: str) -> str:
    """What spellings of one name share: upper and lower case, composed and decomposed accents."""
    return unicodedata.normalize("NFC", name).casefold()


def files_at(path: Callable[[int], Path], label: Callable[[int], str]) -> ImageFiles:
    """Images that are files of their own, by number."""

    def open_file(image_id: int) -> BinaryIO:
        if not path(image_id).is_file():  # a pipe would block for ever
            raise FileNotFoundError("no such file")
        return path(image_id).open("rb")

    @cache
    def state(image_id: int) -> str:
        try:
            stat = path(image_id).stat()
        except OSError:
            return "no such file"
        return f"{stat.st_size} {stat.st_mtime_ns}"

    return ImageFiles(open_file, label, state)


# ---- COCO and CC3M ----


def read_coco(data_dir: Path, split: str) -> CaptionedFiles:
    """COCO 2014, a row for each caption, in the file's order. Raises `UserError`."""
    folder = data_dir / COCO[split]
    path = data_dir / "annotations" / f"captions_{COCO[split]}.json"
    for needed in (path, folder):
        if not needed.exists():
            raise missing("coco", str(needed.relative_to(data_dir)), data_dir)
    try:
        content = json.loads(read_text(path))
        names = [safe_name(image["file_name"], str(path)) for image in content["images"]]
        gone = why_missing(folder, names)
        number = {image["id"]: gone[k] or k for k, image in enumerate(content["images"])}
        return gather(
            (
                (number.get(note["image_id"], "image not listed"), note["caption"])
                for note in content["annotations"]
            ),
            files_at(lambda k: folder / names[k], lambda k: f"{folder.name}/{names[k]}"),
            path,
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and fetch it again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not in COCO's layout ({type(error).__name__}: {error}); it needs images "
            f"with id and file_name, annotations with image_id and caption"
        ) from None


def read_cc3m(data_dir: Path, split: str) -> CaptionedFiles:
    """CC3M from shards where there are any, otherwise TSV and image folder. Raises `UserError`."""
    folder, path = data_dir / split, data_dir / CC3M[split]
    shards = sorted(folder.glob("*.tar"))
    if shards:
        captions, files, notes = read_shards(shards)
        return gather(enumerate(captions), files, folder, notes)
    if not path.exists():
        raise missing("cc3m", f"{split}/*.tar or {CC3M[split]}", data_dir)
    if not folder.is_dir():
        raise missing("cc3m", f"{split}/ with the images of {CC3M[split]}", data_dir)

    def image(row: int) -> Path:
        return folder / f"{row // CC3M_SHARD:05d}" / f"{row:09d}.jpg"

    files = files_at(image, lambda row: str(image(row).relative_to(data_dir)))
    return gather(tsv_pairs(path, image), files, path)


def tsv_pairs(path: Path, image: Callable[[int], Path]) -> Iterator[tuple[int | str, str]]:
    """Row number and caption of each line; `image` is a row's file."""
    row, checked, gone = 0, False, ""
    names: set[str] = set()
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip() or (row == 0 and line == "caption\turl"):  # img2dataset's header
            continue
        caption, tab, _ = line.partition("\t")
        if not tab:
            raise UserError(f"{path}, line {number}: there is no tab between caption and url")
        if row % CC3M_SHARD == 0:
            names, checked = listed(image(row).parent), False
        there = f"{row:09d}.jpg" in names
        if there and not checked and f"{row:09d}.txt" in names:
            checked, text = True, image(row).with_suffix(".txt")
            if letters(read_text(text)) != letters(caption):
                raise UserError(
                    f"{text} is not the caption in line {number} of {path}: the images belong to "
                    f"another list; fetch them again, or as img2dataset's webdataset shards"
                )
        if not there and not gone:
            gone = why_missing(image(row).parent, [image(row).name])[0]
        yield row if there else gone, caption
        row += 1


def letters(text: str) -> str:
    return re.sub(r"\W", "", text)


# ---- a folder of your own ----


def metadata_of(folder: Path) -> Path | None:
    """The file of captions in a folder."""
    return next((folder / name for name in METADATA if (folder / name).exists()), None)


def metadata_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a `metadata.jsonl` or `metadata.csv`, each with its place for messages."""
    if path.suffix == ".csv":
        reader = csv.DictReader((f"{line}\n" for line in read_lines(path)), restkey="")
        try:
            yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise UserError(f"{path}, after line {reader.line_num}: {error}") from None
        return
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f'{where} is not like {{"file_name": "1.jpg", "text": "a cat"}}')
            yield where, row


def no_metadata(folder: Path) -> UserError:
    """The error that says what a folder has instead of metadata, and how to make some."""
    here = sorted(listed(folder))
    seen = ", ".join(here[:5]) + ", ..." * (len(here) > 5)
    advice = 'write a line an image: {"file_name": "1.jpg", "text": "its caption"}'
    if any((folder / part / "metadata.parquet").exists() for part in ("", "train")):
        advice = "convert the .parquet: pandas.read_parquet(old).to_csv(new, index=False)"
    return UserError(
        f"target {folder} has no {' or '.join(METADATA)}, nor one in train/ and one in "
        f"validation/; it has {seen or 'nothing'}; {advice}"
    )


def read_folder(folder: Path, split: str) -> CaptionedFiles:
    """Your own folder, in Hugging Face's imagefolder layout. Raises `UserError`."""
    parts = {part: metadata_of(folder / part) for part in ("train", "validation")}
    given = all(parts.values())
    path = parts[split] if given else metadata_of(folder)
    if path is None:
        raise no_metadata(folder)
    number: dict[str, int] = {}
    shown, texts = array("q"), []  # of each row
    no_text = ""
    for where, row in metadata_rows(path):
        keys = ", ".join(row) or "nothing"
        if "file_name" not in row:
            raise UserError(f"{where} has {keys}; it needs file_name and text")
        if not isinstance(row.get("text") or "", str):
            raise UserError(f"{where}: text {str(row['text'])[:80]} is no text")
        if "text" not in row:
            no_text = no_text or f"text missing (first {where}, which has {keys})"
        name = safe_name(row["file_name"], where)
        shown.append(number.setdefault(name, len(number)))
        texts.append((row["text"] or "") if "text" in row else None)
    names = list(number)
    splits = [split] * len(names) if given else splits_of(names)
    wanted = [k for k, part in enumerate(splits) if part == split]
    if names and not wanted:
        raise UserError(
            f"{path} leaves no image for {split}; add images, or make train/ and validation/, each "
            f"with its metadata"
        )
    gone = dict(zip(wanted, why_missing(path.parent, [names[k] for k in wanted]), strict=True))

    def pairs() -> Iterator[tuple[int | str, str]]:
        for k, text in zip(shown, texts, strict=True):
            if k in gone:
                yield no_text if text is None else gone[k] or k, text or ""
            elif not splits[k]:
                yield "image in neither train/ nor validation/", ""

    return gather(pairs(), files_at(lambda k: path.parent / names[k], names.__getitem__), path)


def splits_of(names: list[str]) -> list[str]:
    """The split of each image of a folder, empty for none; see the module's header."""
    tops = [name.partition("/")[0] for name in names]
    if {"train", "validation"} <= set(tops):
        return [top if top in ("train", "validation") else "" for top in tops]
    digests = (hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names)
    shares = np.array([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests])
    held_out = shares < VALIDATION_SHARE
    if len(names) > 1 and not held_out.any():
        held_out[shares.argmin()] = True
    return np.where(held_out, "validation", "train").tolist()
