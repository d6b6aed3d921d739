"""The layouts of captioned images on disk: COCO 2014, CC3M, and your own folder. App. E.1.

| target | captions | images |
|---|---|---|
| `coco` | `annotations/captions_{train,val}2014.json` | `train2014/`, `val2014/` |
| `cc3m` | `key.txt` in webdataset shards `{train,validation}/*.tar` | `key.jpg` beside it |
| `cc3m` | `Train_GCC-training.tsv`, `Validation_GCC-1.1.0-Validation.tsv` | see below |
| a folder | `text` in `metadata.jsonl`, a line a caption | `file_name` there |

The image of row r of a TSV (the first is row 0) is `{train,validation}/SSSSS/RRRRRRRRR.jpg`: r with
nine digits, in a folder named r // 10000 with five. These are img2dataset's names, for files and
for shards; it makes either from the official TSV (`python -m targets cc3m --download` says how).
Where `RRRRRRRRR.txt` is beside the image, one of each folder is compared with the TSV.

Your own folder is split by `train/` and `validation/`, each with a `metadata.jsonl`, or by these
two at the start of all file names. Without them, a tenth of the images is held out: those whose
name has the smallest hashes, so all captions of an image are in one split. A `file_name` is a path
below the folder; symbolic links are followed.

Captions are UTF-8. White space is folded, and captions are clipped to 10,000 characters. Rows whose
image is missing, or whose caption is empty, are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from targets.decoding import Photographs
from targets.shards import read_shards

MAX_CAPTION_CHARACTERS = 10_000  # far more than any text encoder reads

VALIDATION_SHARE = 0.1  # of a folder's images

COCO = {"train": "train2014", "validation": "val2014"}

CC3M = {"train": "Train_GCC-training.tsv", "validation": "Validation_GCC-1.1.0-Validation.tsv"}

CC3M_SHARD = 10_000  # rows in a folder, img2dataset's default


@dataclass(frozen=True)
class CaptionedFiles:
    """One split: a caption a row, and the number of the image that it shows."""

    captions: list[str]
    image_ids: np.ndarray  # (rows,) int64
    photographs: Photographs  # by image_ids
    notes: Counter[str]  # why rows were left out or changed -> how many


def gather(
    pairs: Iterable[tuple[int | None, str]],
    photographs: Photographs,
    source: Path,
    notes: Counter[str] | None = None,
) -> CaptionedFiles:
    """A row for each (image's number, caption); the number is None where the image is missing.

    Raises:
        UserError: no row is left.
    """
    captions, image_ids, notes = [], array("q"), Counter(notes or {})
    for image_id, text in pairs:
        # a lone surrogate, which JSON can spell, would stop a tokenizer
        caption = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
        if image_id is None:
            notes["image missing"] += 1
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
    return CaptionedFiles(captions, np.frombuffer(image_ids, np.int64), photographs, notes)


def missing(target: str, what: str, data_dir: Path) -> UserError:
    """The error that says what is missing, from where, and how to get it."""
    return UserError(
        f"--target {target} needs {what}, which is not in {data_dir.resolve()}; get it with "
        f"`python -m targets {target} --download --data-dir {data_dir}`; "
        f"--target emoji needs nothing"
    )


def utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {line[error.start]:#04x} is not UTF-8; "
                    f"save the file as UTF-8"
                ) from None
            if text.strip():
                yield number, text


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


def those_there(folder: Path, names: list[str]) -> list[bool]:
    """Which of these files are there. Each of their folders is listed once."""
    found: dict[str, set[str]] = {}
    there = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in found:
            found[parent] = listed(folder / parent)
        there.append(base in found[parent])
    return there


def files_at(path: Callable[[int], Path], label: Callable[[int], str]) -> Photographs:
    """Photographs that are files of their own, by number."""

    def open_file(image_id: int) -> BinaryIO:
        if not path(image_id).is_file():  # a pipe would block for ever
            raise FileNotFoundError("no such file")
        return path(image_id).open("rb")

    def stamp(image_id: int) -> str:
        try:
            stat = path(image_id).stat()
        except OSError:
            return "no such file"
        return f"{stat.st_size} {stat.st_mtime_ns}"

    return Photographs(open_file, label, stamp)


def read_coco(data_dir: Path, split: str) -> CaptionedFiles:
    """COCO 2014, a row for each caption, in the file's order. Raises `UserError`."""
    folder = data_dir / COCO[split]
    path = data_dir / "annotations" / f"captions_{COCO[split]}.json"
    for needed in (path, folder):
        if not needed.exists():
            raise missing("coco", str(needed.relative_to(data_dir)), data_dir)
    try:
        content = json.loads(path.read_bytes())
        files = [safe_name(image["file_name"], str(path)) for image in content["images"]]
        there = those_there(folder, files)
        number = {image["id"]: k for k, image in enumerate(content["images"]) if there[k]}
        return gather(
            ((number.get(note["image_id"]), note["caption"]) for note in content["annotations"]),
            files_at(lambda k: folder / files[k], lambda k: f"{folder.name}/{files[k]}"),
            path,
        )
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise UserError(
            f"{path} is not UTF-8 JSON ({error}); delete it and fetch it again"
        ) from None
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
        captions, photographs, notes = read_shards(shards)
        return gather(enumerate(captions), photographs, folder, notes)
    if not path.exists():
        raise missing("cc3m", f"{split}/*.tar or {CC3M[split]}", data_dir)
    if not folder.is_dir():
        raise missing("cc3m", f"{split}/ with the images of {CC3M[split]}", data_dir)

    def image(row: int) -> Path:
        return folder / f"{row // CC3M_SHARD:05d}" / f"{row:09d}.jpg"

    photographs = files_at(image, lambda row: str(image(row).relative_to(data_dir)))
    return gather(tsv_pairs(path, image), photographs, path)


def tsv_pairs(path: Path, image: Callable[[int], Path]) -> Iterator[tuple[int | None, str]]:
    """Row number (None without an image) and caption of each line; `image` is a row's file."""
    row, checked = 0, False
    names: set[str] = set()
    for number, line in utf8_lines(path):
        if row == 0 and line == "caption\turl":  # the header that img2dataset needs
            continue
        caption, tab, _ = line.partition("\t")
        if not tab:
            raise UserError(f"{path}, line {number}: there is no tab between caption and url")
        if row % CC3M_SHARD == 0:
            names, checked = listed(image(row).parent), False
        there = f"{row:09d}.jpg" in names
        if there and not checked and f"{row:09d}.txt" in names:
            checked, text = True, image(row).with_suffix(".txt")
            if letters(text.read_text("utf-8", "replace")) != letters(caption):
                raise UserError(
                    f"{text} is not the caption in line {number} of {path}: the images belong to "
                    f"another list; fetch them again, or as img2dataset's webdataset shards"
                )
        yield row if there else None, caption
        row += 1


def letters(text: str) -> str:
    return re.sub(r"\W", "", text)


def read_folder(folder: Path, split: str) -> CaptionedFiles:
    """Your own folder, in Hugging Face's imagefolder layout. Raises `UserError`."""
    base = folder
    given = all((folder / part / "metadata.jsonl").exists() for part in ("train", "validation"))
    if given:
        base = folder / split
    path = base / "metadata.jsonl"
    if not path.exists():
        raise UserError(
            f"--target {folder} has no metadata.jsonl, nor train/metadata.jsonl and "
            f"validation/metadata.jsonl; write a line an image: "
            f'{{"file_name": "1.jpg", "text": "its caption"}}'
        )
    number: dict[str, int] = {}
    shown, texts = array("q"), []
    for line, content in utf8_lines(path):
        where = f"{path}, line {line}"
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text") or "", str):
            raise UserError(f'{where} is not like {{"file_name": "1.jpg", "text": "its caption"}}')
        name = safe_name(row.get("file_name"), where)
        shown.append(number.setdefault(name, len(number)))
        texts.append(row.get("text") or "")
    names = list(number)
    there = those_there(base, names)
    wanted = np.ones(len(names), bool)
    if not given:
        wanted = validation_images(names) == (split == "validation")
    if names and not wanted.any():
        raise UserError(
            f"{path} leaves no image for {split}; add images, or make train/ and validation/, each "
            f"with a metadata.jsonl"
        )
    return gather(
        (
            (k if there[k] else None, text)
            for k, text in zip(shown, texts, strict=True)
            if wanted[k]
        ),
        files_at(lambda k: base / names[k], lambda k: names[k]),
        path,
    )


def validation_images(names: list[str]) -> np.ndarray:
    """Which images of a folder are held out, (images,) bool; see the module's header."""
    tops = {name.partition("/")[0] for name in names}
    if tops == {"train", "validation"}:
        return np.array([name.startswith("validation/") for name in names])
    digests = (hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names)
    shares = np.array([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests])
    held_out = shares < VALIDATION_SHARE
    if len(names) > 1 and not held_out.any():
        held_out[shares.argmin()] = True
    return held_out
