"""Files: text read in one way; JSON, CSV and safetensors written whole or not at all.

A file is written under a temporary name and then moved into place, so a reader sees the old file or
the new one, never half of one. Files of tensors carry a checksum. Nothing is pickled.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError, system_error

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked and leftovers stay
    fcntl = None  # type: ignore[assignment]

UTF8 = "utf-8-sig"  # UTF-8, with or without a byte-order mark
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\ufeff]+")  # control characters, and byte-order marks


# ---- text ----


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends, and without a byte-order mark.

    A line ends with LF, CRLF or CR. What else `str.splitlines` knows, such as U+2028, is text.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding=UTF8, errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if bad := re.search("[\udc80-\udcff]", line):  # a byte that cannot be decoded
                    raise UserError(
                        f"{path}, line {number}: byte {ord(bad[0]) - 0xDC00:#04x} is not UTF-8; "
                        f"save the file as UTF-8"
                    )
                yield line.removesuffix("\n")
    except OSError as error:
        raise UserError(f"cannot read {system_error(error)}") from None


def read_text(path: Path) -> str:
    """A UTF-8 file as text. Raises `UserError`; see `read_lines`."""
    return "\n".join(read_lines(path))


def one_line(text: str) -> str:
    """A caption or prompt without what nobody sees: white space is folded.

    Control characters (NUL, for one) and byte-order marks count as white space. A lone surrogate,
    which JSON can spell and which would stop a tokenizer, becomes `?`.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(CONTROL.sub(" ", text).split())


# ---- written whole or not at all ----


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success move the file into place, else remove it."""
    folder, lock = temporary_folder(path)
    try:
        yield folder / path.name
        mask = os.umask(0)  # safetensors lets only the owner read
        os.umask(mask)
        (folder / path.name).chmod(0o666 & ~mask)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.close()


def temporary_folder(path: Path) -> tuple[Path, IO[str] | None]:
    """A new folder beside `path`, and a lock that tells others that its writer is alive.

    A folder, because safetensors writes temporary files beside its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
        lock = locked(folder, wait=True)
        if folder.exists():  # another process may have removed it before it was locked
            return folder, lock


def locked(folder: Path, wait: bool) -> IO[str] | None:
    """A lock on a folder; it ends when it is closed, or with the process.

    None where another process has it, or where the system has no locks.
    """
    if fcntl is None:
        return None
    with suppress(OSError), ExitStack() as stack:
        file = stack.enter_context((folder / ".lock").open("w"))
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        stack.pop_all()
        return file
    return None


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
        if lock := locked(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)
            lock.close()


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        # a lone surrogate, as in a file name that is not UTF-8, is then the escape that JSON knows
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, mend: str = "delete it and run the command that makes it") -> Any:
    """Raises `UserError` where the file is missing or is not JSON.

    Args:
        mend: what helps where it is not; another thing for files that no command here makes.
    """
    if not path.exists():
        raise missing(path)
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {mend}") from None


def missing(path: Path) -> UserError:
    return UserError(
        f"{path} is missing: the folder is incomplete; run the command that makes it again"
    )


def fingerprint(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Checksum of a file's content: its meta, and each tensor's name and bytes.

    xxh3 (128 bits) hashes as fast as memory is read; it finds damage, not forgery.
    """
    digest = xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode())
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
        raise missing(path) from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it and run its command again"
        ) from None
    meta = header.get("meta", {})
    if header.get("xxh3") != fingerprint(tensors, meta):
        why = "its checksum does not fit" if "xxh3" in header else "it carries no checksum"
        raise UserError(f"{path} is damaged ({why}); delete it and run its command again")
    return tensors, meta


def checksum(path: Path) -> str | None:
    """The checksum that a file of `save_tensors` carries; None where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return header_of(file).get("xxh3")
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):
        return None


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
