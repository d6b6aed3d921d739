"""The model card of a published run, in the hub's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.hub import HUB_NAME, SDXL_BASE, STABLE_DIFFUSION

LICENSES = {
    "pocket": "cc-by-sa-4.0",
    STABLE_DIFFUSION: "openrail++",
    SDXL_BASE: "openrail++",
}
CARD = """---
{front}
---

# {title}

A text-to-image model that was cut out of the U-Net of `{teacher}`: {what}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
{usage}

## Experts

{table}

The dense U-Net has {dense:.3g} G MACs for one image and one step.

## How it was made

Pruned by APTP (method `{method}`) on {prompts:,} prompts of `{target}`, to a mean of {budget:g} of
the MACs, depth `{depth}`, seed {seed}. Images are {resolution} pixels a side. A guidance of
{guidance:g} and 25 steps of PNDM suit the model.

The method: [Not All Prompts Are Made Equal](https://arxiv.org/abs/2406.12042), ICLR 2025.

## Limits

It knows no more than its teacher, and does best on prompts like those of `{target}`. There is no
safety checker. The licences of the teacher and of the data hold for this model too; the Python
files are under the MIT licence.
"""
MIXTURE = """result = pipe(["a giraffe", "a slice of pizza"])
result.images[0].save("giraffe.png")  # result.experts: which expert made each image
```

`pipe.load_lora_weights` takes LoRAs of the teacher. `pipe.expert(0)` is one expert's U-Net, for any
other pipeline of diffusers, such as
`StableDiffusionControlNetPipeline.from_pipe(pipe, unet=pipe.expert(0), controlnet=...)`.
IP-Adapters are not supported. `hf upload OWNER/NAME FOLDER` puts the folder on the hub."""
SINGLE = """image = pipe("a giraffe", guidance_scale={guidance:g}, num_inference_steps=25).images[0]
```

LoRAs and ControlNets of the teacher fit it. IP-Adapters are not supported."""
HEADER = """| expert | MACs ratio | parameters | share of prompts | frequent words | fine-tuned |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Published:
    """What the card says beside the run's own files."""

    prompts: int  # that the run was pruned on
    tuned: list[bool]  # whether each expert was fine-tuned
    expert: int | None  # the one that is published; None for all
    guidance: float
    resolution: int
    license: str | None  # as the hub calls it; the teacher's, where it is known, if absent


def expert_row(expert: dict[str, Any], tuned: bool) -> str:
    cells = (
        str(expert["id"]),
        f"{expert['macs_ratio']:.2f}",
        f"{expert['params'] / 1e6:.1f} M",
        f"{expert['usage_train']:.2f}",
        ", ".join(expert["words"]),
        "yes" if tuned else "no",
    )
    return f"| {' | '.join(cells)} |"


def model_card(summary: dict[str, Any], settings: dict[str, Any], about: Published) -> str:
    """`README.md` of a published run.

    Args:
        summary, settings: the run's summary.json and config.json.
    """
    named, N, only = summary["teacher"], summary["num_experts"], about.expert
    on_hub = HUB_NAME.fullmatch(named)
    teacher = named if on_hub else Path(named).name  # where a folder lies is nobody's business
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": about.license or LICENSES.get(teacher, "other"),
        "tags": "[pruning, mixture-of-experts]" if only is None else "[pruning]",
    }
    if on_hub:
        front["base_model"] = teacher
    experts, ratio = summary["experts"], summary["macs_ratio_mean"]
    what, usage = f"{N} experts, one of which makes the image of a prompt", MIXTURE
    if only is not None:
        experts, ratio = [experts[only]], experts[only]["macs_ratio"]
        what, usage = f"expert {only} of {N}", SINGLE.format(guidance=about.guidance)
    return CARD.format(
        front="\n".join(f"{key}: {value}" for key, value in front.items()),
        title=f"{Path(teacher).name} at {ratio:.2f} of its MACs",
        teacher=teacher,
        what=what,
        usage=usage,
        table=HEADER + "\n".join(expert_row(row, about.tuned[row["id"]]) for row in experts),
        dense=summary["macs_dense"] / 1e9,
        method=summary.get("method", "aptp"),
        prompts=about.prompts,
        target=summary["target"],
        budget=summary["budget"],
        depth=settings["depth"],
        seed=settings["seed"],
        resolution=about.resolution,
        guidance=about.guidance,
    )
