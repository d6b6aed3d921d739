"""Tiny Stable Diffusions in the published layouts: random weights, a tokenizer of letters."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LAYOUTS
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common.files import write_json
from teacher.pipelines import SCHEDULE

LAYOUT_NAMES = ("sd1", "sd2", "sdxl")
SCHEDULERS = {  # the published ones
    "sd1": {"_class_name": "PNDMScheduler", "clip_sample": False, **SCHEDULE},
    "sd2": {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        **SCHEDULE,
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
        **SCHEDULE,
    },
}


def write_tokenizer(folder: Path, pad: str) -> None:
    """A CLIP tokenizer in the files of old: every letter, and a few merges."""
    letters = [chr(code) for code in range(33, 127)]
    merges = ["g i", "gi r", "a f", "af f", "aff e</w>", "gir affe</w>", "d o", "do g"]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    special["unk_token"] = "<|endoftext|>"
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", special | settings)


def text_config(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=16,
        bos_token_id=196,
        eos_token_id=197,
    )


def write_pipeline(folder: Path, layout: str) -> Path:
    """A tiny Stable Diffusion or SDXL in the published layout, random weights."""
    torch.manual_seed(7)
    xl = layout == "sdxl"
    write_tokenizer(folder / "tokenizer", "!" if layout == "sd2" else "<|endoftext|>")
    unet = UNet2DConditionModel(**LAYOUTS[layout])
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    text = CLIPTextModel(text_config(8 if xl else 16, 2))
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    if xl:
        write_tokenizer(folder / "tokenizer_2", "!")
        parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(8, 3))
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    file = folder / "text_encoder" / "model.safetensors"  # the published names of its weights
    states = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
    states["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(states, file, {"format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS[layout])
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.8.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", SCHEDULERS[layout]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if xl:
        del index["feature_extractor"], index["safety_checker"]
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    write_json(folder / "model_index.json", index)
    return folder


def add_half_precision(folder: Path) -> None:
    """An fp16 variant beside each file of weights."""
    for file in folder.glob("*/*.safetensors"):
        states = {name: state.half() for name, state in load_file(file).items()}
        save_file(states, file.with_suffix(".fp16.safetensors"), {"format": "pt"})


def put_in_hub_cache(folder: Path, cache: Path, name: str, here: Callable[[str], bool]) -> None:
    """A folder as the hub's copy of a model, of which some files were not fetched.

    Args:
        here: whether a file, by its path in the folder, was fetched.
    """
    trees = pytest.importorskip("huggingface_hub._tree_cache")
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    listing = {name: trees.TreeCacheEntry(path.stat().st_size, "0") for name, path in names.items()}
    trees.write_tree_cache(str(repository), commit, listing)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in filter(here, names):
        place = repository / "snapshots" / commit / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(names[name], place)
