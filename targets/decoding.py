"""Image files as pixels. App. E.1.

An image is turned as its EXIF data say, put on white where it is transparent, cropped in the centre
to a square and resized with an antialiasing bicubic filter. Of an animation, the first frame
counts.

`find_unreadable` decodes every image of a split once. The cache keeps which of them failed and why,
until a file has another size or time.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from common.cache import cache_folder, rows_key
from common.files import read_json, write_json
from common.processes import barrier, rank, world_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others run other programs, or are rare
MAX_PIXELS = 89_478_485  # of an image; Pillow's own limit
# Not the image's fault: nothing is left of something, no permission, a server that does not answer.
ELSEWHERE = {
    getattr(errno, name)
    for name in ("EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "ESTALE", "ETIMEDOUT", "ENOTCONN")
}

# EXIF's orientation -> what makes the image upright; other values say nothing.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

CHECK_PIXELS = 8  # a side, when an image is only checked: a JPEG is then decoded at an eighth
PART = 4096  # images a file of the cache: a stopped check loses one part


class Unreadable(Exception):
    """An image that cannot be decoded; the text names it and says why."""


def workers() -> int:
    """Threads that decode: Pillow leaves Python's lock while it does."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, here or 1)


# ---- one image ----


class Frame(NamedTuple):
    """How a square was cut out of an image, in the numbers that SDXL is trained with."""

    height: int  # of the image, turned upright
    width: int
    top: int  # of the square, once the image is resized to the square's size
    left: int


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a split, by number."""

    open: Callable[[int], BinaryIO]
    label: Callable[[int], str]  # what messages call it
    state: Callable[[int], str]  # another one when the file has changed

    def pixels(self, image_id: int, resolution: int) -> np.ndarray:
        """An image, (resolution, resolution, 3) uint8. Raises `Unreadable`."""
        return self.read(image_id, decode, resolution)

    def frame(self, image_id: int, resolution: int) -> Frame:
        """How that image is cut out of its file. Raises `Unreadable`."""
        return self.read(image_id, find_frame, resolution)

    def read(self, image_id: int, reader: Callable[[BinaryIO, int], Any], resolution: int) -> Any:
        """What `reader` gives of an image's file. Raises `Unreadable`."""
        try:
            with self.open(image_id) as file:
                return reader(file, resolution)
        except Exception as error:  # a decoder may raise anything
            if isinstance(error, MemoryError) or getattr(error, "errno", 0) in ELSEWHERE:
                raise
            why = " ".join(str(error).split()) or type(error).__name__
            raise Unreadable(f"{self.label(image_id)}: {why}") from None


def open_image(file: BinaryIO) -> Image.Image:
    """An image file of a size that is allowed; its pixels are not read yet."""
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS / 1e6:.0f} M"
        )
    return image


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How an image has to be turned to be upright, as its EXIF data say."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises all kinds over EXIF data that are damaged
        return None


def decode(file: BinaryIO, resolution: int) -> np.ndarray:
    """An image file as (resolution, resolution, 3) uint8; see the module's header."""
    with open_image(file) as image:
        # a JPEG of several times the size can be decoded at a fraction of it
        image.draft(None, (2 * resolution, 2 * resolution))
        image.load()
        turn = turn_of(image)
        upright = on_white(image if turn is None else image.transpose(turn))
        size = (resolution, resolution)
        return np.asarray(ImageOps.fit(upright, size, Image.Resampling.BICUBIC))


def find_frame(file: BinaryIO, resolution: int) -> Frame:
    """Where `decode` cuts the square out of an image file; mostly reads the file's header alone."""
    with open_image(file) as image:
        if image.format == "TIFF":
            image.load()  # which turns it: after that, its EXIF data say nothing
        turn, (width, height) = turn_of(image), image.size
    if turn in [TURNS[orientation] for orientation in (5, 6, 7, 8)]:  # it lies on its side
        width, height = height, width
    scale = resolution / min(width, height)
    top, left = (round((scale * side - resolution) / 2) for side in (height, width))
    return Frame(height, width, top, left)


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


# ---- the images that cannot be decoded ----


def checks_folder(name: str) -> Path:
    """Where the results of `find_unreadable` for a target are kept."""
    return cache_folder() / "unreadable" / name


def forget_checks(name: str) -> None:
    """Have a target's images checked anew the next time it is loaded."""
    shutil.rmtree(checks_folder(name), ignore_errors=True)


def find_unreadable(files: ImageFiles, image_ids: Sequence[int], name: str) -> dict[int, str]:
    """The images that cannot be decoded -> why, from the cache or into it.

    Images are checked in parts, each a file: a stopped check goes on. Processes share the parts.

    Args:
        image_ids: which of them to check.
        name: of the target.
    """
    lines = (f"{files.label(k)} {files.state(k)}" for k in image_ids)
    folder = checks_folder(name) / rows_key(PIL.__version__, lines=lines)
    starts = range(0, len(image_ids), PART)
    parts = {folder / f"{start:09d}.json": image_ids[start : start + PART] for start in starts}
    todo = [path for path in list(parts)[rank() :: world_size()] if not path.exists()]

    def fault(image_id: int) -> str | None:
        try:
            files.pixels(image_id, CHECK_PIXELS)
        except Unreadable as error:
            return str(error)
        return None

    total = sum(len(parts[path]) for path in todo)
    bar = tqdm(total=total, desc="checking images", unit="image", disable=not todo or rank() > 0)
    pool = ThreadPoolExecutor(workers())
    try:
        for path in todo:
            found = {}
            for image_id, why in zip(parts[path], pool.map(fault, parts[path]), strict=True):
                if why is not None:
                    found[image_id] = why
                bar.update()
            write_json(path, found)
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    barrier()
    return {int(image_id): why for path in parts for image_id, why in read_json(path).items()}
