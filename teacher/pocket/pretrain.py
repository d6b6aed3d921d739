"""Trains the pocket teacher from scratch: an autoencoder, then a latent diffusion U-Net, on emoji.

    python -m teacher.pocket.pretrain            # goes on where it stopped; writes assets/pocket/
    python -m teacher.pocket.pretrain --export   # writes assets/pocket/ from the present state
    python -m teacher.pocket.pretrain --initial assets/pocket --unet-steps 6000   # 6000 more

Both stages use a constant learning rate with warm-up and a linear decay over the last two fifths,
compute in bfloat16 (in float32 on a CPU without it) and export an exponential moving average of the
weights. AdamW trains the autoencoder, Muon (Jordan et al. 2024) the U-Net's matrices. The model
card says what was tried and what it gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from common.errors import UserError, command_line
from common.files import MetricsLog, check_writable, load_tensors, read_json, write_json
from common.options import read_options
from common.randomness import batch_rows, step_generator
from common.ranges import check_ranges
from common.runs import as_json
from targets.emoji import captions_of, keyword_captions, split_drawings
from targets.images import CaptionedImages, load_target
from teacher.folders import load_part
from teacher.model import Teacher
from teacher.parts import AutoencoderDC
from teacher.pipelines import SCHEDULE, pocket_pipeline
from teacher.pocket import autoencoder
from teacher.pocket.autoencoder import (
    LATENT_CHANNELS,
    VAE_CONFIG,
    augment,
    mixed_precision,
    reconstruction_psnr,
    vae_loss,
)
from teacher.pocket.training import Training, learning_rate, plot_curves
from teacher.shapes import ASSETS

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4, 6),  # diffusers' name for the number of heads a level
    "cross_attention_dim": 384,
    "use_linear_projection": True,
}

RECORD = "training.json"  # of a finished teacher: how it was trained

SCHEDULER_CONFIG: dict[str, Any] = {**SCHEDULE, "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Config(autoencoder.Config):
    """Pre-training of the pocket teacher."""

    out: Path = Path("runs/pretrain")
    """Folder of the training's state."""
    assets: Path = ASSETS / "pocket"
    """Folder that the finished teacher is written to."""
    initial: Path | None = None
    """Finished teacher whose autoencoder is kept and whose U-Net is trained further.

    It is read where `out` holds no U-Net yet; optimizer and learning rate start afresh.
    """
    vae_steps: int = 9000
    """Training steps of the autoencoder."""
    vae_batch_size: int = 16
    """Images a step of the autoencoder."""
    vae_lr: float = 2e-3
    """Learning rate of the autoencoder."""
    unet_steps: int = 39400
    """Training steps of the U-Net."""
    unet_batch_size: int = 128
    """Latents a step of the U-Net."""
    unet_lr: float = 1e-3
    """Learning rate of the U-Net; at twice this, AdamW diverged and Muon learned more slowly."""
    noisy_share: float = 0.7
    """Share of timesteps sampled from the noisiest three tenths; the others are uniform.

    There the U-Net needs the caption: by Bayes' rule over the training drawings, a noised latent
    alone identifies its drawing with probability 0.96 at t = 700, 0.50 at 900 and 0.04 at 999.
    """
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    text_noise: float = 0.1
    """Standard deviation of the noise on text states; their own is 0.43."""
    sentence_share: float = 0.05
    """Share of captions whose token states are all replaced by the sentence state.

    In as many others some of the token states are replaced; the rest are left whole.
    """
    guidance_scale: float = 2.0
    """Guidance scale that becomes the teacher's default."""
    vae_ema_decay: float = 0.995
    """Decay of the moving average of the autoencoder's weights."""
    unet_ema_decay: float = 0.999
    """Decay of the moving average of the U-Net's weights."""
    save_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    limit: int | None = None
    """Use only this many training images, for a quick trial; all if not given."""
    export: bool = False
    """Write the assets from the present state and stop."""


def check(cfg: Config) -> None:
    """Raises `UserError` where there is nothing to start from, to export, or no place for it."""
    check_ranges(cfg)
    for folder in (cfg.out, cfg.assets):
        check_writable(folder)
    if cfg.initial is not None and not (cfg.initial / RECORD).exists():
        raise UserError(
            f"--initial {cfg.initial} is no teacher that pre-training wrote: it holds no "
            f"{RECORD}; give a folder such as {ASSETS / 'pocket'}"
        )
    if cfg.export and not (cfg.out / "unet.safetensors").exists():
        raise UserError(
            f"--export: {cfg.out / 'unet.safetensors'} does not exist yet; run "
            f"`python -m teacher.pocket.pretrain` first"
        )


def images_before(cfg: Config, name: str) -> int:
    """Images that the parts of `cfg.initial` have seen; 0 for a training from scratch."""
    return int(read_json(cfg.initial / RECORD)[name]) if cfg.initial else 0


# ---- the autoencoder ----


def train_vae(cfg: Config, data: CaptionedImages) -> AutoencoderDC:
    """Train the autoencoder, from its checkpoint; gives the averaged one, or `cfg.initial`'s."""
    if cfg.initial is not None:
        kept = AutoencoderDC(**VAE_CONFIG)
        kept.load_state_dict(load_part(cfg.initial, "vae", "AutoencoderDC").state_dict())
        return kept.requires_grad_(False).eval()
    torch.manual_seed(cfg.seed)
    vae = AutoencoderDC(**VAE_CONFIG).to(memory_format=torch.channels_last)
    training = Training(vae, cfg.out / "vae.safetensors", cfg.vae_ema_decay)
    columns = ["loss", "pixel", "square", "edge", "moments"]
    log = MetricsLog(cfg.out / "vae.csv", columns, training.step)
    bar = trange(
        training.step,
        cfg.vae_steps,
        initial=training.step,
        total=cfg.vae_steps,
        desc="autoencoder",
        disable=cfg.export,
    )
    for step in bar if not cfg.export else []:
        rows = batch_rows(len(data), cfg.vae_batch_size, cfg.seed, step)
        generator = step_generator(cfg.seed, "vae", step)
        images = augment(data.images(rows), generator).to(memory_format=torch.channels_last)
        losses = vae_loss(vae, images, generator, cfg)
        training.update(losses["loss"], learning_rate(step, cfg.vae_steps, cfg.vae_lr), len(rows))
        log.write(step, {name: losses[name].item() for name in columns})
        bar.set_postfix({name: f"{losses[name].item():.4f}" for name in columns}, refresh=False)
        if training.step % cfg.save_every == 0 or training.step == cfg.vae_steps:
            training.save()
    log.close()
    averaged: Any = training.ema.module.to(memory_format=torch.contiguous_format)
    return averaged.requires_grad_(False).eval()


# ---- the U-Net ----


@dataclass(frozen=True)
class TrainingSet:
    """All drawings as latents, and the text states of all their captions."""

    latents: Tensor  # (rows, C, 8, 8)
    text: Tensor  # (captions, tokens, 384), bfloat16; the empty caption first
    choices: Tensor  # (rows, most captions of a row), numbers of captions, 0 after its last
    count: Tensor  # (rows,), captions of a row

    def captions(self, rows: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        """One of each row's captions at random, or the empty one, by number, (B,)."""
        pick = (torch.rand(len(rows), generator=generator) * self.count[rows]).long()
        numbers = self.choices[rows, pick]
        return numbers.where(torch.rand(len(rows), generator=generator) >= dropout, 0)

    def states(self, captions: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
        """Text states of captions (B,), (B, tokens, 384), augmented.

        The sentence state replaces some token states, or all. Where it replaces all, it moves
        towards the most similar one of the batch, because a vague prompt lies between the captions
        of several drawings.
        """
        B = len(captions)
        states = self.text[captions].float()
        pick, share = torch.rand(2, B, 1, 1, generator=generator)
        alone, whole = pick < cfg.sentence_share, pick >= 2 * cfg.sentence_share
        share = share.masked_fill(alone, 1).masked_fill(whole, 0)
        replaced = torch.rand(B, states.shape[1], 1, generator=generator) < share
        sentence = states[:, 0]
        direction = F.normalize(sentence, dim=-1)
        alike = direction @ direction.T  # (B, B)
        alike = alike.masked_fill(captions[:, None] == captions[None], -1)
        way = 0.5 * torch.rand(B, 1, generator=generator) * (alone[:, 0] & (captions[:, None] > 0))
        vague = sentence.lerp(sentence[alike.argmax(1)], way)
        states = torch.where(replaced, vague[:, None], states)
        return states + cfg.text_noise * torch.randn(states.shape, generator=generator)


@torch.no_grad()
def encode_everything(teacher: Teacher, data: CaptionedImages) -> TrainingSet:
    """Encode every drawing and every caption once."""
    latents = torch.cat(
        [teacher.encode_images(data.images(rows)) for rows in torch.arange(len(data)).split(128)]
    )
    places: dict[str, int] = {"": 0}
    drawings = split_drawings("train")
    lines = [  # names in 20 to 28 places, keywords in 6
        captions_of(drawings[number]) * 4 + keyword_captions(drawings[number])
        for number in data.image_ids
    ]
    choices = [torch.tensor([places.setdefault(x, len(places)) for x in row]) for row in lines]
    captions = list(places)
    text = torch.cat(
        [
            teacher.conditions(captions[i : i + 256]).text.bfloat16()
            for i in trange(0, len(captions), 256, desc="captions")
        ]
    )
    count = torch.tensor([len(row) for row in choices])
    return TrainingSet(latents, text, nn.utils.rnn.pad_sequence(choices, batch_first=True), count)


def sample_timesteps(count: int, T: int, cfg: Config, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) in 0 .. T - 1, the noisy ones more often."""
    anywhere, late, pick = torch.rand(3, count, generator=generator)
    share = torch.where(pick < cfg.noisy_share, 0.7 + 0.3 * late, anywhere)
    return (T * share).long().clamp(max=T - 1)


def train_unet(cfg: Config, vae: AutoencoderDC, data: CaptionedImages) -> UNet2DConditionModel:
    """Train the U-Net on latents, from its checkpoint; gives the averaged one."""
    torch.manual_seed(cfg.seed)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    if cfg.initial is not None:
        begun = load_part(cfg.initial, "unet", "UNet2DConditionModel")
        unet.load_state_dict(begun.state_dict())
    training = Training(
        unet,
        cfg.out / "unet.safetensors",
        cfg.unet_ema_decay,
        frozenset(
            name
            for name, p in unet.named_parameters()
            if p.ndim > 1 and not name.startswith(("conv_in", "conv_out"))
        ),
        images_before(cfg, "images_seen"),
    )
    if training.step < cfg.unet_steps and not cfg.export:
        pipe = pocket_pipeline(vae, unet, PNDMScheduler(**SCHEDULER_CONFIG))
        teacher = Teacher("pocket", pipe, cfg.guidance_scale)
        schedule = teacher.noise_schedule()
        encoded = encode_everything(teacher, data)
        # PyTorch's fused attention is slow backwards in bfloat16 on a CPU: 0.41 of a step
        unet.set_attn_processor(AttnProcessor())
        log = MetricsLog(cfg.out / "unet.csv", ["loss"], training.step)
        bar = trange(
            training.step, cfg.unet_steps, initial=training.step, total=cfg.unet_steps, desc="U-Net"
        )
        for step in bar:
            generator = step_generator(cfg.seed, "unet", step)
            rows = batch_rows(len(data), cfg.unet_batch_size, cfg.seed, step)
            captions = encoded.captions(rows, cfg.caption_dropout, generator)
            x0 = encoded.latents[rows]  # (B, C, 8, 8)
            noise = torch.randn(x0.shape, generator=generator)
            t = sample_timesteps(len(rows), schedule.config.num_train_timesteps, cfg, generator)
            with mixed_precision():
                prediction = unet(
                    schedule.add_noise(x0, noise, t), t, encoded.states(captions, cfg, generator)
                ).sample
            loss = F.mse_loss(prediction.float(), schedule.get_velocity(x0, noise, t))
            training.update(loss, learning_rate(step, cfg.unet_steps, cfg.unet_lr), len(rows))
            log.write(step, {"loss": loss.item()})
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if training.step % cfg.save_every == 0 or training.step == cfg.unet_steps:
                training.save()
        log.close()
    return training.ema.module.requires_grad_(False).eval()


def export(cfg: Config, vae: AutoencoderDC, unet: UNet2DConditionModel, psnr: float) -> None:
    """Write the teacher's parts in half precision, its settings and its training record."""
    for name, part in {"vae": vae, "unet": unet}.items():
        part.half().save_pretrained(cfg.assets / name)
        part.float()
    PNDMScheduler(**SCHEDULER_CONFIG).save_pretrained(cfg.assets / "scheduler")
    write_json(
        cfg.assets / "teacher.json", {"guidance_scale": cfg.guidance_scale, "resolution": 64}
    )
    _, unet_meta = load_tensors(cfg.out / "unet.safetensors")
    vae_images = images_before(cfg, "vae_images_seen")
    if cfg.initial is None:
        vae_images = load_tensors(cfg.out / "vae.safetensors")[1]["images"]
    record = {
        "psnr_val": round(psnr, 3),
        "vae_images_seen": vae_images,
        "images_seen": unet_meta["images"],
        "guidance": cfg.guidance_scale,
        "params_unet": sum(p.numel() for p in unet.parameters()),
        "params_vae": sum(p.numel() for p in vae.parameters()),
        "config": {k: v for k, v in as_json(cfg).items() if k not in ("out", "assets", "export")},
    }
    write_json(cfg.assets / RECORD, record)


def pretrain(cfg: Config) -> None:
    """Both stages, each from where it was, then the export."""
    check(cfg)
    train, validation = (load_target("emoji", s, limit=cfg.limit) for s in ("train", "validation"))
    vae = train_vae(cfg, train)
    psnr = reconstruction_psnr(vae, validation)
    print(f"autoencoder: {psnr:.2f} dB on {len(validation)} validation images")
    unet = train_unet(cfg, vae, train)
    export(cfg, vae, unet, psnr)
    stages = {} if cfg.initial else {cfg.out / "vae.csv": "pixel"}
    plot_curves(stages | {cfg.out / "unet.csv": "loss"}, cfg.assets / "curves.png")
    print(f"wrote {cfg.assets}")


def main() -> None:
    pretrain(read_options(Config, __doc__))


if __name__ == "__main__":
    command_line(main)
