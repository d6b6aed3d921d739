"""A target as the U-Net reads it: latents and conditions of rows.

Each image is encoded once. Its latents are kept on disk, for all processes and for other runs on
the same images, and mapped into memory: the system holds there what fits. Each distinct caption is
encoded once where all of them fit into a share of the memory; else those of a batch are encoded
when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from common.cache import kept_rows, rows_key
from common.files import fingerprint
from targets.images import CaptionedImages
from teacher.conditions import Conditions, join
from teacher.model import Teacher
from teacher.shapes import text_widths

T = TypeVar("T")

SHARE = 4  # of the free memory, one part in so many may be filled with conditions
AT_ONCE = 256  # captions that are encoded together
PART = 4096  # latents a file of the cache: 67 MB at 256 px


@dataclass(frozen=True)
class OnDemand(Generic[T]):
    """Rows that are made when they are asked for, by `rows[numbers]`, as from a tensor."""

    make: Callable[[Tensor], T]  # row numbers (b,) -> (b, ...)

    def __getitem__(self, numbers: Tensor) -> T:
        return self.make(numbers)


@dataclass(frozen=True)
class Encoded:
    """A target's rows."""

    latents: Tensor | OnDemand[Tensor]  # [rows] -> (B, C, h, w), float32, on the CPU
    conditions: Conditions | OnDemand[Conditions]  # [rows], in the teacher's precision

    def batch(self, rows: Tensor) -> tuple[Tensor, Conditions]:
        """Rows (B,) -> their latents and their conditions."""
        return self.latents[rows], self.conditions[rows]


def encode_target(teacher: Teacher, data: CaptionedImages, in_memory: int | None = None) -> Encoded:
    """A target's latents and conditions; images that are not in the cache are encoded now.

    Args:
        in_memory: bytes up to which conditions are encoded now; `spare_memory()` if absent.
    """
    _, firsts, numbers = np.unique(data.image_ids, return_index=True, return_inverse=True)
    shown, image_of = data.take(firsts.tolist()), torch.from_numpy(numbers)  # (images), (rows,)
    parts = image_latents(teacher, shown)
    frames = image_frames(teacher, shown) if teacher.reads_sizes else None  # (images, 4)
    texts = caption_conditions(
        teacher, data.captions, spare_memory() if in_memory is None else in_memory
    )

    def latents_of(rows: Tensor) -> Tensor:
        places = image_of[rows].tolist()
        return torch.stack([parts[place // PART][place % PART] for place in places])

    def conditions_of(rows: Tensor) -> Conditions:
        found = texts[rows]
        if frames is None or found.time_ids is None:
            return found
        sizes = torch.cat([frames[image_of[rows]].to(found.time_ids), found.time_ids[:, 4:]], 1)
        return replace(found, time_ids=sizes)

    return Encoded(OnDemand(latents_of), OnDemand(conditions_of))


def image_latents(teacher: Teacher, shown: CaptionedImages) -> list[Tensor]:
    """Latents of images, each (PART, C, h, w), the last one shorter; mapped from the cache."""

    def encode(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for images in shown.batches(batches):
            yield teacher.encode_images(images).cpu()

    place = f"latents-{latents_key(teacher, shown)}"
    batch, what = teacher.images_at_once, "encoding images"
    return kept_rows(place, len(shown), encode, part=PART, batch=batch, what=what)


def image_frames(teacher: Teacher, shown: CaptionedImages) -> Tensor:
    """How images were cut out of their originals, (images, 4), from the cache or into it."""

    def read(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return (shown.frames(rows) for rows in batches)

    place = f"frames-{rows_key(str(teacher.resolution), lines=stamps(shown))}"
    what = "reading images' sizes"
    return torch.cat(kept_rows(place, len(shown), read, part=PART, batch=AT_ONCE, what=what))


def caption_conditions(
    teacher: Teacher, captions: Sequence[str], in_memory: int
) -> OnDemand[Conditions]:
    """Conditions of whole images with these captions: kept on the CPU, or made on demand."""
    places = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    distinct, caption_of = list(places), torch.tensor([places[caption] for caption in captions])

    def encode(numbers: Tensor) -> Iterator[Conditions]:
        for part in numbers.split(AT_ONCE):
            yield teacher.conditions([distinct[k] for k in part.tolist()])

    def encode_now(rows: Tensor) -> Conditions:
        numbers, places = caption_of[rows].unique(return_inverse=True)
        return join(encode(numbers))[places]

    states, pooled = text_widths(teacher.unet.config)
    of_one = teacher.dtype.itemsize * (teacher.text_tokens * states + pooled)  # bytes
    if len(distinct) * of_one > in_memory:
        return OnDemand(encode_now)
    bar = tqdm(
        encode(torch.arange(len(distinct))),
        total=-(-len(distinct) // AT_ONCE),
        desc="encoding captions",
        unit="batch",
    )
    kept = join(part.to("cpu") for part in bar)
    return OnDemand(lambda rows: kept[caption_of[rows]])


def spare_memory() -> int:
    """Bytes that this process may fill: its part of a quarter of the memory that is free."""
    free, limit = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()).isdigit():  # of a container
        free = min(free, int(most))
    return free // SHARE // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def stamps(shown: CaptionedImages) -> Iterator[str]:
    """Each image's name and its file's state."""
    return (text for stamp in shown.stamps() for text in stamp)


def latents_key(teacher: Teacher, shown: CaptionedImages) -> str:
    """The name of images' latents: of autoencoder, size, and each image's name and file's state."""
    weights = fingerprint(teacher.pipe.vae.state_dict(), {"resolution": teacher.resolution})
    return rows_key(weights, lines=stamps(shown))
