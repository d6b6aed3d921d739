"""A teacher's pipeline from a folder in the diffusers layout, or the hub. App. E.1-E.2.

Supported are Stable Diffusion 1.x and 2.x, conditioned on text states alone, and SDXL's base model,
as safetensors. diffusers and transformers load each part, by a class that is named here: so no code
of a folder is run, and a weight that is missing is noticed, which a pipeline's own
`from_pretrained` does not tell. Images are sampled with PNDM, as in App. E.2, and the folder's
noise schedule. The safety checker and the watermark are left out, because images are generated for
measuring.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from common.errors import UserError
from common.files import read_json
from common.hub import STABLE_DIFFUSION, NotCached, model_folder
from teacher.parts import AutoencoderDC, BertModel
from teacher.shapes import TEACHERS, check_unet, text_widths

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

OPTION = "--teacher"
FETCH = f"fetch it again, for instance with `hf download {STABLE_DIFFUSION} --local-dir D`"
SUPPORTED = "Stable Diffusion 1.x, 2.x and SDXL's base model are supported"
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
CLASSES: dict[str, dict[str, tuple[Any, ...]]] = {  # pipeline -> its parts -> what they may be
    SD: {
        "unet": (UNet2DConditionModel,),
        "vae": (AutoencoderKL, AutoencoderDC),
        "text_encoder": (CLIPTextModel, BertModel),
    },
    SDXL: {
        "unet": (UNet2DConditionModel,),
        "vae": (AutoencoderKL,),
        "text_encoder": (CLIPTextModel,),
        "text_encoder_2": (CLIPTextModelWithProjection,),
    },
}
LIBRARIES = ("diffusers", "transformers", "teacher.parts")  # as model_index.json names them
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# files of weights on the hub, without other versions such as `non_ema`
FULL = ("*model.safetensors", "*model-0*.safetensors", "*.safetensors.index.json")
HALF = ("*model.fp16.safetensors", "*model.fp16-0*.safetensors", "*.safetensors.index.fp16.json")
LEFT_OUT: dict[str, dict[str, Any]] = {
    SD: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    SDXL: {"add_watermarker": False},
}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")  # the schedules that PNDM knows


def assemble(kind: str, **parts: Any) -> Pipeline:
    """A pipeline of the class `kind`, of `SD` or `SDXL`."""
    # the pipeline would warn that MiniLM is not CLIP, and list the tokens that it cut off
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
    pipe = getattr(diffusers, kind)(**parts, **LEFT_OUT[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_folder(name: str, dtype: torch.dtype = torch.float32) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline by folder or hub id, and what `teacher.json` beside it says, if there is one.

    Raises `UserError` where it is not there, incomplete, damaged, pickled or not supported.
    """
    otherwise = f"take one of: {', '.join(TEACHERS)}"

    def files(*patterns: str) -> Path:
        return model_folder(name, OPTION, patterns, otherwise)

    configs = [f"{part}/config.json" for part in CLASSES[SDXL]]
    others = [f"{part}/*" for part in ("scheduler", *TOKENIZERS.values())]
    folder = files("model_index.json", "teacher.json", *configs, *others)
    index = read_config(folder, "model_index.json")
    classes = check_layout(folder, index)
    kind = index["_class_name"]
    parts: dict[str, Any] = {"scheduler": load_scheduler(folder)}

    def lacking() -> list[str]:
        return [part for part in classes if not list((folder / part).glob("*.safetensors"))]

    try:
        files(*(f"{part}/{file}" for part in classes for file in FULL))
        if rest := lacking():
            files(*(f"{part}/{file}" for part in rest for file in HALF))
    except NotCached:  # fp16 will do
        if lacking():
            raise
    for part, of_class in classes.items():
        full = part == "vae" and stays_float32(kind, read_config(folder, "vae/config.json"))
        parts[part] = load_part(folder, part, of_class, torch.float32 if full else dtype)
        if part in TOKENIZERS:
            parts[TOKENIZERS[part]] = load_tokenizer(folder, TOKENIZERS[part], parts[part])
    check_fit(folder, parts)
    if kind == SDXL:
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    settings = read_config(folder, "teacher.json") if (folder / "teacher.json").exists() else {}
    return assemble(kind, **parts), settings


# ---- what a folder says of itself ----


def check_layout(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The classes of the parts that have weights, by the folder's model_index.json.

    Raises `UserError` where the folder is not a whole pipeline of a supported kind.
    """
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise unsupported(folder, f"it holds a {kind}")
    classes = {}
    for part, allowed in CLASSES[kind].items():
        entry = index.get(part)
        library, found = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        known = {of_class.__name__: of_class for of_class in allowed}
        if library not in LIBRARIES or found not in known:
            what = f"{library}.{found}" if found else "(nothing)"
            raise unsupported(folder, f"its {part} is a {what}, not a {' or '.join(known)}")
        classes[part] = known[found]
        if part in TOKENIZERS:
            read_config(folder, f"{TOKENIZERS[part]}/tokenizer_config.json")
    unet, vae = (read_config(folder, f"{part}/config.json") for part in ("unet", "vae"))
    check_unet(unet, f"{OPTION} {folder}")
    added = unet.get("addition_embed_type")
    if (added == "text_time") != (kind == SDXL):
        raise unsupported(folder, f"its U-Net's addition_embed_type is {added}, unlike a {kind}'s")
    if vae.get("latents_mean"):
        raise unsupported(folder, "its autoencoder shifts latents (latents_mean)")
    return classes


def check_fit(folder: Path, parts: dict[str, Any]) -> None:
    """Raises `UserError` where two parts differ in a width."""
    unet, latents = parts["unet"].config, parts["vae"].config.latent_channels
    states, pooled = text_widths(unet)
    width = sum(parts[name].config.hidden_size for name in TOKENIZERS if name in parts)
    second = parts["text_encoder_2"].config.projection_dim if "text_encoder_2" in parts else 0
    pairs = [
        ("its U-Net's text states", states, "its text encoders give", width),
        ("its U-Net's pooled text", pooled, "its second text encoder gives", second),
        ("its U-Net's latents", unet.in_channels, "its autoencoder's are", latents),
        ("its U-Net's outputs", unet.out_channels, "its autoencoder's latents are", latents),
    ]
    for what, wanted, other, given in pairs:
        if wanted != given:
            raise unsupported(folder, f"{what} have width {wanted}, and {other} {given}")


def stays_float32(kind: str, vae: Any) -> bool:
    """Whether an autoencoder works in float32 alone, as SDXL's says of itself (`force_upcast`).

    Those of Stable Diffusion 1.x and 2.x say so too, by default, and their pipeline ignores it.
    """
    return kind == SDXL and bool(vae.get("force_upcast", True))


# ---- parts ----


def load_part(folder: Path, part: str, of_class: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The U-Net, autoencoder or text encoder in `folder / part`, with all of its weights."""
    weights = [path.name for path in (folder / part).glob("*.safetensors")]
    if not weights:
        raise damaged(folder / part, "holds no safetensors, and pickles are not read")
    half = all(".fp16" in name for name in weights)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    options["variant"] = "fp16" if half else None
    # transformers has renamed this option
    options["dtype" if part in TOKENIZERS else "torch_dtype"] = dtype
    model, info = load(of_class, folder / part, **options)
    if lacking := sorted(info["missing_keys"]):
        raise damaged(folder / part, f"lacks {len(lacking)} weights, such as {lacking[0]}")
    return model


def load_tokenizer(folder: Path, name: str, text_encoder: Any) -> Any:
    """A tokenizer that gives no more tokens than its encoder takes."""
    tokenizer = load(transformers.AutoTokenizer, folder / name, trust_remote_code=False)
    longest = text_encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def load_scheduler(folder: Path) -> PNDMScheduler:
    """PNDM with the folder's noise schedule. Raises `UserError` where PNDM cannot follow it."""
    config = read_config(folder, "scheduler/scheduler_config.json")
    prediction = config.get("prediction_type", "epsilon")
    known = config.get("beta_schedule") in BETAS and prediction in ("epsilon", "v_prediction")
    if not known or config.get("rescale_betas_zero_snr"):
        what = f"{config.get('_class_name')}, {prediction}"
        raise unsupported(folder, f"its scheduler ({what}) is none that PNDM can follow")
    # other spacings are not multiples of the step by which PNDM goes down
    return PNDMScheduler.from_config(config, skip_prk_steps=True, timestep_spacing="leading")


def load(of_class: Any, place: Path, **options: Any) -> Any:
    """What lies at `place`, by its class. Raises `UserError` where it is damaged."""
    try:
        return of_class.from_pretrained(place, local_files_only=True, **options)
    except Exception as error:  # the libraries raise all kinds over a damaged file
        reason = " ".join(str(error).split())[:160]
        raise damaged(place, f"could not be loaded ({reason})") from None


def read_config(folder: Path, file: str) -> dict[str, Any]:
    """A JSON object. Raises `UserError` where the file is missing or holds something else."""
    if not (folder / file).is_file():
        raise damaged(folder / file, "is missing")
    value = read_json(folder / file, FETCH)
    if not isinstance(value, dict):
        raise damaged(folder / file, "is no JSON object")
    return value


def damaged(place: Path, what: str) -> UserError:
    return UserError(f"{OPTION}: {place} {what}; {FETCH}")


def unsupported(folder: Path, why: str) -> UserError:
    return UserError(f"{OPTION} {folder}: {why}; {SUPPORTED}")
