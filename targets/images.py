"""Targets: captioned images to prune on. App. E.1, and the embedded default `emoji`.

A target is `emoji` (`emoji.py`), `coco`, `cc3m`, or a folder of your own (`layouts.py` describes
their files): rows of one caption each, in a training and a validation split. Images are decoded
when they are asked for (`decoding.py`).

Rows whose image is missing or cannot be decoded are dropped before anything else sees the target;
`report` counts them. So every row has its image, and a row number means the same wherever the
target is loaded; `identity` is the hash that tells.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cache import rows_key
from common.errors import UserError
from targets.decoding import Frame, ImageFiles, Unreadable, find_unreadable, workers
from targets.emoji import EMOJI_SIZE, TARGET_PHRASINGS, captions_of, emoji_rows, stamp_of
from targets.layouts import CaptionedFiles, read_cc3m, read_coco, read_folder

T = TypeVar("T")
TARGETS = ("emoji", "coco", "cc3m")
LOOKED_AT = 64  # images of a split whose size is compared with the resolution


@dataclass(frozen=True)
class CaptionedImages:
    """One split of a target.

    `groups` and `styles` are for analysis and never seen in training; empty strings where a target
    has none. Rows with the same number in `image_ids` show the same image.
    """

    name: str
    captions: list[str]
    groups: list[str]
    styles: list[str]
    image_ids: np.ndarray  # (rows,) int64
    read: Callable[[int], np.ndarray]  # row -> (H, W, 3) uint8; may raise Unreadable
    files: ImageFiles | None = None  # by image_ids; None where images are rendered
    notes: Counter[str] = field(default_factory=Counter)  # why rows are left out -> how many
    skipped: dict[int, str] = field(default_factory=dict)  # unreadable image_ids -> why
    known: Callable[[int], list[str]] | None = None  # image_id -> its captions, if not only rows'
    frame: Callable[[int], Frame] | None = None  # row -> how it was cut out; may raise Unreadable
    stamp: Callable[[int], tuple[str, str]] | None = None  # image_id -> its name, its file's state

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The images of these rows, (B, 3, H, W), float32 in [-1, 1].

        Raises:
            UserError: one of them cannot be decoded any more.
        """
        return next(self.batches([rows]))

    def batches(
        self, batches: Iterable[Sequence[int] | Tensor], ahead: int = 2
    ) -> Iterator[Tensor]:
        """`images` of each batch of rows, in order; threads decode up to `ahead` in advance."""
        waiting: deque[list[Future[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(workers())
        try:
            for rows in batches:
                waiting.append([pool.submit(self.read, int(row)) for row in rows])
                if len(waiting) > ahead:
                    yield stack(waiting.popleft())
            while waiting:
                yield stack(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def frames(self, rows: Sequence[int] | Tensor) -> Tensor:
        """How these images were cut out of their originals, (B, 4): the numbers of a `Frame`.

        Raises:
            UserError: one of them cannot be read any more.
        """
        assert self.frame is not None
        with ThreadPoolExecutor(workers()) as pool:
            frames = [pool.submit(self.frame, int(row)) for row in rows]
        return torch.tensor([result_of(frame) for frame in frames])

    def wordings(self, limit: int) -> tuple[list[str], Tensor]:
        """All captions of up to `limit` images of the split, and each one's image, (P,)."""
        image_ids = np.unique(self.image_ids)
        shown = image_ids[evenly_spaced(len(image_ids), limit)]
        if self.known is None:
            rows = np.flatnonzero(np.isin(self.image_ids, shown))
            return [self.captions[row] for row in rows], torch.from_numpy(self.image_ids[rows])
        captions = {image_id: self.known(image_id) for image_id in shown.tolist()}
        numbers = torch.tensor([k for k, lines in captions.items() for _ in lines])
        return [line for lines in captions.values() for line in lines], numbers

    def stamps(self) -> Iterator[tuple[str, str]]:
        """For each row the name of its image, and what is another text once the image has changed.

        That is the size and time of a file, or the hash of the pixels where nothing else is known.
        """
        if self.stamp is not None:
            yield from map(self.stamp, self.image_ids.tolist())
            return
        images = self.batches([row] for row in range(len(self)))
        for image_id, image in zip(self.image_ids.tolist(), images, strict=True):
            yield str(image_id), hashlib.sha256(image.numpy().tobytes()).hexdigest()

    def identity(self, states: bool = True) -> str:
        """A hash of what the rows are, in their order: captions, images' names and states.

        A folder may have another name.

        Args:
            states: False for a hash that stays when files are only copied or touched.
        """
        rows = zip(self.captions, self.stamps(), strict=True)
        return rows_key(
            lines=(text for row, (name, state) in rows for text in (row, name, state * states))
        )

    def note_enlarged(self, resolution: int) -> CaptionedImages:
        """Itself; its report then tells how many of some images are smaller than `resolution`."""
        rows = evenly_spaced(len(self), LOOKED_AT)
        if small := int((self.frames(rows)[:, :2].amin(1) < resolution).sum()):
            self.notes[f"enlarged to {resolution} px, of {len(rows)} looked at"] = small
        return self

    def report(self) -> str:
        """One line: how many rows there are, and what was left out."""
        several = len(self.skipped) != 1
        parts = [f"{len(self.skipped):,} unreadable image{'s' if several else ''} skipped"]
        if self.skipped:
            parts[0] += f" (first {self.skipped[min(self.skipped)]})"
        parts += [f"{reason}: {count:,}" for reason, count in sorted(self.notes.items())]
        return f"{self.name}: {len(self):,} rows; {'; '.join(parts)}"

    def take(self, rows: Sequence[int]) -> CaptionedImages:
        """A part of it, these rows in this order."""
        frame = self.frame
        return replace(
            self,
            captions=[self.captions[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            styles=[self.styles[row] for row in rows],
            image_ids=self.image_ids[rows],
            read=lambda row: self.read(rows[row]),
            frame=None if frame is None else lambda row: frame(rows[row]),
        )


def result_of(future: Future[T]) -> T:
    """What a thread read. Raises `UserError`; see `CaptionedImages.images`."""
    try:
        return future.result()
    except Unreadable as error:
        raise UserError(
            f"{error}; it could be read when the images were checked: mend it, or check them again "
            f"with `python -m targets` and --verify"
        ) from None


def stack(images: Sequence[Future[np.ndarray]]) -> Tensor:
    """Pixels as one tensor; see `CaptionedImages.images`."""
    pixels = np.stack([result_of(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


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
        known=lambda number: captions_of(drawings[number], TARGET_PHRASINGS),
        frame=lambda row: Frame(resolution, resolution, 0, 0),  # rendered at this size
        stamp=lambda number: stamp_of(drawings[number]),
    )


def load_files(name: str, found: CaptionedFiles, resolution: int) -> CaptionedImages:
    """The images of `found`, decoded when asked for."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` has its own limit
    nothing, files, image_ids = [""] * len(found.captions), found.files, found.image_ids
    return CaptionedImages(
        name,
        found.captions,
        nothing,
        nothing,
        image_ids,
        lambda row: files.pixels(int(image_ids[row]), resolution),
        files,
        found.notes,
        frame=lambda row: files.frame(int(image_ids[row]), resolution),
        stamp=lambda image_id: (files.label(image_id), files.state(image_id)),
    )


def check_target(target: str) -> None:
    """Raises `UserError` where there is no such target."""
    if target not in TARGETS and not Path(target).is_dir():
        raise UserError(
            f"target {target} is unknown: it is none of {', '.join(TARGETS)}, and no folder (seen "
            f"from {Path.cwd()})"
        )


def check_images(data: CaptionedImages, split: str) -> None:
    """Raises `UserError` where a split has too few images for scores of a set, such as FID."""
    count = len(np.unique(data.image_ids))
    if count < 2:
        raise UserError(
            f"the {split} split of {data.name} has {count} image, and scores of a set of images "
            f"need 2 or more; add images"
        )


def evenly_spaced(rows: int, limit: int | None) -> list[int]:
    """`limit` row numbers, evenly spaced over `rows`; all of them without a limit."""
    count = rows if limit is None else min(limit, rows)
    return [k * rows // count for k in range(count)]


def find_target(
    target: str,
    split: str,
    *,
    seed: int = 0,
    data_dir: Path | None = None,
    resolution: int = EMOJI_SIZE,
) -> CaptionedImages:
    """All rows of `load_target`, those of unreadable images included. Raises `UserError`."""
    check_target(target)
    if target == "emoji":
        return load_emoji(split, seed, resolution)
    if target in TARGETS:
        if data_dir is None:
            raise UserError(
                f"target {target} needs the folder of its files, --data-dir; `python -m targets "
                f"{target} --download --data-dir D` fetches them to D, target emoji needs nothing"
            )
        layout = {"coco": read_coco, "cc3m": read_cc3m}[target]
        return load_files(target, layout(data_dir, split), resolution)
    folder = Path(target)
    return load_files(folder.resolve().name, read_folder(folder, split), resolution)


def drop_unreadable(data: CaptionedImages) -> CaptionedImages:
    """`data` without the rows whose image cannot be decoded; `skipped` says which these are.

    Raises:
        UserError: no row is left.
    """
    if data.files is None:
        return data
    image_ids = np.unique(data.image_ids).tolist()
    skipped = find_unreadable(data.files, image_ids, data.name)
    if len(skipped) == len(image_ids):
        raise UserError(
            f"none of the {len(skipped):,} images of {data.name} can be read, among them "
            f"{next(iter(skipped.values()))}"
        )
    if not skipped:
        return data
    readable = np.flatnonzero(~np.isin(data.image_ids, list(skipped)))
    return replace(data.take(readable.tolist()), skipped=skipped)


def load_target(
    target: str,
    split: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    data_dir: Path | None = None,
    resolution: int = EMOJI_SIZE,
) -> CaptionedImages:
    """A target's `train` or `validation` split, or `limit` rows evenly spaced over it.

    Rows are dropped whose image cannot be decoded: of `limit` rows, a few may be missing.

    Args:
        target: one of `TARGETS`, or a folder.
        seed: chooses emoji's captions; other targets have one row each caption.
        data_dir: where the files of coco and cc3m are.
        resolution: pixels a side.

    Raises:
        UserError: the target is unknown, its files are missing or not what they should be.
    """
    data = find_target(target, split, seed=seed, data_dir=data_dir, resolution=resolution)
    if limit is not None and limit < len(data):
        data = data.take(evenly_spaced(len(data), limit))
    return drop_unreadable(data)
