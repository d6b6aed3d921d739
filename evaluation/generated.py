"""Generated images of captions, made once and kept on disk for the scores and figures. App. E.3.

There is one folder for each hash of all that its images depend on; each image says in its file of
which caption it is, and by which expert. After a kill, the same command generates what is missing;
other experts or another seed mean another folder.

Processes share out the batches that are missing, so a batch holds the same images however many
processes there are: on the same kind of device, and with as many threads each, they generate the
same images bit for bit. After a kill batches are other ones, and images equal up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import replacing
from common.processes import barrier, from_first, rank, world_size
from common.randomness import step_generator
from evaluation.images import read_images

NOTE = "aptp"  # where in its file an image says what it is
Pipeline = Callable[..., Any]  # called as `sample.APTPPipeline` is: its result has `images`


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

    def images(
        self, pipeline: Pipeline, prompts: list[str], seeds: list[int], experts: list[int]
    ) -> list[Image.Image]:
        """An image for each prompt, by its expert; -1 is the teacher."""
        settings = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return pipeline(prompts, seeds=seeds, expert=experts, **settings).images


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
        return read_images([self.path(self.rows[int(position)]) for position in positions])

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


class Note(NamedTuple):
    """What a generated image's file says of it."""

    caption: str
    expert: int
    seconds: float


def save_png(image: Image.Image, path: Path, note: Note | None = None) -> None:
    info = PngImagePlugin.PngInfo()
    if note is not None:
        info.add_text(NOTE, json.dumps(note))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_note(path: Path) -> Note | None:
    """What an image's file says of it; None where there is no such file, or it says nothing."""
    try:
        with Image.open(path) as image:
            return Note(*json.loads(image.info[NOTE]))
    except (OSError, KeyError):
        return None


def image_seed(seed: int, row: int) -> int:
    """The seed of one image: each row's differs, and does not depend on how many there are."""
    # the purpose's name decides every seed: with another one, published scores would change
    return int(torch.randint(2**31, (), generator=step_generator(seed, "drawing", row)))


def folder_name(split: str, who: str, sampling: Sampling, checksums: Sequence[str]) -> str:
    """The folder of images, by a hash of what they depend on beside caption, row and expert.

    Args:
        who: what the experts are called that generate them.
        checksums: of all weights.
    """
    parts = (sampling.steps, sampling.guidance, sampling.seed, list(checksums))
    return f"{split}-{who}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def generate(
    pipeline: Pipeline,
    folder: Path,
    captions: Sequence[str],
    rows: list[int],
    experts: list[int],
    sampling: Sampling,
) -> GeneratedImages:
    """Generate the images of `rows` that are not there yet; processes share them out.

    Raises `UserError` where a process cannot see what another has generated.

    Args:
        folder: of these images.
        captions: all of the split's.
        rows: those to generate.
        experts: the expert of each of them; -1 is the teacher.
    """
    paths = {row: folder / f"{row:06d}.png" for row in rows}

    def missing() -> list[tuple[int, int]]:
        """Experts and rows, sorted so that a batch has few experts."""
        notes = {row: read_note(path) for row, path in paths.items()}
        asked = sorted(zip(experts, rows, strict=True))
        return [(i, row) for i, row in asked if (notes[row] or ())[:2] != (captions[row], i)]

    todo, size = from_first(missing), sampling.batch_size
    own = [todo[k : k + size] for k in range(0, len(todo), size)][rank() :: world_size()]
    bar = tqdm(total=sum(map(len, own)), desc=f"images, {folder.name}", disable=rank() > 0)
    for part in own:
        prompts = [captions[row] for _, row in part]
        seeds = [image_seed(sampling.seed, row) for _, row in part]
        clock = time.time()
        images = sampling.images(pipeline, prompts, seeds, [i for i, _ in part])
        seconds = (time.time() - clock) / len(part)
        for (i, row), image in zip(part, images, strict=True):
            save_png(image, paths[row], Note(captions[row], i, seconds))
        bar.update(len(part))
    bar.close()
    barrier()
    notes = [read_note(path) for path in paths.values()]
    if lost := [path for path, note in zip(paths.values(), notes, strict=True) if note is None]:
        raise UserError(
            f"{lost[0]} is missing: it was removed, or the processes do not see each other's "
            f"files; put the run on a disk that all machines share, and run the same command again"
        )
    return GeneratedImages(folder, rows, experts, [note.seconds for note in notes if note])


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
    pairs = [(i, prompt) for i in range(-1, len(ratios)) for prompt in prompts]
    names, experts = [prompt for _, prompt in pairs], [i for i, _ in pairs]
    images = sampling.images(pipeline, names, [sampling.seed] * len(pairs), experts)
    dense = dict(zip(prompts, images, strict=False))  # the teacher comes first
    return [
        Example(prompt, i, ratios[i], image, dense[prompt])
        for (i, prompt), image in zip(pairs, images, strict=True)
        if i >= 0
    ]
