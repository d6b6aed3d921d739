"""The pocket teacher's autoencoder: its shape, what it is trained for, how well it rebuilds.

Pixels, their differences and their squares are compared; a penalty keeps latents near zero mean
and, over all channels, unit variance, so that the pipeline needs no scale of its own. Noise on the
latents is meant to keep details out of their last digits, which a U-Net cannot predict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor
from torch.nn import functional as F

from targets.images import CaptionedImages
from teacher.pipelines import AutoencoderDC

LATENT_CHANNELS = 16

VAE_CONFIG: dict[str, Any] = {
    "encoder_block_out_channels": (64, 64, 128, 128),
    "decoder_block_out_channels": (64, 64, 128, 128),
    "encoder_layers_per_block": (0, 1, 2, 2),
    "decoder_layers_per_block": (0, 1, 2, 2),
    "encoder_qkv_multiscales": ((),) * 4,
    "decoder_qkv_multiscales": ((),) * 4,
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 1.0,
}


@dataclass(frozen=True)
class Config:
    """What the autoencoder's losses weigh."""

    latent_noise: float = 0.5
    """Noise on latents while the autoencoder is trained: up to this deviation, drawn an image."""
    coarse_weight: float = 0.5
    """Weight of the reconstruction at half the size from latents at half the size.

    Meant to give neighbours something in common, as an image's have (Kouzelis et al. 2025, EQ-VAE).
    What it brings here is unproven: it came late in training and changed the latents little.
    """
    moment_weight: float = 0.1
    """Weight of the divergence of the latents' means and mean variance from 0 and 1."""
    edge_weight: float = 0.3
    """Weight of the L1 distance between image gradients."""
    square_weight: float = 2.0
    """Weight of the squared distance, which is what brings colours back early."""


def mixed_precision() -> torch.autocast:
    """Matrix products and convolutions in bfloat16, everything delicate in single precision."""
    return torch.autocast("cpu", torch.bfloat16)


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images (B, 3, H, H), each mirrored or not and turned by a multiple of 90 degrees.

    The autoencoder need not know what is shown, and 3,488 drawings are few.
    """
    turned = []
    for image in images:
        mirror, turn = (int(torch.randint(n, (), generator=draw)) for n in (2, 4))
        image = image.rot90(turn, (1, 2))
        turned.append(image.flip(2) if mirror else image)
    return torch.stack(turned)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical finite differences of images (B, 3, H, W)."""
    return images.diff(dim=-1), images.diff(dim=-2)


def vae_loss(
    vae: AutoencoderDC, images: Tensor, draw: torch.Generator, cfg: Config
) -> dict[str, Tensor]:
    """L1 on pixels and on their differences, squares on pixels; the same, coarse; moments.

    The last term is KL(N(mean, v) || N(0, 1)) over channels, where v is the mean of their
    variances, so a channel that matters less may vary less.
    """
    with mixed_precision():
        latents = vae.encode(images).latents.float()
        deviation = cfg.latent_noise * torch.rand(len(latents), 1, 1, 1, generator=draw)
        noise = deviation * torch.randn(latents.shape, generator=draw)
        output = vae.decode(latents + noise).sample.float()
        halved = vae.decode(F.avg_pool2d(latents, 2)).sample.float()
    small = F.avg_pool2d(images, 2)
    coarse = F.l1_loss(halved, small) + cfg.square_weight * F.mse_loss(halved, small)
    pixel, square = F.l1_loss(output, images), F.mse_loss(output, images)
    across, down = (F.l1_loss(a, b) for a, b in zip(edges(output), edges(images), strict=True))
    variance, mean = torch.var_mean(latents, (0, 2, 3))  # (C,)
    overall = variance.mean()
    moments = (mean.square().mean() + overall - 1 - overall.log()) / 2
    parts = {
        "pixel": pixel,
        "square": square,
        "edge": across + down,
        "coarse": coarse,
        "moments": moments,
    }
    weights = (1.0, cfg.square_weight, cfg.edge_weight, cfg.coarse_weight, cfg.moment_weight)
    loss = torch.stack([w * part for w, part in zip(weights, parts.values(), strict=True)]).sum()
    return {"loss": loss} | parts


@torch.no_grad()
def reconstruction_psnr(vae: Any, data: CaptionedImages) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over all pixels of `data`."""
    total = 0.0
    for rows in torch.arange(len(data)).split(64):
        images = data.images(rows)
        latents = retrieve_latents(vae.encode(images), sample_mode="argmax")
        output = vae.decode(latents).sample.clamp(-1, 1)
        total += ((output - images) / 2).square().mean((1, 2, 3)).sum().item()
    return -10 * math.log10(total / len(data))
