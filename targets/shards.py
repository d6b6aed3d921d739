"""Webdataset shards as img2dataset writes them: tar files of `key.jpg` and `key.txt`. App. E.1.

A shard's headers are read once. Its captions, and the places of its images, are then kept in the
cache until the shard's size or time changes. An image is read when asked for, from its place in the
tar.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.cache import cache_folder
from common.errors import UserError
from common.files import UTF8, load_tensors, save_tensors
from targets.decoding import ImageFiles

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
KINDS = (*IMAGE_KINDS, "txt", "json")  # of a sample's files
VERSION = 2  # of the indexes in the cache
MAX_CAPTION_BYTES = 2**20  # of a key.txt
MAX_IMAGE_BYTES = 2**28  # an image is read whole


def read_shards(shards: list[Path]) -> tuple[list[str], ImageFiles, Counter[str]]:
    """A row for each `key.txt` that has a `key.jpg`, in the shards' order.

    Returns:
        The captions; the images, by row; what was left out and why.
    """
    notes: Counter[str] = Counter()
    captions: list[str] = []
    places, states = [], []
    for path in tqdm(shards, desc="shard indexes", unit="tar", leave=False):
        index, meta = shard_index(path)
        notes.update(meta["notes"])
        text, start = index["text"].numpy().tobytes(), 0
        for end in index["end"].tolist():
            captions.append(text[start:end].decode(UTF8))
            start = end
        places.append(index["place"].numpy())  # (samples, 2)
        states.append("{size} {mtime_ns}".format(**meta["stamp"]))
    shard_of = np.repeat(np.arange(len(shards)), [len(place) for place in places])
    place = np.concatenate(places)

    def open_image(row: int) -> BinaryIO:
        offset, size = place[row].tolist()
        if size > MAX_IMAGE_BYTES:
            raise OSError(f"{size:,} bytes are more than {MAX_IMAGE_BYTES:,}")
        with shards[shard_of[row]].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def label(row: int) -> str:
        return f"{shards[shard_of[row]].name} at byte {place[row, 0]:,}"

    return captions, ImageFiles(open_image, label, lambda row: states[shard_of[row]]), notes


def shard_index(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The captions of a shard and the places of its images; cached until the shard changes.

    Returns:
        place (samples, 2): offset and size of each image in bytes; text: all captions as bytes;
        end (samples,): where each caption ends in text. And a meta with `notes`.
    """
    stat = path.stat()
    stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "version": VERSION}
    name = hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]
    cached = cache_folder() / "shards" / f"{name}.safetensors"
    try:
        index, meta = load_tensors(cached)
        if meta["stamp"] == stamp:
            return index, meta
    except (UserError, KeyError):  # not there yet, or damaged
        pass
    index, notes = read_shard(path)
    meta = {"stamp": stamp, "notes": notes}
    save_tensors(cached, index, meta)
    return index, meta


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Read a tar's headers: the index of `shard_index`, and what was left out."""
    samples: dict[str, dict[str, tuple[int, int] | None]] = {}  # None: no whole plain file
    notes: Counter[str] = Counter()
    length = path.stat().st_size
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while member := archive.next():
                    parent, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    whole = member.offset_data + member.size <= length
                    plain = whole and member.isreg() and not member.issparse()
                    sample = samples.setdefault(f"{parent}/{key}", {})
                    notes["file twice"] += kind.lower() in sample
                    sample[kind.lower()] = (member.offset_data, member.size) if plain else None
        except tarfile.TarError:  # what came before is whole
            pass
        file.seek(max(0, length - tarfile.BLOCKSIZE))
        if file.read() != bytes(tarfile.BLOCKSIZE):  # with which every tar ends
            notes["shard cut short"] += 1
        place, text, end = [], bytearray(), []
        for sample in samples.values():
            image = next(filter(None, map(sample.get, IMAGE_KINDS)), None)
            caption = read_caption(file, sample.get("txt"))
            if image is None:  # other files, such as a README, are no samples
                notes["image missing"] += not sample.keys().isdisjoint(KINDS)
            elif caption is None:
                notes["caption missing or not UTF-8"] += 1
            else:
                place.append(image)
                text += caption
                end.append(len(text))
    return {
        "place": torch.tensor(place, dtype=torch.int64).view(-1, 2),
        "text": torch.tensor(text, dtype=torch.uint8),
        "end": torch.tensor(end, dtype=torch.int64),
    }, dict(+notes)


def read_caption(file: BinaryIO, place: tuple[int, int] | None) -> bytes | None:
    """A `key.txt` at its place in a tar; None where there is none that can be decoded."""
    offset, size = place or (0, 0)
    if place is None or size > MAX_CAPTION_BYTES:
        return None
    file.seek(offset)
    text = file.read(size)
    try:
        text.decode(UTF8)
    except UnicodeDecodeError:
        return None
    return text
