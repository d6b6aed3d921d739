"""The pocket teacher's autoencoder: its shape, its loss, its reconstruction error.

The loss compares pixels and image gradients. A penalty keeps the latents' mean near 0 and, over all
channels, their variance near 1, so that the pipeline needs no scaling factor. Noise on the latents
keeps details out of their last digits, which a U-Net cannot predict.
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
from teacher.parts import AutoencoderDC

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
    """The weights of the autoencoder's loss."""

    latent_noise: float = 0.5
    """Noise on latents in training: its deviation is uniform up to this, one for each image."""
    moment_weight: float = 0.1
    """Weight of the divergence of the latents' means and mean variance from 0 and 1."""
    edge_weight: float = 0.3
    """Weight of the L1 distance between image gradients."""
    square_weight: float = 2.0
    """Weight of the squared distance, which is what brings colours back early."""


def mixed_precision() -> torch.autocast:
    """Matrix products and convolutions in bfloat16, everything delicate in single precision.

    All is in single precision on a CPU where oneDNN has no bfloat16: there, a step in bfloat16
    takes six times as long.
    """
    onednn = torch.backends.mkldnn.is_available()
    fast = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, H), each randomly mirrored and turned by a multiple of 90 degrees.

    The autoencoder need not know what an image shows, and 3,488 drawings are few.
    """
    turned = []
    for image in images:
        mirror, turn = (int(torch.randint(n, (), generator=generator)) for n in (2, 4))
        image = image.rot90(turn, (1, 2))
        turned.append(image.flip(2) if mirror else image)
    return torch.stack(turned)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical finite differences of images (B, 3, H, W)."""
    return images.diff(dim=-1), images.diff(dim=-2)


def vae_loss(
    vae: AutoencoderDC, images: Tensor, generator: torch.Generator, cfg: Config
) -> dict[str, Tensor]:
    """The loss and its parts: L1 and squares on pixels, L1 on image gradients, moments.

    The last part is KL(N(mean, v) || N(0, 1)) over channels, where v is the mean of their
    variances, so a channel that matters less may vary less.
    """
    with mixed_precision():
        latents = vae.encode(images).latents.float()
        deviation = cfg.latent_noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
        noise = deviation * torch.randn(latents.shape, generator=generator)
        output = vae.decode(latents + noise).sample.float()
    pixel, square = F.l1_loss(output, images), F.mse_loss(output, images)
    across, down = (F.l1_loss(a, b) for a, b in zip(edges(output), edges(images), strict=True))
    variance, mean = torch.var_mean(latents, (0, 2, 3))  # (C,)
    overall = variance.mean()
    moments = (mean.square().mean() + overall - 1 - overall.log()) / 2
    parts = {"pixel": pixel, "square": square, "edge": across + down, "moments": moments}
    weights = (1.0, cfg.square_weight, cfg.edge_weight, cfg.moment_weight)
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
