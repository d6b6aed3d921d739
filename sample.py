"""Drawing: routes prompts, groups them by expert, denoises each group at once. Eq. 22, App. E.2.

    python sample.py "a giraffe"
    python sample.py "a giraffe" "a slice of pizza" --num-images 4
    python sample.py --prompts-file prompts.txt --compare   # teacher and expert side by side

From Python:

    from sample import APTPPipeline
    result = APTPPipeline.from_pretrained("runs/emoji-0.78")(["a giraffe"])
    result.images[0].save("giraffe.png")

The picture of a prompt depends on the prompt and its seed, not on what else is in the batch (up to
rounding).

Departures from the paper: none. 25 steps of PNDM as in App. E.2; the guidance scale is the
teacher's own (SD 2.1: 7.5).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw

from common.errors import UserError, command_line
from common.files import load_tensors, read_json, replacing
from common.processes import pick_device
from common.runs import newest_run
from finetune import expert_path, load_codes
from gates import ArchSpace
from prune_unet import cut_expert, load_expert
from router import MAX_PROMPT_CHARACTERS, PromptEncoder, PromptRouter
from teacher.model import Teacher, load_teacher


@dataclass(frozen=True)
class Sampled:
    """What the pipeline drew.

    For each image its prompt, expert (-1: the teacher), MACs ratio and seconds.
    """

    images: list[Image.Image]
    prompts: list[str]
    experts: list[int]
    macs_ratios: list[float]
    seconds: list[float]


class APTPPipeline:
    """A teacher, a router, and the experts of one run, loaded when first asked for."""

    def __init__(
        self,
        run: Path,
        teacher: Teacher,
        router: PromptRouter | None,
        encoder: PromptEncoder | None,
        ratios: list[float],
    ) -> None:
        """Without router and encoder, every call has to say which expert is to draw."""
        self.run, self.teacher, self.router, self.encoder, self.ratios = (
            run,
            teacher,
            router,
            encoder,
            ratios,
        )
        self.experts: dict[int, UNet2DConditionModel] = {-1: teacher.unet}

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path,
        device: str = "auto",
        *,
        precision: str = "fp32",
        resolution: int | None = None,
    ) -> APTPPipeline:
        """Load a run folder. Raises `UserError` where it is incomplete or from another teacher."""
        run, where = Path(run), pick_device(device)
        if not run.is_dir():
            raise UserError(f"--run {run} does not exist; `python train.py` makes one")
        summary = read_json(run / "summary.json")
        teacher = load_teacher(
            summary["teacher"], where, precision=precision, resolution=resolution
        )
        tensors, settings = load_tensors(run / "router.safetensors")
        encoder = PromptEncoder(settings.pop("prompt_encoder"), where)
        router = PromptRouter(**settings)
        router.load_state_dict(tensors)
        pipeline = cls(
            run,
            teacher,
            router.to(where).eval(),
            encoder,
            [expert["macs_ratio"] for expert in summary["experts"]],
        )
        load_codes(run, pipeline.space)  # refuses another teacher's run before anything is drawn
        return pipeline

    @property
    def space(self) -> ArchSpace:
        return ArchSpace.from_unet(
            self.teacher.unet, load_tensors(self.run / "codes.safetensors")[1]["depth"]
        )

    def is_finetuned(self, expert: int) -> bool:
        return expert_path(self.run, expert).exists()

    def unet(self, expert: int) -> UNet2DConditionModel:
        """An expert's U-Net.

        The fine-tuned one, or, before fine-tuning, the one cut out of the teacher. -1 is the
        teacher.
        """
        if expert not in self.experts:
            if self.is_finetuned(expert):
                path = expert_path(self.run, expert)
                unet, _ = load_expert(path, self.teacher.device)
                self.experts[expert] = unet.to(self.teacher.dtype)
            else:
                self.experts[expert] = cut_expert(
                    self.teacher.unet, load_codes(self.run, self.space)[expert], self.space
                )
        return self.experts[expert]

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt (Eq. 22)."""
        assert self.router and self.encoder
        return self.router.route(prompts, self.encoder).tolist()

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        expert: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        batch_size: int = 64,
    ) -> Sampled:
        """Draw one image a prompt.

        Args:
            prompts: P prompts, none empty.
            seeds: one for each prompt; 0, 1, 2, ... if absent.
            expert: force one expert; -1 is the unpruned teacher; None asks the router.
            num_inference_steps: of PNDM; the paper's value is 25.
            guidance_scale: of classifier-free guidance; the teacher's own if absent.
            batch_size: most images denoised at once.

        Raises:
            UserError: a prompt is empty or too long, or the expert does not exist.
        """
        for prompt in prompts:
            check_prompt(prompt)
        if expert is not None and not -1 <= expert < len(self.ratios):
            raise UserError(
                f"--expert {expert} is not in {self.run}; choose one of 0 to {len(self.ratios) - 1}"
            )
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        assert len(seeds) == len(prompts)
        experts = self.route(prompts) if expert is None else [expert] * len(prompts)
        images: dict[int, Image.Image] = {}
        seconds: dict[int, float] = {}
        for chosen in sorted(set(experts)):
            group = [row for row, value in enumerate(experts) if value == chosen]
            for start in range(0, len(group), batch_size):
                rows = group[start : start + batch_size]
                self.teacher.pipe.unet = self.unet(chosen)
                clock = time.time()
                try:
                    drawn = self.teacher.pipe(
                        [prompts[row] for row in rows],
                        height=self.teacher.resolution,
                        width=self.teacher.resolution,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=self.teacher.guidance_scale
                        if guidance_scale is None
                        else guidance_scale,
                        generator=[torch.Generator().manual_seed(seeds[row]) for row in rows],
                    ).images
                finally:
                    self.teacher.pipe.unet = self.experts[-1]
                images |= dict(zip(rows, drawn, strict=True))
                seconds |= dict.fromkeys(rows, (time.time() - clock) / len(rows))
        order = range(len(prompts))
        ratios = [1.0 if i < 0 else self.ratios[i] for i in experts]
        return Sampled(
            [images[row] for row in order],
            list(prompts),
            experts,
            ratios,
            [seconds[row] for row in order],
        )


def check_prompt(prompt: str) -> None:
    """Raises `UserError` for a prompt that cannot be drawn."""
    if not prompt.strip():
        raise UserError('a prompt is empty; write what to draw, such as "a giraffe"')
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"a prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
        )


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 file. Raises `UserError` where there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts-file {path} could not be read ({error}); give a UTF-8 text file with a "
            f"prompt a line"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompt; write one a line")
    return prompts


def comparison(left: Sampled, right: Sampled, zoom: int = 2) -> Image.Image:
    """One picture: a row a prompt, with the prompt, the teacher's drawing and the expert's."""
    size = left.images[0].width * zoom
    text, head = 260, 24
    canvas = Image.new(
        "RGB", (text + 2 * (size + 8), head + len(left.images) * (size + 8)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(("teacher", "routed expert")):
        draw.text((text + column * (size + 8), 6), title, fill="black")
    for row, prompt in enumerate(left.prompts):
        top = head + row * (size + 8)
        draw.text((6, top + size // 2 - 14), prompt[:42], fill="black")
        draw.text(
            (6, top + size // 2 + 2),
            f"expert {right.experts[row]}, {right.macs_ratios[row]:.2f} of the MACs",
            fill="gray",
        )
        for column, image in enumerate((left.images[row], right.images[row])):
            canvas.paste(
                image.resize((size, size), Image.Resampling.LANCZOS),
                (text + column * (size + 8), top),
            )
    return canvas


@dataclass(frozen=True)
class Config:
    """Drawing with a pruned model."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to draw."""
    prompts_file: Path | None = None
    """A file of prompts, one a line."""
    run: Path | None = None
    """Run folder; the newest run if not given."""
    out: Path | None = None
    """Folder for the PNG files; <run>/samples if not given."""
    num_images: int = 1
    """Images a prompt."""
    seed: int = 0
    """Seed of the first image of each prompt; the next ones count up."""
    steps: int = 25
    """Denoising steps (paper: 25)."""
    guidance: float | None = None
    """Classifier-free guidance; the teacher's own if not given (paper: 7.5)."""
    expert: int | None = None
    """Draw with this expert, whatever the router says."""
    teacher_only: bool = False
    """Draw with the unpruned model."""
    compare: bool = False
    """Also draw with the unpruned model, and write both side by side to <out>/comparison.png."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    resolution: int | None = None
    """Pixels a side; the teacher's own if not given (paper: 768)."""


def file_name(prompt: str, seed: int) -> str:
    """`a giraffe`, 0 -> `a-giraffe-0.png`."""
    return f"{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60] or 'prompt'}-{seed}.png"


def save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def sample(cfg: Config) -> Sampled:
    """Draw what `cfg` asks for, write the files and print a line for each.

    Raises `UserError` for what the user can mend.
    """
    prompts = [*cfg.prompts, *(read_prompts(cfg.prompts_file) if cfg.prompts_file else [])]
    if not prompts:
        raise UserError('no prompt was given; try: python sample.py "a giraffe"')
    for prompt in prompts:
        check_prompt(prompt)
    for name, value in (("num-images", cfg.num_images), ("steps", cfg.steps)):
        if value < 1:
            raise UserError(f"--{name} {value} is too small; choose 1 or more")
    if cfg.expert is not None and cfg.teacher_only:
        raise UserError("--expert and --teacher-only exclude each other; give one of them")
    if cfg.expert is not None and cfg.expert < 0:
        raise UserError(f"--expert {cfg.expert} does not exist; experts are numbered from 0")
    run = cfg.run or newest_run()
    pipeline = APTPPipeline.from_pretrained(
        run, cfg.device, precision=cfg.precision, resolution=cfg.resolution
    )
    rows = [(prompt, cfg.seed + k) for prompt in prompts for k in range(cfg.num_images)]
    names, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
    options: dict[str, Any] = {
        "seeds": seeds,
        "num_inference_steps": cfg.steps,
        "guidance_scale": cfg.guidance,
    }
    drawn = pipeline(names, expert=-1 if cfg.teacher_only else cfg.expert, **options)
    out = cfg.out or run / "samples"
    for (prompt, seed), image, expert, ratio, seconds in zip(
        rows, drawn.images, drawn.experts, drawn.macs_ratios, drawn.seconds, strict=True
    ):
        path = out / file_name(prompt, seed)
        save_png(image, path)
        who = (
            "teacher"
            if expert < 0
            else f"expert {expert}" + ("" if pipeline.is_finetuned(expert) else " (not fine-tuned)")
        )
        print(f"{path}  {who}  MACs ratio {ratio:.3f}  {seconds:.2f} s")
    if cfg.compare:
        save_png(comparison(pipeline(names, expert=-1, **options), drawn), out / "comparison.png")
        print(out / "comparison.png")
    return drawn


def main() -> None:
    sample(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    command_line(main)
