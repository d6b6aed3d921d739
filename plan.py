"""What can be pruned of a U-Net, and what a run will take, before anything is loaded. App. E.2.

Behind `python prune_unet.py`, which prints the prunable units of a U-Net level by level, and
`python train.py --dry-run`, which prints a run's MACs, memory and hours. The hours
follow from exact MACs and the numbers of steps. A multiply-accumulate is two floating point
operations. For an image, pruning runs the teacher forward, the gated U-Net forward, and its
backward pass, which costs as much as a forward since the weights are frozen: three forwards. With
checkpointing it is four. Fine-tuning trains weights: the teacher forward, the expert forward, and
twice the expert's forward for its backward pass. Autoencoder and text encoder are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from common.errors import UserError
from gates import ArchSpace
from macs import (
    MacsModel,
    check_budget,
    example_inputs,
    measure_macs,
    module_macs,
    skeleton,
)
from settings import FINETUNING, PAPER_PIXELS, Pruning
from teacher.model import PRECISIONS
from teacher.shapes import CLIP_TOKENS, PIXELS, POCKET_TOKENS, load_shape, text_widths


@dataclass(frozen=True)
class Table:
    """Shows what can be pruned of a U-Net, level by level, and what it costs.

    MACs are multiply-accumulates of one forward of one image. The prunable share is the share of
    MACs that is saved if all removable layers go and one unit is left in each of the others.
    """

    unet: str = "sd21"
    """sd21, sd21-base, sd15, sdxl, pocket, or a folder with a diffusers U-Net (config.json) or
    pipeline (unet/config.json)."""
    resolution: int | None = None
    """Pixels a side, a multiple of 8; the U-Net's own if not given (paper: 768)."""
    text_tokens: int = 77
    """Length of the text states."""
    depth: Literal["paper", "all", "none"] = "paper"
    """Layers that may be removed whole: the last ResBlock and Transformer of each down and up block
    (paper), every one whose input and output shapes agree (all), none."""
    json: bool = False
    """Print one JSON object instead of the table."""


def level_costs(
    unet: UNet2DConditionModel, macs: MacsModel, *, latent_size: int, text_tokens: int = 77
) -> list[dict[str, Any]]:
    """Units, parameters, MACs and prunable share of MACs of each down, middle and up block.

    Layers outside the blocks are listed as `input` and `output`.

    Args:
        unet: a diffusers UNet2DConditionModel, on any device.
        macs: its T(a), for the same `latent_size` and `text_tokens`.
    """
    model = skeleton(unet)
    counts = module_macs(model, example_inputs(model, latent_size, text_tokens))
    blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    blocks += ["mid_block"] if unet.mid_block is not None else []
    blocks += [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]

    def level_of(name: str) -> str:
        inner = next((block for block in blocks if name.startswith(block + ".")), "input")
        return "output" if name.startswith(("conv_norm_out.", "conv_out.")) else inner

    params: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        params[level_of(name)] += parameter.numel()
    level_macs = Counter(
        {block: counts[block] for block in blocks} | {"output": counts["conv_out"]}
    )
    level_macs["input"] = counts[""] - level_macs.total()
    rows = []
    for level in ("input", *blocks, "output"):
        layers = [layer for layer in macs.space.layers if layer.name.startswith(level + ".")]
        code = torch.ones(macs.space.size)
        units: Counter[str] = Counter()
        for layer in layers:
            code[layer.span] = macs.smallest()[layer.span]
            units[layer.kind] += layer.units
        gone = macs.dense - round(macs(code).item())
        rows.append(
            {
                "level": level,
                "units": units.total(),
                "groups": units["resnet"],
                "heads": units["attention"],
                "ff": units["feedforward"],
                "depth": units["depth"],
                "params": params[level],
                "macs": level_macs[level],
                "prunable": gone / level_macs[level],
            }
        )
    return rows


def paper_macs(unet: UNet2DConditionModel, *, latent_size: int) -> int:
    """The U-Net's MACs by the convention of the paper's tables, for comparison with them only.

    It counts, for one image with one text token,
    - all matrix products, where the two of a cross-attention are taken to be as large as those of
      self-attention at that place, S x S, not S x tokens;
    - one operation for each element that a bias, a normalisation, an activation or a softmax
      (S x S a head, again) puts out.

    Args:
        unet: run once as it is; give a `skeleton`, cut or not, unless a real forward is wanted.
        latent_size: height and width of the latent: pixels / 8.
    """
    extra = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal extra
        if isinstance(module, Attention):
            S = inputs[0].flatten(2).shape[2] if inputs[0].ndim == 4 else inputs[0].shape[1]
            extra += module.heads * S * S
            if module.is_cross_attention:
                extra += 2 * module.inner_dim * S * (S - 1)
        elif isinstance(module, FeedForward):
            extra += inputs[0].shape[:-1].numel() * module.net[2].in_features  # its activation
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.SiLU) or (
            isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None
        ):
            extra += output.numel()

    hooks = [module.register_forward_hook(count) for module in unet.modules()]
    device = next(unet.parameters()).device
    macs = module_macs(unet, example_inputs(unet, latent_size, 1, device))[""]
    for hook in hooks:
        hook.remove()
    return macs + extra


def describe(
    name: str, resolution: int | None = None, text_tokens: int = 77, depth: str = "paper"
) -> dict[str, Any]:
    """Units, parameters and MACs of a U-Net, in total and for each level.

    Args:
        name: as `load_shape` takes it.
        resolution: pixels a side, a multiple of 8; None for the U-Net's own.
        text_tokens: length of the text states.
        depth: as `ArchSpace.from_unet` takes it.

    Raises:
        UserError: an argument is none of these.
    """
    unet = load_shape(name)
    if resolution is None and not isinstance(unet.config.sample_size, int):
        raise UserError(f"--unet {name} states no size of its own; give --resolution")
    resolution = PIXELS * unet.config.sample_size if resolution is None else resolution
    if resolution < PIXELS or resolution % PIXELS:
        raise UserError(f"--resolution {resolution} is not a multiple of {PIXELS}; try 768")
    if text_tokens < 1:
        raise UserError(f"--text-tokens {text_tokens} is too small; choose 1 or more")
    space = ArchSpace.from_unet(unet, depth)
    sizes = {"latent_size": resolution // PIXELS, "text_tokens": text_tokens}
    macs = measure_macs(unet, space, **sizes)
    return {
        "unet": name,
        "resolution": resolution,
        "text_tokens": text_tokens,
        "units": space.size,
        "groups": space.count("resnet"),
        "heads": space.count("attention"),
        "ff": space.count("feedforward"),
        "depth": space.count("depth"),
        "params": sum(p.numel() for p in unet.parameters()),
        "macs": macs.dense,
        "macs_paper": paper_macs(unet, latent_size=sizes["latent_size"]),
        "floor": macs.floor / macs.dense,
        "levels": level_costs(unet, macs, **sizes),
    }


def print_table(found: dict[str, Any]) -> None:
    """Print one line for each level of a U-Net, then the total."""
    columns = ("units", "groups", "heads", "ff", "depth")
    unit, per_unit = ("G", 1e9) if found["macs"] >= 1e10 else ("M", 1e6)
    total = {**found, "level": "total", "prunable": 1 - found["floor"]}
    print(f"{found['unet']}, {found['resolution']} px, {found['text_tokens']} text tokens")
    heads = "".join(f"{name:>8}" for name in columns)
    print(f"{'level':<14}{heads}{'parameters':>15}{'MACs':>12}{'prunable':>10}")
    for row in [*found["levels"], total]:
        counts = "".join(f"{row[name]:>8}" for name in columns)
        numbers = (
            f"{row['params']:>15,}{row['macs'] / per_unit:>10.2f} {unit}{row['prunable']:>10.1%}"
        )
        print(f"{row['level']:<14}{counts}{numbers}")
    print(f"lowest budget {found['floor']:.4f}: removable layers gone, one unit left in the others")
    print(f"MACs by the paper's convention {found['macs_paper'] / per_unit:.2f} {unit}")


HUB_SHAPES = {
    "stable-diffusion-2-1": "sd21",
    "stable-diffusion-2-1-base": "sd21-base",
    "stable-diffusion-xl-base-1.0": "sdxl",
}

GIB = 2**30


def shape_of(teacher: str) -> UNet2DConditionModel:
    """A teacher's U-Net without weights. Raises `UserError` where its shape is not known here."""
    name = teacher.removesuffix("-random")
    return load_shape(HUB_SHAPES.get(name.rsplit("/", 1)[-1], name))


def activation_bytes(unet: UNet2DConditionModel, latent_size: int, tokens: int) -> int:
    """Bytes, in float32, that the forward of one image keeps for a backward pass to its input.

    Attention is counted as if it kept its S x S weights; fused kernels do not.
    """
    model = skeleton(unet).requires_grad_(False)
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


def plan(cfg: Pruning) -> str:
    """The plan of a run, several lines. Raises `UserError` where the budget cannot be reached.

    Args:
        cfg: with what depends on the target filled in.
    """
    assert cfg.teacher and cfg.batch_size and cfg.joint_steps and cfg.warmup_steps is not None
    unet = shape_of(cfg.teacher)
    own = PIXELS * unet.config.sample_size
    pixels = min(cfg.resolution or PAPER_PIXELS, own)
    tokens = POCKET_TOKENS if cfg.teacher == "pocket" else CLIP_TOKENS
    space = ArchSpace.from_unet(unet, cfg.depth)
    used = measure_macs(unet, space, latent_size=own // PIXELS, text_tokens=tokens)
    check_budget(cfg.budget, used)
    size = pixels // PIXELS
    macs = measure_macs(unet, space, latent_size=size, text_tokens=tokens)
    params = sum(p.numel() for p in unet.parameters())
    forwards = 2 + cfg.distill + cfg.checkpointing
    steps, rate = cfg.warmup_steps + cfg.joint_steps, cfg.tflops * 1e12
    of_step = forwards * cfg.batch_size * macs.dense
    hours = 2 * steps * of_step / rate / 3600
    tuning = FINETUNING.get(cfg.target, FINETUNING["paper"])
    of_image = (1 + 3 * cfg.budget) * macs.dense
    images = cfg.num_experts * tuning["steps"] * tuning["batch_size"]
    tuning_hours = 2 * images * of_image / rate / 3600
    width = torch.empty((), dtype=PRECISIONS[cfg.precision]).element_size()
    weights = width * params
    together = min(cfg.micro_batch or cfg.batch_size, cfg.batch_size)
    activations = together * activation_bytes(unet, size, tokens) * width // 4
    expert = 4 * params * cfg.budget  # float32
    reach = cfg.lr * steps if cfg.lr else 0
    start = (
        "they start within 4 of 0" if cfg.importance_start else f"all start at {cfg.open_logit:g}"
    )
    untested = ""
    if text_widths(unet.config)[1]:
        untested = "SDXL: hyperparameters of Stable Diffusion 2.1, untested at full size\n"
    text = f"{forwards} forwards x {cfg.batch_size} images x {macs.dense / 1e9:.2f} G"
    return f"""\
{cfg.teacher} on {cfg.target}: {params / 1e6:.1f} M parameters, {space.size} prunable units
budget {cfg.budget:g} of {used.dense / 1e9:.2f} G MACs at {own} px; with everything pruned \
{used.floor / used.dense:.3f} are left; {cfg.num_experts} experts
{untested}
pruning      {cfg.warmup_steps} + {cfg.joint_steps} steps at {pixels} px, effective batch \
{cfg.batch_size}, {together} at once in each process
  MACs       {of_step / 1e12:.1f} T a step ({text}), {steps * of_step / 1e15:.1f} P in all
  time       {hours:.1f} hours of one GPU at {cfg.tflops:g} TFLOP/s: \
2 x {steps * of_step / 1e15:.1f} P / {cfg.tflops:g} T / 3600
  memory     {weights / GIB:.1f} GiB of weights ({cfg.precision}), about \
{activations / GIB:.1f} GiB of activations at {together} images\
{", less with checkpointing" if cfg.checkpointing else ""}
  learning   logits move by {reach:.2g} at most in {steps} steps at lr {cfg.lr:g}; {start}

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
