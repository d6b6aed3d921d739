"""What the pocket teacher can do: the figures and pictures of its model card.

    python -m teacher.pocket.model_card   # writes assets/pocket/metrics.json and the grids

Captions of both splits are drawn as `evaluate.py` draws them and scored in the same features. The
guidance scale is the one of a few at which most training captions, others than those scored, find
their own picture again (of equals the strongest); the teacher carries it as its default. Beside
each distance stand two yardsticks: real validation pictures against real training pictures, and
what the autoencoder makes of the real ones. A third says what knowing a concept but not the style
is worth on validation captions: its real drawing in the other style, scored as if it had been
drawn. Prompts that say in free words what to draw are scored by hand-made lists of the emoji that
would do, beside the drawings of the other prompts by the same lists. Killed, the same command draws
what is missing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import evaluate
from common.errors import UserError, command_line
from common.files import read_json, replacing, write_json
from common.processes import pick_device
from common.runs import RUNS
from evaluation import metrics
from evaluation.features import extract
from evaluation.generated import Drawn, draw
from evaluation.scores import Embedded, Reconstructed, Subset
from sample import APTPPipeline
from targets.emoji import STYLES, Emoji, emoji_pixels, list_emoji, split_drawings
from targets.images import CaptionedImages, load_target, spread
from teacher.model import Teacher, load_teacher
from teacher.pocket.autoencoder import reconstruction_psnr
from teacher.shapes import ASSETS

# what to draw, and names, or parts of names, of what would do; no prompt holds any of its own
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


NEAREST = (1, 5, 35)  # real pictures; the last is a hundredth of the training drawings


@dataclass(frozen=True)
class Config:
    """Scoring the pocket teacher."""

    train_images: int = 500
    """Training captions drawn."""
    validation_images: int | None = None
    """Validation captions drawn; all 308 if not given."""
    guidances: tuple[float, ...] = (1.5, 2.0, 3.0, 4.5, 6.5)
    """Guidance scales to choose from."""
    trial_images: int = 120
    """Training captions drawn at each of them."""
    steps: int = 25
    """Denoising steps."""
    seed: int = 0
    """Seed of the drawings."""
    batch_size: int = 50
    """Pictures drawn at once."""
    assets: Path = ASSETS / "pocket"
    """Folder of the teacher, which metrics.json and the grids are written to."""
    out: Path = RUNS / "teacher-card"
    """Folder of the drawings."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


class Scoring:
    """A teacher whose drawings are kept and scored."""

    def __init__(self, cfg: Config, teacher: Teacher) -> None:
        self.cfg, self.teacher = cfg, teacher
        self.pipeline = APTPPipeline(cfg.out, teacher, None, None, [])
        self.suite = Embedded(teacher.device)
        self.settings = evaluate.Config(steps=cfg.steps, seed=cfg.seed, batch_size=cfg.batch_size)
        evaluate.check(self.settings)

    def draw(self, captions: Sequence[str], what: str, rows: list[int], guidance: float) -> Drawn:
        """The teacher's drawings of some captions, from the folder or into it."""
        settings = replace(self.settings, guidance=guidance)
        return draw(self.pipeline, captions, what, rows, settings, -1)

    def by_guidance(self, train: CaptionedImages, rows: list[int]) -> dict[str, float]:
        """R-precision@1 of the captions of `rows` at every scale in question, by scale."""
        found = {}
        for guidance in self.cfg.guidances:
            drawn = self.draw(train.captions, "train", rows, guidance)
            found[f"{guidance:g}"] = self.suite(drawn, Subset(train, rows))["r1"]
        return found


def best_guidance(r1: dict[str, float]) -> float:
    """The scale of the greatest R-precision@1, of equals the strongest."""
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

    Pixels, (rows, 3, 64, 64) uint8: what a teacher would draw that knows a concept but no style.
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
    """Do drawings of prompts land on what would do, and how often do those of other prompts?

    Args:
        cosine: of each prompt's drawing and each real picture, (P, m).
        good: whether a real picture would do for a prompt, (P, m), bool; prompts for which none
            does, or all do, are left out.

    Returns:
        For each k the share of prompts for which one of the nearest k real pictures would do, and
        the mean area under the curve that tells those that would do from the others by cosine, 0.5
        if it cannot. Under `_exchanged` the same of the drawings of all other prompts: what would
        come out if drawings did not depend on what a prompt says.
    """
    from sklearn.metrics import roc_auc_score

    asked = good.any(1) & ~good.all(1)
    cosine, good = cosine[asked], good[asked]
    order = cosine.argsort(1, descending=True)  # (P, m)
    tables = {f"free_{k}": good[:, order[:, :k]].any(2).double() for k in ks}  # (lists, drawings)
    areas = [roc_auc_score(would, drawing) for would in good for drawing in cosine]
    own = torch.eye(len(good), dtype=torch.bool)
    tables["free_auc"] = torch.tensor(areas).double().view(own.shape)
    found: dict[str, float] = {}
    for name, table in tables.items():
        for suffix, part in (("", table[own]), ("_exchanged", table[~own])):
            found |= {name + suffix: part.mean().item()} if len(part) else {}
    return found


def free_language(
    scoring: Scoring, train: CaptionedImages, guidance: float
) -> tuple[dict[str, float], Drawn, list[int]]:
    """Drawings of prompts in free words: where they land, the drawings, the nearest rows."""
    prompts = list(FREE_PROMPTS)
    drawn = scoring.draw(prompts, "free", list(range(len(prompts))), guidance)
    features = metrics.unit(extract(scoring.suite.extractor, drawn))  # (prompts, d)
    cosine = features @ metrics.unit(scoring.suite.gallery(train)).T  # (prompts, rows)
    everything = split_drawings("train")
    drawings = [everything[number] for number in train.pictures]
    good = torch.tensor([would_do(names, drawings) for names in FREE_PROMPTS.values()])
    return landing(cosine, good), drawn, cosine.argmax(1).tolist()


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to a picture."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def grid(
    path: Path, titles: Sequence[str], rows: Sequence[Sequence[Image.Image]], columns: int = 8
) -> None:
    """Pictures under their titles; where a title has several, side by side."""
    lines = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(2 * columns, 1.55 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, title, pictures in zip(axes, titles, rows, strict=False):
        width, height = pictures[0].size
        canvas = Image.new("RGB", ((width + 4) * len(pictures) - 4, height), "white")
        for i, picture in enumerate(pictures):
            canvas.paste(picture, (i * (width + 4), 0))
        axis.imshow(canvas, interpolation="nearest")
        axis.set_title(textwrap.fill(title, 28), fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def measure(cfg: Config) -> dict[str, Any]:
    """Draw, score, and write metrics.json and the grids. Raises `UserError` for bad settings."""
    for name, value in (
        ("train-images", cfg.train_images),
        ("validation-images", cfg.validation_images),
        ("trial-images", cfg.trial_images),
    ):
        if value is not None and value < 2:
            raise UserError(f"--{name} {value} is too small; choose 2 or more")
    if not cfg.guidances:
        raise UserError("--guidances is empty; give at least one scale, such as 3")
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
        drawn, real = scoring.draw(data.captions, split, rows, guidance), Subset(data, rows)
        scores = scoring.suite(drawn, real)
        ceiling = scoring.suite(Reconstructed(teacher, real), real)
        found |= {f"{name}_{short}": value for name, value in scores.items()}
        found |= {f"{name}_{short}_autoencoder": value for name, value in ceiling.items()}
        found[f"images_{short}"] = len(rows)
        shown = [rows[i] for i in spread(len(rows), 32)]
        rebuilt = Reconstructed(teacher, Subset(data, shown)).images(range(len(shown)))
        pictures = [
            [to_picture(image), to_picture(through), drawn.picture(row)]
            for row, image, through in zip(shown, data.images(shown), rebuilt, strict=True)
        ]
        grid(cfg.assets / f"grid_{short}.png", [data.captions[row] for row in shown], pictures)
    drawings = split_drawings("validation")
    concepts = [drawings[number] for number in validation.pictures[held_out]]
    copied = scoring.suite(other_style(concepts), Subset(validation, held_out))
    found |= {f"{name}_val_other_style": value for name, value in copied.items()}
    scores, drawn, nearest = free_language(scoring, train, guidance)
    found |= {"free_prompts": len(FREE_PROMPTS)} | scores
    beside = train.images(nearest)
    pictures = [[drawn.picture(i), to_picture(beside[i])] for i in range(len(nearest))]
    grid(cfg.assets / "grid_free.png", list(FREE_PROMPTS), pictures, columns=6)
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
    for name, value in rounded(measure(tyro.cli(Config, description=__doc__))).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    command_line(main)
