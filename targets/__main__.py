"""Describes a target, or fetches its official files.

python -m targets coco --data-dir D               # what is there, and whether it can be read
python -m targets coco --data-dir D --verify      # reads every image
python -m targets coco --data-dir D --download    # fetches the official archives, or goes on
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from common.errors import UserError, command_line
from targets.download import FILES, download
from targets.images import Unreadable, check_target, load_target, spread, workers

QUICK_CHECK = 1000  # images


# ---- python -m targets ----


@dataclass(frozen=True)
class Config:
    """Describes a target, or fetches its official files."""

    target: tyro.conf.Positional[str] = "emoji"
    """emoji, coco, cc3m, or a folder with metadata.jsonl."""
    data_dir: Path | None = None
    """Folder of the files of coco or cc3m."""
    download: bool = False
    """Fetch the official files of coco or cc3m to --data-dir; a stopped download goes on."""
    verify: bool = False
    """Read every image instead of a thousand."""


def describe(cfg: Config, split: str) -> None:
    """Print what a split holds, and read some of its images or all."""
    data = load_target(cfg.target, split, data_dir=cfg.data_dir)
    _, first = np.unique(data.pictures, return_index=True)  # a row of each image
    rows = first if cfg.verify else first[spread(len(first), QUICK_CHECK)]

    def check(row: int) -> None:
        try:
            data.read(row)
        except Unreadable as error:
            data.skipped[int(data.pictures[row])] = str(error)

    bar = tqdm(total=len(rows), desc=f"reading {split}", unit="image", leave=False)
    with bar, ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(rows), QUICK_CHECK):
            for _ in pool.map(check, rows[start : start + QUICK_CHECK].tolist()):
                bar.update()
    print(f"{split}: {len(first):,} images, e.g. {data.captions[0][:80]!r}")
    print(f"  read {len(rows):,} of them; {data.report()}")
    for picture in sorted(data.skipped) if cfg.verify else ():
        print(f"  unreadable: {data.skipped[picture]}")


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    check_target(cfg.target)
    if cfg.download:
        if cfg.target not in FILES or cfg.data_dir is None:
            raise UserError(
                f"--download needs a target of {', '.join(FILES)}, and --data-dir; emoji and "
                f"folders need no download"
            )
        download(cfg.target, cfg.data_dir)
    else:
        for split in ("train", "validation"):
            describe(cfg, split)


if __name__ == "__main__":
    command_line(main)
