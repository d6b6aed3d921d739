"""Trains the pocket teacher from nothing: an autoencoder, then a latent diffusion U-Net, on emoji.

    python pretrain.py            # goes on from where it stopped; ends by writing assets/pocket/
    python pretrain.py --export   # writes assets/pocket/ from the present state

Both stages use a constant learning rate with warm-up and a linear decay over the last two fifths,
compute in bfloat16 and ship an exponential moving average of the weights. AdamW moves the
autoencoder, Muon (Jordan et al. 2024) the U-Net's matrices. The model card has what was tried and
what it gained.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

import autoencoder
from autoencoder import (
    LATENT_CHANNELS,
    VAE_CONFIG,
    augment,
    mixed_precision,
    reconstruction_psnr,
    vae_loss,
)
from data import CaptionedImages, load_target, spread
from emoji import captions_of, keyword_captions, list_emoji
from pipelines import SCHEDULE, AutoencoderDC, pocket_pipeline
from runfolder import (
    MetricsLog,
    UserError,
    as_json,
    batch_rows,
    command_line,
    load_optimizer,
    load_tensors,
    optimizer_tensors,
    save_tensors,
    step_generator,
    write_json,
)
from teacher import ASSETS, Teacher

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
SCHEDULER_CONFIG: dict[str, Any] = {**SCHEDULE, "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Config(autoencoder.Config):
    """Pre-training of the pocket teacher."""

    out: Path = Path("runs/pretrain")
    """Folder of the training's state."""
    assets: Path = ASSETS / "pocket"
    """Folder that the finished teacher is written to."""
    vae_steps: int = 9000
    """Training steps of the autoencoder."""
    vae_batch_size: int = 16
    """Images a step of the autoencoder."""
    vae_lr: float = 2e-3
    """Learning rate of the autoencoder."""
    unet_steps: int = 15400
    """Training steps of the U-Net."""
    unet_batch_size: int = 128
    """Latents a step of the U-Net."""
    unet_lr: float = 1e-3
    """Learning rate of the U-Net; at twice this AdamW diverged and Muon learnt more slowly."""
    noisy_share: float = 0.5
    """Share of timesteps drawn from the noisiest three tenths; the others are uniform.

    By Bayes' rule over the training drawings, a noised latent alone gives away which one it was
    with probability 0.96 at t = 700, 0.50 at 900 and 0.04 at 999: captions are learned there.
    """
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    guidance_scale: float = 3.0
    """Guidance scale that the teacher carries as its default."""
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


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, constant, linear decay to a hundredth over the last two fifths."""
    decay = min(1.0, (steps - step) / (0.4 * steps))
    return peak * min(1.0, (step + 1) / warmup) * max(decay, 0.01)


class Training:
    """A model with its optimizers and moving average, saved and restored as one file.

    `muon` names the parameters that Muon (Jordan et al. 2024) moves, by orthogonalised momentum; a
    convolution's kernel (out, in, h, w) counts as the matrix (out, in h w). AdamW moves the others.
    """

    def __init__(
        self, model: nn.Module, path: Path, ema_decay: float, muon: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.path = model, path
        named = dict(model.named_parameters())
        self.kernels = [p for name, p in named.items() if name in muon]
        # parameters of their own over the same memory, since Muon takes nothing but matrices
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.kernels]
        others = [p for name, p in named.items() if name not in muon]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, lr=1e-3, fused=True)
        }
        if muon:
            self.optimizers["muon"] = torch.optim.Muon(
                self.matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.step = self.images = 0
        if path.exists():
            tensors, meta = load_tensors(path)
            self.model.load_state_dict(
                {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
            )
            self.ema.load_state_dict(
                {k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")}
            )
            for name, optimizer in self.optimizers.items():
                load_optimizer(optimizer, tensors, name)
            self.step, self.images = meta["step"], meta["images"]

    def save(self) -> None:
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= optimizer_tensors(optimizer, name)
        save_tensors(self.path, tensors, {"step": self.step, "images": self.images})

    def update(self, loss: Tensor, rate: float, images: int) -> None:
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss became {loss.item()} at step {self.step}; the last good state is in "
                f"{self.path}"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.model)
        self.step += 1
        self.images += images


# ---- the autoencoder ----


def train_vae(cfg: Config, data: CaptionedImages) -> AutoencoderDC:
    """Train (or finish training) the autoencoder; gives the averaged one."""
    torch.manual_seed(cfg.seed)
    vae = AutoencoderDC(**VAE_CONFIG).to(memory_format=torch.channels_last)
    training = Training(vae, cfg.out / "vae.safetensors", cfg.vae_ema_decay)
    columns = ["loss", "pixel", "square", "edge", "coarse", "moments"]
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
        draw = step_generator(cfg.seed, "vae", step)
        images = augment(data.images(rows), draw).to(memory_format=torch.channels_last)
        losses = vae_loss(vae, images, draw, cfg)
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
    """All drawings as latents, and their captions' text states, ready to be picked from."""

    latents: Tensor  # (rows, C, 8, 8)
    text: Tensor  # (captions, tokens, 384), bfloat16; the empty caption first
    choices: Tensor  # (rows, most captions of a row), numbers of captions, 0 after its last
    count: Tensor  # (rows,), captions of a row

    def captions(self, rows: Tensor, dropout: float, draw: torch.Generator) -> Tensor:
        """One of each row's captions at random, or, now and then, the empty one: numbers (B,)."""
        pick = (torch.rand(len(rows), generator=draw) * self.count[rows]).long()
        numbers = self.choices[rows, pick]
        return numbers.where(torch.rand(len(rows), generator=draw) >= dropout, 0)


@torch.no_grad()
def encode_everything(teacher: Teacher, data: CaptionedImages) -> TrainingSet:
    """Every drawing through the autoencoder, every caption through the text encoder, once."""
    latents = torch.cat(
        [teacher.encode_images(data.images(rows)) for rows in torch.arange(len(data)).split(128)]
    )
    number: dict[str, int] = {"": 0}
    drawings = [drawing for drawing in list_emoji() if not drawing.held_out]
    lines = [  # names in 15 to 21 places, keywords in 4
        captions_of(drawings[row]) * 3 + keyword_captions(drawings[row])
        for row in spread(len(drawings), len(data))
    ]
    choices = [torch.tensor([number.setdefault(x, len(number)) for x in row]) for row in lines]
    captions = list(number)
    text = torch.cat(
        [
            teacher.encode_text(captions[i : i + 256]).bfloat16()
            for i in trange(0, len(captions), 256, desc="captions")
        ]
    )
    count = torch.tensor([len(row) for row in choices])
    return TrainingSet(latents, text, nn.utils.rnn.pad_sequence(choices, batch_first=True), count)


def draw_timesteps(count: int, T: int, cfg: Config, draw: torch.Generator) -> Tensor:
    """Timesteps (count,) in 0 .. T - 1, the noisy ones more often."""
    anywhere, late, pick = torch.rand(3, count, generator=draw)
    share = torch.where(pick < cfg.noisy_share, 0.7 + 0.3 * late, anywhere)
    return (T * share).long().clamp(max=T - 1)


def train_unet(cfg: Config, vae: AutoencoderDC, data: CaptionedImages) -> UNet2DConditionModel:
    """Train (or finish training) the U-Net on latents; gives the averaged one."""
    torch.manual_seed(cfg.seed)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    training = Training(
        unet,
        cfg.out / "unet.safetensors",
        cfg.unet_ema_decay,
        frozenset(
            name
            for name, p in unet.named_parameters()
            if p.ndim > 1 and not name.startswith(("conv_in", "conv_out"))
        ),
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
            draw = step_generator(cfg.seed, "unet", step)
            rows = batch_rows(len(data), cfg.unet_batch_size, cfg.seed, step)
            captions = encoded.captions(rows, cfg.caption_dropout, draw)
            x0 = encoded.latents[rows]  # (B, C, 8, 8)
            noise = torch.randn(x0.shape, generator=draw)
            t = draw_timesteps(len(rows), schedule.config.num_train_timesteps, cfg, draw)
            with mixed_precision():
                prediction = unet(
                    schedule.add_noise(x0, noise, t), t, encoded.text[captions]
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
    """Write the teacher's parts in half precision, its settings and the training's figures."""
    for name, part in {"vae": vae, "unet": unet}.items():
        part.half().save_pretrained(cfg.assets / name)
        part.float()
    PNDMScheduler(**SCHEDULER_CONFIG).save_pretrained(cfg.assets / "scheduler")
    write_json(
        cfg.assets / "teacher.json", {"guidance_scale": cfg.guidance_scale, "resolution": 64}
    )
    _, vae_meta = load_tensors(cfg.out / "vae.safetensors")
    _, unet_meta = load_tensors(cfg.out / "unet.safetensors")
    figures = {
        "psnr_val": round(psnr, 3),
        "vae_images_seen": vae_meta["images"],
        "images_seen": unet_meta["images"],
        "guidance": cfg.guidance_scale,
        "params_unet": sum(p.numel() for p in unet.parameters()),
        "params_vae": sum(p.numel() for p in vae.parameters()),
        "config": {k: v for k, v in as_json(cfg).items() if k not in ("out", "assets", "export")},
    }
    write_json(cfg.assets / "training.json", figures)


def plot_curves(cfg: Config) -> None:
    """Both stages' losses, smoothed, as <assets>/curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    stages = (("vae", "pixel"), ("unet", "loss"))
    for axis, (name, column) in zip(axes, stages, strict=True):
        with (cfg.out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file)]
        width = max(1, len(rows) // 100)
        means = [
            sum(value for _, value in rows[i : i + width]) / len(rows[i : i + width])
            for i in range(0, len(rows), width)
        ]
        axis.plot([step for step, _ in rows[::width]], means)
        axis.set(title=f"{name}: {column}", xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(cfg.assets / "curves.png", dpi=80)
    plt.close(figure)


def pretrain(cfg: Config) -> None:
    """Both stages, each from where it was, then the export."""
    train, validation = (load_target("emoji", s, limit=cfg.limit) for s in ("train", "validation"))
    if cfg.export and not (cfg.out / "unet.safetensors").exists():
        raise UserError(
            f"--export: {cfg.out / 'unet.safetensors'} does not exist yet; run `python "
            f"pretrain.py` first"
        )
    vae = train_vae(cfg, train)
    psnr = reconstruction_psnr(vae, validation)
    print(f"autoencoder: {psnr:.2f} dB on {len(validation)} validation images")
    unet = train_unet(cfg, vae, train)
    export(cfg, vae, unet, psnr)
    plot_curves(cfg)
    print(f"wrote {cfg.assets}")


def main() -> None:
    pretrain(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    command_line(main)
