"""Runs without training: random codes and weights, in the files that a real run leaves."""

from pathlib import Path
from typing import Any

import torch
from small_pipelines import write_pipeline

from common.files import save_tensors, write_json
from gates import binarize
from macs import measure_macs
from prune_unet import cut_expert, find_units, save_expert
from router import PromptEncoder, PromptRouter
from run import expert_path, shared_path
from sample import APTPPipeline
from sharing.pipeline import RoutedPipeline, RoutedXLPipeline
from sharing.prompt_router import PromptRouter as PublishedRouter
from sharing.pruned_unet import RoutedUNet
from sharing.publish import write_router, write_unet
from teacher.model import load_teacher

EXPERTS = 3
PROMPT_DIM = 384  # of all-MiniLM
PROMPTS = ("a giraffe", "a dog", "a red heart", "a slice of pizza", "two cats", "the moon")


def write_run(folder: Path, teacher_name: str, depth: str = "all", shared: bool = False) -> Path:
    """A run on any teacher: of three experts one is cut, one fine-tuned, one refitted.

    Args:
        shared: whether the first is cut out of shared weights.
    """
    teacher = load_teacher(teacher_name)
    space = find_units(teacher.unet, depth)
    draw = torch.Generator().manual_seed(5)
    codes = binarize(torch.randn(EXPERTS, space.size, generator=draw) + 0.4, space)
    router = PromptRouter(PROMPT_DIM, space.size, EXPERTS)
    for tensor in router.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    z = PromptEncoder("minilm")(PROMPTS)
    router.mean_z.copy_(z.mean(0))
    router.start_codes(z)  # so that no expert is without prompts
    name = {"prompt_encoder": "minilm"}
    save_tensors(folder / "router.safetensors", router.state_dict(), router.settings() | name)
    save_tensors(folder / "codes.safetensors", {"codes": codes.byte()}, {"depth": depth})
    sizes = {"latent_size": teacher.latent_size, "text_tokens": teacher.text_tokens}
    macs = measure_macs(teacher.unet, space, **sizes)
    for i in (1, 2):  # the second is fine-tuned, the third refitted: its file holds some weights
        own = cut_expert(teacher.unet, codes[i], space)
        for weight in own.parameters():
            weight.data.add_(0.02 * torch.randn(weight.shape, generator=draw))
        parts = ("",) if i == 1 else ("conv2.weight", "to_out.0.weight")
        tensors = {k: weight for k, weight in own.state_dict().items() if k.endswith(parts)}
        save_expert(expert_path(folder, i), tensors, teacher.unet.config, codes[i], space)
    if shared:  # expert 0 has no file of its own
        dense = {
            name: weight + 0.02 * torch.randn(weight.shape, generator=draw)
            for name, weight in teacher.unet.state_dict().items()
        }
        save_tensors(shared_path(folder), dense, {"codes": codes.int().tolist()})
    write_json(folder / "assignments.json", {"train": [0, 1, 2, 0], "validation": [0]})
    settings = {"target": "emoji", "data_dir": None, "limit": 4, "seed": 0, "depth": depth}
    write_json(folder / "config.json", settings)
    experts = [
        {
            "id": i,
            "macs_ratio": macs(code).item() / macs.dense,
            "params": 1000 + i,
            "usage_train": 0.25,
            "words": [f"word{i}", "other"],
        }
        for i, code in enumerate(codes)
    ]
    summary = {
        "target": "emoji",
        "teacher": teacher_name,
        "resolution": teacher.resolution,
        "macs_resolution": teacher.resolution,
        "budget": 0.7,
        "num_experts": EXPERTS,
        "macs_dense": macs.dense,
        "macs_ratio_mean": 0.69,
        "usage_train": [0.5, 0.25, 0.25],
        "usage_validation": [1, 0, 0],
        "experts": experts,
    }
    write_json(folder / "summary.json", summary)
    return folder


def tiny_run(place: Path, layout: str, depth: str, shared: bool = False) -> Path:
    """A run of a tiny Stable Diffusion (`sd1`, `sd2`) or SDXL (`sdxl`)."""
    teacher = place / f"teacher-{layout}"
    if not teacher.exists():
        write_pipeline(teacher, layout)
    return write_run(place / f"run-{layout}-{depth}", str(teacher), depth, shared)


def routed_pipeline(run: Path, place: Path) -> Any:
    """The published pipeline of a run, made here and now; `place` is a new folder."""
    pipeline = APTPPipeline.from_pretrained(run, "cpu")
    write_router(pipeline, place, by_name=False)
    write_unet(pipeline, place / "unet", expert=None)
    components = {k: v for k, v in pipeline.teacher.pipe.components.items() if k != "unet"}
    of_class = RoutedXLPipeline if pipeline.teacher.reads_sizes else RoutedPipeline
    router = PublishedRouter.from_pretrained(place)
    pipe = of_class(**components, unet=RoutedUNet.from_pretrained(place / "unet"), router=router)
    pipe.set_progress_bar_config(disable=True)
    return pipe
