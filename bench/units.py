"""What can be pruned of a U-Net, level by level, and what it costs. App. D.3, E.2.

    python -m bench.units --unet sd21 --resolution 768
    python -m bench.units --unet sdxl --depth all --json

No weights are needed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from common.errors import UserError, command_line
from common.options import read_options
from common.ranges import Count, Pixels, check
from macs import CostModel, measure_macs, module_macs
from prune_unet import blocks_of, example_inputs, find_units, meta_copy
from settings import Depth
from teacher.shapes import PIXELS, load_shape


@dataclass(frozen=True)
class Table:
    """Shows what can be pruned of a U-Net, level by level, and what it costs.

    MACs are multiply-accumulates of one forward of one image. The prunable share is the share of
    MACs that is saved if all removable layers go and one unit is left in each of the others.
    """

    unet: str = "sd21"
    """sd21, sd21-base, sd15, sdxl, pocket, or a folder with a diffusers U-Net (config.json) or
    pipeline (unet/config.json)."""
    resolution: Pixels | None = None
    """Pixels a side, a multiple of 8; the U-Net's own if not given (paper: 768)."""
    text_tokens: Count = 77
    """Length of the text states."""
    depth: Depth = "paper"
    """Layers that may be removed whole: the last ResBlock and Transformer of each down and up block
    (paper), every one whose input and output shapes agree (all), none."""
    json: bool = False
    """Print one JSON object instead of the table."""


def level_costs(
    unet: UNet2DConditionModel, macs: CostModel, *, latent_size: int, text_tokens: int = 77
) -> list[dict[str, Any]]:
    """Units, parameters, MACs and prunable share of MACs of each down, middle and up block.

    Layers outside the blocks are listed as `input` and `output`.

    Args:
        unet: a diffusers UNet2DConditionModel, on any device.
        macs: its T(a), for the same `latent_size` and `text_tokens`.
    """
    model = meta_copy(unet)
    counts = module_macs(model, example_inputs(model, latent_size, text_tokens))
    blocks = list(blocks_of(unet))

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
        gone = macs.dense - macs(code).item()
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
        unet: run once as it is; give a `meta_copy`, cut or not, unless a real forward is wanted.
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
        depth: as `find_units` takes it.

    Raises:
        UserError: an argument is none of these.
    """
    unet = load_shape(name)
    if resolution is None and not isinstance(unet.config.sample_size, int):
        raise UserError(f"--unet {name} states no size of its own; give --resolution")
    resolution = PIXELS * unet.config.sample_size if resolution is None else resolution
    if resolution < PIXELS or resolution % PIXELS:
        raise UserError(f"--resolution {resolution} is not a multiple of {PIXELS}; try 768")
    space = find_units(unet, depth)
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
        "macs": round(macs.dense),
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


def main() -> None:
    cfg = read_options(Table, __doc__)
    check(cfg)
    found = describe(cfg.unet, cfg.resolution, cfg.text_tokens, cfg.depth)
    print(json.dumps(found)) if cfg.json else print_table(found)


if __name__ == "__main__":
    command_line(main)
