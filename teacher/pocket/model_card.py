"""What the pocket teacher can do: the scores and image grids of its model card. Sec. 4, App. E.3.

    python -m teacher.pocket.model_card   # writes assets/pocket/metrics.json and the grids

Images of captions of both splits are generated and scored as those of a run. The guidance scale is
chosen among a few: the one with the highest R-precision@1 on training captions other than those
scored, and the largest of equals; it becomes the teacher's default.

Each score has three references: real validation images against real training images, real images
after the autoencoder, and, on validation captions, the concept's real drawing in the other style,
which is the score of a teacher that knows the concept but not the style.

Prompts in free words are scored by hand-made lists of the emoji that would do. The control scores
the images of all other prompts by the same lists. After a kill, the same command generates what is
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from common.errors import UserError, command_line
from common.files import check_writable, fingerprint, read_json, write_json
from common.options import read_options
from common.processes import pick_device
from common.ranges import check_ranges
from common.runs import RUNS
from evaluation import metrics
from evaluation.features import extract
from evaluation.generated import GeneratedImages, Sampling, generate
from evaluation.grids import image_grid, save_figure
from evaluation.scores import Embedded, Reconstructed, Subset
from targets.emoji import STYLES, Emoji, emoji_pixels, list_emoji, split_drawings
from targets.images import CaptionedImages, load_target, spread
from teacher.model import Teacher, load_teacher
from teacher.pocket.autoencoder import reconstruction_psnr
from teacher.shapes import ASSETS

# prompts, and names, or parts of names, of the emoji that would do; no prompt contains its own
FREE_PROMPTS: dict[str, tuple[str, ...]] = {
    "a tall animal with a long neck": ("giraffe", "llama"),
    "something to eat with cheese": ("pizza", "hamburger", "sandwich", "taco"),
    "it rains and I do not want to get wet": ("umbrella",),
    "the king of the jungle": ("lion",),
    "a vehicle that puts out fires": ("fire engine", "fire extinguisher"),
    "you unlock a door with it": ("key",),
    "a hot drink in the morning": ("hot beverage", "teacup", "teapot"),
    "a bird that cannot fly and lives on ice": ("penguin",),
    "it has eight arms and lives in the sea": ("octopus", "squid"),
    "a yellow fruit that monkeys like": ("banana",),
    "it tells you the time": ("clock", "watch", "hourglass"),
    "a man in a red suit who brings presents": ("santa", "father christmas", "mrs. claus"),
    "I am so happy that I laugh out loud": ("grinning", "tears of joy", "laughing", "smiling"),
    "love": ("heart",),
    "a machine for taking photographs": ("camera",),
    "a slow animal that carries its house": ("snail", "turtle"),
    "you kick it into a goal": ("soccer ball",),
    "sounds that people dance to": (
        "music",
        "guitar",
        "violin",
        "trumpet",
        "saxophone",
        "drum",
        "piano",
        "headphone",
    ),
    "it carries people across the ocean": ("ship", "ferry", "boat"),
    "what you pay with": ("money", "banknote", "dollar", "coin", "credit card"),
    "weather in winter": ("snow", "cold", "ice"),
    "an insect that makes honey": ("bee", "honeybee"),
    "something with wings to travel by": ("airplane", "helicopter", "aircraft", "departure"),
    "it burns and gives warmth": ("fire", "flame"),
}


NEAREST = (1, 5, 35)  # real images; the last is a hundredth of the training drawings


@dataclass(frozen=True)
class Config:
    """Scoring the pocket teacher."""

    train_images: int = 500
    """Training captions scored."""
    validation_images: int | None = None
    """Validation captions scored; all 308 if not given."""
    guidances: tuple[float, ...] = (1.5, 2.0, 3.0, 4.5, 6.5)
    """Guidance scales to choose from."""
    trial_images: int = 120
    """Training captions scored at each of them."""
    steps: int = 25
    """Denoising steps."""
    seed: int = 0
    """Seed of the generated images."""
    batch_size: int = 50
    """Images generated at once."""
    assets: Path = ASSETS / "pocket"
    """Folder of the teacher, which metrics.json and the grids are written to."""
    out: Path = RUNS / "teacher-card"
    """Folder of the generated images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


class TeacherPipeline:
    """The teacher alone, as `evaluation.generated.Pipeline`."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.checksums = [fingerprint(part.state_dict(), {}) for part in teacher.parts.values()]

    def identity(self, expert: int | None) -> list[str]:
        return self.checksums

    def route(self, prompts: Sequence[str]) -> list[int]:
        return [-1] * len(prompts)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        expert: int | None,
        num_inference_steps: int,
        guidance_scale: float | None,
    ) -> ImagePipelineOutput:
        images = self.teacher.generate(prompts, seeds, num_inference_steps, guidance_scale)
        return ImagePipelineOutput(images)


class Scoring:
    """A teacher whose images are kept and scored."""

    def __init__(self, cfg: Config, teacher: Teacher) -> None:
        self.cfg, self.teacher = cfg, teacher
        self.pipeline = TeacherPipeline(teacher)
        self.suite = Embedded(teacher.device)

    def generate(
        self, captions: Sequence[str], split: str, rows: list[int], guidance: float
    ) -> GeneratedImages:
        """The teacher's images of some captions, from the folder or into it."""
        cfg = self.cfg
        sampling = Sampling(cfg.steps, guidance, cfg.seed, cfg.batch_size)
        base = cfg.out / "report" / "images"
        return generate(self.pipeline, base, captions, split, rows, sampling, -1)

    def by_guidance(self, train: CaptionedImages, rows: list[int]) -> dict[str, float]:
        """R-precision@1 of the captions of `rows` at every scale in question, by scale."""
        found = {}
        for guidance in self.cfg.guidances:
            images = self.generate(train.captions, "train", rows, guidance)
            found[f"{guidance:g}"] = self.suite(images, Subset(train, rows))["r1"]
        return found


def best_guidance(r1: dict[str, float]) -> float:
    """The scale with the highest R-precision@1, and the largest of equals."""
    return max((value, float(scale)) for scale, value in r1.items())[1]


def split_rows(total: int, scored: int, trial: int) -> tuple[list[int], list[int]]:
    """Rows to score, and others to choose the guidance scale on, both spread over the split."""
    chosen = spread(total, scored)
    others = sorted(set(range(total)) - set(chosen)) or chosen
    return chosen, [others[i] for i in spread(len(others), trial)]


def would_do(names: Sequence[str], drawings: Sequence[Emoji]) -> list[bool]:
    """For each drawing, whether its emoji's name contains one of `names` as whole words."""
    return [
        any(f" {name} " in f" {drawing.name} {drawing.alias} " for name in names)
        for drawing in drawings
    ]


def other_style(held_out: Sequence[Emoji]) -> Tensor:
    """The concepts of validation drawings as training saw them, in the other style.

    Pixels, (rows, 3, 64, 64) uint8: the images of a teacher that knows the concept but no style.
    """
    drawings = list_emoji()
    place = {(drawing.code, drawing.style): i for i, drawing in enumerate(drawings)}
    others = [
        place[drawing.code, style]
        for drawing in held_out
        for style in STYLES
        if style != drawing.style
    ]
    return torch.from_numpy(emoji_pixels(drawings)[others]).permute(0, 3, 1, 2)


def landing(cosine: Tensor, good: Tensor, ks: Sequence[int] = NEAREST) -> dict[str, float]:
    """How often images of prompts are near emoji that would do, and how often those of others are.

    Args:
        cosine: of each prompt's image and each real image, (P, m).
        good: whether a real image would do for a prompt, (P, m), bool; prompts for which none
            does, or all do, are left out.

    Returns:
        For each k the share of prompts for which one of the nearest k real images would do, and the
        mean area under the ROC curve of telling those that would do from the others by cosine (0.5
        by chance). Under `_exchanged` the same for the images of all other prompts: the level
        expected if images did not depend on what a prompt says.
    """
    from sklearn.metrics import roc_auc_score

    asked = good.any(1) & ~good.all(1)
    cosine, good = cosine[asked], good[asked]
    order = cosine.argsort(1, descending=True)  # (P, m)
    tables = {f"free_{k}": good[:, order[:, :k]].any(2).double() for k in ks}  # (lists, images)
    areas = [roc_auc_score(would, image) for would in good for image in cosine]
    own = torch.eye(len(good), dtype=torch.bool)
    tables["free_auc"] = torch.tensor(areas).double().view(own.shape)
    found: dict[str, float] = {}
    for name, table in tables.items():
        for suffix, part in (("", table[own]), ("_exchanged", table[~own])):
            found |= {name + suffix: part.mean().item()} if len(part) else {}
    return found


def free_language(
    scoring: Scoring, train: CaptionedImages, guidance: float
) -> tuple[dict[str, float], GeneratedImages, list[int]]:
    """Prompts in free words: their scores, their images, the nearest training row of each."""
    prompts = list(FREE_PROMPTS)
    images = scoring.generate(prompts, "free", list(range(len(prompts))), guidance)
    features = metrics.unit(extract(scoring.suite.extractor, images))  # (prompts, d)
    cosine = features @ metrics.unit(scoring.suite.gallery(train)).T  # (prompts, rows)
    everything = split_drawings("train")
    drawings = [everything[number] for number in train.image_ids]
    good = torch.tensor([would_do(names, drawings) for names in FREE_PROMPTS.values()])
    return landing(cosine, good), images, cosine.argmax(1).tolist()


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an image of Pillow's."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def grid(
    titles: Sequence[str], images: Sequence[Sequence[Image.Image]], columns: int = 8
) -> Figure:
    """The images of each title side by side over it."""
    cells = list(zip(images, titles, strict=True))
    return image_grid([("", cells[k : k + columns]) for k in range(0, len(cells), columns)])


def measure(cfg: Config) -> dict[str, Any]:
    """Generate, score, and write metrics.json and the grids. Raises `UserError`."""
    check_ranges(cfg)
    if not cfg.guidances:
        raise UserError("--guidances is empty; give at least one scale, such as 3")
    for folder in (cfg.out, cfg.assets):
        check_writable(folder)
    teacher = load_teacher("pocket", pick_device(cfg.device), pocket=cfg.assets)
    train, validation = (load_target("emoji", split) for split in ("train", "validation"))
    scoring = Scoring(cfg, teacher)
    scored, trial = split_rows(len(train), cfg.train_images, cfg.trial_images)
    held_out = spread(len(validation), cfg.validation_images)
    by_guidance = scoring.by_guidance(train, trial)
    guidance = best_guidance(by_guidance)
    training = read_json(cfg.assets / "training.json")
    found: dict[str, Any] = {
        "guidance": guidance,
        "r1_by_guidance": by_guidance,
        "images_seen": training["images_seen"],
        "psnr_val": reconstruction_psnr(teacher.pipe.vae, validation),
    }
    galleries = [scoring.suite.gallery(data) for data in (train, validation)]
    some = galleries[0][spread(len(train), len(validation))]
    found["frechet_real"] = metrics.frechet_distance(galleries[1], some)
    for short, split, data, rows in (
        ("train", "train", train, scored),
        ("val", "validation", validation, held_out),
    ):
        images, real = scoring.generate(data.captions, split, rows, guidance), Subset(data, rows)
        scores = scoring.suite(images, real)
        ceiling = scoring.suite(Reconstructed(teacher, real), real)
        found |= {f"{name}_{short}": value for name, value in scores.items()}
        found |= {f"{name}_{short}_autoencoder": value for name, value in ceiling.items()}
        found[f"images_{short}"] = len(rows)
        shown = [rows[i] for i in spread(len(rows), 32)]
        rebuilt = Reconstructed(teacher, Subset(data, shown)).images(range(len(shown)))
        cells = [
            [to_image(image), to_image(through), images.image(row)]
            for row, image, through in zip(shown, data.images(shown), rebuilt, strict=True)
        ]
        sheet = grid([data.captions[row] for row in shown], cells)
        save_figure(sheet, cfg.assets / f"grid_{short}.png")
    drawings = split_drawings("validation")
    concepts = [drawings[number] for number in validation.image_ids[held_out]]
    copied = scoring.suite(other_style(concepts), Subset(validation, held_out))
    found |= {f"{name}_val_other_style": value for name, value in copied.items()}
    scores, images, nearest = free_language(scoring, train, guidance)
    found |= {"free_prompts": len(FREE_PROMPTS)} | scores
    beside = train.images(nearest)
    cells = [[images.image(i), to_image(beside[i])] for i in range(len(nearest))]
    save_figure(grid(list(FREE_PROMPTS), cells, columns=6), cfg.assets / "grid_free.png")
    settings = read_json(cfg.assets / "teacher.json") | {"guidance_scale": guidance}
    write_json(cfg.assets / "teacher.json", settings)
    write_json(cfg.assets / "metrics.json", rounded(found))
    return found


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four digits after the point."""
    return {
        name: rounded(value)
        if isinstance(value, dict)
        else round(value, 4)
        if isinstance(value, float)
        else value
        for name, value in found.items()
    }


def main() -> None:
    for name, value in rounded(measure(read_options(Config, __doc__))).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    command_line(main)
