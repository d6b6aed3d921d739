"""Sampling: routes prompts, groups them by expert, denoises a group at once. Eq. 22, App. E.2.

    python sample.py "a giraffe"
    python sample.py "a giraffe" "a slice of pizza" --num-images 4
    python sample.py --prompts-file prompts.txt --compare   # teacher and expert side by side
    torchrun --nproc-per-node 8 -- sample.py --prompts-file prompts.txt  # shared out

From Python:

    from sample import APTPPipeline
    result = APTPPipeline.from_pretrained("runs/emoji-0.5")(["a giraffe"])
    result.images[0].save("giraffe.png")

A prompt's image depends on the prompt and its seed, not on the other prompts, up to rounding.

25 steps of PNDM as in App. E.2; the guidance scale is the teacher's own (SD 2.1: 7.5, SDXL: 5).
"""

from __future__ import annotations

import copy
import math
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from numbers import Integral
from operator import index
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, ClassVar

import torch
import tyro
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from common.errors import UserError, command_line
from common.files import (
    check_writable,
    checksum,
    fingerprint,
    load_tensors,
    one_line,
    read_lines,
)
from common.hub import MAX_PROMPT_CHARACTERS
from common.options import read_options
from common.processes import leave_processes, pick_device, rank, start_processes, world_size
from common.ranges import Count, Finite, Number, Pixels, Precision, Seed, Weight, check
from common.threads import side_by_side, slots
from evaluation.generated import save_png
from evaluation.grids import DPI, image_grid, label, save_figure
from gates import ArchSpace
from macs import CostModel, measure_macs
from prune_unet import cut_expert, find_units, load_expert
from router import PromptEncoder, PromptRouter
from run import (
    check_expert,
    expert_path,
    load_codes,
    load_router,
    load_run_teacher,
    load_shared,
    named_by,
    newest_run,
    read_run,
    shared_path,
)
from teacher.model import Teacher

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
    """A teacher, a router, and the experts of one run, made when they are asked for."""

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
        self.lock = Lock()  # threads that need the same expert read it once
        self.added: list[UNet2DConditionModel] = []  # what LoRAs add to the teacher's weights

    @classmethod
    def from_pretrained(
        cls,
        run: str | Path,
        device: str = "auto",
        *,
        precision: str | None = None,
        resolution: int | None = None,
        teacher: str | None = None,
        prompt_encoder: str | None = None,
    ) -> APTPPipeline:
        """Load a run folder.

        Args:
            precision: of all weights: fp32, bf16 or fp16; that of `usual_precision` if absent.
            teacher, prompt_encoder: where the run's are now, if they were moved.

        Raises:
            UserError: it is incomplete, from another teacher, or what it names is not there.
        """
        run, where = Path(run), pick_device(device)
        (summary,) = read_run(run, "summary.json")
        options = {
            "precision": precision or usual_precision(where),
            "resolution": resolution or summary["macs_resolution"],
        }
        loaded = load_run_teacher(run, teacher, where, **options)
        router, name = load_router(run, where)
        with named_by(run / "router.safetensors", "--prompt-encoder", prompt_encoder):
            encoder = PromptEncoder(prompt_encoder or name, where)
        ratios = [expert["macs_ratio"] for expert in summary["experts"]]
        pipeline = cls(run, loaded, router, encoder, ratios)
        _ = pipeline.codes  # refuses another teacher's run before any image is made
        return pipeline

    @cached_property
    def space(self) -> ArchSpace:
        return find_units(
            self.teacher.unet, load_tensors(self.run / "codes.safetensors")[1]["depth"]
        )

    @cached_property
    def codes(self) -> Tensor:
        """The experts' binary codes, (N, D)."""
        return load_codes(self.run, self.space)

    @cached_property
    def shared(self) -> UNet2DConditionModel | None:
        """The weights that the experts share, on the CPU."""
        return load_shared(self.run, self.teacher.unet, self.codes)

    def macs(self) -> CostModel:
        """T(a) at the pipeline's resolution."""
        sizes = {"latent_size": self.teacher.latent_size, "text_tokens": self.teacher.text_tokens}
        return measure_macs(self.teacher.unet, self.space, **sizes)

    def is_finetuned(self, expert: int) -> bool:
        """Whether it is more than what the cut left of the teacher."""
        return expert_path(self.run, expert).exists() or shared_path(self.run).exists()

    def unet(self, expert: int) -> UNet2DConditionModel:
        """An expert's U-Net: its own file, else cut out of the shared weights, else the teacher.

        -1 is the teacher. What is read from a file stays in memory; what is cut out of weights that
        are there anyway does not, since cutting is quick.
        """
        with self.lock:
            if expert in self.experts:
                return self.experts[expert]
            unet = self.made(expert)
            if expert < 0 or expert_path(self.run, expert).exists():
                self.experts[expert] = unet
            return unet

    def made(self, expert: int) -> UNet2DConditionModel:
        """As `unet`, made anew, with the LoRAs that were loaded."""
        teacher, path = self.teacher.unet, expert_path(self.run, expert)
        if expert < 0:
            unet = copy.deepcopy(teacher) if self.added else teacher
        elif path.exists():
            unet, header = load_expert(path, "cpu", teacher)
            check_expert(path, header, self.codes[expert])
        else:
            unet = cut_expert(self.shared or teacher, self.codes[expert], self.space)
        unet = unet.to(self.teacher.device, self.teacher.dtype)
        for lora in self.added:
            own = lora if expert < 0 else cut_expert(lora, self.codes[expert], self.space)
            add_weights(unet, own)
        return unet

    def load_lora_weights(self, file: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA of the teacher to the teacher and to all experts.

        diffusers merges it into weights of zero; what that gives is cut as the teacher is, and
        added. A LoRA stays until the pipeline is loaded anew.

        Raises:
            UserError: the file is no LoRA, or one of another model.
        """
        added, pipe = copy.deepcopy(self.teacher.unet), copy.copy(self.teacher.pipe)
        for parameter in added.parameters():
            parameter.zero_()
        pipe.unet, layers = added, {name for name, _ in added.named_modules()}
        file = Path(file)
        place = {"weight_name": file.name, "use_safetensors": True}
        try:
            state = pipe.lora_state_dict(str(file.parent), unet_config=added.config, **place)[0]
            found = (key.partition(".lora") for key in state)
            paths = {path.removeprefix("unet.") for path, lora, _ in found if lora}
            if not paths:
                raise ValueError("it holds no lora_A and lora_B")
            if other := {path for path in paths - layers if not path.startswith("text_encoder")}:
                raise ValueError(f"its layer {min(other)} is not in this teacher")
            pipe.load_lora_weights(str(file.parent), **place)
            pipe.fuse_lora(lora_scale=weight)  # a text encoder's too, which is the teacher's own
            pipe.unload_lora_weights()
        except Exception as error:  # the libraries raise all kinds over another model's file
            why = " ".join(str(error).split())[:120]
            raise UserError(
                f"--lora {file} does not fit ({why}); give a LoRA of the teacher, as safetensors"
            ) from None
        self.added.append(added)
        self.experts = {}

    def fingerprint(self, expert: int | None) -> list[str]:
        """Checksums of all that an image of a prompt depends on, beside what it is asked with.

        Args:
            expert: -1 for the teacher, None for the router's choice.
        """
        files = []
        if expert != -1:
            files = [self.run / "router.safetensors", self.run / "codes.safetensors"]
            files += [expert_path(self.run, i) for i in range(len(self.ratios))]
            files += [shared_path(self.run)]
        teacher = self.teacher
        how = {k: v for k, v in teacher.pipe.scheduler.config.items() if not k.startswith("_")}
        how |= {"resolution": teacher.resolution, "guidance": teacher.guidance_scale}
        return [
            fingerprint({}, how),
            *(fingerprint(part.state_dict(), {}) for part in teacher.parts.values()),
            *(checksum(path) or "absent" for path in files),
        ]

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt (Eq. 22)."""
        return self.router.route(prompts, self.encoder).tolist()

    def experts_of(self, prompts: Sequence[str], expert: int | Sequence[int] | None) -> list[int]:
        """The expert of each prompt. Raises `UserError`, and ValueError; see `__call__`."""
        if expert is None:
            return self.route(prompts)
        P, N = len(prompts), len(self.ratios)
        experts = one_each("experts", [expert] * P if isinstance(expert, Integral) else expert, P)
        if unknown := set(experts) - {*range(-1, N)}:
            raise UserError(f"--expert {unknown.pop()} is not in {self.run}; choose 0 to {N - 1}")
        return experts

    def parts(self, experts: Sequence[int], batch_size: int) -> list[tuple[int, list[int]]]:
        """Experts, and the rows that each denoises at once; the longest first, to end together."""
        at_once = -(-min(batch_size, len(experts)) // slots(self.teacher.device))
        parts: list[tuple[int, list[int]]] = []
        for chosen in sorted(set(experts)):
            group = [row for row, value in enumerate(experts) if value == chosen]
            parts += [(chosen, group[k : k + at_once]) for k in range(0, len(group), at_once)]
        return sorted(parts, key=lambda part: -len(part[1]))

    def sources(
        self,
        P: int,
        seeds: int | Sequence[int] | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> list[Any]:
        """What makes each prompt's noise. Raises ValueError."""
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator exclude each other; give one of them")
        if not isinstance(generator, torch.Generator):
            if generator is not None:
                return one_each("generators", generator, P)
            return one_each("seeds", range(P) if seeds is None else seeds, P)
        # a state for each image, so that it does not matter which are denoised together
        size, states = self.teacher.latent_size, []
        shape = (1, self.teacher.unet.config.in_channels, size, size)
        for _ in range(P):
            states.append(generator.clone_state())
            torch.randn(
                shape, generator=generator, device=generator.device, dtype=self.teacher.dtype
            )
        return states

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        expert: int | Sequence[int] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        on_image: Callable[[int, Image.Image], None] | None = None,
        negative: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Sampled:
        """Generate one image for each prompt.

        Args:
            prompts: one, or P prompts, none empty.
            seeds: one for each prompt; 0, 1, 2, ... if absent.
            generator: instead of seeds, one for each prompt, or one that makes the noise of all,
                as diffusers' pipelines have it.
            expert: one for all prompts, or one for each; -1 is the unpruned teacher; with None the
                router chooses.
            num_inference_steps: of PNDM; the paper's value is 25.
            guidance_scale: of classifier-free guidance; the teacher's own if absent.
            batch_size: the largest number of images denoised at once, by all threads together.
            on_image: called with each prompt's number and its image as soon as that is there, in
                one of the threads.
            negative: what no image should show.
            size: height and width in pixels; the teacher's own if absent.

        Raises:
            UserError: a prompt is empty or too long, or the expert does not exist.
            ValueError: there are no prompts, or seeds, generators or experts of another number.
        """
        prompts = checked_prompts(prompts)
        sources = self.sources(len(prompts), seeds, generator)
        experts = self.experts_of(prompts, expert)

        def generate(part: tuple[int, list[int]]) -> list[Image.Image]:
            unet, rows = self.unet(part[0]), part[1]
            own = [prompts[row] for row in rows], [sources[row] for row in rows]
            how: dict[str, Any] = {"negative": negative, "size": size}
            made = self.teacher.generate(*own, num_inference_steps, guidance_scale, unet, **how)
            for row, image in zip(rows, made, strict=True):
                if on_image is not None:
                    on_image(row, image)
            return made

        clock, parts = time.time(), self.parts(experts, batch_size)
        made = side_by_side(generate, parts, self.teacher.device)
        rows = [row for _, part in parts for row in part]
        images = dict(zip(rows, chain.from_iterable(made), strict=True))
        return Sampled(
            [images[row] for row in range(len(prompts))],
            prompts,
            experts,
            [1.0 if i < 0 else self.ratios[i] for i in experts],
            (time.time() - clock) / len(prompts),
        )


def usual_precision(device: torch.device) -> str:
    """bf16 on a GPU that computes in it, else fp32.

    There bf16 is several times as fast, in half of the memory. fp16 is no faster, and its range is
    too small for some teachers: SDXL's autoencoder overflows, as do attentions of SD 2.1.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def one_each(what: str, given: Any, P: int) -> list[Any]:
    """Whole numbers, also NumPy's, or generators: one for each prompt. Raises ValueError."""
    values = [given] if isinstance(given, Integral) else given
    found = [value if isinstance(value, torch.Generator) else index(value) for value in values]
    if len(found) != P:
        raise ValueError(f"{len(found)} {what} for {P} prompts; give one for each prompt")
    return found


def add_weights(unet: UNet2DConditionModel, other: UNet2DConditionModel) -> None:
    """Add another U-Net's weights to those of a U-Net of the same shape, in place."""
    for own, more in zip(unet.parameters(), other.parameters(), strict=True):
        own.data += more.to(own)


def checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list. Raises ValueError, or `UserError`; see `check_prompt`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; give a prompt, or a list of them")
    for prompt in prompts:
        check_prompt(prompt)
    return prompts


def check_prompt(prompt: str) -> None:
    """Raises `UserError` for a prompt that is empty or too long."""
    if not prompt.strip():
        raise UserError('a prompt is empty; write what to generate, such as "a giraffe"')
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"a prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
        )


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file, one a line. Raises `UserError` where there are none."""
    prompts = [prompt for line in read_lines(path) if (prompt := one_line(line))]
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
    negative: str | None = None
    """What no image should show."""
    num_images: Count = 1
    """Images a prompt."""
    seed: Seed = 0
    """Seed of each prompt's first image; the next ones count up."""
    out: Path | None = None
    """Folder for the PNG files; <run>/samples if not given."""
    run: Path | None = None
    """Run folder; the newest run if not given."""
    teacher: str | None = None
    """Where the run's teacher is now, if it was moved."""
    prompt_encoder: str | None = None
    """Where the run's prompt encoder is now, if it was moved."""
    expert: Number | None = None
    """Use this expert, whatever the router says."""
    teacher_only: bool = False
    """Use the unpruned model."""
    lora: tuple[Path, ...] = ()
    """LoRAs of the teacher."""
    lora_weights: tuple[Finite, ...] = ()
    """A weight for each of them; 1 if not given."""
    compare: bool = False
    """Also use the unpruned model and a wrong expert; <out>/comparison.png."""
    steps: Count = 25
    """Denoising steps (paper: 25)."""
    guidance: Weight | None = None
    """Classifier-free guidance; the teacher's own (paper: 7.5)."""
    resolution: Pixels | None = None
    """Pixels a side; the teacher's own if not given (paper: 768)."""
    width: Pixels | None = None
    """Pixels; as --resolution if not given."""
    height: Pixels | None = None
    """Pixels; as --resolution if not given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision | None = None
    """Of all weights; bf16 on a GPU that has it, else fp32."""


def size_of(cfg: Config, teacher: Teacher) -> tuple[int, int]:
    """Height and width. Raises `UserError` where the autoencoder cannot make them."""
    step = math.lcm(8, int(teacher.pipe.vae_scale_factor))
    for name, value in (("height", cfg.height), ("width", cfg.width)):
        if value is not None and value % step:
            near = max(step, value // step * step)
            raise UserError(f"--{name} {value} is not a multiple of {step}; give {near}")
    return cfg.height or teacher.resolution, cfg.width or teacher.resolution


def file_stem(prompt: str) -> str:
    """`A giraffe!` -> `a-giraffe`: letters, digits and their marks of any script, 60 at most."""
    kept = [c if unicodedata.category(c)[0] in "LMN" else " " for c in prompt.lower()]
    stem = unicodedata.normalize("NFC", "-".join("".join(kept).split()))[:60]
    # of 255 bytes that a name may have, with room for the numbers and the temporary name
    return stem.encode()[:180].decode(errors="ignore").strip("-") or "prompt"


def file_names(rows: Sequence[tuple[str, int]]) -> list[str]:
    """Names for prompts and seeds: `a giraffe`, 0 -> `a-giraffe-0.png`.

    Each prompt of `rows` has names of its own, also where a file system takes upper and lower case,
    or two spellings of a letter, for the same: a number tells prompts apart that would share one.
    """
    stems: dict[str, str] = {}  # of each prompt
    taken: set[str] = set()
    for prompt in dict.fromkeys(prompt for prompt, _ in rows):
        stem, number = file_stem(prompt), 1
        while (key := folded(stem)) in taken:
            number += 1
            stem = f"{file_stem(prompt)}-{number}"
        taken.add(key)
        stems[prompt] = stem
    return [f"{stems[prompt]}-{seed}.png" for prompt, seed in rows]


def folded(name: str) -> str:
    """The same text for names that some file system takes for the same."""
    return unicodedata.normalize("NFKC", name.upper().casefold())


def asked_for(cfg: Config) -> list[str]:
    """The prompts. Raises `UserError` for options that cannot be, or do not go together."""
    check(cfg)
    prompts = [*cfg.prompts, *(read_prompts(cfg.prompts_file) if cfg.prompts_file else [])]
    if not prompts:
        raise UserError('no prompt was given; try: python sample.py "a giraffe"')
    for prompt in prompts:
        check_prompt(prompt)
    if cfg.expert is not None and cfg.teacher_only:
        raise UserError("--expert and --teacher-only exclude each other; give one of them")
    if cfg.lora_weights and len(cfg.lora_weights) != len(cfg.lora):
        raise UserError(
            f"--lora-weights has {len(cfg.lora_weights)} weights for {len(cfg.lora)} files of "
            f"--lora; give one for each"
        )
    if cfg.compare and world_size() > 1:
        raise UserError("--compare shows all images on one sheet; use it in one process")
    return prompts


def sample(cfg: Config) -> Sampled:
    """Generate what `cfg` asks for, write the files, and print a line for each.

    Of several processes, each takes every `world_size`th image; none waits for another.
    Raises `UserError` for what the user can mend.
    """
    prompts, run = asked_for(cfg), cfg.run or newest_run()
    check_writable(out := cfg.out or run / "samples")
    device = start_processes(pick_device(cfg.device))
    leave_processes()  # nothing is shared
    pipeline = APTPPipeline.from_pretrained(
        run,
        str(device),
        precision=cfg.precision,
        resolution=cfg.resolution,
        teacher=cfg.teacher,
        prompt_encoder=cfg.prompt_encoder,
    )
    for file, weight in zip(cfg.lora, cfg.lora_weights or [1.0] * len(cfg.lora), strict=True):
        pipeline.load_lora_weights(file, weight)
    rows = [(prompt, cfg.seed + k) for prompt in prompts for k in range(cfg.num_images)]
    own = slice(rank(), None, world_size())
    paths, rows = [out / name for name in file_names(rows)][own], rows[own]
    if not rows:
        return Sampled([], [], [], [], 0.0)
    names, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
    options: dict[str, Any] = {
        "seeds": seeds,
        "num_inference_steps": cfg.steps,
        "guidance_scale": cfg.guidance,
        "negative": cfg.negative,
        "size": size_of(cfg, pipeline.teacher),
    }
    sampled = pipeline(
        names,
        expert=-1 if cfg.teacher_only else cfg.expert,
        on_image=lambda row, image: save_png(image, paths[row]),  # so that Ctrl-C keeps it
        **options,
    )
    for path, expert, ratio in zip(paths, sampled.experts, sampled.macs_ratios, strict=True):
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
