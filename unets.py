"""U-Nets by name, as shapes without weights, and a table of what can be pruned of one. Sec. 4.

`assets/unets/` holds the configurations that the models' authors published, as far as a U-Net needs
them: sd15, sd21-base (512 px), sd21 (768 px), sdxl. Behind `python prune_unet.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from gates import ArchSpace
from macs import MacsModel, example_inputs, measure_macs, module_macs, paper_macs, skeleton
from runfolder import UserError, read_json

ASSETS = Path(__file__).resolve().parent / "assets"
PIXELS = 8  # a side of what one latent position stands for
CONDITIONS: dict[str, tuple[str, ...]] = {  # what a U-Net may ask for beside text states
    "addition_embed_type": ("text_time",),
    "class_embed_type": (),
    "encoder_hid_dim_type": (),
    "num_class_embeds": (),
}


def load_shape(name: str) -> UNet2DConditionModel:
    """A U-Net on the meta device, by the name of a published one or by folder.

    Raises:
        UserError: there is no such U-Net, or its configuration is not one of a U-Net.
    """
    files = (ASSETS / "unets").glob("*.json")
    known = {path.stem: path for path in sorted(files, key=lambda path: path.stem)}
    known["pocket"] = ASSETS / "pocket" / "unet" / "config.json"
    folder = Path(name)
    places = [known.get(name), folder / "config.json", folder / "unet" / "config.json"]
    path = next((place for place in places if place and place.is_file()), None)
    if path is None:
        raise UserError(
            f"--unet {name} is unknown; choose {', '.join(known)}, "
            "or a folder that holds config.json or unet/config.json"
        )
    config = read_json(path)
    if not isinstance(config, dict) or "block_out_channels" not in config:
        raise UserError(f"{path} is not the configuration of a diffusers UNet2DConditionModel")
    for key, value in ((key, config.get(key)) for key in CONDITIONS):
        if value and value not in CONDITIONS[key]:
            raise UserError(
                f"{path}: {key} {value} is not supported; it must be conditioned on text"
            )
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config).eval()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not the configuration of a U-Net ({reason})") from None


def level_costs(
    unet: UNet2DConditionModel, macs: MacsModel, *, latent_size: int, text_tokens: int = 77
) -> list[dict[str, Any]]:
    """Units, parameters, MACs and prunable share of MACs of each down, middle and up block.

    What lies outside the blocks is split into `input` and `output`.

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


def describe(
    name: str, resolution: int | None = None, text_tokens: int = 77, depth: str = "paper"
) -> dict[str, Any]:
    """Units, parameters and MACs of a U-Net, in all and a level.

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
    """The levels of a U-Net, one a line, then the whole."""
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
