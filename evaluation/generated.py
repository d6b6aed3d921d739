"""Pictures of a target's captions, drawn once and kept: what the scores are taken of. App. E.3.

A run keeps them under `report/drawings/`, by split, by who drew them, and by a hash of all that a
picture depends on. Killed, the same command draws what is missing; with other experts or another
seed, it draws anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.files import checksum, fingerprint, read_json, write_json
from common.randomness import step_generator
from evaluation.features import Pictures
from finetune import expert_path
from sample import APTPPipeline, save_png


def image_seed(seed: int, row: int) -> int:
    """The seed of one drawing: each row's differs, and does not depend on how many are drawn."""
    return int(torch.randint(2**31, (), generator=step_generator(seed, "drawing", row)))


@dataclass(frozen=True)
class Drawn:
    """Pictures of some captions of a split, on disk."""

    folder: Path
    rows: list[int]  # of the split
    experts: list[int]  # -1: the teacher
    seconds: list[float]

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, row: int) -> Path:
        return self.folder / f"{row:06d}.png"

    def picture(self, row: int) -> Image.Image:
        with Image.open(self.path(row)) as image:
            return image.convert("RGB")

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        """The pictures at `positions` of `rows`, (B, 3, H, W), float32 in [-1, 1]."""
        rows = [self.rows[int(position)] for position in positions]
        return Pictures([self.path(row) for row in rows]).images(range(len(rows)))


def identity(pipeline: APTPPipeline, cfg: Any, forced: int | None) -> str:
    """What the pictures depend on beside caption and row, as a short hash."""
    parts: list[object] = [cfg.steps, cfg.guidance, cfg.seed, forced]
    if forced is None:
        run, N = pipeline.run, len(pipeline.ratios)
        files = [run / "router.safetensors", run / "codes.safetensors"]
        parts += [checksum(path) for path in (*files, *(expert_path(run, i) for i in range(N)))]
    else:
        drawing = (pipeline.teacher.unet, pipeline.teacher.pipe.vae)
        parts += [fingerprint(part.state_dict(), {}) for part in drawing]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def draw(
    pipeline: APTPPipeline,
    captions: Sequence[str],
    split: str,
    rows: list[int],
    cfg: Any,
    expert: int | None,
) -> Drawn:
    """Draw the captions of `rows` that are not there yet.

    Args:
        captions: all of them.
        split: what they are.
        rows: those to draw.
        expert: -1 for the teacher, None for the router's choice.
    """
    who = "teacher" if expert == -1 else "routed"
    base = pipeline.run / "report" / "drawings"
    folder = base / f"{split}-{who}-{identity(pipeline, cfg, expert)}"
    record = folder / "drawn.json"  # row -> caption, expert, seconds; after the row's picture
    done: dict[str, tuple[str, int, float]] = read_json(record) if record.exists() else {}
    todo = [row for row in rows if done.get(str(row), ("",))[0] != captions[row]]
    if expert is None:
        chosen = pipeline.route([captions[row] for row in todo]) if todo else []
    else:
        chosen = [expert] * len(todo)
    todo = [row for _, row in sorted(zip(chosen, todo, strict=True))]  # one expert after another
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc=f"drawing, {who}, {split}")
    for start in range(0, len(todo), cfg.batch_size):
        part = todo[start : start + cfg.batch_size]
        sampled = pipeline(
            [captions[row] for row in part],
            seeds=[image_seed(cfg.seed, row) for row in part],
            expert=expert,
            num_inference_steps=cfg.steps,
            guidance_scale=cfg.guidance,
            batch_size=cfg.batch_size,
        )
        for row, image in zip(part, sampled.images, strict=True):
            save_png(image, folder / f"{row:06d}.png")
        for row, i, seconds in zip(part, sampled.experts, sampled.seconds, strict=True):
            done[str(row)] = (captions[row], i, seconds)
        write_json(record, done)
        bar.update(len(part))
    bar.close()
    entries = [done[str(row)] for row in rows]
    return Drawn(folder, rows, [i for _, i, _ in entries], [seconds for *_, seconds in entries])
