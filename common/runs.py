"""A run is a folder: the newest one, its settings, and whether a command may go on with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json, remove_leftovers

RUNS = Path("runs")
NEEDED = {  # what scripts read of a run, by its file
    "summary.json": (
        *("target", "teacher", "resolution", "budget", "num_experts", "experts"),
        *("macs_dense", "macs_ratio_mean", "usage_train", "usage_validation"),
    ),
    "config.json": ("target", "data_dir", "limit", "seed", "depth", "cache_latents"),
    "assignments.json": ("train", "validation"),
}


def newest_run(root: Path = RUNS) -> Path:
    """The complete run that was finished last. Raises `UserError` where there is none."""
    runs = sorted(root.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(
            f"there is no finished run under {root.resolve()}; run `python train.py` first, or "
            f"name one with --run"
        )
    return runs[-1].parent


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
    """Refuse a folder that holds another run; settings in `free` may differ.

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


def read_run(run: Path, *names: str) -> list[dict[str, Any]]:
    """Some of a run's JSON files, by name: those of `NEEDED`.

    Raises:
        UserError: one is missing, is not JSON, or lacks a field.
    """
    found = []
    for name in names:
        content = read_json(run / name)
        fields = content if isinstance(content, dict) else {}
        lacking = [field for field in NEEDED[name] if field not in fields]
        if lacking:
            raise UserError(
                f"{run / name} lacks {', '.join(lacking)}: it is not what a finished run holds; "
                f"make the run again, or name another with --run"
            )
        found.append(fields)
    return found
