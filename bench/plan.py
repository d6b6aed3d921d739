"""What a run will take, before anything is loaded: `python train.py --dry-run`. App. E.2.

The hours follow from exact MACs and the numbers of steps. A multiply-accumulate is two floating
point operations. For an image, pruning runs the teacher forward, the gated U-Net forward, and its
backward pass, which costs as much as a forward since the weights are frozen: three forwards. With
checkpointing it is four. Fine-tuning trains weights: the teacher forward, the expert forward, and
twice the expert's forward for its backward pass. Refitting runs teacher and expert forward through
the gated U-Net, and sums X^T X and X^T R. What autoencoder and text encoder take is told
apart: an image is encoded once, a caption too where all of them fit into memory.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.cache import cache_folder
from common.files import read_json
from gates import ArchSpace
from latency import latency_model
from macs import check_budget, measure_macs
from prune_unet import example_inputs, find_units, gated_module, meta_copy
from run import PAPER_PIXELS, given_table
from settings import Finetuning, Pruning, finetuning_of
from teacher.encoded import SHARE
from teacher.model import PRECISIONS
from teacher.parts import AutoencoderDC
from teacher.shapes import ASSETS, CLIP_TOKENS, PIXELS, POCKET_TOKENS, shape_of, text_widths

GIB = 2**30
STEPS = 25  # of a sample, App. E.2 ...
FORWARDS = 26  # ... for which PNDM takes one step twice
ROWS = {"emoji": (3_488, 3_488), "coco": (82_783, 414_113), "cc3m": (2_500_000, 2_500_000)}
# Transformers that make text states of a width: each one's width and layers
TEXT_ENCODERS = {384: [(384, 6)], 768: [(768, 12)], 1024: [(1024, 23)]}
TEXT_ENCODERS[2048] = [(768, 12), (1280, 32)]
SD_AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


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


def refit_costs(
    unet: UNet2DConditionModel, space: ArchSpace, latent_size: int, tokens: int, share: float
) -> tuple[int, int, int, int]:
    """Of refitting an expert that keeps a share of each layer's units, in float32.

    Returns:
        MACs of the normal equations of one image; bytes of what is kept of one image, for teacher
        and expert, at most; bytes of the largest X^T X and its factor; bytes of the new weights.
    """
    model = meta_copy(unet)
    macs, inner, largest, weights, skips = 0, 0, 0, 0, 0

    def layer(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, inner, largest, weights
        K, outputs = int(share * module.weight[0].numel()), module.weight.shape[0]
        macs += output.numel() // outputs * K * (K + outputs)
        inner = max(inner, inputs[0].numel() + 3 * output.numel())  # stream, residual, output
        largest, weights = max(largest, 2 * K * K), weights + K * outputs

    def down(module: Any, inputs: Any, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        nonlocal skips
        skips += sum(skip.numel() for skip in output[1])

    for width_layer in space.width_layers:
        gated_module(model, width_layer)[0].register_forward_hook(layer)
    for block in model.down_blocks:
        block.register_forward_hook(down)
    model(**example_inputs(model, latent_size, tokens))
    return macs, 2 * 4 * (skips + inner), 4 * largest, 4 * weights


def encoder_macs(cfg: Pruning, width: int, pixels: int, tokens: int) -> tuple[int, int]:
    """MACs of encoding one image, and one caption to text states of a width."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        if cfg.teacher == "pocket":
            vae = AutoencoderDC.from_config(read_json(ASSETS / "pocket" / "vae" / "config.json"))
        else:
            vae = AutoencoderKL(**SD_AUTOENCODER)
        vae.encode(torch.empty(1, 3, pixels, pixels))
    # a layer: four projections and a feed-forward of four times the width; attention's two products
    caption = sum(
        layers * (12 * tokens * own**2 + 2 * tokens**2 * own)
        for own, layers in TEXT_ENCODERS.get(width, [])
    )
    return counter.get_total_flops() // 2, caption


def what_is_encoded(
    cfg: Pruning, unet: UNet2DConditionModel, pixels: int, tokens: int, used: int
) -> str:
    """What encoding takes, and where it is kept, several lines.

    Args:
        used: captions that all steps use.
    """
    states, pooled = text_widths(unet.config)
    image, caption = encoder_macs(cfg, states, pixels, tokens)
    width = torch.empty((), dtype=PRECISIONS[cfg.precision]).element_size()
    of_latents = 4 * unet.config.in_channels * (pixels // PIXELS) ** 2
    of_text = width * (tokens * states + pooled)
    head = (
        f"encoding     {image / 1e9:.1f} G MACs an image, once: its latents are kept in "
        f"{cache_folder()}\n  captions   {caption / 1e9:.1f} G, once where 1/{SHARE} of the free "
        "memory holds them all, else in every step\n"
    )
    if cfg.target not in ROWS:
        return head + f"  disk       {of_latents / 1024:.0f} KiB an image\n"
    images, captions = (min(count, cfg.limit or count) for count in ROWS[cfg.target])
    once, again = images * image + captions * caption, images * image + used * caption
    rate = cfg.tflops * 1e12 * 3600 / 2
    return f"""{head}\
  in all     {images:,} images and {captions:,} captions: {once / 1e15:.3g} P MACs, \
{once / rate:.2g} hours of one GPU; {again / rate:.2g} with captions in every step
  disk       {images * of_latents / GIB:.3g} GiB of latents, mapped by all processes and runs
  memory     {captions * of_text / GIB:.3g} GiB a process hold all captions ({cfg.precision})
"""


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


def what_is_refitted(
    cfg: Pruning,
    tuning: Finetuning,
    unet: UNet2DConditionModel,
    sizes: tuple[int, int],
    dense: float,
) -> str:
    """What experts take that are refitted, and what shared weights take, several lines.

    Args:
        sizes: of latents, and of text in tokens.
        dense: MACs of a forward of the dense U-Net.
    """
    N, n = cfg.num_experts, tuning.refit_images
    params = sum(p.numel() for p in unet.parameters())
    space = find_units(unet, cfg.depth)
    equations, waiting, largest, weights = refit_costs(unet, space, *sizes, cfg.budget)
    macs = N * n * (2 * dense + equations)
    return f"""\
refitting    {N} experts x {n} images
  MACs       {2 * dense / 1e9:.1f} G an image (teacher and expert, both through the dense U-Net), \
{equations / 1e9:.1f} G of normal equations
  time       {2 * macs / cfg.tflops / 1e12:.2g} seconds of one GPU in all
  memory     {4 * params / GIB:.1f} GiB of weights, {largest / GIB:.2f} GiB of normal equations, \
up to {n * waiting / GIB:.2f} GiB ({waiting / 2**20:.1f} MiB an image) of skips and streams
  disk       about {N * weights / GIB:.2g} GiB of experts that are refitted alone

shared       one set of weights (finetune.py --shared) instead of {N} experts
  MACs       {4 * dense / 1e9:.1f} G an image (teacher 1 + dense 3)
  memory     {4 * params / GIB:.1f} GiB of the teacher, {16 * params / GIB:.1f} GiB of weights, \
gradients and moments
  disk       {4 * params / GIB:.1f} GiB
"""


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

{what_is_refitted(cfg, tuning, unet, (size, tokens), macs.dense)}
{what_is_encoded(cfg, unet, pixels, tokens, steps * cfg.batch_size + images)}
disk         {cfg.num_experts * expert / GIB:.1f} GiB of experts, {3 * expert / GIB:.1f} GiB of a \
checkpoint while one is fine-tuned
"""
