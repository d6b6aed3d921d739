"""Teachers that need no files of the user's: the pocket teacher, and random ones. App. E.1-E.2.

| `--teacher` | what it is |
|---|---|
| `pocket` | the embedded default: weights in `assets/pocket/`, text states from MiniLM |
| `sd21-random` | Stable Diffusion 2.1's U-Net with random weights; so for all of `assets/unets/` |
| a folder, or `owner/name` on the hub | see `folders.py` |

A random teacher is a shape, for measuring time and memory; its images are noise. Its text encoders
have the right width and length, its autoencoder the right channels; all are small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ModelMixin,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.hub import minilm_folder
from teacher.folders import SD, SDXL, Pipeline, assemble, load_part, load_scheduler, read_config
from teacher.parts import AutoencoderDC, BertModel
from teacher.shapes import CLIP_TOKENS, POCKET_TOKENS, load_shape, text_widths, with_random_weights

SCHEDULE = {  # of all Stable Diffusions
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def minilm_tokenizer(tokens: int) -> Any:
    return transformers.AutoTokenizer.from_pretrained(minilm_folder(), model_max_length=tokens)


# ---- the pocket teacher ----


def load_pocket(folder: Path) -> tuple[Pipeline, dict[str, Any]]:
    """The embedded pipeline and its settings. Raises `UserError` where files are missing."""
    vae = load_part(folder, "vae", AutoencoderDC)
    unet = load_part(folder, "unet", UNet2DConditionModel)
    pipe = pocket_pipeline(vae, unet, load_scheduler(folder))
    return pipe, read_config(folder, "teacher.json")


def pocket_pipeline(
    vae: ModelMixin, unet: UNet2DConditionModel, scheduler: PNDMScheduler
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline whose text encoder is MiniLM."""
    text_encoder = BertModel.from_pretrained(minilm_folder())
    # the pipeline then tells the encoder which tokens are padding
    text_encoder.config.use_attention_mask = True
    text_encoder.config.sentence_state = True
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": text_encoder}
    return assemble(SD, **parts, tokenizer=minilm_tokenizer(POCKET_TOKENS))


# ---- random teachers ----


def random_pipeline(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pipeline:
    """A pipeline around the U-Net of `assets/unets/<shape>.json`, all weights random.

    Args:
        dtype: of the U-Net's weights; the other parts are small, and float32.

    Raises:
        UserError: there is no such U-Net, or it is conditioned on what no pipeline here has.
    """
    unet, tokenizer = load_shape(shape), minilm_tokenizer(CLIP_TOKENS)
    config = unet.config
    states, pooled = text_widths(config)

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CLIP_TOKENS,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=max(1, width // 64),
            projection_dim=pooled,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"unet": with_random_weights(unet, "cpu", dtype), "tokenizer": tokenizer}
        parts["vae"] = AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=config.in_channels,
            norm_num_groups=8,
        )
        first = 3 * states // 8 if pooled else states  # SDXL's 768 of 2048
        parts["text_encoder"] = CLIPTextModel(text_config(first))
        if pooled:
            second = CLIPTextModelWithProjection(text_config(states - first))
            parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
    prediction = "v_prediction" if shape == "sd21" else "epsilon"
    parts["scheduler"] = PNDMScheduler(**SCHEDULE, prediction_type=prediction)
    return assemble(SDXL if pooled else SD, **parts)
