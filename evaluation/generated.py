"""Generated images of captions, made once and kept on disk for the scores and figures. App. E.3.

There is one folder for each split, each maker (the experts or the teacher), and each hash of all
that an image depends on. After a kill, the same command generates what is missing; with other
experts or another seed, it starts another folder.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.files import read_json, replacing, write_json
from common.randomness import step_generator
from evaluation.features import ImageFiles


class HasImages(Protocol):
    """What a call of a pipeline returns."""

    @property
    def images(self) -> list[Image.Image]: ...


class Pipeline(Protocol):
    """What generates images: a teacher with its experts, or a teacher alone."""

    def identity(self, expert: int | None) -> list[str]:
        """What its images depend on beside prompt, seed and settings, as checksums."""

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt."""

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        expert: int | None,
        num_inference_steps: int,
        guidance_scale: float | None,
    ) -> HasImages:
        """One image a prompt, by one expert (-1: the teacher)."""


@dataclass(frozen=True)
class Exchanged:
    """A pipeline that sends each prompt to the expert after its own: a control."""

    pipeline: Pipeline
    num_experts: int

    def identity(self, expert: int | None) -> list[str]:
        return ["exchanged", *self.pipeline.identity(expert)]

    def route(self, prompts: Sequence[str]) -> list[int]:
        return [(i + 1) % self.num_experts for i in self.pipeline.route(prompts)]

    def __call__(self, prompts: Sequence[str], **settings: Any) -> HasImages:
        return self.pipeline(prompts, **settings)


@dataclass(frozen=True)
class Sampling:
    """How images are generated."""

    steps: int = 25
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance; the teacher's own if not given."""
    seed: int = 0
    """Every image's seed is a function of this one and its row."""
    batch_size: int = 50
    """Images generated at once."""


@dataclass(frozen=True)
class GeneratedImages:
    """Generated images of some captions of a split, on disk."""

    folder: Path
    rows: list[int]  # of the split
    experts: list[int]  # -1: the teacher
    seconds: list[float]

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, row: int) -> Path:
        return self.folder / f"{row:06d}.png"

    def image(self, row: int) -> Image.Image:
        with Image.open(self.path(row)) as image:
            return image.convert("RGB")

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        """The images at `positions` of `rows`, (B, 3, H, W), float32 in [-1, 1]."""
        paths = [self.path(self.rows[int(position)]) for position in positions]
        return ImageFiles(paths).images(range(len(paths)))

    def costs(self, ratios: Sequence[float]) -> dict[str, Any]:
        """How many there are, and what one took on average: MACs ratio and seconds.

        Args:
            ratios: MACs ratio of each expert, (N,).
        """
        macs_ratios = [1.0 if i < 0 else ratios[i] for i in self.experts]
        return {
            "images": len(self),
            "macs_ratio": sum(macs_ratios) / len(self),
            "seconds": sum(self.seconds) / len(self),
        }


class Example(NamedTuple):
    """An expert's image, and the teacher's of the same prompt and seed if there is one."""

    prompt: str
    expert: int
    macs_ratio: float
    image: Image.Image
    teacher: Image.Image | None = None


def save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def image_seed(seed: int, row: int) -> int:
    """The seed of one image: each row's differs, and does not depend on how many there are."""
    # the purpose's name decides every seed: with another one, published scores would change
    return int(torch.randint(2**31, (), generator=step_generator(seed, "drawing", row)))


def identity(pipeline: Pipeline, sampling: Sampling, expert: int | None) -> str:
    """What images depend on beside caption and row, as a short hash."""
    parts = (sampling.steps, sampling.guidance, sampling.seed, expert, pipeline.identity(expert))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def generate(
    pipeline: Pipeline,
    base: Path,
    captions: Sequence[str],
    split: str,
    rows: list[int],
    sampling: Sampling,
    expert: int | None,
) -> GeneratedImages:
    """Generate the images of `rows` that are not there yet.

    Args:
        base: the folder of all generated images.
        captions: all of the split's.
        split: its name.
        rows: those to generate.
        expert: -1 for the teacher, None for the router's choice.
    """
    who = "teacher" if expert == -1 else "routed"
    folder = base / f"{split}-{who}-{identity(pipeline, sampling, expert)}"
    record = folder / "images.json"  # row -> caption, expert, seconds; written after the image
    done: dict[str, tuple[str, int, float]] = read_json(record) if record.exists() else {}
    todo = [row for row in rows if done.get(str(row), ("",))[0] != captions[row]]
    if expert is None:
        chosen = pipeline.route([captions[row] for row in todo]) if todo else []
    else:
        chosen = [expert] * len(todo)
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc=f"images, {who}, {split}")
    for i in sorted(set(chosen)):
        group = [row for row, choice in zip(todo, chosen, strict=True) if choice == i]
        for start in range(0, len(group), sampling.batch_size):
            part = group[start : start + sampling.batch_size]
            clock = time.time()
            images = pipeline(
                [captions[row] for row in part],
                seeds=[image_seed(sampling.seed, row) for row in part],
                expert=i,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
            ).images
            seconds = (time.time() - clock) / len(part)
            for row, image in zip(part, images, strict=True):
                save_png(image, folder / f"{row:06d}.png")
                done[str(row)] = (captions[row], i, seconds)
            write_json(record, done)
            bar.update(len(part))
    bar.close()
    entries = [done[str(row)] for row in rows]
    experts, times = [i for _, i, _ in entries], [seconds for *_, seconds in entries]
    return GeneratedImages(folder, rows, experts, times)


def examples(
    captions: Sequence[str],
    images: GeneratedImages,
    dense: GeneratedImages | None,
    ratios: Sequence[float],
    most: int = 8,
) -> list[Example]:
    """Up to `most` images of each expert, beside the teacher's.

    Args:
        captions: all of the split's.
        images, dense: by the experts, and by the teacher.
        ratios: MACs ratio of each expert, (N,).
    """
    count: Counter[int] = Counter()
    found = []
    for row, i in zip(images.rows, images.experts, strict=True):
        count[i] += 1
        if count[i] <= most:
            teacher = None if dense is None else dense.image(row)
            found.append(Example(captions[row], i, ratios[i], images.image(row), teacher))
    return found


def through_each_expert(
    pipeline: Pipeline, prompts: Sequence[str], sampling: Sampling, ratios: Sequence[float]
) -> list[Example]:
    """The same prompts through every expert and the teacher, all from one seed."""

    def images_by(expert: int) -> list[Image.Image]:
        return pipeline(
            prompts,
            seeds=[sampling.seed] * len(prompts),
            expert=expert,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
        ).images

    dense = images_by(-1)
    return [
        Example(prompt, i, ratio, image, teacher)
        for i, ratio in enumerate(ratios)
        for prompt, image, teacher in zip(prompts, images_by(i), dense, strict=True)
    ]
