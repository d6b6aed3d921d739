"""A run is a folder, written so that a kill never spoils it: settings, checkpoints, results.

Everything is JSON, CSV or safetensors; nothing is pickled. A file is written under a temporary name
beside its place and then moved there, so a reader sees the old file or the new one, never half of
one. Randomness is a function of (seed, purpose, step), so a checkpoint needs no random state and a
resumed run repeats the undisturbed one exactly.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

RUNS = Path("runs")


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    Its text is one line: what, the value, what is allowed, what to do.
    """


def command_line(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    A `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that `finally` blocks run on `kill`
    quiet_libraries()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(
            f"error: {error}: check that the disk has room and the path can be written",
            file=sys.stderr,
        )
        sys.exit(2)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and load reports out of the scripts' output."""
    import transformers.utils.logging
    from diffusers.utils import logging

    for library in (transformers.utils.logging, logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def step_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose, step) alone.

    The randomness of one step of one thing.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of `rows` rows in one epoch, (rows,): a function of (seed, epoch)."""
    return torch.randperm(rows, generator=step_generator(seed, "order", epoch))


def batch_rows(rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The rows of batch `step`, (batch_size,), from an endless chain of shuffled epochs."""
    start = step * batch_size
    parts = []
    for position in range(start // rows, (start + batch_size - 1) // rows + 1):
        first = max(start, position * rows) - position * rows
        last = min(start + batch_size, (position + 1) * rows) - position * rows
        parts.append(epoch_order(rows, seed, position)[first:last])
    return torch.cat(parts)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success move it into place, otherwise remove it."""
    # in a folder of its own, because safetensors has temporary files beside what it writes
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder / path.name
        mask = os.umask(0)  # as other files: safetensors writes for its owner alone
        os.umask(mask)
        (folder / path.name).chmod(0o666 & ~mask)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary folders of `replacing` that killed processes left for a file's name."""
    for left in folder.glob(f".{name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def newest_run(root: Path = RUNS) -> Path:
    """The complete run that was finished last. Raises `UserError` where there is none."""
    runs = sorted(root.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(
            f"there is no finished run under {root.resolve()}; run `python train.py` first, or "
            f"name one with --run"
        )
    return runs[-1].parent


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


def as_json(cfg: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values."""
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in asdict(cfg).items()
    }


def refuse_other_settings(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises `UserError` where `path` was made with other settings than those asked for now."""
    changed = [
        f"{key}: {old.get(key)}, now {value}" for key, value in new.items() if old.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(changed)}); "
            "use those again, choose another place, or delete it"
        )


def claim(run: Path, settings: dict[str, Any], free: tuple[str, ...]) -> None:
    """Refuse a run folder that holds something else; settings in `free` may differ.

    Raises:
        UserError: the folder holds a run with other settings, or files that are no run.
    """
    remove_leftovers(run, "config.json")
    if (run / "config.json").exists():
        old = read_json(run / "config.json")
        refuse_other_settings(run, old, {k: v for k, v in settings.items() if k not in free})
        remove_leftovers(run)
    elif run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another folder with --out")


def fingerprint(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """SHA-256 of what a file holds: its meta, and each tensor's name and bytes."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
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
        # one key: with two, their order in the file would be left to chance
        header = json.dumps({"meta": meta, "sha256": fingerprint(plain, meta)})
        try:
            save_file(plain, temporary, {"header": header})
        except SafetensorError as error:  # a full disk is one of these, and no OSError
            raise UserError(
                f"{path} could not be written ({error}): check that the disk has room, then run "
                f"the same command again"
            ) from None


def header_of(file: Any) -> dict[str, Any]:
    """What `save_tensors` wrote beside the tensors; empty for a file of another program."""
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
    if header.get("sha256") != fingerprint(tensors, meta):
        why = "its checksum does not fit" if "sha256" in header else "it carries no checksum"
        raise UserError(f"{path} is damaged ({why}); delete it and run its command again")
    return tensors, meta


def checksum(path: Path) -> str | None:
    """The checksum that a file of `save_tensors` carries; None where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            header = header_of(file)
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):
        return None
    return header.get("sha256")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> dict[str, Tensor]:
    """An optimizer's moments as flat tensors.

    Hyperparameters are not among them: they come from the configuration.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{key}": torch.as_tensor(value)
        for index, slots in state.items()
        for key, value in slots.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str = "optimizer"
) -> None:
    """Put the moments of `optimizer_tensors` back, each in its parameter's memory layout.

    A fused optimizer walks through parameter and moments in storage order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "/"):
            _, index, key = name.rsplit("/", 2)
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class MetricsLog:
    """`metrics.csv`.

    One row a step. Reopened at step k, it drops the rows from k on, which the resumed run writes
    again.
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


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, then mps, then cpu.

    Raises `UserError` for a device that this machine does not have.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name} is not available here; use auto, cpu, or cuda on a machine with a GPU"
        ) from None
