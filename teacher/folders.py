"""A folder in the diffusers pipeline layout, checked and read part by part. App. E.1-E.2.

Supported are StableDiffusionPipeline (Stable Diffusion 1.x and 2.x, conditioned on text states
alone, with a CLIP or BERT text encoder) and StableDiffusionXLPipeline (SDXL's base model, with its
two CLIPs), as safetensors. Each part is loaded by the class named here, so no code of a folder is
ever run. Everything else is refused before weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import PNDMScheduler

from common.errors import UserError
from common.files import read_json
from common.hub import STABLE_DIFFUSION, model_folder, refuse_pickles
from teacher.parts import AutoencoderDC, BertModel
from teacher.shapes import CONDITIONS, text_widths

OPTION = "--teacher"

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"

CLASSES: dict[str, dict[str, tuple[str, ...]]] = {  # of the parts, as model_index.json names them
    SD: {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL", "AutoencoderDC"),
        "text_encoder": ("CLIPTextModel", "BertModel"),
    },
    SDXL: {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    },
}

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # the tokenizers' names end in the same way

NOTHING = "(nothing)"  # for a class, where there is no such part

SUPPORTED = "Stable Diffusion 1.x, 2.x and SDXL's base model are supported"


def tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


def stem_of(part: str) -> str:
    """The name of a part's weights, without its ending."""
    return "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"


def stays_float32(kind: str, vae: Any) -> bool:
    """Whether an autoencoder works in float32 alone, as SDXL's says of itself (`force_upcast`).

    Those of Stable Diffusion 1.x and 2.x say so too, by default, and their pipeline ignores it.
    """
    return kind == SDXL and bool(vae.get("force_upcast", True))


def read_pipeline(
    name: str, dtype: torch.dtype, otherwise: str
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A pipeline by folder or hub id: its class, its parts, and what `teacher.json` says of it.

    Args:
        dtype: of the parts' weights.
        otherwise: what else the option takes, for messages.

    Raises:
        UserError: it is not there, incomplete, damaged, pickled, or of an unsupported kind.
    """
    texts = ["*.json", "tokenizer/*", "tokenizer_2/*"]
    folder = model_folder(name, OPTION, texts, otherwise)
    (kind, classes), scheduler = check_layout(folder), load_scheduler(folder)
    files = [
        f"{part}/{stem_of(part)}{end}"
        for part in classes
        for end in (".safetensors", "-0*.safetensors")
    ]
    folder = model_folder(name, OPTION, [*texts, *files], otherwise)
    parts: dict[str, Any] = {"scheduler": scheduler}
    for part, of_class in classes.items():
        config = read_object(folder / part / "config.json")
        full = part == "vae" and stays_float32(kind, config)
        parts[part] = load_part(folder, part, of_class, torch.float32 if full else dtype)
    for part in classes:
        if part in TEXT_ENCODERS:
            parts[tokenizer_of(part)] = load_tokenizer(folder, tokenizer_of(part), parts[part])
    check_fit(folder, parts)
    if kind == SDXL:
        index = read_object(folder / "model_index.json")
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    beside = folder / "teacher.json"
    settings = read_object(beside) if beside.exists() else {}
    guidance, pixels = settings.get("guidance_scale", 0), settings.get("resolution")
    if not isinstance(guidance, int | float) or not isinstance(pixels, int | None):
        raise damaged(beside, "guidance_scale must be a number, resolution a number of pixels")
    return kind, parts, settings


def load_tokenizer(folder: Path, name: str, text_encoder: Any) -> Any:
    """A tokenizer that gives no more tokens than its encoder takes."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder / name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries raise all kinds over a damaged file
        raise damaged(folder / name, error) from None
    longest = text_encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def check_fit(folder: Path, parts: dict[str, Any]) -> None:
    """Raises `UserError` where the U-Net and the other parts differ in a width."""
    unet, latents = parts["unet"].config, parts["vae"].config.latent_channels
    encoders = [parts[name].config for name in TEXT_ENCODERS if name in parts]
    states, pooled = text_widths(unet)
    for what, wanted, given in (
        ("text states", states, sum(encoder.hidden_size for encoder in encoders)),
        ("pooled text", pooled, encoders[1].projection_dim if len(encoders) > 1 else 0),
        ("latents", unet.in_channels, latents),
        ("outputs", unet.out_channels, latents),
    ):
        if wanted != given:
            raise UserError(
                f"{OPTION} {folder}: its parts do not fit together: the U-Net's {what} have width "
                f"{wanted}, the other parts' {given}; {SUPPORTED}"
            )


def check_layout(folder: Path) -> tuple[str, dict[str, str]]:
    """The pipeline's class, and the classes of the parts that have weights.

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
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(f"{OPTION} {folder} holds a {kind}; {SUPPORTED}")
    kinds = {}
    for part, classes in CLASSES[kind].items():
        kinds[part] = class_in(index, part)
        if kinds[part] not in classes:
            raise UserError(
                f"{OPTION} {folder}: its {part} is a {kinds[part]}, not a "
                f"{' or '.join(classes)}; {SUPPORTED}"
            )
    if class_in(index, "image_encoder") != NOTHING:
        raise UserError(
            f"{OPTION} {folder} is prompted by images too (image_encoder), as an IP adapter is; "
            f"{SUPPORTED}"
        )
    files = [f"{part}/config.json" for part in kinds]
    files += [f"{tokenizer_of(p)}/tokenizer_config.json" for p in kinds if p in TEXT_ENCODERS]
    for file in (*files, "scheduler/scheduler_config.json"):
        if not (folder / file).is_file():
            raise incomplete(folder, file)
    check_conditions(kind, read_object(folder / "unet" / "config.json"), f"{OPTION} {folder}")
    if read_object(folder / "vae" / "config.json").get("latents_mean"):
        raise UserError(
            f"{OPTION} {folder}: its autoencoder shifts latents (latents_mean); {SUPPORTED}"
        )
    return kind, kinds


def class_in(index: dict[str, Any], part: str) -> str:
    """The class of a part by model_index.json; `NOTHING` where there is none."""
    entry = index.get(part)
    if isinstance(entry, list) and len(entry) == 2 and entry[1]:
        return str(entry[1])
    return NOTHING


def check_conditions(kind: str, config: Any, who: str) -> None:
    """Raises `UserError` for a U-Net that is conditioned on something else than its pipeline has.

    Args:
        kind: of the pipeline.
        config: of the U-Net.
        who: for the message.
    """
    wanted = {"addition_embed_type": "text_time"} if kind == SDXL else {}
    asked = {key: config[key] for key in CONDITIONS if config.get(key)}
    if asked != wanted:
        found = ", ".join(f"{key} {value}" for key, value in asked.items()) or "nothing else"
        needs = "text, pooled text and sizes" if kind == SDXL else "text states alone"
        raise UserError(
            f"{who}: its U-Net is conditioned on other things ({found}) than the {needs} of a "
            f"{kind}; {SUPPORTED}"
        )


def load_part(folder: Path, part: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The U-Net, autoencoder or text encoder below `folder`, with all of its weights.

    Weights are taken from the full-precision file, or from the fp16 variant where it is alone.
    """
    stem = stem_of(part)
    variants = {
        f"{stem}.safetensors": None,
        f"{stem}.safetensors.index.json": None,
        f"{stem}.fp16.safetensors": "fp16",
    }
    there = [file for file in variants if (folder / part / file).is_file()]
    if not there:
        refuse_pickles(folder / part, OPTION)
        raise incomplete(folder, f"{part}/{stem}.safetensors")
    is_text = part in TEXT_ENCODERS
    library = transformers if is_text else diffusers
    precision: dict[str, Any] = {"dtype" if is_text else "torch_dtype": dtype}
    own: dict[str, Any] = {"AutoencoderDC": AutoencoderDC, "BertModel": BertModel}
    try:
        model, info = (own.get(kind) or getattr(library, kind)).from_pretrained(
            folder / part,
            variant=variants[there[0]],
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **precision,
        )
    except Exception as error:  # the libraries raise all kinds over a damaged file
        raise damaged(folder / part, error) from None
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise damaged(folder / part, f"it lacks {len(lacking)} weights, such as {lacking[0]}")
    return model


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
