"""What a run will take, before a GPU is rented: `python train.py --dry-run`. App. E.2.

Everything follows from exact MACs and the numbers of steps. A multiply-accumulate is two floating
point operations. For an image, pruning runs the teacher forward, the gated U-Net forward, and its
backward pass, which costs as much as a forward since the weights are frozen: three forwards. With
checkpointing it is four. Fine-tuning trains weights: the teacher forward, the expert forward, and
twice the expert's forward for its backward pass. Autoencoder and text encoder are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import finetune
from gates import ArchSpace
from macs import check_budget, example_inputs, measure_macs, skeleton
from teacher import PRECISIONS
from unets import load_shape

if TYPE_CHECKING:
    from train import Config

HUB_SHAPES = {"stable-diffusion-2-1": "sd21", "stable-diffusion-2-1-base": "sd21-base"}
TEXT_TOKENS = {"pocket": 20}  # 77 for the others
GIB = 2**30


def shape_of(teacher: str) -> UNet2DConditionModel:
    """A teacher's U-Net without weights. Raises `UserError` where its shape is not known here."""
    name = teacher.removesuffix("-random")
    return load_shape(HUB_SHAPES.get(name.rsplit("/", 1)[-1], name))


def activation_bytes(unet: UNet2DConditionModel, latent_size: int, tokens: int) -> int:
    """Bytes in float32 of what the layers of one image's forward put out: an upper estimate of what
    its backward pass keeps.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += 4 * output.numel()

    model = skeleton(unet)
    for module in model.modules():
        if not list(module.children()) and any(True for _ in module.parameters()):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(**example_inputs(model, latent_size, tokens))
    return total


def plan(cfg: Config) -> str:
    """The plan of a run, several lines. Raises `UserError` where the budget cannot be reached.

    Args:
        cfg: with what depends on the target filled in.
    """
    assert cfg.teacher and cfg.batch_size and cfg.joint_steps and cfg.warmup_steps is not None
    unet = shape_of(cfg.teacher)
    size = min(cfg.resolution or 256, 8 * unet.config.sample_size) // 8
    tokens = TEXT_TOKENS.get(cfg.teacher, 77)
    space = ArchSpace.from_unet(unet, cfg.depth)
    macs = measure_macs(unet, space, latent_size=size, text_tokens=tokens)
    check_budget(cfg.budget, macs)
    params = sum(p.numel() for p in unet.parameters())
    forwards = 2 + cfg.distill + cfg.checkpointing
    steps, rate = cfg.warmup_steps + cfg.joint_steps, cfg.tflops * 1e12
    of_step = forwards * cfg.batch_size * macs.dense
    hours = 2 * steps * of_step / rate / 3600
    tuning = finetune.by_target(cfg.target)
    of_image = (1 + 3 * cfg.budget) * macs.dense
    images = cfg.num_experts * tuning["steps"] * tuning["batch_size"]
    tuning_hours = 2 * images * of_image / rate / 3600
    width = torch.empty((), dtype=PRECISIONS[cfg.precision]).element_size()
    weights = width * params
    together = min(cfg.micro_batch or cfg.batch_size, cfg.batch_size)
    activations = together * activation_bytes(unet, size, tokens) * width // 4
    expert = 4 * params * cfg.budget  # float32
    reach = cfg.lr * steps if cfg.lr else 0
    text = f"{forwards} forwards x {cfg.batch_size} images x {macs.dense / 1e9:.2f} G"
    return f"""\
{cfg.teacher} on {cfg.target}: {params / 1e6:.1f} M parameters, {space.size} prunable units
budget {cfg.budget:g} of {macs.dense / 1e9:.2f} G MACs at {8 * size} px; with everything pruned \
{macs.floor / macs.dense:.3f} are left; {cfg.num_experts} experts

pruning      {cfg.warmup_steps} + {cfg.joint_steps} steps, effective batch {cfg.batch_size}, \
{together} at once in each process
  MACs       {of_step / 1e12:.1f} T a step ({text}), {steps * of_step / 1e15:.1f} P in all
  time       {hours:.1f} hours of one GPU at {cfg.tflops:g} TFLOP/s: \
2 x {steps * of_step / 1e15:.1f} P / {cfg.tflops:g} T / 3600
  memory     {weights / GIB:.1f} GiB of weights ({cfg.precision}), up to \
{activations / GIB:.1f} GiB of activations at {together} images\
{", less with checkpointing" if cfg.checkpointing else ""}
  learning   a logit moves at most about {reach:.2g} in {steps} steps at lr {cfg.lr:g}; \
it starts at {cfg.open_logit:g}

fine-tuning  {cfg.num_experts} experts x {tuning["steps"]} steps x {tuning["batch_size"]} images = \
{images / 1e6:.2f} M images
  MACs       {of_image / 1e9:.1f} G an image (teacher 1 + expert 3 x {cfg.budget:g}, of \
{macs.dense / 1e9:.2f} G)
  time       {tuning_hours:.1f} hours of one GPU in all, \
{tuning_hours / cfg.num_experts:.1f} an expert
  memory     {(weights + 4 * expert) / GIB:.1f} GiB of weights, gradients and moments

disk         {cfg.num_experts * expert / GIB:.1f} GiB of experts, {3 * expert / GIB:.1f} GiB of a \
checkpoint while one is fine-tuned
"""
