"""U-Nets by name, as shapes without weights. App. E.2.

`assets/unets/` holds the configurations that the models' authors published, as far as a U-Net needs
them: sd15, sd21-base (512 px), sd21 (768 px), sdxl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from common.errors import UserError
from common.files import read_json

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PIXELS = 8  # a side of what one latent position stands for
POCKET_TOKENS = 20  # of the pocket teacher's text states: 99.9 % of the emoji captions fit
CLIP_TOKENS = 77  # of every Stable Diffusion's
RANDOM = "-random"
TEACHERS = ("pocket", "sd15-random", "sd21-base-random", "sd21-random", "sdxl-random")  # no files
HUB_SHAPES = {
    "stable-diffusion-2-1": "sd21",
    "stable-diffusion-2-1-base": "sd21-base",
    "stable-diffusion-xl-base-1.0": "sdxl",
}

CONDITIONS: dict[str, tuple[str, ...]] = {  # what a U-Net may ask for beside text states
    "addition_embed_type": ("text_time",),
    "class_embed_type": (),
    "encoder_hid_dim_type": (),
    "num_class_embeds": (),
    "time_cond_proj_dim": (),
}

BLOCKS = (  # those whose units are known: ResBlocks, and attention with or without a Transformer
    *("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
    *("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"),
    *("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
)


def text_widths(config: Any) -> tuple[int, int]:
    """Widths of a U-Net's text states and of its pooled text, 0 where it reads text states alone.

    SDXL's pooled text is embedded together with six sizes.
    """
    pooled = 0
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return config.cross_attention_dim, pooled


def check_unet(config: dict[str, Any], who: str) -> None:
    """Raises `UserError` for a U-Net with blocks or conditions that are not known here."""
    blocks = [config.get("mid_block_type")]
    for key in ("down_block_types", "up_block_types"):
        kinds = config.get(key, [])
        blocks += kinds if isinstance(kinds, list) else [kinds]
    unknown = [str(block) for block in blocks if block not in BLOCKS]
    asked = [(key, config[key]) for key in CONDITIONS if config.get(key)]
    unknown += [f"{key} {value}" for key, value in asked if value not in CONDITIONS[key]]
    if unknown:
        raise UserError(
            f"{who}: a U-Net with {', '.join(unknown)} is not supported; it must be made of "
            "ResBlocks and Transformers, as Stable Diffusion's, and be conditioned on text"
        )


def load_shape(name: str) -> UNet2DConditionModel:
    """A U-Net on the meta device, by the name of a published one or by folder.

    Raises:
        UserError: there is no such U-Net, or its configuration is not one of a U-Net.
    """
    files = (ASSETS / "unets").glob("*.json")
    known = {path.stem: path for path in sorted(files, key=lambda path: path.stem)}
    known["pocket"] = ASSETS / "pocket" / "unet" / "config.json"
    folder = Path(name)
    places = [known.get(name), folder / "config.json", folder / "unet" / "config.json"]
    path = next((place for place in places if place and place.is_file()), None)
    if path is None:
        raise UserError(
            f"--unet {name} is unknown; choose {', '.join(known)}, "
            "or a folder that holds config.json or unet/config.json"
        )
    config = read_json(path, "give another configuration, or fetch it again")
    if not isinstance(config, dict) or "block_out_channels" not in config:
        raise UserError(f"{path} is not the configuration of a diffusers UNet2DConditionModel")
    check_unet(config, str(path))
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config).eval()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not the configuration of a U-Net ({reason})") from None


def with_random_weights(
    module: Any, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Any:
    """A module of the meta device on `device`, frozen, with PyTorch's own random weights.

    They are made a layer at a time, so it never takes the memory of the whole in float32.
    """
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.to_empty(device=device, recurse=False)
            part.reset_parameters()
            nn.Module.to(part, dtype)
    return module.eval().requires_grad_(False)


def shape_of(teacher: str) -> UNet2DConditionModel:
    """A teacher's U-Net without weights. Raises `UserError` where its shape is not known here."""
    name = teacher.removesuffix(RANDOM)
    return load_shape(HUB_SHAPES.get(name.rsplit("/", 1)[-1], name))
