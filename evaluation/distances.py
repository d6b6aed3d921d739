"""How far pruned U-Nets are from their teacher: the output's part of Eq. 27 on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import all_reduce, rank, world_size
from common.randomness import step_generator
from targets.images import CaptionedImages
from teacher.encoded import encode_target
from teacher.model import Noised, Teacher, add_noise

Outputs = Callable[[Tensor, Noised], Tensor]  # rows (b,), their noised samples -> what a U-Net says


@torch.no_grad()
def output_distances(
    teacher: Teacher, data: CaptionedImages, pruned: Mapping[str, Outputs]
) -> dict[str, Tensor]:
    """Mean squared distance to the teacher's output, of each row, (n,), by the name of what it is.

    All see the same noise at the same timesteps. Processes share out the rows.

    Args:
        data: n captioned images.
        pruned: name -> what pruned U-Nets put out for rows of `data`.
    """
    encoded = encode_target(teacher, data)
    found = {name: torch.zeros(len(data), device=teacher.device) for name in pruned}
    parts = list(enumerate(torch.arange(len(data)).split(64)))[rank() :: world_size()]
    for step, part in tqdm(parts, "distance to the teacher", unit="batch", disable=rank() > 0):
        generator = step_generator(0, "distance", step)
        batch = add_noise(teacher, *encoded.batch(part), generator)
        expected = teacher.unet(**batch.inputs()).sample.float()
        for name, outputs in pruned.items():
            difference = outputs(part, batch).float() - expected
            found[name][part] = difference.square().flatten(1).mean(1)
    all_reduce(*found.values())
    return {name: values.cpu() for name, values in found.items()}
