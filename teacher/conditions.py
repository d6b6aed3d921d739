"""What a step of denoising is conditioned on beside its timestep, as one thing. Sec. 3.1.

Stable Diffusion 1.x and 2.x read a caption's text states alone. SDXL also reads a vector of the
whole caption, and how the image was cut out of its original: six numbers, its time ids, which are
the original's height and width, the top and left of the crop, and the height and width of the image
that is asked for (SDXL's paper, Sec. 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.ahead import to_device

TIME_IDS = 6


@dataclass(frozen=True)
class Conditions:
    """Conditions of B images. The last two are SDXL's, and absent otherwise."""

    text: Tensor  # (B, tokens, width), for cross-attention
    pooled: Tensor | None = None  # (B, width), of the whole caption
    time_ids: Tensor | None = None  # (B, 6), float32, in any precision: sizes up to 2^24 are exact

    def __len__(self) -> int:
        return len(self.text)

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """The same change to all that is there."""
        pooled = None if self.pooled is None else change(self.pooled)
        time_ids = None if self.time_ids is None else change(self.time_ids)
        return Conditions(change(self.text), pooled, time_ids)

    def __getitem__(self, rows: Tensor) -> Conditions:
        """Those of some of the images, (b,)."""
        return self.each(lambda part: part[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditions:
        """On a device, text in this precision; time ids stay float32."""
        moved = self.each(lambda part: to_device(part, device))
        if dtype is None:
            return moved
        pooled = None if moved.pooled is None else moved.pooled.to(dtype)
        return Conditions(moved.text.to(dtype), pooled, moved.time_ids)

    def drop(self, dropped: Tensor, empty: Conditions) -> Conditions:
        """With the caption of `dropped`, (B,) of bool, replaced by the empty one; sizes stay.

        Args:
            empty: conditions of one image, with the empty caption.
        """
        dropped, empty = dropped.to(self.text.device), empty.to(self.text.device)
        text = torch.where(dropped[:, None, None], empty.text, self.text)
        pooled = self.pooled
        if pooled is not None:
            assert empty.pooled is not None
            pooled = torch.where(dropped[:, None], empty.pooled, pooled)
        return Conditions(text, pooled, self.time_ids)

    def unet_inputs(self) -> dict[str, Any]:
        """As keyword arguments of a U-Net."""
        inputs: dict[str, Any] = {"encoder_hidden_states": self.text}
        if self.pooled is not None:
            added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
            inputs["added_cond_kwargs"] = added
        return inputs


def join(parts: Iterable[Conditions]) -> Conditions:
    """Conditions of several batches as those of one."""
    parts = list(parts)

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    text = joined("text")
    assert text is not None
    return Conditions(text, joined("pooled"), joined("time_ids"))
