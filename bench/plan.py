"""What a run will take, before anything is loaded: `python train.py --dry-run`. App. E.2.

The hours follow from exact MACs and the numbers of steps. A multiply-accumulate is two floating
point operations. For an image, pruning runs the teacher forward, the gated U-Net forward, and its
backward pass, which costs as much as a forward since the weights are frozen: three forwards. With
checkpointing it is four. Fine-tuning trains weights: the teacher forward, the expert forward, and
twice the expert's forward for its backward pass. Autoencoder and text encoder are left out.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from latency import latency_model
from macs import check_budget, measure_macs
from prune_unet import example_inputs, find_units, meta_copy
from run import PAPER_PIXELS, given_table
from settings import Pruning, finetuning_of
from teacher.model import PRECISIONS
from teacher.shapes import CLIP_TOKENS, PIXELS, POCKET_TOKENS, shape_of, text_widths

GIB = 2**30
STEPS = 25  # of a sample, App. E.2 ...
FORWARDS = 26  # ... for which PNDM takes one step twice


def activation_bytes(unet: UNet2DConditionModel, latent_size: int, tokens: int) -> int:
    """Bytes, in float32, that the forward of one image keeps for a backward pass to its input.

    Attention is counted as if it kept its S x S weights; fused kernels do not.
    """
    model = meta_copy(unet).requires_grad_(False)
    inputs = example_inputs(model, latent_size, tokens)
    inputs["sample"].requires_grad_()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by address; kept alive, so that none is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def what_is_pruned(cfg: Pruning, unet: UNet2DConditionModel, tokens: int) -> str:
    """Units, budget, and what a sample takes, several lines. Raises `UserError` as `plan`."""
    pixels = PIXELS * unet.config.sample_size
    space, every = find_units(unet, cfg.depth), find_units(unet, "all")
    sizes = {"latent_size": unet.config.sample_size, "text_tokens": tokens}
    macs, table = measure_macs(unet, space, **sizes), given_table(cfg)
    cost = latency_model(unet, space, table) if table else macs
    check_budget(cfg.budget, cost)
    whole = f"{macs.dense / 1e9:.2f} G MACs at {pixels} px"
    notes = ""
    if cfg.depth != "all":
        least = measure_macs(unet, every, **sizes)
        notes += (
            f"--depth all would give {every.size} units, with {least.floor / least.dense:.3f} of "
            "the MACs left if all are pruned\n"
        )
    if table:
        of = table["place"]
        whole = f"{cost.dense * 1e3:.3g} ms a forward"
        sample = 2 * FORWARDS * cost.dense / of["batch"]  # guidance takes two images
        notes += (
            f"latency: {cfg.budget * sample:.3g} seconds a sample ({STEPS} steps with guidance), "
            f"dense {sample:.3g}; {table['machine']['device']}, {of['precision']}, "
            f"batch {of['batch']}, {of['pixels']} px, {of['runtime']}\n"
        )
    elif cfg.cost == "latency":
        notes += "latency is measured as the run starts; latency.py measures it now\n"
    if text_widths(unet.config)[1]:
        notes += "SDXL: hyperparameters of Stable Diffusion 2.1, untested at full size\n"
    params = sum(p.numel() for p in unet.parameters())
    return f"""\
{cfg.teacher} on {cfg.target}: {params / 1e6:.1f} M parameters, {space.size} prunable units
budget {cfg.budget:g} of {whole}; with everything pruned {cost.floor / cost.dense:.3f} are left; \
{cfg.num_experts} experts
{notes}"""


def plan(cfg: Pruning) -> str:
    """The plan of a run, several lines. Raises `UserError` where the budget cannot be reached.

    Args:
        cfg: as `settings.resolve` gives it.
    """
    unet = shape_of(cfg.teacher)
    own = PIXELS * unet.config.sample_size
    pixels = min(cfg.resolution or PAPER_PIXELS, own)
    tokens = POCKET_TOKENS if cfg.teacher == "pocket" else CLIP_TOKENS
    space = find_units(unet, cfg.depth)
    head = what_is_pruned(cfg, unet, tokens)
    size = pixels // PIXELS
    macs = measure_macs(unet, space, latent_size=size, text_tokens=tokens)
    params = sum(p.numel() for p in unet.parameters())
    forwards = 2 + cfg.distill + cfg.checkpointing
    steps, rate = cfg.warmup_steps + cfg.joint_steps, cfg.tflops * 1e12
    of_step = forwards * cfg.batch_size * macs.dense
    hours = 2 * steps * of_step / rate / 3600
    tuning = finetuning_of(cfg.target)
    of_image = (1 + 3 * cfg.budget) * macs.dense
    images = cfg.num_experts * tuning.steps * tuning.batch_size
    tuning_hours = 2 * images * of_image / rate / 3600
    width = torch.empty((), dtype=PRECISIONS[cfg.precision]).element_size()
    weights = width * params
    together = min(cfg.micro_batch, cfg.batch_size)
    activations = together * activation_bytes(unet, size, tokens) * width // 4
    expert = 4 * params * cfg.budget  # float32
    reach = cfg.lr * steps
    start = (
        "they start within 4 of 0" if cfg.importance_start else f"all start at {cfg.open_logit:g}"
    )
    text = f"{forwards} forwards x {cfg.batch_size} images x {macs.dense / 1e9:.2f} G"
    return f"""\
{head}
pruning      {cfg.warmup_steps} + {cfg.joint_steps} steps at {pixels} px, effective batch \
{cfg.batch_size}, {together} at once in each process
  MACs       {of_step / 1e12:.1f} T a step ({text}), {steps * of_step / 1e15:.1f} P in all
  time       {hours:.1f} hours of one GPU at {cfg.tflops:g} TFLOP/s: \
2 x {steps * of_step / 1e15:.1f} P / {cfg.tflops:g} T / 3600
  memory     {weights / GIB:.1f} GiB of weights ({cfg.precision}), about \
{activations / GIB:.1f} GiB of activations at {together} images\
{", less with checkpointing" if cfg.checkpointing else ""}
  learning   logits move by {reach:.2g} at most in {steps} steps at lr {cfg.lr:g}; {start}

fine-tuning  {cfg.num_experts} experts x {tuning.steps} steps x {tuning.batch_size} images = \
{images / 1e6:.2f} M images
  MACs       {of_image / 1e9:.1f} G an image (teacher 1 + expert 3 x {cfg.budget:g}, of \
{macs.dense / 1e9:.2f} G)
  time       {tuning_hours:.1f} hours of one GPU in all, \
{tuning_hours / cfg.num_experts:.1f} an expert
  memory     {(weights + 4 * expert) / GIB:.1f} GiB of weights, gradients and moments

disk         {cfg.num_experts * expert / GIB:.1f} GiB of experts, {3 * expert / GIB:.1f} GiB of a \
checkpoint while one is fine-tuned
"""
