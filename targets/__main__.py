"""Describes a target, or fetches its official files.

    python -m targets coco --data-dir D               # what is there, and whether it can be read
    python -m targets coco --data-dir D --verify      # checks every image again
    python -m targets coco --data-dir D --download    # fetches the official archives, or goes on

`targets/layouts.py` says what a folder of your own looks like.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from common.errors import UserError, command_line
from common.options import read_options
from targets.decoding import forget_checks
from targets.download import FILES, download
from targets.images import (
    CaptionedImages,
    check_target,
    drop_unreadable,
    evenly_spaced,
    find_target,
)

QUICK_CHECK = 1000  # images


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
    """Check every image, those checked before as well, instead of a thousand."""


def describe(data: CaptionedImages, split: str, verify: bool) -> None:
    """Print what a split holds, and whether some of its images can be read, or all."""
    _, first = np.unique(data.image_ids, return_index=True)  # a row of each image
    rows = first[evenly_spaced(len(first), None if verify else QUICK_CHECK)].tolist()
    skipped = drop_unreadable(data.take(rows)).skipped
    print(f"{split}: {len(first):,} images, e.g. {data.captions[0][:80]!r}")
    print(f"  checked {len(rows):,} of them; {replace(data, skipped=skipped).report()}")
    for image_id in sorted(skipped) if verify else ():
        print(f"  unreadable: {skipped[image_id]}")


def main() -> None:
    cfg = read_options(Config, __doc__)
    check_target(cfg.target)
    if cfg.download:
        if cfg.target not in FILES or cfg.data_dir is None:
            raise UserError(
                f"--download needs a target of {', '.join(FILES)}, and --data-dir; emoji and "
                f"folders need no download"
            )
        download(cfg.target, cfg.data_dir)
        return
    splits = {
        split: find_target(cfg.target, split, data_dir=cfg.data_dir)
        for split in ("train", "validation")
    }
    if cfg.verify:
        forget_checks(splits["train"].name)
    for split, data in splits.items():
        describe(data, split, cfg.verify)


if __name__ == "__main__":
    command_line(main, goes_on=True)
