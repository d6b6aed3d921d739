"""Trains the pocket teacher from nothing: an autoencoder, then a latent diffusion U-Net, on emoji.

    python pretrain.py            # goes on from where it stopped; ends by writing assets/pocket/
    python pretrain.py --export   # writes assets/pocket/ from the present state

Both stages use a constant learning rate with warm-up and a linear decay over the last fifth, and
ship an exponential moving average of the weights. Latents are made zero-mean and unit-variance a
channel by folding their statistics into the autoencoder's two 1x1 convolutions, so the pipeline
needs no scale of its own.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

from data import CaptionedImages, load_target, spread
from emoji import captions_of, list_emoji
from pipelines import SCHEDULE
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
from teacher import ASSETS, Teacher, pocket_pipeline

LATENT_CHANNELS = 16
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 16,
    "sample_size": 64,
    "scaling_factor": 1.0,  # the statistics are folded into the weights
}
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
class Config:
    """Pre-training of the pocket teacher."""

    out: Path = Path("runs/pretrain")
    """Folder of the training's state."""
    assets: Path = ASSETS / "pocket"
    """Folder that the finished teacher is written to."""
    vae_steps: int = 9000
    """Training steps of the autoencoder."""
    vae_batch_size: int = 16
    """Images a step of the autoencoder."""
    vae_lr: float = 1e-3
    """Learning rate of the autoencoder."""
    kl_weight: float = 5e-4
    """Weight of the latent's KL divergence a dimension."""
    edge_weight: float = 0.3
    """Weight of the L1 distance between image gradients."""
    square_weight: float = 2.0
    """Weight of the squared distance, which is what brings colours back early."""
    unet_steps: int = 3600
    """Training steps of the U-Net."""
    unet_batch_size: int = 64
    """Latents a step of the U-Net."""
    unet_lr: float = 1e-3
    """Learning rate of the U-Net."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    guidance_scale: float = 3.0
    """Guidance scale that the teacher carries as its default."""
    vae_ema_decay: float = 0.99
    """Decay of the moving average of the autoencoder's weights.

    Short, since it changes fast until its rate decays.
    """
    unet_ema_decay: float = 0.995
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
    """Linear warm-up, constant, linear decay to a hundredth over the last fifth."""
    decay = min(1.0, (steps - step) / (0.2 * steps))
    return peak * min(1.0, (step + 1) / warmup) * max(decay, 0.01)


class Training:
    """A model with its optimizer and moving average, saved and restored as one file."""

    def __init__(self, model: nn.Module, path: Path, ema_decay: float) -> None:
        self.model, self.path = model, path
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
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
            load_optimizer(self.optimizer, tensors)
            self.step, self.images = meta["step"], meta["images"]

    def save(self) -> None:
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.state_dict().items()} | optimizer_tensors(
            self.optimizer
        )
        save_tensors(self.path, tensors, {"step": self.step, "images": self.images})

    def update(self, loss: Tensor, rate: float, images: int) -> None:
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss became {loss.item()} at step {self.step}; the last good state is in "
                f"{self.path}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.model)
        self.step += 1
        self.images += images


# ---- the autoencoder ----


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images (B, 3, H, H), mirrored, turned and with their colours exchanged, each one or not.

    The autoencoder need not know what is shown, and 3,474 drawings are few: without this it is 2 dB
    better on drawings that it has seen.
    """
    turned = []
    for image in images:
        mirror, turn = (int(torch.randint(n, (), generator=draw)) for n in (2, 4))
        image = image[torch.randperm(3, generator=draw)].rot90(turn, (1, 2))
        turned.append(image.flip(2) if mirror else image)
    return torch.stack(turned)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical finite differences of images (B, 3, H, W)."""
    return images.diff(dim=-1), images.diff(dim=-2)


def vae_loss(
    vae: AutoencoderKL, images: Tensor, generator: torch.Generator, cfg: Config
) -> dict[str, Tensor]:
    """L1 on pixels and on their differences, squares on pixels, KL to a unit Gaussian: means."""
    posterior = vae.encode(images).latent_dist
    output = vae.decode(posterior.sample(generator)).sample
    pixel, square = F.l1_loss(output, images), F.mse_loss(output, images)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(images), strict=True))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss = pixel + cfg.square_weight * square + cfg.edge_weight * edge + cfg.kl_weight * kl
    return {"loss": loss, "pixel": pixel, "square": square, "edge": edge, "kl": kl}


def train_vae(cfg: Config, data: CaptionedImages) -> AutoencoderKL:
    """Train (or finish training) the autoencoder.

    Gives the averaged one, its latents standardised.
    """
    torch.manual_seed(cfg.seed)
    training = Training(
        AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last),
        cfg.out / "vae.safetensors",
        cfg.vae_ema_decay,
    )
    columns = ["loss", "pixel", "square", "edge", "kl"]
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
        losses = vae_loss(training.model, images, draw, cfg)
        training.update(losses["loss"], learning_rate(step, cfg.vae_steps, cfg.vae_lr), len(rows))
        log.write(step, {name: losses[name].item() for name in columns})
        bar.set_postfix({name: f"{losses[name].item():.4f}" for name in columns}, refresh=False)
        if training.step % cfg.save_every == 0 or training.step == cfg.vae_steps:
            training.save()
    log.close()
    vae = training.ema.module.to(memory_format=torch.contiguous_format).requires_grad_(False).eval()
    standardise_latents(vae, data)
    return vae


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, data: CaptionedImages, images: int = 1024) -> None:
    """Fold the latents' mean and deviation over `data` into the 1x1 convolutions, in place."""
    rows = torch.linspace(0, len(data) - 1, images).long()
    means = torch.cat(
        [vae.encode(data.images(part)).latent_dist.mean for part in rows.split(64)]
    )  # (images, C, 8, 8)
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))  # (C,)
    scale = torch.cat(
        [1 / std, torch.ones_like(std)]
    )  # the second half of the output is a log-variance: shift, not scale
    shift = torch.cat([-mean / std, -2 * std.log()])
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    vae.quant_conv.weight *= scale[:, None, None, None]
    vae.quant_conv.bias.copy_(vae.quant_conv.bias * scale + shift)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, data: CaptionedImages) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over all pixels of `data`."""
    total = 0.0
    for rows in torch.arange(len(data)).split(64):
        images = data.images(rows)
        output = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        total += ((output - images) / 2).square().mean((1, 2, 3)).sum().item()
    return -10 * math.log10(total / len(data))


# ---- the U-Net ----


@torch.no_grad()
def encode_everything(
    teacher: Teacher, data: CaptionedImages
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Latents (rows, C, 8, 8).

    Text states (captions, tokens, 384) in half precision, the empty caption first; a row's caption
    numbers.
    """
    latents = torch.cat(
        [teacher.encode_images(data.images(rows)) for rows in torch.arange(len(data)).split(128)]
    )
    number: dict[str, int] = {"": 0}
    drawings = [drawing for drawing in list_emoji() if not drawing.held_out]
    choices = [
        [number.setdefault(line, len(number)) for line in captions_of(drawings[row])]
        for row in spread(len(drawings), len(data))
    ]
    captions = list(number)
    states = [
        teacher.encode_text(captions[i : i + 256]).half()
        for i in trange(0, len(captions), 256, desc="captions")
    ]
    return latents, torch.cat(states), choices


def train_unet(cfg: Config, vae: AutoencoderKL, data: CaptionedImages) -> UNet2DConditionModel:
    """Train (or finish training) the U-Net on standardised latents; gives the averaged one."""
    torch.manual_seed(cfg.seed)
    training = Training(
        UNet2DConditionModel(**UNET_CONFIG), cfg.out / "unet.safetensors", cfg.unet_ema_decay
    )
    if training.step < cfg.unet_steps and not cfg.export:
        teacher = Teacher(
            "pocket",
            pocket_pipeline(vae, training.model, PNDMScheduler(**SCHEDULER_CONFIG)),
            cfg.guidance_scale,
        )
        schedule = teacher.noise_schedule()
        latents, states, choices = encode_everything(teacher, data)
        log = MetricsLog(cfg.out / "unet.csv", ["loss"], training.step)
        bar = trange(
            training.step, cfg.unet_steps, initial=training.step, total=cfg.unet_steps, desc="U-Net"
        )
        for step in bar:
            draw = step_generator(cfg.seed, "unet", step)
            rows = batch_rows(len(data), cfg.unet_batch_size, cfg.seed, step)
            pick = torch.rand(len(rows), generator=draw)
            captions = torch.tensor(
                [
                    choices[row][int(p * len(choices[row]))]
                    for row, p in zip(rows.tolist(), pick.tolist(), strict=True)
                ]
            )
            captions[torch.rand(len(rows), generator=draw) < cfg.caption_dropout] = 0
            x0 = latents[rows]  # (B, C, 8, 8)
            noise = torch.randn(x0.shape, generator=draw)
            t = torch.randint(schedule.config.num_train_timesteps, (len(rows),), generator=draw)
            prediction = training.model(
                schedule.add_noise(x0, noise, t), t, states[captions].float()
            ).sample
            loss = F.mse_loss(prediction, schedule.get_velocity(x0, noise, t))
            training.update(loss, learning_rate(step, cfg.unet_steps, cfg.unet_lr), len(rows))
            log.write(step, {"loss": loss.item()})
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if training.step % cfg.save_every == 0 or training.step == cfg.unet_steps:
                training.save()
        log.close()
    return training.ema.module.requires_grad_(False).eval()


def export(cfg: Config, vae: AutoencoderKL, unet: UNet2DConditionModel, psnr: float) -> None:
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
