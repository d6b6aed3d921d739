"""Files that a kill never spoils: JSON, CSV and safetensors, written whole or not at all.

A file is written under a temporary name and then moved into place, so a reader sees the old file or
the new one, never half of one. Files of tensors carry a checksum. Nothing is pickled.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError

CHECKSUMS: dict[str, Any] = {"xxh3": xxhash.xxh3_128, "sha256": hashlib.sha256}  # older: sha256


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success move the file into place, else remove it."""
    # in a folder of its own, because safetensors writes temporary files beside its own
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder / path.name
        mask = os.umask(0)  # safetensors lets only the owner read
        os.umask(mask)
        (folder / path.name).chmod(0o666 & ~mask)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises `UserError` where nothing could be written to a folder; leaves nothing behind."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        why = "a file is in its way" if place.is_file() else error.strerror
        raise UserError(f"{folder} cannot be written ({why}); choose another folder") from None


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary folders of `replacing` that killed processes left for a file's name."""
    for left in folder.glob(f".{name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """Raises `UserError` where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the folder is incomplete; run the command that makes it again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run its command again"
        ) from None


def fingerprint(tensors: dict[str, Tensor], meta: dict[str, Any], kind: str = "xxh3") -> str:
    """Checksum of a file's content: its meta, and each tensor's name and bytes.

    xxh3 (128 bits) hashes as fast as memory is read; it finds damage, not forgery.
    """
    digest = CHECKSUMS[kind](json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None
) -> None:
    """Write `tensors` and a JSON `meta` as one safetensors file, whole or not at all.

    The file carries a checksum of both. Raises `UserError` where it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = json.loads(json.dumps(meta or {}))
    with replacing(path) as temporary:
        # one key: with two, their order in the file would be random
        header = json.dumps({"meta": meta, "xxh3": fingerprint(plain, meta)})
        try:
            save_file(plain, temporary, {"header": header})
        except SafetensorError as error:  # a full disk is one of these, and no OSError
            raise UserError(
                f"{path} could not be written ({error}): check that the disk has room, then run "
                f"the same command again"
            ) from None


def header_of(file: Any) -> dict[str, Any]:
    """The header that `save_tensors` wrote; empty for a file of another program."""
    header = json.loads((file.metadata() or {}).get("header", "{}"))
    return header if isinstance(header, dict) else {}


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises `UserError`, naming the file, where it is missing, cut short, altered or of another
    program.
    """
    try:
        with safe_open(path, "pt") as file:
            header = header_of(file)
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the folder is incomplete; run the command that makes it again"
        ) from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it and run its command again"
        ) from None
    meta = header.get("meta", {})
    kind = next((kind for kind in CHECKSUMS if kind in header), None)
    if kind is None or header[kind] != fingerprint(tensors, meta, kind):
        why = "its checksum does not fit" if kind else "it carries no checksum"
        raise UserError(f"{path} is damaged ({why}); delete it and run its command again")
    return tensors, meta


def checksum(path: Path) -> str | None:
    """The checksum that a file of `save_tensors` carries; None where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            header = header_of(file)
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):
        return None
    return next((header[kind] for kind in CHECKSUMS if kind in header), None)


class MetricsLog:
    """`metrics.csv`, one row a step.

    Reopened at step k, it drops the rows from k on, because a resumed run writes them again.
    """

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        rows: list[list[str]] = []
        if path.exists() and step > 0:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [
                    row
                    for row in csv.reader(file)
                    if row and row[0].isdigit() and int(row[0]) < step
                ]
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows([["step", *columns], *rows])
        self.columns = columns
        self.file = path.open("a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.writer.writerow([step, *(f"{values[name]:.6g}" for name in self.columns)])
        self.file.flush()

    def close(self) -> None:
        self.file.close()
