"""Sampling: routes prompts, groups them by expert, denoises a group at once. Eq. 22, App. E.2.

    python sample.py "a giraffe"
    python sample.py "a giraffe" "a slice of pizza" --num-images 4
    python sample.py --prompts-file prompts.txt --compare   # teacher and expert side by side

From Python:

    from sample import APTPPipeline
    result = APTPPipeline.from_pretrained("runs/emoji-0.64")(["a giraffe"])
    result.images[0].save("giraffe.png")

A prompt's image depends on the prompt and its seed, not on the other prompts, up to rounding.

25 steps of PNDM as in App. E.2; the guidance scale is the teacher's own (SD 2.1: 7.5, SDXL: 5).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError, command_line
from common.files import check_writable, checksum, fingerprint, load_tensors
from common.options import read_options
from common.processes import pick_device
from common.ranges import Count, Number, Pixels, Seed, Weight, check
from common.threads import side_by_side, slots
from evaluation.generated import save_png
from evaluation.grids import DPI, image_grid, label, save_figure
from gates import ArchSpace
from macs import CostModel, measure_macs
from prune_unet import cut_expert, find_units, load_expert
from router import MAX_PROMPT_CHARACTERS, PromptEncoder, PromptRouter
from run import expert_path, load_codes, load_router, newest_run, read_run
from settings import Precision
from teacher.model import Teacher, load_teacher

MOST_ROWS, MOST_PIXELS = 400, 60_000  # height of a comparison; matplotlib's limit is 2^16 pixels


@dataclass(frozen=True)
class Sampled:
    """Images, each one's prompt, expert (-1: the teacher) and MACs ratio, and the mean seconds."""

    images: list[Image.Image]
    prompts: list[str]
    experts: list[int]
    macs_ratios: list[float]
    seconds: float


class APTPPipeline:
    """A teacher, a router, and the experts of one run, loaded when first asked for."""

    def __init__(
        self,
        run: Path,
        teacher: Teacher,
        router: PromptRouter,
        encoder: PromptEncoder,
        ratios: list[float],
    ) -> None:
        self.run, self.teacher, self.ratios = run, teacher, ratios
        self.router, self.encoder = router, encoder
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
        (summary,) = read_run(run, "summary.json")
        teacher = load_teacher(
            summary["teacher"], where, precision=precision, resolution=resolution
        )
        router, encoder = load_router(run, where)
        pipeline = cls(
            run,
            teacher,
            router,
            PromptEncoder(encoder, where),
            [expert["macs_ratio"] for expert in summary["experts"]],
        )
        load_codes(run, pipeline.space)  # refuses another teacher's run before any image is made
        return pipeline

    @property
    def space(self) -> ArchSpace:
        return find_units(
            self.teacher.unet, load_tensors(self.run / "codes.safetensors")[1]["depth"]
        )

    def macs(self) -> CostModel:
        """T(a) at the pipeline's resolution."""
        sizes = {"latent_size": self.teacher.latent_size, "text_tokens": self.teacher.text_tokens}
        return measure_macs(self.teacher.unet, self.space, **sizes)

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

    def fingerprint(self, expert: int | None) -> list[str]:
        """Checksums of all that an image of a prompt depends on.

        Args:
            expert: -1 for the teacher, None for the router's choice.
        """
        files = []
        if expert != -1:
            files = [self.run / "router.safetensors", self.run / "codes.safetensors"]
            files += [expert_path(self.run, i) for i in range(len(self.ratios))]
        return [
            *(fingerprint(part.state_dict(), {}) for part in self.teacher.parts.values()),
            *(checksum(path) or "absent" for path in files),
        ]

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt (Eq. 22)."""
        return self.router.route(prompts, self.encoder).tolist()

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        expert: int | Sequence[int] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        batch_size: int = 64,
    ) -> Sampled:
        """Generate one image for each prompt.

        Args:
            prompts: P prompts, none empty.
            seeds: one for each prompt; 0, 1, 2, ... if absent.
            expert: one for all prompts, or one for each; -1 is the unpruned teacher; with None the
                router chooses.
            num_inference_steps: of PNDM; the paper's value is 25.
            guidance_scale: of classifier-free guidance; the teacher's own if absent.
            batch_size: the largest number of images denoised at once, by all threads together.

        Raises:
            UserError: a prompt is empty or too long, or the expert does not exist.
        """
        for prompt in prompts:
            check_prompt(prompt)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        given = [expert] * len(prompts) if isinstance(expert, int) else expert
        experts = self.route(prompts) if given is None else list(given)
        assert len(seeds) == len(experts) == len(prompts)
        if unknown := set(experts) - {*range(-1, N := len(self.ratios))}:
            raise UserError(f"--expert {unknown.pop()} is not in {self.run}; choose 0 to {N - 1}")
        at_once = -(-min(batch_size, len(prompts)) // slots(self.teacher.device))
        parts: list[tuple[UNet2DConditionModel, list[int]]] = []  # rows for one U-Net
        for chosen in sorted(set(experts)):
            group = [row for row, value in enumerate(experts) if value == chosen]
            unet = self.unet(chosen)
            parts += [(unet, group[k : k + at_once]) for k in range(0, len(group), at_once)]
        parts.sort(key=lambda part: -len(part[1]))  # the longest first, so that all end together

        def generate(part: tuple[UNet2DConditionModel, list[int]]) -> list[Image.Image]:
            own = [prompts[row] for row in part[1]], [seeds[row] for row in part[1]]
            return self.teacher.generate(*own, num_inference_steps, guidance_scale, part[0])

        clock = time.time()
        made = side_by_side(generate, parts, self.teacher.device)
        rows = [row for _, part in parts for row in part]
        images = dict(zip(rows, chain.from_iterable(made), strict=True))
        return Sampled(
            [images[row] for row in range(len(prompts))],
            list(prompts),
            experts,
            [1.0 if i < 0 else self.ratios[i] for i in experts],
            (time.time() - clock) / len(prompts),
        )


def check_prompt(prompt: str) -> None:
    """Raises `UserError` for a prompt that is empty or too long."""
    if not prompt.strip():
        raise UserError('a prompt is empty; write what to generate, such as "a giraffe"')
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


def comparison(routed: Sampled, others: dict[str, Sampled]) -> Figure:
    """One row for each prompt: the teacher's image, its expert's, the others'. 400 rows at most."""
    columns = {"teacher": others["teacher"], "routed expert": routed} | others
    rows = [
        (f"{label(prompt, 17, 4)}\nexpert {i}\n{ratio:.2f} of the MACs", [(images, "")])
        for prompt, i, ratio, *images in zip(
            routed.prompts,
            routed.experts,
            routed.macs_ratios,
            *(column.images for column in columns.values()),
            strict=True,
        )
    ][:MOST_ROWS]
    side = min(max(128, routed.images[0].width), MOST_PIXELS // len(rows))
    return image_grid(rows, tuple(columns), side / DPI)


@dataclass(frozen=True)
class Config:
    """Sampling from a pruned model."""

    HEADINGS: ClassVar = {"prompts": "what is sampled", "run": "by which model", "steps": "how"}
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What to generate."""
    prompts_file: Path | None = None
    """A file of prompts, one on each line."""
    num_images: Count = 1
    """Images a prompt."""
    seed: Seed = 0
    """Seed of each prompt's first image; the next ones count up."""
    out: Path | None = None
    """Folder for the PNG files; <run>/samples if not given."""
    run: Path | None = None
    """Run folder; the newest run if not given."""
    expert: Number | None = None
    """Use this expert, whatever the router says."""
    teacher_only: bool = False
    """Use the unpruned model."""
    compare: bool = False
    """Also use the unpruned model and a wrong expert; <out>/comparison.png."""
    steps: Count = 25
    """Denoising steps (paper: 25)."""
    guidance: Weight | None = None
    """Classifier-free guidance; the teacher's own (paper: 7.5)."""
    resolution: Pixels | None = None
    """Pixels a side; the teacher's own if not given (paper: 768)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """Of all weights."""


def file_name(prompt: str, seed: int) -> str:
    """`a giraffe`, 0 -> `a-giraffe-0.png`."""
    return f"{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60] or 'prompt'}-{seed}.png"


def sample(cfg: Config) -> Sampled:
    """Generate what `cfg` asks for, write the files, and print a line for each.

    Raises `UserError` for what the user can mend.
    """
    check(cfg)
    prompts = [*cfg.prompts, *(read_prompts(cfg.prompts_file) if cfg.prompts_file else [])]
    if not prompts:
        raise UserError('no prompt was given; try: python sample.py "a giraffe"')
    for prompt in prompts:
        check_prompt(prompt)
    if cfg.expert is not None and cfg.teacher_only:
        raise UserError("--expert and --teacher-only exclude each other; give one of them")
    run = cfg.run or newest_run()
    check_writable(out := cfg.out or run / "samples")
    where: dict[str, Any] = {"precision": cfg.precision, "resolution": cfg.resolution}
    pipeline = APTPPipeline.from_pretrained(run, cfg.device, **where)
    rows = [(prompt, cfg.seed + k) for prompt in prompts for k in range(cfg.num_images)]
    names, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
    options: dict[str, Any] = {
        "seeds": seeds,
        "num_inference_steps": cfg.steps,
        "guidance_scale": cfg.guidance,
    }
    sampled = pipeline(names, expert=-1 if cfg.teacher_only else cfg.expert, **options)
    for (prompt, seed), image, expert, ratio in zip(
        rows, sampled.images, sampled.experts, sampled.macs_ratios, strict=True
    ):
        path = out / file_name(prompt, seed)
        save_png(image, path)
        who = (
            "teacher"
            if expert < 0
            else f"expert {expert}" + ("" if pipeline.is_finetuned(expert) else " (not fine-tuned)")
        )
        print(f"{path}  {who}  MACs ratio {ratio:.3f}  {sampled.seconds:.2f} s")
    if cfg.compare:
        others, N = {"teacher": pipeline(names, expert=-1, **options)}, len(pipeline.ratios)
        if N > 1 and min(sampled.experts) >= 0:
            wrong = [(i + 1) % N for i in sampled.experts]
            others["wrong expert"] = pipeline(names, expert=wrong, **options)
        save_figure(comparison(sampled, others), out / "comparison.png")
        print(out / "comparison.png")
    return sampled


def main() -> None:
    sample(read_options(Config, __doc__))


if __name__ == "__main__":
    command_line(main)
