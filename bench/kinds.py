"""Where a U-Net's seconds go, kind by kind, and which of them an expert saves.

    python -m bench.kinds                                      # the pocket teacher's shape
    python -m bench.kinds --unet sd21 --device cuda --precision fp16 --batch 2

Beside the dense U-Net stand experts of one budget of MACs that close widths alone (`none`), the
paper's layers or any layer too (`paper`, `all`); their codes come from random logits. Seconds are
those of PyTorch's profiler: of one CPU thread, or of the GPU's kernels. All take turns; what is
shown are medians over rounds.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from tabulate import tabulate
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from bench.costs import SEED, Variant, random_inputs, random_unet, run, seconds
from common.errors import UserError, command_line
from common.options import read_options
from common.processes import pick_device
from common.randomness import step_generator
from common.ranges import Budget, Count, Pixels, Precision, check
from latency import device_name, one_thread
from macs import measure_macs, meet_budget
from prune_unet import cut_expert, find_units
from teacher.model import PRECISIONS
from teacher.shapes import CLIP_TOKENS, PIXELS, load_shape

KINDS = {  # of operators of PyTorch; the first that fits
    "convolutions": r"conv",
    "attention": r"attention|softmax",
    "normalisation": r"norm",
    "matrix products": r"mm|matmul|linear",
    "activations": r"silu|gelu|sigmoid",
    "copies, upsampling": r"^cat|copy|clone|contiguous|upsample|fill|zero|empty|resize",
    "sums and products": r"^(add|mul|sub|div|exp|sin|cos|mean|pow|sqrt)_?$",
}
REST, BETWEEN, WHOLE = "the rest", "between kernels", "whole"


@dataclass(frozen=True)
class Config:
    """Profiles a U-Net and experts of it, kind of operator by kind of operator."""

    unet: str = "pocket"
    """sd21, sd21-base, sd15, sdxl, pocket, or a folder with a diffusers U-Net."""
    device: str = "auto"
    """auto, cpu (one thread), cuda."""
    precision: Precision = "fp32"
    """Of weights and inputs."""
    batch: Count = 1
    """Samples at once."""
    resolution: Pixels | None = None
    """Pixels a side; the U-Net's own if not given, at most 256 on a CPU, 768 on a GPU."""
    budget: Budget = 0.78
    """The experts' share of the dense MACs."""
    rounds: Count = 7
    """In each of which every U-Net has its turn."""


def kind_of(operator: str) -> str:
    """The kind of one of PyTorch's operators, such as `aten::addmm`."""
    name = operator.removeprefix("aten::")
    return next((kind for kind, words in KINDS.items() if re.search(words, name)), REST)


def seconds_by_kind(model: nn.Module, inputs: dict[str, Any], device: torch.device) -> Counter[str]:
    """Seconds of one forward, in all and by kind of operator.

    On a GPU operators' seconds are those of their kernels, and what is left of a forward without
    the profiler passes between kernels.
    """
    on_gpu, activities = device.type == "cuda", [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        run(model, inputs)
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:  # an operator; its kernels' time is told again
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[kind_of(event.key)] += own / 1e6
    whole = spent.total()
    if on_gpu:
        whole = seconds(lambda: run(model, inputs), device)
        spent[BETWEEN] = max(0.0, whole - spent.total())
    return spent + Counter({WHOLE: whole})


def with_experts(
    unet: UNet2DConditionModel, budget: float, latent_size: int
) -> dict[str, UNet2DConditionModel]:
    """A U-Net, `dense`, and an expert of each depth. Raises `UserError` for a budget too low."""
    found = {"dense": unet}
    for depth in ("none", "paper", "all"):
        space = find_units(unet, depth)
        macs = measure_macs(unet, space, latent_size=latent_size, text_tokens=CLIP_TOKENS)
        logits = torch.randn(1, space.size, generator=step_generator(SEED, "kinds"))
        code = meet_budget(logits, torch.ones(1), macs, budget)[0]
        found[depth] = cut_expert(unet, code, space)
    return found


def measure(cfg: Config) -> list[dict[str, Counter[str]]]:
    """Of each round and U-Net, what `seconds_by_kind` says. Raises `UserError`."""
    check(cfg)
    device = pick_device(cfg.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {cfg.device}: operators are timed on cpu and cuda")
    variant = Variant("forward", device.type, PRECISIONS[cfg.precision], cfg.batch)
    shape = load_shape(cfg.unet)
    own = min(PIXELS * shape.config.sample_size, variant.pixels)
    latent_size = (cfg.resolution or own) // PIXELS
    unet = random_unet(shape, device).to(variant.dtype)
    models = with_experts(unet, cfg.budget, latent_size)
    inputs, rounds = random_inputs(unet, variant, latent_size, device), []
    with one_thread():
        for _ in tqdm(range(cfg.rounds + 1), desc="rounds"):
            rounds.append({k: seconds_by_kind(v, inputs, device) for k, v in models.items()})
    return rounds[1:]  # the first warms up


def table(rounds: list[dict[str, Counter[str]]]) -> list[list[str]]:
    """Of each kind: the dense U-Net's seconds, their share of the whole, and what experts keep."""
    lines = []
    for kind in (*KINDS, REST, BETWEEN, WHOLE):
        kept = [taken for taken in rounds if taken["dense"][kind] > 0]
        if kept:
            dense = [taken["dense"][kind] for taken in kept]
            share = [taken["dense"][kind] / taken["dense"][WHOLE] for taken in kept]
            line = [kind, f"{median(dense) * 1e3:.2f} ms", f"{median(share):.3f}"]
            for name in list(rounds[0])[1:]:
                ratio = median(taken[name][kind] / taken["dense"][kind] for taken in kept)
                line.append(f"{ratio:.2f}")
            lines.append(line)
    return lines


def main() -> None:
    cfg = read_options(Config, __doc__)
    rounds, device = measure(cfg), device_name(str(pick_device(cfg.device)))
    print(f"{cfg.unet}, {device}; experts of {cfg.budget:g} of its MACs")
    heads = ["kind", "dense", "share", *(f"depth {name}" for name in list(rounds[0])[1:])]
    print(tabulate(table(rounds), heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    command_line(main)
