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
from common.hub import STABLE_DIFFUSION, fetching, model_folder, refuse_pickles
from teacher.parts import AutoencoderDC, BertModel
from teacher.shapes import TEACHERS, check_unet, text_widths

Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

OPTION = "--teacher"
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
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
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

    Args:
        dtype: of the parts' weights.

    Raises:
        UserError: it is not there, incomplete, damaged, pickled, or of an unsupported kind.
    """
    otherwise = f"take one of: {', '.join(TEACHERS)}"
    configs = [f"{part}/config.json" for part in CLASSES[SDXL]]
    texts = [f"{part}/*" for part in ("scheduler", *TOKENIZERS.values())]
    files = ["model_index.json", "teacher.json", *configs, *texts]
    folder = model_folder(name, OPTION, files, otherwise)
    index = read_config(folder, "model_index.json")
    classes = check_layout(folder, index)
    kind, scheduler = index["_class_name"], load_scheduler(folder)
    if not Path(name).expanduser().is_dir():
        with fetching(name, OPTION, otherwise):
            folder = fetch_weights(name, kind)
    parts: dict[str, Any] = {"scheduler": scheduler}
    for part, of_class in classes.items():
        full = part == "vae" and stays_float32(kind, read_config(folder, "vae/config.json"))
        parts[part] = load_part(folder, part, of_class, torch.float32 if full else dtype)
        if part in TOKENIZERS:
            parts[TOKENIZERS[part]] = load_tokenizer(folder, TOKENIZERS[part], parts[part])
    check_fit(folder, parts)
    settings = read_config(folder, "teacher.json") if (folder / "teacher.json").exists() else {}
    guidance, pixels = settings.get("guidance_scale", 0), settings.get("resolution")
    if not isinstance(guidance, int | float) or not isinstance(pixels, int | None):
        why = "guidance_scale must be a number, resolution a number of pixels"
        raise damaged(folder / "teacher.json", why)
    if kind == SDXL:
        parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    return assemble(kind, **parts), settings


def fetch_weights(name: str, kind: str) -> Path:
    """The hub's copy of a whole pipeline: in full precision or, where it is not there, in fp16."""
    pipeline, options = getattr(diffusers, kind), dict.fromkeys(UNUSED)
    try:
        return Path(pipeline.download(name, use_safetensors=True, **options))
    except OSError as error:
        # diffusers' word for files that are not there; a failing network is of another type
        if type(error) is not OSError or error.errno is not None:
            raise
        try:
            half = pipeline.download(name, use_safetensors=True, variant="fp16", **options)
        except (OSError, ValueError):
            raise error from None
        return Path(half)


# ---- what a folder says of itself ----


def check_layout(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The classes of the parts that have weights.

    Args:
        index: the folder's model_index.json.

    Raises:
        UserError: the folder is not a whole pipeline of a supported kind.
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
    if index.get("image_encoder", [None, None]) != [None, None]:
        raise unsupported(
            folder, "it is prompted by images too (image_encoder), as IP adapters are"
        )
    configs = {part: read_config(folder, f"{part}/config.json") for part in classes}
    check_unet(configs["unet"], f"{OPTION} {folder}")
    added = configs["unet"].get("addition_embed_type")
    if (added == "text_time") != (kind == SDXL):
        raise unsupported(folder, f"its U-Net's addition_embed_type is {added}, unlike a {kind}'s")
    if configs["vae"].get("latents_mean"):
        raise unsupported(folder, "its autoencoder shifts latents (latents_mean)")
    return classes


def check_fit(folder: Path, parts: dict[str, Any]) -> None:
    """Raises `UserError` where two parts differ in a width, or in the tokens that they know."""
    unet, latents = parts["unet"].config, parts["vae"].config.latent_channels
    encoders = {name: parts[name].config for name in TOKENIZERS if name in parts}
    states, pooled = text_widths(unet)
    for what, wanted, given in (
        ("text states", states, sum(encoder.hidden_size for encoder in encoders.values())),
        ("pooled text", pooled, getattr(encoders.get("text_encoder_2"), "projection_dim", 0)),
        ("latents", unet.in_channels, latents),
        ("outputs", unet.out_channels, latents),
    ):
        if wanted != given:
            raise unsupported(
                folder,
                f"its parts do not fit together: the U-Net's {what} have width {wanted}, the "
                f"other parts' {given}",
            )
    for name, encoder in encoders.items():
        known = 1 + max(parts[TOKENIZERS[name]].get_vocab().values())
        if known > encoder.vocab_size:
            raise unsupported(
                folder,
                f"its parts do not fit together: its {TOKENIZERS[name]} gives numbers up to "
                f"{known - 1}, its {name} knows {encoder.vocab_size} tokens",
            )


def stays_float32(kind: str, vae: Any) -> bool:
    """Whether an autoencoder works in float32 alone, as SDXL's says of itself (`force_upcast`).

    Those of Stable Diffusion 1.x and 2.x say so too, by default, and their pipeline ignores it.
    """
    return kind == SDXL and bool(vae.get("force_upcast", True))


# ---- parts ----


def load_part(folder: Path, part: str, of_class: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The U-Net, autoencoder or text encoder in `folder / part`, with all of its weights.

    Where fp16 files are alone, they are taken.
    """
    weights = [path.name for path in (folder / part).glob("*.safetensors")]
    if not weights:
        refuse_pickles(folder / part, OPTION)
        raise incomplete(folder, f"{part}/*.safetensors")
    half = all(".fp16" in name for name in weights)
    # transformers has renamed this option, and diffusers is about to
    precision = "dtype" if part in TOKENIZERS else "torch_dtype"
    try:
        model, info = of_class.from_pretrained(
            folder / part,
            variant="fp16" if half else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{precision: dtype},
        )
    except Exception as error:  # the libraries raise all kinds over a damaged file
        raise damaged(folder / part, error) from None
    if lacking := sorted(info["missing_keys"]):
        raise damaged(folder / part, f"it lacks {len(lacking)} weights, such as {lacking[0]}")
    return model


def load_tokenizer(folder: Path, name: str, text_encoder: Any) -> Any:
    """A tokenizer that gives no more tokens than its encoder takes."""
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name, **options)
    except Exception as error:  # the libraries raise all kinds over a damaged file
        raise damaged(folder / name, error) from None
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
    return PNDMScheduler.from_config(config, skip_prk_steps=True)


def read_config(folder: Path, file: str) -> dict[str, Any]:
    """A JSON object. Raises `UserError` where the file is missing or holds something else."""
    if not (folder / file).is_file():
        raise incomplete(folder, file)
    value = read_json(folder / file)
    if not isinstance(value, dict):
        raise damaged(folder / file, "it is no JSON object")
    return value


def incomplete(folder: Path, file: str) -> UserError:
    return UserError(
        f"{OPTION} {folder} is incomplete: {file} is missing; fetch it again, for instance with "
        f"`hf download {STABLE_DIFFUSION} --local-dir D`"
    )


def unsupported(folder: Path, why: str) -> UserError:
    return UserError(f"{OPTION} {folder}: {why}; {SUPPORTED}")


def damaged(place: Path, why: Any) -> UserError:
    reason = " ".join(str(why).split())[:160]
    return UserError(f"{OPTION}: {place} could not be loaded ({reason}); fetch it again")
