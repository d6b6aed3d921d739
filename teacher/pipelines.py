"""Where a teacher's pipeline comes from: its parts, put together from stock classes. App. E.1-E.2.

| `--teacher` | what it is |
|---|---|
| `pocket` | the embedded default: weights in `assets/pocket/`, text states from MiniLM |
| a folder | in the layout that `StableDiffusionPipeline.save_pretrained` writes |
| `owner/name` | such a folder on the hub |
| `sd21-random` | Stable Diffusion 2.1's U-Net with random weights; so for all of `assets/unets/` |

Folders may hold Stable Diffusion 1.x and 2.x (a UNet2DConditionModel that is conditioned on text
states alone) with a CLIP or BERT text encoder, as safetensors. Each part is loaded by the class
named here, so no code of a folder is ever run. The safety checker is left out, because images are
generated for measuring. Sampling uses PNDM, as in App. E.2, with the folder's noise schedule.

A random teacher is a shape, for measuring time and memory; its images are noise. Its text encoder
has the right width and length, its autoencoder the right channels; both are tiny.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    ModelMixin,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from common.hub import STABLE_DIFFUSION, minilm_folder, model_folder, refuse_pickles
from teacher.shapes import CLIP_TOKENS, CONDITIONS, POCKET_TOKENS, load_shape

GUIDANCE = 7.5  # App. E.2
OPTION, RANDOM = "--teacher", "-random"
TEACHERS = ("pocket", "sd15-random", "sd21-base-random", "sd21-random")  # need no files

CLASSES = {  # of the parts, as model_index.json names them
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderDC"),
    "text_encoder": ("CLIPTextModel", "BertModel"),
}

WEIGHTS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model") | {"text_encoder": "model"}

SCHEDULE = {  # of all Stable Diffusions
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

SUPPORTED = "Stable Diffusion 1.x and 2.x are supported"


class AutoencoderDC(diffusers.AutoencoderDC):
    """diffusers' deep-compression autoencoder as `StableDiffusionPipeline` calls an autoencoder.

    Shortcuts carry pixels past every change of resolution, so it learns faster than
    `AutoencoderKL` (the pocket teacher's model card has the numbers).
    """

    @property
    def config(self) -> FrozenDict:
        """With the entry that the pipeline counts levels by; it is not saved."""
        config = super().config
        return FrozenDict({**config, "block_out_channels": config["decoder_block_out_channels"]})

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [-1, 1] to `latents` (B, C, h, w)."""
        latents = super().encode(x, return_dict=False)[0]
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(self, z: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """Latents (B, C, h, w) to a `sample` of images (B, 3, H, W); nothing in it is random."""
        return super().decode(z, return_dict=return_dict)


class BertModel(transformers.BertModel):
    """transformers' BERT; if its configuration says `sentence_state`, the first state is the mean.

    Sentence encoders such as all-MiniLM are trained on the mean of their token states. Their [CLS]
    state is left over from pre-training.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Tokens (B, n) to `last_hidden_state` (B, n, C); the mask is 0 for padding."""
        output = super().forward(input_ids, attention_mask, **kwargs)
        if getattr(self.config, "sentence_state", False):
            states = output.last_hidden_state
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            weight = mask[..., None].to(states)  # (B, n, 1)
            mean = (states * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            output.last_hidden_state = torch.cat([mean, states[:, 1:]], 1)
        return output


def assemble(
    vae: ModelMixin,
    text_encoder: Any,
    tokenizer: Any,
    unet: UNet2DConditionModel,
    scheduler: PNDMScheduler,
) -> StableDiffusionPipeline:
    # the pipeline would warn that MiniLM is not CLIP, and list the tokens that it cut off
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
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
    return assemble(vae, text_encoder, minilm_tokenizer(POCKET_TOKENS), unet, scheduler)


def load_pocket(folder: Path) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """The embedded pipeline and its settings. Raises `UserError` where files are missing."""
    settings = read_object(folder / "teacher.json")
    vae, unet = (
        load_part(folder, part, read_object(folder / part / "config.json")["_class_name"])
        for part in ("vae", "unet")
    )
    return pocket_pipeline(vae, unet, load_scheduler(folder)), settings


def random_pipeline(shape: str, seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline around the U-Net of `assets/unets/<shape>.json`, all weights random.

    Raises:
        UserError: there is no such U-Net, or it is conditioned on more than text.
    """
    config = load_shape(shape).config
    refuse_conditions(config, f"{OPTION} {shape}{RANDOM}")
    width, levels = config.cross_attention_dim, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(config)
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=config.in_channels,
            norm_num_groups=8,
        )
        tokenizer = minilm_tokenizer(CLIP_TOKENS)
        text_encoder = BertModel(
            transformers.BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                num_hidden_layers=1,
                num_attention_heads=max(1, width // 64),
                intermediate_size=width,
                max_position_embeddings=CLIP_TOKENS,
            )
        )
    prediction = "v_prediction" if shape == "sd21" else "epsilon"
    scheduler = PNDMScheduler(**SCHEDULE, prediction_type=prediction)
    return assemble(vae, text_encoder, tokenizer, unet, scheduler)


# ---- folders ----


def load_folder(name: str) -> tuple[StableDiffusionPipeline, dict[str, Any]]:
    """A pipeline by folder or hub id, and what `teacher.json` beside it says, if there is one.

    Raises:
        UserError: it is not there, incomplete, damaged, pickled, or of an unsupported kind.
    """
    otherwise = f"take one of: {', '.join(TEACHERS)}"
    folder = model_folder(name, OPTION, ["*.json", "tokenizer/*"], otherwise)
    kinds, scheduler = check_layout(folder), load_scheduler(folder)
    files = [
        f"{part}/{stem}{end}"
        for part, stem in WEIGHTS.items()
        for end in (".safetensors", "-0*.safetensors")
    ]
    folder = model_folder(name, OPTION, ["*.json", "tokenizer/*", *files], otherwise)
    parts = {part: load_part(folder, part, kind) for part, kind in kinds.items()}
    unet, vae, text_encoder = (parts[part] for part in CLASSES)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries raise all kinds over a damaged file
        raise damaged(folder / "tokenizer", error) from None
    longest = text_encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    for what, wanted, given in (
        ("text states", unet.config.cross_attention_dim, text_encoder.config.hidden_size),
        ("latents", unet.config.in_channels, vae.config.latent_channels),
        ("outputs", unet.config.out_channels, vae.config.latent_channels),
    ):
        if wanted != given:
            raise UserError(
                f"{OPTION} {folder}: its parts do not fit together: the U-Net's {what} have width "
                f"{wanted}, the other parts' {given}; {SUPPORTED}"
            )
    settings = {"guidance_scale": GUIDANCE, "resolution": None}
    beside = folder / "teacher.json"
    settings |= read_object(beside) if beside.exists() else {}
    guidance, pixels = settings["guidance_scale"], settings["resolution"]
    if not isinstance(guidance, int | float) or not isinstance(pixels, int | None):
        raise damaged(beside, "guidance_scale must be a number, resolution a number of pixels")
    return assemble(vae, text_encoder, tokenizer, unet, scheduler), settings


def check_layout(folder: Path) -> dict[str, str]:
    """The classes of the parts that have weights.

    Raises:
        UserError: the folder is not a whole pipeline of a supported kind.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(
            f"{OPTION} {folder} is no pipeline: it holds no model_index.json; give a folder that "
            f"`hf download {STABLE_DIFFUSION} --local-dir D` or pipe.save_pretrained(D) made"
        )
    index = read_object(path)
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UserError(f"{OPTION} {folder} holds a {index.get('_class_name')}; {SUPPORTED}")
    kinds = {}
    for part, classes in CLASSES.items():
        entry = index.get(part)
        kinds[part] = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "(nothing)"
        if kinds[part] not in classes:
            raise UserError(
                f"{OPTION} {folder}: its {part} is a {kinds[part]}, not a "
                f"{' or '.join(classes)}; {SUPPORTED}"
            )
    files = [f"{part}/config.json" for part in CLASSES]
    for file in (*files, "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"):
        if not (folder / file).is_file():
            raise incomplete(folder, file)
    refuse_conditions(read_object(folder / "unet" / "config.json"), f"{OPTION} {folder}")
    return kinds


def refuse_conditions(config: Any, who: str) -> None:
    """Raises `UserError` for a U-Net that asks for more than text states, such as SDXL's."""
    asked = [f"{key} {config[key]}" for key in CONDITIONS if config.get(key)]
    if asked:
        raise UserError(
            f"{who}: its U-Net is conditioned on more than text states ({', '.join(asked)}), as "
            f"SDXL's is; {SUPPORTED}"
        )


def load_part(folder: Path, part: str, kind: str) -> Any:
    """The U-Net, autoencoder or text encoder below `folder`, with all of its weights.

    Weights are taken from the full-precision file, or from the fp16 variant where it is alone.
    """
    stem = WEIGHTS[part]
    variants = {
        f"{stem}.safetensors": None,
        f"{stem}.safetensors.index.json": None,
        f"{stem}.fp16.safetensors": "fp16",
    }
    there = [file for file in variants if (folder / part / file).is_file()]
    if not there:
        refuse_pickles(folder / part, OPTION)
        raise incomplete(folder, f"{part}/{stem}.safetensors")
    library = transformers if part == "text_encoder" else diffusers
    own: dict[str, Any] = {"AutoencoderDC": AutoencoderDC, "BertModel": BertModel}
    try:
        model, info = (own.get(kind) or getattr(library, kind)).from_pretrained(
            folder / part,
            variant=variants[there[0]],
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise all kinds over a damaged file
        raise damaged(folder / part, error) from None
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise damaged(folder / part, f"it lacks {len(lacking)} weights, such as {lacking[0]}")
    return model.float()


def load_scheduler(folder: Path) -> PNDMScheduler:
    """PNDM with the folder's noise schedule. Raises `UserError` where PNDM cannot follow it."""
    config = read_object(folder / "scheduler" / "scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    known = "beta_schedule" in config and prediction in ("epsilon", "v_prediction")
    if not known or config.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{OPTION} {folder}: its scheduler ({config.get('_class_name')}, {prediction}) is none "
            f"that PNDM can follow; {SUPPORTED}"
        )
    return PNDMScheduler.from_config(config, skip_prk_steps=True)


def read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise damaged(path, "it is no JSON object")
    return value


def incomplete(folder: Path, file: str) -> UserError:
    return UserError(
        f"{OPTION} {folder} is incomplete: {file} is missing; fetch it again, for instance with "
        f"`hf download {STABLE_DIFFUSION} --local-dir D`"
    )


def damaged(place: Path, why: Any) -> UserError:
    reason = " ".join(str(why).split())[:160]
    return UserError(f"{OPTION}: {place} could not be loaded ({reason}); fetch it again")
