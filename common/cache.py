"""Rows of tensors that are computed once and kept on disk, such as prompt embeddings and latents.

Rows are kept in parts, each a file that is written whole or not at all. A killed run loses the part
that it was computing; a damaged part is computed again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import load_tensors, remove_leftovers, save_tensors
from common.processes import barrier, from_first, rank, world_size

SHARED = (
    "the processes have caches of their own; set XDG_CACHE_HOME to a folder that all machines share"
)


def rows_key(*facts: str, lines: Iterable[str] = ()) -> str:
    """The name of rows that are computed from `lines`; `facts` say how."""
    digest = hashlib.sha256()
    for text in (*facts, *lines):
        line = text.encode("utf-8", "surrogatepass")
        digest.update(len(line).to_bytes(8, "big") + line)
    return digest.hexdigest()[:24]


def read_part(path: Path, rows: int) -> Tensor | None:
    """The rows of a part's file; None where it is missing or damaged."""
    try:
        part = load_tensors(path)[0]["rows"]
    except (UserError, KeyError):
        return None
    return part if len(part) == rows else None


def kept_rows(
    place: str,
    rows: int,
    compute: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    *,
    part: int,
    batch: int,
    what: str,
) -> list[Tensor]:
    """Rows from the cache, in parts; missing ones are computed and kept.

    Processes share the parts that are missing; all end with the same files.

    Args:
        place: folder below `cache_folder()`, named after everything that the rows depend on.
        rows: how many there are.
        compute: batches of row numbers (b,) -> for each its rows (b, ...), on the CPU.
        part: rows in a file.
        batch: rows that are computed at once.
        what: the progress bar's text.

    Returns:
        The parts, each (part, ...), the last one shorter. They are mapped into memory: only what is
        used is read from the disk.
    """
    folder = cache_folder() / place
    parts = torch.arange(rows).split(part)
    paths = [folder / f"{number:06d}.safetensors" for number in range(len(parts))]
    found = {k: read_part(paths[k], len(parts[k])) for k in range(rank(), len(parts), world_size())}
    todo = [k for k, tensor in found.items() if tensor is None]
    for parent, *_ in os.walk(cache_folder()) if todo else ():  # what killed writers left, anywhere
        remove_leftovers(Path(parent))
    total = sum(len(parts[k]) for k in todo)
    with tqdm(total=total, desc=what, unit="row", disable=not todo or rank() > 0) as bar:
        for k in todo:
            computed = []
            for values in compute(parts[k].split(batch)):
                computed.append(values)
                bar.update(len(values))
            save_tensors(paths[k], {"rows": torch.cat(computed)})
    barrier()
    tensors = []
    for k, path in enumerate(paths):
        known = found.get(k)
        tensor = read_part(path, len(parts[k])) if known is None else known
        if tensor is None and not path.exists():  # another process has written it elsewhere
            raise UserError(f"{path} is missing: {SHARED}")
        if tensor is None:
            raise UserError(f"{path} was damaged while it was in use; run the same command again")
        tensors.append(tensor)
    return tensors


def mapped_rows(place: str, rows: int, *arguments: Any, **options: Any) -> Tensor:
    """`kept_rows` as one tensor, mapped from one file, which all processes here share."""
    path = cache_folder() / place / "rows.safetensors"
    if from_first(lambda: read_part(path, rows) is None):
        parts = kept_rows(place, rows, *arguments, **options)
        if len(parts) == 1:
            return parts[0]
        if rank() == 0:
            save_tensors(path, {"rows": torch.cat(parts)})
        barrier()  # all have read the parts, too
        for part in path.parent.glob("[0-9]*.safetensors") if rank() == 0 else ():
            part.unlink()
    whole = read_part(path, rows)
    if whole is None:  # process 0 has just read it, or written it
        raise UserError(f"{path} is missing or damaged: {SHARED}")
    return whole


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/aptp`, normally ~/.cache/aptp.

    Without a home that can be written, as in many containers, it is a folder of this user's in the
    system's temporary folder.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "aptp"
    wanted = Path(os.path.expanduser("~"), ".cache", "aptp")  # below "~" itself without a home
    parent = next(place for place in (wanted, *wanted.parents) if place.exists())
    if wanted.is_absolute() and parent.is_dir() and os.access(parent, os.W_OK):
        return wanted
    user = getattr(os, "getuid", int)()  # its name is not always known
    return Path(tempfile.gettempdir()) / f"aptp-{user}"
