"""Kept on disk: published models in the hub's cache, and rows that are computed once.

A published model is a folder of JSON and safetensors; code and pickles of a model are neither
fetched nor read. Rows (prompt embeddings, latents) lie in parts, each a file that is written whole
or not at all: a killed run loses the part that it was computing, a damaged part is computed again.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from emoji import cache_folder
from processes import count, rank, wait
from runfolder import UserError, load_tensors, save_tensors

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
TEXTS = (".json", ".model", ".txt")  # configurations and vocabularies
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network's fault
ELSEWHERE = ("onnx", "openvino")  # folders with the same weights for other runtimes


# ---- published models ----


def model_folder(name: str, option: str, files: Iterable[str], otherwise: str) -> Path:
    """A published model as a folder: `name` itself, or the hub's copy, fetched if need be.

    Args:
        name: a folder, or a hub id such as `sentence-transformers/all-mpnet-base-v2`.
        option: what the user typed it after, for messages.
        files: patterns of what to fetch.
        otherwise: what else the option takes, for messages.

    Raises:
        UserError: there is no such folder, and no such model on this machine or the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{option} {name} is a file; give the model's folder, or {otherwise}")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{option} {name} is unknown; give a folder, a hub id, or {otherwise}")
    try:
        skip = [f"{place}/*" for place in ELSEWHERE]
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=skip))
    except (GatedRepoError, RepositoryNotFoundError):
        why = "the hub has no such model, or `hf auth login` is needed"
    except LocalEntryNotFoundError:
        why = "not in the hub's cache, and no network or HF_HUB_OFFLINE is set"
    except Exception as error:  # the network's are many
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        why = " ".join(f"{type(error).__name__} {error}".split())[:120]
    raise UserError(
        f"{option} {name} is no folder here and could not be fetched ({why}): run `hf download "
        f"{name} --local-dir D` where there is a network and give {option} D, or {otherwise}"
    )


def lasting_name(name: str) -> str:
    """A model's name as a run keeps it: a folder's holds in any working directory."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def model_files(folder: Path) -> list[Path]:
    """A model's files, without those for other runtimes and what downloading leaves (hidden)."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(p in ELSEWHERE or p[0] == "." for p in path.relative_to(folder).parts)
    ]


def refuse_pickles(folder: Path, option: str) -> None:
    """Raises `UserError` where weights below `folder` come as pickles and not as safetensors."""
    for path in model_files(folder):
        if path.suffix in PICKLES and not list(path.parent.glob("*.safetensors")):
            raise UserError(
                f"{option}: {path} is a pickle, which could run any code; fetch the model's "
                f"safetensors, or save it with safe_serialization=True"
            )


def content_hash(folder: Path) -> str:
    """sha256 of a model's weights, configurations and vocabularies, wherever the folder lies."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        if path.suffix in (".safetensors", *TEXTS):
            digest.update(
                f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode()
            )
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


# ---- rows that are computed once ----


def rows_key(*facts: str, lines: Iterable[str] = ()) -> str:
    """Names the rows that are made of `lines` in the way that `facts` tell."""
    digest = hashlib.sha256()
    for text in (*facts, *lines):
        line = text.encode("utf-8", "surrogatepass")
        digest.update(len(line).to_bytes(8, "big") + line)
    return digest.hexdigest()[:24]


def read_part(path: Path, rows: int) -> Tensor | None:
    """The rows of a part's file, mapped into memory; None where it is missing or damaged."""
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
    """Rows from the cache, in parts; those that are not there are computed and put there.

    Many processes share out the computing; all end with the same files.

    Args:
        place: folder below `cache_folder()`, named after all that the rows depend on.
        rows: how many there are.
        compute: batches of row numbers (b,) -> for each its rows (b, ...), on the CPU.
        part: rows a file.
        batch: rows that are computed at once.
        what: the progress bar's text.

    Returns:
        The parts, each (part, ...), the last one shorter; the system reads from disk what is used.
    """
    folder = cache_folder() / place
    parts = torch.arange(rows).split(part)
    paths = [folder / f"{number:06d}.safetensors" for number in range(len(parts))]
    found = {k: read_part(paths[k], len(parts[k])) for k in range(rank(), len(parts), count())}
    todo = [k for k, tensor in found.items() if tensor is None]
    total = sum(len(parts[k]) for k in todo)
    with tqdm(total=total, desc=what, unit="row", disable=not todo or rank() > 0) as bar:
        for k in todo:
            computed = []
            for values in compute(parts[k].split(batch)):
                computed.append(values)
                bar.update(len(values))
            save_tensors(paths[k], {"rows": torch.cat(computed)})
    wait()
    tensors = []
    for k, path in enumerate(paths):
        known = found.get(k)
        tensor = read_part(path, len(parts[k])) if known is None else known
        if tensor is None:
            raise UserError(f"{path} was damaged while it was in use; run the same command again")
        tensors.append(tensor)
    return tensors
