"""Images as tensors: read from files or by row, resized in one way for all networks. App. E.3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError


class ImageRows(Protocol):
    """Images that are read when asked for, such as `CaptionedImages` or `GeneratedImages`."""

    def __len__(self) -> int: ...

    def images(self, rows: Sequence[int] | Tensor) -> Tensor: ...


def read_images(paths: Sequence[Path]) -> Tensor:
    """Image files, (B, 3, H, W), float32 in [-1, 1].

    Raises `UserError` where one cannot be read, or they differ in size.
    """
    pixels: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise UserError(f"{path} is no readable image ({error}); replace it") from None
        if pixels[-1].shape != pixels[0].shape:
            raise UserError(f"{path} is not of its neighbours' size; give images of one size")
    return to_float(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))


def to_float(images: Tensor) -> Tensor:
    """uint8 or floats in [-1, 1] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_pixels(images: Tensor) -> Tensor:
    """uint8 or floats in [-1, 1] to uint8, as an image file holds it."""
    return ((to_float(images) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) to floats in [-1, 1], (B, 3, size, size).

    The square in the centre, through an antialiasing bicubic filter (Pillow's and clean-fid's).
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = to_float(images[..., top : top + side, left : left + side])
    if side == size:
        return square
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
