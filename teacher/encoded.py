"""A target as the U-Net reads it: latents and conditions of rows.

A small target is encoded up front and kept in memory. The rows of a large one are encoded when a
step asks for them; optionally, their latents are computed once and kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
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

IN_MEMORY = 2**30  # bytes of latents, and of conditions, that are encoded up front

PART = 4096  # latents a file of the cache: 67 MB at 256 px


@dataclass(frozen=True)
class OnDemand(Generic[T]):
    """Rows that are computed when they are asked for, by `rows[numbers]`, as from a tensor."""

    make: Callable[[Sequence[Tensor]], Iterable[T]]  # batches of numbers (b,) -> (b, ...)
    batch: int
    join: Callable[[list[T]], T]

    def __getitem__(self, numbers: Tensor) -> T:
        return self.join(list(self.make(numbers.split(self.batch))))


@dataclass(frozen=True)
class Encoded:
    """A target's rows, on the CPU."""

    latents: Tensor | OnDemand[Tensor]  # [rows] -> (B, C, h, w), float32
    conditions: Conditions | OnDemand[Conditions]  # [rows], in the teacher's precision

    def batch(self, rows: Tensor) -> tuple[Tensor, Conditions]:
        """Rows (B,) -> their latents and their conditions."""
        return self.latents[rows], self.conditions[rows]


def encode_target(
    teacher: Teacher,
    data: CaptionedImages,
    *,
    cache_latents: bool = False,
    batch: int | None = None,
    in_memory: int = IN_MEMORY,
) -> Encoded:
    """A target's latents and conditions: up front where they fit in memory, else on demand.

    Args:
        cache_latents: compute each image's latents once and keep them on disk
            (`common/cache.py`), for other runs on the same images too.
        batch: rows that are encoded at once; about a million pixels if absent.
        in_memory: bytes up to which latents, and conditions, are encoded up front.
    """
    config, (states, pooled) = teacher.unet.config, text_widths(teacher.unet.config)
    of_latents = 4 * config.in_channels * teacher.latent_size**2  # bytes a row
    of_conditions = teacher.dtype.itemsize * (teacher.text_tokens * states + pooled)
    batch = batch or teacher.images_at_once

    def conditions_of(batches: Sequence[Tensor]) -> Iterator[Conditions]:
        for rows in batches:
            frames = data.frames(rows) if teacher.reads_sizes else None
            captions = [data.captions[row] for row in rows.tolist()]
            yield teacher.conditions(captions, frames).to("cpu")

    conditions = OnDemand(conditions_of, batch, join)
    if not cache_latents and len(data) * of_latents > in_memory:

        def latents_of(batches: Sequence[Tensor]) -> Iterator[Tensor]:
            for images in data.batches(batches):
                yield teacher.encode_images(images).cpu()

        return Encoded(OnDemand(latents_of, batch, torch.cat), conditions)

    latents = image_latents(teacher, data, cache_latents, batch)
    if len(data) * of_conditions > in_memory:
        return Encoded(latents, conditions)
    batches = torch.arange(len(data)).split(batch)
    bar = tqdm(conditions_of(batches), total=len(batches), desc="encoding captions", unit="batch")
    return Encoded(latents, join(bar))


def image_latents(
    teacher: Teacher, data: CaptionedImages, cache_latents: bool, batch: int
) -> Tensor | OnDemand[Tensor]:
    """All latents of a target, each image encoded once."""
    _, firsts, numbers = np.unique(data.image_ids, return_index=True, return_inverse=True)
    shown, image_of = data.take(firsts.tolist()), torch.from_numpy(numbers)  # (images), (rows,)

    def encode(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for images in shown.batches(batches):
            yield teacher.encode_images(images).cpu()

    if not cache_latents:
        batches = torch.arange(len(shown)).split(batch)
        bar = tqdm(encode(batches), total=len(batches), desc="encoding images", unit="batch")
        return torch.cat(list(bar))[image_of]

    place, what = f"latents-{latents_key(teacher, shown)}", "encoding images"
    parts = kept_rows(place, len(shown), encode, part=PART, batch=batch, what=what)

    def rows_of(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for rows in batches:
            places = image_of[rows].tolist()
            yield torch.stack([parts[place // PART][place % PART] for place in places])

    return OnDemand(rows_of, PART, torch.cat)


def latents_key(teacher: Teacher, shown: CaptionedImages) -> str:
    """The name of images' latents: of autoencoder, size, and each image's name and file's state."""
    weights = fingerprint(teacher.pipe.vae.state_dict(), {"resolution": teacher.resolution})
    return rows_key(weights, lines=(text for stamp in shown.stamps() for text in stamp))
