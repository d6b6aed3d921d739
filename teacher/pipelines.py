"""Where a teacher's pipeline comes from: its parts, put together from stock classes. App. E.1-E.2.

| `--teacher` | what it is |
|---|---|
| `pocket` | the embedded default: weights in `assets/pocket/`, text states from MiniLM |
| a folder | in the layout that a pipeline's `save_pretrained` writes (`folders.py`) |
| `owner/name` | such a folder on the hub |
| `sd21-random` | Stable Diffusion 2.1's U-Net with random weights; so for all of `assets/unets/` |

The safety checker and the watermark are left out, because images are generated for measuring.
Sampling uses PNDM, as in App. E.2, with the folder's noise schedule.

A random teacher is a shape, for measuring time and memory; its images are noise. Its text encoders
have the right width and length, its autoencoder the right channels; all are small.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ModelMixin,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from common.hub import minilm_folder
from teacher.folders import (
    OPTION,
    SD,
    SDXL,
    check_conditions,
    load_part,
    load_scheduler,
    read_object,
    read_pipeline,
)
from teacher.parts import BertModel
from teacher.shapes import CLIP_TOKENS, POCKET_TOKENS, load_shape, text_widths

RANDOM = "-random"
TEACHERS = ("pocket", "sd15-random", "sd21-base-random", "sd21-random", "sdxl-random")  # no files

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

GUIDANCE = {SD: 7.5, SDXL: 5.0}  # App. E.2; diffusers' own for SDXL

SCHEDULE = {  # of all Stable Diffusions
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def assemble(kind: str, **parts: Any) -> Pipeline:
    """A pipeline of the class `kind`, of `SD` or `SDXL`."""
    # the pipeline would warn that MiniLM is not CLIP, and list the tokens that it cut off
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
    if kind == SDXL:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        without = {"safety_checker": None, "feature_extractor": None}
        pipe = StableDiffusionPipeline(**parts, **without, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- what needs no files ----


def minilm_tokenizer(tokens: int) -> Any:
    return transformers.AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=tokens)


def pocket_pipeline(
    vae: ModelMixin, unet: UNet2DConditionModel, scheduler: PNDMScheduler
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline whose text encoder is MiniLM."""
    text_encoder = BertModel.from_pretrained(minilm_folder())
    # the pipeline then tells the encoder which tokens are padding
    text_encoder.config.use_attention_mask = True
    text_encoder.config.sentence_state = True
    return assemble(
        SD,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=minilm_tokenizer(POCKET_TOKENS),
        unet=unet,
        scheduler=scheduler,
    )


def load_pocket(folder: Path) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """The embedded pipeline and its settings. Raises `UserError` where files are missing."""
    settings = read_object(folder / "teacher.json")
    vae, unet = (
        load_part(folder, part, read_object(folder / part / "config.json")["_class_name"])
        for part in ("vae", "unet")
    )
    return pocket_pipeline(vae, unet, load_scheduler(folder)), settings


def random_unet(config: Any, dtype: torch.dtype) -> UNet2DConditionModel:
    """A U-Net with PyTorch's own random weights, made a layer at a time.

    In half precision it never takes the memory of the whole in float32.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    for module in unet.modules():
        if hasattr(module, "reset_parameters"):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
            module.to(dtype)
    return unet


def random_text_encoders(widths: tuple[int, int], tokenizer: Any) -> list[Any]:
    """Small text encoders: BERT for text states alone, two CLIPs where there is pooled text.

    Args:
        widths: of text states and pooled text (0: none).
        tokenizer: MiniLM's.
    """
    states, pooled = widths
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_TOKENS}

    def sizes(width: int, layers: int) -> dict[str, Any]:
        heads = {"num_hidden_layers": layers, "num_attention_heads": max(1, width // 64)}
        return common | heads | {"hidden_size": width, "intermediate_size": width}

    if not pooled:
        return [BertModel(transformers.BertConfig(**sizes(states, 1)))]
    first = 3 * states // 8  # SDXL's 768 of 2048
    ends = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": pooled,
    }
    config = transformers.CLIPTextConfig
    return [
        transformers.CLIPTextModel(config(**sizes(first, 2), **ends)),
        transformers.CLIPTextModelWithProjection(config(**sizes(states - first, 2), **ends)),
    ]


def random_pipeline(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pipeline:
    """A pipeline around the U-Net of `assets/unets/<shape>.json`, all weights random.

    Args:
        dtype: of the U-Net's weights; the other parts are small, and float32.

    Raises:
        UserError: there is no such U-Net, or it is conditioned on what no pipeline here has.
    """
    config, levels = load_shape(shape).config, 4
    widths = text_widths(config)
    kind = SDXL if widths[1] else SD
    check_conditions(kind, config, f"{OPTION} {shape}{RANDOM}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = random_unet(config, dtype)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=config.in_channels,
            norm_num_groups=8,
        )
        tokenizer = minilm_tokenizer(CLIP_TOKENS)
        text_encoders = random_text_encoders(widths, tokenizer)
    prediction = "v_prediction" if shape == "sd21" else "epsilon"
    parts = {"text_encoder": text_encoders[0], "tokenizer": tokenizer, "unet": unet, "vae": vae}
    if kind == SDXL:
        parts |= {"text_encoder_2": text_encoders[1], "tokenizer_2": tokenizer}
    scheduler = PNDMScheduler(**SCHEDULE, prediction_type=prediction)
    return assemble(kind, scheduler=scheduler, **parts)


# ---- folders ----


def load_folder(name: str, dtype: torch.dtype = torch.float32) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline by folder or hub id, and what `teacher.json` beside it says, if there is one.

    Raises `UserError`; see `folders.read_pipeline`.
    """
    kind, parts, settings = read_pipeline(name, dtype, f"take one of: {', '.join(TEACHERS)}")
    return assemble(kind, **parts), settings
