"""Targets: captioned images to prune on. App. E.1, and the embedded default `emoji`.

    python -m targets coco --data-dir D               # what is there, and whether it can be read
    python -m targets coco --data-dir D --verify      # reads every image
    python -m targets coco --data-dir D --download    # fetches the official archives, or goes on

A target is `emoji` (`emoji.py`; needs nothing), `coco`, `cc3m`, or a folder with `metadata.jsonl`
(`layouts.py` says how each lies on disk). It is a list of rows, one caption each, in a training and
a validation split. Photographs are read only when asked for: turned as their EXIF data say, put on
white where they are transparent, cropped in the centre to a square and resized to `resolution` with
an antialiasing bicubic filter. Of an animation, the first frame counts.

An image that cannot be decoded is skipped: `batch` and `batches` put the next readable row in its
place, with that row's own caption, and say which rows they gave; the count is in `report`. Images
that are missing are no rows in the first place.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError
from targets.emoji import EMOJI_SIZE, emoji_rows
from targets.layouts import Rows, cc3m_rows, coco_rows, folder_rows

TARGETS = ("emoji", "coco", "cc3m")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others run other programs, or are rare

MAX_PIXELS = 89_478_485  # of an image; Pillow's own limit

MAX_ATTEMPTS = 1000  # unreadable images in a row before giving up

NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the image's fault


class Unreadable(Exception):
    """An image that cannot be decoded; the text names it and says why."""


def workers() -> int:
    """Threads that decode: Pillow leaves Python's lock while it does."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, here or 1)


@dataclass(frozen=True)
class CaptionedImages:
    """One split of a target.

    `groups` and `styles` are for analysis and never seen in training; empty strings where a target
    has none. Rows of the same number in `pictures` show the same image.
    """

    name: str
    captions: list[str]
    groups: list[str]
    styles: list[str]
    pictures: np.ndarray  # (rows,) int64
    read: Callable[[int], np.ndarray]  # row -> (H, W, 3) uint8; may raise Unreadable
    notes: Counter[str] = field(default_factory=Counter)  # why rows are left out -> how many
    skipped: dict[int, str] = field(default_factory=dict)  # unreadable pictures met so far -> why

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The images of exactly these rows, (B, 3, H, W), float32 in [-1, 1].

        Raises:
            UserError: one of them cannot be decoded; `batch` would skip it.
        """
        images, used = self.batch(rows)
        for row, instead in zip(rows, used.tolist(), strict=True):
            if int(row) != instead:
                raise UserError(f"{self.skipped[int(self.pictures[row])]}; mend or remove it")
        return images

    def batch(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], and the rows (B,) that they and their captions are of.

        These are `rows`, except that the next readable row stands in for an unreadable one: the
        same one whenever it is asked for.
        """
        return next(self.batches([rows]))

    def batches(
        self, rows: Iterable[Sequence[int] | Tensor], ahead: int = 2
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each, in order, decoded by threads up to `ahead` batches in advance."""
        waiting: deque[list[Future[tuple[int, np.ndarray]]]] = deque()
        pool = ThreadPoolExecutor(workers())
        try:
            for batch in rows:
                waiting.append([pool.submit(self.readable, int(row)) for row in batch])
                if len(waiting) > ahead:
                    yield stack(waiting.popleft())
            while waiting:
                yield stack(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def readable(self, row: int) -> tuple[int, np.ndarray]:
        """The first readable row from `row` on, and its image.

        Raises:
            UserError: hardly any image can be read.
        """
        attempts = 0
        for k in range(len(self)):
            candidate = (row + k) % len(self)
            picture = int(self.pictures[candidate])
            if picture in self.skipped:
                continue
            try:
                return candidate, self.read(candidate)
            except Unreadable as error:
                self.skipped[picture] = str(error)
                attempts += 1
            if attempts == MAX_ATTEMPTS:
                break
        why = next(iter(self.skipped.values()))
        raise UserError(
            f"none of the images of {self.name} from row {row} on can be read, among them {why}; "
            f"`python -m targets` with --verify lists them"
        )

    def report(self) -> str:
        """One line: what was skipped while reading so far, and left out before."""
        several = len(self.skipped) != 1
        parts = [f"{len(self.skipped):,} unreadable image{'s' if several else ''} skipped"]
        if self.skipped:
            parts[0] += f" (first {self.skipped[min(self.skipped)]})"
        parts += [f"{reason}: {count:,}" for reason, count in sorted(self.notes.items())]
        return f"{self.name}: {len(self):,} rows; {'; '.join(parts)}"

    def take(self, rows: Sequence[int]) -> CaptionedImages:
        """A part of it, these rows in this order."""
        return CaptionedImages(
            self.name,
            [self.captions[row] for row in rows],
            [self.groups[row] for row in rows],
            [self.styles[row] for row in rows],
            self.pictures[rows],
            lambda row: self.read(rows[row]),
            self.notes,
        )


def stack(found: Sequence[Future[tuple[int, np.ndarray]]]) -> tuple[Tensor, Tensor]:
    """Rows and pixels as two tensors; see `CaptionedImages.batch`."""
    rows, pixels = zip(*(future.result() for future in found), strict=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor(rows)


# ---- one image ----


def decode(file: BinaryIO, resolution: int) -> np.ndarray:
    """An image file as (resolution, resolution, 3) uint8; see the module's header."""
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels are more than {MAX_PIXELS / 1e6:.0f} M"
            )
        # a JPEG of several times the size can be decoded at a fraction of it
        image.draft(None, (2 * resolution, 2 * resolution))
        ImageOps.exif_transpose(image, in_place=True)
        size = (resolution, resolution)
        return np.asarray(ImageOps.fit(on_white(image), size, Image.Resampling.BICUBIC))


def on_white(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency on white, 16-bit grey to its upper eight bits."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.max(initial=0) > 65535:
            raise ValueError("32-bit pixels are not supported")
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


# ---- a target by name ----


def load_emoji(split: str, seed: int, resolution: int) -> CaptionedImages:
    drawings, captions, read = emoji_rows(split, seed, resolution)
    return CaptionedImages(
        "emoji",
        captions,
        [drawing.group for drawing in drawings],
        [drawing.style for drawing in drawings],
        np.arange(len(drawings)),
        read,
    )


def photographs(name: str, rows: Rows, resolution: int) -> CaptionedImages:
    """The images of `rows`, read and decoded when asked for."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` has its own limit

    def read(row: int) -> np.ndarray:
        picture = int(rows.pictures[row])
        try:
            with rows.open(picture) as file:
                return decode(file, resolution)
        except Exception as error:  # a decoder may raise anything
            if isinstance(error, MemoryError) or getattr(error, "errno", 0) in NOTHING_LEFT:
                raise
            why = " ".join(str(error).split()) or type(error).__name__
            raise Unreadable(f"{rows.label(picture)}: {why}") from None

    nothing = [""] * len(rows.captions)
    return CaptionedImages(name, rows.captions, nothing, nothing, rows.pictures, read, rows.notes)


def check_target(target: str) -> None:
    """Raises `UserError` where there is no such target."""
    if target not in TARGETS and not Path(target).is_dir():
        raise UserError(
            f"--target {target} is unknown; choose one of: {', '.join(TARGETS)}, or a folder with "
            f"metadata.jsonl"
        )


def spread(rows: int, limit: int | None) -> list[int]:
    """`limit` row numbers spread evenly over `rows`; all of them without a limit."""
    count = rows if limit is None else min(limit, rows)
    return [k * rows // count for k in range(count)]


def load_target(
    target: str,
    split: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    data_dir: Path | None = None,
    resolution: int = EMOJI_SIZE,
) -> CaptionedImages:
    """A target's `train` or `validation` split, or `limit` rows spread evenly over it.

    Args:
        target: one of `TARGETS`, or a folder.
        seed: chooses emoji's captions; other targets have one row each caption.
        data_dir: where the files of coco and cc3m are.
        resolution: pixels a side.

    Raises:
        UserError: the target is unknown, its files are missing or not what they should be.
    """
    check_target(target)
    if target == "emoji":
        data = load_emoji(split, seed, resolution)
    elif target in TARGETS:
        if data_dir is None:
            raise UserError(
                f"--target {target} needs --data-dir, the folder of its files; `python -m targets "
                f"{target} --download --data-dir D` fetches them to D, --target emoji needs nothing"
            )
        layout = {"coco": coco_rows, "cc3m": cc3m_rows}[target]
        data = photographs(target, layout(data_dir, split), resolution)
    else:
        folder = Path(target)
        data = photographs(folder.resolve().name, folder_rows(folder, split), resolution)
    return data if limit is None or limit >= len(data) else data.take(spread(len(data), limit))
