"""Loads published folders where this repository is not, and writes down what they give.

python elsewhere.py OUT FOLDER...
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

ALONE = 3  # prompts that are sampled one by one too
OPTIONS = {"num_inference_steps": 3, "output_type": "np"}


def main(out: Path, folders: list[Path]) -> None:
    assert all(importlib.util.find_spec(name) is None for name in ("sample", "sharing", "teacher"))
    prompts, found = json.loads((out / "prompts.json").read_text()), {}
    for folder in folders:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        for k, prompt in enumerate(prompts[:ALONE]):
            generator = torch.Generator().manual_seed(k)
            found[f"{folder.name}-{k}"] = pipe(prompt, generator=generator, **OPTIONS).images
        if not hasattr(pipe, "route"):
            continue
        generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
        result = pipe(prompts, generator=generators, **OPTIONS)
        found[f"{folder.name}-images"], found[f"{folder.name}-experts"] = (
            result.images,
            result.experts,
        )
    half = DiffusionPipeline.from_pretrained(
        folders[0], trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    assert half.route(prompts) == found[f"{folders[0].name}-experts"]
    np.savez(out / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
