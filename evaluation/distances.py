"""How far pruned U-Nets are from their teacher, before any training: Eq. 27 on its own.

One U-Net serves for all: gates make it each row's expert, and without gates it is the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import all_reduce, rank, world_size
from common.randomness import step_generator
from targets.images import CaptionedImages
from teacher.encoded import encode_target
from teacher.model import Teacher, add_noise


class Gates(Protocol):
    """Gates on the teacher's U-Net."""

    def set_gates(self, a: Tensor | None) -> None:
        """Use these gates, one row for each sample, (B, D); None for the teacher."""


@torch.no_grad()
def output_distances(
    teacher: Teacher, data: CaptionedImages, gates: Gates, codes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean squared distance to the teacher's output, of each row, (n,), by the name of its codes.

    All codes see the same noise at the same timesteps. Processes share out the rows.

    Args:
        data: n captioned images.
        gates: on the teacher's U-Net.
        codes: name -> the binary code of each row, (n, D).
    """
    encoded = encode_target(teacher, data)
    found = {name: torch.zeros(len(data), device=teacher.device) for name in codes}
    parts = list(enumerate(torch.arange(len(data)).split(64)))[rank() :: world_size()]
    for step, part in tqdm(parts, "distance to the teacher", unit="batch", disable=rank() > 0):
        generator = step_generator(0, "distance", step)
        inputs = add_noise(teacher, *encoded.batch(part), generator).inputs()
        gates.set_gates(None)
        expected = teacher.unet(**inputs).sample
        for name, of_rows in codes.items():
            gates.set_gates(of_rows[part].to(teacher.device))
            difference = teacher.unet(**inputs).sample.float() - expected.float()
            found[name][part] = difference.square().flatten(1).mean(1)
    all_reduce(*found.values())
    return {name: values.cpu() for name, values in found.items()}
