"""The teacher: the text-to-image pipeline that is pruned, and distilled from. Sec. 3.1.

A teacher is a Stable Diffusion pipeline of stock diffusers parts (`folders.py`, `pipelines.py`).
Everything else asks it for four things: conditions (`conditions.py`), latents, images, its U-Net.

The whole pipeline is in one precision, the autoencoder too: those of Stable Diffusion 1.x and 2.x
work in fp16, and latents that overflow are refused. SDXL's overflows, and stays fp32 where it says
so. Latents and targets stay fp32.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from common.ahead import to_device
from common.errors import UserError
from common.files import fingerprint
from common.hub import lasting_name
from common.ranges import check_choice
from teacher.conditions import TIME_IDS, Conditions
from teacher.folders import (
    FULL,
    HALF,
    SD,
    SDXL,
    TOKENIZERS,
    Pipeline,
    load_folder,
    stays_float32,
)
from teacher.pipelines import load_pocket, random_pipeline
from teacher.shapes import ASSETS, PIXELS, RANDOM, text_widths

TEXTS = threading.Lock()  # a tokenizer keeps its last call's padding: one call at a time
ENCODED = (  # what a pipeline's `encode_prompt` gives, the last two with SDXL
    *("prompt_embeds", "negative_prompt_embeds"),
    *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)
GUIDANCE = {SD: 7.5, SDXL: 5.0}  # App. E.2; diffusers' own for SDXL
NOISE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline.

    `guidance_scale` is the classifier-free guidance that suits it; `pixels` a side of its images,
    the U-Net's own size if absent; `own_pixels` the size that it was made for, if it says so.
    """

    name: str
    pipe: Pipeline
    guidance_scale: float
    pixels: int | None = None
    own_pixels: int | None = None

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipe.unet

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All that has weights."""
        return parts_of(self.pipe)

    @cached_property
    def identity(self) -> str:
        """A hash of the U-Net's weights as their files have them, and of the noise schedule.

        It is the same in each precision, and for the published files in float32 and in fp16. A
        random teacher has no files.
        """
        folder = Path(self.unet.config.get("_name_or_path") or "/dev/null")
        found = ([file for name in names for file in folder.glob(name)] for names in (FULL, HALF))
        config, hashes = self.pipe.scheduler.config, {}
        for file in next(filter(None, found), []):
            with safe_open(file, "pt") as weights:
                for name in list(weights.keys()):
                    hashes[name] = fingerprint({name: weights.get_tensor(name).half()}, {})
        return fingerprint({}, hashes | {name: config.get(name) for name in NOISE})

    @property
    def reads_sizes(self) -> bool:
        """Whether its U-Net is told pooled text and sizes too, as SDXL's."""
        return text_widths(self.unet.config)[1] > 0

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latent_size(self) -> int:
        return self.resolution // int(self.pipe.vae_scale_factor)

    @property
    def text_tokens(self) -> int:
        return int(self.pipe.tokenizer.model_max_length)

    def cut_off(self, captions: Sequence[str]) -> int:
        """How many captions have more tokens than the text encoder reads."""
        with TEXTS:
            read = self.pipe.tokenizer(list(captions), truncation=False, verbose=False)
        return sum(len(tokens) > self.text_tokens for tokens in read["input_ids"])

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.pixels or int(self.unet.config.sample_size * self.pipe.vae_scale_factor)

    @property
    def images_at_once(self) -> int:
        """Images that the autoencoder is given together: about a million pixels, 64 at most."""
        return max(1, min(64, 2**20 // self.resolution**2))

    def noise_schedule(self) -> DDPMScheduler:
        """The forward process q(x_t | x_0), with `add_noise` and `get_velocity`."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str], frames: Tensor | None = None) -> Conditions:
        """What images are conditioned on, by the path that sampling uses.

        Args:
            prompts: B prompts.
            frames: how each training image was cut out of its original, (B, 4), as of
                `CaptionedImages.frames`; whole images of the teacher's size, which is what
                sampling asks for, if absent. A U-Net that reads text states alone needs none.
        """
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        found = self.pipe.encode_prompt(prompt=list(prompts), device=self.device, **options)
        if not self.reads_sizes:
            return Conditions(found[0])
        time_ids = torch.full((len(prompts), TIME_IDS), float(self.resolution), device=self.device)
        time_ids[:, 2:4] = 0
        if frames is not None:
            time_ids[:, :4] = frames.to(time_ids)
        return Conditions(found[0], found[2], time_ids)

    def empty_conditions(self) -> Conditions:
        """Those of the empty caption, as guidance asks for it, of one image.

        They are zero in SDXL, where its pipeline says so.
        """
        empty = self.conditions([""])
        if self.reads_sizes and self.pipe.config.force_zeros_for_empty_prompt:
            assert empty.pooled is not None
            zeros = torch.zeros_like(empty.text), torch.zeros_like(empty.pooled)
            return Conditions(*zeros, empty.time_ids)
        return empty

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/8, W/8).

        The posterior's mean where no generator is given; float32.

        Raises:
            UserError: the autoencoder overflows in this precision.
        """
        encoded = self.pipe.vae.encode(images.to(self.device, self.pipe.vae.dtype))
        # an AutoencoderDC has no posterior: it gives its latents
        latents = retrieve_latents(encoded, generator, "argmax" if generator is None else "sample")
        if not torch.isfinite(latents).all():
            raise UserError(
                f"the autoencoder of --teacher {self.name} gives latents that are not finite in "
                f"{latents.dtype}; use --precision bf16 or fp32"
            )
        return latents.float() * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, 8h, 8w) in [-1, 1]."""
        images = self.pipe.vae.decode(
            latents.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
        ).sample
        return images.float().clamp(-1, 1)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int | torch.Generator],
        steps: int,
        guidance: float | None = None,
        unet: UNet2DConditionModel | None = None,
        negative: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Image.Image]:
        """One image for each of P prompts, as a batch. Threads may call it at the same time.

        Args:
            seeds: one for each prompt, or a generator; an image depends on its own alone.
            steps: of denoising.
            guidance: scale of classifier-free guidance; the teacher's own if absent.
            unet: an expert to use instead of the teacher's U-Net.
            negative: what the images should not show.
            size: height and width in pixels; the teacher's own if absent.

        Raises:
            UserError: its scheduler cannot take this number of steps.
        """
        check_steps(self.pipe.scheduler.config, steps)
        pipe = copy.copy(self.pipe)  # a scheduler keeps its last steps: each call needs its own
        pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        pipe.unet = self.pipe.unet if unet is None else unet
        scale = self.guidance_scale if guidance is None else guidance
        with TEXTS, torch.no_grad():
            encoded = pipe.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=scale > 1,
                negative_prompt=negative and [negative] * len(prompts),
            )
        height, width = size or (self.resolution, self.resolution)
        latents = pipe(
            **dict(zip(ENCODED, encoded, strict=False)),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=[
                seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
                for seed in seeds
            ],
            output_type="latent",
        ).images
        # not by the pipeline, which expects an autoencoder in the U-Net's precision
        parts = [self.decode_latents(part) for part in latents.split(self.images_at_once)]
        return self.pipe.image_processor.postprocess(torch.cat(parts), "pil")


def parts_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights, by name."""
    names = ("unet", "vae", *TOKENIZERS)
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def load_teacher(
    name: str,
    device: torch.device | str = "cpu",
    *,
    precision: str = "fp32",
    resolution: int | None = None,
    pocket: Path = ASSETS / "pocket",
) -> Teacher:
    """A teacher by name, frozen and in eval mode on `device`.

    Args:
        name: `pocket`, `sd21-random` and its like, a pipeline's folder, or its id on the hub.
        device: where its parts go.
        precision: of all its parts: fp32, bf16 or fp16.
        resolution: pixels a side; its own if absent.
        pocket: folder of the pocket teacher's files.

    Raises:
        UserError: there is no such teacher, it cannot be loaded, or not in this way.
    """
    check_choice("precision", precision, PRECISIONS)
    settings: dict[str, Any] = {}
    shape, dtype = name.removesuffix(RANDOM), PRECISIONS[precision]
    pipe: Pipeline
    if name == "pocket":
        pipe, settings = load_pocket(pocket)
    elif shape != name and (ASSETS / "unets" / f"{shape}.json").is_file():
        pipe = random_pipeline(shape, dtype)
    else:
        pipe, settings = load_folder(name, dtype)
        name = lasting_name(name)
    kind = type(pipe).__name__
    for key, part in parts_of(pipe).items():
        full = key == "vae" and stays_float32(kind, part.config)
        # diffusers' own `to` warns, whether there is a reason or not
        nn.Module.to(part, device, torch.float32 if full else dtype).requires_grad_(False).eval()
    usual, size = settings.get("resolution"), pipe.unet.config.sample_size
    pixels = choose_pixels(pipe, usual, resolution)
    own = usual or (size * pipe.vae_scale_factor if isinstance(size, int) else None)
    guidance = float(settings.get("guidance_scale", GUIDANCE[kind]))
    return Teacher(name, pipe, guidance, pixels, own)


def choose_pixels(pipe: Pipeline, usual: int | None, wanted: int | None) -> int:
    """Pixels a side: `wanted`, or `usual`, or the U-Net's own. Raises `UserError`."""
    factor, size = int(pipe.vae_scale_factor), pipe.unet.config.sample_size
    named = {f"--resolution {wanted}": wanted, f"its teacher.json's resolution {usual}": usual}
    if isinstance(size, int):
        product = f"its U-Net's sample_size {size} times its autoencoder's factor {factor}"
        named[product] = size * factor
    what, pixels = next(((k, v) for k, v in named.items() if v is not None), ("", None))
    if pixels is None:
        raise UserError(
            f"this teacher states no size of its own (its U-Net's sample_size is {size}); give "
            f"--resolution, such as 512"
        )
    step = math.lcm(PIXELS, factor)  # diffusers' pipelines take multiples of 8 alone
    if pixels < step or pixels % step:
        near = max(step, pixels // step * step)
        raise UserError(f"{what} is not a multiple of {step} pixels; give --resolution {near}")
    return pixels


def check_steps(schedule: Any, steps: int) -> None:
    """Raises `UserError` where PNDM's steps would not lead from noise to an image.

    They visit every k-th of T timesteps, k = T // steps, from the last down to the first. So the
    noisiest T % steps are left out; that they are a tenth at most is what 10 steps come to anyway,
    which begin at T - T / 10.

    Args:
        schedule: configuration of the teacher's PNDM scheduler.
    """
    T = schedule.num_train_timesteps

    def possible(n: int) -> bool:
        first = (n - 1) * (T // n) + schedule.steps_offset
        return n > 1 and first < T and T % n <= T // 10

    if not possible(steps):
        near = [n for n in range(2, T + 1) if possible(n)]
        near = [*[n for n in near if n < steps][-1:], *[n for n in near if n > steps][:1]]
        raise UserError(
            f"--steps {steps} does not fit the teacher's {T} timesteps: its scheduler (PNDM) would "
            f"not begin at noise; choose {' or '.join(map(str, near))}"
        )


@dataclass(frozen=True)
class Noised:
    """One batch at random timesteps: the inputs of teacher and student, and their target."""

    sample: Tensor  # x_t, (B, C, h, w), in the teacher's precision, as conditions
    t: Tensor  # (B,)
    conditions: Conditions  # of B images
    target: Tensor  # what the teacher was trained to predict, (B, C, h, w), float32

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the U-Net."""
        inputs = {"sample": self.sample, "timestep": self.t}
        return inputs | self.conditions.unet_inputs()

    def part(self, rows: Tensor) -> Noised:
        """Some of its samples, (b',)."""
        return Noised(self.sample[rows], self.t[rows], self.conditions[rows], self.target[rows])


def add_noise(
    teacher: Teacher,
    x0: Tensor,
    conditions: Conditions,
    generator: torch.Generator,
    rows: Tensor | None = None,
    batch_size: int | None = None,
) -> Noised:
    """Sample t, the noise and x_t ~ q(x_t | x_0) for latents (b, C, h, w). Eqs. 1 and 17.

    Args:
        generator: of the CPU.
        rows, batch_size: the latents' places, (b,), in a batch of B that processes share. Each
            process samples for all B, so a row's noise does not depend on how they are shared.
    """
    schedule, device, dtype = teacher.noise_schedule(), teacher.device, teacher.dtype
    B = len(x0) if batch_size is None else batch_size
    noise = torch.randn(B, *x0.shape[1:], generator=generator)
    t = torch.randint(schedule.config.num_train_timesteps, (B,), generator=generator)
    if rows is not None:
        noise, t = noise[rows], t[rows]
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: schedule.get_velocity(x0, noise, t),
        "sample": lambda: x0,
    }
    target = targets[schedule.config.prediction_type]()
    sample = schedule.add_noise(x0, noise, t)
    return Noised(
        sample=to_device(sample.to(dtype), device),
        t=to_device(t, device),
        conditions=conditions.to(device, dtype),
        target=to_device(target, device),
    )
