"""The model card of a published run, in the hub's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.hub import HUB_NAME, SDXL_BASE, STABLE_DIFFUSION
from evaluation.tables import budget_text, latency_line
from sample import APTPPipeline

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

The dense U-Net has {dense:.3g} G MACs for one image and one step.{latency}{samples}

## How it was made

Pruned by APTP (method `{method}`) on {prompts:,} prompts of `{target}`, to a mean of
{budget}, depth `{depth}`, seed {seed}. Images are {resolution} pixels a side. A guidance of
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


def published_summary(summary: dict[str, Any], pipeline: APTPPipeline) -> dict[str, Any]:
    """What a run's summary.json says, and what only its pipeline knows.

    Of a teacher in a folder the name is told, not the place.
    """
    name, teacher = summary["teacher"], pipeline.teacher
    return summary | {
        "teacher": name if HUB_NAME.fullmatch(name) else Path(name).name,
        "guidance_scale": teacher.guidance_scale,
        "resolution": teacher.resolution,
        "experts": [
            row | {"tuned": pipeline.is_finetuned(row["id"])} for row in summary["experts"]
        ],
    }


def expert_cells(expert: dict[str, Any]) -> dict[str, str]:
    """An expert's row of the table, by column."""
    cells = {
        "expert": str(expert["id"]),
        "MACs ratio": f"{expert['macs_ratio']:.2f}",
        "parameters": f"{expert['params'] / 1e6:.1f} M",
        "share of prompts": f"{expert['usage_train']:.2f}",
        "frequent words": ", ".join(expert["words"]),
        "refitted or fine-tuned": "yes" if expert["tuned"] else "no",
    }
    if "latency_ratio" in expert:
        seconds = expert["latency_measured"] or expert["latency_predicted"]
        how = "measured" if expert["latency_measured"] else "predicted"
        cells["latency ratio"] = f"{expert['latency_ratio']:.2f}"
        cells["latency"] = f"{seconds * 1e3:.3g} ms, {how}"
    return cells


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same columns as a table of Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model_card(
    summary: dict[str, Any],
    settings: dict[str, Any],
    *,
    prompts: int,
    expert: int | None,
    license: str | None,
    samples: str | None,
) -> str:
    """`README.md` of a published run.

    Args:
        summary: of `published_summary`, with the published experts.
        settings: the run's config.json.
        prompts: how many the run was pruned on.
        expert: the one that is published; None for all.
        license: as the hub calls it; the teacher's, where it is known, if absent.
        samples: the file beside the card that shows images of all experts.
    """
    teacher, N, ratio = summary["teacher"], summary["num_experts"], summary["macs_ratio_mean"]
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": license or LICENSES.get(teacher, "other"),
        "tags": "[pruning, mixture-of-experts]" if expert is None else "[pruning]",
    }
    if HUB_NAME.fullmatch(teacher):
        front["base_model"] = teacher
    what, usage = f"{N} experts, one of which makes the image of a prompt", MIXTURE
    if expert is not None:
        ratio = summary["experts"][0]["macs_ratio"]
        what, usage = f"expert {expert} of {N}", SINGLE.format(guidance=summary["guidance_scale"])
    return CARD.format(
        front="\n".join(f"{key}: {value}" for key, value in front.items()),
        title=f"{Path(teacher).name} at {ratio:.2f} of its MACs",
        teacher=teacher,
        what=what,
        usage=usage,
        table=markdown_table([expert_cells(row) for row in summary["experts"]]),
        latency=f" The {latency_line(summary)}." if "latency" in summary else "",
        samples=f"\n\n![Images of each expert]({samples})" if samples else "",
        dense=summary["macs_dense"] / 1e9,
        method=summary.get("method", "aptp"),
        prompts=prompts,
        target=summary["target"],
        budget=budget_text(summary),
        depth=settings["depth"],
        seed=settings["seed"],
        resolution=summary["resolution"],
        guidance=summary["guidance_scale"],
    )
